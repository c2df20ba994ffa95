"""The model against the paper's figures, other implementations, and what masking promises."""

import json
import math
import os
import pickle
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import model as m
from model import MAE, Classifier, Detector, load_pretrained, parameter_groups, patchify, unpatchify

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
ENCODER = dict(img_size=32, patch_size=8, num_frames=8, embed_dim=32, depth=2, num_heads=2)
DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
BOXES = [torch.tensor([[0.0, 0, 16, 20]]), torch.tensor([[3.0, 3, 30, 30], [-5, 0, 9, 20]])]
THREE_MODELS = {
    "MAE": lambda **more: tiny(**more),
    "Classifier": lambda **more: Classifier(4, **ENCODER, **more),
    "Detector": lambda **more: Detector(4, **ENCODER, **{"rel_pos": True} | more),
}


def tiny(**changes):
    torch.manual_seed(0)
    return MAE(**(ENCODER | DECODER | changes))


def clip(model):
    """Two random clips of the model's own size, uint8."""
    t, h, w = model.grid
    shape = (2, 3, t * model.t_patch_size, h * model.patch_size, w * model.patch_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def loss_of(network, mask_ratio=0.5, part=slice(2)):
    """A training loss of any of the three models, also in DDP, on a part of two random clips."""
    model = getattr(network, "module", network)
    video, noise = clip(model)[part], torch.rand(2, math.prod(model.grid))[part]
    if isinstance(model, MAE):
        return network(video, mask_ratio, noise)[0]
    if isinstance(model, Classifier):
        return F.cross_entropy(network(video, mask_ratio, noise), torch.tensor([1, 2])[part])
    return network(video, BOXES[part]).sigmoid().log().sum() / len(video)


def tensor(name, shape, std):
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(rng.standard_normal(tuple(shape)) * std).float()


def close(value, expected):
    assert_close(value.detach(), torch.tensor(expected), atol=1e-4, rtol=0)


def golden_case(name):
    """A golden case, its model, the weights for it under their released names, and its video."""
    case = GOLDEN[name]
    config, state = dict(case["config"]), {}
    seed, size = config.pop("seed"), (config["num_frames"], *2 * [config["img_size"]])
    for key, shape in case["state_dict_shapes"].items():
        small = "pos" in key or "token" in key or len(shape) == 1
        std = 0.1 if small else 0.5 / np.prod(shape[1:]) ** 0.5
        state[key] = tensor(seed + key, shape, std) + ("norm" in key and key.endswith("weight"))
    if config.pop("mask_ratio", None):
        model = MAE(norm_pix_loss=config.pop("norm_pix"), **config)
    else:
        model = Classifier(**config).eval()
    return case, model, state, tensor(seed + "input", (2, 3, *size), 1.0)


def fuse_qkv(state):
    """The same weights with queries, keys and values in one matrix, as most files have them."""
    state = dict(state)
    for key in [key for key in state if ".attn.q." in key]:
        parts = [state.pop(key.replace(".q.", f".{name}.")) for name in "qkv"]
        state[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return state


@pytest.mark.parametrize("name, layout", zip(["mae_norm_pix", "mae_raw_pix"], ["model", "model_state"]))  # fmt: skip
def test_mae_computes_what_the_released_code_computes(name, layout, tmp_path):
    case, mae, state, video = golden_case(name)
    torch.save({layout: state, "epoch": 3}, tmp_path / "released.pth")
    load_pretrained(mae, tmp_path / "released.pth")
    video[:, :, -2] = video[:, :, -1]
    rng = np.random.RandomState(zlib.crc32((case["config"]["seed"] + "noise").encode()))
    noise = torch.from_numpy(rng.rand(2, math.prod(mae.grid)).astype(np.float32))
    latents, parameters = [], dict(mae.named_parameters())
    mae.norm.register_forward_hook(lambda module, args, output: latents.append(output[:, 1:]))
    loss, pred, mask = mae(video, case["config"]["mask_ratio"], noise)
    loss.backward()
    assert latents[0].shape[1] == case["visible_tokens"]
    assert (mask[0] == 0).nonzero().flatten().tolist() == case["mask_first_sample_visible_ids"]
    assert list(pred.shape) == case["pred_shape"]
    close(loss, case["loss"])
    for key, value in {"latent": latents[0], "pred": pred}.items():
        close(value.flatten()[:8], case[f"{key}_first8"])
        close(value.abs().mean(), case[f"{key}_abs_mean"])
    for key, norm in case["grad_norms"].items():
        close(parameters[key].grad.norm(), norm)


@pytest.mark.parametrize("prefix", [None, "_orig_mod.module."])
def test_classifier_computes_what_the_released_code_computes(prefix, tmp_path):
    case, classifier, state, video = golden_case("vit")
    if prefix is not None:  # names of PySlowFast, which fuses qkv
        state = {k.replace("head.", "head.projection."): v for k, v in fuse_qkv(state).items()}
        state = {"model_state": {prefix + key: value for key, value in state.items()}}
    torch.save(state, tmp_path / "k400.pyth")
    assert not load_pretrained(classifier, tmp_path / "k400.pyth")["new"]
    close(classifier(video), case["logits"])


def test_relative_positions_compute_what_mvitv2_computes():
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


def test_schedule_is_the_released_one():
    golden = GOLDEN["lr_schedule"]
    for epoch, lr in golden["epoch_to_lr"]:
        ours = m.cosine_decay(epoch, golden["lr"], golden["warmup_epochs"], golden["epochs"])
        assert ours == pytest.approx(lr, abs=1e-11, rel=1e-6)


def test_layer_decay_groups_are_the_released_ones():
    classifier, ours = Classifier(10, **ENCODER | dict(embed_dim=64, depth=3)), {}
    for group in parameter_groups(classifier, 0.05, 0.75):
        assert len(group["names"]) == len(group["params"])
        ours |= {name: [group["lr_scale"], group["weight_decay"]] for name in group["names"]}
    assert ours == GOLDEN["layer_decay_0.75_wd_0.05_depth3"]


@pytest.mark.parametrize("size, frames, side, millions, gflops", [
    ("vit_b", 16, 224, 87, 180), ("vit_l", 16, 224, 304, 598), ("vit_h", 16, 224, 632, 1193),
    ("vit_l", 40, 312, None, 4757), ("vit_h", 32, 312, None, 6382),
])  # fmt: skip
def test_parameters_and_flops_are_those_of_table_7(size, frames, side, millions, gflops):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        classifier = Classifier(400, num_frames=frames, img_size=side, **m.SIZES[size])
        classifier(torch.empty(1, 3, frames, side, side))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.005)  # multiply-adds
    if millions:
        count = sum(p.numel() for p in classifier.parameters()) / 1e6
        assert count == pytest.approx(millions, rel=0.005)


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


def test_patchify_is_inverted_exactly_and_drops_the_remainder():
    video = torch.randint(0, 256, (2, 3, 9, 50, 39), dtype=torch.uint8)
    tubelets = m.patchify(video, 16, 2)
    assert tubelets.shape == (2, 4 * 3 * 2, 2 * 16 * 16 * 3)
    assert torch.equal(m.unpatchify(tubelets, (4, 3, 2), 16), video[:, :, :8, :48, :32])


@pytest.mark.parametrize("name", ["MAE", "Classifier"])
def test_hidden_pixels_never_reach_the_encoder(name):
    model, noise, latents = THREE_MODELS[name](), torch.rand(2, 64), []
    model.blocks[-1].register_forward_hook(lambda block, args, output: latents.append(output))
    tubelets = patchify(clip(model), 8, 2)
    hidden = torch.ones(2, 64, 1).scatter(1, noise.argsort(1)[:, :16, None], 0) == 1
    for changed in (hidden & False, hidden, ~hidden):
        video = unpatchify(torch.where(changed, 255 - tubelets, tubelets), model.grid, 8)
        model(video, 0.75, noise)
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])


def test_visible_targets_never_reach_the_loss():
    mae = tiny()
    loss, pred, mask = mae(clip(mae), 0.75, torch.rand(2, 64))
    pred.retain_grad()
    loss.backward()
    assert pred.grad[mask == 0].abs().max() == 0
    assert pred.grad[mask == 1].abs().min(dim=1).values.max() > 0


def test_target_is_the_first_frame_of_each_tubelet():
    mae = tiny(norm_pix_loss=False)
    video = clip(mae).float()
    tubelets = patchify(video, 8, 2)
    assert torch.equal(unpatchify(mae.patchify_target(tubelets), mae.grid, 8), video[:, :, ::2])
    mae = tiny(norm_pix_loss=False, pred_t_dim=8)
    assert torch.equal(unpatchify(mae.patchify_target(tubelets), mae.grid, 8), video)
    assert mae(video, 0.75)[1].shape == (2, 64, 2 * 8 * 8 * 3)
    with pytest.raises(ValueError, match="pred_t_dim"):
        tiny(pred_t_dim=5)


def test_the_target_of_a_flat_patch_is_0_and_of_a_nearly_flat_one_is_damped():
    mae, flat = tiny(norm_pix_loss=True), torch.full((1, 3, 8, 32, 32), 0.3)
    for video in flat, flat + 1e-3 * torch.randn(flat.shape):  # variances of 0 and about 1e-6
        pixels = patchify(video[:, :, ::2], 8, 1)
        variance, mean = torch.var_mean(pixels, -1, keepdim=True)
        expected = (pixels - mean) / (variance + 1e-6).sqrt()
        assert_close(mae.patchify_target(patchify(video, 8, 2)), expected)


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9, 0.95])
@pytest.mark.parametrize("mask_type", m.MASK_TYPES)
def test_masks_have_exact_counts_and_structure(mask_type, ratio):
    if mask_type == "time-only" and ratio > 0.875:
        with pytest.raises(ValueError, match="use a ratio from 0 to 0.875"):
            m.num_visible((8, 14, 14), ratio, mask_type)
        return
    unit = {"space-only": 8, "time-only": 196}.get(mask_type, 1)
    mae = MAE(embed_dim=8, depth=1, num_heads=1, mask_type=mask_type, **DECODER)
    _, _, mask = mae(torch.zeros(2, 3, 16, 224, 224), ratio)
    assert (mask == 0).sum(1).tolist() == 2 * [unit * int(1568 // unit * (1 - ratio))]
    assert not torch.equal(mask[0], mask[1])
    mask, by_chance = mask[0].view(8, 14, 14), 2 * ratio * (1 - ratio)
    differ = (mask[:, :, 1:] != mask[:, :, :-1]).float().mean().item()  # neighbours in a row
    if mask_type == "space-only":
        assert (mask == mask[:1]).all()
    elif mask_type == "time-only":
        assert (mask == mask[:, :1, :1]).all()
    elif mask_type == "block-wise":
        assert differ < 0.6 * by_chance
    else:
        assert differ == pytest.approx(by_chance, abs=0.06)


def test_any_input_size_runs_with_positions_resized():
    assert tiny()(torch.randn(1, 3, 12, 48, 40), 0.75)[1].shape == (1, 6 * 6 * 5, 192)
    detector = THREE_MODELS["Detector"]()
    logits = detector(torch.zeros(2, 3, 8, 56, 99, dtype=torch.uint8), BOXES)  # a full frame
    logits.sum().backward()
    assert logits.shape == (3, 4) and all(p.grad.isfinite().all() for p in detector.parameters())
    # A table that is linear in time and in space stays so away from the borders.
    rows = torch.arange(14.0).repeat_interleave(14).view(1, 196, 1)
    slope = m.resize_space(rows, (14, 14), (28, 28)).view(28, 28)[4:-4, 0].diff()
    assert_close(slope, torch.full((19,), 0.5), atol=0.1, rtol=0)
    slope = m.resize_time(torch.arange(8.0).view(1, 8, 1), 16)[0, 2:-2, 0].diff()
    assert_close(slope, torch.full((11,), 0.5))


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
    with pytest.raises(m.InputError, match="a width that 4 divides, not 18"):
        m.start_from_sines(tiny(decoder_embed_dim=18))


@pytest.mark.parametrize("clips", [1, 2])
@pytest.mark.parametrize("name", THREE_MODELS)
def test_gradients_are_those_of_checkpointed_blocks_and_lie_as_parameters_do(name, clips):
    """DDP warns of strides that differ from those of its buckets, and copies."""
    plain, again = THREE_MODELS[name](), THREE_MODELS[name](grad_checkpointing=True)
    again.load_state_dict(plain.state_dict())
    calls = []
    for model in (plain, again):
        model.blocks[0].register_forward_pre_hook(lambda block, _, model=model: calls.append(model))
        torch.manual_seed(0)
        loss_of(model, part=slice(clips)).backward()
    assert calls == [plain, again, again]  # a block runs again in the backward pass
    for (key, p), q in zip(plain.named_parameters(), again.parameters()):
        assert p.grad.stride() == q.grad.stride() == p.stride(), key
        assert_close(p.grad, q.grad)


@pytest.mark.parametrize("kind, rate", [(Classifier, 0.3), (Detector, 0.6)])
def test_drop_path_rises_linearly_with_depth_and_keeps_the_mean(kind, rate):
    torch.manual_seed(0)
    model, x = kind(4, drop_path=rate, **ENCODER | {"depth": 5}), torch.randn(2000, 1, 32)
    for i, block in enumerate(model.blocks):
        torch.nn.init.zeros_(block.attn.proj.weight)  # leaves the other branch alone
        with torch.no_grad():
            branch, kept = block.eval()(x, None) - x, block.train()(x, None) - x
        dropped = kept.abs().amax((1, 2)) == 0
        assert dropped.float().mean().item() == pytest.approx(rate * i / 4, abs=0.04)
        expected = branch[~dropped] / (1 - rate * i / 4)
        assert_close(kept[~dropped], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["Classifier", "Detector"])
def test_dropout_stands_before_the_head_in_training_alone(name):
    model, shares = THREE_MODELS[name](dropout=0.3), []
    zeros = lambda _, args: shares.append((args[0] == 0).float().mean())  # noqa: E731
    model.head.register_forward_pre_hook(zeros)
    for training in (True, False):
        loss_of(model.train(training), 0)
    assert shares[0].item() == pytest.approx(0.3, abs=0.15) and shares[1] == 0


def positions_of(state, key):
    return [state[f"{key}_{part}"] for part in ("class", "spatial", "temporal")]


@pytest.mark.parametrize("frames", [16, 32])  # 16 x 14 x 14 places are 56 x 56, too
@pytest.mark.parametrize("separable", [True, False])
def test_joint_positions_are_split_exactly_if_they_are_separable(separable, frames, tmp_path):
    """A pre-training file of PySlowFast: joint tables of positions, fused qkv, "model_state"."""
    config = dict(num_frames=frames, embed_dim=16, depth=1, num_heads=2) | DECODER
    source, loaded, joint = MAE(**config), MAE(**config), {}
    state, grid = source.state_dict(), source.grid
    for key in ("pos_embed", "decoder_pos_embed"):
        joint[key] = m.add_positions(*positions_of(state, key), grid, grid)  # (1, 1 + t*h*w, D)
        joint[key][:, 1:] += 0 if separable else torch.randn_like(joint[key][:, 1:])
    state = {k: v for k, v in fuse_qkv(state).items() if "pos_embed" not in k} | joint
    torch.save({"model_state": state}, tmp_path / "pretrain.pyth")
    report = load_pretrained(loaded, tmp_path / "pretrain.pyth")
    assert not report["new"] and not report["left out"]
    for key, table in joint.items():
        error = m.add_positions(*positions_of(loaded.state_dict(), key), grid, grid) - table
        assert (error.abs().max() < 1e-6) == separable
        error = error[:, 1:].unflatten(1, (grid[0], -1))  # 0 on average, in space and in time
        assert error.mean(1).abs().max() < 1e-5 and error.mean(2).abs().max() < 1e-5
    short = MAE(**config | dict(num_frames=4))  # 2 x 28 x 28 are as many, but 8 times likelier
    load_pretrained(short, tmp_path / "pretrain.pyth")
    assert_close(short.pos_embed_spatial, loaded.pos_embed_spatial)
    noise = torch.rand(2, math.prod(grid))
    one, other = (mae(clip(mae), 0.9, noise)[0] for mae in (source, loaded))
    assert torch.allclose(one, other, atol=1e-5) == separable


def test_a_video_of_one_repeated_image_gives_the_image_models_tokens(tmp_path):
    """An image MAE file: a 2D patch kernel, a joint position table, fused qkv (Table 3)."""
    source, kernel = Classifier(5, **ENCODER).eval(), torch.randn(32, 3, 8, 8)
    joint, state = torch.randn(1, 17, 32), fuse_qkv(source.state_dict())
    state = {k: v for k, v in state.items() if "pos_embed" not in k and "head" not in k}
    state |= {"pos_embed": joint, "patch_embed.proj.weight": kernel, "mask_token": torch.ones(1)}
    torch.save({"model": state}, tmp_path / "image_mae.pth")
    image = torch.randn(1, 3, 32, 32)
    x = F.conv2d(image, kernel, state["patch_embed.proj.bias"], stride=8).flatten(2).mT
    x = torch.cat([state["cls_token"], x], 1) + joint  # the image model, written out
    for block in source.blocks:
        x = block(x, (1, 4, 4))
    classifier = Classifier(5, **ENCODER | {"num_frames": 2}).eval()  # one time step
    assert "mask_token" in load_pretrained(classifier, tmp_path / "image_mae.pth")["left out"]
    video = image[:, :, None].expand(1, 3, 2, 32, 32)
    tokens = classifier.forward_encoder(patchify(video, 8, 2), (1, 4, 4))
    assert_close(tokens, x, atol=1e-4, rtol=1e-4)
    load_pretrained(source, tmp_path / "image_mae.pth")
    assert (source.pos_embed_temporal == 0).all()


def test_loading_says_what_it_did_and_drops_the_head_of_another_class_count(tmp_path, capsys):
    old, same, other = (Classifier(count, **ENCODER) for count in (4, 4, 7))
    torch.save({"model": old.state_dict() | {"decoder_norm.bias": torch.ones(2)}}, tmp_path / "a")
    report = load_pretrained(other, tmp_path / "a")
    assert report["new"] == ["head.weight", "head.bias"]
    assert set(report["left out"]) == {*report["new"], "decoder_norm.bias"}
    assert set(report["loaded"]) == set(other.state_dict()) - set(report["new"])
    out = capsys.readouterr().out
    assert "2 tensors new: head\n" in out and "3 tensors left out: decoder_norm, head\n" in out
    m.start_from(other, tmp_path / "a")
    assert 1e-5 < other.head.weight.std() < 3e-5
    m.start_from(same, tmp_path / "a")
    assert torch.equal(same.head.weight, old.head.weight)


class Code:
    def __reduce__(self):
        return os.system, ("touch RAN",)


@pytest.mark.parametrize("name, changes, error", [
    ("tiny.pt", dict(embed_dim=64), r"does not fit.*cls_token is \[1, 1, 32\].*is --model"),
    ("tiny.pt", dict(depth=3), "does not fit this model: blocks.2.norm1.weight is missing"),
    ("text.pt", {}, r"not a readable checkpoint: not a PyTorch file"),
    ("code.pt", {}, r"not a readable checkpoint: it holds more than tensors"),
    ("pickle.pt", {}, r"not a readable checkpoint"),
    ("empty.pt", {}, "holds no weights"),
])  # fmt: skip
def test_what_does_not_fit_or_holds_code_is_refused(name, changes, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, code = {"model": tiny().state_dict()}, Code()
    contents = {"tiny.pt": state, "code.pt": state | {"step": code}, "empty.pt": {"epoch": 3}}
    for file, content in contents.items():
        torch.save(content, file)
    Path("text.pt").write_text("not a checkpoint")
    Path("pickle.pt").write_bytes(pickle.dumps(code))
    with pytest.raises(ValueError, match=f"/{name}: {error}") as caught:
        load_pretrained(tiny(**changes), f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value) and not Path("RAN").exists()


def attend_with_bias(attention, x, grid):
    """Relative positions as an N x N matrix that is added to the logits, from R of each pair."""
    place = torch.cartesian_prod(*map(torch.arange, grid))  # (N, 3)
    apart, R = place[:, None] - place, 0  # (N, N, 3)
    q, k, v = attention.project(x)
    for i, name in enumerate("thw"):
        table = m.resize_time(getattr(attention, f"rel_pos_{name}")[None], 2 * grid[i] - 1)[0]
        R = R + table[apart[..., i] + grid[i] - 1].to(q.dtype)  # (N, N, D / heads)
    bias = torch.einsum("bnqc,qkc->bnqk", q[:, :, 1:], R)
    bias = F.pad(bias, (1, 0, 1, 0))  # none for the class token
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attention.proj(x.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("grid", [(4, 3, 3), (4, 3, 5), (2, 6, 4)])  # the model's own, and others
def test_extended_q_and_k_equal_the_bias_matrix_but_need_none(grid, monkeypatch):
    attend = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    torch.manual_seed(0)
    attention, results = m.RelPosAttention(24, 3, (4, 3, 3)).double(), []
    for name in "thw":
        torch.nn.init.normal_(getattr(attention, f"rel_pos_{name}"))
    x = torch.randn(2, 1 + math.prod(grid), 24, dtype=torch.float64, requires_grad=True)
    for output in (attention(x, grid), attend_with_bias(attention, x, grid)):
        gradients = torch.autograd.grad(output.sin().sum(), [x, *attention.parameters()])
        results.append([output.detach(), *gradients])
    assert_close(*results, atol=1e-5, rtol=1e-5)  # fp32 when resizing
    ours, theirs = (call.kwargs.keys() for call in attend.call_args_list)
    assert "attn_mask" in theirs - ours  # no N x N matrix: flash kernels take it


def test_relative_positions_load_and_resize_do_not_decay_and_change_nothing_at_the_start(tmp_path):
    plain, small = Detector(4, **ENCODER), THREE_MODELS["Detector"]()
    torch.save(plain.state_dict(), tmp_path / "plain.pt")  # as pre-training leaves it
    tables = load_pretrained(small, tmp_path / "plain.pt")["new"]
    assert tables == [f"blocks.{i}.attn.rel_pos_{axis}" for i in (0, 1) for axis in "thw"]
    assert_close(small(clip(small), BOXES), plain(clip(small), BOXES))
    for group in parameter_groups(small, 0.05):
        assert group["weight_decay"] == 0 or not set(tables) & set(group["names"])
    large = Detector(4, rel_pos=True, **ENCODER | {"img_size": 48})
    table = torch.nn.init.normal_(small.blocks[0].attn.rel_pos_h)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    assert not load_pretrained(large, tmp_path / "small.pt")["new"]
    expected = F.interpolate(table.T[None], size=11, mode="linear")[0].T
    assert_close(large.blocks[0].attn.rel_pos_h, expected)


def test_the_region_head_takes_the_highest_of_7_x_7_bins_of_normed_features_averaged_over_time():
    """Where features are ramps, the mean of a bin is the ramp at its middle."""
    detector, features, seen = Detector(5, **ENCODER), torch.zeros(2, 4, 8, 10, 32), []
    y, x = torch.meshgrid(torch.arange(4.0, 68, 8), torch.arange(4.0, 84, 8), indexing="ij")
    features[1, ..., :4] = torch.stack([x, -x, y, -y], -1) + 1000  # at the middles of patches
    features += torch.tensor([5.0, -7, 3, -1]).view(4, 1, 1, 1)  # differ over time; mean 0
    detector.norm.register_forward_hook(lambda *args: features.flatten(1, 3))
    detector.head.register_forward_pre_hook(lambda head, args: seen.append(args[0]))
    boxes = torch.tensor([[8.0, 8, 40, 30], [13, 9, 14, 60], [3.3, 50.1, 5.2, 53.9]])
    boxes = torch.cat([boxes, boxes - 300, torch.tensor([[80.0, 10, 80, 20]])])  # no area
    logits = detector(torch.zeros(2, 3, 8, 64, 80), [torch.zeros(0, 4), boxes])
    x1, y1, x2, y2 = boxes[:3].T
    w, h = (x2 - x1) / 14, (y2 - y1) / 14  # from a side of the box to the middle of a bin
    highest = [x2 - w, (-x1 - w).clamp(max=-4), y2 - h, -y1 - h]  # beyond x = 4 it is that of 4
    assert_close(seen[0][:3, :4], torch.stack(highest, 1) + 1000)
    assert (seen[0][3:] == 0).all() and (seen[0][:, 4:] == 0).all()  # outside; without area
    numbered = F.pad(boxes, (1, 0), value=1)
    assert torch.equal(detector(torch.zeros(2, 3, 8, 64, 80), numbered), logits)
