"""AVA: the official figure, the files as they are distributed, and clips around keyframes."""

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import encode, noise_frames
from torchvision.ops import box_iou, masks_to_boxes

import data
import finetune_ava
from model import InputError

OFFICIAL = Path(__file__).parent / "golden_ava"
SHARED = Path(__file__).parents[2] / "shared" / "ava"
LEFT_OUT = 2, 16, 18, 19, 21, 23, 25, 31, 32, 33, 35, 39, 40, 42, 44, 50, 53, 55, 71, 75
EVALUATED = [number for number in range(1, 81) if number not in LEFT_OUT]  # of AVA's 80 actions
ITEM = 'item {\n  name: "%s"\n  id: %s\n}\n'


def parse(line):
    return finetune_ava.parse_args(["--data", "x", "--model", "vit_demo", *line.split()])


def write_csv(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def score(folder, truth, detections, names, more=""):
    """The average precisions of the actions in {number: name}: {name: %}."""
    (folder / "list.pbtxt").write_text("".join(ITEM % item[::-1] for item in names.items()))
    line = f"--ground_truth {truth} --action_list {folder}/list.pbtxt {more}"
    return finetune_ava.evaluate(parse(line), detections)["per_class"]


@pytest.mark.parametrize("excluded, figure", [(True, "31.1734 %"), (False, "30.1614 %")])
def test_the_figures_are_the_official_evaluators(excluded, figure, tmp_path, capsys):
    expected = json.loads((OFFICIAL / "expected.json").read_text())["per_class"]
    line = f"--excluded {OFFICIAL}/excluded_timestamps.csv" * excluded
    names = dict(zip(EVALUATED, expected, strict=True))
    found = score(tmp_path, OFFICIAL / "gt.csv", OFFICIAL / "detections.csv", names, line)
    assert capsys.readouterr().out.endswith(f"\nmAP@0.5IOU: {figure}\n")
    for name, ap in expected.items() if excluded else ():
        assert found[name] == (None if ap is None else pytest.approx(100 * ap, abs=5.1e-5))


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared: the public list of actions")
def test_the_evaluated_actions_are_those_of_the_public_list():
    actions = finetune_ava.read_action_list(next(SHARED.glob("*.pbtxt")))
    assert list(actions) == EVALUATED
    assert actions[80] == "watch (a person)" and actions[1] == "bend/bow (at the waist)"


def plain_average_precision(truth, detections, action):
    """The official protocol a row at a time: video, second, x1, y1, x2, y2, action, score."""
    people, frames, scores, right = {}, {}, [], []
    for rows, of in ((truth, people), (detections, frames)):  # in the order of the files
        for row in rows:
            of.setdefault(row[:2], []).extend([row] if row[6] == action else [])
    for key, found in frames.items():
        boxes, matched = torch.tensor([row[2:6] for row in people.get(key, ())]), set()
        for i in np.argsort([row[7] for row in found])[::-1]:
            overlaps = box_iou(torch.tensor([found[i][2:6]]), boxes.view(-1, 4))[0]
            best = int(np.argmax([*overlaps, 0.5 - 1e-9]))  # the last: none of them
            scores.append(found[i][7])
            right.append(best < len(overlaps) and best not in matched)
            matched.add(best)
    right = np.array(right)[np.argsort(scores)[::-1]]
    precision = [right[: i + 1].mean() for i in np.flatnonzero(right)]
    return sum(max(precision[i:]) for i in range(len(precision))) / sum(map(len, people.values()))


@pytest.mark.parametrize("digits", [1, 6])
def test_equal_scores_are_ordered_as_the_official_evaluator_has_them(digits, tmp_path):
    rng, all_rows = np.random.RandomState(digits), []
    for n in (300, 3000):  # of truth, and of detections
        places = rng.randint(0, 4, (n, 1)) * 0.2 + rng.uniform(0, 0.05, (n, 2))
        columns = [*places.T, *(places + rng.uniform(0.12, 0.2, (n, 2))).T, rng.randint(1, 5, n)]
        columns = [902 + rng.randint(0, 60, n), *columns, rng.rand(n).round(digits)]
        all_rows.append([("a", *row) for row in zip(*columns)])
    files = [write_csv(tmp_path / f"{len(rows)}.csv", *rows) for rows in all_rows]
    found = score(tmp_path, *files, dict(zip(range(1, 6), "abcde")))
    expected = [100 * plain_average_precision(*all_rows, action) for action in range(1, 5)]
    *found, none = found.values()
    assert none is None and found == pytest.approx(expected, rel=1e-9)
    assert 2 < min(expected) < max(expected) < 90


def test_an_iou_of_a_half_is_right_and_one_just_below_is_wrong(tmp_path):
    row, rows = (0, 0, 0.5, 0.5, 1, 0), [(0, 0, 0.25, 0.5, 1, 0.9), (0, 0, 0.2499, 0.5, 1, 0.8)]
    truth = write_csv(tmp_path / "truth.csv", ("a", 902, *row), ("a", 903, *row))
    found = write_csv(tmp_path / "found.csv", ("a", 902, *rows[0]), ("a", 903, *rows[1]))
    assert score(tmp_path, truth, found, {1: "one"}) == {"one": 50}


GOOD = ("a", "0902", 0.1, 0.1, 0.5, 0.5, 12, 0)
WRONG = [  # whether they are proposals, row, what is said of it
    (False, GOOD[:7], r"not enough values"),
    (True, GOOD[:5], r"not enough values"),
    (True, ("a", "0902", 0.1, 0.5, 0.5, 0.5, 12, 0.9), r"not a box; expected x1 < x2"),
    (False, ("a", "0902", 0.1, 0.1, 0.1000001, 0.5, 12, 0), r"not a box; expected x1 < x2"),
    (True, ("a", "0902", 30, 20, 110, 90, 12, 0), r"not a box; .*shares of the frame"),
    (True, ("a", "0902", "nan", 0.1, 0.5, 0.5, 12, 0), r"not a box"),
    (True, (*GOOD[:6], 81, 0), "must be from 1 to 80, not 81"),
    (True, (*GOOD[:6], -2, 0), "must be from 1 to 80, not -2"),
    (False, (*GOOD[:6], -1, 0), "must be from 1 to 80, not -1"),
    (False, (*GOOD[:6], "", 0), "invalid literal for int"),
    (True, ("a", "902 s", *GOOD[2:]), r"could not convert"),
    (False, ("a", "inf", *GOOD[2:]), "must be from .*, not inf"),
    (True, (*GOOD[:7], "nan"), "must be from .*, not nan"),
]


@pytest.mark.parametrize("proposals, row, error", WRONG)
def test_rows_that_are_wrong_are_named(proposals, row, error, tmp_path):
    path = write_csv(tmp_path / "boxes.csv", GOOD, row)
    with pytest.raises(InputError, match=rf"boxes.csv, line 2: .*{error}.*; expected video,second"):
        finetune_ava.read_boxes(path, proposals)


def test_names_and_seconds_may_have_blanks_around_them(tmp_path):
    path = write_csv(tmp_path / "a.csv", (" a ", " 0902 ", *GOOD[2:6], " 12 ", " 0.5"), ())
    assert [*finetune_ava.read_boxes(path)] == [("a", 902)]
    path = write_csv(tmp_path / "b.csv", (" a ", " 0902 "))
    assert finetune_ava.read_excluded(path) == {("a", 902)}
    write_csv(path, GOOD[:2], ("a", "nan"))
    with pytest.raises(InputError, match=r"b.csv, line 2: 'a,nan': must be from .*, not nan"):
        finetune_ava.read_excluded(path)


WRONG_LISTS = {
    "": "no action list; expected entries like item",
    ITEM % ("walk", 80) + ITEM % ("walk", 81): "item 2: .* must be from 1 to 80, not 81",
    ITEM % ("walk", 0): "item 1: .* must be from 1 to 80, not 0",
    ITEM % ("walk", -1): "must be from 1 to 80, not -1",
    ITEM % ("walk", 80) + "label { name: 'run' }": "item 2: ",
    "label {" + " " * 60_000: "no action list",
}


@pytest.mark.parametrize("text", WRONG_LISTS, ids=range(len(WRONG_LISTS)))
def test_lists_of_actions_that_are_wrong_name_the_entry(text, tmp_path):
    (tmp_path / "list.pbtxt").write_text(text)
    with pytest.raises(InputError, match=f"list.pbtxt.*{WRONG_LISTS[text]}"):
        finetune_ava.read_action_list(tmp_path / "list.pbtxt")


@pytest.fixture
def folder(tmp_path):
    """AVA's layout: four movies, and boxes of three of them."""
    notes = tmp_path / "annotations"
    seconds = zip("aaabcc", ("0902", 1798, 1000, 1000, 1000, 1001))
    truth = [*((*second, *GOOD[2:]) for second in seconds), ("a", "0902", *GOOD[2:6], 80, 1)]
    detected = [
        ("a", "0902", *GOOD[2:6], 5, 0.8),  # what both say of the same box
        ("b", "1000", 0.2, 0.2, 0.6, 0.6, "", 0.9),
        ("b", "1002", 0.2, 0.2, 0.6, 0.6, -1, 0.95),
        ("b", "1003", 0.2, 0.2, 0.6, 0.6, 5, 0.79),
    ]
    for split in ("train", "val"):
        write_csv(notes / f"ava_{split}_v2.1.csv")
        write_csv(notes / f"ava_{split}_v2.2.csv", *truth)
        write_csv(notes / f"ava_{split}_excluded_timestamps_v2.2.csv", ("a", 1000), ("d", 902))
        for end in (f"{split}_boxes_and_labels.csv", f"{split}_boxes_and_labels_v2.2.csv"):
            write_csv(notes / "person_box_67091280_iou90" / f"ava_detection_{end}", *detected)
    (notes / "ava_action_list_v2.1_for_activitynet_2018.pbtxt").write_text("")
    last = 'label {\n  name: "listen to (a person)"\n  label_id: 74\n  label_type: "X"\n}\n'
    (notes / "ava_action_list_v2.2_for_activitynet_2019.pbtxt").write_text(last)
    for name in "abd":
        write_csv(tmp_path / "videos" / f"{name}.mkv")
    return tmp_path


def find_files(line, split):
    args, what = parse(line), ("ground_truth", "excluded", "boxes", "action_list")
    return {name: str(finetune_ava.find_file(args, split, name)) for name in what}


def test_files_are_found_by_the_names_they_are_distributed_with(folder, capsys):
    notes, boxes = folder / "annotations", "person_box_67091280_iou90/ava_detection"
    files = find_files(f"--data {folder}", "train")
    assert {what: path.removeprefix(f"{notes}/") for what, path in files.items()} == {
        "ground_truth": "ava_train_v2.2.csv",
        "excluded": "ava_train_excluded_timestamps_v2.2.csv",
        "boxes": f"{boxes}_train_boxes_and_labels_v2.2.csv",
        "action_list": "ava_action_list_v2.2_for_activitynet_2019.pbtxt",
    }
    said = f"boxes of train: {boxes}_train_boxes_and_labels_v2.2.csv, the last of 2 files"
    assert said in capsys.readouterr().out
    files = find_files(f"--data {folder} --boxes mine.csv", "val")
    assert files["boxes"] == "mine.csv" and files["ground_truth"] == f"{notes}/ava_val_v2.2.csv"
    name = "ava_detection_val_boxes_and_labels_v2.2.csv"
    for other in (f"iou75/{name}", "iou95/ava_detection_val_boxes_and_labels.csv"):
        write_csv(notes / f"person_box_67091280_{other}")
    assert find_files(f"--data {folder}", "val")["boxes"].endswith(f"_iou90/{name}")
    assert f"_iou90/{name}, the last of 4 files" in capsys.readouterr().out  # by name, then path
    (notes / "ava_val_v2.2.csv").unlink()
    (notes / "ava_val_v2.1.csv").unlink()
    with pytest.raises(InputError, match=r"no ground_truth of val in it; expected\n"):
        find_files(f"--data {folder}", "val")


def test_what_is_wrong_with_a_test_is_found_before_training(folder, monkeypatch):
    monkeypatch.setattr("sys.argv", f"a --data {folder} --model vit_demo --allow_missing".split())
    write_csv(folder / "annotations" / "ava_val_v2.2.csv", GOOD, ("a", "0902", 0.1))
    with pytest.raises(InputError, match=r"ava_val_v2.2.csv, line 2: 'a,0902,0.1': not enough"):
        finetune_ava.main()


def test_scores_take_the_files_of_the_data_set_without_excluded(folder, monkeypatch, capsys):
    """Else the person at ("a", 1000), whom nobody looks for, would count as missed."""
    found = write_csv(folder / "found.csv", *(("a", t, *GOOD[2:6], 12, 0.9) for t in (902, 1798)))
    argv = f"a --data {folder} --model vit_demo --score".split()
    monkeypatch.setattr("sys.argv", [*argv, str(found)])
    notes = folder / "annotations"
    (notes / "ava_action_list_v2.2_for_activitynet_2019.pbtxt").write_text(ITEM % ("walk", 12))
    write_csv(notes / "ava_val_v2.2.csv", *(("a", t, *GOOD[2:]) for t in (902, 1000, 1798)))
    finetune_ava.main()
    assert capsys.readouterr().out.splitlines()[-1] == "mAP@0.5IOU: 100.0000 %"
    truth, actions, _ = finetune_ava.read_ground_truth(parse(f"--data {folder}"))
    assert [*truth] == [("a", 902), ("a", 1798)] and actions == {12: "walk"}  # what a test takes
    other = notes / "ava_val_excluded_timestamps_v2.2.csv"
    monkeypatch.setattr("sys.argv", [*argv, str(other)])
    with pytest.raises(InputError, match=rf"{other}, line 1: 'a,1000': not enough values"):
        finetune_ava.main()


def read_keyframes(folder, split, line="--allow_missing"):
    """The keyframes of a split: {(video, second): [(box, actions)]}."""
    keyframes, found = finetune_ava.read_keyframes(parse(f"--data {folder} {line}"), split), {}
    for i, key in enumerate(keyframes.keys):
        boxes, actions = keyframes.boxes(i)
        actions = [(1 + np.flatnonzero(row)).tolist() for row in actions]
        found[key] = list(zip(map(tuple, boxes.tolist()), actions))
    return found


def test_training_takes_true_boxes_and_sure_ones_and_a_test_detected_ones_alone(folder, capsys):
    one, other = GOOD[2:6], (0.2, 0.2, 0.6, 0.6)
    assert read_keyframes(folder, "train") == {
        ("a", 902): [(one, [5, 12, 80])],
        ("a", 1798): [(one, [12])],
        ("b", 1000): [(one, [12]), (other, [])],  # no action: does nothing that is known
        ("b", 1002): [(other, [])],
    }
    out = capsys.readouterr().out
    assert "1 of 3 movies are not below" in out and "or of missing movies: 3\n" in out
    detected = {("a", 902): [(one, [5])], ("b", 1000): [(other, [])], ("b", 1002): [(other, [])]}
    assert read_keyframes(folder, "val", "") == detected
    line = "--detection_threshold 0.5"
    assert read_keyframes(folder, "val", line) == detected | {("b", 1003): [(other, [5])]}
    with pytest.raises(InputError, match="no box reaches --detection_threshold"):
        read_keyframes(folder, "val", "--detection_threshold 1")
    with pytest.raises(InputError, match="1 of 3 movies are not below .*: c, ...; --videos says"):
        read_keyframes(folder, "train", "")


# Of a bright box, as shares of the frame; off the middle in both directions: a mirror moves it.
PLACE = 0.55, 0.3, 0.8, 0.65


def keyframes_in(path, second=901.5, boxes=(PLACE,), start=900):
    """One keyframe of a movie, with these boxes; each has an action of its own, from 3 on."""
    rows = np.array([(*box, 3 + i, 1) for i, box in enumerate(boxes)])
    return finetune_ava.Keyframes("mine", {("movie", second): rows}, {"movie": str(path)}, start)


def bright_box(folder, height, width, more=()):
    """A movie that is dark but for a box at PLACE."""
    frames = np.full((60, height, width, 3), 20, dtype=np.uint8)
    x1, y1, x2, y2 = (round(share * size) for share, size in zip(PLACE, (width, height) * 2))
    frames[:, y1:y2, x1:x2] = 230
    path = encode(folder / "movie.mp4", frames, options={"crf": "10"})
    return keyframes_in(path, boxes=[PLACE, *more])


def where_bright(clip):
    """The box of the bright pixels of a clip (T, H, W, 3)."""
    return masks_to_boxes(clip.float().mean((0, 3))[None] > 125)[0] + torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize("size", [(120, 160), (90, 250), (200, 110)])
def test_boxes_stay_on_their_things_or_leave_with_them(size, tmp_path, monkeypatch):
    cuts, cut_clip = [], finetune_ava.cut_clip
    monkeypatch.setattr(finetune_ava, "cut_clip", lambda *a: cuts.append(a[2:]) or cut_clip(*a))
    keyframes = bright_box(tmp_path, *size, more=[(0, 0, 1, 1), (0, 0, 0.05, 0.05)])
    clips = finetune_ava.KeyframeDataset(keyframes, parse("--img_size 112"))
    scales, dropped = [], set()
    for epoch in range(40):
        sample = clips[epoch, 0]
        clip, actions = sample["video"][0], (1 + torch.nonzero(sample["actions"])[:, 1]).tolist()
        boxes = dict(zip(actions, *sample["boxes"], strict=True))
        dropped |= {3, 4, 5} - boxes.keys()
        assert clip.shape == (16, 112, 112, 3) and boxes[4].tolist() == [0, 0, 112, 112]
        if 3 not in boxes:
            assert clip.max() < 125  # nothing bright is in the crop
        elif (boxes[3][2:] - boxes[3][:2]).min() >= 3:  # no sliver
            assert (where_bright(clip) - boxes[3]).abs().max() <= 1.5
            if boxes[3][1] > 0 and boxes[3][3] < 112:
                height = (PLACE[3] - PLACE[1]) * size[0] / min(size) * 112 / 224
                scales.append((boxes[3][3] - boxes[3][1]).item() / height)  # the short side
    assert dropped == ({3, 5} if size == (90, 250) else {5})
    assert 250 < min(scales) < 290 < max(scales) < 326
    assert 10 <= sum(flip for *_, flip in cuts) <= 30
    down, along = np.transpose([crop[:2] for crop, *_ in cuts])
    assert abs(np.corrcoef(down, along)[0, 1]) < 0.5  # neither follows from the other
    before, cuts[:], clips.args.seed = cuts[:], [], 1
    assert clips[0, 0]["video"].shape and cuts[0] not in before
    clips.args.hflip = False
    assert [clips[epoch, 0] for epoch in range(10)] and not any(flip for *_, flip in cuts[1:])


MIDDLE = 0.583, 0.3, 1, 0.65  # where PLACE is in the middle 120 x 120 of 120 x 200
CROPS = {  # flags: patch size, size of the clip, and the box in it
    "center": (16, (112, 112), MIDDLE),
    "center --test_size 128": (16, (128, 128), MIDDLE),
    "full": (16, (112, 192), PLACE),  # 112 x 186.7 in whole patches
    "full --test_size 120": (8, (120, 200), PLACE),
}


@pytest.mark.parametrize("line", CROPS)
def test_tests_see_the_middle_square_or_the_whole_frame(line, tmp_path):
    args, (patch, shape, place) = parse(f"--img_size 112 --test_crop {line}"), CROPS[line]
    sample = finetune_ava.KeyframeTestDataset(bright_box(tmp_path, 120, 200), args, patch)[0]
    assert sample["video"].shape == (1, 16, *shape, 3)
    np.testing.assert_allclose(sample["boxes"][0], np.multiply(place, shape[::-1] * 2), atol=0.1)
    assert (where_bright(sample["video"][0]) - sample["boxes"][0]).abs().max() <= 1.5


def test_whole_frames_are_rounded_to_the_patches_of_the_model(tmp_path):
    detector = Mock(cls_token=torch.zeros(1), patch_size=8, return_value=torch.zeros(1, 80))
    line = f"--test_crop full --test_size 120 --num_workers 0 --output_dir {tmp_path}"
    finetune_ava.detect(detector, bright_box(tmp_path, 120, 200), parse(line), {1: "one"})
    assert detector.call_args.args[0].shape == (1, 3, 16, 120, 200)
    rows = (tmp_path / "detections.csv").read_text().splitlines()
    assert rows == ["movie,901.5,0.55,0.3,0.8,0.65,1,0.500000"]


@pytest.mark.parametrize("rate", [30, 15])
def test_the_keyframe_is_in_the_middle_of_the_clip(rate, tmp_path):
    path = encode(tmp_path / "movie.mp4", noise_frames(4 * rate), rate=rate)
    for keyframe in (902, 900.5, 903.8):  # the first frame or the last stands in beyond the ends
        found = [frame.pts / 15360 for frame in keyframes_in(path, keyframe).frames(0, 16, 4)]
        expected = keyframe - 900 + (np.arange(16) - 8) * 4 / 30
        np.testing.assert_allclose(found, expected.clip(0, 4 - 1 / rate), atol=0.5 / rate + 1e-6)
    for start in (0, 903):
        told = rf"has no second 902: it holds {start} to {start + 4}; --video_start says"
        with pytest.raises(data.VideoError, match=told):
            keyframes_in(path, 902, start=start).frames(0, 16, 4)


def test_a_folder_of_frames_gives_the_clip_of_the_movie(tmp_path):
    frames, folder = noise_frames(90), tmp_path / "frames" / "movie"
    movie = encode(tmp_path / "movie.mp4", frames, options={"crf": "5"})
    folder.mkdir(parents=True)
    for i in range(90):
        file, frame = folder / f"movie_{i + 1:06d}.jpg", frames[i : i + 1]
        encode(file, frame, codec="mjpeg", pix_fmt="yuvj420p", options={"q:v": "2"})
    args = parse(f"--img_size 32 --data {tmp_path}")
    assert finetune_ava.find_movies(args, {"movie"}) == {"movie": str(folder)}
    found = [keyframes_in(folder, start=None), keyframes_in(movie)]
    one, other = (finetune_ava.KeyframeTestDataset(keyframes, args, 8)[0] for keyframes in found)
    assert (one["video"].float() - other["video"].float()).abs().mean() < 4
    assert torch.equal(one["boxes"], other["boxes"])
    (folder / "movie_000046.jpg").write_bytes(b"")
    with pytest.raises(data.VideoError, match=r"movie_000046.jpg cannot be opened"):
        keyframes_in(folder).frames(0, 16, 4)
