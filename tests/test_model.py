"""The model against the paper's figures, against official implementations, and against what masking promises."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model as m

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def tensor(name, shape, std):
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(rng.standard_normal(tuple(shape)) * std).float()


def golden_state(case):
    """The weights of a golden case, rebuilt from their names."""
    state = {}
    for key, shape in case["state_dict_shapes"].items():
        small = "pos" in key or "token" in key or len(shape) == 1
        state[key] = tensor(case["config"]["seed"] + key, shape, 0.1 if small else 0.5 / np.prod(shape[1:]) ** 0.5)
        if "norm" in key and key.endswith("weight"):
            state[key] += 1
    return state


def golden_mae(name, tmp_path, layout="model"):
    """The golden case's model, video and noise; the weights pass through a file in the released layout."""
    case = GOLDEN[name]
    config = dict(case["config"])
    seed, ratio = config.pop("seed"), config.pop("mask_ratio")
    config["norm_pix_loss"] = config.pop("norm_pix")
    torch.save({layout: golden_state(case), "epoch": 3}, tmp_path / "released.pth")
    mae = m.MAE(**config)
    m.load_pretrained(mae, tmp_path / "released.pth")
    video = tensor(seed + "input", (2, 3, config["num_frames"], config["img_size"], config["img_size"]), 1.0)
    video[:, :, -2] = video[:, :, -1]
    tokens = np.prod(mae.grid)
    noise = np.random.RandomState(zlib.crc32((seed + "noise").encode())).rand(2, tokens).astype(np.float32)
    return case, mae, video, torch.from_numpy(noise), ratio


@pytest.mark.parametrize("layout", ["model", "model_state"])
@pytest.mark.parametrize("name", ["mae_norm_pix", "mae_raw_pix"])
def test_mae_computes_what_the_released_code_computes(name, layout, tmp_path):
    case, mae, video, noise, ratio = golden_mae(name, tmp_path, layout)
    latents = []
    mae.norm.register_forward_hook(lambda module, args, output: latents.append(output[:, 1:]))
    loss, pred, mask = mae(video, ratio, noise)
    loss.backward()

    def close(value, expected):
        torch.testing.assert_close(value.detach(), torch.tensor(expected), atol=1e-4, rtol=0)

    close(loss, case["loss"])
    assert latents[0].shape[1] == case["visible_tokens"]
    assert (mask[0] == 0).nonzero().flatten().tolist() == case["mask_first_sample_visible_ids"]
    close(latents[0].flatten()[:8], case["latent_first8"])
    close(latents[0].abs().mean(), case["latent_abs_mean"])
    assert list(pred.shape) == case["pred_shape"]
    close(pred.flatten()[:8], case["pred_first8"])
    close(pred.abs().mean(), case["pred_abs_mean"])
    parameters = dict(mae.named_parameters())
    for key, norm in case["grad_norms"].items():
        close(parameters[key].grad.norm(), norm)


def test_classifier_computes_what_the_released_code_computes(tmp_path):
    case = GOLDEN["vit"]
    config = dict(case["config"])
    seed = config.pop("seed")
    torch.save({"model": golden_state(case)}, tmp_path / "released.pth")
    classifier = m.Classifier(**config).eval()
    m.load_pretrained(classifier, tmp_path / "released.pth")
    video = tensor(seed + "input", (2, 3, config["num_frames"], config["img_size"], config["img_size"]), 1.0)
    torch.testing.assert_close(classifier(video), torch.tensor(case["logits"]), atol=1e-4, rtol=0)


def classifier_on_meta(size, **changes):
    with torch.device("meta"):
        return m.Classifier(num_classes=400, **(m.SIZES[size] | changes))


@pytest.mark.parametrize("size, millions", [("vit_b", 87), ("vit_l", 304), ("vit_h", 632)])
def test_parameters_are_those_of_table_7(size, millions):
    count = sum(p.numel() for p in classifier_on_meta(size).parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(
    "size, frames, side, gflops",
    [
        ("vit_b", 16, 224, 180),
        ("vit_l", 16, 224, 598),
        ("vit_h", 16, 224, 1193),
        ("vit_l", 40, 312, 4757),
        ("vit_h", 32, 312, 6382),
    ],
)
def test_flops_are_those_of_table_7(size, frames, side, gflops):
    classifier = classifier_on_meta(size, num_frames=frames, img_size=side)
    with FlopCounterMode(display=False) as counter:
        classifier(torch.empty(1, 3, frames, side, side, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.005)  # the paper counts multiply-adds


def tiny(**changes):
    torch.manual_seed(0)
    config = dict(img_size=32, patch_size=8, num_frames=8, embed_dim=32, depth=2, num_heads=2)
    config |= dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    return m.MAE(**(config | changes))


def clip(mae, batch=2, seed=0):
    t, h, w = mae.grid
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, t * mae.t_patch_size, h * mae.patch_size, w * mae.patch_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_hidden_pixels_never_reach_the_encoder():
    mae, noise = tiny(), torch.rand(2, 64)
    latents = []
    mae.norm.register_forward_hook(lambda module, args, output: latents.append(output))
    video = clip(mae)
    _, _, mask = mae(video, 0.75, noise)
    tubelets = m.patchify(video, 8, 2)
    changed = torch.where(mask[..., None] == 1, 255 - tubelets, tubelets)
    mae(m.unpatchify(changed, mae.grid, 8), 0.75, noise)
    assert not torch.equal(changed, tubelets)
    assert torch.equal(latents[0], latents[1])
    also_visible = torch.where(mask[..., None] == 0, 255 - tubelets, tubelets)
    mae(m.unpatchify(also_visible, mae.grid, 8), 0.75, noise)
    assert not torch.equal(latents[0], latents[2])


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_visible_targets_never_reach_the_loss(norm_pix_loss, monkeypatch):
    mae, noise = tiny(norm_pix_loss=norm_pix_loss), torch.rand(2, 64)
    video = clip(mae)
    loss, pred, mask = mae(video, 0.75, noise)
    # The loss written out from prediction and mask: only hidden tokens count, each as much as any other.
    target = mae.target(m.patchify(video, 8, 2))
    written_out = (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(loss, written_out)
    pred.retain_grad()
    loss.backward()
    assert pred.grad[mask == 0].abs().max() == 0
    assert pred.grad[mask == 1].abs().min(dim=1).values.max() > 0


def test_target_is_the_first_frame_of_each_tubelet():
    mae = tiny(norm_pix_loss=False)
    video = clip(mae).float()
    whole = m.unpatchify(mae.target(m.patchify(video, 8, 2)), mae.grid, 8)
    assert torch.equal(whole, video[:, :, ::2])
    mae = tiny(norm_pix_loss=False, pred_t_dim=8)
    assert torch.equal(m.unpatchify(mae.target(m.patchify(video, 8, 2)), mae.grid, 8), video)
    assert mae(video, 0.75)[1].shape == (2, 64, 2 * 8 * 8 * 3)
    with pytest.raises(ValueError, match="pred_t_dim"):
        tiny(pred_t_dim=5)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 0.9, 0.95])
@pytest.mark.parametrize("masking", m.MASKINGS)
def test_masks_have_exact_counts_and_structure(masking, ratio):
    grid = (8, 14, 14)
    if masking == "time-only" and ratio > 0.875:
        with pytest.raises(ValueError, match="less than 0.875"):
            m.num_visible(grid, ratio, masking)
        return
    visible = m.num_visible(grid, ratio, masking)
    expected = {
        "agnostic": int(1568 * (1 - ratio)),
        "block-wise": int(1568 * (1 - ratio)),
        "space-only": 8 * int(196 * (1 - ratio)),
        "time-only": 196 * int(8 * (1 - ratio)),
    }
    assert visible == expected[masking]
    mae = m.MAE(embed_dim=8, depth=1, num_heads=1, decoder_embed_dim=8, decoder_depth=1, masking=masking)
    _, _, mask = mae(torch.zeros(2, 3, 16, 224, 224), ratio)
    assert (mask == 0).sum(1).tolist() == [visible, visible]
    if ratio > 0:
        assert not torch.equal(mask[0], mask[1])
    mask = mask[0].view(grid)
    if masking == "space-only":
        assert (mask == mask[:1]).all()
    elif masking == "time-only":
        assert (mask == mask[:, :1, :1]).all()
    elif masking == "block-wise" and ratio:
        same = (mask[:, :, 1:] == mask[:, :, :-1]).float().mean()  # neighbours differ less
        assert 1 - same < 0.6 * 2 * ratio * (1 - ratio)  # than where each is drawn alone
    elif masking == "agnostic" and ratio:
        same = (mask[:, :, 1:] == mask[:, :, :-1]).float().mean().item()
        assert same == pytest.approx(ratio**2 + (1 - ratio) ** 2, abs=0.06)


def test_agnostic_masking_is_uniform_over_tokens():
    grid = (4, 4, 4)
    counts = torch.zeros(64)
    for seed in range(2000):
        noise = m.masking_noise(grid, 0.75, generator=torch.Generator().manual_seed(seed))
        counts[noise.argsort()[:16]] += 1
    assert (counts / 2000 - 0.25).abs().max() < 0.05  # 5 standard deviations


def test_patchify_is_inverted_exactly_and_drops_the_remainder():
    video = torch.randint(0, 256, (2, 3, 9, 50, 39), dtype=torch.uint8)
    tubelets = m.patchify(video, 16, 2)
    assert tubelets.shape == (2, 4 * 3 * 2, 2 * 16 * 16 * 3)
    assert torch.equal(m.unpatchify(tubelets, (4, 3, 2), 16), video[:, :, :8, :48, :32])
    assert torch.equal(tubelets[1, 7], video[1, :, 2:4, :16, 16:32].permute(1, 2, 3, 0).flatten())
    with pytest.raises(ValueError, match="smaller than one tubelet"):
        m.patchify(video[:, :, :, :10], 16, 2)


def test_embedding_tubelets_is_the_strided_convolution():
    embed = m.TubeletEmbed(8, 2, 16)
    video = torch.randn(2, 3, 8, 32, 32)
    convolved = embed.proj(video).flatten(2).mT
    torch.testing.assert_close(embed(m.patchify(video, 8, 2)), convolved, atol=1e-5, rtol=1e-5)


def test_any_input_size_runs_with_positions_resized():
    mae = tiny()
    assert mae(torch.randn(1, 3, 12, 48, 40), 0.75)[1].shape == (1, 6 * 6 * 5, 192)
    classifier = classifier_on_meta("vit_b")
    assert classifier.grid_of(torch.empty(1, 3, 16, 312, 312, device="meta")) == (8, 19, 19)
    assert classifier(torch.empty(1, 3, 16, 312, 312, device="meta")).shape == (1, 400)
    # A table that is linear in time and in space stays so away from the borders.
    t, h, w = 8, 14, 14
    rows = torch.arange(h).float()[:, None].expand(h, w).reshape(1, h * w, 1)
    resized = m.resize_space(rows, (h, w), (28, 28)).view(28, 28)
    torch.testing.assert_close(resized[4:-4, 0].diff(), torch.full((19,), 0.5), atol=0.1, rtol=0)
    torch.testing.assert_close(m.resize_time(torch.arange(t).float().view(1, t, 1), 16)[0, 2:-2, 0].diff(),
                               torch.full((11,), 0.5))  # fmt: skip


def test_init_is_the_papers():
    mae = m.MAE(embed_dim=256, depth=2, num_heads=4)
    for name, p in mae.named_parameters():
        if "pos_embed" in name or "token" in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" not in name:
            fan_out, fan_in = p.flatten(1).shape
            assert p.abs().max().item() == pytest.approx((6 / (fan_in + fan_out)) ** 0.5, rel=0.01), name
    classifier = m.Classifier(10, embed_dim=256, depth=1, num_heads=4)
    assert classifier.head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert classifier.norm.eps == 1e-6


def test_schedule_is_the_released_one():
    golden = GOLDEN["lr_schedule"]
    for epoch, lr in golden["epoch_to_lr"]:
        ours = m.cosine_decay(epoch, golden["lr"], golden["warmup_epochs"], golden["epochs"])
        assert ours == pytest.approx(lr, abs=1e-11, rel=1e-6)


def test_layer_decay_groups_are_the_released_ones():
    golden = GOLDEN["layer_decay_0.75_wd_0.05_depth3"]
    classifier = m.Classifier(10, img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4)
    ours = {}
    for group in m.parameter_groups(classifier, 0.05, 0.75):
        assert len(group["names"]) == len(group["params"])
        ours |= {name: [group["lr_scale"], group["weight_decay"]] for name in group["names"]}
    assert ours == golden


def test_checkpoints_that_do_not_fit_are_refused_by_name(tmp_path):
    torch.save({"model": tiny().state_dict()}, tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match=r"tiny.pt: does not fit.*Is --model"):
        m.load_pretrained(tiny(embed_dim=64), tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match=r"tiny.pt: does not fit.*missing \(blocks.2"):
        m.load_pretrained(tiny(depth=3), tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match="no such checkpoint"):
        m.load_pretrained(tiny(), tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="text.pt: not a checkpoint"):
        m.load_pretrained(tiny(), tmp_path / "text.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        m.load_pretrained(tiny(), tmp_path / "empty.pt")


def test_load_pretrained_reports_what_it_did(tmp_path, capsys):
    source = tiny()
    wanted = m.Classifier(5, img_size=32, patch_size=8, num_frames=8, embed_dim=32, depth=2, num_heads=2)
    torch.save({"model": source.state_dict()}, tmp_path / "mae.pt")
    report = m.load_pretrained(wanted, tmp_path / "mae.pt")
    assert set(report["not found"]) == {"head.weight", "head.bias"}
    assert all(name.startswith(("decoder", "mask_token")) for name in report["left out"])
    assert torch.equal(wanted.blocks[1].attn.q.weight, source.blocks[1].attn.q.weight)
    assert "not found 2 tensors (head)" in capsys.readouterr().out
