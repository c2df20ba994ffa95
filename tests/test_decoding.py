"""Decoding, against decoding every frame and picking the nearest: order, time, damage, pixels."""

import math
import contextlib
import os
import struct
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
    """Video.frames gives what decoding everything and picking the nearest gives, pixel for pixel."""
    frames, unit = decode_all(path)
    stamps = np.array(list(frames))
    for seed in range(seeds):
        with data.Video(path) as video:
            times = draw_times(video.duration, seed)
            got = video.frames(times)
        wanted = [stamps[np.abs((stamps - stamps[0]) * unit - time).argmin()] for time in times]
        assert [frame.pts for frame in got] == wanted
        for frame in set(got):
            expected = frames[frame.pts].to_ndarray(format="rgb24")
            assert np.array_equal(frame.to_ndarray(format="rgb24"), expected)


def numbered_frames(n, height=48, width=64):
    """Pictures that show their number: its bits as bright and dark stripes."""
    bits = np.arange(n)[:, None] >> np.arange(8) & 1
    stripes = (40 + 170 * bits).repeat(width // 8, axis=1).astype(np.uint8)
    return np.broadcast_to(stripes[:, None, :, None], (n, height, width, 3))


def read_number(frame):
    stripes = frame.to_ndarray(format="gray").reshape(frame.height, 8, -1).mean((0, 2))
    return int(((stripes > 120) << np.arange(8)).sum())


def rewrite(source, target, change, **settings):
    """Copy a video without decoding it; change: packets -> those to write, some with new content."""
    with av.open(str(source)) as old, av.open(str(target), "w", **settings) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet, content in change([packet for packet in old.demux(video=0) if packet.size]):
            copy = av.Packet(content or bytes(packet))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            new.mux(copy)
    return target


def with_sound(path, codec="libx264", sound="aac", rate=48000):
    """2 s of video and 10 of sound; the codec mjpeg makes a cover picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, width=64, height=48)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if codec == "mjpeg":
            stream.disposition = av.stream.Disposition.attached_pic
        audio = container.add_stream(sound, rate=48000)
        for picture in noise_frames(1 if codec == "mjpeg" else 60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
        for i in range(500):
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 960), np.float32), "fltp", "stereo")
            silence.sample_rate, silence.pts = 48000, 960 * i
            container.mux(audio.encode(silence))
        container.mux(audio.encode(None))
    return path


def count_packets(video):
    """A list of all packets that the video reads from now on."""
    read, packets = [], video.packets
    video.packets = lambda *args: (read.append(p) or p for p in packets(*args))
    return read


OPEN_GOP = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:open-gop=1:bframes=3"}
GOP = {"g": "30", "bf": "2", "sc_threshold": "0"}
REFRESH = {"x264-params": "intra-refresh=1:keyint=25:scenecut=0"}
LAYERS = {"x265-params": "temporal-layers=1:bframes=4:keyint=50:log-level=none"}
ORDERS = {
    "h264.mp4": dict(options={"g": "20", "bf": "3"}),
    "h264.mkv": dict(options={"g": "250", "bf": "3"}),
    "prepared.mp4": dict(options={"g": "30", "tune": "fastdecode"}),  # as the README says
    "h264.avi": dict(options={"g": "20", "bf": "2"}),
    "open_gop.mp4": dict(options=OPEN_GOP),
    "open_gop.avi": dict(options=OPEN_GOP),
    "vp9.webm": dict(codec="libvpx-vp9", options={"g": "20"}),
    "mpeg4.avi": dict(codec="mpeg4", options={"g": "12", "bf": "2"}),
    "mpeg2.ts": dict(codec="mpeg2video", options={"g": "12", "bf": "2"}),
    "hevc.mp4": dict(codec="libx265", options={"x265-params": "keyint=16:log-level=none"}),
    "hevc_layers.ts": dict(codec="libx265", options=LAYERS),
    "all_are_keys.mp4": dict(codec="mpeg4", options={"g": "30"}),  # so its index says
    "refresh.mp4": dict(options=REFRESH),  # key frames that are no intra pictures
    "refresh.ts": dict(options=REFRESH),
    "open_gop.ts": dict(options=OPEN_GOP),
    "open_gop_mpeg2.avi": dict(codec="mpeg2video", options={"g": "12", "bf": "2"}),
    "long_group.ts": dict(options={"x264-params": "keyint=90:scenecut=0"}),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_frame_at_a_time_shows_the_picture_of_that_time(name, tmp_path):
    path = encode(tmp_path / name, numbered_frames(100), **ORDERS[name])
    if "all_are_keys" in name:
        path.write_bytes(path.read_bytes().replace(b"stss", b"free"))  # no list of key frames
    for seed in range(8):
        with data.Video(path) as video:
            times = np.rint(draw_times(video.duration, seed) * 30).clip(0, 99) / 30
            got = video.frames(times)
            seconds = [(frame.pts - video.start) / video.second for frame in got]
        assert [read_number(frame) for frame in got] == np.rint(times * 30).tolist()
        assert seconds == pytest.approx(times.tolist(), abs=0.002)
    assert_same_frames(path, 3)


FILES = {
    "vp8.webm": dict(codec="libvpx", options={"b": "100k"}),
    "mpeg_ts.ts": dict(options={"g": "20", "bf": "2"}),
    "10_bit.mp4": dict(pix_fmt="yuv420p10le"),
    "odd_444.mp4": dict(pix_fmt="yuv444p", height=45, width=63),
    "variable_rate.mp4": dict(times=np.cumsum(np.random.RandomState(0).randint(1, 7, 80))),
    "late_start.mkv": dict(times=range(250, 330)),
    "low_rate.mp4": dict(rate=6),
    "shorter_than_a_clip.mp4": dict(count=5),
}


NO_VIDEOS = "README.md", "compare.py", "corrupted.mp4", "late_stream_cut.flv", "cover_art_only.ogg"
REAL = [*SHARED_VIDEOS.glob("*.*"), *SHARED_VIDEOS.parent.glob("hard_videos/*.*")]
REAL = sorted(path for path in REAL if path.name not in NO_VIDEOS)


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_nearest_to_the_wanted_times(name, tmp_path):
    settings = dict(FILES[name])
    count = settings.pop("count", 80)
    frames = noise_frames(count, settings.pop("height", 48), settings.pop("width", 64))
    assert_same_frames(encode(tmp_path / name, frames, **settings))


@pytest.mark.skipif(not SHARED_VIDEOS.exists(), reason="needs ../shared/videos")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_frames_of_real_files_are_the_nearest_too(path):
    assert_same_frames(path, 2)
    frames, unit = decode_all(path)
    with data.Video(path) as video:
        assert video.duration == pytest.approx((max(frames) - min(frames)) * unit, abs=0.4)


def test_a_packet_that_shows_nothing_is_no_frame(tmp_path):
    """VP8 and VP9 have pictures that others refer to, in packets of their own, and never shown."""

    def hide(packets):
        for i, packet in enumerate(packets):
            content = bytearray(bytes(packet))
            content[0] &= ~0x10 if i % 5 == 3 else ~0  # VP8's show_frame
            yield packet, bytes(content)

    path = encode(tmp_path / "a.webm", numbered_frames(80), codec="libvpx", options={"g": "20"})
    path = rewrite(path, tmp_path / "hidden.webm", hide)
    assert len(decode_all(path)[0]) == 64
    assert_same_frames(path)
    with data.Video(path) as video:  # frame 8 is hidden; one wanted frame is not refused for that
        assert read_number(video.frames([8 / 30 - 0.001])[0]) == 7
        assert read_number(video.frames([8 / 30 + 0.001])[0]) == 9


def test_corrupt_frames_count_as_missing(tmp_path):
    """FFmpeg fills damaged pictures with what is near; it marks them as corrupt."""

    def damage(packets):
        for packet in packets:
            half = packet.size // 2 if packet.is_keyframe and packet.pts else packet.size
            yield packet, bytes(packet)[:half] + bytes(packet.size - half)

    options = {"g": "4", "bf": "0", "sc_threshold": "0"}
    path = encode(tmp_path / "a.mp4", noise_frames(80), options=options)
    path = rewrite(path, tmp_path / "damaged.mp4", damage)
    assert sum(frame.is_corrupt for frame in decode_all(path)[0].values()) == 19
    with data.Video(path) as video:
        got = video.frames(np.arange(80) / 30)  # one frame in four: the nearest stand in
        assert len(got) == 80 and not any(frame.is_corrupt for frame in got)
        with pytest.raises(data.VideoError, match="10 of 10 wanted frames cannot be decoded"):
            video.frames(np.arange(4, 44, 4) / 30)


def test_a_packet_that_cannot_be_decoded_costs_its_own_frame_alone(tmp_path):
    def spoil(packets):
        for i, packet in enumerate(packets):
            yield packet, b"no picture" if i == 45 else bytes(packet)

    settings = dict(codec="mjpeg", pix_fmt="yuvj420p")
    path = encode(tmp_path / "a.mkv", numbered_frames(80), **settings)
    path = rewrite(path, tmp_path / "spoilt.mkv", spoil)
    with data.Video(path) as video:
        got = [read_number(frame) for frame in video.frames(np.array([40, 45, 50]) / 30)]
        assert got in ([40, 44, 50], [40, 46, 50])
        assert read_number(video.frames(np.array([40, 45]) / 30)[0]) == 40  # half of them
        with pytest.raises(data.VideoError, match="1 of 1 wanted frames cannot be decoded"):
            video.frames([45 / 30])


LATE, SHORT = dict(times=range(250, 330)), dict(options={"g": "5", "bf": "0"})
LENGTHS = {  # how a file is made
    **dict.fromkeys(["late.mp4", "late.mkv", "late.ts", "late_fragments.mp4"], LATE),
    **dict.fromkeys(["sound.mkv", "sound.flv", "sound.ts", "sound.mp4"], "libx264"),
    "sound.webm": "libvpx",
    "raw.m1v": dict(codec="mpeg1video", options={"g": "12"}),
    "raw.m2v": dict(codec="mpeg2video", options={"g": "12"}),
    **dict.fromkeys(["cut.mkv", "cut.flv", "cut.ts"], SHORT),
    "cut.avi": SHORT | dict(codec="mpeg4"),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_duration_is_that_of_the_frames(name, tmp_path):
    settings, path = LENGTHS[name], tmp_path / name
    if "sound" in name:
        with_sound(path, settings, "libopus" if name == "sound.webm" else "aac")
    else:
        encode(path, noise_frames(80), **settings)
    if name == "late_fragments.mp4":
        options = {"movflags": "frag_keyframe+empty_moov+frag_discont"}
        options["avoid_negative_ts"] = "disabled"
        source, path = path, tmp_path / "b.mp4"
        rewrite(source, path, lambda packets: [(p, None) for p in packets], options=options)
    elif "cut" in name:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames, unit = decode_all(path)
    with data.Video(path) as video:
        assert video.duration == pytest.approx((max(frames) - min(frames)) * unit, abs=0.1)


def test_of_two_files_joined_both_are_used(tmp_path):
    parts = [
        encode(tmp_path / f"{i}.ts", numbered_frames(160)[i : i + 80], options=GOP) for i in (0, 80)
    ]
    (tmp_path / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    with data.Video(tmp_path / "joined.ts") as video:
        assert video.duration == pytest.approx(160 / 30, abs=0.1)
        got = [read_number(frame) for frame in video.frames(np.array([3, 77, 85, 159]) / 30)]
    assert np.abs(np.array(got) - [3, 77, 85, 159]).max() <= 1


@pytest.mark.parametrize("options", [GOP, OPEN_GOP, REFRESH])
@pytest.mark.parametrize("name", ["a.ts", "a.mkv"])
def test_a_file_cut_inside_a_group_begins_with_its_first_decodable_frame(name, options, tmp_path):
    path = encode(tmp_path / "whole.ts", noise_frames(200), options=options)
    path.write_bytes(path.read_bytes()[path.stat().st_size // 5 // 188 * 188 :])
    if name == "a.mkv":

        def cut(packets):  # before a key frame; pictures that are shown before it may come next
            first = next(i for i, packet in enumerate(packets) if packet.is_keyframe)
            return [(packet, None) for packet in packets[first:]]

        path = rewrite(path, tmp_path / name, cut)
    with data.Video(path) as video:
        assert video.start == min(decode_all(path)[0])
    assert_same_frames(path, 3)


def test_a_packet_without_a_stamp_reaches_the_decoder(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered_frames(120), options={"g": "60", "bf": "0"})
    with data.Video(path) as video:
        packets = video.packets

        def unstamped(*args):
            for packet in packets(*args):
                packet.pts = None if packet.pts % 4 == 3 else packet.pts
                yield packet

        video.packets = unstamped
        got = [read_number(frame) for frame in video.frames(np.array([40, 41, 50]) / 30)]
    assert got == [40, 41, 50]


def test_a_careful_pass_reads_no_more_than_it_must_and_is_told_of_once(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(data.Video, "careful", 98)
    for name in ["a.avi", "b.avi", "c.avi", "d.mp4"]:
        path = encode(tmp_path / name, noise_frames(900, 16, 16), codec="mpeg4", options=GOP)
        with data.Video(path) as video:
            video.reorders = name != "d.mp4"  # as if of decoding times only
            read = count_packets(video)
            video.frames([25.0])
        assert (300 < len(read) < 390) if name != "d.mp4" else len(read) < 100
    assert data.Video.careful == 101 and capsys.readouterr().out.count("careful pass") == 1


@pytest.mark.parametrize("name, careful", [("open_gop.mp4", 0), ("h264.mkv", 0), ("fields.mp4", 9)])
def test_the_fast_pass_does_for_all_but_interlaced_videos(name, careful, tmp_path, monkeypatch):
    options = ORDERS.get(name, dict(options={"x264-params": "tff=1:keyint=12"}))
    path = encode(tmp_path / name, numbered_frames(100), **options)
    monkeypatch.setattr(data.Video, "careful", 0)
    with data.Video(path) as video:
        for number in range(20, 29):  # shown before a key frame and after it
            numbers = [number, number + 1]
            assert [*map(read_number, video.frames(np.array(numbers) / 30))] == numbers
    assert data.Video.careful == careful


def test_frames_that_nothing_refers_to_are_not_decoded_unless_wanted(tmp_path):
    class Counting:
        def __init__(self, codec):
            vars(self).update(codec=codec, count=0)

        def __getattr__(self, name):
            return getattr(self.codec, name)

        def __setattr__(self, name, value):
            setattr(self.codec, name, value)

        def decode(self, packet):
            out = self.codec.decode(packet)
            vars(self)["count"] += len(out)
            return out

    options = {"x264-params": "keyint=90:scenecut=0:bframes=3:b-adapt=0:b-pyramid=none"}
    path = encode(tmp_path / "a.mp4", numbered_frames(89), options=options)
    with data.Video(path) as video:
        video.codec = Counting(video.codec)
        assert read_number(*video.frames([80 / 30])) == 80
        assert 15 < video.codec.count < 30  # one in four, with those not yet skipped


SPARSE = dict(times=range(0, 900, 4))  # 225 frames in 30 s: a careful pass does not reach the start


def test_a_seek_that_leads_too_far_is_noticed(tmp_path):
    path = encode(
        tmp_path / "a.mkv", numbered_frames(225), codec="mjpeg", pix_fmt="yuvj420p", **SPARSE
    )
    with data.Video(path) as video:
        packets, late = video.packets, video.start + 25 * video.second

        def too_far(first, last):
            yield from (p for p in packets(first, last) if first == -math.inf or p.pts > late)

        video.packets = too_far
        assert read_number(*video.frames([20.0])) == 150


def test_a_careful_pass_finds_frames_whose_stamps_are_out_of_order(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mkv", numbered_frames(80), codec="mjpeg", pix_fmt="yuvj420p")
    monkeypatch.setattr(data.Video, "decode_chosen", lambda *_: None)
    with data.Video(path) as video:
        packets = video.packets

        def swapped(*args):  # 1, 0, 3, 2, 5, 4: neighbours have each other's stamps
            for packet in packets(*args):
                odd = round(packet.pts / video.second * 30) % 2
                packet.pts += round((1 - 2 * odd) / 30 * video.second)
                yield packet

        video.packets = swapped
        assert [read_number(*video.frames([number / 30])) for number in (40, 41)] == [41, 40]


def test_few_packets_are_kept_in_memory(tmp_path, monkeypatch):
    settings = dict(codec="mjpeg", pix_fmt="yuvj420p")
    path = encode(tmp_path / "a.mkv", numbered_frames(250, 16), **settings)
    monkeypatch.setattr(data, "MAX_PACKETS", 50)
    with data.Video(path) as video:
        read = count_packets(video)
        assert [read_number(frame) for frame in video.frames(np.array([0, 200]) / 30)] == [0, 200]
        assert len(read) > 250  # once to choose, given up; and once that keeps none
        del read[:]
        video.decode_chosen(np.array([0.0, 200.0]) * video.second / 30)
        assert len(read) == 50


def test_what_is_no_video_is_refused_for_its_reason(tmp_path, monkeypatch):
    encode(tmp_path / "part.ts", noise_frames(10))
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\npart.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(hls)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile part.ts\n")
    large = np.zeros((1, 4096, 8200, 3), np.uint8)
    raw = encode(tmp_path / "a.h264", noise_frames(30))
    os.mkfifo(tmp_path / "pipe.mp4")
    for path, reason in {
        tmp_path / "list.m3u8": "cannot be opened: Invalid argument",  # it reads other files
        tmp_path / "list.mp4": "cannot be opened: Invalid argument",
        raw: "no time stamps.* ffmpeg -i a.h264 -c copy a.mp4",
        encode(tmp_path / "large.mkv", large, codec="rawvideo"): "frames of 8200 x 4096 pixels",
        with_sound(tmp_path / "cover.mp3", "mjpeg", "libmp3lame"): "no video stream",
        tmp_path / "pipe.mp4": "not a regular one",
        tmp_path: "not a regular one",
        "/dev/zero": "not a regular one",
    }.items():
        if "regular" in reason:
            monkeypatch.setattr(av, "open", Mock(side_effect=AssertionError("opened")))
        with pytest.raises(data.VideoError, match=reason):
            data.Video(path)


@pytest.mark.parametrize("error", [IndexError("x"), ValueError("x"), MemoryError(), OSError("x")])
def test_any_error_inside_pyav_is_a_video_error(error, tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", numbered_frames(100), options=GOP)
    with data.Video(path) as video:
        demux, video.container = video.container.demux, Mock()

        def broken(stream):
            yield from (packet for _, packet in zip(range(50), demux(stream)))
            raise error

        video.container.demux = broken
        assert read_number(video.frames([0.5])[0]) == 15  # it is read as far as it goes
    with data.Video(path) as video:
        video.codec = Mock(decode=Mock(side_effect=error))
        with pytest.raises(data.VideoError, match="cannot be decoded"):
            video.frames([1.0])
    monkeypatch.setattr(av, "open", Mock(side_effect=error))
    with pytest.raises(data.VideoError, match="cannot be opened"):
        data.Video(path)


def test_only_what_wanted_frames_need_is_decoded(tmp_path):
    options = {"g": "12", "bf": "0", "sc_threshold": "0"}
    path = encode(tmp_path / "a.mp4", noise_frames(120), options=options)
    with data.Video(path) as video:
        video.codec = codec = Mock(wraps=video.codec)
        codec.name = "h264"
        video.frames(np.array([2, 5, 5, 100, 98]) / 30)
    fed = [call for call in codec.decode.call_args_list if call.args[0] is not None]
    assert len(fed) == 6 + 5  # frames 0 to 5, and 96 to 100 from the key frame 96 on


MATRICES = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}  # of an MP4's track


@pytest.mark.parametrize("turn", MATRICES)
def test_rotated_videos_come_out_upright(turn, tmp_path):
    path = encode(tmp_path / "a.mp4", noise_frames(3, 120, 160))
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44  # the matrix: rows of a, b, 0 in 16.16 bits
    a, b, c, d = (2**16 * number for number in MATRICES[turn])
    content[at : at + 20] = struct.pack(">5i", a, b, 0, c, d)
    path.write_bytes(content)
    with data.Video(path) as video:
        frames = video.frames([0.0])
    size = data.upright_size(frames[0])
    assert size == ((120, 160) if turn == 180 else (160, 120))
    whole = np.rot90(frames[0].to_ndarray(format="rgb24"), -turn // 90)
    clip = data.to_clip(frames, size)[0].numpy()
    assert abs(clip.astype(float) - whole).mean() < 2
    box = data.to_clip(frames, (100, 60), (20, 40, 100, 60))[0].numpy()
    assert abs(box.astype(float) - whole[20:120, 40:100]).mean() < 3


def test_wanted_frames_far_apart_are_not_read_through(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", noise_frames(300, 16, 16), options={"g": "30"})
    counts = []
    for limit in (1, 10):
        monkeypatch.setattr(data, "SEEK_GAP", limit)
        with data.Video(path) as video:
            read = count_packets(video)
            seconds = [frame.pts / video.second for frame in video.frames([9.0, 0.1])]
        assert seconds == pytest.approx([9.0, 0.1])
        counts.append(len(read))
    assert 2 * counts[0] < counts[1]


def test_damage_in_one_place_leaves_wanted_frames_far_from_it(tmp_path, monkeypatch):
    def spoil(packets):
        for i, packet in enumerate(packets):
            yield packet, b"no picture" if i == 150 else bytes(packet)

    path = encode(tmp_path / "a.mkv", numbered_frames(250), codec="mjpeg", pix_fmt="yuvj420p")
    path = rewrite(path, tmp_path / "spoilt.mkv", spoil)
    monkeypatch.setattr(data, "SEEK_GAP", 1)
    with data.Video(path) as video:
        got = [read_number(frame) for frame in video.frames(np.array([10, 100, 150, 240]) / 30)]
    assert got in ([10, 100, 149, 240], [10, 100, 151, 240])


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


@pytest.mark.parametrize("pix_fmt", ["pal8", "rgb555le"])
def test_few_colours_become_many_before_they_are_scaled(pix_fmt, tmp_path):
    palette = np.random.RandomState(0).randint(0, 256, (256, 4)).astype(np.uint8)
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("rawvideo", rate=30, width=64, height=48, pix_fmt=pix_fmt)
        for picture in noise_frames(60):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pix_fmt == "pal8":
                picture = picture[..., 0].copy(), palette
                frame = av.VideoFrame.from_ndarray(picture, format=pix_fmt)
            container.mux(stream.encode(frame.reformat(format=pix_fmt)))
    with data.Video(tmp_path / "a.avi") as video:
        frames = video.frames([0.1, 1.5])
    assert frames[1].to_ndarray(format="rgb24").std() > 30  # after a seek
    many = [frame.reformat(format="rgb24") for frame in frames]
    assert torch.equal(data.to_clip(frames, (24, 32)), data.to_clip(many, (24, 32)))
