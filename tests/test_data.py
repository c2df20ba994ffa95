"""Lists, sampling, batches, failures, demo: from what users have on disk to the clips of a step."""

import argparse
import json
import math
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch
from conftest import run_stage

import data
import finetune_cls
import mae_pretrain
import model
from data import Batches, ClipDataset, MultiViewDataset, find_videos
from model import InputError

SMALL = "--model vit_demo --img_size 16 --epochs 1 --batch_size 4 --precision fp32 --num_workers"
HEAD = "label,youtube_id,time_start,time_end,split\n"


def write(folder, *names, text="", encoding=None):
    """Files of these names, all with the same text."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding)


def contents(videos):
    labels = [None] * len(videos) if videos.labels is None else videos.labels.tolist()
    paths = [videos.path(i).removeprefix(f"{videos.root}/") for i in range(len(videos))]
    return list(zip(paths, labels))


@pytest.mark.parametrize("separator", [" ", ",", ", ", "\t"])
def test_lists_have_space_or_comma_and_maybe_a_byte_order_mark(separator, tmp_path):
    names = ["a.mp4", "my videos/b c.mp4", "/abs/d.mp4"]
    text = "\n\n".join(f"{name}{separator}{label}" for name, label in zip(names, (3, 0, 12)))
    encoding = "utf-8-sig" if separator == "," else "utf-8"  # as spreadsheets write it
    write(tmp_path, "train.txt", text=text, encoding=encoding)
    for source in (tmp_path, tmp_path / "train.txt"):
        videos = find_videos(source)
        assert videos.labels.tolist() == [3, 0, 12]
        assert [videos.path(i) for i in range(3)] == [str(tmp_path / name) for name in names]
    write(tmp_path, "train.txt", text=text.replace("12", "11"))
    assert find_videos(tmp_path).digest != videos.digest


def test_the_official_kinetics_csv_finds_its_videos_anywhere(tmp_path, capsys):
    rows = '"playing, well",-abc_1,12,22,train\narchery,xyz,0,10,train\narchery,gone,5,15,train\n'
    names = ["train/-abc_1_000012_000022.mp4", "train/more/xyz_000000_000010.webm"]
    write(tmp_path, *names, "val/other_000005_000015.mp4")
    write(tmp_path, "annotations/train.csv", text=HEAD + rows + "another,other,5,15,val\n")
    videos = find_videos(tmp_path, classes=None)
    assert contents(videos) == list(zip(names, (1, 0)))
    assert videos.class_names == ["archery", "playing, well"]
    assert "1 of 3 videos are not below" in capsys.readouterr().out
    write(tmp_path, "annotations/train.csv", text="youtube_id,time_start,time_end\nxyz,0,10")
    videos = find_videos(tmp_path)  # to pre-train on
    assert videos.labels is None and contents(videos) == [(names[1], None)]
    with pytest.raises(InputError, match=r"train.csv: videos without labels"):
        find_videos(tmp_path, classes=None)


def test_class_folders_have_labels_and_plain_folders_none(tmp_path):
    names = ["train/walk/b.mp4", "train/run/a.MKV", "train/run/notes.txt", "val/run/c.avi"]
    write(tmp_path, *names, "flat/steam-train.mp4", "flat/deeper/y.mov", "flat/val/z.mp4")
    assert contents(find_videos(tmp_path)) == [("run/a.MKV", 0), ("walk/b.mp4", 1)]
    assert find_videos(tmp_path / "train").class_names == ["run", "walk"]
    assert contents(find_videos(tmp_path, "val", classes=["jump", "run"])) == [("run/c.avi", 1)]
    plain = [("deeper/y.mov", None), ("steam-train.mp4", None)]  # no list, though its name ends so
    assert contents(find_videos(tmp_path / "flat")) == plain  # nor is a held-out video trained on
    with pytest.raises(InputError, match="flat: videos without labels"):
        find_videos(tmp_path / "flat", classes=None)


@pytest.mark.parametrize("prefix", ["labels/", "something-something-v2-"])
def test_ssv2_is_read_as_distributed_asked_for_by_name_and_never_flipped(prefix, tmp_path):
    names = ["Moving something from left to right", "Holding something"]
    items = [dict(id=i, label="a cup", template="Holding [something]") for i in "012"]
    items[1]["template"] = "Moving [something] from left to right"
    write(tmp_path, "20bn/0.webm", "20bn/1.webm")
    write(tmp_path, f"{prefix}labels.json", text=json.dumps({names[1]: "1", names[0]: "0"}))
    write(tmp_path, f"{prefix}train.json", text=json.dumps(items))
    for source in (tmp_path, tmp_path / f"{prefix}train.json"):
        videos = find_videos(source, classes=None)
        assert videos.class_names == names
        assert contents(videos) == [("20bn/0.webm", 1), ("20bn/1.webm", 0)]
        for stage in (mae_pretrain, finetune_cls):
            args = stage.parse_args(["--dataset", "ssv2", "--data", str(source)])
            data.locate_data(args, "kinetics")
            assert args.segments and not args.hflip
            with pytest.raises(InputError, match="Something-Something v2; add --dataset ssv2"):
                data.locate_data(stage.parse_args(["--data", str(source)]), "kinetics")
    (tmp_path / f"{prefix}labels.json").unlink()
    with pytest.raises(InputError, match=r"train.json: no labels.json beside it"):
        find_videos(tmp_path)


LAYOUTS = r"(?s)expected one of.*youtube_id.*--dataset demo"
WRONG = {
    "a.mp4 1\nb.mp4\n": r"train.csv, line 2: 'b.mp4'; expected 'path label' or",
    "a.mp4 0\nb.mp4 7\n": r"train.csv: label 7 of b.mp4 is outside 0..4",
    "\n\n": LAYOUTS,
    HEAD + "a,b,x,2,train\n": r"train.csv, line 2: no time_start and time_end in seconds",
    HEAD + "a,b,1,2,train\n": r"train.csv: none of its videos, such as .*b_000001_000002",
    HEAD + "dance,there,0,1,train\n": r"class 'dance' is not among the 5 classes",
}


@pytest.mark.parametrize("text", WRONG)
def test_lists_that_are_wrong_name_file_and_line(text, tmp_path):
    write(tmp_path, "there_000000_000001.mp4")
    write(tmp_path, "train.csv", text=text)
    with pytest.raises(InputError, match=WRONG[text]):
        find_videos(tmp_path, classes=list("abcde"))


@pytest.mark.parametrize("name", ["train/walk/a.mp4", "walk/a.mp4", "a.mp4", "train.csv"])
def test_training_videos_are_never_held_out_ones(name, tmp_path):
    write(tmp_path, name, text="a.mp4 0")
    assert len(find_videos(tmp_path)) == 1
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=LAYOUTS):
            find_videos(folder, "val")


def test_readers_of_lists_and_mask_types_can_be_added_from_outside(videos, tmp_path, monkeypatch):
    """A fork changes neither the stages nor data.py: it adds to two tables and runs main()."""

    def read_mine(file, root, split):
        if file.suffix == ".mine":
            return file.read_text().split(";"), None, None

    names = [f"train/{path.name}" for path in (videos / "train").iterdir()]
    write(tmp_path, "train.mine", text=";".join(names))
    monkeypatch.setattr(data, "LIST_READERS", [read_mine, *data.LIST_READERS])
    first_mask = Mock(side_effect=lambda grid, ratio, generator=None: torch.arange(32.0))
    monkeypatch.setitem(model.MASK_TYPES, "mine", first_mask)
    line = f"{SMALL} 0 --data {tmp_path} --videos {videos} --output_dir {tmp_path}/run"
    assert run_stage("mae_pretrain", line, "--mask_type mine --mask_ratio 0.5") == ""
    assert first_mask.call_count >= 8 and first_mask.call_args.args == ((8, 2, 2), 0.5)


def clips_of(folder, line="", **more):
    """The clips of pre-training with the flags given; masks have 8 tokens."""
    args = mae_pretrain.parse_args(f"--data {folder} --img_size 32 --dataset x {line}".split())
    return ClipDataset(find_videos(folder), args, lambda: torch.rand(8), **more)


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
    clips[0, 1]
    monkeypatch.setattr(av, "open", Mock(side_effect=av.open))
    again = clips[3, 5]
    assert av.open.call_count == 1  # for four clips
    assert torch.equal(torch.get_rng_state(), before)  # the training's own draws are left alone
    assert sample["video"].shape == (4, 16, 32, 32, 3) and sample["video"].dtype == torch.uint8
    for name in ("video", "noise"):
        assert torch.equal(sample[name], again[name])
        for other in (clips[4, 5], clips[3, 6], clips_of(videos, "--seed 1")[3, 5]):
            assert not torch.equal(sample[name], other[name])
        assert len({value.numpy().tobytes() for value in sample[name]}) == 4
    assert torch.equal(sample["video"][:2], clips_of(videos, "--repeat_aug 2")[3, 5]["video"])
    numbers = (1, 2), (1, 2, 0), (1, 2, 0, 0), (2, 1)
    assert len({data.stateless_seed(*part) for part in numbers}) == 4
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


def test_each_pass_holds_each_video_once_whatever_the_processes(monkeypatch):
    line = "--model vit_demo --data x --batch_size 4 --micro_batch 1"
    args = mae_pretrain.parse_args(line.split())
    order = Batches(Mock(videos=range(7), args=args), torch.device("cpu"), 0, 6)

    def steps_of(world):
        monkeypatch.setattr(data, "WORLD", world)
        ranks = range(world)
        return [[key for rank in ranks for key in order.keys(step, rank)] for step in range(6)]

    steps = steps_of(1)
    assert steps_of(2) == steps_of(4) == steps
    places = [place for step in steps for place in step]
    passes = [[index for epoch, index in places if epoch == n] for n in range(3)]
    assert all(sorted(part) == list(range(7)) for part in passes) and passes[0] != passes[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_from_their_keys_whatever_the_workers(workers, videos):
    """Neighbours are clips of different videos: MixUp and CutMix mix each clip with the next."""
    more = f"--batch_size 4 --micro_batch 4 --repeat_aug 2 --num_workers {workers}"
    clips = clips_of(videos, more)
    batches = Batches(clips, torch.device("cpu"), 0, 3)
    for step in range(3):
        batch, keys = next(batches), batches.keys(step, 0)
        assert batch["video"].shape == (8, 3, 16, 32, 32) and len(set(keys)) == 4
        for i, key in enumerate(keys * 2):
            sample = clips[key]
            assert torch.equal(batch["video"][i].permute(1, 2, 3, 0), sample["video"][i // 4])
            assert torch.equal(batch["noise"][i], sample["noise"][i // 4])
            assert batch["label"][i] == clips.videos.labels[key[1]]


class Samples(list):
    args = argparse.Namespace(num_workers=0)


@pytest.mark.parametrize("length", [1, 61, 63])
def test_in_a_test_all_processes_meet_equally_often(length, monkeypatch):
    """Else they would wait for one another without end."""
    samples, meetings, found = Samples({"index": i} for i in range(length)), [], {}
    samples[length // 2]["failure"] = "no"
    monkeypatch.setattr(data, "WORLD", 3)
    monkeypatch.setattr(data, "gather", lambda value: meetings.append(1) or [value or ({}, {})])
    for rank in range(3):
        monkeypatch.setattr(data, "RANK", rank)
        values, failures = data.run_test(samples, lambda sample: sample["index"] ** 2)
        found |= values | failures
    assert found == {i: i**2 for i in range(length)} | {length // 2: "no"}
    assert len(meetings) == 3 * (1 + math.ceil(math.ceil(length / 3) / 20))


def test_a_broken_video_is_replaced_always_by_the_same(videos, tmp_path):
    write(tmp_path, "broken.mp4")
    for path in (videos / "train").iterdir():
        (tmp_path / path.name).symlink_to(path)
    clips = clips_of(tmp_path)
    sample = clips[0, 0]
    assert [index for index, _ in sample["failures"]] == [0] and not clips[0, 1]["failures"]
    assert torch.equal(sample["video"], clips[0, 0]["video"])
    assert not torch.equal(sample["video"], clips[1, 0]["video"])


def test_the_demo_is_real_files_in_the_official_layout_made_once(tmp_path, monkeypatch):
    monkeypatch.setitem(data.DEMO_VIDEOS, "kinetics", dict(train=48, val=2))
    monkeypatch.setattr(data, "write_scenes", Mock(side_effect=data.write_scenes))
    data.make_demo("kinetics", tmp_path)
    for split, count in dict(train=48, val=2).items():
        found = find_videos(tmp_path / "kinetics", split, classes=None)
        assert len({Path(found.path(i)).read_bytes() for i in range(len(found))}) == count
    (tasks,) = data.write_scenes.call_args.args
    pairs = {scene["things"][0][:2] for _, scene in tasks}
    assert len(pairs) == 8 * 6  # a shape says nothing of its motion
    data.write_scenes.side_effect = EOFError
    data.make_demo("kinetics", tmp_path)  # it is there
    write(tmp_path, "kinetics/VERSION", text="another")
    with pytest.raises(EOFError):
        data.make_demo("kinetics", tmp_path)
