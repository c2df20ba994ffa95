"""Claims that three steps of training cannot hold: precision, failures, sampling, masks, scores."""

import csv
import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import data
import finetune_ava
import finetune_cls
import mae_pretrain
import model

ENCODER = model.SIZES["vit_demo"] | dict(img_size=24, num_frames=8)
SMALL = "--model vit_demo --img_size 24 --num_frames 8 --num_workers 0 --batch_size 2 --epochs 0.2"
STAGES = {  # one step of each
    mae_pretrain: "--repeat_aug 1",
    finetune_cls: "--repeat_aug 1 --num_classes 8 --views 1x1",
    finetune_ava: "--video_start 900",
}


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Runs a stage by its command line; returns the folder with what it leaves."""

    def run(stage, more="", videos=None):
        videos = videos or (folder / "ava" if stage is finetune_ava else folder)
        line = f"{SMALL} {STAGES[stage]} {more} --data {videos} --output_dir {tmp_path}/run"
        monkeypatch.setattr(sys, "argv", [stage.__name__, *line.split()])
        stage.main()
        return tmp_path / "run"

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_linear_layers_compute_in_bf16_where_that_is_asked_for(stage, run):
    seen = set()

    def note(module, _, output):
        if isinstance(module, nn.Linear) and module.training and not output.is_meta:
            seen.add(output.dtype)

    with register_module_forward_hook(note):
        run(stage, "--precision bf16")
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(stage, run):
    def harm(module, _, output):
        if isinstance(module, nn.Linear) and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)

    message = r"loss \d+\.\d+, gradient norm (nan|inf)"
    with register_module_forward_hook(harm), pytest.raises(FloatingPointError, match=message):
        run(stage)


def test_top5_is_not_top1_and_a_video_that_cannot_be_read_is_wrong(folder, run, tmp_path):
    labels = [0, 1, 4, 5, 0]  # every video is taken for class 0, then 1, 2, ...; the last is broken
    for i in range(4):
        (tmp_path / f"{i}.mp4").symlink_to(folder / "train" / f"train{i}_000005_000008.mp4")
    (tmp_path / "4.mp4").write_text("words")
    (tmp_path / "val.txt").write_text("".join(f"{i}.mp4 {n}\n" for i, n in enumerate(labels)))
    classifier = model.Classifier(**ENCODER, num_classes=8)
    classifier.head.weight.data.zero_()
    classifier.head.bias.data = -torch.arange(8.0)
    torch.save(classifier.state_dict(), tmp_path / "weights.pt")
    out = run(finetune_cls, f"--eval --init {tmp_path}/weights.pt", tmp_path)
    results = json.loads((out / "results.json").read_text())
    expected = dict(top1=20, top5=60, videos=5, unreadable=1)
    assert {name: results[name] for name in expected} == pytest.approx(expected)


def test_each_action_has_a_sigmoid_of_its_own(run, tmp_path):
    detector = model.Detector(**ENCODER, num_classes=80)
    detector.head.weight.data.zero_()
    detector.head.bias.data = torch.linspace(-3, 3, 80)
    torch.save(detector.state_dict(), tmp_path / "weights.pt")
    out = run(finetune_ava, f"--eval --init {tmp_path}/weights.pt")
    scores = {}  # of all boxes alike
    for *_, action, score in csv.reader((out / "detections.csv").open()):
        scores[int(action)] = float(score)
    expected = {
        i: 1 / (1 + math.exp(3 - 6 * (i - 1) / 79)) for i in range(1, 1 + len(data.DEMO_ACTIONS))
    }
    assert scores == pytest.approx(expected, abs=1e-5)


def test_the_target_of_a_flat_patch_is_0_and_of_a_nearly_flat_one_is_damped():
    mae = model.MAE(**ENCODER, norm_pix_loss=True).eval()
    flat = torch.full((1, 3, 8, 24, 24), 0.3)
    for video in flat, flat + 1e-3 * torch.randn(flat.shape):  # variances of 0 and about 1e-6
        loss, pred, mask = mae(video, 0.9)
        target = (
            video[0, :, ::2].reshape(3, 4, 3, 8, 3, 8).permute(1, 2, 4, 3, 5, 0).reshape(36, 192)
        )
        variance, mean = torch.var_mean(target, 1, keepdim=True)
        error = pred[0] - (target - mean) / (variance + 1e-6).sqrt()
        torch.testing.assert_close(loss, error[mask[0] == 1].square().mean())


@pytest.mark.parametrize("kind, rate", [(model.Classifier, 0.3), (model.Detector, 0.6)])
def test_drop_path_rises_linearly_with_depth_and_keeps_the_mean(kind, rate):
    torch.manual_seed(0)
    net, x = kind(**ENCODER | dict(depth=5), drop_path=rate), torch.randn(2000, 1, 128)
    for i, block in enumerate(net.blocks):
        nn.init.zeros_(block.attn.proj.weight)  # leaves the other branch alone
        with torch.no_grad():
            branch, kept = block.eval()(x, None) - x, block.train()(x, None) - x
        dropped = kept.abs().amax((1, 2)) == 0
        assert dropped.float().mean().item() == pytest.approx(rate * i / 4, abs=0.04)
        expected = branch[~dropped] / (1 - rate * i / 4)
        torch.testing.assert_close(kept[~dropped], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [model.Classifier, model.Detector])
def test_dropout_stands_before_the_head_in_training_alone(kind):
    net, shares = kind(**ENCODER, dropout=0.3), []
    net.head.register_forward_pre_hook(lambda _, args: shares.append((args[0] == 0).float().mean()))
    video, boxes = torch.randn(16, 3, 8, 24, 24), [torch.tensor([[0.0, 0, 24, 24]])] * 16
    for training in True, False:
        net.train(training)(video, *([boxes] if kind is model.Detector else []))
    assert [share.item() for share in shares] == [pytest.approx(0.3, abs=0.05), 0]
