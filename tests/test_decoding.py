"""Decoding, against decoding every frame and picking the nearest: order, time, damage, pixels."""

import contextlib
import itertools
import os
import struct
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch
from conftest import SHARED_VIDEOS, encode, noise_frames
from torchvision.transforms.v2 import functional as F

import data


def decode_all(path):
    """Every frame of a file by time stamp, up to the first error; and a unit of stamps in seconds.

    A decoder lets frames out in the order in which they are shown: the n-th has the n-th stamp.
    """
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        with contextlib.suppress(av.error.FFmpegError):
            frames.extend(container.decode(stream))
        return dict(zip(sorted(frame.pts for frame in frames), frames)), float(stream.time_base)


def draw_times(duration, seed):
    rng = np.random.RandomState(seed)
    if seed % 2:
        return rng.uniform(0, duration, 9 if seed == 1 else 1)  # in any order
    clips = [data.clip_times(duration, 16, 4, rng.rand()) for _ in range(seed + 1)]
    return np.concatenate(clips)


def assert_same_frames(path, seeds=5):
    """Start, duration and frames are those of decoding everything and picking the nearest."""
    frames, unit = decode_all(path)
    start, *_, end = frames
    gap = max(np.diff([*frames])) * unit
    stamps = np.array([stamp for stamp in frames if not frames[stamp].is_corrupt])
    for seed in range(seeds):
        with data.Video(path) as video:
            times = draw_times(video.duration, seed)
            got = video.frames(times)
        assert video.start == start
        assert video.duration == pytest.approx((end - start) * unit, abs=max(0.1, 1.1 * gap))
        wanted = [stamps[np.abs((stamps - start) * unit - time).argmin()] for time in times]
        assert [frame.pts for frame in got] == wanted
        for frame in set(got):
            expected = frames[frame.pts].to_ndarray(format="rgb24")
            assert np.array_equal(frame.to_ndarray(format="rgb24"), expected)


def numbered_frames(n, height=48):
    """Pictures that show their number: its bits as bright and dark stripes."""
    bits = np.arange(n)[:, None] >> np.arange(8) & 1
    stripes = (40 + 170 * bits).repeat(8, axis=1).astype(np.uint8)
    return np.broadcast_to(stripes[:, None, :, None], (n, height, 64, 3))


def shown(video, *numbers):
    """The numbers that a video of numbered frames shows at the times of these."""
    frames = video.frames(np.array(numbers) / 30)
    stripes = [frame.to_ndarray(format="gray").reshape(frame.height, 8, -1) for frame in frames]
    return [((part.mean((0, 2)) > 120) << np.arange(8)).sum() for part in stripes]


def rewrite(source, target, content=lambda i, packet: bytes(packet), **settings):
    """Copy a video from its first key frame on without decoding it; content(i, packet) is written."""
    with av.open(str(source)) as old, av.open(str(target), "w", **settings) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = itertools.dropwhile(lambda packet: not packet.is_keyframe, old.demux(video=0))
        for i, packet in enumerate(packet for packet in packets if packet.size):
            copy = av.Packet(content(i, packet))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            new.mux(copy)
    return target


def with_sound(path, frames, codec="libx264", sound="aac"):
    """Frames, and 10 s of sound; the codec mjpeg makes a cover picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, width=64, height=48)
        if codec == "mjpeg":
            stream.pix_fmt, stream.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        audio = container.add_stream(sound, rate=48000)
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 480_000), np.float32), "fltp", "stereo")
        silence.sample_rate = 48000
        container.mux([*stream.encode(), *audio.encode(silence), *audio.encode()])
    return path


def alter_packets(video, change):
    """Call change(packet) for each packet that the video reads from now on."""
    packets = video.packets
    video.packets = lambda *args: (change(packet) or packet for packet in packets(*args))


MJPEG = dict(codec="mjpeg", pix_fmt="yuvj420p")
OPEN_GOP = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:open-gop=1:bframes=3"}
GOP = {"g": "30", "bf": "2", "sc_threshold": "0"}
REFRESH = {"x264-params": "intra-refresh=1:keyint=25:scenecut=0"}
LAYERS = {"x265-params": "temporal-layers=1:bframes=4:keyint=50:log-level=none"}
ORDERS = {
    "h264.mp4": dict(options={"g": "20", "bf": "3"}),
    "h264.mkv": dict(options={"g": "250", "bf": "3"}),
    "prepared.mp4": dict(options={"g": "30", "tune": "fastdecode"}),  # as the README says
    "h264.avi": dict(options={"g": "20", "bf": "2"}),
    "vp9.webm": dict(codec="libvpx-vp9", options={"g": "20"}),
    "mpeg4.avi": dict(codec="mpeg4", options={"g": "12", "bf": "2"}),
    "mpeg2.ts": dict(codec="mpeg2video", options={"g": "12", "bf": "2"}),
    "mpeg2.avi": dict(codec="mpeg2video", options={"g": "12", "bf": "2"}),
    "hevc.mp4": dict(codec="libx265", options={"x265-params": "keyint=16:log-level=none"}),
    "hevc_layers.ts": dict(codec="libx265", options=LAYERS),
    "all_are_keys.mp4": dict(codec="mpeg4", options={"g": "30"}),  # so its index says
    "long_group.ts": dict(options={"x264-params": "keyint=90:scenecut=0"}),
    **{f"open_gop.{end}": dict(options=OPEN_GOP) for end in ("mp4", "avi", "ts")},
    **{f"refresh.{end}": dict(options=REFRESH) for end in ("mp4", "ts")},  # no intra pictures
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_frame_at_a_time_shows_the_picture_of_that_time(name, tmp_path):
    path = encode(tmp_path / name, numbered_frames(100), **ORDERS[name])
    if "all_are_keys" in name:
        path.write_bytes(path.read_bytes().replace(b"stss", b"free"))  # no list of key frames
    for seed in range(6):
        with data.Video(path) as video:
            numbers = np.rint(draw_times(video.duration, seed) * 30).clip(0, 99).tolist()
            assert shown(video, *numbers) == numbers
    assert_same_frames(path, 3)


FILES = {
    **{f"late.{end}": dict(times=range(250, 330)) for end in ("mp4", "mkv", "ts", "fragments.mp4")},
    **{f"sound.{end}": {} for end in ("mkv", "flv", "ts", "mp4")},
    "sound.webm": dict(codec="libvpx", sound="libopus"),
    "raw.m1v": dict(codec="mpeg1video", options={"g": "12"}),
    "raw.m2v": dict(codec="mpeg2video", options={"g": "12"}),
    **{f"cut.{end}": dict(options={"g": "5", "bf": "0"}) for end in ("mkv", "flv", "ts")},
    "cut.avi": dict(codec="mpeg4", options={"g": "5"}),
    "10_bit.mp4": dict(pix_fmt="yuv420p10le"),
    "odd_444.mp4": dict(frames=noise_frames(80, 45, 63), pix_fmt="yuv444p"),
    "variable_rate.mp4": dict(times=np.cumsum(np.random.RandomState(0).randint(1, 7, 80))),
    "low_rate.mp4": dict(rate=6),
    "shorter_than_a_clip.mp4": dict(frames=noise_frames(5)),
}


@pytest.mark.parametrize("name", FILES)
def test_duration_and_frames_are_those_of_decoding_everything(name, tmp_path):
    make, path = with_sound if "sound" in name else encode, tmp_path / name
    make(path, **{"frames": noise_frames(80)} | FILES[name])
    if name == "late.fragments.mp4":
        movflags = "frag_keyframe+empty_moov+frag_discont"
        options = dict(movflags=movflags, avoid_negative_ts="disabled")
        path = rewrite(path, tmp_path / "b.mp4", options=options)
    elif "cut" in name:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_same_frames(path, 3)


NO_VIDEOS = "README.md", "compare.py", "corrupted.mp4", "late_stream_cut.flv", "cover_art_only.ogg"
REAL = [*SHARED_VIDEOS.glob("*.*"), *SHARED_VIDEOS.parent.glob("hard_videos/*.*")]
REAL = sorted(path for path in REAL if path.name not in NO_VIDEOS)


@pytest.mark.skipif(not SHARED_VIDEOS.exists(), reason="needs ../shared/videos")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_duration_and_frames_of_real_files_are_too(path):
    assert_same_frames(path, 2)


def test_a_packet_that_shows_nothing_is_no_frame(tmp_path):
    """VP8 and VP9 have pictures that others refer to, in packets of their own, and never shown."""

    def hide(i, packet):
        first, *others = bytes(packet)
        return bytes([first & ~0x10 if i % 5 == 3 else first, *others])  # VP8's show_frame

    path = encode(tmp_path / "a.webm", numbered_frames(80), codec="libvpx", options={"g": "20"})
    path = rewrite(path, tmp_path / "hidden.webm", hide)
    assert len(decode_all(path)[0]) == 64
    assert_same_frames(path)
    with data.Video(path) as video:  # frame 8 is hidden; one wanted frame is not refused for that
        assert shown(video, 7.97) == [7] and shown(video, 8.03) == [9]


def test_corrupt_frames_count_as_missing(tmp_path):
    """FFmpeg fills damaged pictures with what is near; it marks them as corrupt."""

    def damage(i, packet):
        half = packet.size // 2 if packet.is_keyframe and i else packet.size
        return bytes(packet)[:half] + bytes(packet.size - half)

    options = {"g": "4", "bf": "0", "sc_threshold": "0"}
    path = encode(tmp_path / "a.mp4", noise_frames(80), options=options)
    path = rewrite(path, tmp_path / "damaged.mp4", damage)
    assert sum(frame.is_corrupt for frame in decode_all(path)[0].values()) == 19
    with data.Video(path) as video:
        got = video.frames(np.arange(80) / 30)  # one frame in four: the nearest stand in
        assert len(got) == 80 and not any(frame.is_corrupt for frame in got)
        with pytest.raises(data.VideoError, match="10 of 10 wanted frames cannot be decoded"):
            video.frames(np.arange(4, 44, 4) / 30)


def test_a_packet_that_cannot_be_decoded_costs_its_own_frame_alone(tmp_path, monkeypatch):
    def spoil(i, packet):
        return b"no picture" if i in (0, 150) else bytes(packet)

    path = encode(tmp_path / "a.mkv", numbered_frames(250), **MJPEG)
    with data.Video(rewrite(path, tmp_path / "spoilt.mkv", spoil)) as video:
        for limit in (1, 10):  # with a seek to each wanted frame, and without
            monkeypatch.setattr(data, "SEEK_GAP", limit)
            assert shown(video, 10, 100, 150, 240) in ([10, 100, n, 240] for n in (149, 151))
        assert shown(video, 100, 150)[0] == 100  # half of them
        for n in (0, 150):  # also at a time stamp of 0
            with pytest.raises(data.VideoError, match="1 of 1 wanted frames cannot be decoded"):
                video.frames([n / 30])


def test_of_two_files_joined_both_are_used(tmp_path):
    path, halves = tmp_path / "a.ts", np.split(numbered_frames(160), 2)
    path.write_bytes(b"".join(encode(path, x, options=GOP).read_bytes() for x in halves))
    with data.Video(path) as video:
        assert video.duration == pytest.approx(160 / 30, abs=0.1)
        assert shown(video, 3, 77, 85, 159) == pytest.approx([3, 77, 85, 159], abs=1)


@pytest.mark.parametrize("options", [GOP, OPEN_GOP, REFRESH])
@pytest.mark.parametrize("name", ["a.ts", "a.mkv"])
def test_a_file_cut_inside_a_group_begins_with_its_first_decodable_frame(name, options, tmp_path):
    path = encode(tmp_path / "whole.ts", noise_frames(200), options=options)
    path.write_bytes(path.read_bytes()[path.stat().st_size // 5 // 188 * 188 :])
    if name == "a.mkv":  # pictures that are shown before its key frame may come next
        path = rewrite(path, tmp_path / name)
    assert_same_frames(path, 3)


def test_a_packet_without_a_stamp_reaches_the_decoder(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered_frames(120), options={"g": "60", "bf": "0"})
    with data.Video(path) as video:  # a frame takes 512 of its units of time
        alter_packets(video, lambda p: setattr(p, "pts", p.pts if p.pts % (4 * 512) else None))
        assert shown(video, 41, 42, 50) == [41, 42, 50]


def test_a_careful_pass_reads_little_and_is_told_of_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.Video, "careful", 98)
    path = encode(tmp_path / "a.mp4", noise_frames(900, 16, 16), codec="mpeg4", options=GOP)
    for reorders in (True, True, True, False):  # as if its stamps were of decoding
        with data.Video(path) as video:
            video.reorders = reorders
            alter_packets(video, (read := []).append)
            video.frames([25.0])
        assert 300 < len(read) < 390 if reorders else len(read) < 100
    assert data.Video.careful == 101 and capsys.readouterr().out.count("careful pass") == 1


@pytest.mark.parametrize("name, careful", [("open_gop.mp4", 0), ("h264.mkv", 0), ("fields.mp4", 9)])
def test_the_fast_pass_does_for_all_but_interlaced_videos(name, careful, tmp_path, monkeypatch):
    options = ORDERS.get(name, dict(options={"x264-params": "tff=1:keyint=12"}))
    path = encode(tmp_path / name, numbered_frames(100), **options)
    monkeypatch.setattr(data.Video, "careful", 0)
    with data.Video(path) as video:
        for number in range(20, 29):  # shown before a key frame and after it
            assert shown(video, number, number + 1) == [number, number + 1]
    assert data.Video.careful == careful


def test_a_seek_that_leads_too_far_is_noticed(tmp_path):
    path = encode(tmp_path / "a.mkv", numbered_frames(225), **MJPEG, times=range(0, 900, 4))
    with data.Video(path) as video:  # 30 s: a careful pass does not reach the start
        packets, late = video.packets, video.start + 25 * video.second
        video.packets = lambda first, _: (p for p in packets(first, _) if first < 0 or p.pts > late)
        assert shown(video, 600) == [150]


def test_a_careful_pass_finds_frames_whose_stamps_are_out_of_order(tmp_path, monkeypatch):
    def swap(packet):  # 1, 0, 3, 2, 5, 4: neighbours have each other's stamps
        odd = round(packet.pts / video.second * 30) % 2
        packet.pts += round((1 - 2 * odd) / 30 * video.second)

    path = encode(tmp_path / "a.mkv", numbered_frames(80), **MJPEG)
    monkeypatch.setattr(data.Video, "decode_chosen", lambda *_: None)
    with data.Video(path) as video:
        alter_packets(video, swap)
        assert shown(video, 40) == [41] and shown(video, 41) == [40]


def test_few_packets_are_kept_in_memory(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mkv", numbered_frames(250, 16), **MJPEG)
    monkeypatch.setattr(data, "MAX_PACKETS", 50)
    with data.Video(path) as video:
        alter_packets(video, (read := []).append)
        assert shown(video, 0, 200) == [0, 200]
        assert len(read) == 50 + 217  # to choose, given up; and of a pass that keeps none


def test_what_is_no_video_is_refused_for_its_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode("part.ts", noise_frames(10))
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\npart.ts\n#EXT-X-ENDLIST\n"
    Path("list.m3u8").write_text(hls)
    Path("list.mp4").write_text("ffconcat version 1.0\nfile part.ts\n")
    encode("a.h264", noise_frames(30))
    encode("large.mkv", np.zeros((1, 4096, 8200, 3), np.uint8), codec="rawvideo")
    with_sound("cover.mp3", noise_frames(1), "mjpeg", "libmp3lame")
    os.mkfifo("pipe.mp4")
    for name, reason in {
        "list.m3u8": "cannot be opened: Invalid argument",  # it reads other files
        "list.mp4": "cannot be opened: Invalid argument",
        "a.h264": "no time stamps.* ffmpeg -i a.h264 -c copy a.mp4",
        "large.mkv": "frames of 8200 x 4096 pixels",
        "cover.mp3": "no video stream",
        **dict.fromkeys(["pipe.mp4", ".", "/dev/zero"], "not a regular one"),
    }.items():
        if "regular" in reason:
            monkeypatch.setattr(av, "open", Mock(side_effect=AssertionError("opened")))
        with pytest.raises(data.VideoError, match=reason):
            data.Video(name)


@pytest.mark.parametrize("error", [IndexError("x"), ValueError("x"), MemoryError(), OSError("x")])
def test_any_error_inside_pyav_is_a_video_error(error, tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", numbered_frames(100), options=GOP)
    with data.Video(path) as video:
        packets = itertools.islice(video.container.demux(video.stream), 20)
        broken = iter(Mock(side_effect=[*packets, error]), None)
        video.container = Mock(demux=lambda stream: broken)
        assert shown(video, 15) == [15]  # it is read as far as it goes
    with data.Video(path) as video:
        video.codec = Mock(decode=Mock(side_effect=error))
        with pytest.raises(data.VideoError, match="cannot be decoded"):
            video.frames([1.0])
    monkeypatch.setattr(av, "open", Mock(side_effect=error))
    with pytest.raises(data.VideoError, match="cannot be opened"):
        data.Video(path)


def test_only_what_wanted_frames_need_is_decoded(tmp_path):
    options = {"x264-params": "keyint=12:scenecut=0:bframes=3:b-adapt=0:b-pyramid=none"}
    path = encode(tmp_path / "a.mp4", noise_frames(120), options=options)
    packets, frames = [], []
    with data.Video(path) as video:
        codec = video.codec

        def decode(packet):
            codec.skip_frame = video.codec.skip_frame
            packets.append(packet)
            frames.append(codec.decode(packet))
            return frames[-1]

        video.codec = Mock(wraps=codec, decode=decode)
        video.codec.name = "h264"
        video.frames(np.array([2, 5, 5, 100, 98]) / 30)
    # 0, 4, 1, 2, 3, 8, 5 in order of decoding and 96, 100, 97, 98, of which 1, 3 and 97 are skipped
    assert len(packets) - packets.count(None) == 11 and sum(map(len, frames)) == 8


@pytest.mark.parametrize("turn, a, b", [(90, 0, 1), (180, -1, 0), (270, 0, -1)])
def test_rotated_videos_come_out_upright(turn, a, b, tmp_path):
    path = encode(tmp_path / "a.mp4", noise_frames(3, 120, 160))
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44  # the matrix: a, b, 0 and -b, a, 0 in 16.16 bits
    content[at : at + 20] = struct.pack(">5i", *(2**16 * x for x in (a, b, 0, -b, a)))
    path.write_bytes(content)
    with data.Video(path) as video:
        frames = video.frames([0.0])
    size = data.upright_size(frames[0])
    whole = np.rot90(frames[0].to_ndarray(format="rgb24"), -turn // 90)
    clip = data.to_clip(frames, size)[0].numpy()
    assert abs(clip.astype(float) - whole).mean() < 2
    box = data.to_clip(frames, (100, 60), (20, 40, 100, 60))[0].numpy()
    assert abs(box.astype(float) - whole[20:120, 40:100]).mean() < 3


def test_wanted_frames_far_apart_are_not_read_through(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", numbered_frames(250, 16), options={"g": "30"})
    for limit, least, most in (1, 40, 110), (10, 240, 250):
        monkeypatch.setattr(data, "SEEK_GAP", limit)
        with data.Video(path) as video:
            alter_packets(video, (read := []).append)
            assert shown(video, 240, 3) == [240, 3] and least <= len(read) <= most


@pytest.mark.parametrize("levels, space", [("tv", "bt470bg"), ("pc", "bt709")])  # of the colours
def test_cutting_and_scaling_in_one_pass_is_cutting_then_scaling(levels, space, tmp_path):
    settings = dict(codec="libvpx-vp9", pix_fmt="yuv444p")
    settings["options"] = {"lossless": "1", "color_range": levels, "colorspace": space}
    with data.Video(encode(tmp_path / "a.mkv", noise_frames(3, 96, 128), **settings)) as video:
        frames = video.frames([0.0, 0.034, 0.067, 0.067])
    box = top, left, height, width = 10, 21, 60, 80
    told = dict(src_colorspace=frames[0].colorspace, src_color_range=frames[0].color_range)
    whole = np.stack([frame.reformat(format="rgb24", **told).to_ndarray() for frame in frames])
    whole = torch.from_numpy(whole[:, top : top + height, left : left + width])
    cut = data.to_clip(frames, (height, width), box)
    assert torch.equal(cut, whole) and cut.dtype == torch.uint8
    reference = F.resize(whole.permute(0, 3, 1, 2), [30, 40]).permute(0, 2, 3, 1)
    assert (data.to_clip(frames, (30, 40), box).float() - reference).abs().mean() < 2


@pytest.mark.parametrize("pix_fmt, source", [("pal8", "pal8"), ("rgb555le", "rgb24")])
def test_few_colours_become_many_before_they_are_scaled(pix_fmt, source, tmp_path):
    palette = np.random.RandomState(0).randint(0, 256, (256, 4)).astype(np.uint8)
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("rawvideo", rate=30, width=64, height=48, pix_fmt=pix_fmt)
        for picture in noise_frames(60):
            picture = (picture[..., 0].copy(), palette) if pix_fmt == "pal8" else picture
            frame = av.VideoFrame.from_ndarray(picture, format=source)
            container.mux(stream.encode(frame.reformat(format=pix_fmt)))
    with data.Video(tmp_path / "a.avi") as video:
        frames = video.frames([0.1, 1.5])
    assert frames[1].to_ndarray(format="rgb24").std() > 30  # after a seek
    many = [frame.reformat(format="rgb24") for frame in frames]
    assert torch.equal(data.to_clip(frames, (24, 32)), data.to_clip(many, (24, 32)))
