"""Stage 3: relative positions, region head, AVA's files, clips around keyframes, the official figure, the command line."""

import csv
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import encode, noise_frames
from test_model import GOLDEN, tensor

import data
import finetune_ava
import mae_pretrain
import model as m
from model import InputError

ROOT = Path(__file__).parents[1]
OFFICIAL = Path(__file__).parent / "golden_ava"
SMALL = "--model vit_demo --img_size 32 --precision fp32 --num_workers 0 --log_every 1"
# The 60 of AVA's 80 actions that are evaluated, in the order of the official list.
EVALUATED = [1, *range(3, 16), 17, 20, 22, 24, *range(26, 31), 34]
EVALUATED += [*range(36, 39), 41, 43, *range(45, 50), 51, 52, 54, *range(56, 71), *range(72, 75), *range(76, 81)]


def parse(line):
    return finetune_ava.parse_args(line.split())[0]


def test_the_recipe_is_table_6a():
    table_6a = [
        ("optimizer", torch.optim.SGD, torch.optim.SGD),
        ("weight decay", 1e-8, 1e-8),
        ("learning rate", 7.2, 4.8),
        ("learning rate schedule", m.cosine_decay, m.cosine_decay),
        ("warmup epochs", 5, 5),
        ("epochs", 30, 30),
        ("batch size", 128, 128),
        ("drop path", 0.2, 0.2),
        ("dropout", 0.5, 0.5),
        ("layer-wise decay", 0.75, 0.85),
    ]
    for i, size in enumerate(("vit_l", "vit_h"), 1):
        assert list(m.column("", finetune_ava.AVA, size).items()) == [(row[0], row[i]) for row in table_6a]
    args = parse("")
    assert (args.dataset, args.model, args.lr, args.weight_decay, args.warmup_epochs) == ("ava", "vit_l", 7.2, 1e-8, 5)
    assert (args.epochs, args.batch_size, args.drop_path, args.dropout, args.layer_decay) == (30, 128, 0.2, 0.5, 0.75)
    assert (args.rel_pos, args.test_crop, args.detection_threshold, args.hflip) == (False, "center", 0.8, True)
    args = parse("--model vit_h --batch_size 64")
    assert (args.lr, args.layer_decay) == (2.4, 0.85)
    with pytest.raises(InputError, match="Table 6a has no learning rate for vit_b; give one with --lr"):
        parse("--model vit_b")
    assert parse("--model vit_b --eval").model == "vit_b"  # no rate is needed to test


# ------------------------------------------------------------------------------------------------ relative positions


def test_relative_positions_compute_what_mvitv2_computes():
    case = GOLDEN["relative_position_attention"]
    grid, dim, seed = case["config"]["thw"], case["config"]["dim"], case["config"]["seed"]
    attention = m.Attention(dim, case["config"]["num_heads"], grid)
    shapes = case["state_dict_shapes"].items()
    state = {k: tensor(seed + k, s, 0.5 / dim**0.5 if k.endswith("weight") else 0.3) for k, s in shapes}
    attention.load_state_dict(state)
    output = attention(tensor(seed + "input", (2, 1 + math.prod(grid), dim), 1.0), grid).detach()
    for value, key in (
        (output.flatten()[:8], "first8"),
        (output.flatten()[-8:], "last8"),
        (output.abs().mean(), "abs_mean"),
    ):
        torch.testing.assert_close(value, torch.tensor(case[f"output_{key}"]), atol=1e-4, rtol=0)


def plain_attention(attention, x, grid):
    """Attention with the relative positions as an N x N matrix that is added to the logits."""
    q, k, v = (
        f(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for f in (attention.q, attention.k, attention.v)
    )
    place = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, 2)  # (N, 3)
    apart = place[:, None] - place  # (N, N, 3)
    R = 0
    for i, name in enumerate("thw"):
        table = m.resize_time(getattr(attention, f"rel_pos_{name}")[None], 2 * grid[i] - 1)[0]
        R = R + table[apart[..., i] + grid[i] - 1].to(q.dtype)  # (N, N, D / heads)
    bias = torch.zeros(*q.shape[:3], q.shape[2])
    bias[:, :, 1:, 1:] = torch.einsum("bnqc,qkc->bnqk", q[:, :, 1:], R)
    logits = q @ k.mT * q.shape[-1] ** -0.5 + bias
    return attention.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("grid", [(4, 3, 3), (4, 3, 5), (2, 6, 4)])  # the model's own, wider, other in each direction
def test_extended_q_and_k_equal_the_bias_matrix(grid):
    torch.manual_seed(0)
    attention = m.Attention(24, 3, (4, 3, 3)).double()
    for name in "thw":
        torch.nn.init.normal_(getattr(attention, f"rel_pos_{name}"))
    x = torch.randn(2, 1 + math.prod(grid), 24, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (attention, *(functools.partial(f, attention) for f in (plain_attention, bias_matrix_attention))):
        output = function(x, grid)
        output.sin().sum().backward()
        results.append([output.detach(), x.grad, *(parameter.grad for parameter in attention.parameters())])
        x.grad = None
        attention.zero_grad()
    for ours, plain, matrix in zip(*results):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)  # tables are resized in fp32
        torch.testing.assert_close(ours, matrix, atol=1e-5, rtol=1e-5)


def test_relative_positions_change_nothing_at_the_start_and_are_trained_without_decay():
    torch.manual_seed(0)
    detector = m.Detector(img_size=32, patch_size=8, num_frames=4, embed_dim=32, depth=2, num_heads=2, rel_pos=True)
    plain = m.Detector(img_size=32, patch_size=8, num_frames=4, embed_dim=32, depth=2, num_heads=2)
    plain.load_state_dict(detector.state_dict(), strict=False)
    video, boxes = torch.randn(1, 3, 4, 32, 32), [torch.tensor([[2.0, 3, 20, 30]])]
    torch.testing.assert_close(detector(video, boxes), plain(video, boxes))
    tables = [n for n, p in detector.named_parameters() if "rel_pos" in n]
    assert len(tables) == 2 * 3
    for group in m.parameter_groups(detector, 0.05, 0.75):
        for name in set(group["names"]) & set(tables):
            assert group["weight_decay"] == 0 and group["lr_scale"] == pytest.approx(0.75 ** (2 - int(name[7])))


def test_relative_positions_load_and_resize(tmp_path):
    config = dict(patch_size=8, num_frames=4, embed_dim=16, depth=1, num_heads=2, rel_pos=True)
    small, large = m.Detector(img_size=32, **config), m.Detector(img_size=48, **config)
    torch.nn.init.normal_(small.blocks[0].attn.rel_pos_h)
    torch.save({"model": small.state_dict()}, tmp_path / "small.pt")
    report = m.load_pretrained(large, tmp_path / "small.pt")
    assert not report["not found"]
    expected = torch.nn.functional.interpolate(small.blocks[0].attn.rel_pos_h.T[None], size=11, mode="linear")[0].T
    torch.testing.assert_close(large.blocks[0].attn.rel_pos_h, expected)
    plain = m.Detector(img_size=32, **config | {"rel_pos": False})
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pt")
    report = m.load_pretrained(large, tmp_path / "plain.pt")  # from a model without them, as pre-training leaves it
    assert [name.split(".")[-1] for name in report["not found"]] == ["rel_pos_t", "rel_pos_h", "rel_pos_w"]


def bias_matrix_attention(attention, x, grid):
    """The same by a bias matrix made the cheap way, from q . R of each direction, as MViTv2 does."""
    q, k, v = (
        f(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for f in (attention.q, attention.k, attention.v)
    )
    logits = attention.relative_logits(q[:, :, 1:], grid).split(grid, -1)
    place = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, 2)  # (N, 3)
    bias = sum(part[..., place[:, i]] for i, part in enumerate(logits))
    bias = torch.nn.functional.pad(bias, (1, 0, 1, 0))
    x = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attention.proj(x.transpose(1, 2).flatten(2))


MEMORY = """
import re, sys, torch
sys.path[:0] = ["tests", "."]
import model as m, test_ava
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])  # ru_maxrss is the parent's, too
attention = m.Attention(768, 12, (8, 14, 14))
x = torch.randn(1, 1569, 768, requires_grad=True)
before = peak()
function = attention if sys.argv[1] == "ours" else lambda *a: test_ava.bias_matrix_attention(attention, *a)
function(x, (8, 14, 14)).sum().backward()
print((peak() - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_relative_positions_never_hold_a_matrix_of_all_pairs():
    used = {}
    for which in ("ours", "matrix"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, which], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        used[which] = float(done.stdout)
    print(f"peak memory of one attention layer of ViT-B at 1568 tokens, forward and backward: {used} MiB")
    assert used["ours"] < used["matrix"] / 3, used


# ------------------------------------------------------------------------------------------------------ the region head


def bilinear(feature, y, x):
    """A feature map (D, h, w) at one point; what is more than a pixel outside is 0, the rest is drawn to the border."""
    h, w = feature.shape[1:]
    if y < -1 or y > h or x < -1 or x > w:
        return torch.zeros(len(feature))
    y, x = max(y, 0), max(x, 0)
    top, left = min(int(y), h - 1), min(int(x), w - 1)
    bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
    dy, dx = (y - top if top < h - 1 else 0), (x - left if left < w - 1 else 0)
    above = feature[:, top, left] * (1 - dx) + feature[:, top, right] * dx
    below = feature[:, bottom, left] * (1 - dx) + feature[:, bottom, right] * dx
    return above * (1 - dy) + below * dy


def region_max(feature, box, patch):
    """The highest value of each channel in 7 x 7 bins of a box, each the mean of points a pixel or less apart."""
    x1, y1, x2, y2 = (value / patch - 0.5 for value in box.tolist())
    height, width = (y2 - y1) / 7, (x2 - x1) / 7
    rows, columns = math.ceil(height), math.ceil(width)
    bins = []
    for i in range(7):
        for j in range(7):
            points = [
                bilinear(feature, y1 + (i + (p + 0.5) / rows) * height, x1 + (j + (q + 0.5) / columns) * width)
                for p in range(rows)
                for q in range(columns)
            ]
            bins.append(torch.stack(points).mean(0) if points else torch.zeros(len(feature)))  # 0 without area
    return torch.stack(bins).amax(0)


def test_the_region_head_equals_a_written_out_one():
    torch.manual_seed(0)
    detector = m.Detector(img_size=64, patch_size=8, num_frames=4, embed_dim=16, depth=1, num_heads=2, num_classes=5)
    features = torch.randn(2, 16, 8, 10)
    boxes = [
        torch.tensor([[8.0, 8, 40, 30], [0, 0, 80, 64], [3.3, 50.1, 5.2, 53.9]]),  # inside, all of it, very small
        torch.tensor([[60.0, 40, 80, 64], [70, -20, 95, 30], [-30, -30, -10, -10], [80, 10, 80, 20]]),
    ]  # at the border, beyond it, outside of it, what a crop leaves of a box outside
    expected = [region_max(features[i], box, 8) for i in (0, 1) for box in boxes[i]]
    logits = detector.classify(features, boxes)
    torch.testing.assert_close(logits, detector.head(torch.stack(expected)), atol=1e-5, rtol=1e-4)
    numbered = torch.cat([torch.nn.functional.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])
    torch.testing.assert_close(detector.classify(features, numbered), logits)


def test_the_head_sees_the_normed_tokens_averaged_over_time():
    torch.manual_seed(0)
    detector = m.Detector(img_size=32, patch_size=8, num_frames=6, embed_dim=16, depth=2, num_heads=2).eval()
    video, boxes, seen = torch.randn(2, 3, 6, 32, 32), [torch.tensor([[0.0, 0, 16, 16]]), torch.zeros(0, 4)], []
    detector.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = detector(video, boxes)
    features = seen[0].reshape(2, 3, 4, 4, 16).mean(1).permute(0, 3, 1, 2)
    torch.testing.assert_close(detector.classify(features, boxes), logits)
    assert logits.shape == (1, 80)


@pytest.mark.parametrize("rel_pos", [False, True])
@pytest.mark.parametrize("size", [(224, 398), (256, 320)])
def test_full_frames_of_any_shape(size, rel_pos):
    detector = m.Detector(num_frames=4, embed_dim=24, depth=2, num_heads=2, rel_pos=rel_pos)
    logits = detector(torch.zeros(1, 3, 4, *size, dtype=torch.uint8), [torch.tensor([[0.0, 0, size[1], size[0]]])])
    assert logits.shape == (1, 80) and logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in detector.parameters())


# -------------------------------------------------------------------------------------------------- the official figure


@pytest.fixture(scope="module")
def official_actions(tmp_path_factory):
    expected = json.loads((OFFICIAL / "expected.json").read_text())
    path = tmp_path_factory.mktemp("list") / "list.pbtxt"
    assert len(EVALUATED) == len(expected["per_class"]) == 60
    names = zip(EVALUATED, expected["per_class"])
    path.write_text("".join(f'item {{\n  name: "{name}"\n  id: {i}\n}}\n' for i, name in names))
    return path, expected


@pytest.mark.parametrize("excluded", [True, False])
def test_the_official_evaluators_figures(excluded, official_actions, capsys):
    actions, expected = official_actions
    line = f"--score {OFFICIAL}/detections.csv --ground_truth {OFFICIAL}/gt.csv --action_list {actions}"
    assert command(line + (f" --excluded {OFFICIAL}/excluded_timestamps.csv" if excluded else "")) == ""
    *classes, last = capsys.readouterr().out.splitlines()
    assert last == ("mAP@0.5IOU: 0.311734" if excluded else "mAP@0.5IOU: 0.301614")
    if excluded:
        found = dict(re.fullmatch(r"\s*(not there|[\d.]+)  (.*)", line).group(2, 1) for line in classes)
        assert found.keys() == expected["per_class"].keys()
        for name, ap in expected["per_class"].items():
            assert found[name] == "not there" if ap is None else float(found[name]) == pytest.approx(ap, abs=1e-5)


def test_the_evaluated_actions_are_those_of_the_public_list():
    file = ROOT.parent / "shared" / "ava" / "ava_action_list_v2.1_for_activitynet_2018.pbtxt"
    if not file.exists():
        pytest.skip("needs ../shared: the public list of actions")
    actions = data.read_action_list(file)
    assert list(actions) == EVALUATED and actions[80] == "watch (a person)" and actions[1] == "bend/bow (at the waist)"


def rows_of(names, video, time, box, action, score=None):
    columns = np.array(video), np.array(time, dtype=float), np.array(box, dtype=float), np.array(action)
    return data.BoxRows("made up", *columns, np.ones(len(video)) if score is None else np.array(score), names)


def made_up(rng, count, keyframes, people=4, classes=60):
    """Boxes that overlap often: ground truth, and detections of it with scores."""
    frame = rng.randint(0, keyframes, count)
    corner = rng.randint(0, people, count)[:, None] * 0.2 + rng.uniform(0, 0.05, (count, 2))
    box = np.concatenate([corner, corner + rng.uniform(0.12, 0.2, (count, 2))], 1)
    action = rng.randint(1, classes + 1, count)
    return rows_of(["a", "b"], frame % 2, 902 + frame // 2, box, action, rng.rand(count))


def plain_average_precision(truth, detections, action):
    """The protocol, a detection at a time."""
    people = {}
    for i in np.flatnonzero(truth.action == action):
        people.setdefault((truth.names[truth.video[i]], truth.time[i]), []).append([truth.box[i], False])
    positives, found, area, precision = sum(map(len, people.values())), 0, 0.0, []
    chosen = np.flatnonzero(detections.action == action)
    for rank, i in enumerate(chosen[np.argsort(-detections.score[chosen])], 1):
        here = people.get((detections.names[detections.video[i]], detections.time[i]), [])
        overlaps = [finetune_ava.iou(detections.box[i][None], person[0][None])[0] for person in here]
        best = here[int(np.argmax(overlaps))] if overlaps else None
        if best and max(overlaps) >= 0.5 and not best[1]:
            best[1] = True
            found += 1
            precision.append((found / positives, found / rank))
    for i, (recall, _) in enumerate(precision):
        area += (recall - (precision[i - 1][0] if i else 0)) * max(p for _, p in precision[i:])
    return area if positives else math.nan


def test_average_precision_equals_the_protocol_written_out():
    rng = np.random.RandomState(0)
    truth, detections = made_up(rng, 600, 60, classes=8), made_up(rng, 3000, 60, classes=8)
    ours = finetune_ava.average_precisions(truth, detections, range(1, 10))
    for action in range(1, 9):
        assert ours[action] == pytest.approx(plain_average_precision(truth, detections, action)), action
        assert 0.02 < ours[action] < 0.9
    assert math.isnan(ours[9])


def test_detections_on_frames_without_ground_truth_and_second_ones_are_wrong():
    box = [0.1, 0.1, 0.5, 0.5]
    truth = rows_of(["a"], [0], [902], [box], [1])
    assert finetune_ava.average_precisions(truth, rows_of(["a"], [0], [902], [box], [1], [0.5]), [1]) == {1: 1.0}
    elsewhere = rows_of(["a", "b"], [1, 0], [902, 902], [box] * 2, [1, 1], [0.9, 0.5])
    assert finetune_ava.average_precisions(truth, elsewhere, [1]) == {1: 0.5}
    assert finetune_ava.average_precisions(truth, elsewhere, [1], {("b", 902)}) == {1: 1.0}  # excluded: not wrong
    two = rows_of(["a"], [0, 0], [902, 902], [box, [0.6, 0.6, 0.9, 0.9]], [1, 1])
    twice = rows_of(["a"], [0, 0, 0], [902] * 3, [box, box, [0.6, 0.6, 0.9, 0.9]], [1] * 3, [0.9, 0.8, 0.7])
    assert finetune_ava.average_precisions(two, twice, [1])[1] == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert finetune_ava.average_precisions(two, twice, [1], capacity=2) == {1: 0.5}
    wide = rows_of(["a"], [0], [902], [[0.1, 0.1, 0.5, 0.9]], [1], [0.5])  # twice as high: IoU is exactly a half
    assert finetune_ava.average_precisions(truth, wide, [1]) == {1: 1.0}
    wide = rows_of(["a"], [0], [902], [[0.1, 0.1, 0.5, 0.91]], [1], [0.5])
    assert finetune_ava.average_precisions(truth, wide, [1]) == {1: 0.0}


@pytest.mark.long
def test_a_figure_of_avas_size_takes_less_than_a_minute(tmp_path, capsys):
    rng = np.random.RandomState(0)
    boxes, keyframes = 57000, 25000
    with open(tmp_path / "gt.csv", "w") as truth, open(tmp_path / "detections.csv", "w") as detections:
        for i in range(boxes):
            x, y = rng.randint(0, 5, 2) / 5
            at = f"v{i % keyframes // 900:02d},{902 + i % keyframes % 897},{x},{y},{x + 0.15:.2f},{y + 0.2:.2f}"
            truth.write(f"{at},{1 + i % 60},0\n")
            scores = rng.rand(60)
            detections.writelines(f"{at},{action},{scores[action - 1]:.6f}\n" for action in range(1, 61))
    began = time.perf_counter()
    results = finetune_ava.score(tmp_path / "detections.csv", tmp_path / "gt.csv", {i: str(i) for i in range(1, 61)})
    seconds = time.perf_counter() - began
    print(f"{boxes} boxes x 60 actions from csv to mAP: {seconds:.0f} s")
    assert 0.01 < results["mAP"] < 0.03 and seconds < 60  # one box in sixty has the action


# --------------------------------------------------------------------------------------------------------- the files


def write_csv(path, *rows):
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


GOOD = ("a", "0902", 0.1, 0.1, 0.5, 0.5, 12, 0)


@pytest.mark.parametrize(
    "scored, row, error",
    [
        (False, ("a", "0902", 0.1, 0.1, 0.5, 0.5), r"line 2: .*: 6 columns; expected .*action,person"),
        (True, ("a", "0902", 0.1, 0.1, 0.5, 0.5, 1, 0.9, 7), r"line 2: .*: 9 columns; expected .*action,score"),
        (False, ("a", "0902", 0.5, 0.1, 0.1, 0.5, 12, 0), r"line 2: .*a box without area; x1 < x2"),
        (True, ("a", "0902", 0.1, 0.5, 0.5, 0.5, 12, 0.9), r"line 2: .*a box without area"),
        (False, ("a", "0902", 0.1, 0.1, 0.5, 0.5, 81, 0), r"line 2: .*action '81' is outside 1..80"),
        (False, ("a", "0902", 0.1, 0.1, 0.5, 0.5, 0, 0), r"line 2: .*action '0' is outside 1..80"),
        (False, ("a", "0902", 0.1, 0.1, 0.5, 0.5, "", 0), r"line 2: .*action '' is outside 1..80"),
        (False, ("a", "0902", 0.1, 0.1, 0.5, 0.5, "walk", 0), r"line 2: .*invalid literal"),
        (False, ("a", "902 s", 0.1, 0.1, 0.5, 0.5, 12, 0), r"line 2: .*could not convert"),
        (False, ("a", "0902", 30, 20, 110, 90, 12, 0), r"line 2: .*give shares of its width and height"),
        (False, ("a", "0902", "nan", 0.1, 0.5, 0.5, 12, 0), r"line 2: .*a box without area"),
    ],
)
def test_rows_that_are_wrong_are_named(scored, row, error, tmp_path):
    path = write_csv(tmp_path / "boxes.csv", GOOD, row)
    with pytest.raises(InputError, match=r"boxes.csv, " + error):
        data.read_boxes(path, scored)


def test_boxes_without_an_action_are_people_who_do_nothing_known(tmp_path):
    truth = data.read_boxes(write_csv(tmp_path / "gt.csv", GOOD, (*GOOD[:6], 80, 0), ("b", *GOOD[1:])), scored=False)
    detected = data.read_boxes(
        write_csv(
            tmp_path / "boxes.csv",
            ("b", "0903", 0.2, 0.2, 0.6, 0.6, "", 0.9),
            ("c", "0902", 0.2, 0.2, 0.6, 0.6, -1, 0.95),
            ("b", "0902", *GOOD[2:6], 5, 0.9),
            ("b", "0902", 0.3, 0.3, 0.4, 0.4, 5, 0.1),
        ),
        scored=True,
    )
    rows = truth.join(detected.only(detected.score >= 0.8))
    keyframes = data.Keyframes(rows, {name: f"{name}.mp4" for name in "abc"})
    found = {}
    for i in range(len(keyframes)):
        at = keyframes.rows(i)
        actions = [(1 + np.flatnonzero(row)).tolist() for row in keyframes.actions[at]]
        found[keyframes.name(i)] = list(zip(map(tuple, keyframes.boxes[at].tolist()), actions))
    assert found == {
        "a.mp4, second 902": [((0.1, 0.1, 0.5, 0.5), [12, 80])],
        "b.mp4, second 902": [((0.1, 0.1, 0.5, 0.5), [5, 12])],  # what both files say of the same box
        "b.mp4, second 903": [((0.2, 0.2, 0.6, 0.6), [])],
        "c.mp4, second 902": [((0.2, 0.2, 0.6, 0.6), [])],
    }


def test_a_threshold_chooses_the_persons(tmp_path):
    path = write_csv(
        tmp_path / "boxes.csv", *((name, "0902", *GOOD[2:7], s) for name, s in {"a": 0.79, "b": 0.8}.items())
    )
    assert finetune_ava.person_boxes(path, 0.8).names == ["b"]
    assert finetune_ava.person_boxes(path, 0.5).names == ["a", "b"]


def test_what_is_left_out_is_counted(tmp_path, capsys):
    (tmp_path / "movies").mkdir()
    for name in "ab":
        (tmp_path / "movies" / f"{name}.mkv").write_bytes(b"")
    times = {"a": (901, 902, 1798, 1799, 1000), "b": (1000,), "c": (1000, 1001)}
    rows = [(name, f"{t:04d}", *GOOD[2:]) for name, seconds in times.items() for t in seconds]
    rows = data.read_boxes(write_csv(tmp_path / "gt.csv", *rows), scored=False)
    with pytest.raises(
        InputError, match=r"1 of 3 movies are not below .*movies: c; --videos says where .*--allow_missing"
    ):
        data.find_movies(rows, tmp_path / "movies")
    movies = data.find_movies(rows, tmp_path / "movies", allow_missing=True)
    keyframes = data.Keyframes(rows, movies, {("a", 1000.0), ("d", 902.0)})
    assert [tuple(moment) for moment in keyframes.moments] == [(0, 902), (0, 1798), (1, 1000)]
    out = capsys.readouterr().out
    assert "1 of 3 movies are not below" in out and "2 boxes of movies that are missing are left out" in out
    assert "2 boxes outside the seconds 902 to 1798" in out and "1 boxes at excluded time stamps" in out


def test_files_are_found_by_the_names_they_are_distributed_with(tmp_path):
    names = {
        "ava_train_v2.1.csv": "",
        "ava_train_v2.2.csv": "ground truth",
        "ava_val_v2.2.csv": "",
        "ava_train_excluded_timestamps_v2.2.csv": "excluded time stamps",
        "ava_val_excluded_timestamps_v2.2.csv": "",
        "ava_action_list_v2.2.pbtxt": "",
        "ava_action_list_v2.1_for_activitynet_2018.pbtxt": "",
        "ava_action_list_v2.2_for_activitynet_2019.pbtxt": "action list",
        "person_box_67091280_iou90/ava_detection_train_boxes_and_labels_include_negative_v2.2.csv": "person boxes",
        "person_box_67091280_iou90/ava_detection_train_boxes_and_labels_include_negative.csv": "",
        "person_box_67091280_iou90/ava_detection_val_boxes_and_labels.csv": "",
        "ava_train_predicted_boxes.csv": "",
    }
    for name in names:
        path = tmp_path / "annotations" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    expected = {what: str(tmp_path / "annotations" / name) for name, what in names.items() if what}
    assert data.find_ava(tmp_path, "train") == expected
    assert data.find_ava(tmp_path, "val")["person boxes"].endswith("ava_detection_val_boxes_and_labels.csv")
    (tmp_path / "annotations" / "copy").mkdir()
    (tmp_path / "annotations" / "copy" / "ava_val_v2.2.csv").write_text("")
    with pytest.raises(InputError, match="2 files of val ground truth .*leave one there"):
        data.find_ava(tmp_path, "val")


def test_action_lists_in_both_forms(tmp_path):
    (tmp_path / "a.pbtxt").write_text('label {\n  name: "walk"\n  label_id: 14\n  label_type: PERSON_MOVEMENT\n}\n')
    (tmp_path / "b.pbtxt").write_text(
        'item {\n  name: "listen to (a person)"\n  id: 74\n}\nitem {\n  name: "x"\n  id: 3\n}\n'
    )
    assert data.read_action_list(tmp_path / "a.pbtxt") == {14: "walk"}
    assert data.read_action_list(tmp_path / "b.pbtxt") == {74: "listen to (a person)", 3: "x"}
    (tmp_path / "c.pbtxt").write_text("walk\n")
    with pytest.raises(InputError, match=r"c.pbtxt: no action list; expected entries"):
        data.read_action_list(tmp_path / "c.pbtxt")


# ---------------------------------------------------------------------------------------------------------- the clips

PLACE = 0.55, 0.3, 0.8, 0.65  # of a bright box, off the middle in both directions: a mirror moves it


def bright_box(folder, count=90, height=120, width=160):
    """A movie that is dark but for a box, and starts at second 900; a keyframe on it at second 901.5."""
    frames = np.full((count, height, width, 3), 20, dtype=np.uint8)
    x1, y1, x2, y2 = (round(share * size) for share, size in zip(PLACE, (width, height) * 2))
    frames[:, y1:y2, x1:x2] = 230
    encode(folder / "movie.mp4", frames, options={"crf": "10"})
    return keyframes_in(folder, "movie.mp4")


def keyframes_in(folder, path, second=901.5, **more):
    rows = rows_of(["movie"], [0], [second], [PLACE], [3])
    return data.Keyframes(rows, {"movie": str(folder / path)}, (), more.pop("video_start", 900), (0, math.inf))


def where_bright(clip):
    """The box of the bright pixels of a clip (T, H, W, 3)."""
    bright = clip.float().mean((0, 3)) > 125
    y, x = (torch.nonzero(bright.any(axis)).flatten() for axis in (1, 0))
    return torch.tensor([x[0], y[0], x[-1] + 1, y[-1] + 1]).float()


@pytest.mark.parametrize("size", [(120, 160), (90, 250), (200, 110)])
def test_boxes_stay_on_their_things_through_crop_and_flip(size, tmp_path):
    keyframes = bright_box(tmp_path, 60, *size)
    clips = data.KeyframeClips(keyframes, parse("--model vit_demo --img_size 112 --data x"))
    low, high = (112 * short / 224 for short in (256, 320))  # what the short side is scaled to
    seen, scales = set(), []
    for epoch in range(40):
        sample = clips[epoch, 0]
        clip, boxes = sample["video"][0], sample["boxes"]
        assert clip.shape == (16, 112, 112, 3) and clip.dtype == torch.uint8
        if not len(boxes):
            assert clip.max() < 125  # it left the crop: nothing bright is in it
            assert sample["actions"].shape == (0, 80)
            continue
        if min(boxes[0, 2] - boxes[0, 0], boxes[0, 3] - boxes[0, 1]) < 3:
            continue  # a sliver
        assert (where_bright(clip) - boxes[0]).abs().max() <= 1.5, (where_bright(clip), boxes)
        assert sample["actions"].sum() == 1 and sample["actions"][0, 2] == 1
        seen.add(tuple(boxes[0].tolist()))
        if boxes[0, 1] > 0 and boxes[0, 3] < 112:
            scales.append(((boxes[0, 3] - boxes[0, 1]) / (PLACE[3] - PLACE[1]) / size[0] * min(size)).item())
    assert len(seen) > 15
    assert low - 3 < min(scales) < low + 20 and high - 20 < max(scales) < high + 3


def test_boxes_that_leave_the_crop_are_dropped(tmp_path):
    encode(tmp_path / "movie.mp4", noise_frames(60))
    rows = rows_of(["movie"], [0, 0], [901, 901], [(0, 0, 0.05, 0.05), (0, 0, 1, 1)], [3, 4])
    keyframes = data.Keyframes(rows, {"movie": str(tmp_path / "movie.mp4")}, (), 900, (0, math.inf))
    clips, dropped = data.KeyframeClips(keyframes, parse("--model vit_demo --data x")), 0
    for epoch in range(20):
        boxes, actions = clips[epoch, 0]["boxes"], clips[epoch, 0]["actions"]
        assert boxes[-1].tolist() == [0, 0, 32, 32] and actions[-1, 3] == 1 and len(boxes) == len(actions)
        assert ((boxes[:, 2:] - boxes[:, :2]) > 0).all()
        dropped += len(boxes) == 1
    assert 5 < dropped < 20


def test_every_other_clip_is_mirrored_and_none_without_hflip(tmp_path):
    frames = np.zeros((60, 96, 96, 3), dtype=np.uint8)
    frames[:, :, 48:] = 255  # bright on the right
    encode(tmp_path / "movie.mp4", frames)
    keyframes = keyframes_in(tmp_path, "movie.mp4", 901)
    for line, expected in {"": range(8, 25), "--no-hflip": range(0, 1)}.items():
        clips = data.KeyframeClips(keyframes, parse(f"--model vit_demo --data x {line}"))
        mirrored = sum(clips[epoch, 0]["video"][0, 0, 24, 2, 0].item() > 125 for epoch in range(32))
        assert mirrored in expected


def test_center_and_full_views(tmp_path):
    keyframes = bright_box(tmp_path, 60, 120, 200)
    sample = data.KeyframeViews(keyframes, parse("--model vit_demo --img_size 112 --data x"), 16)[0]
    assert sample["video"].shape == (16, 112, 112, 3)
    assert (where_bright(sample["video"]) - sample["boxes"][0]).abs().max() <= 1.5
    side = 120 * 224 / 256  # of the crop, in pixels of the frame
    corner = PLACE[0] * 200 - (200 - side) / 2, PLACE[1] * 120 - (120 - side) / 2
    np.testing.assert_allclose(sample["boxes"][0, :2], np.array(corner) * 112 / side, atol=1.5)
    full = data.KeyframeViews(keyframes, parse("--model vit_demo --img_size 112 --test_crop full --data x"), 16)[0]
    assert full["video"].shape == (16, 128, 208, 3)  # 128 x 213.3 in whole patches of 16: nothing is dropped
    np.testing.assert_allclose(full["boxes"][0], np.multiply(PLACE, (208, 128, 208, 128)), atol=1e-3)
    assert (where_bright(full["video"]) - full["boxes"][0]).abs().max() <= 1.5


@pytest.mark.parametrize("rate", [30, 15])
def test_the_keyframe_is_in_the_middle_of_the_clip(rate, tmp_path):
    encode(tmp_path / "movie.mp4", noise_frames(4 * rate), rate=rate)
    with data.Video(tmp_path / "movie.mp4") as video:
        second = float(video.second)

    def stamps(keyframe):
        return [frame.pts / second for frame in keyframes_in(tmp_path, "movie.mp4", keyframe).frames(0, 16, 4)]

    clip = (np.arange(16) - 8) * 4 / 30
    np.testing.assert_allclose(stamps(902), 2 + clip, atol=0.5 / rate + 1e-6)
    np.testing.assert_allclose(stamps(900.5), (0.5 + clip).clip(0), atol=0.5 / rate + 1e-6)
    np.testing.assert_allclose(stamps(903.8), (3.8 + clip).clip(0, 4 - 1 / rate), atol=0.5 / rate + 1e-6)


def test_a_folder_of_frames_gives_the_clip_of_the_movie(tmp_path):
    frames = noise_frames(90)
    encode(tmp_path / "movie.mp4", frames, options={"crf": "5"})
    (tmp_path / "frames" / "movie").mkdir(parents=True)
    for i, frame in enumerate(frames, 1):
        with av.open(str(tmp_path / "frames" / "movie" / f"movie_{i:06d}.jpg"), "w", format="image2") as file:
            stream = file.add_stream("mjpeg", rate=30, options={"q:v": "2"})
            stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuvj420p"
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode(None))
    rows = rows_of(["movie"], [0], [901.5], [PLACE], [3])
    movies = data.find_movies(rows, tmp_path / "frames")
    assert movies == {"movie": str(tmp_path / "frames" / "movie")}
    args = parse("--model vit_demo --data x")
    folder = data.KeyframeViews(data.Keyframes(rows, movies, span=(0, math.inf)), args, 8)[0]  # from second 900 on
    movie = data.KeyframeViews(keyframes_in(tmp_path, "movie.mp4"), args, 8)[0]
    assert (folder["video"].float() - movie["video"].float()).abs().mean() < 4
    torch.testing.assert_close(folder["boxes"], movie["boxes"])
    (tmp_path / "frames" / "movie" / "movie_000046.jpg").write_bytes(b"")
    with pytest.raises(data.VideoError, match=r"movie_000046.jpg cannot be read"):
        data.Keyframes(rows, movies, span=(0, math.inf)).frames(0, 16, 4)


def test_a_second_outside_the_file_suggests_video_start(tmp_path):
    encode(tmp_path / "movie.mp4", noise_frames(90))
    for start, second in ((0, 902), (903, 902)):
        with pytest.raises(
            InputError, match=rf"has no second {second}: it holds {start} to {start + 3}; --video_start says"
        ):
            keyframes_in(tmp_path, "movie.mp4", second, video_start=start).frames(0, 16, 4)


# ---------------------------------------------------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def movies(tmp_path_factory):
    """The demo's AVA part, small: 6 movies to train on and 3 to validate."""
    folder = tmp_path_factory.mktemp("movies") / "ava"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DEMO_AVA, "train", 6)
        patch.setitem(data.DEMO_AVA, "val", 3)
        data.make_demo_ava(folder)
    return folder


def train(line, *more):
    finetune_ava.train(*finetune_ava.parse_args(f"{SMALL} {line}".split() + [str(word) for word in more]))


def command(line):
    sys.argv = ["finetune_ava.py", *map(str, line.split())]
    try:
        m.run_stage(finetune_ava.main)
    except SystemExit as stop:
        return str(stop.code)
    return ""


LINE = "--video_start 900 --epochs 2 --batch_size 4 --lr 1e-3 --drop_path 0.2 --dropout 0.3 --rel_pos"


@pytest.fixture(scope="module")
def run(movies, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ava"
    train(f"{LINE} --data", movies, "--output_dir", out)
    return out


def test_the_demos_boxes_are_on_its_things(movies):
    truth = data.read_boxes(movies / "annotations" / "ava_train_v2.2.csv", scored=False)
    detected = data.read_boxes(movies / "annotations" / "ava_detection_train_boxes_and_labels.csv", scored=True)
    assert len(np.unique(np.column_stack([truth.video, truth.time, truth.box]), axis=0)) == 2 * 2 * 6
    assert (detected.action == 0).any() and (detected.score < 0.8).any()  # some are wrong, some unsure
    actions = data.read_action_list(movies / "annotations" / "ava_action_list_v2.2_for_activitynet_2019.pbtxt")
    assert actions == data.DEMO_ACTIONS
    frames, things = data.draw_demo_movie(5)
    for second, boxes in zip(data.DEMO_AVA["times"], things):
        frame = frames[(second - 900) * data.DEMO["fps"]].astype(int)
        for (x1, y1, x2, y2), _ in boxes:
            x1, y1, x2, y2 = round(x1 * 72), round(y1 * 48), round(x2 * 72), round(y2 * 48)
            thing = frame[y1:y2, x1:x2].reshape(-1, 3)
            beyond = [frame[y, x] for y, x in ((y1 - 4, x1 - 4), (y2 + 3, x2 + 3)) if 0 <= y < 48 and 0 <= x < 72]
            share = [(abs(thing - colour).sum(1) > 150).mean() for colour in beyond]
            assert beyond and all(0.3 < x < 0.9 for x in share)


def test_a_run_leaves_what_the_readme_says(run, movies):
    results = json.loads((run / "results.json").read_text())
    assert {"mAP", "per_class", "boxes", "keyframes", "test_crop", "init"} <= results.keys()
    rows = data.read_boxes(movies / "annotations" / "ava_detection_val_boxes_and_labels.csv", scored=True)
    sure = rows.only(rows.score >= 0.8)
    excluded = data.read_excluded(movies / "annotations" / "ava_val_excluded_timestamps_v2.2.csv")
    boxes = {(sure.names[v], t, *box) for v, t, box in zip(sure.video, sure.time, sure.box)}
    boxes = {box for box in boxes if box[:2] not in excluded}
    assert results["boxes"] == len(boxes)
    with open(run / "detections.csv") as file:
        detections = list(csv.reader(file))
    assert len(detections) == len(boxes) * len(data.DEMO_ACTIONS)
    assert re.fullmatch(r"val0000,0902(,[\d.]+){4},1,0\.\d{6}", ",".join(detections[0]))
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["actions"] == data.DEMO_ACTIONS and checkpoint["config"]["rel_pos"]
    assert any(checkpoint["model"]["blocks.0.attn.rel_pos_w"].flatten() != 0)
    pictures = sorted(path.name for path in (run / "pictures").iterdir())
    assert "val0000_902.png" in pictures and "val0000_902.mp4" in pictures
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 7)) and all(math.isfinite(e["loss"]) for e in log)
    with data.Video(run / "pictures" / "val0000_902.mp4") as video:
        assert video.duration == pytest.approx(64 / 30, abs=0.05)


def test_eval_and_score_give_the_figure_of_the_run(run, movies, tmp_path, capsys):
    expected = json.loads((run / "results.json").read_text())
    line = f"{SMALL} --eval --video_start 900 --init {run}/checkpoint.pt --data {movies} --output_dir {tmp_path}"
    assert command(line) == ""
    assert json.loads((tmp_path / "results.json").read_text())["mAP"] == pytest.approx(expected["mAP"], abs=1e-6)
    capsys.readouterr()
    notes = movies / "annotations"
    line = f"--score {run}/detections.csv --ground_truth {notes}/ava_val_v2.2.csv --excluded "
    line += f"{notes}/ava_val_excluded_timestamps_v2.2.csv --action_list {notes}/ava_action_list_v2.2_for_activitynet_2019.pbtxt"
    assert command(line) == ""
    assert capsys.readouterr().out.splitlines()[-1] == f"mAP@0.5IOU: {expected['mAP']:.6f}"
    line = f"{SMALL} --eval --test_crop full --video_start 900 --init {run}/checkpoint.pt --data {movies} --output_dir {tmp_path}"
    assert command(line) == ""
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["test_crop"] == "full" and results["boxes"] == expected["boxes"]


def torchrun(processes, line):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["finetune_ava.py", *line.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_box_counts_once_whatever_the_processes(run, movies, tmp_path):
    (tmp_path / "videos").mkdir()
    for name in os.listdir(movies / "videos"):
        (tmp_path / "videos" / name).symlink_to(movies / "videos" / name)
    (tmp_path / "videos" / "val0002.mp4").unlink()
    (tmp_path / "videos" / "val0002.mp4").write_text("damaged")
    line = f"{SMALL} --eval --video_start 900 --init {run}/checkpoint.pt --data {movies} --videos {tmp_path}/videos"
    assert command(f"{line} --output_dir {tmp_path}/one") == ""
    out = torchrun(3, f"{line} --output_dir {tmp_path}/three")
    assert out.count("mAP@0.5IOU") == 1 and out.count("loaded") == 1  # one process speaks
    ours, theirs = (data.read_boxes(tmp_path / name / "detections.csv", scored=True) for name in ("three", "one"))
    assert ours.names == theirs.names == ["val0000", "val0001"]
    for a, b in zip(ours[1:5], theirs[1:5]):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(ours.score, theirs.score, atol=2e-6)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("three", "one")]
    assert results[0]["boxes"] == results[1]["boxes"] == len(theirs.score) / len(data.DEMO_ACTIONS)
    there = len(set(zip(theirs.video.tolist(), theirs.time.tolist())))
    assert results[0]["unreadable"] == results[1]["unreadable"] == results[0]["keyframes"] - there > 0  # each once


def test_processes_and_micro_batches_leave_the_loss_as_it_is(movies, tmp_path):
    losses = {}
    still = LINE.replace("0.2", "0").replace("--dropout 0.3", "--dropout 0")
    for name, more in {"one": "", "micro": "--micro_batch 1"}.items():
        train(f"{still} {more} --epochs 1 --data", movies, "--output_dir", tmp_path / name)
    torchrun(2, f"{SMALL} {still} --epochs 1 --data {movies} --output_dir {tmp_path}/two")
    for name in ("one", "micro", "two"):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
        if name != "two":
            losses[name] += [json.loads(line)["grad_norm"] for line in lines]
    assert len(losses["two"]) == 3
    np.testing.assert_allclose(losses["micro"], losses["one"], rtol=1e-4)
    np.testing.assert_allclose(losses["two"], losses["one"][:3], rtol=1e-4)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(run, movies, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def step_then_die(self, *args, **kwargs):
        if self.done == 4:
            raise Killed
        return step(self, *args, **kwargs)

    step = m.Log.step
    line = f"{LINE} --save_minutes 0 --data", movies, "--output_dir", tmp_path
    monkeypatch.setattr(m.Log, "step", step_then_die)
    with pytest.raises(Killed):
        train(*line)
    monkeypatch.setattr(m.Log, "step", step)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4
    train(*line)
    ours, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (tmp_path, run))
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name


def test_a_batch_without_any_box_is_no_error(movies, tmp_path, monkeypatch):
    load = data.KeyframeClips.load
    monkeypatch.setattr(
        data.KeyframeClips, "load", lambda *a: (s := load(*a)) | {k: s[k][:0] for k in ("boxes", "actions")}
    )
    train(f"{LINE} --weight_decay 0 --data", movies, "--output_dir", tmp_path)
    torch.manual_seed(0)
    start = m.Detector(**finetune_ava.config_of(parse(f"{SMALL} {LINE} --data x"))).state_dict()
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(start[name], trained[name]) for name in start)


def test_it_learns_what_four_things_do(movies, tmp_path):
    """All that the stage does, from file to figure, on what it was trained on."""
    for split in ("train", "val"):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        truth = (movies / "annotations" / "ava_train_v2.2.csv").read_text().splitlines()
        rows = [row for row in truth if row.startswith(("train0000,0902", "train0001,0903"))]
        (tmp_path / "annotations" / f"ava_{split}_v2.2.csv").write_text("\n".join(rows) + "\n")
        boxes = "".join(f"{','.join(row.split(',')[:7])},1.0\n" for row in rows)
        (tmp_path / "annotations" / f"ava_detection_{split}_boxes.csv").write_text(boxes)
    list_ = "ava_action_list_v2.2_for_activitynet_2019.pbtxt"
    (tmp_path / "annotations" / list_).write_text((movies / "annotations" / list_).read_text())
    line = "--video_start 900 --img_size 48 --epochs 100 --batch_size 2 --lr 1e-3 --layer_decay 1 --no-hflip"
    train(f"{line} --videos {movies}/videos --data", tmp_path, "--output_dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["mAP"] > 0.95


# ------------------------------------------------------------------------------------------------------- command line


def test_predict_draws_and_writes_what_people_do(run, movies, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(
        tmp_path / "mine.csv",
        ("val0001", 1.5, 0.1, 0.2, 0.4, 0.8),
        ("val0001", 1.5, 0.5, 0.2, 0.9, 0.8),
        ("val0001", 3, 0.5, 0.2, 0.9, 0.8),
        ("another", 3, 0.5, 0.2, 0.9, 0.8),
    )
    line = f"--precision fp32 --predict {movies}/videos/val0001.mp4 --boxes mine.csv --init {run}/checkpoint.pt"
    assert command(line + " --output_dir out") == ""
    out = capsys.readouterr().out
    assert re.search(r"val0001.mp4, second 1.5, 0.100,0.200,0.400,0.800: \w+ 0\.\d\d", out)
    with open("out/predict/detections.csv") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 3 * len(data.DEMO_ACTIONS) and {row[1] for row in rows} == {"1.5", "0003"}
    assert sorted(os.listdir("out/predict")) == [
        "detections.csv",
        *(f"val0001_{t}" for t in ("1.5.mp4", "1.5.png", "3.mp4", "3.png")),
    ]


@pytest.mark.parametrize(
    "line, error",
    [
        ("--score EMPTY --ground_truth TRUTH", r"--score needs --ground_truth CSV and --action_list PBTXT"),
        (
            "--score OTHER --ground_truth TRUTH --action_list LIST",
            r"other.csv: for other movies \(other, ...\) than .*ava_val",
        ),
        ("--score absent.csv --ground_truth TRUTH --action_list LIST", r"absent.csv: cannot be read.*No such file"),
        ("--score OTHER --ground_truth TRUTH --action_list TRUTH", r"ava_val_v2.2.csv: no action list; expected"),
        ("--data MOVIES --boxes OTHER", r"other.csv: 1 of 1 movies are not below .*videos: other; --videos says where"),
        ("--data MOVIES --boxes EMPTY", r"empty.csv: no box of score 0.8 or more; see --detection_threshold"),
        ("--data MOVIES --detection_threshold 2", r"no box of score 2 or more; see --detection_threshold"),
        ("--data MOVIES --videos absent", r"absent: no such folder; --videos says where the movies are"),
        (
            "--data MOVIES --video_start 0 --batch_size 4",
            r"20 videos in a row.*\n.*has no second 90\d: .*--video_start",
        ),
        ("--data absent", r"absent: no such folder; expected\n.*ava_train_v2.2.csv"),
        ("--data HALF", r"half: no ground truth of train in it; expected\n"),
        ("--data MOVIES --eval", r"--eval needs --init CHECKPOINT: the Detector"),
        ("--data MOVIES --eval --init MAE", r"mae.pt: has no head.weight of a Detector"),
        ("--predict a.mp4", r"--predict needs --boxes CSV: rows of video,second,x1"),
        ("--predict a.mp4 --boxes OTHER --init RUN", r"other.csv: no box of a; it has boxes of other"),
        ("--predict other.mp4 --boxes OTHER --init RUN", r"other.mp4: no such file"),
        ("--predict TEXT --boxes TEXTBOX --init RUN", r"text.mp4: 1 of 1 moments cannot be read"),
    ],
)
def test_bad_input_is_told_what_to_do(line, error, run, movies, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half").mkdir()
    write_csv(tmp_path / "other.csv", ("other", *GOOD[1:7], 0.9))
    write_csv(tmp_path / "textbox.csv", ("text", 0.5, *GOOD[2:6]))
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "text.mp4").write_text("words")
    mae = m.MAE(**mae_pretrain.config_of(mae_pretrain.parse_args(["--model", "vit_demo", "--img_size", "32"])[0]))
    torch.save({"model": mae.state_dict()}, tmp_path / "mae.pt")
    notes = movies / "annotations"
    for name, path in dict(
        MOVIES=movies,
        OTHER="other.csv",
        EMPTY="empty.csv",
        HALF="half",
        TEXTBOX="textbox.csv",
        TEXT="text.mp4",
        RUN=run / "checkpoint.pt",
        MAE="mae.pt",
        TRUTH=notes / "ava_val_v2.2.csv",
        LIST=notes / "ava_action_list_v2.2_for_activitynet_2019.pbtxt",
    ).items():
        line = re.sub(rf"\b{name}\b", str(path), line)
    message = command(f"{SMALL} --output_dir {tmp_path}/out {line}")
    assert message.startswith("finetune_ava.py: error: ")
    assert re.search(error, message), message


def test_no_detections_are_a_figure_of_zero_and_a_warning(movies, tmp_path, capsys):
    notes = movies / "annotations"
    (tmp_path / "empty.csv").write_text("")
    line = f"--score {tmp_path}/empty.csv --ground_truth {notes}/ava_val_v2.2.csv --action_list "
    assert command(line + f"{notes}/ava_action_list_v2.2_for_activitynet_2019.pbtxt") == ""
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("warning: ") and out[0].endswith("empty.csv holds no detections")
    assert out[-1] == "mAP@0.5IOU: 0.000000"


@pytest.mark.parametrize("detected", [True, False])
def test_missing_movies_are_named_or_left_out_and_counted(detected, run, movies, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    for name in ("val0000.mp4", "val0002.mp4"):
        (tmp_path / "videos" / name).symlink_to(movies / "videos" / name)
    line = f"{SMALL} --eval --video_start 900 --init {run}/checkpoint.pt --data {movies} --videos {tmp_path}/videos"
    line += f" --output_dir {tmp_path}/out"
    assert "1 of 3 movies are not below" in command(line)
    if not detected:
        boxes = next((movies / "annotations").glob("ava_detection_val*")).read_text().splitlines()
        (tmp_path / "boxes.csv").write_text("\n".join(row for row in boxes if not row.startswith("val0001")))
        line += f" --boxes {tmp_path}/boxes.csv"
    assert command(line + " --allow_missing") == ""
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (
        results["movies_missing"] == 1
        and results["keyframes"] < json.loads((run / "results.json").read_text())["keyframes"]
    )
    assert "1 of 3 movies are not below" in capsys.readouterr().out
    notes = movies / "annotations"  # the ground truth of the missing one does not count as missed
    rows = [row for row in (notes / "ava_val_v2.2.csv").read_text().splitlines() if not row.startswith("val0001")]
    (tmp_path / "rest.csv").write_text("\n".join(rows))
    line = f"--score {tmp_path}/out/detections.csv --ground_truth {tmp_path}/rest.csv --excluded "
    line += f"{notes}/ava_val_excluded_timestamps_v2.2.csv --action_list {notes}/ava_action_list_v2.2_for_activitynet_2019.pbtxt"
    assert command(line) == ""
    assert capsys.readouterr().out.splitlines()[-1] == f"mAP@0.5IOU: {results['mAP']:.6f}"
