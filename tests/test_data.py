"""Lists, sampling, batches, failures, demo: from what users have on disk to the clips of a step."""

import argparse
import csv
import json
import math
import os
import time
from pathlib import Path
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from conftest import line_of, run_stage

import data
import finetune_cls
import mae_pretrain
import model
from data import Batches, ClipDataset, MultiViewDataset, find_videos
from model import InputError

CPU = torch.device("cpu")
HEAD = "label,youtube_id,time_start,time_end,split\n"


def write(folder, *names, text="", encoding=None):
    """Files of these names, all with the same text."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding)


def find(source, split="train", classes=0, **more):
    args = dict(data=str(source), videos=None, dataset="x") | more
    return find_videos(argparse.Namespace(**args), split, classes)


def contents(videos):
    labels = [None] * len(videos) if videos.labels is None else videos.labels.tolist()
    return list(zip(videos.paths.tolist(), labels))


@pytest.mark.parametrize("separator", [" ", ",", ", ", "\t"])
def test_lists_have_space_comma_or_tab_and_maybe_a_byte_order_mark(separator, tmp_path):
    names = ["a.mp4", "my videos/b c.mp4", "/abs/d,e.mp4"]
    text = "\n\n".join(f"{name}{separator}{label}" for name, label in zip(names, (3, 0, 12)))
    encoding = "utf-8-sig" if separator == "," else "utf-8"  # as spreadsheets write it
    write(tmp_path, "train.txt", "._train.csv", text=text, encoding=encoding)
    for source in (tmp_path, tmp_path / "train.txt"):
        videos = find(source)
        assert videos.labels.tolist() == [3, 0, 12] and videos.class_names is None
        assert [videos.path(i) for i in range(3)] == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize("separator", [",", "\t", " "])
def test_labels_may_be_names_and_paths_quoted_as_pandas_writes_them(separator, tmp_path):
    paths = "my video.mp4", "e.mp4", "a,b.mp4", 'c"d.mp4'
    labels = "walk", "9 lives", "10", "Run, fast"
    with open(tmp_path / "train.csv", "w", newline="") as file:
        rows = ("path", "label"), *zip(paths, labels)
        csv.writer(file, delimiter=separator).writerows(rows)
    with pytest.raises(InputError, match=r"label 10 of a,b.mp4.*all numbers or all names"):
        find(tmp_path)
    write(tmp_path, "train.csv", text=(tmp_path / "train.csv").read_text().replace("10", "Walk"))
    videos = find(tmp_path, classes=4)
    assert videos.class_names == ["9 lives", "Run, fast", "Walk", "walk"]
    assert contents(videos) == list(zip(paths, (3, 0, 2, 1)))
    assert find(tmp_path, classes=["walk", *"abc", *videos.class_names[:3]]).labels[0] == 0


def test_the_official_kinetics_csv_finds_its_videos_anywhere(tmp_path, capsys):
    rows = '"playing, well",-abc_1,12,22,train\narchery,xyz,0,10,train\narchery,gone,5,15,train\n'
    names = ["train/-abc_1_000012_000022.mp4", "train/more/xyz_000000_000010.webm"]
    write(tmp_path, *names, "val/other_000005_000015.mp4", "train/._xyz_000000_000010.webm")
    write(tmp_path, "annotations/train.csv", text=HEAD + rows + "another,other,5,15,val\n")
    videos = find(tmp_path, classes=None)
    assert contents(videos) == list(zip(names, (1, 0)))
    assert videos.class_names == ["archery", "playing, well"]
    assert "1 of 3 videos are not below" in capsys.readouterr().out
    write(tmp_path, "annotations/train.csv", text="youtube_id,time_start,time_end\nxyz,0,10")
    videos = find(tmp_path)  # to pre-train on
    assert videos.labels is None and contents(videos) == [(names[1], None)]
    with pytest.raises(InputError, match=r"train.csv: videos without labels, such as .*xyz"):
        find(tmp_path, classes=None)


def test_class_folders_have_labels_and_plain_folders_none(tmp_path, capsys):
    names = ["train/walk/b.mp4", "train/run/a.MKV", "train/run/notes.txt", "val/run/c.avi"]
    write(tmp_path, *names, "flat/steam-train.mp4", "flat/deeper/y.mov", "flat/prepared/val/z.mp4")
    write(tmp_path, "train/run/._a.mp4", "flat/._x.mp4")  # of macOS
    assert contents(find(tmp_path)) == [("run/a.MKV", 0), ("walk/b.mp4", 1)]
    assert find(tmp_path / "train").class_names == ["run", "walk"]
    assert contents(find(tmp_path, "val", classes=["jump", "run"])) == [("run/c.avi", 1)]
    plain = [("deeper/y.mov", None), ("steam-train.mp4", None)]  # no list, though its name ends so
    assert contents(find(tmp_path / "flat")) == plain  # nor is a held-out video trained on
    assert "flat: videos left out, in folders named val: 1\n" in capsys.readouterr().out
    with pytest.raises(InputError, match="val: 1 classes, but the model knows 8$"):
        find(tmp_path, "val", 8)
    with pytest.raises(InputError, match=r"flat: videos without labels, such as steam-train.mp4\."):
        find(tmp_path / "flat", classes=None)
    for split, folder in (("train", "train"), ("val", "val")):
        with pytest.raises(InputError, match="but not in folders train/ and val/$"):
            find(tmp_path / folder, split, classes=None)


def test_folders_may_be_deep_and_links_may_loop(tmp_path, monkeypatch):
    write(tmp_path, "b/a.mp4")
    for name in ("a", "b/up", "b/self"):
        (tmp_path / name).symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = 1000 * ["d"] + 12 * ["d" * 200]  # too deep for recursion, too long for the system
    for name in names:
        os.mkdir(name)
        os.chdir(name)
    assert contents(find(tmp_path)) == [("b/a.mp4", 0)]
    for name in reversed(names):
        os.chdir("..")
        os.rmdir(name)


@pytest.mark.parametrize("prefix", ["labels/", "something-something-v2-"])
def test_ssv2_is_read_as_distributed_asked_for_by_name_and_never_flipped(prefix, tmp_path):
    names = [f"Moving something {way}" for way in "zyxwvutsrqp"]  # 11: "10" comes before "2"
    items = [dict(id=f"{i}", template=f"Moving [something] {x}") for i, x in enumerate("xpz")]
    write(tmp_path, "20bn/0.webm", "20bn/1.webm")
    numbers = {name: str(i) for i, name in reversed([*enumerate(names)])}
    write(tmp_path, f"{prefix}labels.json", text=json.dumps(numbers))
    write(tmp_path, f"{prefix}train.json", text=json.dumps(items))
    for source in (tmp_path, tmp_path / f"{prefix}train.json"):
        videos = find(source, classes=None, dataset="ssv2")
        assert videos.class_names == names
        assert contents(videos) == [("20bn/0.webm", 2), ("20bn/1.webm", 10)]
        with pytest.raises(InputError, match="Something-Something v2; add --dataset ssv2"):
            find(source)
        for stage in (mae_pretrain, finetune_cls):
            args = stage.parse_args(["--dataset", "ssv2", "--data", str(source)])
            assert args.segments and not args.hflip
    (tmp_path / f"{prefix}labels.json").unlink()
    with pytest.raises(InputError, match=r"train.json: no labels.json beside it"):
        find(tmp_path)


LAYOUTS = r"no folder or list of \w+ videos in a known layout\.\n(?s:.*youtube_id.*)--dataset demo"
FORM = r".*; expected 'path label' or"
WRONG = {
    "a.mp4 1\nb.mp4\n": rf"train.csv, line 2: 'b.mp4': {FORM}",
    "a.mp4 1\nb.mp4 30 1\n": rf"train.csv, line 2: 'b.mp4 30 1': {FORM}",
    "path\na.mp4 1\n\nb 1": rf"train.csv, line 4: 'b 1': {FORM}",
    "a.mp4 1\nb.mp4 -1\n": rf"train.csv, line 2: 'b.mp4 -1': {FORM}",
    "a.mp4 0\nb.mp4 7\n": r"train.csv: class 7 of b.mp4 is not among the 5 classes",
    "\n\n": LAYOUTS,
    f"a.mp4{' ' * 60_000}?": rf"train.csv, line 1: 'a.mp4 {{94}}': {FORM}",
    "a.mp4 1\nb.mp4 é".encode("latin-1"): rf"train.csv: 'utf-8' codec can't decode{FORM}",
    "a.mp4 1\n".encode("utf-16-le"): rf"train.csv, line 1: .*{FORM}",
    HEAD + "a,b,x,2,train\n": r"train.csv, line 2: 'a,b,x,2,train': could not convert",
    HEAD + "\na,b,1,inf,train\n": r"train.csv, line 3: 'a,b,1,inf,train': cannot convert",
    HEAD + "a,b\n": r"train.csv, line 2: 'a,b': .*time_start",
    HEAD + f'a,"{"b" * 2**18}': r"train.csv, line 2: .*field larger than field limit \(131072\)",
    HEAD + "a,b,1,2,train\n": r"train.csv: none of its videos, such as b_000001_000002",
    HEAD + "a,b,1,2,val\n": r"train.csv: lists no train videos",
    HEAD + "dance,there,0,1,train\n": r"class 'dance' of there\S+ is not among the 5 classes",
    ("train.json", "[{]"): r"train.json: Expecting property name",
    ("train.json", '[{"id": 1, "template": "b"}, {"id": 2}]'): r"train.json, item 2: .*'template'",
    ("train.json", '[{"template": "b"}]'): r"train.json, item 1: .*'id'",
    ("train.json", '{"id": 1}'): r"train.json, item 1: 'id'",
    (
        "train.json",
        '[{"id": 1, "template": "c"}]',
    ): r"class 'c' of 1.webm is not among the 1 classes",
    ("train.json", "[" * 100_000): r"train.json: maximum recursion depth",
    ("labels.json", '["b"]'): r"labels.json: .*; expected \{\"Holding something\": \"0\"",
    ("labels.json", '{"b": "x"}'): r"labels.json: invalid literal",
}


@pytest.mark.parametrize("case", WRONG, ids=range(len(WRONG)))
def test_lists_that_are_wrong_name_file_and_entry(case, tmp_path):
    name, text = case if isinstance(case, tuple) else ("train.csv", case)
    write(tmp_path, "there_000000_000001.mp4", "1.webm")
    write(tmp_path, "labels.json", text='{"b": "0"}')
    write(tmp_path, "train.json", text='[{"id": 1, "template": "b"}]')
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.perf_counter()
    with pytest.raises(InputError, match=WRONG[case]):
        find(tmp_path, classes=list("abcde") if name == "train.csv" else 0, dataset="ssv2")
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("name", ["train/walk/a.mp4", "walk/a.mp4", "a.mp4", "train.csv"])
def test_training_videos_are_never_held_out_ones(name, tmp_path):
    write(tmp_path, name, text="a.mp4 0")
    assert len(find(tmp_path)) == 1
    for folder in (tmp_path, tmp_path / "absent"):
        if (name, folder) != ("walk/a.mp4", tmp_path):
            with pytest.raises(InputError, match=LAYOUTS):
                find(folder, "val")


def test_readers_of_lists_and_mask_types_can_be_added_from_outside(videos, tmp_path, monkeypatch):
    """A fork changes neither the stages nor data.py: it adds to two tables and runs main()."""
    pairs = [(f"train/{path.name}", None) for path in (videos / "train").iterdir()]
    write(tmp_path, "train.mine")
    monkeypatch.setattr(data, "LIST_READERS", [lambda file, root, split: pairs])
    first_mask = Mock(side_effect=lambda grid, ratio, generator=None: torch.arange(72.0))
    monkeypatch.setitem(model.MASK_TYPES, "mine", first_mask)
    more = f"--data {tmp_path} --videos {videos} --mask_type mine --mask_ratio 0.5 --epochs 2"
    assert run_stage("mae_pretrain", line_of("mae_pretrain", videos, tmp_path / "run", more)) == ""
    assert first_mask.call_count >= 8 and first_mask.call_args.args == ((8, 3, 3), 0.5)


def clips_of(folder, line="", **more):
    """The clips of pre-training with the flags given."""
    args = mae_pretrain.parse_args(f"--data {folder} --img_size 32 --dataset x {line}".split())
    return ClipDataset(find(folder), args, **more)


def test_segments_give_a_frame_each_at_random_and_the_middle_in_tests(videos):
    clips = clips_of(videos, "--dataset ssv2")
    drawn = np.array([clips.times(8.0, seed) for seed in range(50)])
    assert (np.floor(drawn / 0.5) == np.arange(16)).all() and drawn.std(0).min() > 0.1
    assert (drawn % 0.5).std(1).min() > 0.05  # each at random within its segment
    views = MultiViewDataset(clips.videos, clips.args, (1, 3))
    np.testing.assert_allclose(views.times(8.0), [np.arange(16) * 0.5 + 0.25])


def test_a_sample_follows_from_seed_epoch_index_and_repeat_alone(videos, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("seeds all devices"))
    clips = clips_of(videos)
    sample = clips[3, 5]
    torch.default_generator.manual_seed(123)
    before = torch.get_rng_state()
    monkeypatch.setattr(data, "Video", opened := Mock(wraps=data.Video))
    again = clips[3, 5]
    opened.assert_called_once()  # for four clips
    assert torch.equal(torch.get_rng_state(), before)  # the training's own draws are left alone
    assert sample["video"].shape == (4, 16, 32, 32, 3) and sample["video"].dtype == torch.uint8
    assert sample["label"].tolist() == 4 * [clips.videos.labels[5]]
    assert torch.equal(sample["video"], again["video"])
    for other in (clips[4, 5], clips[3, 6], clips_of(videos, "--seed 1")[3, 5]):
        assert not torch.equal(sample["video"], other["video"])
    keys = [(3, index) for index in range(8)]
    by_workers = data.load_samples(clips_of(videos, "--num_workers 2"), keys)
    for key, other in zip(keys, by_workers, strict=True):
        assert torch.equal(other["video"], clips[key]["video"])
    assert len({clip.numpy().tobytes() for clip in sample["video"]}) == 4
    assert torch.equal(sample["video"][:2], clips_of(videos, "--repeat_aug 2")[3, 5]["video"])
    assert len({data.stateless_seed(*n) for n in [(1, 2), (1, 2, 0), (1, 2, 0, 0), (2, 1)]}) == 4
    inverted = clips_of(videos, augment=torch.bitwise_not)[3, 5]["video"]
    assert torch.equal(inverted, ~sample["video"])


def test_repeats_differ_in_place_crop_and_flip_as_in_table_5a(videos, monkeypatch):
    clips, clip_times, to_clip = clips_of(videos, "--repeat_aug 2"), data.clip_times, data.to_clip
    places, cuts = [], []
    monkeypatch.setattr(data, "clip_times", lambda *a: places.append(a[3]) or clip_times(*a))
    monkeypatch.setattr(data, "to_clip", lambda *a: cuts.append(a[2:]) or to_clip(*a))
    for epoch in range(100):
        clips[epoch, epoch % 8]
    boxes, flips = (np.array(part) for part in zip(*cuts))
    assert (boxes[::2] != boxes[1::2]).any(1).all() and 75 <= flips.sum() <= 125
    assert 35 <= (flips[::2] != flips[1::2]).sum() <= 65
    area, ratio = boxes[:, 2] * boxes[:, 3] / (48 * 56), boxes[:, 3] / boxes[:, 2]
    assert 0.48 < area.min() < 0.6 and 0.9 < area.max() < 1.01
    assert 0.73 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.36
    assert min(places) < 0.05 and max(places) > 0.95
    assert abs(np.corrcoef(places, area)[0, 1]) < 0.2  # one says nothing of the other
    cuts.clear()
    clips_of(videos, "--no-hflip --repeat_aug 20")[0, 0]
    assert not any(flip for _, flip in cuts)


def test_a_crop_is_drawn_in_the_frame_as_it_is_displayed(videos, monkeypatch):
    clips, boxes = clips_of(videos), []
    monkeypatch.setattr(data, "to_clip", lambda frames, size, box, flip: boxes.append(box))
    for _ in range(50):
        clips.crop([argparse.Namespace(height=48, width=96, rotation=90)])
    ends = np.array([(top + height, left + width) for top, left, height, width in boxes]).max(0)
    assert 70 < ends[0] <= 96 and 40 < ends[1] <= 48


def test_views_cover_the_video_and_touch_both_edges(videos):
    clips = clips_of(videos)
    views, one = (MultiViewDataset(clips.videos, clips.args, n) for n in ((7, 3), (1, 1)))
    times = np.array(views.times(10.0))
    np.testing.assert_allclose(np.diff(times), 4 / 30)  # 16 frames, every 4th of 30 fps
    np.testing.assert_allclose(times[:, 0], np.linspace(0, 10 - 64 / 30, 7))
    assert one.times(10.0)[0][0] == pytest.approx((10 - 64 / 30) / 2)
    assert not np.array(views.times(1.0))[:, 0].any()  # too short: from its start
    assert views.boxes(240, 320) == [(0, x, 240, 240) for x in (0, 40, 80)]
    assert views.boxes(320, 240) == [(y, 0, 240, 240) for y in (0, 40, 80)]
    assert one.boxes(240, 320) == [(0, 40, 240, 240)]
    assert views[0]["video"].shape == (21, 16, 32, 32, 3)


def test_each_pass_holds_each_video_once_whatever_the_processes(videos, monkeypatch):
    args = clips_of(videos, "--batch_size 4 --micro_batch 1").args
    order = Batches(Mock(videos=range(7), args=args), model.make_plan(args, 7, 1), CPU, 0)

    def keys_of(world):
        monkeypatch.setattr(data, "world_size", lambda: world)
        return [key for step in range(6) for rank in range(world) for key in order.keys(step, rank)]

    places = keys_of(1)
    assert keys_of(2) == keys_of(4) == places
    passes = [[index for epoch, index in places if epoch == n] for n in range(3)]
    assert all(sorted(part) == list(range(7)) for part in passes) and passes[0] != passes[1]


@pytest.mark.parametrize("length", [1, 61, 63])
def test_in_a_test_all_processes_meet_equally_often(length, monkeypatch):
    """Else they would wait for one another without end."""
    clip = torch.zeros(1, 1, 1, 1, 3)
    samples = MagicMock(args=argparse.Namespace(precision="fp32"), __len__=lambda _: length)
    loaded, meetings, found = [dict(index=i, video=clip) for i in range(length)], [], {}
    loaded[length // 2]["failure"] = "no"
    monkeypatch.setattr(data, "load_samples", lambda _, keys: [loaded[i] for i in keys])
    monkeypatch.setattr(data, "world_size", lambda: 3)
    monkeypatch.setattr(data, "gather", lambda value: meetings.append(1) or [value or ({}, {})])
    for rank in range(3):
        monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
        values, failures = data.run_test(samples, CPU, lambda sample: sample["index"] ** 2)
        found |= values | failures
    assert found == {i: i**2 for i in range(length)} | {length // 2: "no"}
    assert len(meetings) == 3 * (1 + math.ceil(math.ceil(length / 3) / 20))


def test_unreadable_videos_of_a_test_are_logged_and_too_many_are_an_error(videos, tmp_path):
    found, log = find(videos, "val"), tmp_path / "failures.log"
    args = argparse.Namespace(output_dir=tmp_path, max_failures=None)
    data.report_failures(args, found, {})
    data.report_failures(args, found, {1: "no"})
    assert log.read_text() == f"{found.path(1)}\tno\n"
    for limit, count in (None, 5), (0, 1), (9, 5):  # of 5
        args.max_failures = limit
        with pytest.raises(InputError, match=rf"{count} of 5 videos cannot be read.*failures.log"):
            data.report_failures(args, found, dict.fromkeys(range(count), "no"))


def test_a_broken_video_is_replaced_always_by_the_same():
    class Stub(data.TrainDataset):
        def load(self, index, _):
            if index == 0:
                raise data.VideoError("broken")
            return {"index": index}

    samples = Stub(range(9), argparse.Namespace(seed=0))
    found = [samples[n, 0] for n in range(9)]
    assert found == [samples[n, 0] for n in range(9)]
    assert {failure for sample in found for failure in sample["failures"]} == {(0, "broken")}
    assert len({sample["index"] for sample in found}) > 3  # not one that stands in for all
    assert samples[0, 1] == {"index": 1, "failures": []}


def test_the_demo_is_real_files_in_the_official_layout_made_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, counts = finetune_cls.parse_args(["--dataset", "demo"]), dict(train=48, val=2)
    monkeypatch.setitem(data.DEMO_VIDEOS, args.stage, counts)
    data.make_demo(args)
    for split, count in counts.items():
        found = find(args.data, split, classes=None)
        assert len({Path(found.path(i)).read_bytes() for i in range(len(found))}) == count
    monkeypatch.setattr(data, "write_scenes", Mock(side_effect=AssertionError("made again")))
    data.make_demo(args)


@pytest.mark.parametrize("seed", [5, 6, 1373224434])  # with x264's lookahead at least two fail
def test_the_same_frames_give_the_same_file(seed, tmp_path):
    frames, _ = data.draw_scene(seed, [("ring", "slides", 0.5)], (15, 17), (56, 48))
    files = set()
    for _ in range(40):
        data.write_video(tmp_path / "a.mp4", frames, data.DEMO_FPS, crf=20)
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1
