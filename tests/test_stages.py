"""The three stages by their commands: recipes, arguments, what a run leaves, tests, predictions."""

import csv
import os
import re
import shutil
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, STAGES, checkpoint_of, entries, json_of, line_of, run_stage, start
from torch.nn.modules.module import register_module_forward_hook
from torch.testing import assert_close

import data
import finetune_ava
import finetune_cls
import mae_pretrain
import model as m

ACTIONS = dict(enumerate(data.DEMO_ACTIONS, 1))
TABLES = {  # rows in the paper's order, as flags; a value for each model, or one for all
    (mae_pretrain, "KINETICS", "", "vit_b vit_l vit_h"): """
        optimizer "adamw"; betas [0.9, 0.95]; weight_decay 0.05; lr 1.6e-3; warmup_epochs 120;
        epochs 800; repeat_aug 4; hflip True; crop_scale [0.5, 1.0]; batch_size 512;
        clip_grad 0.02""",
    (finetune_cls, "KINETICS", "", "vit_b vit_l vit_h"): """
        optimizer "adamw"; betas [0.9, 0.999]; weight_decay 0.05; lr 1.6e-2, 4.8e-3, 1.6e-3;
        warmup_epochs 5; epochs 150, 100, 75; repeat_aug 2, 2, 1; rand_augment [9, 0.5];
        batch_size 768, 256, 256; mixup 0.8; cutmix 1.0; label_smoothing 0.1;
        drop_path 0.1, 0.2, 0.2; dropout 0.3, 0.3, 0.5; layer_decay 0.65, 0.75, 0.8""",
    (finetune_ava, "AVA", "", "vit_l vit_h"): """
        optimizer "sgd"; weight_decay 1e-8; lr 7.2, 4.8; warmup_epochs 5; epochs 30;
        batch_size 128; drop_path 0.2; dropout 0.5; layer_decay 0.75, 0.85""",
    (finetune_cls, "SSV2", "--dataset ssv2", "vit_l vit_h"): """
        optimizer "sgd"; weight_decay 1e-4; lr 0.64, 0.32; warmup_epochs 3; epochs 40;
        rand_augment [9, 0.5]; batch_size 256; mixup 0.8; cutmix 1.0; label_smoothing 0.1;
        drop_path 0.2; dropout 0.5; layer_decay 0.75, 0.85""",
}


@pytest.mark.parametrize("where, table", TABLES.items(), ids=["5a", "5b", "6a", "6b"])
def test_a_recipe_is_its_table_row_by_row(where, table):
    stage, recipe, line, models = where
    rows, recipe = [row.split(None, 1) for row in table.split(";")], vars(stage)[recipe]
    assert list(recipe)[: len(rows)] == [name for name, _ in rows]
    for i, size in enumerate(models.split()):
        column, args = m.column(recipe, size), settled(stage, f"{line} --model {size}")
        for name, text in rows:
            value = eval(text)
            value = value[i] if isinstance(value, tuple) else value
            assert column[name] == vars(args)[name] == value, (size, name)


def settled(stage, line):
    """A stage's arguments as a run has them."""
    return stage.parse_args(line.split())


def test_what_tables_leave_open_has_the_defaults_of_the_paper_and_the_released_code():
    args = settled(mae_pretrain, "")
    assert (args.dataset, args.model, args.mask_ratio) == ("kinetics400", "vit_l", 0.9)
    assert (args.img_size, args.num_frames, args.sampling_rate) == (224, 16, 4)
    assert (args.mask_type, args.norm_pix_loss, args.pred_t_dim) == ("agnostic", True, None)
    assert args.output_dir == "runs/mae_pretrain_kinetics400_vit_l" and not args.segments
    config = mae_pretrain.model_config(args)
    assert [config[f"decoder_{x}"] for x in ("embed_dim", "depth", "num_heads")] == [512, 4, 8]
    args = settled(mae_pretrain, "--pred_t_dim 16 --decoder_num_heads 4")
    config = mae_pretrain.model_config(args)
    assert (config["pred_t_dim"], config["decoder_num_heads"]) == (16, 4)
    for stage in map(sys.modules.get, STAGES):
        config = stage.model_config(settled(stage, "--grad_checkpointing --num_frames 8"))
        assert (config["grad_checkpointing"], config["num_frames"]) == (True, 8)
    args = settled(finetune_cls, "")
    assert (args.dataset, args.model, args.views) == ("kinetics400", "vit_l", (7, 3))
    assert (args.crop_scale, args.hflip, args.segments) == ([0.08, 1.0], True, False)
    assert (args.random_erasing, args.clip_grad, args.mask_start, args.val_epochs) == (0, 0, 0, 0)
    args = settled(finetune_cls, "--dataset ssv2")
    assert (args.repeat_aug, args.views, args.segments, args.hflip) == (1, (1, 3), True, False)
    assert not settled(mae_pretrain, "--dataset ssv2").hflip  # left is not right there
    args = settled(finetune_ava, "")
    assert (args.dataset, args.test_crop, args.test_size) == ("ava", "center", None)
    assert not args.rel_pos and args.hflip and args.detection_threshold == 0.8
    for size, epochs, drop_path in ("vit_l", 40, 0.2), ("vit_h", 30, 0.3):  # appendix A
        args = settled(finetune_cls, f"--recipe k600_intermediate --model {size}")
        assert (args.lr, args.epochs, args.drop_path, args.mixup) == (8e-4, epochs, drop_path, 0.8)


def test_the_learning_rate_scales_with_the_batch_and_warm_up_shrinks_with_the_epochs():
    assert settled(mae_pretrain, "--batch_size 128").lr == pytest.approx(4e-4)
    assert settled(mae_pretrain, "--batch_size 128 --lr 1e-3").lr == 1e-3
    assert settled(finetune_cls, "--model vit_b --batch_size 384").lr == pytest.approx(8e-3)
    assert settled(finetune_ava, "--model vit_h --batch_size 64").lr == pytest.approx(2.4)
    assert settled(mae_pretrain, "--epochs 200").warmup_epochs == 30
    assert settled(mae_pretrain, "--epochs 200 --warmup_epochs 50").warmup_epochs == 50


@pytest.mark.parametrize("size, device, world, more, expected", [
    ("vit_l", "cuda", 1, "", (20, 3, 8)),  # steps, micro-batches in each, videos in these
    ("vit_l", "cuda", 2, "", (20, 3, 4)), ("vit_l", "cpu", 2, "", (20, 12, 1)),
    ("vit_demo", "cpu", 1, "", (20, 1, 24)), ("vit_l", "cuda", 1, "--micro_batch 6", (20, 4, 6)),
])  # fmt: skip
def test_a_batch_is_split_as_devices_need(size, device, world, more, expected, monkeypatch):
    monkeypatch.setattr(m, "WORLD", world)
    args = settled(mae_pretrain, f"--model {size} --batch_size 24 --repeat_aug 4 --epochs 8 {more}")
    split = m.split_batch(args, 240, torch.device(device), {"vit_l": 16})
    assert (*split, args.micro_batch) == expected


SHOWN = ("800 512 0.02", "800", "32 32"), ("100 256 0.75", "75 0.8", "80 16"), ("30 128 0.75", "0.85", "40 8")  # fmt: skip


@pytest.mark.parametrize("stage, texts", zip(STAGES, SHOWN))
def test_help_has_groups_and_the_values_of_the_recipe_at_hand(stage, texts, capsys):
    for line, shown in zip(("", "--model vit_h", "--dataset demo"), texts):
        with pytest.raises(SystemExit):
            sys.modules[stage].parse_args([*line.split(), "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert all(f"(default: {value})" in out for value in shown.split()), line
    assert all(group in out for group in ["most used:", "clips:", "recipe:", "run:", "layouts:"])


def test_a_model_without_a_rate_in_the_table_needs_one_to_train():
    line = "--recipe k600_intermediate --model vit_b"
    text = "error: no learning rate for vit_b in the recipe; give one with --lr"
    assert text in run_stage("finetune_cls", line)
    args = settled(finetune_cls, f"{line} --lr 0.5")
    assert args.lr == 0.5 and args.layer_decay == 0.65  # as in Table 5b
    assert settled(finetune_ava, "--model vit_b --eval").layer_decay == 0.75  # ViT-L's


ONE_STEP = dict(zip(STAGES, ("--epochs 2", "--epochs 1", "--epochs 0.5")))


def test_a_pre_training_run_leaves_what_the_readme_says(whole):
    out = whole("mae_pretrain")
    checkpoint, log, args = checkpoint_of(out), entries(out), json_of(out, "args.json")
    m.MAE(**checkpoint["config"]).load_state_dict(checkpoint["model"])
    assert checkpoint["step"] == 12 and args["lr"] == 1e-3  # as it came out, not None
    assert [entry["step"] for entry in log] == list(range(1, 13)) and log[-1]["epoch"] == 24
    for name in ("loss", "lr", "grad_norm", "clips_per_s", "data_wait", "tflops"):
        assert all(np.isfinite(entry[name]) for entry in log), name
    for step, entry in enumerate(log):
        assert entry["lr"] == m.cosine_decay(2 * step, 1e-3, args["warmup_epochs"], 24)
    a_clip = m.count_flops(m.MAE, checkpoint["config"], 0.9)
    assert log[-1]["tflops"] == pytest.approx(a_clip * log[-1]["clips_per_s"] / 1e12)
    pictures = [f"{i}_val{i}_000005_000008.{end}" for i in range(4) for end in ("mp4", "png")]
    assert sorted(os.listdir(out / "reconstructions")) == pictures and not list(out.glob("*.tmp"))


def test_a_classification_run_leaves_checkpoint_results_and_top1_between_steps(whole):
    out = whole("finetune_cls", "--recipe ssv2 --mask_start 0.5 --val_epochs 3")
    results, checkpoint = json_of(out), checkpoint_of(out)
    group = checkpoint["optimizer"]["param_groups"][0]  # SGD, as in Table 6b
    assert group["momentum"] == 0.9 and group["nesterov"] and "betas" not in group
    assert {"top1", "top5", "unreadable", "init"} <= results.keys()
    assert results["videos"] == 5 and results["views"] == "2x3"
    assert checkpoint["args"]["class_names"] == sorted(data.DEMO_SHAPES)
    log = [entry for entry in entries(out) if "loss" in entry]
    assert len(log) == 12 and log[0]["mask_ratio"] == 0.5 and log[-1]["mask_ratio"] == 0  # Table 11
    tests = {entry["step"]: entry["val_top1"] for entry in entries(out) if "val_top1" in entry}
    assert list(tests) == [3, 6, 9, 12] and set(tests.values()) <= {0, 20, 40, 60, 80, 100}
    assert not any("val_top1" in entry for entry in entries(whole("finetune_cls")))


def test_a_detection_run_leaves_detections_results_and_pictures(whole, videos):
    out, notes = whole("finetune_ava"), videos / "ava" / "annotations"
    results, checkpoint = json_of(out), checkpoint_of(out)
    assert {"mAP", "per_class", "test_crop", "test_size", "init"} <= results.keys()
    boxes = data.read_boxes(notes / "ava_detection_val_boxes_and_labels.csv", threshold=0.8)
    boxes = {(*key, *row[:4]) for key, rows in boxes.items() for row in rows}
    assert results["boxes"] == len(boxes) and results["unreadable"] == 0
    with open(out / "detections.csv") as file:
        rows = list(csv.reader(file))
    assert len(rows) == len(boxes) * len(data.DEMO_ACTIONS) and len(entries(out)) == 12
    assert re.fullmatch(r"val0000,0902(,[\d.]+){4},1,0\.\d{6}", ",".join(rows[0]))
    assert list(checkpoint["args"]["actions"].values()) == list(data.DEMO_ACTIONS)
    assert checkpoint["config"]["rel_pos"] and checkpoint["model"]["blocks.0.attn.rel_pos_w"].any()
    assert "val0000_902.png" in os.listdir(out / "pictures")


def test_kept_checkpoints_stay_and_a_log_line_has_a_mean(whole, videos, tmp_path, capsys):
    line = line_of("mae_pretrain", videos, tmp_path, "--keep_epochs 8 --log_interval 5")
    assert run_stage("mae_pretrain", line) == ""
    assert "12 steps" in (out := capsys.readouterr().out) and "warning: so few steps" in out
    assert "next: python finetune_cls.py --data LABELLED_VIDEOS --model vit_demo --init" in out
    steps = {path.name: checkpoint_of(path)["step"] for path in tmp_path.glob("checkpoint_e*")}
    assert steps == {f"checkpoint_epoch{epoch}.pt": epoch // 2 for epoch in (8, 16, 24)}
    losses = [entry["loss"] for entry in entries(whole("mae_pretrain"))]
    means = {5: np.mean(losses[:5]), 10: np.mean(losses[5:10]), 12: np.mean(losses[10:])}
    assert {e["step"]: e["loss"] for e in entries(tmp_path)} == pytest.approx(means)


@pytest.mark.parametrize("minutes, steps", [(100, [12]), (0, list(range(1, 13))), (2, [4, 8, 12])])
def test_checkpoints_follow_the_clock_not_the_passes(minutes, steps, videos, tmp_path, monkeypatch):
    writes, save, tell = [], m.save_checkpoint, m.time.perf_counter
    waited, record = Mock(), m.Run.record
    monkeypatch.setattr(m.Run, "record", lambda *a: [waited(), record(*a)])
    clock = SimpleNamespace(perf_counter=lambda: tell() + 35 * waited.call_count)  # s in each step
    monkeypatch.setattr(m, "time", clock)
    monkeypatch.setattr(m, "save_checkpoint", lambda *a: [writes.append(a[1]["step"]), save(*a)])
    line = line_of("mae_pretrain", videos, tmp_path, f"--save_minutes {minutes}")
    assert run_stage("mae_pretrain", line) == "" and writes == steps


def test_a_plan_warns_of_what_looks_wrong(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(m.SIZES, "vit_b", m.SIZES["vit_demo"])
    more = "--model vit_b --img_size 28 --epochs 2"
    assert run_stage("mae_pretrain", line_of("mae_pretrain", videos, tmp_path, more)) == ""
    gflop = 16e-9 * m.count_flops(m.MAE, checkpoint_of(tmp_path)["config"], 0.9)
    out = capsys.readouterr().out
    assert "warning: 4 of 28 rows and columns fill no patch and are dropped" in out
    assert f"warning: a step is {gflop:,.0f} GFLOP, {gflop / 100:,.0f} s at 100 GFLOP/s" in out


def test_validation_takes_one_view_and_training_goes_on_after_it(videos, tmp_path):
    seen, (training, one_view, views) = [], ((True, 4), (False, 1), (False, 6))

    def note(module, args, _):
        if isinstance(module, m.Classifier) and not args[0].is_meta:
            seen.append((module.training, len(args[0])))

    with register_module_forward_hook(note):
        line = line_of("finetune_cls", videos, tmp_path, "--epochs 2 --val_epochs 1")
        assert run_stage("finetune_cls", line) == ""
    assert seen == 2 * (2 * [training] + 5 * [one_view]) + 5 * [views]


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0, 1.0), (0, 0)])
def test_clips_are_mixed_with_their_neighbours_in_one_way_or_not_at_all(mixup, cutmix):
    args = SimpleNamespace(mixup=mixup, cutmix=cutmix, num_classes=4, repeat_aug=2)
    label, plain = torch.arange(4), torch.eye(4)
    video = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 2, 8, 8)  # of one value each
    for seed in range(9):
        torch.manual_seed(seed)
        mixed, target = finetune_cls.mix_clips(video, label, args)
        share = target[0, 0] if mixup or cutmix else 1
        assert_close(target, share * plain + (1 - share) * plain.roll(1, 0))
        assert_close(mixed.mean((1, 2, 3, 4)), target @ torch.arange(4.0))
        assert mixup or torch.equal(mixed, mixed.round())  # each pixel is of one clip
        assert cutmix or (mixed == mixed[..., :1, :1]).all()
    mixed, target = finetune_cls.mix_clips(video[:2], label[:2], args)  # clips of one video
    assert torch.equal(mixed, video[:2]) and torch.equal(target, plain[:2])


@pytest.mark.parametrize("stage", STAGES)
def test_blocks_are_compiled_and_compute_in_bf16_if_asked_for(stage, videos, tmp_path, monkeypatch):
    seen, compiled = set(), []
    monkeypatch.setattr(m.Block, "compile", lambda block: compiled.append(block))

    def note(module, _, output):
        if isinstance(module, torch.nn.Linear) and module.training and not output.is_meta:
            seen.add(output.dtype)

    with register_module_forward_hook(note):
        line = line_of(stage, videos, tmp_path, ONE_STEP[stage], "--precision bf16 --compile")
        assert run_stage(stage, line) == ""
    assert seen == {torch.bfloat16} and len(compiled) == 4 + (stage == "mae_pretrain")


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(stage, videos, tmp_path):
    def harm(module, _, output):
        if isinstance(module, torch.nn.Linear) and output.requires_grad:
            output.register_hook(lambda gradient: gradient * np.inf)

    with register_module_forward_hook(harm):
        message = run_stage(stage, line_of(stage, videos, tmp_path, ONE_STEP[stage]))
    assert re.search(r"loss \d+\.\d+, gradient norm (nan|inf)", message), message


@pytest.mark.parametrize("stage", ["finetune_cls", "finetune_ava"])
def test_a_linear_probe_leaves_all_but_the_head_and_its_norm(stage, videos, tmp_path, whole):
    init = whole("mae_pretrain")
    line = line_of(stage, videos, tmp_path, "--layer_decay 0 --epochs 2 --init", init)
    assert run_stage(stage, line) == ""
    old, new = checkpoint_of(init)["model"], checkpoint_of(tmp_path)["model"]
    changed = {name for name in old.keys() & new.keys() if not torch.equal(old[name], new[name])}
    assert changed == {"norm.weight", "norm.bias"}
    groups = checkpoint_of(tmp_path)["optimizer"]["param_groups"]
    assert {n for g in groups for n in g["names"]} == {"head.weight", "head.bias", *changed}


def test_a_batch_without_any_box_is_no_error(videos, tmp_path, monkeypatch):
    def without_boxes(*key, load=data.KeyframeDataset.load):
        sample = load(*key)
        return sample | {name: sample[name][:0] for name in ("boxes", "actions")}

    monkeypatch.setattr(data.KeyframeDataset, "load", without_boxes)
    assert run_stage("finetune_ava", line_of("finetune_ava", videos, tmp_path, "--epochs 2")) == ""
    assert [entry["loss"] for entry in entries(tmp_path)] == [0, 0, 0, 0]


def test_a_test_takes_all_from_the_checkpoint_and_flags_win(whole, tmp_path):
    out, other = tmp_path / "cls", tmp_path / "other"
    shutil.copytree(whole("finetune_cls"), out)
    assert run_stage("finetune_cls", f"--eval --init {out}") == ""
    assert json_of(out / "eval") == json_of(out) | {"init": str(out)}  # beside the checkpoint
    line = f"--eval --init {out}/checkpoint.pt --views 1x1 --output_dir {other}"
    assert run_stage("finetune_cls", line) == "" and json_of(other)["views"] == "1x1"
    args = settled(finetune_cls, f"--eval --init {out} --sampling_rate 2")
    assert (args.model, args.img_size, args.sampling_rate) == ("vit_demo", 24, 2)
    args = settled(mae_pretrain, f"--visualize a --init {whole('mae_pretrain')}")
    assert args.decoder_embed_dim == 32 and args.output_dir.endswith("/visualize")


@pytest.mark.parametrize("stage", ["finetune_cls", "finetune_ava"])
def test_each_sample_counts_once_on_two_processes(stage, whole, videos, tmp_path):
    folder, results, detections = tmp_path / "videos", [], []
    shutil.copytree(videos / ("ava/videos" if stage == "finetune_ava" else "val"), folder)
    bad = sorted(folder.glob("val*"))[1]
    bad.write_text("words")
    for n in (1, 2):
        out = tmp_path / str(n)
        line = f"--eval --init {whole(stage)} --videos {folder} --output_dir {out} --num_workers 1"
        code, text = start(stage, line, n).finish()
        assert code == 0 and text.count("tensors loaded") == 1, text  # one process speaks
        results.append(json_of(out))
        assert text.count(str(bad)) == results[-1]["unreadable"] > 0
        if stage == "finetune_ava":
            rows = (out / "detections.csv").read_text().splitlines()
            detections.append([row[: row.rindex(",")] for row in rows])  # but for the score
    one, two = ({k: v for k, v in result.items() if k != "per_class"} for result in results)
    assert one == pytest.approx(two)
    if stage == "finetune_ava":
        assert sorted(detections[0]) == sorted(detections[1])


def test_top5_is_not_top1_and_a_video_that_cannot_be_read_is_wrong(whole, videos, tmp_path):
    labels = [0, 1, 4, 5, 0]  # every video is taken for class 0, then 1, 2, ...; the last is broken
    for i, path in enumerate(sorted((videos / "val").iterdir())[:4]):
        (tmp_path / f"{i}.mp4").symlink_to(path)
    (tmp_path / "4.mp4").write_text("words")
    (tmp_path / "val.txt").write_text("".join(f"{i}.mp4 {n}\n" for i, n in enumerate(labels)))
    checkpoint = checkpoint_of(whole("finetune_cls"))
    checkpoint["model"]["head.weight"].zero_()
    checkpoint["model"]["head.bias"] = -torch.arange(8.0)
    torch.save(checkpoint, tmp_path / "a.pt")
    line = f"--eval --init {tmp_path}/a.pt --data {tmp_path} --output_dir {tmp_path}"
    assert run_stage("finetune_cls", line) == ""
    expected = dict(top1=20, top5=60, videos=5, unreadable=1)
    assert {name: json_of(tmp_path)[name] for name in expected} == pytest.approx(expected)


def test_each_action_has_a_sigmoid_of_its_own(whole, tmp_path):
    checkpoint = checkpoint_of(whole("finetune_ava"))
    checkpoint["model"]["head.weight"].zero_()
    bias = torch.linspace(-3, 3, len(checkpoint["model"]["head.bias"]))
    checkpoint["model"]["head.bias"] = bias
    torch.save(checkpoint, tmp_path / "a.pt")
    line = f"--eval --init {tmp_path}/a.pt --output_dir {tmp_path}"
    assert run_stage("finetune_ava", line) == ""
    scores = {}  # of all boxes alike
    for *_, action, score in csv.reader((tmp_path / "detections.csv").open()):
        scores[int(action)] = float(score)
    expected = {i: 1 / (1 + np.exp(-bias[i - 1].item())) for i in range(1, 13)}
    assert scores == pytest.approx(expected, abs=1e-5)


def test_predict_prints_the_five_likeliest_classes(whole, videos, tmp_path, capsys):
    paths = sorted((videos / "val").iterdir())[:2]
    (tmp_path / "bad.mp4").write_text("words")
    line = f"--predict {paths[0]} {tmp_path}/bad.mp4 {paths[1]} --init {whole('finetune_cls')}"
    error = r"error: 1 of 3 videos cannot be read: \S+/bad.mp4 cannot be opened"
    assert re.search(error, run_stage("finetune_cls", line))
    out = capsys.readouterr().out
    for path in paths:
        shown = re.findall(r"^ +([\d.]+)%  (\w+)$", out.partition(f"{path}:\n")[2], re.M)[:5]
        assert len({name for _, name in shown} & set(data.DEMO_SHAPES)) == 5
        percent = [float(number) for number, _ in shown]
        assert percent == sorted(percent, reverse=True) and 50 < sum(percent) < 100.3


def test_eval_and_score_give_the_figure_of_the_run(whole, videos, tmp_path, capsys):
    run, notes = whole("finetune_ava"), videos / "ava" / "annotations"
    expected = json_of(run)
    assert run_stage("finetune_ava", f"--eval --init {run} --output_dir {tmp_path}") == ""
    assert json_of(tmp_path)["mAP"] == pytest.approx(expected["mAP"], abs=1e-6)
    (tmp_path / "empty.csv").write_text("")  # no detections: a figure, too
    line = f"--ground_truth {notes}/ava_val_v2.2.csv --action_list {next(notes.glob('*.pbtxt'))}"
    for file, figure in (run / "detections.csv", expected["mAP"]), (tmp_path / "empty.csv", 0):
        assert run_stage("finetune_ava", line, "--score", file) == ""
        assert capsys.readouterr().out.splitlines()[-1] == f"mAP@0.5IOU: {figure:.6f}"
    line = f"--eval --test_crop center --test_size 32 --init {run} --output_dir {tmp_path}"
    assert run_stage("finetune_ava", line) == ""
    assert json_of(tmp_path)["test_crop"] == "center" and json_of(tmp_path)["test_size"] == 32
    assert json_of(tmp_path)["boxes"] == expected["boxes"]


def test_missing_movies_do_not_count_as_missed(whole, videos, tmp_path):
    run, notes = whole("finetune_ava"), videos / "ava" / "annotations"
    (tmp_path / "val0000.mp4").symlink_to(videos / "ava/videos/val0000.mp4")
    line = f"--eval --allow_missing --init {run} --videos {tmp_path} --output_dir {tmp_path}"
    assert run_stage("finetune_ava", line) == ""
    truth = data.read_boxes(notes / "ava_val_v2.2.csv", scored=False)
    here = {key: rows for key, rows in truth.items() if key[0] == "val0000"}
    found = data.read_boxes(tmp_path / "detections.csv")
    scores = [finetune_ava.score(rows, found, ACTIONS)["mAP"] for rows in (here, truth)]
    assert json_of(tmp_path)["mAP"] == scores[0] > scores[1]


def test_a_caption_has_at_most_three_likely_actions_and_at_least_one():
    actions = {4: "sit", 8: "run", 10: "talk", 21: "read", 30: "eat"}
    scores = torch.zeros(80)
    scores[[3, 7, 9, 20, 39]] = torch.tensor([0.25, 0.9, 0.22, 0.3, 1.0])  # action 40 has no name
    assert finetune_ava.caption(scores, actions) == "run 0.90, read 0.30, sit 0.25"
    assert finetune_ava.caption(scores, actions | {8: "walk"}).startswith("walk 0.90, ")
    assert finetune_ava.caption(scores / 10, actions) == "run 0.09"


def test_predict_draws_and_writes_what_people_do(whole, videos, tmp_path, capsys):
    rows = ["val0001,1.5,0.1,0.2,0.4,0.8", "val0001,1.5,0.5,0.2,0.9,0.8"]
    rows += ["val0001,3,0.5,0.2,0.9,0.8", "another,3,0.5,0.2,0.9,0.8"]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    line = f"--predict {videos}/ava/videos/val0001.mp4 --boxes {tmp_path}/mine.csv"
    line += f" --init {whole('finetune_ava')} --output_dir {tmp_path}/out"
    assert run_stage("finetune_ava", line) == ""
    out = capsys.readouterr().out
    assert re.search(r"val0001.mp4, second 1.5, 0.100,0.200,0.400,0.800: \w+ 0\.\d\d", out)
    rows = (tmp_path / "out" / "detections.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows] == [*2 * 12 * ["1.5"], *12 * ["0003"]]
    names = ["detections.csv", "val0001_1.5.png", "val0001_3.png"]
    assert sorted(os.listdir(tmp_path / "out")) == names


def test_visualize_draws_each_video_and_names_what_it_skips(whole, videos, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"")
    video, out = videos / "val" / "val0_000005_000008.mp4", tmp_path / "out"
    (tmp_path / "b").mkdir()
    shutil.copy(video, tmp_path / "b")  # another of the same name
    line = f"--init {whole('mae_pretrain')} --output_dir {out} --visualize {video}"
    more = f"{tmp_path}/broken.mp4 {tmp_path}/b/{video.name}"
    assert "1 of 3 videos cannot be read" in run_stage("mae_pretrain", line, more)
    said = capsys.readouterr().out
    assert f"skipped {tmp_path}/broken.mp4: cannot be opened" in said
    assert f"out/0_{video.stem}.png, .mp4: original, masked (90% agnostic), reconstruct" in said
    names = [f"{i}_{video.stem}.{end}" for i in (0, 2) for end in ("mp4", "png")]
    assert sorted(os.listdir(out)) == names
    with data.Video(out / names[1]) as picture, data.Video(out / names[0]) as clip:
        assert picture.codec.width > 8 * 96 > picture.codec.height > 3 * 96  # 3 rows of 8
        assert clip.codec.width == 3 * clip.codec.height and clip.codec.name == "h264"
    assert run_stage("mae_pretrain", line, "--mask_type time-only --mask_ratio 0.5") == ""
    assert "masked (50% time-only)" in capsys.readouterr().out


def test_pictures_show_real_colours_and_leave_visible_patches_alone(whole, monkeypatch):
    mae = m.MAE(**checkpoint_of(whole("mae_pretrain"))["config"])
    clip = torch.randint(0, 256, (16, 24, 24, 3), dtype=torch.uint8)
    draw = lambda: mae_pretrain.reconstruct(mae, clip, 0.9).permute(0, 1, 3, 4, 2)  # noqa: E731
    for norm_pix_loss in (True, False):
        mae.norm_pix_loss = norm_pix_loss
        original, masked, output = draw()
        assert torch.equal(original, clip[::2]) and not torch.equal(output, original)
        visible = (masked != 115).any(-1)  # hidden patches are grey, the mean
        assert visible.float().mean().item() == pytest.approx(0.1, abs=0.03)
        assert torch.equal(masked[visible], original[visible])
        assert torch.equal(output[visible], original[visible])
        with monkeypatch.context() as patch:  # a model that predicts its target exactly
            right = mae.patchify_target(m.patchify(clip.permute(3, 0, 1, 2)[None], 8, 2))
            patch.setattr(mae, "forward_decoder", lambda *_, right=right: right)
            output = draw()[2]
        assert (output.int() - original.int()).abs().max() <= 1


BAD = {  # what is added to a good line, and what is said; words in capitals: see below
    "mae_pretrain": [
        ("--data absent", r"(?s)absent: no folder or list.*youtube_id.*--dataset demo"),
        ("--data broken --num_workers 1", r"20 videos in a row(?s:.*\n  .*[ab].mp4: cannot.*){2}"),
        ("--mask_ratio 1.0", r"--mask_ratio 1.0 of"),
        ("--micro_batch 3", r"--micro_batch 3 does not divide 4 videos: \[1, 2, 4\] do"),
        ("--batch_size 512", r"--batch_size 512 must.*at most the 8 in the list; 8 would do"),
        ("--output_dir text.mp4/run", r"text.mp4/run: Not a directory"),
        ("--device gpu", r"--device gpu: cannot be used here: "),
        ("--device fpga", r"--device fpga: cannot be used here: .{,99}$"),
        ("--img_size 4", r"clips of 16 x 4 x 4 are smaller than a tubelet of 2 x 8 x 8; see"),
        ("--decoder_embed_dim 30 --decoder_num_heads 4", r"30 is not divisible by 4 heads"),
        ("--epochs 0.1", r"--epochs 0.1 of 8 videos are less than one step"),
        ("--crop_scale 1 0.5", r"--crop_scale 1 0.5: the smaller number comes first"),
    ],
    "finetune_cls": [
        ("--num_classes 3", r"8 classes, not 3; if intended, use --num_classes 8"),
        ("--data lists/train.csv", r"train.csv: a single list; give the folder"),
        ("--eval --init MAE", r"a checkpoint of mae_pretrain, not of finetune_cls"),
    ],
    "finetune_ava": [
        ("--score other.csv LIST", r"the detections are of other movies, such as other"),
        ("--predict a.mp4 --init AVA", r"--predict needs --boxes CSV"),
        ("--score other.csv", r"--score needs --ground_truth CSV and --action_list PBTXT"),
        ("--video_start 0", r"(?s)20 videos in a row.*has no second 90\d: .*--video_start says"),
        ("--data absent", r"(?s)absent: no ground_truth of train in it; expected.*ava_train_v2.2"),
    ],
}


CASES = [(stage, *row) for stage, rows in BAD.items() for row in rows]


@pytest.mark.parametrize("stage, line, error", CASES)
def test_bad_input(stage, line, error, bad_files, videos, whole, monkeypatch, capsys):
    monkeypatch.chdir(bad_files)
    notes = videos / "ava" / "annotations"
    actions = next(notes.glob("*.pbtxt"))
    names = dict(LIST=f"--ground_truth TRUTH --action_list {actions}")
    names |= dict(TRUTH=notes / "ava_val_v2.2.csv", MAE=whole("mae_pretrain"))
    names |= dict(CLS=whole("finetune_cls"), AVA=whole("finetune_ava"))
    for name, value in names.items():
        line = re.sub(rf"\b{name}\b", str(value), line)
    start = f"{SMALL} --num_workers 0 --data {videos}"
    if stage == "finetune_ava":
        start += "/ava --lr 1e-3 --epochs 4 --video_start 900"
    elif stage == "finetune_cls":
        start += " --num_classes 8"
    message = run_stage(stage, start, line)
    if message == "2":  # argparse has said it
        message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"{stage}.py: error: ") and re.search(error, message), message


README = (ROOT / "README.md").read_text()


def test_the_features_example_of_the_readme_runs(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = settled(mae_pretrain, "--dataset demo")
    config = mae_pretrain.model_config(args)
    content = dict(model=m.MAE(**config).state_dict(), args=vars(args), config=config)
    os.makedirs(args.output_dir)
    m.save_checkpoint(args.output_dir, content)
    (tmp_path / "a.mp4").symlink_to(videos / "train" / "train0_000005_000008.mp4")
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    exec(code, {})
    assert capsys.readouterr().out.endswith("torch.Size([1, 128, 128]) torch.Size([1, 128])\n")


def test_every_flag_and_name_in_the_readme_exists(capsys):
    known, names = set(), ["model", "data", *STAGES]
    for stage in STAGES:
        with pytest.raises(SystemExit):
            sys.modules[stage].parse_args(["--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    text = re.sub(r"(?m)^(\(cd |torchrun|# a tree|ffmpeg|.*(docker|tests/)).*$", "", README)
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - {"--max-restarts"}
    assert flags <= known, flags - known
    for module, name in re.findall(r"`(\w+)\.(\w+)`", README):
        if module in names and name != "py":
            assert hasattr(sys.modules[module], name), f"{module}.{name}"
