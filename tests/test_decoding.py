"""Decoding, against decoding every frame and picking the nearest: order, time, damage, pixels."""

import contextlib
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


def numbered_frames(n, height=48, width=64):
    """Pictures that show their number: its bits as bright and dark stripes."""
    bits = np.arange(n)[:, None] >> np.arange(8) & 1
    stripes = (40 + 170 * bits).repeat(width // 8, axis=1).astype(np.uint8)
    return np.broadcast_to(stripes[:, None, :, None], (n, height, width, 3))


def read_number(frame):
    stripes = frame.to_ndarray(format="gray").reshape(frame.height, 8, -1).mean((0, 2))
    return int(((stripes > 120) << np.arange(8)).sum())


def rewrite(source, target, change):
    """Copy a video without decoding it; change(number, packet, content) may alter a packet."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = (packet for packet in old.demux(video=0) if packet.size)
        for number, packet in enumerate(packets):
            content = bytearray(bytes(packet))
            change(number, packet, content)
            copy = av.Packet(bytes(content))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            new.mux(copy)
    return target


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

    def hide(number, packet, content):
        if number % 5 == 3:
            content[0] &= ~0x10  # VP8's show_frame

    path = encode(tmp_path / "a.webm", numbered_frames(80), codec="libvpx", options={"g": "20"})
    path = rewrite(path, tmp_path / "hidden.webm", hide)
    assert len(decode_all(path)[0]) == 64
    assert_same_frames(path)
    with data.Video(path) as video:  # frame 8 is hidden; one wanted frame is not refused for that
        assert read_number(video.frames([8 / 30 - 0.001])[0]) == 7
        assert read_number(video.frames([8 / 30 + 0.001])[0]) == 9


def test_corrupt_frames_count_as_missing(tmp_path):
    """FFmpeg fills damaged pictures with what is near; it marks them as corrupt."""

    def damage(number, packet, content):
        if packet.is_keyframe and number > 0:
            content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)

    options = {"g": "4", "bf": "0", "sc_threshold": "0"}
    path = encode(tmp_path / "a.mp4", noise_frames(80), options=options)
    path = rewrite(path, tmp_path / "damaged.mp4", damage)
    assert sum(frame.is_corrupt for frame in decode_all(path)[0].values()) == 19
    with data.Video(path) as video:
        got = video.frames(np.arange(80) / 30)  # one frame in four: the nearest stand in
        assert len(got) == 80 and not any(frame.is_corrupt for frame in got)
        with pytest.raises(data.VideoError, match="10 of 10 wanted frames cannot be decoded"):
            video.frames(np.arange(4, 44, 4) / 30)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.ts"])
def test_the_duration_counts_from_the_first_frame(name, tmp_path):
    codec = "libvpx" if name == "a.webm" else "libx264"
    with data.Video(
        encode(tmp_path / name, noise_frames(80), codec=codec, times=range(250, 330))
    ) as video:
        assert video.duration == pytest.approx(80 / 30, abs=0.05)


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
        monkeypatch.setattr(data, "READ_THROUGH", limit)
        with data.Video(path) as video:
            video.check_time = Mock()  # for each packet
            seconds = [frame.pts / video.second for frame in video.frames([9.0, 0.1])]
        assert seconds == pytest.approx([9.0, 0.1])
        counts.append(video.check_time.call_count)
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
