"""The model of "Masked Autoencoders As Spatiotemporal Learners" (arXiv:2205.09113).

Read from top to bottom:

    tubelets and masking   a video becomes tokens of 2 x 16 x 16 pixels; 90 % are hidden (section 3)
    encoder                a plain ViT that sees only the visible tokens                 (section 3)
    MAE                    encoder, small decoder, loss on the hidden tokens             (section 3)
    classifier             the same encoder on all tokens, averaged                     (appendix A)
    detector               the same encoder, a region head on each box         (appendix A, Table 8)
    weights                loading from any layout, parameter groups, schedule         (Tables 5, 6)
    training helpers       what the stages share: flags, processes, checkpoints, the log of a run

Shapes: B clips of T frames with H x W pixels; (t, h, w) is the grid of N = t * h * w tokens, V of
them visible; D is the width of the encoder. Parameter names are those of the released
code, so its files load as they are.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import math
import os
import re
import shutil
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
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import roi_align
from tqdm import tqdm

SIZES = {  # ViT-B, L and H of the paper, with tubelets of 2 x 16 x 16 pixels; and one for a laptop
    "vit_b": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_l": dict(embed_dim=1024, depth=24, num_heads=16),
    "vit_h": dict(embed_dim=1280, depth=32, num_heads=16),
    "vit_demo": dict(patch_size=8, embed_dim=128, depth=4, num_heads=2),
}
PIXEL_MEAN, PIXEL_STD = 0.45, 0.225  # of each channel, for pixels in 0..1


class InputError(ValueError):
    """Unusable input; the message says what was found and what to do."""


# -------------------------------------------------------------------------- tubelets and masking


def patchify(video, patch_size, t_patch_size):
    """Cut a video into tubelets of u x p x p pixels: (B, 3, T, H, W) -> (B, N, u*p*p*3).

    Tokens are ordered by time, row, column; a token's values by frame, row, column, channel.
    Frames, rows and columns that do not fill a whole tubelet are dropped, as in a strided
    convolution.
    """
    B, C, T, H, W = video.shape
    u = t_patch_size
    p = patch_size
    t = T // u
    h = H // p
    w = W // p
    video = video[:, :, : t * u, : h * p, : w * p].reshape(B, C, t, u, h, p, w, p)
    return video.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(B, t * h * w, u * p * p * C)


def unpatchify(tubelets, grid, patch_size):
    """The inverse of patchify: (B, t*h*w, u*p*p*3) -> (B, 3, t*u, h*p, w*p)."""
    (t, h, w), p = grid, patch_size
    x = tubelets.reshape(len(tubelets), t, h, w, -1, p, p, 3).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(len(tubelets), 3, -1, h * p, w * p)


def normalize(pixels):
    """uint8 pixels to normalised floats; floats must be normalised already."""
    if pixels.dtype != torch.uint8:
        return pixels
    return (pixels.float() / 255 - PIXEL_MEAN) / PIXEL_STD


def pick_rows(x, ids):
    """Each sample's rows with the given ids: (B, N, C), (B, K) -> (B, K, C).

    index_select copies whole rows; gather would look up an index for every element.
    """
    B, N, C = x.shape
    rows = ids + N * torch.arange(B, device=ids.device)[:, None]
    return x.reshape(B * N, C).index_select(0, rows.flatten()).view(B, -1, C)


def random_mask(grid, mask_ratio):
    """Agnostic: each token independently of the others."""
    return torch.rand(math.prod(grid))


def tube_mask(grid, mask_ratio):
    """Space-only: tubes, the same patches in all time steps."""
    t, h, w = grid
    return torch.rand(h * w).repeat(t)


def frame_mask(grid, mask_ratio):
    """Time-only: whole time steps."""
    t, h, w = grid
    return torch.rand(t).repeat_interleave(h * w)


def block_mask(grid, mask_ratio):
    """Block-wise: boxes whose sides are a quarter to just over half of the grid's."""
    boxes, level = 0, torch.zeros(grid)  # 0 outside the boxes; later boxes are lower
    while (level == 0).sum() > num_visible(grid, mask_ratio):
        box = ()
        for n in grid:
            size = int(torch.randint(max(1, n // 4), n // 2 + 2, ()))
            start = int(torch.randint(n - size + 1, ()))
            box += (slice(start, start + size),)
        boxes += 1
        level[box] = level[box].clamp(min=100_000 - boxes)
    return (torch.rand(grid) + level).flatten()  # the excess stays visible in the last box


# Figure 4. A mask function draws a number for each token, (N,), from torch's global generator: the
# num_visible smallest stay visible.
MASK_TYPES = {
    "agnostic": random_mask,
    "space-only": tube_mask,
    "time-only": frame_mask,
    "block-wise": block_mask,
}


def num_visible(grid, mask_ratio, mask_type="agnostic"):
    """How many tokens stay visible: int(N * (1 - ratio)), in whole tubes or time steps.

    Raises InputError if the ratio is outside [0, 1) or leaves no token.
    """
    t, h, w = grid
    unit = {"space-only": t, "time-only": h * w}.get(mask_type, 1)  # tokens hidden together
    visible = unit * int(t * h * w // unit * (1 - mask_ratio))
    if not 0 < visible <= t * h * w:
        raise InputError(
            f"--mask_ratio {mask_ratio} of {t} x {h} x {w} tokens, {mask_type}: "
            f"use a ratio from 0 to {1 - unit / (t * h * w):.4g}"
        )
    return visible


# --------------------------------------------------------------------------------------- encoder


class TubeletEmbed(nn.Module):
    """Patch embedding of tubelets that are already cut out: (B, V, u*p*p*3) -> (B, V, D).

    A strided convolution over the video would also embed the hidden tokens. The weight keeps
    Conv3d's shape, which is what checkpoints hold.
    """

    def __init__(self, patch_size, t_patch_size, embed_dim):
        super().__init__()
        size = (t_patch_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, embed_dim, kernel_size=size, stride=size)

    def forward(self, tubelets):
        weight = self.proj.weight.permute(0, 2, 3, 4, 1)  # (D, 3, u, p, p) -> (D, u, p, p, 3)
        return F.linear(tubelets, weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D). Only RelPosAttention looks at the grid."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, grid=None):
        q, k, v = self.project(x)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def project(self, x):
        """Queries, keys and values, each (B, heads, N, D / heads)."""
        layers = self.q, self.k, self.v
        return [f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in layers]


class Mlp(nn.Module):
    """Two linear layers with a hidden width of 4 * dim."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training a sample skips the branch with probability `rate`.

    The rate is a buffer because torch.compile would recompile every block for a float.
    """

    def __init__(self, rate):
        super().__init__()
        self.register_buffer("rate", torch.tensor(rate), persistent=False)

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.rate  # (B, 1, 1)
        return x * (keep / (1 - self.rate)).to(x.dtype)


class Block(nn.Module):
    """A pre-norm transformer block; drop_path=None: no stochastic depth."""

    def __init__(self, dim, num_heads, drop_path=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.mlp = Mlp(dim)
        self.drop_path = nn.Identity() if drop_path is None else DropPath(drop_path)

    def forward(self, x, grid):
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def resize_space(table, size, new_size):
    """Resize positions in space, bicubic: (1, h*w, D) of size (h, w) -> (1, h'*w', D)."""
    if tuple(size) == tuple(new_size):
        return table
    image = table.float().unflatten(1, size).permute(0, 3, 1, 2)
    return F.interpolate(image, size=tuple(new_size), mode="bicubic").flatten(2).mT


def resize_time(table, length):
    """Resize positions along one axis, linear: (1, n, D) -> (1, length, D)."""
    if table.shape[1] == length:
        return table
    return F.interpolate(table.float().mT, size=length, mode="linear").mT


def add_positions(cls, space, time, own_grid, grid):
    """Separable positions, class token first: (1, 1 + N, D); resized from the tables' own grid."""
    space = resize_space(space, own_grid[1:], grid[1:])
    time = resize_time(time, grid[0])
    places = (time[0, :, None] + space[0]).flatten(0, 1)  # (N, D)
    # cls[0], not cls: its gradient then has the strides DDP expects.
    return torch.cat([cls[0], places])[None]


class VideoViT(nn.Module):
    """The encoder: a plain ViT with separable learned positions and a class token.

    drop_path: stochastic depth, rising linearly from 0 in the first block to this in the last.
    grad_checkpointing: save memory by recomputing blocks in the backward pass.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        num_frames=16,
        t_patch_size=2,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        drop_path=0.0,
        grad_checkpointing=False,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.t_patch_size = t_patch_size
        self.embed_dim = embed_dim
        self.grad_checkpointing = grad_checkpointing
        side = img_size // patch_size
        t, h, w = self.grid = num_frames // t_patch_size, side, side
        if min(self.grid) == 0:
            raise InputError(
                f"clips of {num_frames} x {img_size} x {img_size} are smaller than a tubelet of "
                f"{t_patch_size} x {patch_size} x {patch_size}; see --num_frames and --img_size"
            )
        self.patch_embed = TubeletEmbed(patch_size, t_patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed_spatial = nn.Parameter(torch.empty(1, h * w, embed_dim))
        self.pos_embed_temporal = nn.Parameter(torch.empty(1, t, embed_dim))
        self.pos_embed_class = nn.Parameter(torch.empty(1, 1, embed_dim))
        rates = [drop_path * i / max(1, depth - 1) if drop_path else None for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def add_head(self, num_classes, dropout):
        """Dropout and a linear layer on the features, for fine-tuning."""
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.embed_dim, num_classes)

    def init_weights(self):
        """Positions, tokens, head: trunc_normal(0.02); other layers: Xavier-uniform, biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if re.search("pos_embed|token|^head.weight", name):
                nn.init.trunc_normal_(parameter, std=0.02)

    def patchify(self, video):
        """Cut a video (B, 3, T, H, W): tubelets (B, N, u*p*p*3), and their grid (t, h, w)."""
        T, H, W = video.shape[2:]
        grid = T // self.t_patch_size, H // self.patch_size, W // self.patch_size
        return patchify(video, self.patch_size, self.t_patch_size), grid

    def forward_encoder(self, tubelets, grid, ids=None):
        """Encode the given tubelets and no others: (B, V, u*p*p*3) -> (B, 1 + V, D).

        The class token comes first. ids (B, V): their positions in the grid, by time, row, column;
        None: all N in order. The final norm is left to the caller: MAE applies it to each token, a
        classifier to their average.
        """
        cls = self.pos_embed_class
        space = self.pos_embed_spatial
        time = self.pos_embed_temporal
        positions = add_positions(cls, space, time, self.grid, grid)  # (1, 1 + N, D)
        places = positions[:, 1:] if ids is None else F.embedding(ids, positions[0, 1:])
        x = self.patch_embed(normalize(tubelets)) + places  # (B, V, D)
        cls_token = (self.cls_token + positions[:, :1]).repeat(len(x), 1, 1)
        return self.forward_blocks(self.blocks, torch.cat([cls_token, x], 1), grid)

    def forward_blocks(self, blocks, x, grid):
        """Run tokens through blocks: (B, 1 + V, D) -> (B, 1 + V, D)."""
        for block in blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
        return x

    def freeze_encoder(self):
        """Train only the norm and the head: a linear probe."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(("norm.", "head.")))
        for block in self.blocks:
            block.drop_path = nn.Identity()  # features that do not change need no noise


def sines(n, dim):
    """(n, dim): sines and cosines of positions 0..n-1, at wavelengths from 4 to 4 * n."""
    angle = torch.arange(n)[:, None] * torch.pi / 2 * n ** -torch.linspace(0, 1, dim // 2)
    return torch.cat([angle.sin(), angle.cos()], 1)


def start_from_sines(model):
    """Initialise a model's positions in space and time with sines.

    From random ones, a small model's loss sits on a plateau for minutes.
    """
    t, h, w = model.grid
    for name, table in model.named_parameters():  # (1, h*w, D) or (1, t, D)
        dim = table.shape[-1]
        if "pos_embed" in name and dim % 4:
            raise InputError(f"sines need a width that 4 divides, not {dim}")
        if name.endswith("pos_embed_temporal"):
            table.data[0] = sines(t, dim)
        elif name.endswith("pos_embed_spatial"):
            rows = sines(h, dim // 2).repeat_interleave(w, 0)
            table.data[0] = torch.cat([rows, sines(w, dim // 2).repeat(h, 1)], 1)


# ------------------------------------------------------------------------------------------- MAE


class MAE(VideoViT):
    """The masked autoencoder (section 3): encode visible tubelets, decode all, score the hidden.

    pred_t_dim: frames to predict per clip; num_frames // t_patch_size, the default, predicts
    the first frame of each tubelet, num_frames whole tubelets. norm_pix_loss:
    normalise each target patch by its own mean and deviation. Table 12 gives the decoder's width
    and depth; its heads are 64 wide.
    """

    def __init__(
        self,
        decoder_embed_dim=512,
        decoder_depth=4,
        decoder_num_heads=8,
        norm_pix_loss=True,
        pred_t_dim=None,
        mask_type="agnostic",
        **encoder,
    ):
        super().__init__(**encoder)
        t, h, w = self.grid
        frames = t * self.t_patch_size
        dim = decoder_embed_dim
        if pred_t_dim not in (None, t, frames):
            raise InputError(
                f"pred_t_dim {pred_t_dim}: {t} predicts a slice of each tubelet, {frames} all of it"
            )
        if dim % decoder_num_heads:
            raise InputError(f"decoder width {dim} is not divisible by {decoder_num_heads} heads")
        self.norm_pix_loss = norm_pix_loss
        self.mask_type = mask_type
        self.pred_frames = (pred_t_dim or t) // t  # frames predicted of each tubelet
        self.decoder_embed = nn.Linear(self.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.decoder_cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.decoder_pos_embed_spatial = nn.Parameter(torch.empty(1, h * w, dim))
        self.decoder_pos_embed_temporal = nn.Parameter(torch.empty(1, t, dim))
        self.decoder_pos_embed_class = nn.Parameter(torch.empty(1, 1, dim))
        blocks = [Block(dim, decoder_num_heads) for _ in range(decoder_depth)]
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, self.pred_frames * self.patch_size**2 * 3)
        self.init_weights()

    def forward_decoder(self, latent, order, grid):
        """Predict every token from the visible ones: (B, 1 + V, D) -> (B, N, pred_frames*p*p*3).

        order (B, N): the ids of all tokens, visible ones first, as in latent.
        """
        x = self.decoder_embed(latent[:, 1:])  # drop the encoder's class token
        B, V, _ = x.shape
        mask_tokens = self.mask_token.to(x.dtype).repeat(B, order.shape[1] - V, 1)
        x = torch.cat([x, mask_tokens], 1)
        x = pick_rows(x, order.argsort(1))  # argsort inverts it: back in grid order, (B, N, C)
        x = torch.cat([self.decoder_cls_token[0].to(x.dtype).repeat(B, 1, 1), x], 1)
        x = x + add_positions(
            self.decoder_pos_embed_class,
            self.decoder_pos_embed_spatial,
            self.decoder_pos_embed_temporal,
            self.grid,
            grid,
        )
        x = self.forward_blocks(self.decoder_blocks, x, grid)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def patchify_target(self, tubelets):
        """The prediction target: (B, K, u*p*p*3) -> (B, K, pred_frames*p*p*3)."""
        target = normalize(tubelets[..., : self.decoder_pred.out_features])  # its first frames
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6).sqrt()
        return target

    def forward(self, video, mask_ratio=0.9, noise=None):
        """video (B, 3, T, H, W), uint8 or normalised floats -> loss, pred, mask.

        noise (B, N), from a mask function: the smallest stay visible; None: drawn here. The loss is
        the mean squared error on hidden tokens only. pred (B, N, pred_frames*p*p*3); mask (B, N)
        is 1 at hidden tokens.
        """
        tubelets, grid = self.patchify(video)  # (B, N, u*p*p*3)
        if noise is None:
            noise = torch.stack([MASK_TYPES[self.mask_type](grid, mask_ratio) for _ in video])
            noise = noise.to(video.device)
        order = noise.argsort(dim=1, stable=True)  # (B, N), the visible first
        keep = num_visible(grid, mask_ratio, self.mask_type)
        visible, hidden = order[:, :keep], order[:, keep:]  # (B, V), (B, N - V)
        latent = self.norm(self.forward_encoder(pick_rows(tubelets, visible), grid, visible))
        pred = self.forward_decoder(latent, order, grid)  # (B, N, pred_frames*p*p*3)
        target = self.patchify_target(pick_rows(tubelets, hidden))  # (B, N - V, pred_frames*p*p*3)
        error = pick_rows(pred, hidden).float() - target
        loss = error.square().sum() / max(1, error.numel())  # 0 if nothing is hidden
        mask = torch.ones_like(noise).scatter(1, visible, 0)
        return loss, pred, mask


# ------------------------------------------------------------------------------------ classifier


class Classifier(VideoViT):
    """The encoder fine-tuned to classify (appendix A): average the patch tokens, norm, linear."""

    def __init__(self, num_classes=400, dropout=0.0, **encoder):
        super().__init__(**encoder)
        self.add_head(num_classes, dropout)
        self.init_weights()

    def forward(self, video, mask_ratio=0.0, noise=None):
        """video (B, 3, T, H, W), uint8 or normalised floats -> logits (B, num_classes).

        mask_ratio hides tokens in training (Table 11): those with the smallest noise (B, N) stay.
        """
        tubelets, grid = self.patchify(video)
        visible = None
        if mask_ratio:
            noise = torch.rand(tubelets.shape[:2], device=video.device) if noise is None else noise
            order = noise.argsort(dim=1, stable=True)
            visible = order[:, : num_visible(grid, mask_ratio)]  # (B, V)
            tubelets = pick_rows(tubelets, visible)
        x = self.forward_encoder(tubelets, grid, visible)  # (B, 1 + V, D)
        return self.head(self.dropout(self.norm(x[:, 1:].mean(1))))


# -------------------------------------------------------------------------------------- detector


class RelPosAttention(Attention):
    """Attention with decomposed relative positions, for Table 8 (MViTv2, arXiv:2112.01526).

    q . (R_t + R_h + R_w) is added to the logit of q and k; R depends on their distance in time,
    rows and columns, and is shared by the heads. The class token has none.
    """

    def __init__(self, dim, num_heads, grid):
        super().__init__(dim, num_heads)
        t, h, w = grid
        self.rel_pos_t = nn.Parameter(torch.zeros(2 * t - 1, dim // num_heads))
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * h - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * w - 1, dim // num_heads))

    def forward(self, x, grid):
        """Append q's products with R to q, and one-hot positions of the keys to k.

        Their dot product is then the whole logit: no N x N bias is stored, and flash kernels work.
        These need q, k and v equally wide, a multiple of 8: hence the zero padding.
        """
        q, k, v = self.project(x)  # (B, heads, 1 + N, C) with C = D / heads
        C, (t, h, w) = v.shape[-1], grid
        place = torch.arange(t * h * w, device=x.device)
        places = zip((place // (h * w), place // w % h, place % w), grid)
        # Comparisons, not one_hot, which torch.compile would recompile for each frame size.
        ones = [at[:, None] == torch.arange(n, device=x.device) for at, n in places]
        ones = torch.cat(ones, -1).to(k.dtype).expand(*k.shape[:2], -1, -1)  # as products below
        products = self.relative_logits(q[:, :, 1:], grid)  # (B, heads, N, t + h + w)
        # Not -n % 8, which torch 2.6 miscompiles for dynamic sizes on a CPU.
        fill = 7 - (C + t + h + w - 1) % 8
        q = torch.cat([q * C**-0.5, F.pad(products, (0, fill, 1, 0))], -1)
        k = torch.cat([k, F.pad(ones, (0, fill, 1, 0))], -1)
        x = F.scaled_dot_product_attention(q, k, F.pad(v, (0, t + h + w + fill)), scale=1.0)
        return self.proj(x[..., :C].transpose(1, 2).flatten(2))

    def relative_logits(self, q, grid):
        """q . R for each time, row, column: (B, heads, N, C) -> (B, heads, N, t + h + w)."""
        q, logits = q.unflatten(2, grid), []  # (B, heads, t, h, w, C)
        for axis, n, table in zip("thw", grid, (self.rel_pos_t, self.rel_pos_h, self.rel_pos_w)):
            place = torch.arange(n, device=q.device)
            table = resize_time(table[None], 2 * n - 1)[0]
            R = table[place[:, None] - place + n - 1]  # (n, n of k, C)
            product = torch.einsum(f"bnthwc,{axis}kc->bnthwk", q, R.to(q.dtype))
            logits.append(product.flatten(2, 4))
        return torch.cat(logits, -1)


class Detector(VideoViT):
    """The encoder fine-tuned to tell what each person does (appendix A, AVA).

    Average the tokens over time, RoIAlign 7 x 7 on a person's box, maximum over space, dropout,
    linear, as SlowFast and MViTv2 adapt Faster R-CNN. Each class has its own sigmoid, since a
    person may do several things at once. rel_pos: relative positions in every block (Table 8).
    """

    def __init__(self, num_classes=80, dropout=0.0, rel_pos=False, **encoder):
        super().__init__(**encoder)
        for block in self.blocks if rel_pos else ():
            block.attn = RelPosAttention(self.embed_dim, block.attn.num_heads, self.grid)
        self.add_head(num_classes, dropout)
        self.init_weights()

    def forward(self, video, boxes):
        """video (B, 3, T, H, W), uint8 or normalised floats, and boxes -> logits (K, num_classes).

        boxes: x1, y1, x2, y2 in pixels of the clip, a list of B tensors (K_i, 4); they may extend
        beyond it. Any H and W: positions are resized.
        """
        tubelets, grid = self.patchify(video)
        x = self.norm(self.forward_encoder(tubelets, grid)[:, 1:])  # (B, N, D)
        features = x.unflatten(1, grid).mean(1).permute(0, 3, 1, 2)  # (B, D, h, w)
        scale = 1 / self.patch_size
        regions = roi_align(features, boxes, output_size=7, spatial_scale=scale, aligned=True)
        return self.head(self.dropout(regions.amax((2, 3))))  # (K, D, 7, 7) -> (K, D)


# --------------------------------------------------------------------------------------- weights

CHECKPOINTS = "checkpoint.pt", "checkpoint_previous.pt"  # a run keeps two: one may be damaged


def read_checkpoint(path, check=True):
    """Read a checkpoint, or the latest in a run's folder, to the CPU; no code in it can run.

    check: verify the file's checksums first, which reads all of it. Raises InputError if the file
    is missing, damaged or not a checkpoint.
    """
    path = Path(path) / CHECKPOINTS[0] if Path(path).is_dir() else Path(path)
    try:
        zipped = zipfile.is_zipfile(path)
        if check and zipped and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"its {damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except Exception as error:  # damage may hit anything: zip, pickle, key, end of file
        reason = str(error).split("\n")[0]
        if reason.startswith("Weights only load failed"):
            reason = (
                "it holds more than tensors and plain values" if zipped else "not a PyTorch file"
            )
        raise InputError(f"{path}: not a readable checkpoint: {reason}") from None


def to_official_names(state, grid, t_patch_size):
    """Convert a state dict in any common layout to the names and shapes used in this file.

    Handles prefixes of DDP and torch.compile; fused qkv (PySlowFast, image MAE, timm); a 2D patch
    kernel, repeated over time and divided by its length; a joint table of positions, split into
    class, space and time (Table 3: time is 0 for images); fc_norm; PySlowFast's head.projection.
    """
    out = {}
    of_images = any(k.endswith("proj.weight") and v.ndim == 4 for k, v in state.items())
    for key, value in state.items():
        key = re.sub(r"^((module|_orig_mod)\.)+", "", key)
        key = re.sub("^fc_norm", "norm", key)
        key = key.replace("head.projection.", "head.")
        if ".qkv." in key:
            out |= {key.replace("qkv", name): part for name, part in zip("qkv", value.chunk(3))}
        elif key == "patch_embed.proj.weight" and value.ndim == 4:
            out[key] = value[:, :, None].repeat(1, 1, t_patch_size, 1, 1) / t_patch_size
        elif key in ("pos_embed", "decoder_pos_embed"):
            table = value[:, 1:]
            t = 1
            if not of_images:
                # N / t is a square: prefer t = 8, then the model's, then the closest side.
                sides = {table.shape[1] / n**2: n for n in range(1, 100)}
                whole = [t for t in sides if t == int(t)]
                t = int(min(whole, key=lambda t: (t != 8, t != grid[0], abs(sides[t] - grid[1]))))
            table = table.unflatten(1, (t, -1))  # (1, t, h*w, D)
            out[key + "_class"], out[key + "_spatial"] = value[:, :1], table.mean(1)
            out[key + "_temporal"] = table.mean(2) - table.mean(1).mean(1)  # exact if separable
        else:
            out[key] = value
    return out


def load_pretrained(model, path):
    """Load weights in any layout that to_official_names handles, and print what was loaded.

    Positions are resized. Tensors outside the plain encoder (decoder, head, relative positions) may
    be missing or have another shape: the model keeps its own. Raises InputError if others are.
    Returns the names as {"loaded": [...], "left out": [...], "new": [...]}.
    """
    state = read_checkpoint(path)
    for key in ("model", "model_state", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else {}
    state = {key: value for key, value in state.items() if torch.is_tensor(value)}
    if not state:
        raise InputError(f"{path}: holds no weights; expected a state dict, or one under 'model'")
    own = model.state_dict()
    state = to_official_names(state, model.grid, model.t_patch_size)
    for key in own.keys() & state.keys():
        value = state[key]
        if key.endswith("pos_embed_spatial"):
            side = math.isqrt(value.shape[1])
            state[key] = resize_space(value, (side, side), model.grid[1:])
        elif key.endswith("pos_embed_temporal"):
            state[key] = resize_time(value, model.grid[0])
        elif ".rel_pos_" in key:
            state[key] = resize_time(value[None], len(own[key]))[0]
    loaded = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    new = [key for key in own if key not in loaded]
    optional = re.compile(r"head|decoder|mask_token|blocks\.\d+\.attn\.rel_pos").match
    for key in new:
        if not optional(key):
            found = list(state[key].shape) if key in state else "missing"
            raise InputError(
                f"{path}: does not fit this model: {key} is {found}, not {list(own[key].shape)}; "
                "is --model the size of the checkpoint?"
            )
    model.load_state_dict(loaded, strict=False)
    left_out = [key for key in state if key not in loaded]
    report = {"loaded": list(loaded), "left out": left_out, "new": new}
    for name, keys in report.items():
        groups = ", ".join(sorted({key.split(".")[0] for key in keys}))
        print_rank0(f"{path}: {len(keys) or 'no'} tensors {name}{': ' * bool(keys)}{groups}")
    return report


def start_from(model, path):
    """Load weights to train from; a new head starts near 0, so first steps spare the encoder."""
    if "head.weight" in load_pretrained(model, path)["new"]:
        nn.init.trunc_normal_(model.head.weight, std=2e-5)


def parameter_groups(model, weight_decay, layer_decay=1.0, decay_positions=False):
    """Group parameters by their settings, with names and lr_scale, for an optimizer (appendix A).

    No weight decay on biases and norms, and on tokens and positions only if asked for. Layer-wise
    decay: layer 0 is patch embedding, class token and positions, block i is layer i + 1, and layer
    l gets layer_decay ** (depth + 1 - l) of the rate; norm, head and decoder get all of it.
    """
    depth = len(model.blocks)
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = depth + 1
        if name.startswith(("patch_embed", "cls_token", "pos_embed")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        is_position = re.search("token|pos_embed|rel_pos", name)
        decays = parameter.ndim > 1 and (decay_positions or not is_position)
        scale = layer_decay ** (depth + 1 - layer)
        decay = weight_decay if decays else 0.0
        empty = dict(params=[], names=[], lr_scale=scale, weight_decay=decay)
        group = groups.setdefault((scale, decay), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def make_optimizer(args, groups):
    """AdamW, or SGD with Nesterov momentum 0.9, as in PySlowFast (the tables just say SGD)."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, args.lr, betas=tuple(args.betas), fused=True)


def cosine_decay(epoch, lr, warmup_epochs, epochs):
    """Linear warm-up, then half a cosine to 0, in effective epochs (Tables 5 and 6)."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


# ------------------------------------------------------------------------------ training helpers

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun
TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others
STOPPED = 128 + signal.SIGTERM  # exit status of a run that was asked to stop
RUN_FLAGS = {  # where and how fast to run: free to change on resume, not taken from a checkpoint
    "output_dir", "resume", "num_workers", "micro_batch", "max_failures", "log_interval",
    "save_minutes", "keep_epochs", "device", "compile", "grad_checkpointing",
}  # fmt: skip


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each flag's default, and the docstring verbatim."""


def bounded(kind, low, high=math.inf):
    """An argparse type: a number from low to high."""

    def number(text):
        if not low <= kind(text) <= high:
            limit = "" if high == math.inf else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"must be at least {low}{limit}")
        return kind(text)

    return number


natural, positive_int, fraction = bounded(int, 0), bounded(int, 1), bounded(float, 0, 1)


def make_parser(doc, layouts):
    """A parser with the flags all stages share; parse_twice fills in a recipe's values."""
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [flags]",
        description=doc,
        epilog="data layouts:\n" + layouts,
        formatter_class=HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("most used").add_argument
    add("--dataset", help="data set; demo: small videos, made on the spot")
    add("--data", help="folder or list of videos (layouts below); None: data/DATASET")
    add("--model", choices=SIZES, help="encoder size")
    add("--init", metavar="CHECKPOINT", help="checkpoint to start from, to test or to predict with")
    add("--epochs", type=float, help="effective epochs: how often each video is sampled")
    add("--output_dir", help="None: runs/STAGE_DATASET_MODEL, or beside --init to test and predict")

    add = parser.add_argument_group("clips").add_argument
    add("--videos", metavar="FOLDER", help="where the videos are, if not beside their list")
    add("--num_frames", type=positive_int, default=16, help="frames per clip")
    add(
        "--sampling_rate",
        type=natural,
        default=4,
        help="30ths of a second between frames; 0: a still",
    )
    add("--img_size", type=positive_int, default=224, help="height and width of a clip in pixels")
    add("--hflip", action=switch, default=True, help="flip half of the clips")

    add = parser.add_argument_group("recipe").add_argument
    add("--batch_size", type=positive_int, help="videos per step, over all GPUs")
    add("--lr", type=float, help="peak learning rate; the recipe's scales with --batch_size")
    add("--warmup_epochs", type=float, help="effective epochs; the recipe's shrink with --epochs")
    add("--weight_decay", type=float, help="not applied to biases and norms")
    add("--clip_grad", type=float, default=0.0, help="max gradient norm; 0 disables clipping")
    add("--seed", type=natural, default=0, help="random seed; the same seed gives the same run")
    add("--precision", choices=("bf16", "fp32"), help="None: bf16 where the hardware supports it")

    add = parser.add_argument_group("run").add_argument
    add("--resume", action=switch, default=True, help="resume from the checkpoint in --output_dir")
    add("--micro_batch", type=positive_int, help="videos a GPU takes at once; gradients accumulate")
    add(
        "--num_workers",
        type=natural,
        help="loader processes per GPU; None: its share of the cores",
    )
    add("--max_failures", type=natural, help="unreadable videos allowed; None: 1 %%, at least 4")
    add("--log_interval", type=positive_int, default=10, help="steps between lines of log.jsonl")
    add("--save_minutes", type=float, default=10, help="minutes between checkpoints")
    add("--keep_epochs", type=float, default=0, help="epochs between checkpoints to keep; 0: none")
    add("--device", help="cuda, cpu or mps; None: cuda if there is a GPU")
    add("--compile", action=switch, help="compile each block; None: on a GPU")
    add("--grad_checkpointing", action=switch, default=False, help="less memory, but slower")
    parser.set_defaults(sine_positions=False)
    return parser


def parse_twice(parser, stage, dataset, recipe_of, argv=None):
    """Parse once to find the defaults, then again with them.

    recipe_of(args): the recipe for args.dataset and args.model, a dict keyed by flags. With --eval
    and the like, a checkpoint's own arguments are the defaults instead.
    """
    args, _ = parser.parse_known_args(argv)
    modes = [mode for mode in ("eval", "predict", "visualize") if vars(args).get(mode)]
    use = modes[0] if modes else None
    defaults = {}
    if use and args.init:
        saved = read_checkpoint(args.init, check=False)
        if isinstance(saved, dict) and "stage" in dict(saved.get("args") or {}):
            defaults = saved["args"]
    if defaults.get("stage", stage) != stage:
        raise InputError(f"{args.init}: a checkpoint of {defaults['stage']}, not of {stage}")
    if defaults and (args.dataset or args.data):  # not the data it was trained on
        del defaults["data"], defaults["videos"]
    if not defaults:
        args.dataset = args.dataset or (Path(args.data).stem if args.data else dataset)
        args.model = args.model or ("vit_demo" if args.dataset == "demo" else "vit_l")
        defaults = column(recipe_of(args), args.model)
        defaults |= dict(dataset=args.dataset, model=args.model)
        if args.batch_size and defaults["lr"]:
            defaults["lr"] *= args.batch_size / defaults["batch_size"]
        if args.epochs:
            defaults["warmup_epochs"] *= min(1, args.epochs / defaults["epochs"])
    parser.set_defaults(**{n: defaults[n] for n in defaults if n not in RUN_FLAGS | {"init"}})
    parser.add_argument("-h", "--help", action="help", help="show this, with the recipe's values")
    args = parser.parse_args(argv)
    args.stage = stage
    if not use and args.lr is None:
        raise InputError(f"no learning rate for {args.model} in the recipe; give one with --lr")
    if args.output_dir is None:
        folder = Path(args.init or "")
        args.output_dir = f"runs/{stage}_{args.dataset}_{args.model}"
        if use and args.init:
            args.output_dir = str((folder if folder.is_dir() else folder.parent) / use)
    return args


def column(recipe, model):
    """One model's column of a recipe: fall back to ViT-L's, except for the learning rate."""
    values = dict(recipe)
    for name, value in recipe.items():
        if isinstance(value, dict):
            values[name] = value.get(model, None if name == "lr" else value["vit_l"])
    return values


def cores():
    """How many of this machine's cores a training process and its workers may take."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def keep_freed_memory():
    """Have glibc reuse freed memory: the kernel would zero it for each new tensor."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD = -1
        M_MMAP_THRESHOLD = -3
        MiB = 2**20
        if any(libc.mallopt(M_MMAP_THRESHOLD, size * MiB) for size in (1024, 32)):  # old glibc: 32
            libc.mallopt(M_TRIM_THRESHOLD, 1024 * MiB)


def start_process(args):
    """Join the processes that torchrun started, or run alone; returns the device.

    Fills in --precision and --compile to suit the device.
    """
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\n|\. ", str(error))[0]  # an unknown one lists dozens of backends
        raise InputError(f"--device {name}: cannot be used here: {reason}") from None
    has_bf16 = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 outside autocast
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        keep_freed_memory()
        has_bf16 = torch.cpu._is_avx512_bf16_supported()
        if args.model == "vit_demo" and "OMP_NUM_THREADS" not in os.environ:
            # The other cores decode; threads that share a core slow a step 20-fold.
            torch.set_num_threads(max(1, cores() // 2))
    args.precision = args.precision or ("bf16" if has_bf16 else "fp32")
    if args.compile is None:
        args.compile = device.type == "cuda"
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return device


def autocast(args, device):
    """bf16 where --precision says so; softmax and loss stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def print_rank0(text):
    """Print on process 0 alone."""
    if RANK == 0:
        print(text, flush=True)


def gather(value):
    """All processes' values, as a list on each of them; they wait for one another here."""
    if not dist.is_initialized():
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def on_rank0(function, *args):
    """Call a function on process 0 alone; all return its result, or raise its error."""
    result = None
    if RANK == 0:
        try:
            result = function(*args)
        except Exception as error:
            result = error
    result = gather(result)[0]
    if isinstance(result, Exception):
        raise result
    return result


def split_batch(args, num_videos, device, largest):
    """Split a global batch, and count the steps: (steps, micro-batches per step).

    Fills in --micro_batch. largest: {model: videos that a GPU has memory for}; a CPU takes one, but
    any number for vit_demo. Raises InputError with sizes that fit.
    """
    share, rest = divmod(args.batch_size, WORLD)
    if rest or args.batch_size > num_videos:
        fits = max(1, min(args.batch_size, num_videos) // WORLD) * WORLD
        shared = f"a multiple of the {WORLD} processes and " if WORLD > 1 else ""
        raise InputError(
            f"--batch_size {args.batch_size} must be {shared}at most the {num_videos} in the list; "
            f"{fits} would do"
        )
    most = largest.get(args.model, share)
    if device.type == "cpu" and args.model in largest:
        most = 1
    args.micro_batch = args.micro_batch or math.gcd(share, most)
    if share % args.micro_batch:
        fits = [n for n in range(1, share + 1) if share % n == 0]
        text = f"--micro_batch {args.micro_batch} does not divide {share} videos: {fits} do"
        raise InputError(text)
    steps = round(args.epochs / args.repeat_aug * num_videos / args.batch_size)
    if steps < 1:
        raise InputError(f"--epochs {args.epochs:g} of {num_videos} videos are less than one step")
    return steps, share // args.micro_batch


def compile_blocks(model):
    """torch.compile the model block by block: few graphs, whatever the number of visible tokens."""
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()


def count_flops(model_class, config, *inputs):
    """Training FLOPs per clip: three times a forward pass, counted from shapes alone."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = model_class(**config)
        T = config["num_frames"]
        side = config["img_size"]
        model(torch.empty(1, 3, T, side, side), *inputs)
    return 3 * counter.get_total_flops()


def print_plan(args, model, videos, steps, flops):
    """Print what a run will do, and what looks wrong with it."""
    if RANK > 0:
        return
    device = model.cls_token.device.type
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{args.model}: {millions:.1f} M parameters, {args.precision} on {WORLD} x {device}")
    print(f"{videos.source}: {len(videos)} {videos.unit}, {args.epochs:g} effective epochs")
    clips = f"{args.batch_size} {videos.unit} x {args.repeat_aug} clips, {args.micro_batch} at once"
    print(f"{steps} steps of {clips}; learning rate {args.lr:.3g}, warm-up {args.warmup_epochs:g}")
    if steps < 500:
        print("warning: so few steps teach little; try more --epochs or a smaller --batch_size")
    if rest := args.img_size % model.patch_size:
        print(f"warning: {rest} of {args.img_size} rows and columns fill no patch and are dropped")
    if flops and device == "cpu" and args.model != "vit_demo":
        gflop = flops * args.batch_size * args.repeat_aug / 1e9
        print(f"warning: a step is {gflop:,.0f} GFLOP, {gflop / 100:,.0f} s at 100 GFLOP/s")


@contextlib.contextmanager
def writing(path):
    """Raise InputError with the file's name if a write fails."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        while error.__context__:  # torch.save hides the first error behind its own
            error = error.__context__
        raise InputError(f"{path}: cannot be written: {error}") from None


def save_checkpoint(folder, content):
    """Write checkpoint.pt and keep the previous one; a kill at any time leaves one intact."""
    path, previous = (Path(folder) / name for name in CHECKPOINTS)
    temporary = path.with_suffix(".tmp")
    with writing(path), open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        path.replace(previous)
    temporary.replace(path)


def find_checkpoint(folder):
    """The path of a run's latest readable checkpoint, or None; reports damaged ones."""
    paths = [path for name in CHECKPOINTS if (path := Path(folder) / name).exists()]
    for path in paths:
        try:
            read_checkpoint(path)
            return path
        except InputError as error:
            print(f"warning: {error}")
            path.replace(f"{path}.damaged")  # else it would become the previous one
    if paths:
        raise InputError(f"{folder}: none of its checkpoints can be read; --no-resume starts over")
    return None


def resume(args, may_differ, model, optimizer, videos):
    """Load the run in --output_dir, or else --init; returns the number of steps done.

    Raises InputError if arguments outside may_differ have changed: only --no-resume overwrites
    a run.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun
    path = on_rank0(find_checkpoint, args.output_dir) if args.resume or restarted else None
    if path is None:
        if args.init:
            start_from(model, args.init)
        return 0
    run = read_checkpoint(path, check=False)
    then = run.get("args", {})
    now = vars(args)
    names = sorted((then.keys() | now.keys()) - may_differ)
    differ = [
        f"--{n} was {then.get(n)}, is {now.get(n)}" for n in names if then.get(n) != now.get(n)
    ]
    if differ:
        raise InputError(
            f"{path}: from a run with other arguments ({'; '.join(differ)}). Restore them to "
            "resume, give another --output_dir to keep that run, or --no-resume to overwrite it"
        )
    model.load_state_dict(run["model"])
    optimizer.load_state_dict(run["optimizer"])
    print_rank0(f"{path}: resuming after step {run['step']}")
    if run["videos"] != videos.digest:
        print_rank0(f"warning: the list has changed: was {run['videos']}, is {videos.digest}")
    return run["step"]


def load_for_use(model, args):
    """Load the weights in --init to test or predict with. Raises InputError if one is missing."""
    if not args.init:
        raise InputError(f"--init CHECKPOINT is needed, from {args.stage}")
    if new := load_pretrained(model, args.init)["new"]:
        raise InputError(f"{args.init}: has no {new[0]}; give a checkpoint of {args.stage}")
    return model


def progress(items=None, total=None, text=None, done=0):
    """A progress bar; redrawn only every 30 s if stderr is a file, to keep that short."""
    seconds = 0.2 if sys.stderr.isatty() else 30
    return tqdm(items, text, total, initial=done, ncols=79, mininterval=seconds, disable=RANK > 0)


class Run:
    """Logs, saves and ends a run; use it in a with statement.

    Processes meet at log points only. There they exchange losses, unreadable videos, and whether
    any was asked to stop, by SIGTERM or Ctrl-C. If process 0 was asked, it saves after that very
    step, since schedulers do not wait long; all leave together at the next log point.
    """

    def __init__(self, args, videos, batches, start, steps, flops=None):
        """videos: VideoList or Keyframes. start, steps: where the run begins and ends. flops: to
        train on a clip, or None.
        """
        self.args = args
        self.videos = videos
        self.batches = batches
        self.flops = flops
        self.done = start
        self.steps = steps
        self.out = Path(args.output_dir)
        self.pending = []  # losses and gradient norms since the last log point
        self.failed = set()  # names of unreadable videos
        self.asked = None  # the signal that this process got
        self.stopping = None  # the signal that any process got, known to all of them
        self.logged_at = self.saved_at = time.perf_counter()
        starts = gather(start)
        if len(set(starts)) > 1:
            raise InputError(f"{self.out}: start at steps {starts}; do all share this folder?")
        if RANK == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            drop_later(self.out, start)
            (self.out / "args.json").write_text(json.dumps(vars(args), indent=1))

    def __enter__(self):
        signals = signal.SIGTERM, signal.SIGINT
        self.handlers = {n: signal.signal(n, self.request_stop) for n in signals}
        self.bar = progress(total=self.steps, done=self.done)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        self.batches.close()

    def request_stop(self, number, _):
        """The signal handler: ask the run to save and stop; a second Ctrl-C ends it at once."""
        self.asked = signal.Signals(number).name
        self.saved_at = -math.inf  # a checkpoint is due at once
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, f"{self.asked}: stopping soon; Ctrl-C again ends at once\n".encode())

    def epoch(self, step):
        """The effective epoch after `step` steps: how often each video was sampled."""
        return step * self.args.batch_size * self.args.repeat_aug / len(self.videos)

    def every(self, epochs):
        """Whether the last step completed a multiple of `epochs` effective epochs; 0: never."""
        if not epochs:
            return False
        return self.epoch(self.done) // epochs > self.epoch(self.done - 1) // epochs

    def record(self, loss, grad_norm):
        """Count a step. Its values stay on the device until the next log point."""
        self.pending.append(torch.stack([loss.detach(), grad_norm.detach()]))
        self.done += 1
        self.bar.update()

    def at_log_point(self):
        """Whether the processes meet now; a single process also logs when asked to stop."""
        due = self.done % self.args.log_interval == 0 or self.done == self.steps
        return due or (WORLD == 1 and self.asked)

    def log(self, **settings):
        """Write a line of log.jsonl with the mean loss since the last one; all processes together.

        Raises FloatingPointError if a loss or gradient norm is not finite, InputError if too
        many videos are unreadable.
        """
        batches = self.batches
        pending = torch.stack(self.pending).tolist()
        reports = gather((pending, batches.waited, batches.failures, self.asked))
        values, waited, failures, asked = zip(*reports)
        for index, reason in itertools.chain(*failures):
            self.note_failure(index, reason)
        self.check_finite(values)
        seconds = time.perf_counter() - self.logged_at
        count = len(pending)
        speed = count * self.args.batch_size * self.args.repeat_aug / seconds
        loss = sum(loss for part in values for loss, _ in part) / (count * WORLD)
        self.write(
            step=self.done,
            epoch=self.epoch(self.done),
            loss=loss,
            **settings,
            grad_norm=pending[-1][1],
            clips_per_s=speed,
            data_wait=sum(waited) / WORLD / seconds,
            tflops=self.flops and self.flops * speed / 1e12,
        )
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} clips/s", refresh=False)
        self.stopping = next(filter(None, asked), None)
        self.pending = []
        batches.waited = 0.0
        batches.failures = []

    def write(self, **line):
        """Append a line to log.jsonl, and restart its clock: that of validation does not count."""
        if RANK == 0:
            append(self.out / "log.jsonl", json.dumps(line))
        self.logged_at = time.perf_counter()

    def note_failure(self, index, reason):
        """Log an unreadable video in failures.log; raise InputError if there are too many."""
        log = self.out / "failures.log"
        count = len(self.videos)
        limit = self.args.max_failures
        name = os.fsencode(self.videos.name(index)).decode(errors="backslashreplace")
        if RANK == 0 and name not in self.failed:
            tqdm.write(f"skipped {name}: {reason}")
            append(log, f"{name}\t{reason}")
        self.failed.add(name)
        limit = max(4, count // 100) if limit is None else limit
        if len(self.failed) > limit:
            raise InputError(
                f"{len(self.failed)} of {count} {self.videos.unit} cannot be read, more than "
                f"--max_failures {limit}; see {log}"
            )

    def check_finite(self, values):
        """Raise FloatingPointError if a loss or norm is not finite; values: by process and step."""
        for step, pairs in enumerate(zip(*values), self.done - len(self.pending)):
            bad = [rank for rank, (loss, _) in enumerate(pairs) if not math.isfinite(loss)]
            if bad or not math.isfinite(pairs[0][1]):
                ranks = bad or range(WORLD)  # a bad norm is the same on all of them
                loss, norm = pairs[ranks[0]]
                keys = [key for rank in ranks for key in self.batches.keys(step, rank)]
                names = [self.videos.name(index) for _, index in keys[:10]]
                raise FloatingPointError(
                    f"step {step}: loss {loss}, gradient norm {norm}. Lower --lr, or try "
                    f"--precision fp32. Checkpoints in {self.out} are from earlier steps. "
                    f"The step's {self.videos.unit}:\n" + "\n".join(names)
                )

    def save_due(self):
        """Whether process 0 saves now: by the clock, for --keep_epochs, at a stop, at the end."""
        late = time.perf_counter() - self.saved_at > 60 * self.args.save_minutes
        ends = self.stopping or self.done == self.steps
        due = bool(late or ends or self.every(self.args.keep_epochs))
        # Between log points nobody has checked yet that the weights are finite.
        return RANK == 0 and due and (not self.pending or bool(self.pending[-1].isfinite().all()))

    def save(self, model, optimizer, config):
        """Write a checkpoint with all a resumed run needs."""
        self.saved_at = time.perf_counter()
        content = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=self.done)
        content |= dict(args=vars(self.args), videos=self.videos.digest, config=config)
        save_checkpoint(self.out, content)
        if self.every(self.args.keep_epochs):
            kept = self.out / f"checkpoint_epoch{self.epoch(self.done):.0f}.pt"
            shutil.copyfile(self.out / CHECKPOINTS[0], kept)

    def was_stopped(self):
        """Print how the run ended; returns whether it was asked to stop."""
        gather(None)  # a barrier: nobody leaves before the last checkpoint is written
        if self.failed:
            failed = f"{len(self.failed)} {self.videos.unit}"
            print_rank0(f"{failed} could not be read: see failures.log")
        if self.stopping:
            again = "the same command" + ("" if self.args.resume else " without --no-resume")
            print_rank0(
                f"asked to stop ({self.stopping}): saved after step {self.done} of {self.steps} in "
                f"{self.out}; {again} resumes from there"
            )
        return bool(self.stopping)


def append(path, line):
    """Append a line to a file. Raises InputError, naming it, if it cannot be written."""
    with writing(path), open(path, "a") as file:
        file.write(line + "\n")


def drop_later(folder, start):
    """Drop log lines after step `start`, which a killed run wrote after its last save."""
    if start == 0:  # a restart must not resume the run that this one replaces
        for path in [*folder.glob("checkpoint*.pt"), *folder.glob("failures.log")]:
            path.replace(f"{path}.replaced")
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    log.write_text("".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= start))


def run_main(main):
    """Run a stage's main function; an error the user can fix becomes one line."""
    message = status = None
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # names may be any bytes
    try:
        status = main()
    except KeyboardInterrupt:
        message = "interrupted; the same command resumes from the last checkpoint, if there is one"
    except (InputError, FloatingPointError) as error:
        message = f"error: {error}"
    except (OSError, RuntimeError) as error:
        message = f"error: {str(error).splitlines()[0].rstrip('.')}"
        if getattr(error, "filename", None):
            message = f"error: {error.filename}: {error.strerror}"
        if isinstance(error, ConnectionError):  # while a data worker sent something
            message = f"error: DataLoader worker exited unexpectedly: {error}"
        if "DataLoader worker" in message:
            message += "; if it ran out of memory or shared memory, use fewer --num_workers"
        elif WORLD > 1 and re.search("[Cc]onnection|[Tt]imed out|NCCL|gloo", message):
            message += "; another process has ended or does not answer: see its message"
        elif not isinstance(error, OSError):
            raise
    if message:  # raised here, not above: a traceback would keep the data workers alive
        sys.exit(f"{Path(sys.argv[0]).name}: {message}")
    if WORLD > 1:
        time.sleep(0.1)  # lets gloo free its last tensors: in torch 2.6 it cannot once this begins
        dist.destroy_process_group()
    sys.exit(status)
