"""What a training step is: the first three steps of each stage, written out in plain PyTorch.

Each stage runs by its command line, alone and as two processes. What it saves and logs must be that
of the reference below, which takes no more from the project than its data sets and its models.
"""

import contextlib
import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import checkpoint_of, entries, run_stage, start
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import tv_tensors
from torchvision.transforms import v2

import data
import finetune_ava
import finetune_cls
import mae_pretrain
import model

STEPS, MICRO_STEPS = 3, 2
CLASSES = 8
GRID, PATCH = (4, 3, 3), 8  # of clips of 8 x 24 x 24 in tubelets of 2 x 8 x 8
KINDS = {mae_pretrain: model.MAE, finetune_cls: model.Classifier, finetune_ava: model.Detector}

# Steps of 8 do not end where a pass over 12 videos (AVA: 11 keyframes) does; effective epochs at the
# three are 0, 4/3 and 8/3 (AVA: 0, 8/11 and 16/11). One process warms up and decays, two only warm
# up. AVA's recipe for vit_demo has no SGD, hence vit_b, which is given vit_demo's size below.
RUN = dict(model="vit_demo", img_size=24, num_frames=8, sampling_rate=4, hflip=True, num_workers=0)
RUN |= dict(seed=3, batch_size=8, precision="fp32", log_interval=1)
SAMPLING = dict(repeat_aug=2, crop_scale=[0.3, 1.0], segments=False)
REGULARISED = dict(drop_path=0.3, dropout=0.2, layer_decay=0.6)
PRETRAIN = RUN | SAMPLING | dict(
    lr=5e-3, epochs=4, warmup_epochs=2, weight_decay=0.3, clip_grad=0.1,
    mask_ratio=0.75, mask_type="agnostic", norm_pix_loss=True,
    decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2,
)  # fmt: skip
PRETRAIN_TUBES = PRETRAIN | dict(warmup_epochs=10, mask_type="space-only", norm_pix_loss=False)
CLASSIFY = RUN | SAMPLING | REGULARISED | dict(
    lr=5e-3, epochs=4, warmup_epochs=2, weight_decay=0.3, clip_grad=0.5, recipe="kinetics",
    rand_augment=[9, 0.5], random_erasing=0.5, mixup=0.8, cutmix=1.0, label_smoothing=0.1,
    mask_start=0.5, num_classes=CLASSES, views="1x1",
)  # fmt: skip
CLASSIFY_SSV2 = CLASSIFY | dict(
    recipe="ssv2", hflip=False, segments=True, lr=0.5, warmup_epochs=10, weight_decay=0.05
)
DETECT = RUN | REGULARISED | dict(
    lr=5e-3, epochs=2, warmup_epochs=5, weight_decay=0.3, clip_grad=0.05, rel_pos=True,
)  # fmt: skip
DETECT_SGD = DETECT | dict(model="vit_b", lr=20.0, warmup_epochs=1, weight_decay=0.002)
SGD = dict(momentum=0.9, nesterov=True)
CASES = {  # stage, processes, flags, what the optimizer is made with
    "pretrain": (mae_pretrain, 1, PRETRAIN, dict(betas=(0.9, 0.95))),
    "classify": (finetune_cls, 1, CLASSIFY, dict(betas=(0.9, 0.999))),
    "detect": (finetune_ava, 1, DETECT_SGD, SGD),
    "pretrain, two processes": (mae_pretrain, 2, PRETRAIN_TUBES, dict(betas=(0.9, 0.95))),
    "classify, two processes": (finetune_cls, 2, CLASSIFY_SSV2, SGD),
    "detect, two processes": (finetune_ava, 2, DETECT, dict(betas=(0.9, 0.999))),
}


def clips_of(stage, flags, folder):
    args = SimpleNamespace(**flags)
    if stage is finetune_ava:
        files = folder / "ava" / "annotations"
        boxes = finetune_ava.read_boxes(files / "ava_train_v2.2.csv")
        detected = finetune_ava.read_boxes(files / "ava_detection_train_boxes_and_labels.csv")
        for key, rows in detected.items():
            boxes[key] = np.concatenate([boxes[key], rows[rows[:, 5] >= 0.8]])
        movies = {video: f"{folder}/ava/videos/{video}.mp4" for video, _ in boxes}
        del boxes["train0000", 1.5]  # excluded
        keyframes = finetune_ava.Keyframes("", boxes, movies, None)
        return finetune_ava.KeyframeDataset(keyframes, args)
    where, augment = SimpleNamespace(data=folder, dataset="", videos=None), None
    videos = data.find_videos(where, "train")
    if stage is finetune_cls:
        erase = v2.RandomErasing(args.random_erasing, value=round(255 * 0.45))
        augment = v2.Compose([finetune_cls.RandAugment(*args.rand_augment), erase])
    return data.ClipDataset(videos, args, augment)


def train(stage, world, flags, settings, net, clips):
    """Trains `net` on three global batches; returns what is to be logged of each."""
    errors_of = {mae_pretrain: reconstruct, finetune_cls: classify, finetune_ava: detect}[stage]
    optimizer, length, lines = optimizer_of(net, flags, settings), len(clips.videos), []
    order = []  # pass after pass over the list: (pass, index)
    for number in range(3):
        generator = torch.Generator().manual_seed(data.stateless_seed(flags["seed"], number))
        order += [(number, int(i)) for i in torch.randperm(length, generator=generator)]
    net.train()
    for step in range(STEPS):
        # Half a cosine after a linear warm-up, in effective epochs: how often a video was sampled.
        epoch = step * flags["batch_size"] * flags.get("repeat_aug", 1) / length
        if epoch < flags["warmup_epochs"]:
            lr = flags["lr"] * epoch / flags["warmup_epochs"]
        else:
            left = (flags["epochs"] - epoch) / (flags["epochs"] - flags["warmup_epochs"])
            lr = flags["lr"] * (1 - math.cos(math.pi * left)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]

        # The loss is the mean over the global batch, whoever takes which part of it.
        batch = order[step * flags["batch_size"] :][: flags["batch_size"]]
        size, errors = len(batch) // world // MICRO_STEPS, []
        for part, (rank, micro) in enumerate(itertools.product(range(world), range(MICRO_STEPS))):
            samples = [clips[key] for key in batch[part * size :][:size]]
            torch.manual_seed(data.stateless_seed(flags["seed"], step, rank, micro, 0))
            errors.append(errors_of(net, samples, flags, step).flatten())
        loss = torch.cat(errors).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), flags["clip_grad"])
        assert norm > flags["clip_grad"], "there is nothing to clip: choose a smaller clip_grad"
        optimizer.step()
        lines.append(dict(loss=loss.item(), lr=lr, grad_norm=norm.item()))
    return lines


def optimizer_of(net, flags, settings):
    """Each parameter is a group: with its own weight decay, and share of the learning rate."""
    groups, top = [], len(net.blocks) + 1
    for name, parameter in net.named_parameters():
        layer = top
        if name.startswith(("patch_embed", "cls_token", "pos_embed")):
            layer = 0
        elif name.startswith("blocks."):
            layer = 1 + int(name.split(".")[1])
        decays = parameter.ndim > 1  # not biases and norms
        if "pos_embed" in name or "rel_pos" in name or "token" in name:
            decays = isinstance(net, model.MAE)  # as both official codes have it
        scale = flags.get("layer_decay", 1.0) ** (top - layer)
        weight_decay = flags["weight_decay"] if decays else 0.0
        groups.append(dict(params=[parameter], scale=scale, weight_decay=weight_decay))
    kind = torch.optim.AdamW if "betas" in settings else torch.optim.SGD
    return kind(groups, lr=0.0, **settings)


def pixels_of(samples):
    """The clips of the samples, normalised, the clips of a video side by side: (B, 3, T, H, W)."""
    video = torch.cat([sample["video"] for sample in samples])
    return ((video / 255 - 0.45) / 0.225).permute(0, 4, 1, 2, 3)


def reconstruct(mae, samples, flags, step):
    """Squared errors on the hidden tokens, of the first frame of each tubelet."""
    video, (t, h, w) = pixels_of(samples), GRID
    unit = t if flags["mask_type"] == "space-only" else 1
    noise = torch.stack([torch.rand(t // unit, h, w) for _ in video])
    keep = unit * int(t * h * w // unit * (1 - flags["mask_ratio"]))
    order = noise.expand(-1, t, h, w).flatten(1).argsort(dim=1, stable=True)
    hidden = order.argsort(dim=1) >= keep  # (B, N)
    _, pred, _ = mae(video, flags["mask_ratio"], noise)
    target = video[:, :, ::2].unflatten(4, (w, PATCH)).unflatten(3, (h, PATCH))
    target = target.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)  # (B, N, p*p*3)
    if flags["norm_pix_loss"]:
        variance, mean = torch.var_mean(target, 2, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return (pred - target).square()[hidden]


def classify(classifier, samples, flags, step):
    """Cross-entropy of each clip: mixed with another, labels smoothed, some tokens hidden."""
    mixings = [v2.MixUp(alpha=flags["mixup"], num_classes=CLASSES)]
    mixings += [v2.CutMix(alpha=flags["cutmix"], num_classes=CLASSES)]
    video, label = pixels_of(samples).transpose(1, 2), torch.cat([s["label"] for s in samples])
    # First one clip of each video, then the other: neighbours, which are mixed, differ.
    video, label = (torch.cat([x[0::2], x[1::2]]) for x in (video, label))  # (B, T, 3, H, W), (B,)
    video, target = v2.RandomChoice(mixings)(tv_tensors.Video(video), label)
    video = video.as_subclass(torch.Tensor).transpose(1, 2)
    target = target * (1 - flags["label_smoothing"]) + flags["label_smoothing"] / CLASSES
    ratio = flags["mask_start"] * (1 + math.cos(math.pi * step / (STEPS - 1))) / 2
    noise = torch.rand(len(video), math.prod(GRID)) if ratio else None
    logits = classifier(video, ratio, noise)
    return -(target * logits.log_softmax(1)).sum(1)


def detect(detector, samples, flags, step):
    """Binary cross-entropy of each action of each person."""
    target = torch.cat([sample["actions"] for sample in samples])  # (K, 80)
    logits = detector(pixels_of(samples), [sample["boxes"][0] for sample in samples])
    return -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits))


def start_of(case):
    """The model to start from: nothing is 0 or 1, where decay or a gradient might not show."""
    stage, _, flags, _ = CASES[case]
    torch.manual_seed(0)
    names = "img_size|num_frames|decoder|mask_type|norm_pix_loss|drop|num_classes|rel_pos"
    settings = {name: value for name, value in flags.items() if re.match(names, name)}
    net = KINDS[stage](**model.SIZES["vit_demo"], **settings)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net


def run(case, folder, out, monkeypatch, *more):
    """Runs the command line of a case; returns the message it ends with."""
    stage, world, flags, _ = CASES[case]
    torch.save(start_of(case).state_dict(), out / "start.pt")
    words = [*more, "--init", out / "start.pt", "--output_dir", out]
    words += ["--data", folder / "ava" if stage is finetune_ava else folder]
    words += ["--micro_batch", flags["batch_size"] // world // MICRO_STEPS]
    for name, value in flags.items():
        if isinstance(value, bool):
            words += [f"--{name}" if value else f"--no-{name}"]
        else:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    line = " ".join(map(str, words))
    if world == 1:
        monkeypatch.setitem(model.SIZES, "vit_b", model.SIZES["vit_demo"])
        return run_stage(stage.__name__, line)
    code, text = start(stage.__name__, line, world).finish()
    return text if code or "strides do not match" in text else ""  # DDP would copy gradients


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_those_written_out(case, folder, tmp_path, monkeypatch):
    assert run(case, folder, tmp_path, monkeypatch) == ""
    stage, world, flags, settings = CASES[case]
    net, before = start_of(case), start_of(case).state_dict()
    lines = train(stage, world, flags, settings, net, clips_of(stage, flags, folder))
    for line, expected in zip(entries(tmp_path), lines, strict=True):
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    saved = checkpoint_of(tmp_path)["model"]
    assert saved.keys() == before.keys()
    for name, value in net.state_dict().items():
        if not name.endswith("attn.k.bias"):  # which softmax does not see: its gradient is rounding
            change, expected = saved[name] - before[name], value - before[name]
            assert (change - expected).norm() <= 1e-4 * expected.norm() + 3e-7, name


class GPU(TorchDispatchMode):
    """Tensors on "meta" stand for a GPU's: they have no values to read, and none mixes with the host's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.ndim > 0]
        mixed = len({x.is_meta for x in tensors}) > 1 and "copy" not in func.__name__
        assert not mixed, f"{func} takes tensors of GPU and host"
        return func(*args, **kwargs)


@pytest.mark.parametrize("case", [case for case in CASES if "two" not in case])
@pytest.mark.filterwarnings("ignore:for .*no-op")
def test_steps_on_a_gpu_read_nothing_back_and_mix_no_devices(case, folder, tmp_path, monkeypatch):
    stage, steps = CASES[case][0], []
    monkeypatch.setattr(stage, "autocast", lambda *_: contextlib.nullcontext())  # knows no "meta"
    plain = torch.optim.SGD  # not the fused one
    monkeypatch.setattr(
        stage, "make_optimizer", lambda _, net, **__: plain(model.parameter_groups(net, 0), 0.1)
    )
    for name, value in dict(at_log_point=False, save_due=False, report_end=True).items():
        monkeypatch.setattr(stage.Run, name, lambda _, value=value: value)
    monkeypatch.setattr(stage.Run, "record", lambda _, *values: steps.append(values))
    with GPU():
        assert run(case, folder, tmp_path, monkeypatch, "--device", "meta") == "143"
    assert len(steps) == STEPS and all(x.is_meta for values in steps for x in values)
