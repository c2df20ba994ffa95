"""Decoding, against decoding every frame and picking the nearest: order, time, damage, pixels."""

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
        return rng.uniform(0, duration, 9)  # in any order
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


def count_packets(video):
    """A list of all packets that the video reads from now on."""
    read, packets = [], video.packets
    video.packets = lambda *args: (read.append(p) or p for p in packets(*args))
    return read


def numbered_frames(n, height=48, width=64):
    """Pictures that show their number: its bits as bright and dark stripes."""
    bits = np.arange(n)[:, None] >> np.arange(8) & 1
    stripes = (40 + 170 * bits).repeat(width // 8, axis=1).astype(np.uint8)
    return np.broadcast_to(stripes[:, None, :, None], (n, height, width, 3))


def read_number(frame):
    stripes = frame.to_ndarray(format="gray").reshape(frame.height, 8, -1).mean((0, 2))
    return int(((stripes > 120) << np.arange(8)).sum())


def rewrite(source, target, change=lambda packets: packets, **settings):
    """Copy a video without decoding it; change: packets -> those to write."""
    with av.open(str(source)) as old, av.open(str(target), "w", **settings) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in change([packet for packet in old.demux(video=0) if packet.size]):
            packet.stream = stream
            new.mux(packet)
    return target


def with_content(packet, content):
    copy = av.Packet(content)
    copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
    copy.is_keyframe = packet.is_keyframe
    return copy


def with_sound(path, codec="libx264", sound="aac", seconds=10):
    """A picture every 1/30 s for 2 s, and sound that goes on; or for a codec of pictures, a cover."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream(sound, rate=48000)
        if codec == "mjpeg":
            stream.pix_fmt, stream.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        for picture in noise_frames(1 if codec == "mjpeg" else 60):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for i in range(50 * seconds):
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 960), np.float32), "fltp", "stereo")
            silence.sample_rate, silence.pts = 48000, 960 * i
            container.mux(audio.encode(silence))
        container.mux(audio.encode(None))
    return path


def cut(path, first=0.0, last=1.0):
    """Keep the bytes from first to last, as shares of all."""
    content = path.read_bytes()
    path.write_bytes(content[int(first * len(content)) : int(last * len(content))])
    return path


OPEN_GOP = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:open-gop=1:bframes=3"}
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
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_frame_at_a_time_shows_the_picture_of_that_time(name, tmp_path):
    path = encode(tmp_path / name, numbered_frames(100), **ORDERS[name])
    for seed in range(4):
        with data.Video(path) as video:
            times = np.rint(draw_times(video.duration, seed) * 30).clip(0, 99) / 30
            got = video.frames(times)
            seconds = [(frame.pts - video.start) / video.second for frame in got]
        assert [read_number(frame) for frame in got] == np.rint(times * 30).tolist()
        assert seconds == pytest.approx(times.tolist(), abs=0.002)


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


NO_VIDEOS = "README.md", "corrupted.mp4"
REAL = sorted(path for path in SHARED_VIDEOS.glob("*.*") if path.name not in NO_VIDEOS)


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_nearest_to_the_wanted_times(name, tmp_path):
    settings = dict(FILES[name])
    count = settings.pop("count", 80)
    frames = noise_frames(count, settings.pop("height", 48), settings.pop("width", 64))
    assert_same_frames(encode(tmp_path / name, frames, **settings))


@pytest.mark.skipif(not SHARED_VIDEOS.exists(), reason="needs ../shared/videos")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_frames_of_real_files_are_the_nearest_too(path):
    assert_same_frames(path)


def test_a_packet_that_shows_nothing_is_no_frame(tmp_path):
    """VP8 and VP9 have pictures that others refer to, in packets of their own, and never shown."""

    def hide(packets):
        for i, packet in enumerate(packets):
            content = bytearray(bytes(packet))
            content[0] &= ~0x10 if i % 5 == 3 else ~0  # VP8's show_frame
            yield with_content(packet, content)

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
            content = bytearray(bytes(packet))
            if packet.is_keyframe and packet.pts > 0:
                content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
            yield with_content(packet, content)

    options = {"g": "4", "bf": "0", "sc_threshold": "0"}
    path = encode(tmp_path / "a.mp4", noise_frames(80), options=options)
    path = rewrite(path, tmp_path / "damaged.mp4", damage)
    assert sum(frame.is_corrupt for frame in decode_all(path)[0].values()) == 19
    with data.Video(path) as video:
        got = video.frames(np.arange(80) / 30)  # one frame in four: the nearest stand in
        assert len(got) == 80 and not any(frame.is_corrupt for frame in got)
        with pytest.raises(data.VideoError, match="10 of 10 wanted frames cannot be decoded"):
            video.frames(np.arange(4, 44, 4) / 30)


GOP, SHORT = {"g": "30", "bf": "2", "sc_threshold": "0"}, {"g": "5", "bf": "0"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov", "avoid_negative_ts": "disabled"}
LATE = dict(times=range(250, 330))
LENGTHS = {  # how a file is made: (settings, share of its bytes that is kept), seconds
    "late.mp4": (LATE, 1, 80 / 30),
    "late.mkv": (LATE, 1, 80 / 30),
    "late.ts": (LATE, 1, 80 / 30),
    "late_fragments.mp4": (LATE, 1, 80 / 30),
    "sound.mkv": ("libx264", 1, 2),
    "sound.flv": ("libx264", 1, 2),
    "sound.ts": ("libx264", 1, 2),
    "sound.webm": ("libvpx", 1, 2),
    "raw.m1v": (dict(codec="mpeg1video", options={"g": "12"}), 1, 80 / 30),
    "raw.m2v": (dict(codec="mpeg2video", options={"g": "12"}), 1, 80 / 30),
    "cut.mkv": (dict(options=SHORT), 0.5, None),
    "cut.flv": (dict(options=SHORT), 0.5, None),
    "cut.avi": (dict(codec="mpeg4", options=SHORT), 0.5, None),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_duration_is_that_of_the_frames(name, tmp_path):
    settings, share, seconds = LENGTHS[name]
    if isinstance(settings, str):
        path = with_sound(tmp_path / name, settings, "libopus" if "webm" in name else "aac")
    else:
        path = encode(tmp_path / name, noise_frames(80), **settings)
    if name == "late_fragments.mp4":
        path = rewrite(path, tmp_path / "fragments.mp4", options=FRAGMENTS)
    cut(path, last=share)
    if seconds is None:  # as many as are left
        frames, unit = decode_all(path)
        seconds = max(frames) * unit
        assert 0.5 < seconds < 2.5
    with data.Video(path) as video:
        assert video.duration == pytest.approx(seconds, abs=0.1)


def test_of_two_files_joined_both_are_used(tmp_path):
    pictures = numbered_frames(160)
    parts = [encode(tmp_path / f"{i}.ts", pictures[i : i + 80], options=GOP) for i in (0, 80)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with data.Video(path) as video:
        assert video.duration == pytest.approx(160 / 30, abs=0.1)
        got = [read_number(frame) for frame in video.frames(np.array([3, 77, 85, 159]) / 30)]
    assert np.abs(np.array(got) - [3, 77, 85, 159]).max() <= 1


REFRESH = {"x264-params": "intra-refresh=1:keyint=25:scenecut=0"}


@pytest.mark.parametrize("name", ["closed.ts", "open.ts", "refresh.ts", "leading.mkv"])
def test_a_file_cut_inside_a_group_begins_with_its_first_decodable_frame(name, tmp_path):
    options = dict(closed=GOP, refresh=REFRESH).get(name.split(".")[0], OPEN_GOP)
    path = encode(tmp_path / "a.ts", noise_frames(200), options=options)
    if name == "leading.mkv":  # its first pictures need what is not there
        path = rewrite(path, tmp_path / name, lambda packets: packets[24:])
    else:
        cut(path, first=0.21)
    with data.Video(path) as video:
        assert video.start == min(decode_all(path)[0])
    assert_same_frames(path, 3)


def call_all_keys(packets):
    for packet in packets:
        packet.is_keyframe = True
        yield packet


LAYERS = {"x265-params": "temporal-layers=1:bframes=4:keyint=50:log-level=none"}
FIELDS = {"x264-params": "interlaced=1:keyint=25"}
MPEG = {"g": "12", "bf": "2"}
LIES = {
    "false_keys.mp4": dict(options=GOP),
    "false_keys.mkv": dict(codec="mpeg4", options={"g": "250"}),
    "refresh.mp4": dict(options=REFRESH),
    "refresh.ts": dict(options=REFRESH),
    "no_idr.ts": dict(options={"x264-params": "keyint=infinite:scenecut=40:min-keyint=9"}),
    "layers.mp4": dict(codec="libx265", options=LAYERS),
    "layers.ts": dict(codec="libx265", options=LAYERS),
    "fields.ts": dict(options=FIELDS),
    "open_gop.ts": dict(options=OPEN_GOP),
    "open_mpeg2.avi": dict(codec="mpeg2video", options=MPEG),
    "open_mpeg4.ts": dict(codec="mpeg4", options=MPEG),
    "long_gop.ts": dict(options={"g": "150", "bf": "2"}),
}


@pytest.mark.parametrize("name", LIES)
def test_frames_do_not_depend_on_what_a_file_claims(name, tmp_path):
    path = encode(tmp_path / name, numbered_frames(200, 64, 64), **LIES[name])
    if "false_keys" in name:
        path = rewrite(path, tmp_path / f"b_{name}", call_all_keys)
    wanted = np.array([0, 3, 37, 61, 62, 63, 64, 110, 150, 155, 199])
    for part in (wanted, wanted[2:3], wanted[-3:-1], wanted[-1:]):
        with data.Video(path) as video:
            assert [read_number(frame) for frame in video.frames(part / 30)] == part.tolist()
    assert_same_frames(path, 3)


NOT_COMPARED = ".md", ".py", ".ogg", ".flv"  # the last is damaged from its first frame on
HARD = (p for p in SHARED_VIDEOS.parent.glob("hard_videos/*") if p.suffix not in NOT_COMPARED)


@pytest.mark.skipif(not SHARED_VIDEOS.exists(), reason="needs ../shared/hard_videos")
@pytest.mark.parametrize("path", sorted(HARD), ids=lambda path: path.name)
def test_frames_of_real_files_that_lie_are_exact(path):
    assert_same_frames(path, 2)


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
    settings = dict(codec="mpeg4", options=GOP)
    path = encode(tmp_path / "a.avi", noise_frames(900, 16, 16), **settings)  # decoding times only
    monkeypatch.setattr(data.Video, "careful", 98)
    for _ in range(3):
        with data.Video(path) as video:
            read = count_packets(video)
            video.frames([25.0])
        assert 10 * 30 < len(read) < 13 * 30
    assert capsys.readouterr().out.count("careful pass") == 1
    path = encode(tmp_path / "b.mp4", noise_frames(900, 16, 16), options=GOP)
    with data.Video(path) as video:
        read = count_packets(video)
        video.frames([28.0])
    assert len(read) < 100 and data.Video.careful == 101  # sound files need none


def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    monkeypatch.setattr(av, "open", Mock(side_effect=AssertionError("opened")))
    for path in (tmp_path / "pipe.mp4", tmp_path / "folder.mp4", "/dev/zero", tmp_path / "none"):
        with pytest.raises(data.VideoError, match="not a regular one"):
            data.Video(path)


def test_what_gives_no_frames_is_refused_for_its_reason(tmp_path):
    encode(tmp_path / "part.ts", noise_frames(10))
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\npart.ts\n#EXT-X-ENDLIST\n"
    for name, text in {
        "list.m3u8": hls,
        "concat.mp4": "ffconcat version 1.0\nfile part.ts\n",
    }.items():
        (tmp_path / name).write_text(text)  # a playlist would read the other file
    raw = encode(tmp_path / "raw.h264", noise_frames(30)).rename(tmp_path / "raw.mp4")
    large = encode(tmp_path / "large.mkv", np.zeros((1, 4096, 8200, 3), np.uint8), codec="rawvideo")
    cover = with_sound(tmp_path / "cover.mp3", "mjpeg", "libmp3lame", seconds=2)
    for path, reason in {
        tmp_path / "list.m3u8": "cannot be opened: Invalid argument",
        tmp_path / "concat.mp4": "cannot be opened: Invalid argument",
        raw: "no time stamps; to add some: ffmpeg -i a.h264 -c copy a.mp4",
        large: "frames of 8200 x 4096 pixels",
        cover: "no video stream",
    }.items():
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
        with pytest.raises(data.VideoError, match=f"cannot be decoded: .*{error}"):
            video.frames([1.0])
    monkeypatch.setattr(av, "open", Mock(side_effect=error))
    with pytest.raises(data.VideoError, match=f"cannot be opened: .*{error}"):
        data.Video(path)


def test_few_packets_are_kept_in_memory(tmp_path, monkeypatch):
    settings = dict(codec="mjpeg", pix_fmt="yuvj420p")
    path = encode(tmp_path / "a.mkv", numbered_frames(250, 16), **settings)
    monkeypatch.setattr(data, "PACKETS", 50)
    with data.Video(path) as video:
        read = count_packets(video)
        assert [read_number(frame) for frame in video.frames(np.array([0, 200]) / 30)] == [0, 200]
        assert len(read) > 250  # once to choose, given up; and once that keeps none
        del read[:]
        video.choose(video.start, np.array([0.0, 200.0]) * video.second / 30)
        assert len(read) == 50


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


@pytest.mark.parametrize("pix_fmt", ["pal8", "rgb555le"])
def test_few_colours_become_many_before_they_are_scaled(pix_fmt, tmp_path):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        palette = np.random.RandomState(0).randint(0, 256, (256, 4)).astype(np.uint8)
        for picture in noise_frames(60):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pix_fmt == "pal8":
                frame = av.VideoFrame.from_ndarray(
                    (picture[..., 0].copy(), palette), format=pix_fmt
                )
            container.mux(stream.encode(frame.reformat(format=pix_fmt)))
    with data.Video(path) as video:
        frames = video.frames([0.1, 1.5])  # a palette comes with the first packet only
    whole = torch.from_numpy(np.stack([frame.to_ndarray(format="rgb24") for frame in frames]))
    assert whole[1].float().std() > 30
    assert torch.equal(data.to_clip(frames, (48, 64)), whole)
    reference = F.resize(whole.permute(0, 3, 1, 2), [24, 32]).permute(0, 2, 3, 1)
    assert (data.to_clip(frames, (24, 32)).float() - reference).abs().mean() < 6


def test_wanted_frames_far_apart_are_not_read_through(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", noise_frames(300, 16, 16), options={"g": "30"})
    counts = []
    for limit in (1, 10):
        monkeypatch.setattr(data, "READ_THROUGH", limit)
        with data.Video(path) as video:
            read = count_packets(video)
            seconds = [frame.pts / video.second for frame in video.frames([9.0, 0.1])]
        assert seconds == pytest.approx([9.0, 0.1])
        counts.append(len(read))
    assert 2 * counts[0] < counts[1]


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
