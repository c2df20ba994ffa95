"""The three stages by their commands: recipes, arguments, what a run leaves, tests, predictions."""

import os
import re
import shutil
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, STAGES, checkpoint_of, contents, entries, json_of, line_of
from conftest import run_stage, start
from torch.nn.modules.module import register_module_forward_hook
from torch.testing import assert_close

import data
import finetune_ava
import finetune_cls
import mae_pretrain
import model as m

README = (ROOT / "README.md").read_text()
GATHER = """
gather = m.gather  # not for lists of 240,000 videos, which then go from each process to each
m.gather = lambda value: gather(value) if not hasattr(value, "unit") else sys.exit("a list")
"""
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
        args = vars(settled(stage, f"{line} --model {size}"))
        for name, text in rows:
            value = eval(text)
            value = value[i] if isinstance(value, tuple) else value
            assert args[name] == value, (size, name)


def settled(stage, line):
    """A stage's arguments as a run has them."""
    return stage.parse_args(line.split())


@pytest.mark.parametrize("stage, line, expected", [
    (mae_pretrain, "", dict(dataset="kinetics400", model="vit_l", mask_ratio=0.9, img_size=224,
        num_frames=16, sampling_rate=4, mask_type="agnostic", norm_pix_loss=True, pred_t_dim=None,
        decoder_depth=4, decoder_num_heads=8, segments=False, output_dir="runs/mae_pretrain_kinetics400_vit_l")),
    (mae_pretrain, "--dataset ssv2", dict(hflip=False, segments=True)),  # left is not right there
    (finetune_cls, "", dict(dataset="kinetics400", model="vit_l", views=(7, 3), hflip=True, clip_grad=0,
        crop_scale=[0.08, 1.0], segments=False, random_erasing=0, mask_start=0, val_epochs=0)),
    (finetune_cls, "--dataset ssv2", dict(repeat_aug=1, views=(1, 3), segments=True, hflip=False)),
    (finetune_cls, "--recipe k600_intermediate", dict(lr=8e-4, epochs=40, drop_path=0.2, mixup=0.8)),
    (finetune_cls, "--recipe k600_intermediate --model vit_h", dict(lr=8e-4, epochs=30, drop_path=0.3)),
    (finetune_ava, "", dict(dataset="ava", test_crop="center", test_size=None, rel_pos=False,
        hflip=True, detection_threshold=0.8)),
    (mae_pretrain, "--batch_size 128 --epochs 200", dict(lr=4e-4, warmup_epochs=30)),  # scaled, shrunk
    (mae_pretrain, "--batch_size 128 --lr 1e-3 --epochs 1600", dict(lr=1e-3, warmup_epochs=120)),
    (mae_pretrain, "--epochs 200 --warmup_epochs 50 --pred_t_dim 8", dict(warmup_epochs=50, pred_t_dim=8)),
    (finetune_cls, "--model vit_b --batch_size 384", dict(lr=8e-3)),
    (finetune_cls, "--recipe k600_intermediate --model vit_b --lr 0.5", dict(lr=0.5, layer_decay=0.65)),
    (finetune_ava, "--model vit_h --batch_size 64", dict(lr=2.4)),
    (finetune_ava, "--model vit_b --lr 1", dict(layer_decay=0.75)),  # ViT-L's
])  # fmt: skip
def test_what_is_not_given_follows_from_papers_code_and_other_flags(stage, line, expected):
    args, classes = settled(stage, f"{line} --grad_checkpointing"), [8] * (stage is finetune_cls)
    config = stage.model_config(args, *classes)
    assert {name: (vars(args) | config)[name] for name in expected} == expected
    assert config["grad_checkpointing"] and config.get("pred_t_dim") == vars(args).get("pred_t_dim")


def test_no_learning_rate_is_guessed():
    with pytest.raises(m.InputError, match="no learning rate for vit_b .*; give one with --lr"):
        settled(finetune_cls, "--recipe k600_intermediate --model vit_b")


@pytest.mark.parametrize("line, world, expected", [  # steps, clips, videos at once, micro-batches
    ("--batch_size 24", 1, (400, 48, 12, 2)), ("--batch_size 24", 2, (400, 48, 12, 1)),
    ("--batch_size 25 --micro_batch 10", 1, (384, 50, 5, 5)),  # not the divisor they share
    ("--batch_size 26 --micro_batch 12", 2, (369, 52, 1, 13)),
    ("--batch_size 28", 1, (343, 56, 14, 2)),  # 342.9 steps
    ("--batch_size 25", 2, "--batch_size 25: must be at most 240, as many as there are, and a multiple of 2, the number of processes; 24 would do"),
    ("--batch_size 512", 1, "--batch_size 512: must be at most 240, as many as there are, and a multiple of 1, the number of processes; 240 would do"),
    ("--batch_size 24 --epochs 0.04", 1, "--epochs 0.04 of 240 are less than one step"),
])  # fmt: skip
def test_a_batch_is_split_as_processes_and_memory_need(line, world, expected, monkeypatch):
    monkeypatch.setattr(m, "world_size", lambda: world)
    try:
        plan = m.make_plan(settled(mae_pretrain, f"--epochs 80 {line}"), 240, 2)
        found = plan.steps, plan.clips, plan.micro_batch, plan.micro_steps
        assert plan.epoch(1) == plan.clips / 240
    except m.InputError as error:
        found = str(error)
    assert found == expected


def test_a_pre_training_run_leaves_what_the_readme_says(whole):
    out = whole("mae_pretrain")
    checkpoint, log, args = checkpoint_of(out), entries(out), json_of(out, "args.json")
    assert checkpoint["step"] == 11 and args["weight_decay"] == 0.05  # as it came out, not None
    assert [entry["epoch"] for entry in log] == [6, 12, 18, 22]
    a_clip = m.count_flops(m.MAE, checkpoint["config"], 0.9)
    assert log[-1]["tflops"] == pytest.approx(a_clip * log[-1]["clips_per_s"] / 1e12)
    pictures = [f"{i}_val{i}_000005_000008.{end}" for i in range(4) for end in ("mp4", "png")]
    assert sorted(os.listdir(out / "reconstructions")) == pictures and not list(out.glob("*.tmp"))


def test_a_detection_run_leaves_detections_results_and_pictures(whole):
    out = whole("finetune_ava")
    rows, results = (out / "detections.csv").read_text().splitlines(), json_of(out)
    assert re.fullmatch(r"val0000,01.5(,[\d.]+){4},1,0\.\d{6}", rows[0])
    assert len(rows) == 10 * len(data.DEMO_ACTIONS) and "per_class" in results
    assert results.items() >= dict(boxes=10, keyframes=5, unreadable=0, init=None).items()
    assert "val0000_1.5.png" in os.listdir(out / "pictures")


def test_kept_checkpoints_stay_and_a_log_line_has_a_mean(videos, tmp_path, monkeypatch):
    def noted(run, loss, *more, record=m.Run.record):
        losses.append(loss.item())
        record(run, loss, *more)

    losses = []
    monkeypatch.setattr(m.Run, "record", noted)
    more = "--repeat_aug 1 --epochs 5.5 --keep_epochs 2.75"  # a step takes half an epoch
    line = line_of("mae_pretrain", videos, tmp_path, more)
    assert run_stage("mae_pretrain", line) == ""
    kept = {path.name: checkpoint_of(path)["step"] for path in tmp_path.glob("checkpoint_e*")}
    assert kept == {"checkpoint_epoch3.pt": 6, "checkpoint_epoch5.5.pt": 11}  # at log points
    means = [np.mean(losses[first : first + 3]) for first in (0, 3, 6, 9)]
    assert [entry["loss"] for entry in entries(tmp_path)] == pytest.approx(means)
    before = contents(tmp_path)
    (tmp_path / "checkpoint_epoch5.5.pt").unlink()  # a kill before it was written
    assert run_stage("mae_pretrain", line) == "" and contents(tmp_path) == before


def test_each_multiple_of_a_tenth_of_an_epoch_counts():  # 0.3 // 0.1 is 2
    run = SimpleNamespace(plan=m.Plan(10, 10, 1, 1, 1), args=SimpleNamespace(log_interval=1))
    assert all(m.Run.every(SimpleNamespace(done=step, **vars(run)), 0.1) for step in range(1, 11))


def test_checkpoints_follow_the_clock_not_the_passes(videos, tmp_path, monkeypatch):
    writes, save, record, waited = [], m.Run.save, m.Run.record, Mock()
    monkeypatch.setattr(m.Run, "record", lambda *a: [waited(), record(*a)])
    monkeypatch.setattr(m, "time", Mock(perf_counter=lambda: 35.0 * waited.call_count))  # s a step
    monkeypatch.setattr(m.Run, "save", lambda *a, **b: [writes.append(a[0].done), save(*a, **b)])
    line = line_of("mae_pretrain", videos, tmp_path, "--save_minutes 2")
    assert run_stage("mae_pretrain", line) == "" and writes == [6, 11]
    speed = [entry["clips_per_s"] for entry in entries(tmp_path)]
    assert speed == 4 * [4 * 4 / 35]  # 4 clips of each of 4 videos


def test_a_plan_is_printed_with_what_looks_wrong_in_it(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mae_pretrain, "count_flops", lambda *_: 476e9)  # ViT-L's of a clip
    line = line_of("mae_pretrain", videos, tmp_path, "--img_size 28 --epochs 2")
    assert run_stage("mae_pretrain", line) == ""
    out = capsys.readouterr().out
    assert "steps 1, of videos 4, clips 16; at once 2;" in out
    assert "warning: so few steps teach little; try more --epochs or a smaller --batch" in out
    assert "warning: 4 of 28 rows and columns fill no patch and are dropped\n" in out
    assert "warning: a step takes 76 s on a CPU of 100 GFLOP/s\n" in out  # for 16 clips


@pytest.mark.parametrize("stage", STAGES)
def test_seed_and_sines_set_first_weights_that_a_probe_keeps(stage, videos, tmp_path, monkeypatch):
    def stop(args, plan, model, *_):
        models.append(dict(model.named_parameters()))
        raise m.InputError("enough")

    models = []
    monkeypatch.setattr(sys.modules[stage], "print_plan", stop)
    last = [] if stage == "mae_pretrain" else ["--layer_decay 0"]
    for more in ("", "", "--seed 1", *last):
        assert "enough" in run_stage(stage, line_of(stage, videos, tmp_path, more))
    one, same, other, *probes = models
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["blocks.0.mlp.fc1.weight"], other["blocks.0.mlp.fc1.weight"])
    for name in [name for name in one if name.endswith("pos_embed_temporal")]:
        assert torch.equal(one[name][0], m.sines(*one[name].shape[1:]))
    for probe in probes:  # none in pre-training
        trained = {name for name in probe if probe[name].requires_grad}
        assert trained == {"head.weight", "head.bias", "norm.weight", "norm.bias"}


def test_validation_takes_one_view_of_held_out_videos_amid_training(videos, tmp_path, monkeypatch):
    def note(module, args, _):
        if isinstance(module, m.Classifier) and not args[0].is_meta:
            seen.append((module.training, len(args[0])))

    def tested(classifier, held_out, *more, test=finetune_cls.test):
        assert held_out.source == videos / "val.csv"
        return test(classifier, held_out, *more)[0] | {"top1": 12.5 * len(seen)}, {}

    seen, training, one_view, views = [], [(True, 4)], 5 * [(False, 1)], 5 * [(False, 6)]
    monkeypatch.setattr(finetune_cls, "test", tested)
    more = "--epochs 3 --val_epochs 1.5 --log_interval 2 --mask_start 0.5"
    with register_module_forward_hook(note):
        assert run_stage("finetune_cls", line_of("finetune_cls", videos, tmp_path, more)) == ""
    assert seen == 4 * training + one_view + 2 * training + one_view + views
    top1 = {entry["step"]: entry["val_top1"] for entry in entries(tmp_path) if "val_top1" in entry}
    assert top1 == {2: 12.5 * 9, 3: 12.5 * 16} and json_of(tmp_path)["top1"] == 12.5 * 21
    ratios = [entry["mask_ratio"] for entry in entries(tmp_path) if "loss" in entry]
    assert ratios == pytest.approx([0.25, 0])  # halfway, and at the end (Table 11)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0, 1.0), (0, 0)])
def test_clips_are_mixed_in_one_way_or_not_at_all_nor_are_those_of_one_video(mixup, cutmix):
    args, label = SimpleNamespace(mixup=mixup, cutmix=cutmix, repeat_aug=2), torch.arange(4) // 2
    video = 60 * torch.arange(4).byte().view(4, 1, 1, 1, 1).expand(4, 3, 2, 8, 8)  # of two videos
    own, plain = m.normalize(video), torch.eye(4)[label]
    torch.manual_seed(0)
    mixed, target = finetune_cls.mix_clips(video, label, 4, args)
    assert torch.isin(mixed, own).all() == (not mixup)  # each pixel is of one clip
    assert (mixed == mixed[..., :1, :1]).all() == (not cutmix)
    assert_close(finetune_cls.mix_clips(video[:2], label[:2], 4, args), (own[:2], plain[:2]))
    if not mixup and not cutmix:
        assert_close((mixed, target), (own, plain))


def test_clips_of_a_video_are_side_by_side_though_a_large_batch_is_handed_over_in_parts():
    class Stub(data.TrainDataset):
        def load(self, index, _):
            clips = torch.tensor([index, -index]).view(2, 1, 1, 1, 1).expand(2, 1, 1, 1, 3)
            return {"video": clips, "label": torch.full((2,), index), "boxes": [clips]}

    line = "--model vit_demo --img_size 999 --batch_size 4 --micro_batch 2 --num_workers 0"
    args = settled(mae_pretrain, line)
    batches = data.Batches(Stub(range(6), args), m.make_plan(args, 6, 2), torch.device("cpu"), 0)
    assert batches.parts == 2
    for step in range(3):
        indices = [index for _, index in batches.keys(step, 0)]
        for a, b in (indices[:2], indices[2:]):
            batch = next(batches)
            assert batch["video"][:, 0].flatten().tolist() == [a, -a, b, -b]
            assert batch["label"].tolist() == [a, a, b, b] and len(batch["boxes"]) == 2


def test_copies_to_a_device_wait_unless_it_is_a_gpu(monkeypatch):
    for kind in ("cpu", "mps", "cuda"):
        monkeypatch.setattr(torch.Tensor, "to", copy := Mock(return_value=torch.ones(1)))
        data.collate([{"video": torch.ones(1), "boxes": [torch.ones(1)]}], torch.device(kind))
        assert [call.kwargs["non_blocking"] for call in copy.call_args_list] == 2 * [kind == "cuda"]


@pytest.mark.parametrize("stage", STAGES)
def test_compiled_blocks_use_bf16_and_bad_gradients_end_runs(stage, videos, tmp_path, monkeypatch):
    def harm(module, _, output):
        if isinstance(module, torch.nn.Linear) and output.requires_grad and not output.is_meta:
            seen.add(output.dtype)
            output.register_hook(lambda gradient: gradient * np.inf)

    seen, compiled = set(), []
    monkeypatch.setattr(m.Block, "compile", lambda block: compiled.append(block))
    line = line_of(stage, videos, tmp_path, "--epochs 2 --precision bf16 --compile")
    with register_module_forward_hook(harm):
        message = run_stage(stage, line)
    assert seen == {torch.bfloat16} and len(set(compiled)) == 4 + (stage == "mae_pretrain")
    assert re.search(r"loss \d+\.\d+, gradient norm (nan|inf)", message), message


def test_a_batch_without_any_box_is_no_error(videos, tmp_path, monkeypatch):
    def without_boxes(*key, load=finetune_ava.KeyframeDataset.load):
        sample = load(*key)
        return sample | dict(boxes=[sample["boxes"][0][:0]], actions=sample["actions"][:0])

    monkeypatch.setattr(finetune_ava.KeyframeDataset, "load", without_boxes)
    assert run_stage("finetune_ava", line_of("finetune_ava", videos, tmp_path, "--epochs 2")) == ""
    assert [entry["loss"] for entry in entries(tmp_path)] == [0, 0]


def test_a_test_takes_all_from_the_checkpoint_and_flags_win(whole, tmp_path):
    out, other = tmp_path / "cls", tmp_path / "other"
    shutil.copytree(whole("finetune_cls"), out)
    assert run_stage("finetune_cls", f"--eval --init {out}") == ""
    assert json_of(out / "eval") == json_of(out) | {"init": str(out)}  # beside the checkpoint
    line = f"--eval --init {out}/checkpoint.pt --views 1x1 --output_dir {other}"
    assert run_stage("finetune_cls", line) == "" and json_of(other)["views"] == "1x1"
    args = settled(finetune_cls, f"--eval --init {out} --sampling_rate 2")
    assert (args.model, args.img_size, args.sampling_rate) == ("vit_demo", 24, 2)
    assert args.data == json_of(out, "args.json")["data"]
    args = settled(finetune_cls, f"--eval --init {out} --dataset ssv2")
    assert (args.data, args.videos, args.views) == ("data/ssv2", None, (2, 3))
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
        code, text = start(stage, line, n, GATHER).finish()
        assert code == 0 and text.count("tensors loaded") == 1, text  # one process speaks
        results.append({k: v for k, v in json_of(out).items() if k != "per_class"})
        assert text.count(str(bad)) == results[-1]["unreadable"] > 0
        if stage == "finetune_ava":
            rows = (out / "detections.csv").read_text().splitlines()
            detections.append(sorted(row[: row.rindex(",")] for row in rows))  # but for the score
    assert results[0] == pytest.approx(results[1]) and detections[:1] == detections[1:]


def test_top1_and_top5_count_each_label_and_what_cannot_be_read_as_wrong(monkeypatch):
    scores = {i: torch.full((8,), 0.01 * i) for i in (0, 1, 3, 4)}  # of videos; 2 is broken
    for video, ranked in {0: [7, 1], 1: [0, 1, 2, 3, 4], 3: [0, 1, 2, 3, 5, 4], 4: [2, 6]}.items():
        for place, label in enumerate(ranked):
            scores[video][label] = 1 - place / 10
    monkeypatch.setattr(finetune_cls, "predict", lambda *_: (scores, {2: "broken"}))
    videos = data.VideoList("", "", list("abcde"), [7, 4, 0, 4, 6])
    results, failures = finetune_cls.test(None, videos, None, None)
    assert results == dict(top1=20, top5=60, videos=5, unreadable=1) and failures == {2: "broken"}


def test_views_are_averaged_after_the_softmax_all_of_them(videos):
    logits = torch.tensor([[9.0, 0], [0, 1], [0, 1], [0, 1], [0, 1], [0, 2]])  # of 6 views
    classifier = Mock(cls_token=torch.zeros(1), side_effect=logits.split(4))
    args = settled(finetune_cls, "--model vit_demo --img_size 24 --num_workers 0")
    paths = [next((videos / "val").iterdir())]
    scores, _ = finetune_cls.predict(classifier, data.VideoList("", "", paths), args, (2, 3), 4)
    assert_close(scores[0], logits.softmax(1).mean(0))


def with_bias(checkpoint, bias, path):
    """A copy of a checkpoint that answers the same to each video."""
    checkpoint = checkpoint_of(checkpoint)
    checkpoint["model"]["head.weight"].zero_()
    checkpoint["model"]["head.bias"] = bias
    torch.save(checkpoint, path)
    return path


def test_each_action_has_a_sigmoid_of_its_own(whole, tmp_path):
    bias = torch.linspace(-3, 3, 80)
    init = with_bias(whole("finetune_ava"), bias, tmp_path / "a.pt")
    assert run_stage("finetune_ava", f"--eval --init {init} --output_dir {tmp_path}") == ""
    rows = [row.split(",") for row in (tmp_path / "detections.csv").read_text().split()]
    scores = {int(action): float(score) for *_, action, score in rows}
    expected = {action: bias[action - 1].sigmoid().item() for action in range(1, 13)}
    assert scores == pytest.approx(expected, abs=1e-5)


def test_predict_prints_the_five_likeliest_classes(whole, videos, tmp_path, capsys):
    shares = torch.tensor([0.02, 0.3, 0.01, 0.25, 0.2, 0.125, 0.03, 0.065])
    init = with_bias(whole("finetune_cls"), shares.log(), tmp_path / "a.pt")
    paths = sorted((videos / "val").iterdir())[:2]
    (tmp_path / "bad.mp4").write_text("words")
    line = f"--predict {paths[0]} {tmp_path}/bad.mp4 {paths[1]} --init {init} --num_workers 0"
    error = r"error: 1 of 3 videos cannot be read: \S+/bad.mp4 cannot be opened"
    assert re.search(error, run_stage("finetune_cls", line))
    out, names = capsys.readouterr().out, sorted(data.DEMO_SHAPES)
    shown = "".join(f"  {shares[i]:6.1%}  {names[i]}\n" for i in (1, 3, 4, 5, 7))
    assert all(f"{path}:\n{shown}" in out for path in paths)


def test_eval_and_score_give_the_figure_of_the_run(whole, videos, tmp_path, capsys):
    def score(detections, truth):
        more = f"--ground_truth {truth} --action_list {next(notes.glob('*.pbtxt'))}"
        assert run_stage("finetune_ava", "--score", detections, more) == ""
        figures = re.findall(r"mAP@0.5IOU: ([\d.]+)", capsys.readouterr().out)
        return pytest.approx(float(figures[-1]), abs=1e-4)

    run, notes = whole("finetune_ava"), videos / "ava" / "annotations"
    line, expected = f"--eval --init {run} --output_dir {tmp_path}", json_of(run)
    assert run_stage("finetune_ava", line, "--test_crop center --test_size 32") == ""
    settings = dict(test_crop="center", test_size=32, boxes=10, init=str(run))
    assert settings.items() < json_of(tmp_path).items()
    assert run_stage("finetune_ava", line) == ""
    truth, here, empty = notes / "ava_val_v2.2.csv", tmp_path / "here.csv", tmp_path / "empty.csv"
    assert json_of(tmp_path)["mAP"] == expected["mAP"] == score(run / "detections.csv", truth)
    empty.write_text("")  # no detections: a figure, too
    assert score(empty, truth) == 0
    (tmp_path / "val0000.mp4").symlink_to(videos / "ava/videos/val0000.mp4")
    assert run_stage("finetune_ava", line, "--allow_missing --videos", tmp_path) == ""
    here.write_text("\n".join(re.findall("^val0000,.*$", truth.read_text(), re.M)))
    figure = json_of(tmp_path)["mAP"]  # as if there were no other movies
    assert figure == score(tmp_path / "detections.csv", here)
    assert figure != score(tmp_path / "detections.csv", truth)


def test_predict_draws_and_writes_what_people_do(whole, videos, tmp_path, capsys):
    rows = ["val0001,1.5,0.1,0.2,0.4,0.8", "val0001,1.5,0.5,0.2,0.9,0.8"]
    rows += ["val0001,2,0.5,0.2,0.9,0.8", "another,2,0.5,0.2,0.9,0.8"]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    line = f"--predict {videos}/ava/videos/val0001.mp4 --boxes {tmp_path}/mine.csv"
    line += f" --init {whole('finetune_ava')} --output_dir {tmp_path}/out"
    assert run_stage("finetune_ava", line) == ""
    out = capsys.readouterr().out
    assert re.search(r"val0001.mp4, second 1.5, \[0.1, 0.2, 0.4, 0.8\]: \w+ 0\.\d\d", out)
    rows = (tmp_path / "out" / "detections.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows] == [*2 * 12 * ["01.5"], *12 * ["0002"]]
    assert {"val0001_1.5.png", "val0001_2.png"} < set(os.listdir(tmp_path / "out"))
    actions, scores = {4: "sit", 8: "run", 10: "talk", 21: "read", 30: "eat"}, torch.zeros(80)
    scores[[3, 7, 9, 20, 39]] = torch.tensor([0.25, 0.9, 0.22, 0.3, 1.0])  # action 40 has no name
    assert finetune_ava.caption(scores, actions) == "run 0.90, read 0.30, sit 0.25"  # at most 3
    assert finetune_ava.caption(scores / 10, actions) == "run 0.09"  # at least one


def test_visualize_draws_each_video_and_names_what_it_skips(whole, videos, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"")
    video, out = videos / "val" / "val0_000005_000008.mp4", tmp_path / "out"
    line = f"--init {whole('mae_pretrain')} --output_dir {out} --visualize {video}"
    message = run_stage("mae_pretrain", line, f"{tmp_path}/broken.mp4 {video}")  # of one name
    assert "1 of 3 videos cannot be read" in message
    assert f"skipped {tmp_path}/broken.mp4: cannot be opened" in (said := capsys.readouterr().out)
    assert f"out/0_{video.stem}.png, .mp4: original, masked (90% agnostic), reconstruct" in said
    names = [f"{i}_{video.stem}.{end}" for i in (0, 2) for end in ("mp4", "png")]
    assert sorted(os.listdir(out)) == names
    with data.Video(out / names[1]) as picture, data.Video(out / names[0]) as clip:
        assert picture.codec.width > 8 * 96 > picture.codec.height > 3 * 96  # 3 rows of 8
        assert clip.codec.width == 3 * clip.codec.height and clip.codec.name == "h264"


def test_pictures_show_real_colours_and_leave_visible_patches_alone(whole, monkeypatch):
    mae = m.MAE(**checkpoint_of(whole("mae_pretrain"))["config"])
    video = torch.randint(0, 256, (1, 3, 16, 24, 24), dtype=torch.uint8)
    for norm_pix_loss in (True, False):
        mae.norm_pix_loss = norm_pix_loss
        original, masked, output, *others = mae_pretrain.reconstruct(mae, video, 0.9)
        assert torch.equal(original, video[0, :, ::2].transpose(0, 1))
        visible = (masked != 115).any(1, keepdim=True).expand(8, 3, 24, 24)  # hidden are grey
        assert visible.float().mean().item() == pytest.approx(0.1, abs=0.03)
        for picture in (masked, output, *others):
            assert torch.equal(picture[visible], original[visible])
            assert not torch.equal(picture, original)
        with monkeypatch.context() as patch:  # a model that predicts its target exactly
            right = mae.patchify_target(m.patchify(video, 8, 2)[0])
            patch.setattr(mae, "forward_decoder", lambda *_, right=right: right)
            output = mae_pretrain.reconstruct(mae, video, 0.9)[2]
        assert (output.int() - original.int()).abs().max() <= 1


@pytest.mark.parametrize("stage, line, error", [  # added to a good line; capitals: see below
    ("mae_pretrain", "--data broken --num_workers 1", r"20 videos in a row(?s:.*\n  .*[ab].mp4: cannot.*){2}"),
    ("mae_pretrain", "--mask_ratio 0.99", r"a mask ratio of 0.99 leaves none of 72 tokens"),
    ("mae_pretrain", "--output_dir text.mp4/run", r"Not a directory: 'text.mp4/run"),
    ("mae_pretrain", "--device gpu", r"--device gpu: .*device type.*gpu$"),
    ("mae_pretrain", "--img_size 4", r"clips of 16 frames and 4 pixels are smaller than a tubelet"),
    ("mae_pretrain", "--decoder_embed_dim 30 --decoder_num_heads 4", r"30 is not divisible by 4 heads"),
    ("finetune_cls", "--num_classes 3", r"8 classes, not 3; if intended, use --num_classes 8"),
    ("finetune_cls", "--data lists/train.csv", r"train.csv: a single list; give the folder"),
    ("finetune_cls", "--data absent --eval", r"--eval needs --init CHECKPOINT, from finetune_cls$"),
    ("finetune_cls", "--data other --eval --init CLS", r"zebra.*not among the 8 classes"),
    ("finetune_cls", "--eval --init MAE", r"a checkpoint of mae_pretrain, not of finetune_cls"),
    ("finetune_ava", "--score other.csv", r"the detections are of other keyframes, such as"),
    ("finetune_ava", "--predict a.mp4 --init finetune_ava.pt", r"--predict needs --boxes CSV"),
    ("finetune_ava", "--video_start 900", r"(?s)20 videos in a row.*has no second 1.5: .*--video_start says"),
])  # fmt: skip
def test_bad_input(stage, line, error, bad_files, videos, whole, monkeypatch):
    monkeypatch.chdir(bad_files)
    names = dict(MAE=whole("mae_pretrain"), CLS=whole("finetune_cls"))
    line = re.sub("[A-Z]{3,}", lambda word: str(names.get(word[0], word[0])), line)
    message = run_stage(stage, line_of(stage, videos, "out", line))
    assert message.startswith(f"{stage}.py: error: ") and re.search(error, message), message


def test_each_stage_makes_its_own_demo_of_what_its_labels_say(tmp_path, monkeypatch):
    def write(new):
        tasks.extend(new)
        return [data.draw_scene(**scene)[1] for _, scene in new[:9]]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "write_scenes", write)
    seeds = []
    for stage, size in zip(STAGES, (32, 32, 9)):
        tasks, args = [], settled(sys.modules[stage], "--dataset demo")
        monkeypatch.setitem(data.DEMO_VIDEOS, stage, dict(train=size, val=2))
        os.makedirs(f"data/demo/{stage}.making{os.getpid()}")
        data.make_demo(args)
        assert args.data == f"data/demo/{stage}" and os.path.isdir(args.data)
        seeds += [scene["seed"] for _, scene in tasks]
        things = [scene["things"][0] for _, scene in tasks]
        if stage == "finetune_cls":
            assert [path.parent.name for path, _ in tasks] == [shape for shape, *_ in things]
    assert len(set(seeds)) == 34 + 34 + 11  # none is held out and trained on


@pytest.mark.parametrize("motion", data.DEMO_MOTIONS)
def test_the_boxes_of_the_demo_hold_things_that_move_as_is_said(motion, monkeypatch):
    monkeypatch.setitem(data.DEMO_SHAPES, "nothing", lambda x, y: 1 + 0 * x)
    scene = dict(seed=1, radius=(11, 13.5), size=(72, 48))
    for shape in set(data.DEMO_SHAPES) - {"nothing"}:
        things, sizes = [(shape, motion, 0.28), ("disc", "slides", 0.72)], []
        frames, (boxes, _) = data.draw_scene(things=things, **scene)
        empty, _ = data.draw_scene(things=[("nothing", motion, 0.28), things[1]], **scene)
        for box, thing in zip(boxes * (72, 48, 72, 48), (frames != empty).any(-1)):
            rows, columns = np.nonzero(thing)
            drawn = [columns.min(), rows.min(), columns.max(), rows.max()]
            off, side = (drawn - box) * [1, 1, -1, -1], box[2] - box[0]  # < 0: outside
            assert off.min() > -1 - side / 14 and len(rows) > 0.2 * side**2
            sizes.append((box[3] - off[3] + box[1] + off[1], columns.mean(), len(rows)))
        down, across, growth = np.subtract(sizes[-1], sizes[0])
        assert (down > 14) == (motion == "falls") and (down < -14) == (motion == "rises")
        assert (abs(across) > 7) == (motion == "slides") and (growth > 50) == (motion == "swells")


def test_the_features_example_of_the_readme_runs(videos, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole("mae_pretrain"), settled(mae_pretrain, "--dataset demo").output_dir)
    os.symlink(videos / "train" / "train0_000005_000008.mp4", "a.mp4")
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], {})
    assert "[1, 72, 128]) torch.Size([1, 128])\n" in capsys.readouterr().out


def test_every_flag_and_name_in_the_readme_exists(capsys):
    known, names = set(), ["model", "data", *STAGES]
    for stage, shown in zip(STAGES, (16, 16, 8)):  # videos of a step, as the recipe at hand has it
        with pytest.raises(SystemExit):
            settled(sys.modules[stage], "--dataset demo --help")
        known |= set(re.findall(r"--[\w-]+|\(default: \d+\)", capsys.readouterr().out))
        assert f"(default: {shown})" in known
    text = re.sub(r"(?m)^(\(cd |torchrun|GLOO|# a tree|ffmpeg|.*(docker|tests/)).*$", "", README)
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - {"--max-restarts"}
    assert flags <= known, flags - known
    for module, name in re.findall(r"`(\w+)\.(\w+)`", README):
        if module in names and name != "py":
            assert hasattr(sys.modules[module], name), f"{module}.{name}"
