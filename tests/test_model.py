"""The model against the paper's figures, other implementations, and what masking promises."""

import errno
import json
import math
import os
import re
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import finetune_ava
import finetune_cls
import mae_pretrain
import model as m
from model import MAE, Classifier, Detector, load_pretrained, parameter_groups

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
ENCODER = dict(img_size=32, patch_size=8, num_frames=8, embed_dim=32, depth=2, num_heads=2)
DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
KINDS = {MAE: DECODER, Classifier: dict(num_classes=4), Detector: dict(num_classes=4, rel_pos=True)}
VIDEO = torch.randint(256, (2, 3, 8, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
BOXES = [torch.tensor([[0.0, 0, 16, 20]]), torch.tensor([[3.0, 3, 30, 30], [-5, 0, 9, 20]])]


def tiny(kind=MAE, seed=0, **changes):
    """A small model of any of the three kinds; its weights follow from the seed."""
    torch.manual_seed(seed)
    return kind(**ENCODER | KINDS[kind] | changes)


def loss_of(model, mask_ratio=0.5, part=slice(2)):
    """A training loss of any of the three kinds, on a part of two random clips."""
    noise = torch.rand(2, 64)[part]
    if isinstance(model, MAE):
        return model(VIDEO[part], mask_ratio, noise)[0]
    more = [BOXES[part]] if isinstance(model, Detector) else [mask_ratio, noise]
    return F.logsigmoid(model(VIDEO[part], *more)).mean()


def tensor(name, shape, std):
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(rng.standard_normal(tuple(shape)) * std).float()


def close(value, expected):
    assert_close(value.detach(), torch.tensor(expected), atol=1e-4, rtol=0)


def golden_case(name):
    """Keywords of a golden case's model, its weights under their released names, and its video."""
    config, state = dict(GOLDEN[name]["config"]), {}
    seed, side = config.pop("seed"), config["img_size"]
    for key, shape in GOLDEN[name]["state_dict_shapes"].items():
        small = "pos" in key or "token" in key or len(shape) == 1
        std = 0.1 if small else 0.5 / np.prod(shape[1:]) ** 0.5
        state[key] = tensor(seed + key, shape, std) + ("norm" in key and key.endswith("weight"))
    return config, state, tensor(seed + "input", (2, 3, config["num_frames"], side, side), 1.0)


def fuse_qkv(state):
    """The same weights with queries, keys and values in one matrix, as most files have them."""
    state = dict(state)
    for key in [key for key in state if ".attn.q." in key]:
        parts = [state.pop(key.replace(".q.", f".{name}.")) for name in "qkv"]
        state[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return state


@pytest.mark.parametrize("name, layout", zip(["mae_norm_pix", "mae_raw_pix"], ["model", "model_state"]))  # fmt: skip
def test_mae_computes_what_the_released_code_computes(name, layout, tmp_path):
    case, (config, state, video) = GOLDEN[name], golden_case(name)
    ratio, mae = config.pop("mask_ratio"), MAE(norm_pix_loss=config.pop("norm_pix"), **config)
    torch.save({layout: state, "epoch": 3}, tmp_path / "released.pth")
    load_pretrained(mae, tmp_path / "released.pth")
    video[:, :, -2] = video[:, :, -1]
    rng = np.random.RandomState(zlib.crc32((case["config"]["seed"] + "noise").encode()))
    noise = torch.from_numpy(rng.rand(2, math.prod(mae.grid)).astype(np.float32))
    latents, parameters = [], dict(mae.named_parameters())
    mae.norm.register_forward_hook(lambda module, args, output: latents.append(output[:, 1:]))
    loss, pred, mask = mae(video, ratio, noise)
    loss.backward()
    assert (mask[0] == 0).nonzero().flatten().tolist() == case["mask_first_sample_visible_ids"]
    close(loss, case["loss"])
    for key, value in {"latent": latents[0], "pred": pred}.items():
        close(value.flatten()[:8], case[f"{key}_first8"])
        close(value.abs().mean(), case[f"{key}_abs_mean"])
    for key, norm in case["grad_norms"].items():
        close(parameters[key].grad.norm(), norm)


@pytest.mark.parametrize("place, name", [(None, ""), ("^", "_orig_mod.module."), (r"(?<=blocks\.\d\.)", "_orig_mod.")])  # fmt: skip
def test_classifier_computes_what_the_released_code_computes(place, name, tmp_path):
    config, state, video = golden_case("vit")
    classifier = Classifier(**config)
    if place:  # names of PySlowFast, which fuses qkv, and of compiled models or blocks
        state = {k.replace("head.", "head.projection."): v for k, v in fuse_qkv(state).items()}
        state = {"model_state": {re.sub(place, name, key): v for key, v in state.items()}}
    torch.save(state, tmp_path / "k400.pyth")
    assert load_pretrained(classifier, tmp_path / "k400.pyth") == []
    close(classifier(video), GOLDEN["vit"]["logits"])


def test_relative_positions_compute_what_mvitv2_computes_without_a_bias_matrix(monkeypatch):
    attend = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    case = GOLDEN["relative_position_attention"]
    grid, dim, seed = case["config"]["thw"], case["config"]["dim"], case["config"]["seed"]
    attention, state = m.RelPosAttention(dim, case["config"]["num_heads"], grid), {}
    for key, shape in case["state_dict_shapes"].items():
        state[key] = tensor(seed + key, shape, 0.5 / dim**0.5 if key.endswith("weight") else 0.3)
    attention.load_state_dict(state)
    output = attention(tensor(seed + "input", (2, 1 + math.prod(grid), dim), 1.0), grid)
    close(output.flatten()[:8], case["output_first8"])
    close(output.flatten()[-8:], case["output_last8"])
    close(output.abs().mean(), case["output_abs_mean"])
    assert "attn_mask" not in attend.call_args.kwargs


def test_schedule_and_layer_decay_are_the_released_ones():
    classifier, ours = Classifier(10, **ENCODER | dict(embed_dim=64, depth=3)), {}
    for group in parameter_groups(classifier, 0.05, 0.75):
        settings = [group["lr_scale"], group["weight_decay"]]
        ours |= {name: settings for name, _ in group["params"]}
    assert ours == GOLDEN["layer_decay_0.75_wd_0.05_depth3"]
    golden = GOLDEN["lr_schedule"]
    for epoch, lr in golden["epoch_to_lr"]:
        ours = m.cosine_decay(epoch, golden["lr"], golden["warmup_epochs"], golden["epochs"])
        assert ours == pytest.approx(lr, abs=1e-11, rel=1e-6)


@pytest.mark.parametrize("size, frames, side, millions, gflops", [
    ("vit_b", 16, 224, 87, 180), ("vit_l", 16, 224, 304, 598), ("vit_h", 16, 224, 632, 1193),
    ("vit_l", 40, 312, None, 4757), ("vit_h", 32, 312, None, 6382),
])  # fmt: skip
def test_parameters_and_flops_are_those_of_table_7(size, frames, side, millions, gflops):
    config = m.SIZES[size] | dict(num_frames=frames, img_size=side)
    # Multiply-adds of a forward pass; training takes three times as much.
    assert m.count_flops(Classifier, config) / 3 / 2e9 == pytest.approx(gflops, rel=0.005)
    if (size, side) == ("vit_l", 224):  # pre-training
        assert m.count_flops(MAE, config, 0.9) / 1e9 == pytest.approx(476, abs=1)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Classifier(400, **config).parameters())
    assert millions is None or parameters / 1e6 == pytest.approx(millions, rel=0.005)


def test_init_is_the_papers():
    mae, classifier = MAE(embed_dim=256, depth=2, num_heads=4), Classifier(10, depth=1)
    for name, p in [*mae.named_parameters(), ("token", classifier.head.weight)]:
        if "pos_embed" in name or "token" in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" not in name:
            bound = (6 / sum(p.flatten(1).shape)) ** 0.5
            assert p.abs().max().item() == pytest.approx(bound, rel=0.01), name
    assert classifier.norm.eps == 1e-6


@pytest.mark.parametrize("kind", [MAE, Classifier])
def test_hidden_pixels_never_reach_the_encoder(kind):
    model, noise, latents = tiny(kind), torch.rand(2, 64), []
    model.blocks[-1].register_forward_hook(lambda block, args, output: latents.append(output))
    tubelets, grid = model.patchify(VIDEO)
    hidden = torch.ones(2, 64, 1).scatter(1, noise.argsort(1)[:, :16, None], 0) == 1
    for changed in (hidden & False, hidden, ~hidden):
        video = mae_pretrain.unpatchify(torch.where(changed, 255 - tubelets, tubelets), grid, 8)
        model(video, 0.75, noise)
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])


@pytest.mark.parametrize("frames, step", [(None, 2), (8, 1)])
def test_target_is_the_first_frame_of_each_tubelet_or_all_and_damped_if_nearly_flat(frames, step):
    mae, video = tiny(norm_pix_loss=False, pred_t_dim=frames), 1e-3 * torch.randn(2, 3, 8, 32, 32)
    tubelets, grid = mae.patchify(F.pad(video, (0, 7, 0, 3, 0, 1)))  # the rest is dropped
    pixels = mae.patchify_target(tubelets)
    assert torch.equal(mae_pretrain.unpatchify(pixels, grid, 8), video[:, :, ::step])
    mae.norm_pix_loss = True
    variance, mean = torch.var_mean(pixels, -1, keepdim=True)  # variances of about 1e-6
    assert_close(mae.patchify_target(tubelets), (pixels - mean) / (variance + 1e-6).sqrt())
    assert mae(video, 0.75)[1].shape == pixels.shape
    with pytest.raises(ValueError, match="pred_t_dim"):
        tiny(pred_t_dim=5)


# Axes of time, rows and columns along which a mask does not change.
ALIKE = {"agnostic": [], "space-only": [0], "time-only": [1, 2], "block-wise": [], "rows": [0, 2]}


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9, 0.95])
@pytest.mark.parametrize("mask_type", ALIKE)
def test_masks_have_exact_counts_and_structure(mask_type, ratio, monkeypatch):
    """In training and in pictures; also whole rows, a type added from outside, of equal numbers."""
    torch.manual_seed(0)
    monkeypatch.setitem(m.MASK_TYPES, "rows", lambda grid, _: torch.rand(1, grid[1], 1).round())
    mae = MAE(embed_dim=8, depth=1, num_heads=1, mask_type=mask_type, **DECODER)
    video, grid = torch.full((2, 3, 16, 192, 224), 200).byte(), (8, 12, 14)
    groups = math.prod(n for axis, n in enumerate(grid) if axis not in ALIKE[mask_type])
    if not (keep := math.prod(grid) // groups * int(groups * (1 - ratio))):
        with pytest.raises(m.InputError, match=f"use a ratio below {1 - 1 / groups:.4g}"):
            mae(video, ratio)
        return
    one, other = mae(video, ratio)[2].view(2, *grid)
    drawn = mae_pretrain.reconstruct(mae, video[:1], ratio)[1, :, 0, ::16, ::16] == 115  # grey
    assert not torch.equal(one, other)
    for mask in (one, other, drawn.float()):
        assert (mask == 0).sum() == keep
        for axis in ALIKE[mask_type]:
            assert (mask == mask.narrow(axis, 0, 1)).all()
        differ = (mask[:, :, 1:] != mask[:, :, :-1]).float().mean().item()  # neighbours in a row
        if mask_type == "block-wise":
            assert differ < 0.6 * 2 * ratio * (1 - ratio)
        elif mask_type == "agnostic":
            assert differ == pytest.approx(2 * ratio * (1 - ratio), abs=0.06)


def test_a_block_has_sides_of_a_quarter_to_just_over_half_and_lies_anywhere():
    grid = (8, 14, 13)
    boxes = [(m.block_mask(grid, 0.001) >= 1).nonzero() for _ in range(300)]  # one box is enough
    first, last = (torch.stack([end(box, 0)[0] for box in boxes]) for end in (torch.min, torch.max))
    sides = last + 1 - first
    assert [len(box) for box in boxes] == sides.prod(1).tolist()
    assert (sides.amin(0).tolist(), sides.amax(0).tolist()) == ([2, 3, 3], [5, 8, 7])
    assert (first.amin(0).tolist(), last.amax(0).tolist()) == ([0, 0, 0], [7, 13, 12])


def test_any_input_size_runs_with_positions_resized():
    assert tiny()(torch.randn(1, 3, 12, 48, 40), 0.75)[1].shape == (1, 6 * 6 * 5, 192)
    detector = tiny(Detector)
    logits = detector(torch.zeros(2, 3, 8, 56, 99, dtype=torch.uint8), BOXES)  # a full frame
    logits.sum().backward()
    assert logits.shape == (3, 4) and all(p.grad.isfinite().all() for p in detector.parameters())
    space, time = torch.randn(1, 9, 2), torch.randn(1, 4, 2)
    image = F.interpolate(space.mT.view(1, 2, 3, 3), size=(6, 5), mode="bicubic")[0]
    line = F.interpolate(time.mT, size=7, mode="linear")[0]
    expected = line[:, :, None, None] + image[:, None]  # (D, t, h, w)
    assert_close(m.position_table(space, time, (7, 6, 5)), expected.flatten(1).mT)


def test_sines_have_wavelengths_from_4_to_4n_for_rows_then_columns_and_for_time():
    mae = tiny(img_size=40)
    m.start_from_sines(mae)
    tables = mae.state_dict()
    for name in ("pos_embed", "decoder_pos_embed"):
        time, space = tables[f"{name}_temporal"][0], tables[f"{name}_spatial"].view(5, 5, -1)
        rows, columns = space[:, 3].chunk(2, 1)[0], space[1].chunk(2, 1)[1]
        for table in time, rows, columns:
            waves = 4 * len(table) ** torch.linspace(0, 1, table.shape[1] // 2)
            angle = 2 * torch.pi * torch.arange(len(table))[:, None] / waves
            assert_close(table, torch.cat([angle.sin(), angle.cos()], 1))
    m.start_from_sines(tiny(decoder_embed_dim=18))  # any width will do


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_checkpointed_blocks_and_lie_as_parameters_do(kind):
    plain, again, calls = tiny(kind), tiny(kind, grad_checkpointing=True), []
    for model in (plain, again):
        model.blocks[0].register_forward_pre_hook(lambda block, _, model=model: calls.append(model))
        torch.manual_seed(0)
        loss_of(model, part=slice(1)).backward()  # with more clips, strides agree anyway
    assert calls == [plain, again, again]  # a block runs again in the backward pass
    for (key, p), q in zip(plain.named_parameters(), again.parameters()):
        assert p.grad.stride() == q.grad.stride() == p.stride(), key  # else DDP copies, and warns
        assert_close(p.grad, q.grad)


@pytest.mark.parametrize("kind", [Classifier, Detector])
def test_drop_path_rises_linearly_with_depth_keeps_the_mean_and_is_not_in_a_linear_probe(kind):
    model, x, grid = tiny(kind, depth=5, drop_path=0.6), torch.randn(2000, 2, 32), (1, 1, 1)
    for i, block in enumerate(model.blocks):
        torch.nn.init.zeros_(block.attn.proj.weight)  # leaves the other branch alone
        with torch.no_grad():
            branch, kept = block.eval()(x, grid) - x, block.train()(x, grid) - x
        dropped = kept.abs().amax((1, 2)) == 0
        assert dropped.float().mean().item() == pytest.approx(0.6 * i / 4, abs=0.04)
        expected = branch[~dropped] / (1 - 0.6 * i / 4)
        assert_close(kept[~dropped], expected, rtol=1e-3, atol=1e-4)
    model.freeze_encoder()
    assert torch.equal(block.train()(x, grid), block.eval()(x, grid))


@pytest.mark.parametrize("kind", [Classifier, Detector])
def test_dropout_stands_before_the_head_in_training_alone(kind):
    model, shares = tiny(kind, dropout=0.3), []
    model.head.register_forward_pre_hook(lambda _, x: shares.append((x[0] == 0).float().mean()))
    for training in (True, False):
        loss_of(model.train(training), 0)
    assert shares[0].item() == pytest.approx(0.3, abs=0.15) and shares[1] == 0


@pytest.mark.parametrize("frames", [4, 16, 32])  # 16 x 14 x 14 places are 56 x 56, or 8 x 392, too
def test_joint_positions_become_the_closest_separable_ones(frames, tmp_path):
    mae = tiny(img_size=112, num_frames=frames)
    state = {k: v for k, v in fuse_qkv(mae.state_dict()).items() if "pos_embed" not in k}
    state["pos_embed"] = torch.randn(1, 1 + math.prod(mae.grid), 32)
    state["decoder_pos_embed"] = torch.randn(1, 1 + math.prod(mae.grid), 16)
    torch.save({"model_state": state}, tmp_path / "pretrain.pyth")
    assert load_pretrained(mae, tmp_path / "pretrain.pyth") == []
    for key in ("pos_embed", "decoder_pos_embed"):
        one, space, time = (getattr(mae, f"{key}_{x}") for x in ("class", "spatial", "temporal"))
        assert torch.equal(one, state[key][:, :1])
        error = m.position_table(space, time, mae.grid) - state[key][0, 1:]
        error = error.unflatten(0, (mae.grid[0], -1))  # 0 on average, in space and in time
        assert error.mean(0).abs().max() < 1e-5 and error.mean(1).abs().max() < 1e-5
    if frames == 16:  # those of another model are of 8 steps, not 2 x 28 x 28
        other = tiny(img_size=112, num_frames=4)
        load_pretrained(other, tmp_path / "pretrain.pyth")
        assert_close(other.pos_embed_spatial, mae.pos_embed_spatial)


def test_a_video_of_one_repeated_image_gives_the_image_models_tokens(tmp_path):
    """An image MAE file: a 2D patch kernel, a joint position table, fused qkv (Table 3)."""
    source, kernel = tiny(Classifier).eval(), torch.randn(32, 3, 8, 8)
    joint, state = torch.randn(1, 17, 32), fuse_qkv(source.state_dict())
    state = {k: v for k, v in state.items() if "pos_embed" not in k and "head" not in k}
    state |= {"pos_embed": joint, "patch_embed.proj.weight": kernel, "mask_token": torch.ones(1)}
    torch.save({"model": state}, tmp_path / "image_mae.pth")
    image = torch.randn(1, 3, 32, 32)
    x = F.conv2d(image, kernel, state["patch_embed.proj.bias"], stride=8).flatten(2).mT
    x = torch.cat([state["cls_token"], x], 1) + joint  # the image model, written out
    for block in source.blocks:
        x = block(x, (1, 4, 4))
    classifier = tiny(Classifier, 1, num_frames=2).eval()  # one time step
    assert load_pretrained(classifier, tmp_path / "image_mae.pth") == ["head.weight", "head.bias"]
    video = image[:, :, None].expand(1, 3, 2, 32, 32)
    assert_close(classifier.forward_encoder(*classifier.patchify(video)), x, atol=1e-4, rtol=1e-4)
    load_pretrained(source, tmp_path / "image_mae.pth")
    assert (source.pos_embed_temporal == 0).all()


def test_loading_says_what_it_did_and_drops_the_head_of_another_class_count(tmp_path, capsys):
    old, same, other = tiny(Classifier), tiny(Classifier, 1), tiny(Classifier, num_classes=7)
    torch.save({"model": old.state_dict() | {"decoder_norm.bias": torch.ones(2)}}, tmp_path / "a")
    assert load_pretrained(other, tmp_path / "a") == ["head.weight", "head.bias"]
    said = "40 tensors loaded; left out: decoder_norm, head; not in it: head\n"
    with pytest.raises(m.InputError, match=r"head.weight is \[4, 32\], not \[7, 32\]"):
        load_pretrained(other, tmp_path / "a", strict=True)  # as tests and predictions need it
    assert len(other.state_dict()) == 42 and capsys.readouterr().out == f"{tmp_path}/a: {said}"
    args = Mock(init=tmp_path / "a", resume=False)
    for classifier in (other, same):
        assert m.resume(args, set(), classifier, None, None) == (0, None)
    assert 1e-5 < other.head.weight.std() < 3e-5
    assert torch.equal(same.head.weight, old.head.weight)


Code = type("Code", (), {"__reduce__": lambda self: (os.system, ("touch RAN",))})
ONES, OTHER_KIND = torch.ones(1, 1, 32), "is not a tensor of finite floats"
DAMAGED = "not a readable checkpoint: not a PyTorch file of nothing but tensors and plain values"
UNUSABLE = {  # a file: what it holds beside good weights, None instead of one; what is said
    "wide": (dict(cls_token=torch.ones(1, 1, 64)), r"does not fit.*cls_token is \[1, 1, 64\], not \[1, 1, 32\].*is --model"),
    "no_attention": ({"blocks.1.attn.q.weight": None}, "does not fit this model: blocks.1.attn.q.weight is missing"),
    "no_norm": ({"norm.weight": None}, "does not fit this model: norm.weight is missing"),
    "no_class_position": (dict(pos_embed=torch.ones(1, 64, 32)), "does not fit this model: "),
    "not_square": (dict(pos_embed_spatial=torch.ones(1, 15, 32)), "does not fit this model: "),
    "nan": (dict(cls_token=ONES * math.nan), f"cls_token {OTHER_KIND}"),
    "infinite": ({"norm.bias": torch.ones(32) * math.inf}, f"norm.bias {OTHER_KIND}"),
    "sparse": (dict(cls_token=ONES.to_sparse()), "does not fit this model: "),
    "complex": (dict(cls_token=ONES + 1j), f"cls_token {OTHER_KIND}"),
    "number": ({7: ONES}, "does not fit this model: expected string"),
    "a.safetensors": ({}, r"pip install safetensors, then convert it: torch.save\("),
    "only_a_step": ({"step": 3}, "does not fit this model: cls_token is missing"),
    "code": (dict(step=Code()), DAMAGED),
    "absent": ({}, "cannot be read: .*No such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_does_not_fit_or_holds_code_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (changes, said), path = UNUSABLE[name], tmp_path / name
    state = {} if "only" in name else tiny().state_dict()
    if name != "absent":
        torch.save({k: v for k, v in (state | changes).items() if v is not None}, path)
    with pytest.raises(m.InputError, match=f"^{path}: {said}") as caught:
        load_pretrained(tiny(), path)
    assert "\n" not in str(caught.value) and not Path("RAN").exists()
    assert isinstance(caught.value, m.DamagedError) == (DAMAGED in said)


@pytest.mark.parametrize("error, damaged", [
    (OSError(errno.EIO, "Input/output error"), False), (OSError(errno.EINVAL, "Invalid argument"), True),
    (RuntimeError("unable to mmap 4096 bytes from file <a.pt>: No such device (19)"), False),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), False),
    (RuntimeError("unable to open file <a.pt> in read-only mode: Too many open files (24), errno 24"), False),
    (MemoryError(), False), (EOFError("Ran out of input"), True),
])  # fmt: skip
def test_only_what_another_try_cannot_mend_is_damage(error, damaged, monkeypatch):
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    with pytest.raises(m.InputError, match="^a.pt: ") as caught:
        m.read_checkpoint("a.pt")
    assert isinstance(caught.value, m.DamagedError) == damaged and "\n" not in str(caught.value)


@pytest.mark.parametrize("stage, words", [
    (mae_pretrain, """lr=nan lr=inf lr=-1 epochs=-1 warmup_epochs=-1 weight_decay=-1 clip_grad=-1
        save_minutes=-1 keep_epochs=-1 mask_ratio=1"""),
    (finetune_cls, """drop_path=1 dropout=1 mask_start=1 layer_decay=1.5 label_smoothing=1.5
        random_erasing=1.5 mixup=-1 cutmix=-1"""),
    (finetune_ava, "drop_path=1 dropout=1 layer_decay=1.5"),
])  # fmt: skip
def test_numbers_of_no_use_are_refused_with_their_flag(stage, words, capsys):
    for word in words.split():
        with pytest.raises(SystemExit):
            stage.parse_args([f"--{word}"])
        assert f" --{word.split('=')[0]}: must be from 0 to " in capsys.readouterr().err


def test_relative_positions_change_nothing_at_the_start_and_are_resized_at_any_time(tmp_path):
    plain, small = tiny(Detector, 1, rel_pos=False), tiny(Detector)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")  # as pre-training leaves it
    tables = load_pretrained(small, tmp_path / "plain.pt")
    assert tables == [f"blocks.{i}.attn.rel_pos_{axis}" for i in (0, 1) for axis in "thw"]
    assert_close(small(VIDEO, BOXES), plain(VIDEO, BOXES))
    for table in tables:
        torch.nn.init.normal_(small.get_parameter(table))
    torch.save(small.state_dict(), tmp_path / "small.pt")
    large, video = tiny(Detector, 2, num_frames=12, img_size=40), torch.randn(2, 3, 12, 40, 40)
    assert load_pretrained(large, tmp_path / "small.pt") == []
    assert_close(small(video, BOXES), large(video, BOXES))  # small resizes its own, to the grid


def test_the_region_head_takes_the_highest_of_7_x_7_bins_of_normed_features_averaged_over_time():
    """Where features are ramps, the mean of a bin is the ramp at its middle."""
    detector, features, seen = tiny(Detector), torch.zeros(2, 4, 8, 10, 32), []
    y, x = torch.meshgrid(torch.arange(4.0, 68, 8), torch.arange(4.0, 84, 8), indexing="ij")
    features[1, ..., :4] = torch.stack([x, -x, y, -y], -1) + 1000  # at the middles of patches
    features += torch.tensor([5.0, -7, 3, -1]).view(4, 1, 1, 1)  # differ over time; mean 0
    detector.norm.register_forward_hook(lambda *args: features.flatten(1, 3))
    detector.head.register_forward_pre_hook(lambda head, args: seen.append(args[0]))
    boxes = torch.tensor([[8.0, 8, 40, 30], [13, 9, 14, 60], [3.3, 50.1, 5.2, 53.9]])
    boxes = torch.cat([boxes, boxes - 300, torch.tensor([[80.0, 10, 80, 20]])])  # no area
    detector(torch.zeros(2, 3, 8, 64, 80), [torch.zeros(0, 4), boxes])
    x1, y1, x2, y2 = boxes[:3].T
    w, h = (x2 - x1) / 14, (y2 - y1) / 14  # from a side of the box to the middle of a bin
    highest = [x2 - w, (-x1 - w).clamp(max=-4), y2 - h, -y1 - h]  # beyond x = 4 it is that of 4
    assert_close(seen[0][:3, :4], torch.stack(highest, 1) + 1000)
    assert (seen[0][3:] == 0).all() and (seen[0][:, 4:] == 0).all()  # outside; without area
