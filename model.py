"""The model of "Masked Autoencoders As Spatiotemporal Learners" (arXiv:2205.09113), and what its weights need.

Read from top to bottom:

    tubelets and masking    a video becomes tokens of 2 x 16 x 16 pixels, 90 % of them are hidden    (section 3)
    the encoder             a plain ViT, on the visible tokens alone                                  (section 3)
    MAE                     encoder, small decoder, loss on the hidden tokens                         (section 3)
    Classifier              the same encoder, all tokens, averaged                                    (appendix A)
    Detector                the same encoder, a region head on each person's box                      (appendix A, AVA)
    weights                 loading from any layout, optimizer groups, schedule                       (Tables 5 and 6)
    runs                    arguments, processes, batches, the log, checkpoints: what keeps the weights of a run safe

Shapes: B clips, T x H x W their frames and pixels, (t, h, w) the grid of tokens, N = t * h * w of them, V visible,
D the width of the encoder. Parameter names are those of the released code, so its files load as they are.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ViT-B, L and H of the paper, and one for a laptop. All of the paper's use tubelets of 2 x 16 x 16 pixels. vit_demo's
# positions start from sines: with random ones its loss sits on a plateau for most of a run of a few minutes.
SIZES = {
    "vit_b": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_l": dict(embed_dim=1024, depth=24, num_heads=16),
    "vit_h": dict(embed_dim=1280, depth=32, num_heads=16),
    "vit_demo": dict(img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=2, sine_positions=True),
}
SGD_MOMENTUM = 0.9  # Tables 6a and 6b say SGD, and no more
PIXEL_MEAN, PIXEL_STD = 0.45, 0.225  # of each channel, for pixels in 0..1
CHECKPOINTS = "checkpoint.pt", "checkpoint_previous.pt"  # a run keeps two: one may be damaged on the disk
MASKINGS = ("agnostic", "space-only", "time-only", "block-wise")  # Figure 4


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was found and what to do."""


# ------------------------------------------------------------------------------------------- tubelets and masking


def patchify(video, patch_size, t_patch_size):
    """Cut a video into tubelets: (B, 3, T, H, W) -> (B, N, u*p*p*3) with u = t_patch_size, p = patch_size.

    Tokens are ordered by time, row, column; inside a token the numbers are ordered by frame, row, column, channel.
    What does not fill a whole tubelet at the end, the bottom or the right is dropped, as a strided convolution does.
    """
    B, C, T, H, W = video.shape
    u, p = t_patch_size, patch_size
    t, h, w = T // u, H // p, W // p
    if min(t, h, w) == 0:
        raise InputError(f"a clip of {T} x {H} x {W} is smaller than one tubelet of {u} x {p} x {p}")
    video = video[:, :, : t * u, : h * p, : w * p]
    return video.reshape(B, C, t, u, h, p, w, p).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(B, t * h * w, u * p * p * C)


def unpatchify(tubelets, grid, patch_size):
    """Put tubelets together again: (B, t*h*w, u*p*p*3) -> (B, 3, t*u, h*p, w*p); the inverse of patchify."""
    (t, h, w), p = grid, patch_size
    x = tubelets.reshape(len(tubelets), t, h, w, -1, p, p, 3).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(len(tubelets), 3, -1, h * p, w * p)


def normalize(pixels):
    """uint8 pixels to normalised floats; floats are taken to be normalised already."""
    return (pixels.float() / 255 - PIXEL_MEAN) / PIXEL_STD if pixels.dtype == torch.uint8 else pixels


def num_visible(grid, mask_ratio, masking="agnostic"):
    """How many of the t * h * w tokens stay: int(N * (1 - ratio)); in whole tubes or time steps where those are hidden.

    Raises InputError where the ratio is outside [0, 1) or leaves no token at all.
    """
    if not 0 <= mask_ratio < 1:
        raise InputError(f"mask ratio {mask_ratio} is outside [0, 1)")
    t, h, w = grid
    unit = {"space-only": t, "time-only": h * w}.get(masking, 1)  # tokens that are hidden together
    visible = unit * int(t * h * w // unit * (1 - mask_ratio))
    if visible == 0:
        raise InputError(
            f"{masking} masking of {t} x {h} x {w} tokens at ratio {mask_ratio} hides them all; "
            f"use less than {1 - unit / (t * h * w):.4g}"
        )
    return visible


def masking_noise(grid, mask_ratio, masking="agnostic", generator=None):
    """One number per token, (t*h*w,): the num_visible(...) smallest stay visible (section 3, Figure 4).

    agnostic: uniform over all tokens. space-only: the same places in every time step. time-only: whole time steps.
    block-wise: boxes, from a quarter of the grid to a little over half of it long in each direction, until enough is
    hidden.
    """
    t, h, w = grid
    if masking == "agnostic":
        return torch.rand(t * h * w, generator=generator)
    if masking == "space-only":
        return torch.rand(h * w, generator=generator).repeat(t)
    if masking == "time-only":
        return torch.rand(t, generator=generator).repeat_interleave(h * w)
    if masking != "block-wise":
        raise InputError(f"masking {masking!r} is none of {', '.join(MASKINGS)}")
    noise = torch.rand(grid, generator=generator)
    missing = t * h * w - num_visible(grid, mask_ratio, masking)
    while missing > 0:
        size = [int(torch.randint(max(1, n // 4), n // 2 + 2, (), generator=generator)) for n in grid]
        start = [int(torch.randint(n - s + 1, (), generator=generator)) for n, s in zip(grid, size)]
        block = torch.zeros(grid, dtype=torch.bool)
        block[tuple(slice(i, i + s) for i, s in zip(start, size))] = True
        fresh = (block & (noise < 1)).flatten().nonzero()[:missing, 0]  # the last box is cut to the exact count
        noise.view(-1)[fresh] += 1
        missing -= len(fresh)
    return noise.flatten()


# ---------------------------------------------------------------------------------------------------- the encoder


class TubeletEmbed(nn.Module):
    """The patch embedding, applied to tubelets that are already cut out: (B, V, u*p*p*3) -> (B, V, D).

    A strided convolution over the whole video would embed the hidden tokens too. The weight keeps the shape of
    Conv3d's, which is what checkpoints hold.
    """

    def __init__(self, patch_size, t_patch_size, embed_dim):
        super().__init__()
        size = (t_patch_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, embed_dim, kernel_size=size, stride=size)

    def forward(self, tubelets):
        weight = self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1)  # (D, 3, u, p, p) -> (D, u*p*p*3)
        return F.linear(tubelets, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention, with relative positions where the grid (t, h, w) of the tokens is given (Table 8).

    They are those of MViTv2 (arXiv:2112.01526, equation 4), shared by the heads: q . (R_t + R_h + R_w) is added to the
    logits of q and k, R by how far the two are apart in time, row and column; the class token has none.
    """

    def __init__(self, dim, num_heads, rel_pos_grid=None):
        super().__init__()
        self.num_heads, self.rel_pos = num_heads, rel_pos_grid is not None
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        for name, n in zip("thw", rel_pos_grid or ()):
            self.register_parameter(f"rel_pos_{name}", nn.Parameter(torch.zeros(2 * n - 1, dim // num_heads)))

    def forward(self, x, grid=None):
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scale, width = q.shape[-1] ** -0.5, v.shape[-1]
        if self.rel_pos:
            q, k, v = self.extend(q * scale, k, v, self.relative_logits(q[:, :, 1:], grid), grid)
            scale = 1.0
        x = F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :width]  # (B, heads, N, D / heads)
        return self.proj(x.transpose(1, 2).flatten(2))

    def relative_logits(self, q, grid):
        """q . R for each time, row and column a key may have: (B, heads, N, D / heads) -> (B, heads, N, t + h + w)."""
        logits, q = [], q.unflatten(2, grid)  # (B, heads, t, h, w, D / heads)
        for name, n, product in zip("thw", grid, ("bnthwc,tkc->bnthwk", "bnthwc,hkc->bnthwk", "bnthwc,wkc->bnthwk")):
            table = resize_time(getattr(self, f"rel_pos_{name}")[None], 2 * n - 1)[0]
            place = torch.arange(n, device=q.device)
            R = table[place[:, None] - place + n - 1]  # (n of q, n of k, D / heads)
            logits.append(torch.einsum(product, q, R.to(q.dtype)))
        return torch.cat(logits, -1).flatten(2, 4)

    @staticmethod
    def extend(q, k, v, logits, grid):
        """Make the dot product add the logits: they lengthen q, and where each key is, as 0s and one 1, lengthens k.

        So no N x N bias is ever held, and SDPA may take a flash kernel. Those want q, k and v equally wide, and a
        multiple of 8: zeros fill up.
        """
        t, h, w = grid
        place = torch.arange(t * h * w, device=k.device)
        place = (place // (h * w), place // w % h, place % w)
        one_hot = torch.cat([F.one_hot(at, n) for at, n in zip(place, grid)], -1).to(k.dtype)  # (N, t + h + w)
        one_hot = one_hot.expand(*k.shape[:2], -1, -1)
        fill = -(k.shape[-1] + t + h + w) % 8
        q = torch.cat([q, F.pad(logits, (0, 0, 1, 0))], -1)  # the class token, which comes first, has none
        k = torch.cat([k, F.pad(one_hot, (0, 0, 1, 0))], -1)
        return F.pad(q, (0, fill)), F.pad(k, (0, fill)), F.pad(v, (0, t + h + w + fill))


class Mlp(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block; in training, drop_path is the chance that a sample skips a branch."""

    def __init__(self, dim, num_heads, drop_path=0.0, rel_pos_grid=None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, num_heads, rel_pos_grid), Mlp(dim)
        from torchvision.ops import StochasticDepth  # where it is used: torchvision takes as long to load as torch

        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x, grid=None):
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def sines(n, dim):
    """(n, dim): sines and cosines of the positions 0..n-1, at wavelengths from 4 to 4 * n positions."""
    if dim % 2:
        raise InputError("positions that start from sines need widths of encoder and decoder that 4 divides")
    angle = torch.arange(n)[:, None] * torch.pi / 2 * n ** -torch.linspace(0, 1, dim // 2)
    return torch.cat([angle.sin(), angle.cos()], 1)


def resize_space(table, old, new):
    """Resize a table of positions in space: (1, h*w, D) on grid `old` = (h, w) -> (1, h'*w', D) on `new`, bicubic."""
    if tuple(old) == tuple(new):
        return table
    image = table.float().unflatten(1, old).permute(0, 3, 1, 2)
    return F.interpolate(image, size=tuple(new), mode="bicubic").flatten(2).mT


def resize_time(table, new):
    """Resize a table of positions along one direction: (1, n, D) -> (1, new, D), linear."""
    return table if table.shape[1] == new else F.interpolate(table.float().mT, size=new, mode="linear").mT


class VideoViT(nn.Module):
    """The encoder: a plain ViT over the tubelets it is given, with separable learned positions and a class token."""

    def __init__(self, img_size=224, patch_size=16, num_frames=16, t_patch_size=2, embed_dim=1024, depth=24,
                 num_heads=16, drop_path=0.0, rel_pos=False, sine_positions=False,
                 checkpoint_activations=False):  # fmt: skip
        super().__init__()
        self.patch_size, self.t_patch_size, self.sine_positions = patch_size, t_patch_size, sine_positions
        self.checkpoint_activations = checkpoint_activations  # keep less, compute blocks again going backward
        self.grid = (num_frames // t_patch_size, img_size // patch_size, img_size // patch_size)  # (t, h, w)
        if min(self.grid) == 0:
            raise InputError(
                f"clips of {num_frames} x {img_size} x {img_size} are smaller than a tubelet of {t_patch_size} x "
                f"{patch_size} x {patch_size}; see --num_frames and --img_size"
            )
        self.patch_embed = TubeletEmbed(patch_size, t_patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.add_positions("", embed_dim)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]  # stochastic depth rises linearly with depth
        rel_pos_grid = self.grid if rel_pos else None
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate, rel_pos_grid) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def add_positions(self, prefix, dim):
        t, h, w = self.grid
        for name, n in {"spatial": h * w, "temporal": t, "class": 1}.items():
            self.register_parameter(f"{prefix}pos_embed_{name}", nn.Parameter(torch.empty(1, n, dim)))

    def add_head(self, num_classes, dropout):
        """Dropout and a linear layer on the features, to fine-tune; also draws all weights."""
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.norm.normalized_shape[0], num_classes)
        self.init_weights()
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def init_weights(self):
        """Positions and tokens trunc_normal(0.02), linear layers Xavier-uniform, biases 0; norms as they come."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)
        t, h, w = self.grid
        for name, parameter in self.named_parameters():
            if "pos_embed" in name or "token" in name:
                nn.init.trunc_normal_(parameter, std=0.02)
            if self.sine_positions and name.endswith("pos_embed_temporal"):
                parameter.data = sines(t, parameter.shape[-1])[None]
            elif self.sine_positions and name.endswith("pos_embed_spatial"):
                rows, columns = (sines(n, parameter.shape[-1] // 2) for n in (h, w))
                both = [rows[:, None].expand(h, w, -1), columns.expand(h, w, -1)]
                parameter.data = torch.cat(both, -1).flatten(0, 1)[None]

    def grid_of(self, video):
        """The grid (t, h, w) of tokens of a video (B, 3, T, H, W)."""
        T, H, W = video.shape[2:]
        return T // self.t_patch_size, H // self.patch_size, W // self.patch_size

    def positions(self, prefix, grid):
        """Space and time added, class token first: (1, 1 + N, D). Resized where `grid` is not the model's own."""
        space, time, cls = (getattr(self, f"{prefix}pos_embed_{name}") for name in ("spatial", "temporal", "class"))
        space, time = resize_space(space, self.grid[1:], grid[1:]), resize_time(time, grid[0])
        return torch.cat([cls, (time[:, :, None] + space[:, None]).flatten(1, 2)], 1)

    def encode(self, tubelets, grid, ids=None):
        """Encode the given tubelets, and see nothing else: (B, V, u*p*p*3) -> (B, 1 + V, D), class token first.

        ids (B, V) are their places in the grid (t, h, w), counted by time, row, column; None: all N of them, in order.
        Without the final norm, which MAE applies to each token and a classifier to their average.
        """
        position = self.positions("", grid)
        at = position[:, 1:] if ids is None else F.embedding(ids, position[0, 1:])
        x = self.patch_embed(normalize(tubelets)) + at  # (B, V, D)
        x = torch.cat([(self.cls_token + position[:, :1]).expand(len(x), -1, -1), x], 1)  # (B, 1 + V, D)
        return self.through(self.blocks, x, grid)

    def through(self, blocks, x, grid):
        """Tokens through blocks; with checkpoint_activations only what lies between blocks is kept to go backward."""
        for block in blocks:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
        return x


# ------------------------------------------------------------------------------------------------------------ MAE


class MAE(VideoViT):
    """The masked autoencoder (section 3): encode the visible tubelets, decode all, compare the hidden ones.

    pred_t_dim: frames to predict in a clip; num_frames // t_patch_size (the default) predicts one time slice of each
    tubelet, its first frame, num_frames predicts whole tubelets. norm_pix_loss: each target patch is normalised by its
    own mean and deviation. The decoder's width and depth are those of Table 12; its heads are 64 wide.
    """

    def __init__(self, decoder_embed_dim=512, decoder_depth=4, decoder_num_heads=8, norm_pix_loss=True,
                 pred_t_dim=None, masking="agnostic", **encoder):  # fmt: skip
        super().__init__(**encoder)
        steps, frames = self.grid[0], self.grid[0] * self.t_patch_size
        pred_t_dim = pred_t_dim or steps
        if pred_t_dim not in (steps, frames):
            raise InputError(f"pred_t_dim is {pred_t_dim}; {steps} (a slice of each tubelet) or {frames} (all of it)")
        if masking not in MASKINGS:
            raise InputError(f"masking {masking!r} is none of {', '.join(MASKINGS)}")
        self.norm_pix_loss, self.masking = norm_pix_loss, masking
        self.pred_frames = pred_t_dim // steps  # frames predicted of each tubelet
        width = self.norm.normalized_shape[0]
        self.decoder_embed = nn.Linear(width, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_cls_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.add_positions("decoder_", decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.pred_frames * self.patch_size**2 * 3)
        self.init_weights()

    def decode(self, latent, visible, grid):
        """Predict every token from the visible ones: (B, 1 + V, D), their ids (B, V) -> (B, N, pred_frames*p*p*3)."""
        x = self.decoder_embed(latent[:, 1:])  # the encoder's class token ends here
        B, V, C = x.shape
        tokens = self.mask_token.to(x.dtype).expand(B, grid[0] * grid[1] * grid[2], C)
        x = tokens.scatter(1, visible[..., None].expand(B, V, C), x)  # visible tokens go back to their places
        x = torch.cat([self.decoder_cls_token.expand(B, 1, C), x], 1) + self.positions("decoder_", grid)
        x = self.through(self.decoder_blocks, x, grid)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def target(self, tubelets):
        """What the decoder has to predict of given tubelets: (B, K, u*p*p*3) -> (B, K, pred_frames*p*p*3)."""
        target = normalize(tubelets[..., : self.decoder_pred.out_features])  # frames come first inside a tubelet
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6).sqrt()
        return target

    def forward(self, video, mask_ratio=0.9, noise=None):
        """video (B, 3, T, H, W), uint8 or normalised floats -> loss, pred (B, N, pred_frames*p*p*3), mask (B, N).

        noise (B, N), from masking_noise: the tokens with the smallest stay visible; drawn here if it is not given.
        mask is 1 where a token is hidden. The loss is the mean squared error on the hidden tokens.
        """
        grid = self.grid_of(video)
        tubelets = patchify(video, self.patch_size, self.t_patch_size)  # (B, N, u*p*p*3)
        if noise is None:
            noise = torch.stack([masking_noise(grid, mask_ratio, self.masking) for _ in video]).to(video.device)
        keep = num_visible(grid, mask_ratio, self.masking)
        visible, hidden = noise.argsort(dim=1, stable=True).tensor_split([keep], dim=1)  # (B, V), (B, N - V)
        latent = self.norm(self.encode(tubelets.take_along_dim(visible[..., None], 1), grid, visible))  # (B, 1 + V, D)
        pred = self.decode(latent, visible, grid)  # (B, N, pred_frames*p*p*3)
        target = self.target(tubelets.take_along_dim(hidden[..., None], 1))  # (B, N - V, pred_frames*p*p*3)
        error = pred.take_along_dim(hidden[..., None], 1).float() - target
        loss = error.square().sum() / max(1, error.numel())  # 0 where nothing is hidden
        mask = torch.ones_like(noise).scatter(1, visible, 0)
        return loss, pred, mask


# ----------------------------------------------------------------------------------------------------- classifier


class Classifier(VideoViT):
    """The encoder fine-tuned to classify (appendix A): average the patch tokens, norm, dropout, linear."""

    def __init__(self, num_classes=400, dropout=0.0, **encoder):
        super().__init__(**encoder)
        self.add_head(num_classes, dropout)

    def forward(self, video, mask_ratio=0.0, noise=None):
        """video (B, 3, T, H, W), uint8 or normalised floats -> logits (B, num_classes).

        mask_ratio hides tokens in training (Table 11): those with the smallest noise (B, N) stay.
        """
        tubelets, grid, visible = patchify(video, self.patch_size, self.t_patch_size), self.grid_of(video), None
        if mask_ratio:
            visible = noise.argsort(dim=1)[:, : num_visible(grid, mask_ratio)]  # (B, V)
            tubelets = tubelets.take_along_dim(visible[..., None], 1)
        x = self.encode(tubelets, grid, visible)  # (B, 1 + V, D)
        return self.head(self.dropout(self.norm(x[:, 1:].mean(1))))


# ------------------------------------------------------------------------------------------------------- detector


class Detector(VideoViT):
    """The encoder fine-tuned to say what each person does: a region head on the last features (appendix A, AVA).

    Average the tokens over time, RoIAlign 7 x 7 on a person's box, maximum over space, dropout, linear: as SlowFast and
    MViTv2 adapt Faster R-CNN. One logit a class, each for its own sigmoid: a person does several things at once.
    """

    def __init__(self, num_classes=80, dropout=0.0, **encoder):
        super().__init__(**encoder)
        self.add_head(num_classes, dropout)

    def forward(self, video, boxes):
        """video (B, 3, T, H, W), uint8 or normalised floats, and boxes -> logits (K, num_classes), in their order.

        boxes, in pixels of the clip as x1, y1, x2, y2: a list of B tensors (K_i, 4), or one (K, 5) with the clip's
        number first. Any H and W: positions are resized. Boxes may reach beyond the clip.
        """
        tubelets, grid = patchify(video, self.patch_size, self.t_patch_size), self.grid_of(video)
        x = self.norm(self.encode(tubelets, grid)[:, 1:])  # (B, N, D)
        features = x.unflatten(1, grid).mean(1).permute(0, 3, 1, 2)  # (B, D, h, w)
        return self.classify(features, boxes)

    def classify(self, features, boxes):
        """The region head: features (B, D, h, w), boxes as in forward -> logits (K, num_classes)."""
        from torchvision.ops import roi_align

        regions = roi_align(features, boxes, output_size=7, spatial_scale=1 / self.patch_size, aligned=True)
        return self.head(self.dropout(regions.amax((2, 3))))  # (K, D, 7, 7) -> (K, D)


# -------------------------------------------------------------------------------------------------------- weights


def read_checkpoint(path):
    """Read a checkpoint, a file or a run's folder, to the CPU. Only tensors and plain values: no code in it can run.

    Raises InputError, naming the file, where it is missing, damaged or no checkpoint.
    """
    if Path(path).is_dir():
        path = Path(path) / CHECKPOINTS[0]
    try:
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):  # torch.load checks no sums
            raise ValueError(f"{damaged} in it is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises what the damage happens to hit: zip, pickle, key, end of file
        reason = str(error).split("\n")[0]
        reason = "it holds more than tensors and plain values" if "weights_only" in reason else reason
        raise InputError(f"{path}: not a checkpoint that can be read ({reason}); is the file whole?") from None


def to_official_names(state, model):
    """A state dict in any layout of the field, with the names and shapes of this model.

    Known: prefixes of DDP and torch.compile; fused qkv (PySlowFast, image MAE, timm); a 2D patch kernel, repeated over
    time and divided by its length; a joint table of positions, split into class and space, time 0 (Table 3); the norm
    before the head called fc_norm; PySlowFast's head.projection.
    """
    u, out = model.t_patch_size, {}
    for key, value in state.items():
        key = re.sub(r"^((module|_orig_mod)\.)+", "", key).replace("head.projection.", "head.")
        if key.startswith("fc_norm."):
            key = key.removeprefix("fc_")
        if ".qkv." in key:
            out |= {key.replace("qkv", name): part for name, part in zip("qkv", value.chunk(3))}
        elif key == "patch_embed.proj.weight" and value.ndim == 4:
            out[key] = value[:, :, None].repeat(1, 1, u, 1, 1) / u
        elif key in ("pos_embed", "decoder_pos_embed"):
            time = torch.zeros(1, model.grid[0], value.shape[-1])
            out |= {key + "_class": value[:, :1], key + "_spatial": value[:, 1:], key + "_temporal": time}
        else:
            out[key] = value
    return out


def load_pretrained(model, path, state=None):
    """Load the weights in `path` into `model`, from every layout named in to_official_names; what is loaded is printed.

    state: what is in the file, where it has been read already.
    Positions are resized where sizes differ. Tensors outside the plain encoder (decoder, head, relative positions) may
    be missing, or be left out where they do not fit. Raises InputError where one of the encoder is missing or does not
    fit.
    Returns the names as {"loaded": [...], "left out": [...], "not found": [...]}.
    """
    state = read_checkpoint(path) if state is None else state
    made_by = state.get("args") if isinstance(state, dict) else None  # what made a checkpoint of this project
    size = f", {made_by['model']}" if isinstance(made_by, dict) and "model" in made_by else ""
    for key in ("model", "model_state", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not any(torch.is_tensor(value) for value in state.values()):
        raise InputError(f"{path}: holds no weights; expected a state dict, or one under 'model' or 'model_state'")
    state = to_official_names({k: v for k, v in state.items() if torch.is_tensor(v)}, model)
    own, loaded, left_out, misfits = model.state_dict(), {}, [], []
    for key, value in state.items():
        if key in own and key.endswith("pos_embed_spatial") and value.shape[1] != own[key].shape[1]:
            side = round(value.shape[1] ** 0.5)
            value = resize_space(value, (side, side), model.grid[1:])
        elif key in own and key.endswith("pos_embed_temporal"):
            value = resize_time(value, model.grid[0])
        elif key in own and ".rel_pos_" in key:
            value = resize_time(value[None], len(own[key]))[0]
        if key in own and value.shape == own[key].shape:
            loaded[key] = value
        else:
            left_out.append(key)
            if key in own:
                misfits.append(f"{key} is {tuple(value.shape)}, the model's {tuple(own[key].shape)}")
    optional = re.compile(r"head|decoder|mask_token|blocks\.\d+\.attn\.rel_pos").match
    misfits = [text for text in misfits if not optional(text)]
    not_found = [key for key in own if key not in loaded]
    missing = [key for key in not_found if not optional(key) and key not in left_out]
    if misfits or missing:
        raise InputError(
            f"{path}: does not fit this model: {len(misfits)} tensors of another shape ({'; '.join(misfits[:2])}), "
            f"{len(missing)} missing ({', '.join(missing[:2])}). Is --model the size that it was trained with{size}?"
        )
    model.load_state_dict(loaded, strict=False)
    report = {"loaded": list(loaded), "left out": left_out, "not found": not_found}
    groups = {name: sorted({key.split(".")[0] for key in keys}) for name, keys in report.items()}
    print(f"{path}: " + "; ".join(f"{n} {len(report[n])} tensors ({', '.join(g)})" for n, g in groups.items() if g))
    return report


def start_from(model, path):
    """Load weights to train on from; a head that is new starts near zero, so that the first steps keep the encoder."""
    if "head.weight" in load_pretrained(model, path)["not found"]:
        nn.init.trunc_normal_(model.head.weight, std=2e-5)


def parameter_groups(model, weight_decay, layer_decay=1.0):
    """Parameters with equal settings, for an optimizer: dicts of params, names, weight_decay, lr_scale (appendix A).

    No weight decay on biases, norms, tokens and positions. Layer-wise decay: layer 0 is patch embedding, class token
    and positions, block i is layer i + 1, and layer l learns at layer_decay ** (depth + 1 - l) of the full rate;
    norm, head and decoder learn at the full rate.
    """
    depth, groups = len(model.blocks), {}
    for name, parameter in model.named_parameters():
        layer = depth + 1
        if name.startswith(("patch_embed", "cls_token", "pos_embed")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        decays = parameter.ndim > 1 and not any(part in name for part in ("token", "pos_embed", "rel_pos"))
        key = layer_decay ** (depth + 1 - layer), weight_decay if decays else 0.0
        group = groups.setdefault(key, dict(params=[], names=[], lr_scale=key[0], weight_decay=key[1]))
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def make_optimizer(recipe, model, args, layer_decay=1.0):
    """The optimizer of a recipe, over parameter_groups, at the learning rate and weight decay that args say."""
    groups, momentum = parameter_groups(model, args.weight_decay, layer_decay), recipe.get("optimizer momentum")
    momentum = {"betas": momentum} if momentum else {"momentum": SGD_MOMENTUM}
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return recipe["optimizer"](groups, lr=args.lr, fused=fused, **momentum)


def cosine_decay(epoch, lr, warmup_epochs, epochs):
    """Linear warm-up, then half a cosine to 0; epochs are effective and may be fractions (Tables 5 and 6)."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


# ----------------------------------------------------------------------------------------------------------- runs

# Arguments that may change when a run is resumed: on where files are, how fast it runs, or the test alone.
MAY_CHANGE = {"stage", "given", "resume", "output_dir", "data", "videos", "num_workers", "micro_batch",
              "max_failures", "log_every", "save_minutes", "device", "compile", "checkpoint_activations", "views",
              "save_scores", "boxes", "ground_truth", "excluded", "action_list", "test_crop", "capacity",
              "video_start"}  # fmt: skip
# The rows of a recipe that are arguments: what the table says is their default.
ROWS = {
    "weight_decay": "weight decay",
    "lr": "learning rate",
    "warmup_epochs": "warmup epochs",
    "epochs": "epochs",
    "repeats": "repeated sampling",
    "batch_size": "batch size",
    "clip_grad": "gradient clipping",
    "mixup": "mixup",
    "cutmix": "cutmix",
    "label_smoothing": "label smoothing",
    "drop_path": "drop path",
    "dropout": "dropout",
    "layer_decay": "layer-wise decay",
}
# What numbers on the command line may be, at least and at most.
LIMITS = dict.fromkeys(
    ("log_every", "repeats", "num_frames", "img_size", "decoder_width", "decoder_heads"), (1, math.inf)
)
LIMITS |= dict.fromkeys(("seed", "num_workers", "sampling_rate", "save_minutes", "max_failures"), (0, math.inf))
LIMITS |= dict.fromkeys(("lr", "weight_decay", "clip_grad", "warmup_epochs", "mixup", "cutmix"), (0, math.inf))
LIMITS |= dict.fromkeys(("label_smoothing", "drop_path", "dropout", "layer_decay", "erasing", "crop"), (0, 1))
TIMEOUT = timedelta(minutes=10)  # that a process waits for the others, before it gives up


class Stopped(Exception):
    """A run was asked to stop, and has saved what it did."""


def run_stage(main):
    """Run a stage's main function; where it was asked to stop, or the user can fix the cause, one line says so.

    Of several processes, number 0 prints for all; each says its own errors.
    """
    name = Path(sys.argv[0]).name
    if os.environ.get("RANK", "0") != "0":
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # Also into a file or a pipe; and file names that are no text are printed in escapes, as stderr does.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main()
    except Stopped as stop:
        print(f"{name}: {stop}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; a run that has saved a checkpoint goes on from there with the same command")
    except (InputError, FloatingPointError) as error:
        sys.exit(f"{name}: error: {error}")
    except OSError as error:
        sys.exit(": ".join(map(str, filter(None, (name, "error", error.filename, error.strerror or error)))))
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        if reason.startswith("DataLoader worker"):  # may be raised anywhere: by a signal handler
            advice = "if memory ran out, take fewer --num_workers; the same command goes on"
            sys.exit(f"{name}: error: {reason.rstrip('. ')}; {advice}")
        if dist.is_initialized() and re.search("[Cc]onnection|[Tt]imed out|Broken pipe|NCCL|gloo", reason):
            sys.exit(f"{name}: error: another process has ended or does not answer; see what it says ({reason})")
        raise
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():  # after an error; they outlast the SIGTERM that Python sends
            worker.kill()
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads may still let go of tensors: Python aborts now and then when it ends under them


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves the docstring as it is, and ends an argument's help with its default, which the recipe may have given."""

    def _get_help_string(self, action):
        plain_switch = action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction)
        if plain_switch or action.default in (None, argparse.SUPPRESS) or "default:" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


def make_parser(doc, layouts):
    """A stage's parser: its docstring, the layouts of its data, and the arguments on model and run that all share."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [argument ...]; --help explains them all",
        description=doc,
        epilog="data:\n" + layouts,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", choices=SIZES, help="vit_l, but vit_demo for the demo")
    add("--init", metavar="CHECKPOINT", help="start from these weights: a file of this project, or see the README")
    add("--output_dir", help="default: runs/STAGE_DATASET_MODEL; to test, eval/ in --init's folder, else that folder")
    add("--resume", action=switch, default=True, help="go on from the checkpoint in --output_dir, if there is one")
    add(
        "--epochs",
        type=float,
        help="effective epochs: clips taken of each video in all, however many each time it is opened",
    )
    add("--warmup_epochs", type=float, help="effective epochs, too; scaled with --epochs, where these are fewer")
    add("--batch_size", type=int, help="videos in a step, over all GPUs, however many clips each gives")
    add("--micro_batch", type=int, help="videos that a GPU takes at once, if its memory is short; gradients add up")
    add("--lr", type=float, help="peak learning rate; scaled with --batch_size, unless it is given")
    add("--weight_decay", type=float, help="on matrices alone")
    add("--clip_grad", type=float, default=0.0, help="the gradient's norm is cut to this; 0: not at all")
    add("--seed", type=int, default=0, help="of weights, clips, masks and mixing; the same seed gives the same run")
    add("--log_every", type=int, default=10, metavar="STEPS", help="steps to a line of log.jsonl")
    add("--save_minutes", type=float, default=10, help="time between checkpoints, beside one after each pass")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 autocast if the hardware has it; vit_demo: fp32")
    add("--compile", action=switch, help="torch.compile the model; default: on a GPU")
    add("--checkpoint_activations", action=switch, help="compute blocks twice: slower, far less memory")
    return parser


def add_finetuning_arguments(parser):
    """The arguments that fine-tuning adds, whatever the task."""
    add = parser.add_argument
    add("--drop_path", type=float, help="chance that a clip skips the last block's branches; less in earlier blocks")
    add("--dropout", type=float, help="before the head")
    add("--layer_decay", type=float, help="learning rate of a layer as a share of the next one's; 0: a linear probe")
    add("--eval", action="store_true", help="do not train: test the checkpoint in --init")


def first_look(parser, argv, default="kinetics400"):
    """What the recipe, and so every other default, depends on: a command line's arguments, with dataset and model.

    These two, and the size of the model's clips, are made defaults here.
    """
    argv = sys.argv[1:] if argv is None else argv
    args, _ = parser.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])
    args.dataset = args.dataset or (dataset_of(args.data) if args.data else default)
    args.model = args.model or ("vit_demo" if args.dataset == "demo" else "vit_l")
    parser.set_defaults(dataset=args.dataset, model=args.model, img_size=SIZES[args.model].get("img_size", 224))
    return args


def dataset_of(data):
    """What a data set is called: as its folder; ssv2 where it is named, or laid out, as that is distributed."""
    path = Path(data).resolve()
    path = path.parent if path.is_file() else path
    path = path.parent if path.name in ("annotations", "labels") else path
    labels = any(next((path / folder).glob("*labels.json"), None) for folder in ("", "annotations", "labels"))
    return "ssv2" if labels or re.search("ssv2|something.something", path.name.lower()) else path.stem


def defaults_of(recipe):
    """The arguments that the rows of a recipe are: {name: value}."""
    return {name: recipe[row] for name, row in ROWS.items() if row in recipe}


def column(name, table, size, lr=None):
    """One model's column of a recipe: {row: value}. Rows without a value for it take ViT-L's, save the learning rate.

    Raises InputError where it gives no learning rate, and `lr` is None, too. name: of the recipe, for the message.
    """
    recipe = {}
    for row, value in table.items():
        if isinstance(value, dict) and row != "augmentation":
            if size not in value and row == "learning rate" and lr is None:
                raise InputError(f"{name} has no learning rate for {size}; give one with --lr")
            value = value.get(size, value["vit_l"])
        recipe[row] = value
    return recipe


def settle(args, recipe, stage, parser, argv):
    """Fill in what follows from other arguments: learning rate, warm-up, the run's folder, and which were given."""
    unset = object()
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    args.stage, args.given = stage, sorted(name for name, value in vars(given).items() if value is not unset)
    for name, (low, high) in LIMITS.items():
        values = vars(args).get(name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not low <= value <= high:
                raise InputError(f"--{name} {value}: must be {low} to {high}" if high < math.inf else
                                 f"--{name} {value}: must be at least {low}")  # fmt: skip
    if vars(args).get("crop") and not 0 < args.crop[0] <= args.crop[1]:
        raise InputError(
            f"--crop {args.crop[0]:g} {args.crop[1]:g}: shares of the frame, the smaller one first, above 0"
        )
    if "warmup_epochs" not in args.given:
        args.warmup_epochs = min(recipe["warmup epochs"], recipe["warmup epochs"] / recipe["epochs"] * args.epochs)
    if "lr" not in args.given:
        args.lr = recipe["learning rate"] * args.batch_size / recipe["batch size"]
    if args.precision is None and args.model == "vit_demo":
        args.precision = "fp32"  # for matrices this small, casts cost more than bf16 saves
    if args.output_dir is None:
        args.output_dir = f"runs/{stage}_{args.dataset}_{args.model}"
        if args.init and any(vars(args).get(use) for use in ("visualize", "predict", "eval")):
            folder = Path(args.init) if Path(args.init).is_dir() else Path(args.init).parent
            args.output_dir = str(folder / "eval" if vars(args).get("eval") else folder)


def cores():
    """How many of this machine's cores a process may take."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def keep_freed_memory():
    """Let the next tensor have the memory of a freed one: glibc would return it, and the kernel clear it, each time."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, MiB = -1, -3, 2**20
        if any(libc.mallopt(M_MMAP_THRESHOLD, most * MiB) for most in (1024, 32)):  # older versions take 32 at most
            libc.mallopt(M_TRIM_THRESHOLD, 1024 * MiB)


def start_process(args):
    """Join the processes that torchrun started, or run alone: (device, rank, world size)."""
    local, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"--device {args.device}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: there is no GPU that PyTorch can use")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, where autocast does not apply
    else:
        keep_freed_memory()
        if args.model == "vit_demo" and "OMP_NUM_THREADS" not in os.environ:
            # The other cores decode. Threads without a core of their own make the rest wait: a step takes 20 x as long.
            torch.set_num_threads(max(1, cores() // 2))
    if world > 1 and not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun's store outlives a restart, with what the dead wrote
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    return device, int(os.environ.get("RANK", 0)), world


def gather(value):
    """The values that all processes give, as a list on each of them; they wait for one another here."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def has_bf16(device):
    """Whether this device multiplies matrices in bfloat16 in hardware: elsewhere autocast would only be slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def split_batch(batch_size, world, micro_batch=None, at_most=None):
    """How one global batch is worked off: (videos a process takes at once, how many times it does in a step).

    micro_batch None: the largest that divides a process's share, and is not above `at_most`. Raises InputError where
    the batch does not divide, with sizes that would.
    """
    if batch_size < 1 or batch_size % world:
        fits = max(1, batch_size // world) * world
        raise InputError(
            f"--batch_size {batch_size} does not divide over {world} processes; {fits} or {fits + world} do"
        )
    share = batch_size // world
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    if micro_batch is None:
        micro_batch = max(n for n in divisors if n <= (at_most or share))
    if micro_batch not in divisors:
        raise InputError(
            f"--micro_batch {micro_batch} does not divide the {share} videos of a batch of {batch_size} that each of "
            f"{world} processes takes; these do: {', '.join(map(str, divisors))}"
        )
    return micro_batch, share // micro_batch


@contextlib.contextmanager
def writing(path):
    """Raise InputError where a run's file cannot be written, as on a full disk: names it, and the last checkpoint."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        while error.__context__:  # torch.save hides the first error behind its own
            error = error.__context__
        if not isinstance(error, OSError):
            raise error from None
        checkpoints = (path.parent / name for name in CHECKPOINTS)
        last = next((str(checkpoint) for checkpoint in checkpoints if checkpoint.exists()), "none")
        raise InputError(f"{path}: cannot be written: {error}. The last good checkpoint: {last}") from None


def save_checkpoint(folder, **content):
    """Write a run's checkpoint.pt, and keep the one before as checkpoint_previous.pt.

    It is written to a temporary file first, then renamed: a kill at any moment leaves a whole one. Raises as `writing`.
    """
    path, previous = (Path(folder) / name for name in CHECKPOINTS)
    temporary = path.with_suffix(".tmp")
    try:
        with writing(path), open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except InputError:
        temporary.unlink(missing_ok=True)
        raise
    if path.exists():
        os.replace(path, previous)
    os.replace(temporary, path)


def plan(args, videos, world, at_most=None):
    """How many steps a run takes, and how its batches are split: (steps, micro_batch, micro_steps)."""
    micro_batch, micro_steps = split_batch(args.batch_size, world, args.micro_batch, at_most)
    steps = round(args.epochs / args.repeats * len(videos) / args.batch_size)
    if steps < 1:
        raise InputError(
            f"{videos.source}: {args.epochs:g} epochs of {len(videos)} {videos.unit}, {args.repeats} clips at a time, "
            f"are less than one step of {args.batch_size}; take a smaller --batch_size or more --epochs"
        )
    return steps, micro_batch, micro_steps


def uses_bf16(args, device):
    """Whether to train in bf16 autocast: as --precision says, else where the hardware has it."""
    return (args.precision or ("bf16" if has_bf16(device) else "fp32")) == "bf16"


def autocast_of(args, device):
    """What opens the autocast that --precision asks for: a function without arguments."""
    return functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=uses_bf16(args, device))


def parallel(model, args, device, world):
    """Compile the model, on a GPU or where --compile asks for it, and wrap it in DDP, for several processes."""
    if args.compile or (args.compile is None and device.type == "cuda"):
        model.compile()
    if world == 1:
        return model
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def announce(args, model, videos, device, world, steps, micro_batch):
    """Say what a run is, and write it to args.json in its folder."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"videos_found": len(videos), "steps": steps, "processes": world, "torch": torch.__version__}
    (out / "args.json").write_text(json.dumps(vars(args) | facts, indent=1))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    precision = "bf16 autocast" if uses_bf16(args, device) else "fp32"
    print(f"{args.model}: {millions:.1f} M parameters, {precision} on {world} x {device.type}")
    unit, passes = videos.unit, args.epochs / args.repeats
    print(f"{videos.source}: {len(videos)} {unit}; {args.epochs:g} effective epochs are {passes:g} passes over it")
    print(f"{steps} steps of {args.batch_size} {unit} x {args.repeats} clips; learning rate {args.lr:.3g}")
    print(f"processes: {world}; {unit} at once on each: {micro_batch}")
    if device.type == "cpu" and args.model != "vit_demo":
        print(f"warning: on a CPU a step of {args.model} takes minutes; --model vit_demo is made for one")
    if rest := args.img_size % model.patch_size:
        print(f"warning: of --img_size {args.img_size}, {rest} rows and columns fill no patch and are dropped")


def find_checkpoint(folder):
    """The last checkpoint of a run that can be read, or None where it has none; says which is damaged."""
    paths = [path for name in CHECKPOINTS if (path := Path(folder) / name).exists()]
    for path in paths:
        try:
            return read_checkpoint(path)
        except InputError as error:
            print(f"warning: {error}")
    if paths:
        raise InputError(f"{folder}: no checkpoint in it can be read; --no-resume starts anew")
    return None


def find_run(args):
    """The checkpoint in args.output_dir to go on from, or None to start anew.

    Raises InputError where the folder holds a run of another stage, or one made with other arguments: it is not
    overwritten unless --no-resume says so.
    """
    folder = args.output_dir
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun: not to start anew once more
    run = find_checkpoint(folder) if args.resume or restarted else None
    if not run:
        own = [Path(folder), *(Path(folder) / name for name in CHECKPOINTS)]
        if args.init and Path(args.init).exists() and Path(args.init).resolve() in [path.resolve() for path in own]:
            raise InputError(f"--init {args.init}: --no-resume deletes what is in --output_dir; give another one")
        return None
    if run.get("stage") != args.stage:
        raise InputError(f"{folder}: a checkpoint of {run.get('stage')}; give this run another --output_dir")
    then, now = run["args"], vars(args)
    names = sorted(name for name in then.keys() | now.keys() if name not in MAY_CHANGE)
    differ = [f"--{name} was {then.get(name)}, is {now.get(name)}" for name in names if then.get(name) != now.get(name)]
    if differ:
        raise InputError(
            f"{folder}: from a run with other arguments ({'; '.join(differ)}). Give them as they were to go on, "
            "another --output_dir to keep that run, or --no-resume to overwrite it"
        )
    return run


def prepare(model, recipe, args, device, videos, layer_decay=1.0):
    """Resume the run in args.output_dir, or start one from --init or from random weights: (optimizer, steps done).

    Puts the model on the device. videos: the list that is trained on; says if it is another one than before.
    """
    run = find_run(args)
    if run:
        model.load_state_dict(run["model"])
    elif args.init:
        start_from(model, args.init)
    else:
        print("no --init: starting from random weights")
    optimizer = make_optimizer(recipe, model.to(device), args, layer_decay)
    if not run:
        return optimizer, 0
    optimizer.load_state_dict(run["optimizer"])
    print(f"{args.output_dir}: going on after step {run['step']}")
    if run["videos"] != videos.digest:
        print(f"warning: the list of videos is another one than before: {run['videos']}, now {videos.digest}")
    return optimizer, run["step"]


def restore(args, kind, config_of, seen):
    """The trained model in --init, of class `kind`: (model, its checkpoint, or {} for a file from elsewhere).

    A checkpoint of this stage says how to build it; for any other file config_of(args) does. seen: names of arguments
    on what the model was trained to see; where they are not given, those of the checkpoint count. Raises InputError
    where a weight is missing.
    """
    if not args.init:
        flag = next(name for name in ("visualize", "predict", "eval") if vars(args).get(name))
        raise InputError(f"--{flag} needs --init CHECKPOINT: the {kind.__name__} to use")
    checkpoint = read_checkpoint(args.init)
    if isinstance(checkpoint, dict) and checkpoint.get("stage") == args.stage:
        model, state = kind(**checkpoint["config"]), checkpoint["model"]
        vars(args).update((name, checkpoint["args"][name]) for name in seen if name not in args.given)
    elif isinstance(checkpoint, dict) and "stage" in checkpoint:
        raise InputError(f"{args.init}: a checkpoint of {checkpoint['stage']}; give one of {args.stage}")
    else:
        model, state, checkpoint = kind(**config_of(args)), checkpoint, {}
    missing = load_pretrained(model, args.init, state)["not found"]
    if missing:
        raise InputError(f"{args.init}: has no {missing[0]} of a {kind.__name__}; give a checkpoint of {args.stage}")
    return model, checkpoint


def bar_interval():
    """Seconds between two states of a progress bar: a terminal shows the last, a file keeps them all."""
    return 0.2 if sys.stderr.isatty() else 30.0


class Stop:
    """Whether a run is to stop: asked by SIGTERM, which schedulers send before they take a machine, or by Ctrl-C."""

    def __init__(self):
        self.asked = self.answer = None
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def close(self):
        """Leave the signals as they were."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.answer:
            self.answer[1].wait()

    def ask(self, number, _):
        if self.asked and number == signal.SIGINT:  # Ctrl-C again: at once
            raise KeyboardInterrupt
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # data workers may get the signal, too: their end is no error now
        self.asked = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":
            line = f"{self.asked}: stopping after this step; Ctrl-C again ends at once\n"
            os.write(sys.stderr.fileno(), line.encode())  # not print: the signal may have come in the midst of one

    def agreed(self):
        """Once a step: whether to stop now. All give the same answer, from the signals that were there a step before.

        They exchange it on the hosts, while the step goes on: no device waits. It also notices a process that ended.
        """
        if self.group is None:
            return bool(self.asked)
        stop = False
        if self.answer:
            flag, work = self.answer
            work.wait()
            stop = flag.item() > 0
        flag = torch.tensor(int(bool(self.asked)))
        self.answer = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True)
        return stop


class Log:
    """What the steps of a run give: a progress bar, a line of log.jsonl every few steps, and checkpoints.

    Losses and norms stay on the device in between: only where a line is written does the host wait for the device,
    and the processes for one another.
    """

    def __init__(self, args, start, steps, videos, failures):
        """start, steps: where the run begins and ends. videos: data.VideoList or Keyframes. failures: data.Failures."""
        self.args, self.done, self.steps, self.videos, self.failures = args, start, steps, videos, failures
        self.main = not dist.is_initialized() or dist.get_rank() == 0
        self.pending, self.indices, self.failed, self.waited = [], [], [], 0.0
        self.tick = self.saved = time.perf_counter()
        self.bar = tqdm(total=steps, initial=start, disable=not self.main, unit="step", mininterval=bar_interval())
        self.path = Path(args.output_dir) / "log.jsonl"
        self.stop, self.stopping = Stop(), False
        starts, lists = gather(start), gather((steps, videos.digest))
        if len(set(starts)) > 1:
            raise InputError(
                f"the processes start at steps {starts}: {args.output_dir} must be a folder that all machines share"
            )
        if len(set(lists)) > 1:
            raise InputError(
                f"the processes have different lists of {videos.unit}: is {videos.source} alike on all machines?"
            )
        if self.main and start == 0:  # else a restart would go on with the run that this one replaces
            for name in CHECKPOINTS:
                (self.path.parent / name).unlink(missing_ok=True)
        if self.main:  # lines that a stopped run wrote after its checkpoint are dropped
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
            self.path.write_text("".join(lines))

    def epoch(self, step):
        """The effective epoch after so many steps: how often each video has been sampled."""
        return step * self.args.batch_size * self.args.repeats / len(self.videos)

    def next(self, batches):
        """The next batch; takes the time that it keeps the training waiting, and what failed on the way."""
        asked = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - asked
        self.indices += batch["index"]
        self.failed += batch["failures"]
        return batch

    def step(self, loss, norm, **settings):
        """Take the loss and the gradient's norm of a step, and settings to log; True if a checkpoint is due.

        Checkpoints are due after a pass over the list, after --save_minutes by the clock of process 0, when the run is
        asked to stop, and at the end. Raises FloatingPointError, naming step and videos, where a loss or norm since the
        last line is not finite; on all processes, as they know of one another's.
        """
        self.pending.append((loss.detach(), norm.detach(), settings, self.indices))
        self.indices = []
        self.done += 1
        self.bar.update()
        self.stopping = self.stop.agreed()
        if self.done % self.args.log_every and self.done < self.steps and not self.stopping:
            return False
        values = torch.stack([torch.stack([loss, norm]) for loss, norm, *_ in self.pending]).tolist()
        late = time.perf_counter() - self.saved > 60 * self.args.save_minutes
        mine = dict(step=self.done, values=values, indices=[indices for *_, indices in self.pending])
        reports = gather(mine | dict(failed=self.failed, waited=self.waited, late=late))
        if any(report["step"] != self.done for report in reports):
            at = [report["step"] for report in reports]
            raise InputError(f"the processes are out of step, at {at}; were they started alike?")
        now, first = time.perf_counter(), self.done - len(self.pending)
        self.failures.add([failure for report in reports for failure in report["failed"]], write=self.main)
        self.check_finite(first, reports)
        losses = [sum(report["values"][i][0] for report in reports) / len(reports) for i in range(len(values))]
        seconds, clips = now - self.tick, len(values) * self.args.batch_size * self.args.repeats
        line = dict(step=self.done, epoch=self.epoch(self.done), loss=sum(losses) / len(losses)) | settings
        line |= dict(grad_norm=values[-1][1], clips_per_s=clips / seconds)
        line |= dict(data_wait=sum(report["waited"] for report in reports) / len(reports) / seconds)
        if self.main:
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        self.bar.set_postfix_str(
            "loss {loss:.4f}, lr {lr:.1e}, {clips_per_s:.0f} clips/s, data {data_wait:.0%}".format(**line),
            refresh=False,
        )
        passes = [step * self.args.batch_size // len(self.videos) for step in (first, self.done)]
        due = reports[0]["late"] or passes[0] < passes[1] or self.done == self.steps or self.stopping
        self.pending, self.failed, self.waited, self.tick = [], [], 0.0, now
        self.saved = now if due else self.saved
        return due

    def check_finite(self, first, reports):
        """Raise FloatingPointError where a loss or norm of the steps from `first` on is not finite."""
        for i, (*_, settings, _) in enumerate(self.pending):
            blamed = [report for report in reports if not math.isfinite(report["values"][i][0])]
            loss, norm = (blamed or reports)[0]["values"][i]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(
                    f"step {first + i}: loss {loss}, gradient norm {norm} ({settings}); what is saved in "
                    f"{self.args.output_dir} is from before. The videos of that step:\n"
                    + "\n".join(self.videos.name(j) for report in blamed or reports for j in report["indices"][i])
                )

    def close(self):
        self.bar.close()
        self.stop.close()
        if self.failures.known:
            unusable = f"{len(self.failures.known)} of {len(self.videos)} {self.videos.unit} could not be used"
            print(f"{unusable}; {self.failures.log} says which and why")

    def save(self, model, optimizer, **more):
        """Write a checkpoint, by process 0, and stop where that was asked for: raises Stopped, on all processes."""
        if self.main:
            content = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=self.done)
            content |= dict(stage=self.args.stage, args=vars(self.args), videos=self.videos.digest)
            save_checkpoint(self.args.output_dir, **content, **more)
        if self.stopping:
            without = "" if self.args.resume else ", without --no-resume,"
            gather(None)  # none leaves before the file is there: a launcher ends the rest when one has left
            raise Stopped(
                f"asked to stop ({self.stop.asked or 'another process was'}): saved after step {self.done} of "
                f"{self.steps} in {self.args.output_dir}; the same command{without} goes on from there"
            )
