"""Lists, decoding, sampling, batches: against decoding everything, and against what users have on disk."""

import argparse
import gc
import math
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import SHARED_VIDEOS, encode, noise_frames
from torchvision.transforms.v2 import functional as F

import data
from model import InputError

# ------------------------------------------------------------------------------------------------------- decoding


def decode_all(path):
    """Every frame of a file by time stamp, the plain way; what comes before an error where there is one."""
    frames = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        try:
            for frame in container.decode(stream):
                frames[frame.pts] = frame
        except av.error.FFmpegError:
            pass
        return frames, float(stream.time_base)


def assert_same_frames(path, seeds=5):
    """Video.frames gives what decoding everything and picking the nearest gives, pixel for pixel."""
    frames, unit = decode_all(path)
    stamps = np.array(sorted(frames))
    for seed in range(seeds):
        rng = np.random.RandomState(seed)
        with data.Video(path) as video:
            if seed % 2:
                times = rng.uniform(0, video.duration, 9)  # in any order
            else:
                times = np.concatenate([data.clip_times(video.duration, 16, 4, rng.rand()) for _ in range(seed + 1)])
            got = video.frames(times)
        wanted = [stamps[np.abs((stamps - stamps[0]) * unit - time).argmin()] for time in times]
        assert [frame.pts for frame in got] == wanted
        for frame in {id(frame): frame for frame in got}.values():
            assert np.array_equal(frame.to_ndarray(format="rgb24"), frames[frame.pts].to_ndarray(format="rgb24"))


FILES = {
    "b_frames_gop_12.mp4": dict(options={"g": "12", "bf": "3"}),
    "one_gop.mp4": dict(options={"g": "250", "bf": "3"}),
    "open_gop.mkv": dict(options={"x264-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3"}),
    "hevc.mp4": dict(codec="libx265", options={"x265-params": "keyint=16:bframes=3:log-level=none"}),
    "mpeg4_b_frames.avi": dict(codec="mpeg4", options={"g": "10", "bf": "2"}),
    "hidden_frames.webm": dict(codec="libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "16", "b": "100k"}),
    "vp9.webm": dict(codec="libvpx-vp9", options={"g": "20"}),
    "mpeg_ts.ts": dict(options={"g": "20", "bf": "2"}),
    "10_bit.mp4": dict(pix_fmt="yuv420p10le"),
    "odd_444.mp4": dict(pix_fmt="yuv444p", height=45, width=63),
    "variable_rate.mp4": dict(times=np.cumsum(np.random.RandomState(0).randint(1, 7, 80))),
    "late_start.mkv": dict(start=250),
    "no_duration.mkv": dict(container={"live": "1"}),
    "low_rate.mp4": dict(rate=6),
}


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_nearest_to_the_wanted_times(name, tmp_path):
    settings = dict(FILES[name])
    frames = noise_frames(80, settings.pop("height", 48), settings.pop("width", 64))
    settings.pop("container", None)
    assert_same_frames(encode(tmp_path / name, frames, **settings))


@pytest.mark.skipif(not SHARED_VIDEOS.exists(), reason="needs ../shared/videos")
@pytest.mark.parametrize(
    "path", sorted(p for p in SHARED_VIDEOS.glob("*.*") if p.suffix != ".md"), ids=lambda p: p.name
)
def test_frames_of_real_files_are_the_nearest_too(path):
    if path.name == "corrupted.mp4":  # breaks after 28 of 50 frames: a clip comes from what decodes
        with data.Video(path) as video:
            assert len(video.frames(data.clip_times(video.duration, 16, 4, 0.0))) == 16
        return
    assert_same_frames(path)


def test_a_file_that_cannot_seek_and_has_no_duration_is_read_from_its_start(tmp_path):
    path = encode(tmp_path / "stream.mkv", noise_frames(80), options={"g": "250"})
    with open(tmp_path / "pipe.mkv", "wb") as out:  # a live recording: no duration, no index

        class Pipe:
            write = out.write

        with av.open(Pipe(), "w", format="matroska", options={"live": "1"}) as live, av.open(str(path)) as source:
            stream = live.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.size:
                    packet.stream = stream
                    live.mux(packet)
    with av.open(str(tmp_path / "pipe.mkv")) as container:
        assert container.duration is None and container.streams.video[0].duration is None
    with data.Video(tmp_path / "pipe.mkv") as video:
        assert video.duration == pytest.approx(80 / 30, abs=0.04)
    assert_same_frames(tmp_path / "pipe.mkv")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.ts"])
@pytest.mark.parametrize("start", [0, 250])
def test_the_duration_counts_from_the_first_frame(name, start, tmp_path):
    codec = "libvpx" if name == "a.webm" else "libx264"
    with data.Video(encode(tmp_path / name, noise_frames(80), codec=codec, start=start)) as video:
        assert video.duration == pytest.approx(80 / 30, abs=0.05)


def test_h264_with_b_frames_in_avi_counts_as_damaged(tmp_path):
    """Its packets have no time stamps: those that FFmpeg guesses are in the order of decoding."""
    assert_same_frames(encode(tmp_path / "plain.avi", noise_frames(40), options={"bf": "0"}))
    path = encode(tmp_path / "b_frames.avi", noise_frames(40), options={"bf": "2"})
    with pytest.raises(data.VideoError, match="has B-frames, whose order AVI does not give; convert it"):
        data.Video(path)


def test_frames_that_cannot_be_scaled_count_as_damage(tmp_path):
    with data.Video(encode(tmp_path / "a.mp4", noise_frames(5))) as video:
        frames = video.frames([0.0])
    with pytest.raises(data.VideoError, match="cannot be cut to 9999 x 64 and scaled"):
        data.to_clip(frames, (32, 32), (0, 0, 9999, 64))


def test_only_the_groups_of_pictures_that_hold_wanted_frames_are_decoded_and_once(tmp_path):
    path = encode(tmp_path / "a.mp4", noise_frames(120), options={"g": "12", "bf": "0", "sc_threshold": "0"})
    with data.Video(path) as video:
        fed, codec = [], video.codec

        class Counting:
            name = codec.name
            flush_buffers = codec.flush_buffers

            def decode(self, packet):
                fed.append(packet and packet.pts)
                return codec.decode(packet)

        video.codec = Counting()
        video.frames(np.array([2, 5, 5, 100, 98]) / 30)
    packets = [pts for pts in fed if pts is not None]
    assert len(packets) == len(set(packets))
    assert len(packets) == 6 + 5  # frames 0 to 5, and 96 to 100 from the key frame 96 on


def test_a_video_shorter_than_a_clip_repeats_its_last_frame(tmp_path):
    path = encode(tmp_path / "short.mp4", noise_frames(5))
    with data.Video(path) as video:
        got = [frame.pts for frame in video.frames(data.clip_times(video.duration, 16, 4, 0.7))]
    assert len(set(got[1:])) == 1 and got[0] != got[1]


@pytest.mark.skipif(not SHARED_VIDEOS.exists(), reason="needs ../shared/videos")
@pytest.mark.parametrize(
    "name, turns, size", [("video_90.mov", -1, (568, 320)), ("nasa_13013_rotated.mp4", 1, (480, 270))]
)
def test_rotated_videos_come_out_upright(name, turns, size):
    with data.Video(SHARED_VIDEOS / name) as video:
        frames = video.frames([0.0])
    assert data.upright_size(frames[0]) == size
    whole = np.rot90(frames[0].to_ndarray(format="rgb24"), turns)
    clip = data.to_clip(frames, size)[0].numpy()
    assert abs(clip.astype(float) - whole).mean() < 2
    box = data.to_clip(frames, (100, 60), (40, 20, 100, 60))[0].numpy()
    assert abs(box.astype(float) - whole[40:140, 20:80]).mean() < 3


def test_cutting_and_scaling_in_one_pass_is_cutting_then_scaling(tmp_path):
    path = encode(tmp_path / "a.mp4", noise_frames(3, 96, 128), options={"crf": "0"}, pix_fmt="yuv444p")
    with data.Video(path) as video:
        frames = video.frames([0.0, 0.034, 0.067, 0.067])
    whole = torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in frames])
    top, left, height, width = box = (10, 21, 60, 80)
    cut = data.to_clip(frames, (height, width), box)
    assert cut.shape == (4, 60, 80, 3) and cut.dtype == torch.uint8
    assert (cut.int() - whole[:, top : top + height, left : left + width].int()).abs().max() <= 2
    small = data.to_clip(frames, (30, 40), box).float()
    reference = F.resize(whole.permute(0, 3, 1, 2)[:, :, top : top + height, left : left + width], [30, 40])
    assert (small - reference.permute(0, 2, 3, 1)).abs().mean() < 2
    assert torch.equal(cut[2], cut[3])


@pytest.mark.parametrize(
    "content, reason",
    [(b"", "cannot be opened"), (b"no video at all", "cannot be opened"), (None, "has no video stream")],
)
def test_a_file_that_is_no_video_says_so(content, reason, tmp_path):
    path = tmp_path / "bad.mkv"
    if content is None:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
            frame.rate = 8000
            container.mux(stream.encode(frame))
    else:
        path.write_bytes(content)
    with pytest.raises(data.VideoError, match=reason):
        data.Video(path)


def test_a_damaged_video_gives_what_decodes_or_a_reason(tmp_path):
    path = encode(tmp_path / "good.mkv", noise_frames(90), options={"g": "10", "bf": "0"})
    whole = path.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: int(len(whole) * 0.9)])
    with data.Video(tmp_path / "cut.mkv") as video:
        assert len(video.frames(data.clip_times(3, 16, 4, 0.0))) == 16
    with av.open(str(path)) as container:  # all but the first pictures overwritten
        places = [(p.pos, p.size) for p in container.demux(container.streams.video[0]) if p.size][5:]
    damaged = bytearray(whole)
    for position, size in places:
        damaged[position + 8 : position + size] = bytes(size - 8)
    (tmp_path / "zeros.mkv").write_bytes(damaged)
    with data.Video(tmp_path / "zeros.mkv") as video, pytest.raises(data.VideoError, match="cannot be decoded"):
        video.frames(data.clip_times(3, 16, 4, 0.5))


# ---------------------------------------------------------------------------------------------------------- lists


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def contents(videos):
    labels = [None] * len(videos) if videos.labels is None else videos.labels.tolist()
    return [(os.path.relpath(videos.path(i), videos.root), label) for i, label in enumerate(labels)]


@pytest.mark.parametrize("separator", [" ", ",", ", ", "\t"])
def test_lists_with_space_or_comma(separator, tmp_path):
    lines = [f"a.mp4{separator}3", f"my videos/b c.mp4{separator}0", "", f"/abs/d.mp4{separator}12"]
    encoding = "utf-8-sig" if separator == "," else "utf-8"  # what spreadsheets write begins with a mark
    (tmp_path / "train.csv").write_text("\n".join(lines), encoding=encoding)
    for source in (tmp_path, tmp_path / "train.csv"):
        videos = data.find_videos(source)
        assert [videos.path(i) for i in range(3)] == [
            f"{tmp_path}/a.mp4",
            f"{tmp_path}/my videos/b c.mp4",
            "/abs/d.mp4",
        ]
        assert videos.labels.tolist() == [3, 0, 12]
    assert data.find_videos(tmp_path / "train.csv", videos="/elsewhere").path(0) == "/elsewhere/a.mp4"


def test_official_kinetics_csv_beside_its_videos(tmp_path, capsys):
    rows = [
        "label,youtube_id,time_start,time_end,split",
        '"playing, well",-abc_1,12,22,train',
        "archery,xyz,0,10,train",
    ]
    rows += ["archery,gone,5,15,train", "archery,other,5,15,val"]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.csv").write_text("\n".join(rows))
    touch(
        tmp_path, "train/-abc_1_000012_000022.mp4", "train/more/xyz_000000_000010.webm", "val/other_000005_000015.mp4"
    )
    videos = data.find_videos(tmp_path)
    assert contents(videos) == [("train/-abc_1_000012_000022.mp4", 1), ("train/more/xyz_000000_000010.webm", 0)]
    assert videos.class_names == ["archery", "playing, well"]
    assert "1 of 3 videos are not below" in capsys.readouterr().out


def test_class_folders_and_plain_folders(tmp_path):
    touch(tmp_path, "train/walk/b.mp4", "train/run/a.MKV", "train/run/notes.txt", "val/run/c.avi")
    assert contents(data.find_videos(tmp_path)) == [("run/a.MKV", 0), ("walk/b.mp4", 1)]
    assert data.find_videos(tmp_path / "train").class_names == ["run", "walk"]
    assert contents(data.find_videos(tmp_path, "val")) == [("run/c.avi", 0)]
    touch(tmp_path, "flat/x.mp4", "flat/deeper/y.mov")
    assert contents(data.find_videos(tmp_path / "flat")) == [("deeper/y.mov", None), ("x.mp4", None)]
    with pytest.raises(InputError, match=r"x\.mp4: no class"):
        data.find_videos(tmp_path / "flat", need_labels=True)


@pytest.mark.parametrize(
    "text, error",
    [
        ("a.mp4 1\nb.mp4\n", r"train.csv, line 2: 'b.mp4': no label after the path"),
        ("a.mp4 1 2\n", r"line 1: 'a.mp4 1 2': more than two columns"),
        ("\n\n", r"train.csv: no videos in it; expected one of"),
        ("label,youtube_id,time_start,time_end,split\na,b,1\n", r"line 2: 3 columns; expected label,youtube_id"),
        (
            "label,youtube_id,time_start,time_end,split\na,b,x,2,train\n",
            r"line 2: time_start and time_end must be seconds",
        ),
        (
            "label,youtube_id,time_start,time_end,split\na,b,1,2,train\n",
            r"none of its videos.*such as b_000001_000002.mp4",
        ),
    ],
)
def test_lists_that_are_wrong_name_file_and_line(text, error, tmp_path):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(InputError, match=error):
        data.find_videos(tmp_path)


def test_a_missing_path_and_an_empty_folder_show_the_layouts(tmp_path):
    with pytest.raises(InputError, match=r"(?s)absent: no such file or folder.*youtube_id.*--dataset demo"):
        data.find_videos(tmp_path / "absent")
    with pytest.raises(InputError, match=r"(?s)no videos in it.*CLASS"):
        data.find_videos(tmp_path)


def test_a_long_list_is_small_in_every_worker(tmp_path):
    lines = [f"train/some_class/{i:011d}_000010_000020.mp4 {i % 400}" for i in range(240_000)]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    videos = data.find_videos(tmp_path)
    assert len(pickle.dumps(videos)) < 20e6
    assert videos.path(239_999).endswith("00000239999_000010_000020.mp4") and videos.labels[239_999] == 239_999 % 400
    assert len(videos.digest) == 16 and videos.digest == data.find_videos(tmp_path).digest


# ------------------------------------------------------------------------------------------------------- sampling


def pretrain_dataset(folder, **changes):
    settings = dict(
        num_frames=16, img_size=32, sampling_rate=4, repeats=4, crop=(0.5, 1.0), hflip=True, seed=0, segments=False
    )
    return data.Clips(data.find_videos(folder), argparse.Namespace(**(settings | changes)), lambda: torch.rand(8))


def test_a_clip_spans_its_time_at_any_place_of_the_video():
    times = data.clip_times(10.0, 16, 4, 1.0)
    assert times[0] == pytest.approx(10 - 64 / 30) and times[1] - times[0] == pytest.approx(4 / 30)
    assert data.clip_times(10.0, 16, 4, 0.0)[0] == 0 and data.clip_times(1.0, 16, 4, 0.9)[0] == 0


def test_a_sample_follows_from_seed_epoch_index_and_repeat_alone(demo):
    dataset = pretrain_dataset(demo)
    sample = dataset[3, 5]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    dataset[0, 1]
    again = dataset[3, 5]
    assert torch.equal(torch.get_rng_state(), before)  # the training's own randomness is left alone
    assert torch.equal(sample["video"], again["video"]) and torch.equal(sample["noise"], again["noise"])
    assert sample["video"].shape == (4, 16, 32, 32, 3) and sample["video"].dtype == torch.uint8
    for other in (dataset[4, 5], dataset[3, 6], pretrain_dataset(demo, seed=1)[3, 5]):
        assert not torch.equal(sample["video"], other["video"]) and not torch.equal(sample["noise"], other["noise"])
    for a in range(4):
        for b in range(a):
            assert not torch.equal(sample["video"][a], sample["video"][b])
            assert not torch.equal(sample["noise"][a], sample["noise"][b])
    assert torch.equal(sample["video"][:2], pretrain_dataset(demo, repeats=2)[3, 5]["video"])


def test_repeated_sampling_opens_a_file_once(demo, monkeypatch):
    opened = []
    original = av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: opened.append(args[0]) or original(*args, **kwargs))
    pretrain_dataset(demo)[0, 0]
    assert len(opened) == 1


def test_crops_and_flips_are_those_of_table_5a(demo, monkeypatch):
    boxes, original = [], data.to_clip

    def spy(frames, size, box=None, flip=False):
        boxes.append(box)
        return original(frames, size, box, flip)

    monkeypatch.setattr(data, "to_clip", spy)
    dataset = pretrain_dataset(demo)
    for epoch in range(40):
        dataset[epoch, epoch % 8]
    area = np.array([height * width / (48 * 56) for _, _, height, width in boxes])
    ratio = np.array([width / height for _, _, height, width in boxes])
    assert area.min() > 0.48 and area.max() < 1.01 and area.std() > 0.1
    assert ratio.min() > 0.73 and ratio.max() < 1.36 and ratio.std() > 0.1
    # With the whole frame as crop, every other clip is the mirror image of what it is without flips.
    flipped = [pretrain_dataset(demo, crop=(1.0, 1.0), hflip=flip)[0, i]["video"] for i in range(8) for flip in (0, 1)]
    flips = [torch.equal(a[k].flip(2), b[k]) for a, b in zip(flipped[::2], flipped[1::2]) for k in range(4)]
    same = [torch.equal(a[k], b[k]) for a, b in zip(flipped[::2], flipped[1::2]) for k in range(4)]
    assert all(f or s for f, s in zip(flips, same)) and 8 <= sum(flips) <= 24


def test_where_a_clip_lies_says_nothing_of_its_crop(demo, monkeypatch):
    places, areas, original = [], [], data.clip_times

    def to_clip(frames, size, box, flip):
        areas.append(box[2] * box[3])
        return torch.zeros(len(frames), *size, 3, dtype=torch.uint8)

    monkeypatch.setattr(data, "to_clip", to_clip)
    monkeypatch.setattr(data, "clip_times", lambda *args: places.append(args[3]) or original(*args))
    dataset = pretrain_dataset(demo)
    for epoch in range(60):
        dataset[epoch, epoch % 8]
    assert len(places) == 240 and abs(np.corrcoef(places, areas)[0, 1]) < 0.2


# -------------------------------------------------------------------------------------------------------- batches


def test_each_pass_holds_each_video_once_whatever_the_processes():
    def order(world, micro_batch, start=0):
        steps = [[] for _ in range(6)]
        for rank in range(world):
            batches = list(data.Stream(7, 4, micro_batch, rank, world, 0, start, 6))
            per_step = len(batches) // (6 - start)
            assert len(batches) == (6 - start) * 4 // world // micro_batch
            for i, batch in enumerate(batches):
                steps[start + i // per_step] += batch
        return steps

    steps = order(1, 4)
    places = [place for step in steps for place in step]
    for epoch in range(3):
        assert Counter(index for e, index in places if e == epoch) == Counter(range(7))
    assert [i for e, i in places if e == 0] != [i for e, i in places if e == 1]
    assert order(2, 2) == steps and order(2, 1) == steps and order(4, 1) == steps
    assert order(1, 4, start=3)[3:] == steps[3:]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(demo, workers):
    def batches(workers):
        stream = data.Stream(8, 4, 2, 0, 1, 0, 0, 3)
        args = argparse.Namespace(num_workers=workers)
        return list(data.make_loader(pretrain_dataset(demo), stream, args, torch.device("cpu")))

    for a, b in zip(batches(0), batches(workers), strict=True):
        assert a["index"] == b["index"] and a["video"].shape == (8, 3, 16, 32, 32)
        assert torch.equal(a["video"], b["video"]) and torch.equal(a["noise"], b["noise"])


def test_a_video_that_fails_is_replaced_named_once_and_counted(demo, tmp_path):
    names = sorted(os.listdir(demo / "train"))
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    (tmp_path / "train.csv").write_text("\n".join(["broken.mp4 0"] + [f"{demo}/train/{name} 0" for name in names]))
    dataset = pretrain_dataset(tmp_path)
    sample = dataset[0, 0]
    assert sample["index"] == 0 and [index for index, _ in sample["failures"]] == [0]
    assert "cannot be opened" in sample["failures"][0][1]
    assert torch.equal(sample["video"], dataset[0, 0]["video"])  # always the same replacement
    assert dataset[0, 1]["failures"] == []

    failures = data.Failures(tmp_path / "failures.log", dataset.videos, limit=1)
    failures.add([(0, "no"), (0, "no"), (0, "no")])
    assert (tmp_path / "failures.log").read_text() == f"{tmp_path}/broken.mp4\tno\n"
    with pytest.raises(data.VideoError, match=r"2 of 9 videos cannot be used, more than --max_failures 1"):
        failures.add([(3, "neither")])
    assert data.Failures(tmp_path / "failures.log", dataset.videos, 2, resumed=True).known == failures.known
    again = data.Failures(tmp_path / "failures.log", dataset.videos, 1, resumed=True)  # repaired: it can go on
    again.add([])
    again.add([(0, "still")])
    assert (tmp_path / "failures.log").read_text() == f"{tmp_path}/broken.mp4\tstill\n"
    assert data.Failures(tmp_path / "failures.log", dataset.videos, 1).known == set()


def test_a_broken_video_may_have_any_bytes_for_a_name(tmp_path):
    touch(tmp_path, os.fsdecode(b"caf\xe9.mp4"), "b.mp4")
    videos = data.find_videos(tmp_path)
    for resumed in False, True:  # named once
        data.Failures(tmp_path / "failures.log", videos, 5, resumed).add([(0, "no"), (1, "no"), (0, "no")])
    assert (tmp_path / "failures.log").read_text() == f"{tmp_path}/b.mp4\tno\n{tmp_path}/caf\\udce9.mp4\tno\n"


@pytest.mark.parametrize("length", [1, 20, 60, 61, 62, 63])
def test_in_a_test_all_processes_meet_equally_often(length, monkeypatch):
    """Else they would wait for one another without end; and never for long, however many videos there are."""
    videos, meetings, seen = [{"index": i} for i in range(length)], [], []
    for rank in range(3):
        monkeypatch.setattr(data, "gather", lambda value, rank=rank: meetings.append(rank) or [value])
        data.each_once(videos, argparse.Namespace(num_workers=0), rank, 3, lambda sample: seen.append(sample["index"]))
    assert sorted(seen) == list(range(length))
    assert {meetings.count(rank) for rank in range(3)} == {math.ceil(math.ceil(length / 3) / 20) + 1}


def test_a_list_of_broken_videos_ends_with_a_reason(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    with pytest.raises(data.VideoError, match=r"20 videos in a row cannot be used:\n  .*\.mp4: cannot be opened"):
        pretrain_dataset(tmp_path)[0, 0]


def test_a_loader_that_fails_ends_with_its_error(tmp_path):
    """Not when the garbage collector comes by: it closes the queues before the threads that still write to them."""
    touch(tmp_path, "a.mp4", "b.mp4")
    args = argparse.Namespace(num_workers=2)
    loader = data.make_loader(pretrain_dataset(tmp_path), [[(0, 0)]], args, torch.device("cpu"))
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(data.VideoError, match="20 videos in a row"):
            next(data.each(loader))
        left = [type(thing).__name__ for thing in gc.get_objects()]
    finally:
        gc.enable()
    assert "_MultiProcessingDataLoaderIter" not in left


@pytest.mark.parametrize("videos, limit", [(20, 4), (1000, 10), (240_000, 2400)])
def test_default_of_max_failures_fits_short_and_long_lists(videos, limit, tmp_path):
    assert data.Failures(tmp_path / "f", range(videos)).limit == limit


# ----------------------------------------------------------------------------------------------------------- demo


def test_the_demo_is_real_files_in_the_official_layout_made_once(tmp_path, monkeypatch):
    monkeypatch.setitem(data.DEMO_VIDEOS, "kinetics", dict(train=24, val=12))
    data.make_demo("kinetics", tmp_path)
    folder = tmp_path / "kinetics"
    videos = data.find_videos(folder, need_labels=True)
    assert len(videos) == 24 and len(data.find_videos(folder, "val")) == 12
    assert videos.class_names == sorted(data.DEMO_SHAPES)
    with av.open(videos.path(0)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
    made = os.stat(videos.path(0)).st_mtime_ns
    data.make_demo("kinetics", tmp_path)
    assert os.stat(videos.path(0)).st_mtime_ns == made


def test_the_demos_unlabelled_videos_are_a_folder_and_none_of_the_labelled_ones(tmp_path, monkeypatch):
    for part in data.DEMO_VIDEOS:
        monkeypatch.setitem(data.DEMO_VIDEOS, part, dict(train=48, val=2))
        data.make_demo(part, tmp_path)
    lists = [data.find_videos(tmp_path / part, split) for part in data.DEMO_VIDEOS for split in ("train", "val")]
    assert [len(videos) for videos in lists] == [48, 2, 48, 2] and lists[0].labels is None
    files = {Path(videos.path(i)).read_bytes() for videos in lists for i in range(len(videos))}
    assert len(files) == 100


def test_a_shape_says_nothing_of_the_motion(tmp_path, monkeypatch):
    """Else a classifier could tell the demo's classes by how they move."""
    monkeypatch.setattr(data, "make_videos", lambda write, tasks: seen.extend(tasks))
    seen = []
    data.make_demo_videos("kinetics", tmp_path)
    pairs = {(shape, motion) for path, shape, motion, _ in seen if "train" in path}
    assert pairs == {(shape, motion) for shape in data.DEMO_SHAPES for motion in data.DEMO_MOTIONS}


def test_sampling_leaves_the_other_devices_generators_alone(demo, monkeypatch):
    """torch.manual_seed takes a stack trace for each device that is not in use: a sixth of the demo's loading time."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all devices were seeded"))
    pretrain_dataset(demo)[0, 0]


def test_two_runs_that_make_the_demo_at_once_leave_one_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(data.DEMO_VIDEOS, "kinetics", dict(train=8, val=2))
    make = data.make_demo_videos

    def meanwhile(part, folder):
        make(part, folder)
        shutil.copytree(folder, tmp_path / part)  # the other run is done
        (tmp_path / part / "VERSION").write_text(data.DEMO_VERSION)

    monkeypatch.setattr(data, "make_demo_videos", meanwhile)
    data.make_demo("kinetics", tmp_path)
    assert os.listdir(tmp_path) == ["kinetics"] and len(data.find_videos(tmp_path / "kinetics")) == 8
