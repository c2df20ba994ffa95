"""Stage 2: recipes, starting points, sampling, mixing, masking, the multi-view test and the command line."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import encode, noise_frames
from test_model import GOLDEN, golden_state, tensor
from torchvision.transforms import v2

import data
import finetune_cls
import mae_pretrain
import model as m
from model import InputError

ROOT = Path(__file__).parents[1]
SMALL = "--model vit_demo --img_size 24 --precision fp32 --num_workers 0 --log_every 1 --views 2x3"


def test_the_recipes_are_tables_5b_and_6b():
    adamw, sgd = torch.optim.AdamW, torch.optim.SGD
    table_5b = [
        ("optimizer", adamw, adamw, adamw),
        ("optimizer momentum", (0.9, 0.999), (0.9, 0.999), (0.9, 0.999)),
        ("weight decay", 0.05, 0.05, 0.05),
        ("learning rate", 1.6e-2, 4.8e-3, 1.6e-3),
        ("learning rate schedule", m.cosine_decay, m.cosine_decay, m.cosine_decay),
        ("warmup epochs", 5, 5, 5),
        ("epochs", 150, 100, 75),
        ("repeated sampling", 2, 2, 1),
        ("augmentation", *[{"RandAug": (9, 0.5)}] * 3),
        ("batch size", 768, 256, 256),
        ("mixup", 0.8, 0.8, 0.8),
        ("cutmix", 1.0, 1.0, 1.0),
        ("label smoothing", 0.1, 0.1, 0.1),
        ("drop path", 0.1, 0.2, 0.2),
        ("dropout", 0.3, 0.3, 0.5),
        ("layer-wise decay", 0.65, 0.75, 0.8),
    ]
    for i, size in enumerate(("vit_b", "vit_l", "vit_h"), 1):
        assert list(m.column("", finetune_cls.KINETICS, size).items()) == [(row[0], row[i]) for row in table_5b]
    table_6b = [
        ("optimizer", sgd, sgd),
        ("weight decay", 1e-4, 1e-4),
        ("learning rate", 0.64, 0.32),
        ("learning rate schedule", m.cosine_decay, m.cosine_decay),
        ("warmup epochs", 3, 3),
        ("epochs", 40, 40),
        ("augmentation", {"RandAug": (9, 0.5)}, {"RandAug": (9, 0.5)}),
        ("batch size", 256, 256),
        ("mixup", 0.8, 0.8),
        ("cutmix", 1.0, 1.0),
        ("label smoothing", 0.1, 0.1),
        ("drop path", 0.2, 0.2),
        ("dropout", 0.5, 0.5),
        ("layer-wise decay", 0.75, 0.85),
    ]
    for i, size in enumerate(("vit_l", "vit_h"), 1):
        assert list(m.column("", finetune_cls.SSV2, size).items()) == [(row[0], row[i]) for row in table_6b]


def parse(line):
    return finetune_cls.parse_args(line.split())[0]


def test_arguments_follow_the_tables():
    args = parse("")
    assert (args.dataset, args.model, args.recipe, args.views) == ("kinetics400", "vit_l", "kinetics", [7, 3])
    assert (args.lr, args.epochs, args.batch_size, args.repeats, args.layer_decay) == (4.8e-3, 100, 256, 2, 0.75)
    assert (args.crop, args.hflip, args.segments, args.rand_augment) == ([0.08, 1.0], True, False, [9, 0.5])
    assert (args.erasing, args.clip_grad) == (0.0, 0.0)  # of the released configuration: flags, off
    args = parse("--model vit_b --batch_size 384")
    assert (args.lr, args.epochs, args.drop_path, args.dropout) == (8e-3, 150, 0.1, 0.3)
    args = parse("--dataset ssv2 --model vit_h")
    assert (args.lr, args.epochs, args.repeats, args.views) == (0.32, 40, 1, [1, 3])
    for line in "--recipe ssv2 --data mine", "--recipe kinetics --dataset ssv2", "--data something_something_v2":
        args = parse(line)
        assert args.segments and not args.hflip and args.views == [1, 3]
    args = parse("--recipe k600_intermediate --model vit_h")
    assert (args.lr, args.epochs, args.drop_path) == (8e-4, 30, 0.3)
    args = parse("--recipe k600_intermediate")
    assert (args.lr, args.epochs, args.drop_path, args.layer_decay) == (8e-4, 40, 0.2, 0.75)
    with pytest.raises(InputError, match="no learning rate for vit_b; give one with --lr"):
        parse("--dataset ssv2 --model vit_b")
    args = parse("--dataset ssv2 --model vit_b --lr 0.5")
    assert (args.lr, args.layer_decay, args.epochs) == (0.5, 0.75, 40)


# ------------------------------------------------------------------------------------------------ starting points


def golden_classifier():
    case = GOLDEN["vit"]
    config = dict(case["config"])
    seed = config.pop("seed")
    video = tensor(seed + "input", (2, 3, config["num_frames"], config["img_size"], config["img_size"]), 1.0)
    return m.Classifier(**config).eval(), golden_state(case), video, torch.tensor(case["logits"])


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_fused_qkv_files_compute_the_same(prefix, tmp_path):
    classifier, state, video, logits = golden_classifier()
    for i in range(3):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{i}.attn.{name}.{kind}") for name in "qkv"]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    for kind in ("weight", "bias"):  # as PySlowFast names its head
        state[f"head.projection.{kind}"] = state.pop(f"head.{kind}")
    torch.save({"model_state": {prefix + key: value for key, value in state.items()}}, tmp_path / "k400.pyth")
    m.load_pretrained(classifier, tmp_path / "k400.pyth")
    torch.testing.assert_close(classifier(video), logits, atol=1e-4, rtol=0)


def test_a_video_of_one_repeated_image_gives_the_image_models_tokens(tmp_path):
    """An image MAE file: a 2D patch kernel, a joint position table, fused qkv (Table 3)."""
    torch.manual_seed(0)
    D, heads = 32, 4
    state = {"cls_token": torch.randn(1, 1, D), "pos_embed": torch.randn(1, 17, D), "mask_token": torch.randn(1, 1, 16)}
    state |= {"patch_embed.proj.weight": torch.randn(D, 3, 8, 8) * 0.1, "patch_embed.proj.bias": torch.randn(D)}
    for i in range(2):
        for name, shape in {
            "norm1": (D,),
            "norm2": (D,),
            "attn.qkv": (3 * D, D),
            "attn.proj": (D, D),
            "mlp.fc1": (4 * D, D),
            "mlp.fc2": (D, 4 * D),
        }.items():
            state[f"blocks.{i}.{name}.weight"] = torch.randn(shape) * 0.2
            state[f"blocks.{i}.{name}.bias"] = torch.randn(shape[0]) * 0.2
    state |= {"norm.weight": torch.ones(D), "norm.bias": torch.zeros(D)}
    torch.save({"model": state}, tmp_path / "image_mae.pth")
    image = torch.randn(1, 3, 32, 32)

    x = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8).flatten(2).mT
    x = torch.cat([state["cls_token"], x], 1) + state["pos_embed"]  # the image model, written out
    for i in range(2):
        get = lambda name, i=i: (state[f"blocks.{i}.{name}.weight"], state[f"blocks.{i}.{name}.bias"])  # noqa: E731
        q, k, v = (
            F.linear(F.layer_norm(x, (D,), *get("norm1"), 1e-6), *get("attn.qkv"))
            .view(1, 17, 3, heads, -1)
            .permute(2, 0, 3, 1, 4)
        )
        attended = ((q @ k.mT / (D // heads) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(attended, *get("attn.proj"))
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (D,), *get("norm2"), 1e-6), *get("mlp.fc1"))), *get("mlp.fc2"))

    classifier = m.Classifier(5, img_size=32, patch_size=8, num_frames=2, embed_dim=D, depth=2, num_heads=heads).eval()
    report = m.load_pretrained(classifier, tmp_path / "image_mae.pth")
    assert "mask_token" in report["left out"]
    video = image[:, :, None].expand(1, 3, 2, 32, 32)  # one time step: the tokens are those of the image
    torch.testing.assert_close(classifier.encode(m.patchify(video, 8, 2), (1, 4, 4)), x, atol=1e-4, rtol=1e-4)
    longer = m.Classifier(5, img_size=32, patch_size=8, num_frames=8, embed_dim=D, depth=2, num_heads=heads)
    m.load_pretrained(longer, tmp_path / "image_mae.pth")
    assert longer.pos_embed_temporal.shape == (1, 4, D) and longer.pos_embed_temporal.abs().max() == 0


def test_another_class_count_drops_the_head_and_says_so(tmp_path, capsys):
    classifier, state, _, _ = golden_classifier()
    torch.save({"model": state}, tmp_path / "k600.pth")
    config = {k: v for k, v in GOLDEN["vit"]["config"].items() if k not in ("seed", "num_classes")}
    other = m.Classifier(7, **config)
    m.start_from(other, tmp_path / "k600.pth")
    assert 1e-5 < other.head.weight.std() < 3e-5
    out = capsys.readouterr().out
    assert "left out 2 tensors (head)" in out and "not found 2 tensors (head)" in out
    m.start_from(classifier, tmp_path / "k600.pth")
    assert torch.equal(classifier.head.weight, state["head.weight"])  # the same classes keep their head


def test_longer_and_larger_inputs_load_and_train(tmp_path):
    """Table 7's 40 x 312^2 from a 16 x 224^2 checkpoint, at a width that fits a test; checkpointing changes no gradient."""
    config = dict(embed_dim=16, depth=2, num_heads=2)
    small = m.Classifier(4, **config)
    torch.save({"model": small.state_dict()}, tmp_path / "small.pt")
    grads = []
    for again in (False, True):
        large = m.Classifier(4, num_frames=40, img_size=312, checkpoint_activations=again, **config)
        m.load_pretrained(large, tmp_path / "small.pt")
        assert large.pos_embed_spatial.shape[1] == 19 * 19 and large.pos_embed_temporal.shape[1] == 20
        torch.manual_seed(0)
        F.cross_entropy(large(torch.randn(1, 3, 40, 312, 312)), torch.tensor([1])).backward()
        grads.append(large.blocks[0].attn.q.weight.grad)
    torch.testing.assert_close(*grads)


# -------------------------------------------------------------------------------------- sampling and augmentation


def clip_args(**changes):
    settings = dict(num_frames=16, img_size=32, sampling_rate=4, repeats=2, crop=(0.08, 1.0), hflip=True, seed=0)
    return argparse.Namespace(**(settings | dict(segments=False) | changes))


def test_segments_give_one_frame_from_each_part_and_the_middle_in_tests(demo):
    for seed in range(20):
        times = data.segment_times(8.0, 16, np.random.RandomState(seed).rand(16))
        assert (np.floor(times / 0.5) == np.arange(16)).all()
    clips = data.Clips(data.find_videos(demo), clip_args(segments=True))
    drawn = [clips.times(8.0, seed) for seed in range(50)]
    assert all((np.floor(times / 0.5) == np.arange(16)).all() for times in drawn)
    assert np.std([times[3] for times in drawn]) > 0.05
    views = data.Views(data.find_videos(demo), clip_args(segments=True), (1, 3))
    np.testing.assert_allclose(views.times(8.0), [np.arange(16) * 0.5 + 0.25])


def test_ssv2_as_distributed_is_read_and_never_flipped(tmp_path):
    labels = {"Holding something": "1", "Moving something from left to right": "0"}
    items = [{"id": "7", "label": "holding a cup", "template": "Holding [something]"}]
    items += [
        {"id": "8", "label": "x", "template": "Moving [something] from left to right"},
        {"id": "9", "template": "Holding [something]"},
    ]
    for folder, names in {
        "a": ("labels/labels.json", "labels/train.json"),
        "b": ("something-something-v2-labels.json", "something-something-v2-train.json"),
    }.items():
        root = tmp_path / folder
        (root / "labels").mkdir(parents=True)
        (root / "20bn").mkdir()
        (root / names[0]).write_text(json.dumps(labels))
        (root / names[1]).write_text(json.dumps(items))
        for name in ("7", "8"):
            encode(root / "20bn" / f"{name}.webm", noise_frames(8), codec="libvpx-vp9")
        videos = data.find_videos(root, need_labels=True)
        assert [os.path.basename(videos.path(i)) for i in range(2)] == ["7.webm", "8.webm"]
        assert data.find_videos(root / names[1]).digest == videos.digest
        assert videos.labels.tolist() == [1, 0] and videos.class_names[0] == "Moving something from left to right"
    args = parse(f"--dataset ssv2 --data {tmp_path / 'a'} --model vit_demo --lr 0.1")
    assert args.hflip is False and args.segments and args.recipe == "ssv2"
    args = mae_pretrain.parse_args(["--dataset", "ssv2", "--epochs", "200"])[0]
    assert args.hflip is False and args.segments
    assert data.Clips(videos, args).hflip is False


def test_randaugment_treats_all_frames_of_a_clip_alike(demo, tmp_path):
    still = encode(tmp_path / "still.mp4", noise_frames(1, 60, 80).repeat(90, 0))
    (tmp_path / "train.csv").write_text(f"{still} 0")
    videos = data.find_videos(tmp_path)
    plain = data.Clips(videos, clip_args(crop=(1.0, 1.0), hflip=False, repeats=1))[0, 0]["video"][0]
    changed = 0
    for seed in range(12):
        args = clip_args(crop=(1.0, 1.0), hflip=False, repeats=1, seed=seed)
        clip = data.Clips(videos, args, rand_augment=(9, 0.5))[0, 0]["video"][0].int()
        assert (clip - clip[:1]).abs().max() <= 8  # frames of a still video differ by their coding alone
        changed += (clip - plain.int()).abs().float().mean() > 3
    assert changed >= 8


def test_randaugment_draws_its_magnitude_around_nine_of_ten(demo, monkeypatch):
    levels, original = [], v2.RandAugment

    def spy(num_ops, magnitude, num_magnitude_bins):
        levels.append((num_ops, 10 * magnitude / (num_magnitude_bins - 1)))
        return original(num_ops, magnitude, num_magnitude_bins=num_magnitude_bins)

    monkeypatch.setattr(v2, "RandAugment", spy)
    clips = data.Clips(data.find_videos(demo), clip_args(img_size=8, repeats=4), rand_augment=(9, 0.5))
    for epoch in range(15):
        clips[epoch, 0]
    assert all(ops == 2 for ops, _ in levels)
    assert np.mean([level for _, level in levels]) == pytest.approx(9, abs=0.25)
    assert np.std([level for _, level in levels]) == pytest.approx(0.5, abs=0.2)


def test_erasing_cuts_the_same_box_from_all_frames(demo):
    args = clip_args(repeats=1, crop=(1.0, 1.0), hflip=False)
    plain, erased = (data.Clips(data.find_videos(demo), args, erasing=p)[0, 0]["video"][0] for p in (0.0, 1.0))
    gone = (erased != plain).any(-1)
    assert gone.any() and (erased[gone] == round(255 * m.PIXEL_MEAN)).all()
    box = (erased == round(255 * m.PIXEL_MEAN)).all(-1).all(0)
    assert (gone & ~box).sum() == 0


@pytest.mark.parametrize("mix", [v2.MixUp, v2.CutMix])
def test_mixing_mixes_whole_clips_and_targets_sum_to_one(mix):
    torch.manual_seed(3)
    video = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 6, 32, 32)  # clip i holds the number i
    label = torch.arange(4)
    mixing = [mix(alpha=1.0, num_classes=5)]
    mixed, target = finetune_cls.mix_clips(video, label, mixing, 5)
    assert mixed.shape == video.shape and type(mixed) is torch.Tensor
    torch.testing.assert_close(target.sum(1), torch.ones(4))
    assert (target > 0).sum(1).max() == 2
    assert (mixed == mixed[:, :, :1]).all()  # every frame of a clip is mixed alike
    for i in range(4):  # the share of the target is the share of the pixels
        other = (i - 1) % 4
        share = target[i, i].item()
        assert mixed[i].mean().item() == pytest.approx(share * i + (1 - share) * other, abs=1e-4)
    plain, target = finetune_cls.mix_clips(video, label, [], 5)
    assert torch.equal(plain, video) and torch.equal(target, F.one_hot(label, 5).float())


def test_repeats_of_a_video_are_not_mixed_with_one_another(demo):
    clips = data.Clips(data.find_videos(demo), clip_args(img_size=8))
    batch = next(
        iter(
            data.make_loader(
                clips, data.Stream(8, 4, 4, 0, 1, 0, 0, 1), argparse.Namespace(num_workers=0), torch.device("cpu")
            )
        )
    )
    names = batch["index"] * 2
    assert all(a != b for a, b in zip(names, names[1:] + names[:1]))
    assert batch["label"].tolist() == [int(clips.videos.labels[i]) for i in names]
    for repeat in range(2):
        sample = clips[0, batch["index"][1]]["video"][repeat]
        assert torch.equal(batch["video"][repeat * 4 + 1].permute(1, 2, 3, 0), sample)


# ------------------------------------------------------------------------------------------- masked fine-tuning


def test_masked_fine_tuning_keeps_exact_counts_along_the_cosine_and_ends_unmasked():
    classifier = m.Classifier(4, img_size=32, patch_size=8, num_frames=8, embed_dim=16, depth=1, num_heads=2)
    seen, steps = [], 11
    classifier.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1] - 1))
    for step in range(steps):
        ratio = finetune_cls.mask_ratio_at(step, steps, 0.75)
        assert ratio == pytest.approx(0.75 * (1 + np.cos(np.pi * step / 10)) / 2)
        classifier(torch.randn(2, 3, 8, 32, 32), ratio, torch.rand(2, 64))
        assert seen[-1] == int(64 * (1 - ratio))
    assert seen[0] == 16 and seen[-1] == 64
    video = torch.randn(2, 3, 8, 32, 32)
    classifier(video)
    assert seen[-1] == 64
    noise = torch.rand(2, 64)
    kept = noise.argsort(dim=1)[:, :32]
    tubelets = m.patchify(video, 8, 2)
    hidden = torch.ones(2, 64, 1).scatter(1, kept[..., None], 0)
    changed = m.unpatchify(torch.where(hidden == 1, -tubelets, tubelets), (4, 4, 4), 8)
    torch.testing.assert_close(classifier(video, 0.5, noise), classifier(changed, 0.5, noise))


def test_masking_makes_a_vit_b_step_faster():
    """On a third of ViT-B's blocks. Whole annealed runs, in the paper: 1.2 and 1.3 times."""
    torch.manual_seed(0)
    classifier = m.Classifier(400, **m.SIZES["vit_b"] | {"depth": 4})
    video, noise = torch.randn(1, 3, 16, 224, 224), torch.rand(1, 1568)

    def seconds(ratio):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=m.has_bf16(torch.device("cpu"))):
            logits = classifier(video, ratio, noise)
        F.cross_entropy(logits.float(), torch.tensor([3])).backward()
        return time.perf_counter() - started

    seconds(0.75)  # the first step of a process is slower
    whole, half, quarter = (seconds(ratio) for ratio in (0.0, 0.5, 0.75))
    print(f"{whole / half:.2f} times faster at ratio 0.5, {whole / quarter:.2f} at 0.75")
    assert whole / half > 1.6 and whole / quarter > 2.5


# ------------------------------------------------------------------------------------------------ multi-view test


def test_views_cover_the_video_and_touch_both_edges(demo):
    videos = data.find_videos(demo)
    views = data.Views(videos, clip_args(), (7, 3))
    times = views.times(10.0)
    assert len(times) == 7 and times[0][0] == 0 and times[-1][-1] + 4 / 30 == pytest.approx(10.0)
    np.testing.assert_allclose(np.diff([clip[0] for clip in times]), (10 - 64 / 30) / 6)
    assert views.boxes(240, 320) == [(0, 0, 240, 240), (0, 40, 240, 240), (0, 80, 240, 240)]
    assert views.boxes(320, 240) == [(0, 0, 240, 240), (40, 0, 240, 240), (80, 0, 240, 240)]
    assert data.Views(videos, clip_args(), (1, 1)).boxes(240, 320) == [(0, 40, 240, 240)]
    assert data.Views(videos, clip_args(), (1, 1)).times(10.0)[0][0] == pytest.approx((10 - 64 / 30) / 2)
    sample = views[0]
    assert sample["video"].shape == (21, 16, 32, 32, 3)


def test_scores_are_averaged_after_the_softmax():
    class Fixed(torch.nn.Module):
        def forward(self, video):
            return video[:, :, 0, 0, 0].float()  # the first pixel's channels as logits

    video = torch.zeros(5, 2, 4, 4, 3, dtype=torch.uint8)
    video[:, 0, 0, 0] = torch.tensor([[9, 0, 0], [0, 3, 0], [0, 3, 0], [0, 3, 0], [0, 1, 2]], dtype=torch.uint8)
    expected = video[:, 0, 0, 0].float().softmax(1).mean(0)
    scores = finetune_cls.average_views(Fixed(), video, torch.device("cpu"), most=2)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("value", [math.nan, 0.5])
def test_scores_that_say_nothing_are_not_right(value, run, labelled, tmp_path, monkeypatch):
    args, _ = finetune_cls.parse_args(f"{SMALL} --data {labelled} --output_dir {tmp_path}".split())
    videos = data.find_videos(labelled, "val", need_labels=True)
    monkeypatch.setattr(finetune_cls, "average_views", lambda *_: torch.full((8,), value))
    results = finetune_cls.test(m.Classifier(8), videos, args, torch.device("cpu"), 0, 1, None)
    assert results["top1"] == 100 * (videos.labels == 0).mean()


def test_clips_are_tested_as_trained_unless_flags_say_otherwise(run):
    def tested(flags):
        args, _ = finetune_cls.parse_args(f"--eval --dataset demo --init {run}/checkpoint.pt {flags}".split())
        finetune_cls.restore(args)
        return args.num_frames, args.sampling_rate, args.img_size

    assert finetune_cls.parse_args(["--eval", "--init", f"{run}/checkpoint.pt"])[0].output_dir == f"{run}/eval"
    assert tested("") == (16, 4, 24) and tested("--sampling_rate 2 --img_size 32") == (16, 2, 32)


# -------------------------------------------------------------------------------------------------------- stage


def train(line, *more):
    finetune_cls.train(*finetune_cls.parse_args(f"{SMALL} {line}".split() + [str(word) for word in more]))


def entries(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


LINE = "--epochs 5 --batch_size 4 --lr 1e-3 --num_classes 8"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """8 videos of 8 classes to train on; 5 to validate, which does not divide by 2 or 3."""
    folder = tmp_path_factory.mktemp("labelled")
    for split, count in {"train": 8, "val": 5}.items():
        for i in range(count):
            path = folder / split / data.DEMO_SHAPES[i] / f"{i}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            data.write_video(path, data.draw_demo_video(data.DEMO_SHAPES[i], data.DEMO_MOTIONS[i % 6], i), 15)
    return folder


@pytest.fixture(scope="module")
def run(labelled, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cls"
    train(f"{LINE} --mask_start 0.5 --save_scores --data", labelled, "--output_dir", out)
    return out


def test_a_run_leaves_checkpoint_log_and_results(run, labelled):
    results = json.loads((run / "results.json").read_text())
    assert {"top1", "top5", "views", "videos", "init"} <= results.keys()
    assert results["videos"] == 5 and results["views"] == "2x3" and results["init"] is None
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["class_names"] == sorted(data.DEMO_SHAPES) and checkpoint["config"]["num_classes"] == 8
    log = entries(run)
    assert len(log) == 5 and log[0]["mask_ratio"] == 0.5 and log[-1]["mask_ratio"] == 0
    assert all("clips_per_s" in entry for entry in log)
    scores = torch.load(run / "scores.pt", weights_only=True)
    assert scores["scores"].shape == (5, 8) and len(scores["paths"]) == 5
    torch.testing.assert_close(scores["scores"].sum(1), torch.ones(5))
    top1 = 100 * (scores["scores"].argmax(1) == scores["labels"]).float().mean().item()
    assert results["top1"] == pytest.approx(top1)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.long)])
def test_each_video_counts_once_whatever_the_processes(processes, run, labelled, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        "finetune_cls.py",
    ]
    command += (
        f"{SMALL} --eval --save_scores --init {run}/checkpoint.pt --data {labelled} --output_dir {tmp_path}".split()
    )
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, run))
    assert (ours["top1"], ours["top5"], ours["videos"]) == (theirs["top1"], theirs["top5"], 5)
    ours, theirs = (torch.load(folder / "scores.pt", weights_only=True) for folder in (tmp_path, run))
    assert ours["paths"] == theirs["paths"]
    torch.testing.assert_close(ours["scores"], theirs["scores"], atol=1e-5, rtol=1e-4)


def test_a_stopped_run_goes_on_mid_epoch_as_if_it_had_not_stopped(run, labelled, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def step_then_die(self, *args, **kwargs):
        if self.done == 3:
            raise Killed
        return step(self, *args, **kwargs)

    step = m.Log.step
    line = f"{LINE} --mask_start 0.5 --save_minutes 0 --data", labelled, "--output_dir", tmp_path
    monkeypatch.setattr(m.Log, "step", step_then_die)
    with pytest.raises(Killed):
        train(*line)
    monkeypatch.setattr(m.Log, "step", step)
    train(*line)
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (tmp_path, run))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    for name, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(ours["optimizer"]["state"][name][key], state[key]) for key in state)
    for ours, theirs in zip(entries(tmp_path), entries(run), strict=True):
        assert all(ours[name] == theirs[name] for name in ("step", "epoch", "loss", "lr", "grad_norm", "mask_ratio"))


def test_workers_and_accumulation_leave_the_first_loss_as_it_is(run, labelled, tmp_path):
    train(f"{LINE} --mask_start 0.5 --num_workers 2 --data", labelled, "--output_dir", tmp_path)
    for ours, theirs in zip(entries(tmp_path), entries(run), strict=True):
        assert ours["loss"] == theirs["loss"]


def test_sgd_recipe_trains_with_momentum(labelled, tmp_path):
    train(
        "--recipe ssv2 --segments --no-hflip --epochs 2 --batch_size 4 --lr 0.01 --num_classes 8 --data",
        labelled,
        "--output_dir",
        tmp_path,
    )
    group = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert group["momentum"] == 0.9 and "betas" not in group


def test_training_learns_to_tell_four_videos_apart(tmp_path):
    for split in ("train", "val"):
        for i, motion in enumerate(data.DEMO_MOTIONS[:4]):
            path = tmp_path / split / motion / "a.mp4"
            path.parent.mkdir(parents=True)
            data.write_video(path, data.draw_demo_video("disc", motion, i), 15)
    line = "--recipe demo --epochs 200 --batch_size 4 --lr 2e-3 --layer_decay 1 --crop 0.8 1 --label_smoothing 0"
    line += " --mixup 0 --cutmix 0 --data"
    train(line, tmp_path, "--output_dir", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["top1"] == 100
    assert entries(tmp_path / "out")[-1]["loss"] < 0.1


def test_a_classifier_starts_the_next_stage(run, labelled, tmp_path, capsys):
    """Table 10: intermediate fine-tuning; the old head is dropped where the classes differ."""
    (tmp_path / "train.csv").write_text(
        "\n".join(f"{p} {i % 3}" for i, p in enumerate(sorted(labelled.glob("train/*/*.mp4"))))
    )
    (tmp_path / "val.csv").write_text((tmp_path / "train.csv").read_text())
    train(
        "--epochs 2 --batch_size 8 --data", tmp_path, "--init", run / "checkpoint.pt", "--output_dir", tmp_path / "out"
    )
    assert "left out 2 tensors (head)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["init"] == str(run / "checkpoint.pt")


# --------------------------------------------------------------------------------------------------- command line


def command(line):
    sys.argv = ["finetune_cls.py", *line.split()]
    try:
        m.run_stage(finetune_cls.main)
    except SystemExit as stop:
        return str(stop.code)
    return ""


def test_predict_prints_the_five_likeliest_classes(run, labelled, capsys):
    video = sorted(labelled.glob("val/*/*.mp4"))[0]
    args, _ = finetune_cls.parse_args(
        ["--predict", str(video), "--init", f"{run}/checkpoint.pt", "--precision", "fp32", "--views", "2x3"]
    )
    finetune_cls.predict(args)
    lines = capsys.readouterr().out.splitlines()
    shown = [re.fullmatch(r"\s*([\d.]+)%  (.*)", line) for line in lines[-5:]]
    assert all(match and match[2] in data.DEMO_SHAPES for match in shown)
    percent = [float(match[1]) for match in shown]
    assert percent == sorted(percent, reverse=True)
    scores = torch.load(run / "scores.pt", weights_only=True)
    expected = scores["scores"][scores["paths"].index(str(video))].topk(5).values * 100
    np.testing.assert_allclose(percent, expected, atol=0.06)


@pytest.mark.parametrize(
    "line, error",
    [
        ("--data LABELLED --num_classes 3", r"8 classes, not 3; if that is meant: --num_classes 8"),
        (
            "--data LISTS --num_classes 5 --batch_size 2",
            r"train.csv, line 2: .*label 7 is outside 0..4, the 5 classes there are",
        ),
        ("--data LISTS/train.csv --num_classes 8", r"train.csv: one list, of videos to train on or to test on"),
        ("--data UNKNOWN --batch_size 1", r"val.csv, line 2: class 'dance' is none of the 1 classes \('walk'"),
        ("--data NOVAL --batch_size 1", r"no val split; expected val.csv or a folder val/"),
        (
            "--data LABELLED --num_classes 8 --batch_size 4 --init NOENCODER",
            r"noencoder.pt: does not fit this model.*missing",
        ),
        ("--views 0x3", r"--views 0x3: expected clips x crops, both at least 1, such as 7x3"),
        ("--views 7", r"--views 7: expected clips x crops"),
        ("--mask_start 1.5", r"--mask_start 1.5 is outside \[0, 1\)"),
        ("--predict TEXT --init RUN", r"1 of 1 files are no videos that can be read"),
        ("--predict TEXT", r"--predict needs --init CHECKPOINT"),
        ("--eval --data LABELLED", r"--eval needs --init CHECKPOINT"),
        (
            "--eval --data LABELLED --num_classes 8 --init MAE",
            r"mae.pt: has no head.weight of a Classifier; give a checkpoint of finetune_cls",
        ),
        ("--eval --data LABELLED --init MAE", r"--num_classes says how many"),
    ],
)
def test_bad_input_is_told_what_to_do(line, error, run, labelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video = sorted(labelled.glob("train/*/*.mp4"))[0]
    for folder in ("lists", "unknown", "noval/train/walk"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "lists" / "train.csv").write_text(f"{video} 0\n{video} 7\n")
    for split, name in {"train": "walk", "val": "dance"}.items():
        (tmp_path / "unknown" / f"{split}.csv").write_text(
            f"label,youtube_id,time_start,time_end,split\n{name},a,0,1,{split}\n"
        )
    encode(tmp_path / "unknown" / "a_000000_000001.mp4", noise_frames(8))
    encode(tmp_path / "noval" / "train" / "walk" / "a.mp4", noise_frames(8))
    (tmp_path / "text").write_text("words")
    torch.save({"model": {"head.weight": torch.zeros(8, 8)}}, tmp_path / "noencoder.pt")
    mae = m.MAE(**mae_pretrain.config_of(mae_pretrain.parse_args(["--model", "vit_demo", "--img_size", "24"])[0]))
    torch.save({"model": mae.state_dict()}, tmp_path / "mae.pt")
    for name, path in dict(
        LABELLED=labelled,
        LISTS="lists",
        UNKNOWN="unknown",
        NOVAL="noval",
        NOENCODER="noencoder.pt",
        TEXT="text",
        RUN=run / "checkpoint.pt",
        MAE="mae.pt",
    ).items():
        line = re.sub(rf"\b{name}\b", str(path), line)
    message = command(f"{SMALL} {line}" if "--views" not in line else line)
    assert message.startswith("finetune_cls.py: error: ")
    assert re.search(error, message), message
