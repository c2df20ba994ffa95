"""The model of "Masked Autoencoders As Spatiotemporal Learners" (arXiv:2205.09113).

Read from top to bottom:

    tubelets and masking   a video becomes tokens of 2 x 16 x 16 pixels; 90 % are hidden (section 3)
    encoder                a plain ViT that sees only the visible tokens                 (section 3)
    MAE                    encoder, small decoder, loss on the hidden tokens             (section 3)
    classifier             the same encoder on all tokens, averaged                     (appendix A)
    detector               the same encoder, a region head on each box         (appendix A, Table 8)
    weights                loading from any layout, parameter groups, schedule         (Tables 5, 6)
    training helpers       what the stages share: flags, processes, checkpoints, the log of a run

Shapes: B clips of T frames with H x W pixels; a grid (t, h, w) of N = t * h * w tokens, V of them
visible; a token has u x p x p pixels, r x p x p of them are predicted; D, C: the widths of encoder
and decoder. Parameter names are those of mae_st, so its checkpoints load as they are.
"""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

# Before torch is loaded: threads that spin while they wait would keep the loaders from the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import roi_align
from tqdm import tqdm

SIZES = {  # ViT-B, L and H of the paper, with tubelets of 2 x 16 x 16 pixels; and one for a laptop
    "vit_b": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_l": dict(embed_dim=1024, depth=24, num_heads=16),
    "vit_h": dict(embed_dim=1280, depth=32, num_heads=16),
    "vit_demo": dict(patch_size=8, embed_dim=128, depth=4, num_heads=4, sine_positions=True),
}
PIXEL_MEAN, PIXEL_STD = 0.45, 0.225  # of each channel, for pixels in 0..1


class InputError(ValueError):
    """Unusable input; the message says what was found and what to do."""


# -------------------------------------------------------------------------- tubelets and masking


def patchify(video, patch_size, t_patch_size):
    """Cut a video (B, 3, T, H, W) into tubelets (B, N, u*p*p*3); also returns their grid (t, h, w).

    Tokens are ordered by time, row, column; a token's values by frame, row, column, channel.
    Frames, rows and columns that do not fill a whole tubelet are dropped, as in a strided
    convolution.
    """
    u = t_patch_size
    p = patch_size
    video = video.unfold(2, u, u).unfold(3, p, p).unfold(4, p, p)  # (B, 3, t, h, w, u, p, p)
    return video.movedim(1, -1).flatten(4).flatten(1, 3), tuple(video.shape[2:5])


def normalize(pixels):
    """uint8 pixels to normalised floats; floats must be normalised already."""
    if pixels.dtype != torch.uint8:
        return pixels
    return (pixels.float() / 255 - PIXEL_MEAN) / PIXEL_STD


def pick_rows(x, ids):
    """Each sample's rows with the given ids: (B, N, C), (B, K) -> (B, K, C)."""
    return x[torch.arange(len(x), device=x.device)[:, None], ids]


def num_visible(grid, mask_ratio, groups=None):
    """How many of the N tokens stay visible: those of int(groups * (1 - ratio)) groups.

    groups: how many sets of tokens are hidden together, such as h * w tubes, all of one size;
    None: each token is its own. Raises InputError if no token stays visible.
    """
    N = math.prod(grid)
    group = N // (groups or N)  # tokens in one
    visible = group * int(N // group * (1 - mask_ratio))
    if not visible:
        raise InputError(
            f"a mask ratio of {mask_ratio} leaves none of {N} tokens visible, {group} at a time; "
            f"use a ratio below {1 - group / N:.4g}"
        )
    return visible


# Figure 4. These functions return noise that broadcasts to the grid (t, h, w): one number for all
# tokens that are hidden together. random_masking lets those with the smallest noise stay.


def random_mask(grid, mask_ratio):
    """Agnostic: each token by itself."""
    return torch.rand(grid)


def tube_mask(grid, mask_ratio):
    """Space-only: tubes, the same patches at all times."""
    return torch.rand(1, *grid[1:])


def frame_mask(grid, mask_ratio):
    """Time-only: all patches of a time step."""
    return torch.rand(grid[0], 1, 1)


def block_mask(grid, mask_ratio):
    """Block-wise: boxes whose sides are a quarter to just over half of the grid's."""
    device = torch.get_default_device()
    noise = torch.rand(grid, device="cpu")  # >= 1 in a box; on a GPU, the loop would wait for it
    while (noise < 1).sum() > num_visible(grid, mask_ratio):
        box = ()
        for n in grid:
            size = int(torch.randint(max(1, n // 4), n // 2 + 2, (), device="cpu"))
            start = int(torch.randint(n - size + 1, (), device="cpu"))
            box += (slice(start, start + size),)
        noise[box] += 1
    return noise.to(device)


MASK_TYPES = {
    "agnostic": random_mask,
    "space-only": tube_mask,
    "time-only": frame_mask,
    "block-wise": block_mask,
}


def random_masking(noise, grid, mask_ratio):
    """The ids of visible and of hidden tokens, by rising noise: (B, V) and (B, N - V).

    noise: (B, N), or a mask function's for each clip, such as (B, 1, h, w).
    """
    keep = num_visible(grid, mask_ratio, noise[0].numel())
    if noise.ndim > 2:
        # Ranks, for equal random numbers would mix the tokens of two groups.
        rank = noise.flatten(1).argsort(1).argsort(1).view_as(noise)
        noise = rank.expand(-1, *grid).flatten(1)  # (B, N)
    order = noise.argsort(dim=1, stable=True)
    return order[:, :keep], order[:, keep:]


# --------------------------------------------------------------------------------------- encoder


LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


class TubeletEmbed(nn.Conv3d):
    """Patch embedding of tubelets that are already cut out: (B, V, u*p*p*3) -> (B, V, D).

    A Conv3d only for the shape of its weight, as checkpoints have it: its own forward, over the
    video, would also embed the hidden tokens.
    """

    def forward(self, tubelets):
        weight = self.weight.movedim(1, -1)  # (D, 3, u, p, p) -> (D, u, p, p, 3)
        return F.linear(tubelets, weight.flatten(1), self.bias)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D). Only RelPosAttention looks at the grid."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, grid):
        layers = self.q, self.k, self.v
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in layers)
        return self.proj(self.attend(q, k, v, grid).transpose(1, 2).flatten(2))

    def attend(self, q, k, v, grid):
        """Queries, keys, values -> attention output, each (B, heads, N, D / heads)."""
        return F.scaled_dot_product_attention(q, k, v)


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
    """A pre-norm transformer block. VideoViT may set drop_path, Detector may replace attn."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        fc1, fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.drop_path = nn.Identity()

    def forward(self, x, grid):
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def resize_space(table, size):
    """Resize positions of a square to size (h, w), bicubic: (1, side*side, D) -> (1, h*w, D)."""
    side = math.isqrt(table.shape[1])
    if size == (side, side):
        return table
    image = table.float().mT.unflatten(2, (side, side))  # (1, D, side, side)
    return F.interpolate(image, size, mode="bicubic").flatten(2).mT


def resize_time(table, length):
    """Resize positions along one axis, linear: (1, n, D) -> (1, length, D)."""
    if table.shape[1] == length:
        return table
    return F.interpolate(table.float().mT, length, mode="linear").mT


def position_table(space, time, grid):
    """The positions of a grid, (N, D): separable, time plus space, both resized to it."""
    space = resize_space(space, grid[1:])
    time = resize_time(time, grid[0])
    return (time[0, :, None] + space[0]).flatten(0, 1)


def learned(n, dim):
    """n vectors to learn, (1, n, dim), filled by init_weights."""
    return nn.Parameter(torch.empty(1, n, dim))


def sines(n, dim):
    """(n, dim): sines and cosines of positions 0..n-1, with wavelengths from 4 to 4 * n."""
    angle = torch.arange(n)[:, None] * torch.pi / 2 * n ** -torch.linspace(0, 1, (dim + 1) // 2)
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :dim]


def start_from_sines(model):
    """Initialise a model's positions in space and time with sines."""
    t, h, w = model.grid
    for name, table in model.named_parameters():  # (1, h*w, D) or (1, t, D)
        dim = table.shape[-1]
        if name.endswith("pos_embed_temporal"):
            table.data[0] = sines(t, dim)
        elif name.endswith("pos_embed_spatial"):
            rows = sines(h, dim // 2).repeat_interleave(w, 0)
            columns = sines(w, dim - dim // 2).repeat(h, 1)
            table.data[0] = torch.cat([rows, columns], 1)


class VideoViT(nn.Module):
    """The encoder: a plain ViT with separable learned positions and a class token.

    drop_path: stochastic depth, rising linearly from 0 in the first block to this in the last.
    sine_positions: positions in space and time start from sines; from random ones, the loss of a
    small model stays on a plateau for minutes.
    grad_checkpointing: save memory by recomputing blocks in the backward pass.
    Subclasses add what follows, and call init_weights.
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
        sine_positions=False,
        grad_checkpointing=False,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.t_patch_size = t_patch_size
        self.embed_dim = embed_dim
        self.sine_positions = sine_positions
        self.grad_checkpointing = grad_checkpointing
        side = img_size // patch_size
        t, h, w = self.grid = num_frames // t_patch_size, side, side
        if min(self.grid) == 0:
            raise InputError(
                f"clips of {num_frames} frames and {img_size} pixels are smaller than a tubelet"
            )
        proj = TubeletEmbed(3, embed_dim, (t_patch_size, patch_size, patch_size))
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))  # named as in checkpoints
        self.cls_token = learned(1, embed_dim)
        self.pos_embed_spatial = learned(h * w, embed_dim)
        self.pos_embed_temporal = learned(t, embed_dim)
        self.pos_embed_class = learned(1, embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        for i, block in enumerate(self.blocks if drop_path else ()):
            block.drop_path = DropPath(drop_path * i / max(1, depth - 1))
        self.norm = LayerNorm(embed_dim)

    def add_head(self, num_classes, dropout):
        """Dropout and a linear layer on the features, for fine-tuning; then initialise all."""
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.embed_dim, num_classes)
        self.init_weights()

    def init_weights(self):
        """Positions, tokens, head: trunc_normal(0.02); other layers: Xavier-uniform, biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if re.search("pos_embed|token|^head.weight", name):
                nn.init.trunc_normal_(parameter, std=0.02)
        if self.sine_positions:
            start_from_sines(self)

    def patchify(self, video):
        """Cut a video (B, 3, T, H, W): tubelets (B, N, u*p*p*3), and their grid (t, h, w)."""
        return patchify(video, self.patch_size, self.t_patch_size)

    def forward_encoder(self, tubelets, grid, visible=None):
        """Encode the visible tubelets and no others: (B, N, u*p*p*3) -> (B, 1 + V, D).

        The class token comes first. visible (B, V): their ids; None: all N. The final norm is left
        to the caller: MAE applies it to each token, a classifier to their average.
        """
        positions = position_table(self.pos_embed_spatial, self.pos_embed_temporal, grid)  # (N, D)
        if visible is not None:
            tubelets = pick_rows(tubelets, visible)  # (B, V, u*p*p*3)
            # Not positions[visible]: threads would add up its gradients in any order.
            positions = F.embedding(visible, positions)  # (B, V, D)
        x = self.patch_embed(normalize(tubelets)) + positions  # (B, V, D)
        # [0]: else DDP warns that its gradient has other strides.
        cls_token = (self.cls_token + self.pos_embed_class)[0].repeat(len(x), 1, 1)
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
        self.requires_grad_(False)
        self.norm.requires_grad_()
        self.head.requires_grad_()
        for block in self.blocks:
            block.drop_path = nn.Identity()  # it regularises what is trained


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
        pred_t_dim = pred_t_dim or t
        if pred_t_dim not in (t, frames):
            raise InputError(
                f"pred_t_dim {pred_t_dim}: {t} predicts a slice of each tubelet, {frames} all of it"
            )
        if dim % decoder_num_heads:
            raise InputError(f"decoder width {dim} is not divisible by {decoder_num_heads} heads")
        self.norm_pix_loss = norm_pix_loss
        self.mask_type = mask_type
        self.decoder_embed = nn.Linear(self.embed_dim, dim)
        self.mask_token = learned(1, dim)
        self.decoder_cls_token = learned(1, dim)
        self.decoder_pos_embed_spatial = learned(h * w, dim)
        self.decoder_pos_embed_temporal = learned(t, dim)
        self.decoder_pos_embed_class = learned(1, dim)
        blocks = (Block(dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, pred_t_dim // t * self.patch_size**2 * 3)
        self.init_weights()

    def forward_decoder(self, latent, visible, grid):
        """Predict every token from the visible ones: (B, 1 + V, D) -> (B, N, r*p*p*3).

        visible (B, V): ids of the visible tokens.
        """
        x = self.decoder_embed(latent[:, 1:])  # (B, V, C), without the encoder's class token
        tokens = self.mask_token.to(x.dtype).repeat(len(x), math.prod(grid), 1)  # (B, N, C)
        x = tokens.scatter(1, visible[..., None].expand_as(x), x)  # the visible in their places
        cls_token = self.decoder_cls_token[0].to(x.dtype).repeat(len(x), 1, 1)
        space, time = self.decoder_pos_embed_spatial, self.decoder_pos_embed_temporal
        positions = [self.decoder_pos_embed_class[0], position_table(space, time, grid)]
        x = torch.cat([cls_token, x], 1) + torch.cat(positions)  # (B, 1 + N, C)
        x = self.forward_blocks(self.decoder_blocks, x, grid)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def patchify_target(self, tubelets):
        """The prediction target: (B, K, u*p*p*3) -> (B, K, r*p*p*3)."""
        target = normalize(tubelets[..., : self.decoder_pred.out_features])  # its first frames
        if self.norm_pix_loss:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6).sqrt()
        return target

    def forward_loss(self, tubelets, pred, hidden):
        """Mean squared error on the hidden tokens; 0 if there are none."""
        target = self.patchify_target(pick_rows(tubelets, hidden))  # (B, N - V, r*p*p*3)
        error = pick_rows(pred, hidden).float() - target
        return error.square().sum() / max(1, error.numel())

    def forward(self, video, mask_ratio=0.9, noise=None):
        """video (B, 3, T, H, W), uint8 or normalised floats -> loss, pred, mask.

        noise: as in random_masking; None: drawn here, by mask_type. pred (B, N,
        r*p*p*3); mask (B, N) is 1 at hidden tokens.
        """
        tubelets, grid = self.patchify(video)  # (B, N, u*p*p*3)
        if noise is None:
            with video.device:
                noise = torch.stack([MASK_TYPES[self.mask_type](grid, mask_ratio) for _ in video])
        visible, hidden = random_masking(noise, grid, mask_ratio)  # (B, V), (B, N - V)
        latent = self.norm(self.forward_encoder(tubelets, grid, visible))  # (B, 1 + V, D)
        pred = self.forward_decoder(latent, visible, grid)  # (B, N, r*p*p*3)
        loss = self.forward_loss(tubelets, pred, hidden)
        mask = torch.ones_like(pred[..., 0]).scatter(1, visible, 0)
        return loss, pred, mask


# ------------------------------------------------------------------------------------ classifier


class Classifier(VideoViT):
    """The encoder fine-tuned to classify (appendix A): average the patch tokens, norm, linear."""

    def __init__(self, num_classes=400, dropout=0.0, **encoder):
        super().__init__(**encoder)
        self.add_head(num_classes, dropout)

    def forward(self, video, mask_ratio=0.0, noise=None):
        """video (B, 3, T, H, W), uint8 or normalised floats -> logits (B, num_classes).

        mask_ratio hides tokens in training (Table 11): those with the smallest noise (B, N) stay.
        """
        tubelets, grid = self.patchify(video)  # (B, N, u*p*p*3)
        visible = None
        if mask_ratio:
            noise = torch.rand(tubelets.shape[:2], device=video.device) if noise is None else noise
            visible, _ = random_masking(noise, grid, mask_ratio)  # (B, V)
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
        self.rel_pos_t, self.rel_pos_h, self.rel_pos_w = (
            nn.Parameter(torch.zeros(2 * n - 1, dim // num_heads)) for n in grid
        )

    def attend(self, q, k, v, grid):
        """softmax(q . k / sqrt(d) + q . R_t + q . R_h + q . R_w) v, with d = D / heads.

        q is extended by q . R for each time, row and column of the grid, k by a one-hot of its own
        ones: their dot product is that sum. No N x N bias is stored, and flash kernels work.
        """
        d = q.shape[-1]  # q: (B, heads, 1 + N, d)
        axes = [torch.arange(n, device=q.device) for n in grid]
        rel_logits = []
        one_hot = []
        tables = self.rel_pos_t, self.rel_pos_h, self.rel_pos_w
        for n, axis, coords, table in zip(grid, axes, torch.cartesian_prod(*axes).T, tables):
            distance = coords[:, None] - axis  # (N, n): of each token to each place on this axis
            R = resize_time(table[None], 2 * n - 1)[0, distance + n - 1]  # (N, n, d)
            rel_logits.append(torch.einsum("bhqd,qkd->bhqk", q[:, :, 1:], R.to(q.dtype)))
            one_hot.append(distance == 0)
        rel_logits = torch.cat(rel_logits, -1)  # (B, heads, N, t + h + w)
        one_hot = torch.cat(one_hot, -1).to(k.dtype)  # (N, t + h + w)
        # Padded with zeros, since flash kernels need q, k and v of one width, a multiple of 8. Not
        # -n % 8, which torch 2.6 miscompiles for dynamic sizes on a CPU.
        fill = 7 - (d + sum(grid) - 1) % 8
        one_hot = F.pad(one_hot, (0, fill, 1, 0)).expand(*k.shape[:2], -1, -1)
        q = torch.cat([q * d**-0.5, F.pad(rel_logits, (0, fill, 1, 0))], -1)
        k = torch.cat([k, one_hot], -1)
        v = F.pad(v, (0, sum(grid) + fill))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :d]


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

    def forward(self, video, boxes):
        """video (B, 3, T, H, W), uint8 or normalised floats, and boxes -> logits (K, num_classes).

        boxes: x1, y1, x2, y2 in pixels of the clip, a list of B tensors (K_i, 4); they may extend
        beyond it. Any H and W: positions are resized.
        """
        tubelets, grid = self.patchify(video)
        x = self.norm(self.forward_encoder(tubelets, grid)[:, 1:])  # (B, N, D)
        features = x.mT.unflatten(2, grid).mean(2)  # (B, D, h, w), averaged over time
        regions = roi_align(features, boxes, 7, 1 / self.patch_size, aligned=True)
        return self.head(self.dropout(regions.amax((2, 3))))  # (K, D, 7, 7) -> (K, D)


# --------------------------------------------------------------------------------------- weights


class DamagedError(InputError):
    """A file that was read, and is damaged: reading it again will not help."""


def read_checkpoint(path):
    """Load a checkpoint, a dict, to the CPU; of a folder its checkpoint.pt. Runs no code in it.

    Raises DamagedError if its checksums fail, or it is no checkpoint; InputError for what may be
    transient.
    """
    path = Path(path)
    if path.is_dir():
        path /= CHECKPOINTS[0]
    if path.suffix == ".safetensors":
        raise InputError(
            f"{path}: pip install safetensors, then convert it: "
            "torch.save(safetensors.torch.load_file(path), 'weights.pt')"
        )
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"its {damaged} is damaged")
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=zipped))
    except Exception as error:  # damage may hit anything: zip, pickle, key, end of file
        reason = str(error).split("\n")[0]
        # PyTorch reports errors of the system as RuntimeErrors.
        retry = isinstance(error, (OSError, MemoryError)) or re.search("errno|mmap|alloc", reason)
        if retry and getattr(error, "errno", None) != errno.EINVAL:  # that: a damaged offset
            raise InputError(f"{path}: cannot be read: {reason or 'no memory'}") from None
        if reason.startswith("Weights only load failed"):
            reason = "not a PyTorch file of nothing but tensors and plain values"
        raise DamagedError(f"{path}: not a readable checkpoint: {reason}") from None


def to_official_names(state, model, own):
    """Convert a state dict in any common layout to a model's names and sizes.

    Handles prefixes of DDP and torch.compile; fused qkv (PySlowFast, image MAE, timm); a 2D patch
    kernel, repeated over time and divided by its length; a joint table of positions, split into
    class, space and time (Table 3: time is 0 for images); fc_norm; PySlowFast's head.projection.
    Positions are resized.
    """
    out = {}
    of_images = any(value.ndim == 4 for value in state.values())
    for key, value in state.items():
        key = re.sub(r"_orig_mod\.|module\.|projection\.", "", key).replace("fc_norm", "norm")
        if ".qkv." in key:
            out |= {key.replace("qkv", name): part for name, part in zip("qkv", value.chunk(3))}
        elif value.ndim == 4:  # a 2D patch kernel
            u = model.t_patch_size
            out[key] = value[:, :, None].repeat(1, 1, u, 1, 1) / u
        elif key in ("pos_embed", "decoder_pos_embed"):
            # Its time steps: 1 of images, the model's own if N agrees, else 8, of 16 frames.
            fits = value.shape[1] == 1 + math.prod(model.grid)
            t = 1 if of_images else model.grid[0] if fits else 8
            table = value[:, 1:].unflatten(1, (t, -1))  # (1, t, h*w, D)
            out[key + "_class"], out[key + "_spatial"] = value[:, :1], table.mean(1)
            out[key + "_temporal"] = table.mean(2) - table.mean((1, 2))[:, None]
        else:
            out[key] = value
    for key, value in out.items():
        if key.endswith("pos_embed_spatial"):
            out[key] = resize_space(value, model.grid[1:])
        elif key.endswith("pos_embed_temporal"):
            out[key] = resize_time(value, model.grid[0])
        elif ".rel_pos_" in key and key in own:
            out[key] = resize_time(value[None], len(own[key]))[0]
    return out


def check_weights(path, state):
    """Raise InputError if a tensor of a state dict is not of finite floats."""
    for key, value in state.items():
        if not (value.is_floating_point() and value.isfinite().all()):
            raise InputError(f"{path}: {key} is not a tensor of finite floats")


def load_pretrained(model, path, strict=False):
    """Load weights in any layout that to_official_names handles, and print what was loaded.

    Tensors outside the plain encoder (decoder, head, relative positions) may be missing or have
    another shape, unless strict: the model keeps its own, and their names are returned. Raises
    InputError if others do not fit, or are not finite.
    """
    state = read_checkpoint(path)
    for key in ("model", "model_state", "state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {k: v for k, v in state.items() if torch.is_tensor(v)}
    own = model.state_dict()
    try:
        state = to_official_names(state, model, own)
        loaded = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
        check_weights(path, loaded)
        new = model.load_state_dict(loaded, strict=False).missing_keys
    except (RuntimeError, IndexError, TypeError) as error:  # unusual tensors and keys, too
        reason = str(error).splitlines()[0][:99]
        raise InputError(f"{path}: does not fit this model: {reason}") from None
    for key in new:
        if strict or not re.search("head|decoder|mask_token|rel_pos", key):
            found = list(state[key].shape) if key in state else "missing"
            raise InputError(
                f"{path}: does not fit this model: {key} is {found}, not {list(own[key].shape)}; "
                "is --model the size of the checkpoint?"
            )
    text = f"{path}: {len(loaded)} tensors loaded"
    for name, keys in {"left out": state.keys() - loaded.keys(), "not in it": new}.items():
        if keys:
            text += f"; {name}: {', '.join(sorted({key.split('.')[0] for key in keys}))}"
    print_rank0(text)
    return new


def parameter_groups(model, weight_decay, layer_decay=1.0, decay_positions=False):
    """Group named parameters by their settings, with lr_scale, for an optimizer (appendix A).

    No weight decay on biases and norms, and on tokens and positions only if asked for. Layer-wise
    decay: norm, head and decoder get all of the rate, the last block layer_decay of it, and so on
    down to patch embedding, class token and positions, below the first block.
    """
    depth = len(model.blocks)
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        down = 0  # layers below norm, head and decoder
        if name.startswith(("patch_embed", "cls_token", "pos_embed")):
            down = depth + 1
        elif name.startswith("blocks."):
            down = depth - int(name.split(".")[1])
        scale = layer_decay**down
        decays = decay_positions or not re.search("token|pos_embed|rel_pos", name)
        decay = weight_decay if decays and parameter.ndim > 1 else 0.0
        group = dict(params=[], lr_scale=scale, weight_decay=decay)
        groups.setdefault((scale, decay), group)["params"].append((name, parameter))
    return list(groups.values())


def make_optimizer(args, model, **settings):
    """AdamW, or SGD with Nesterov momentum 0.9, as in PySlowFast (the tables just say SGD).

    settings: of parameter_groups.
    """
    groups = parameter_groups(model, args.weight_decay, **settings)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, args.lr, betas=args.betas, fused=True)


def cosine_decay(epoch, lr, warmup_epochs, epochs):
    """Linear warm-up from 0 to lr, then half a cosine to 0 (Tables 5 and 6)."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


# ------------------------------------------------------------------------------ training helpers

switch = argparse.BooleanOptionalAction
STOPPED = 128 + signal.SIGTERM  # exit status of a run that was asked to stop
CHECKPOINTS = "checkpoint.pt", "checkpoint_previous.pt"  # a run keeps two: one may be damaged
RUN_FLAGS = {  # where and how fast to run: free to change on resume, not taken from a checkpoint
    "output_dir", "resume", "num_workers", "micro_batch", "max_failures", "log_interval",
    "save_minutes", "keep_epochs", "device", "compile", "grad_checkpointing",
}  # fmt: skip


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag that has one, and the docstring verbatim."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def bounded(kind, low, high=1e18):
    """An argparse type: a number from low to high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:  # also false for nan
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, not {text}")
        return value

    return number


natural, positive_int = bounded(int, 0), bounded(int, 1)
nonnegative, fraction, rate = bounded(float, 0), bounded(float, 0, 1), bounded(float, 0, 0.999)


def make_parser(doc, layouts):
    """A parser with the flags that all stages share; parse_with_recipe adds a recipe's values."""
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [flags]",
        description=doc,
        epilog="data layouts:\n" + layouts,
        formatter_class=HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("most used").add_argument
    add("--dataset", help="its name; demo: small videos, made on the spot")
    add("--data", help="folder or list of videos (layouts below); by default data/DATASET")
    add("--model", choices=SIZES, help="encoder size; the larger, the better and the slower")
    add("--init", metavar="CHECKPOINT", help="weights to start from, to test or to predict with")
    add("--epochs", type=nonnegative, help="effective epochs: how often each video is sampled")
    add("--output_dir", help="by default runs/STAGE_DATASET_MODEL; to test and predict, by --init")

    add = parser.add_argument_group("clips").add_argument
    add("--videos", metavar="FOLDER", help="where the videos are, if not beside their list")
    add("--num_frames", type=positive_int, default=16, help="frames per clip; 40 is in Table 7")
    add(
        "--sampling_rate",
        type=natural,
        default=4,
        help="30ths of a second between frames; more: longer clips; 0: a still",
    )
    add(
        "--img_size",
        type=positive_int,
        default=224,
        help="height and width of a clip in pixels; 312 is in Table 7",
    )
    add(
        "--hflip",
        action=switch,
        default=True,
        help="flip half of the clips; not where a label knows left from right",
    )

    add = parser.add_argument_group("recipe").add_argument
    add(
        "--batch_size",
        type=positive_int,
        help="videos per step, over all GPUs; lower it for fewer videos than some 10,000",
    )
    add(
        "--lr",
        type=nonnegative,
        help="peak learning rate, scaled with --batch_size by default; lower it if the loss jumps",
    )
    add(
        "--warmup_epochs",
        type=nonnegative,
        help="effective epochs; the recipe's shrink with --epochs",
    )
    add("--weight_decay", type=nonnegative, help="not applied to biases and norms")
    add("--clip_grad", type=nonnegative, default=0.0, help="max gradient norm; 0 disables clipping")
    add("--seed", type=natural, default=0, help="random seed; the same seed gives the same run")
    add(
        "--precision",
        choices=("bf16", "fp32"),
        help="by default bf16 on a GPU that has it; fp32 is TF32 on a GPU",
    )

    add = parser.add_argument_group("run").add_argument
    add("--resume", action=switch, default=True, help="resume from the checkpoint in --output_dir")
    add(
        "--micro_batch",
        type=positive_int,
        help="most videos a GPU takes at once; lower it if memory is short: gradients accumulate",
    )
    add(
        "--num_workers",
        type=natural,
        help="loader processes per GPU, by default its share of the cores; 0 loads in the main one",
    )
    add(
        "--max_failures",
        type=natural,
        help="unreadable videos allowed; by default 1 %%, at least 4",
    )
    add("--log_interval", type=positive_int, default=10, help="steps between lines of log.jsonl")
    add("--save_minutes", type=nonnegative, default=10, help="minutes between checkpoints")
    add(
        "--keep_epochs",
        type=nonnegative,
        default=0,
        help="keep a checkpoint each so many effective epochs; 0 keeps the latest two alone",
    )
    add("--device", help="cuda, cpu or mps; by default cuda if there is a GPU")
    add("--compile", action=switch, help="compile each block; by default on a GPU")
    add(
        "--grad_checkpointing",
        action=switch,
        default=False,
        help="recompute blocks in the backward pass: a third slower, far less memory",
    )
    return parser


def parse_with_recipe(parser, stage, dataset, recipe_of, argv=None):
    """Parse the command line; nothing changes the arguments once this has returned.

    A flag's value comes from the first of these that has one:

    1. the command line;
    2. to test, predict or visualize: the checkpoint's own arguments, less RUN_FLAGS;
    3. without such a checkpoint: the recipe for --dataset and --model, recipe_of(args);
    4. the parser.
    """
    given, _ = parser.parse_known_args(argv)
    modes = [mode for mode in ("eval", "predict", "visualize") if vars(given).get(mode)]
    if modes and not given.init:
        raise InputError(f"--{modes[0]} needs --init CHECKPOINT, from {stage}")
    saved = modes and read_checkpoint(given.init).get("args")
    if saved and "stage" in saved:  # it is of this project
        if saved["stage"] != stage:
            raise InputError(f"{given.init}: a checkpoint of {saved['stage']}, not of {stage}")
        defaults = {name: value for name, value in saved.items() if name not in RUN_FLAGS}
        if given.dataset or given.data:  # not the data it was trained on
            defaults |= dict(data=None, videos=None)
    else:
        if not given.dataset:
            given.dataset = Path(given.data).resolve().stem if given.data else dataset
        given.model = given.model or ("vit_demo" if given.dataset == "demo" else "vit_l")
        defaults = recipe_of(given) | dict(dataset=given.dataset, model=given.model)
        for name, value in defaults.items():
            if isinstance(value, dict):  # by model; falls back to ViT-L's, except for lr
                defaults[name] = value.get(given.model, None if name == "lr" else value["vit_l"])
        if given.batch_size and defaults["lr"]:
            defaults["lr"] *= given.batch_size / defaults["batch_size"]
        if given.epochs:
            defaults["warmup_epochs"] *= min(1, given.epochs / defaults["epochs"])
    parser.set_defaults(**defaults)
    parser.add_argument("-h", "--help", action="help", help="show this, with the recipe's values")
    args = parser.parse_args(argv)
    if args.lr is None and not modes:
        raise InputError(f"no learning rate for {args.model} in the recipe; give one with --lr")
    args.stage = stage
    if not args.data:  # each stage has demo videos of its own
        args.data = f"data/demo/{stage}" if args.dataset == "demo" else f"data/{args.dataset}"
    if args.output_dir is None:
        args.output_dir = f"runs/{stage}_{args.dataset}_{args.model}"
        if modes:
            folder = Path(args.init)
            args.output_dir = str((folder if folder.is_dir() else folder.parent) / modes[0])
    choose_device(args)
    return args


def choose_device(args):
    """Fill in --device, --precision and --compile to suit the machine."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    on_gpu = args.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(dist.get_node_local_rank(0))
        torch.set_float32_matmul_precision("high")  # TF32 outside autocast
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if has_bf16 else "fp32")
    if args.compile is None:
        args.compile = on_gpu


def keep_freed_memory():
    """Have glibc reuse freed memory: the kernel would zero it for each new tensor."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, in bytes: the most for an old glibc,
        libc.mallopt(-3, 2**30)  # and for others
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def start_process(args):
    """Join the processes that torchrun started, or run alone; returns the device."""
    device = torch.device(args.device)
    keep_freed_memory()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank():
    """This process's number among those that torchrun started; 0 if it runs alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes torchrun started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def autocast(args, device):
    """bf16 where --precision says so; softmax and loss stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def print_rank0(text):
    """Print on process 0 alone."""
    if rank() == 0:
        print(text)


def gather(value):
    """All processes' values, as a list on each of them; they wait for one another here."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def on_rank0(function, *args):
    """Call a function on process 0 alone; all return its result. If it fails, so do they."""
    results = [function(*args) if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(results)
    return results[0]


@dataclass
class Plan:
    """What a run does: how many steps, each of --batch_size videos over all processes."""

    videos: int  # in the list
    steps: int
    clips: int  # in a step, over all processes
    micro_batch: int  # videos that a process takes at once
    micro_steps: int  # micro-batches of a process in a step

    def epoch(self, step):
        """The effective epoch after `step` steps: how often each video was sampled."""
        return step * self.clips / self.videos


def make_plan(args, num_videos, repeat_aug):
    """Split --batch_size among processes and micro-batches, and count the steps: a Plan.

    --micro_batch is lowered to a divisor. Raises InputError with sizes that fit.
    """
    world = world_size()
    share, rest = divmod(args.batch_size, world)
    if rest or args.batch_size > num_videos:
        fits = max(world, min(args.batch_size, num_videos) // world * world)
        raise InputError(
            f"--batch_size {args.batch_size}: must be at most {num_videos}, as many as there are, "
            f"and a multiple of {world}, the number of processes; {fits} would do"
        )
    micro_batch = args.micro_batch or share
    while share % micro_batch:
        micro_batch -= 1
    clips = args.batch_size * repeat_aug
    steps = round(args.epochs * num_videos / clips)
    if steps < 1:
        raise InputError(f"--epochs {args.epochs:g} of {num_videos} are less than one step")
    return Plan(num_videos, steps, clips, micro_batch, share // micro_batch)


def distribute(model, args):
    """The model as it is trained: compiled, with --compile, and in DDP on several processes."""
    for module in model.modules():
        # Block by block: few graphs, whatever the number of visible tokens.
        if args.compile and isinstance(module, Block):
            module.compile()
    if world_size() == 1:
        return model
    return DistributedDataParallel(model)


def count_flops(model_class, config, *inputs):
    """Training FLOPs per clip: three times a forward pass, counted from shapes alone."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = model_class(**config)
        T = config["num_frames"]
        side = config["img_size"]
        model(torch.empty(1, 3, T, side, side), *inputs)
    return 3 * counter.get_total_flops()


def print_plan(args, plan, model, videos, flops):
    """Print what a run will do, and what looks wrong with it."""
    if rank() > 0:
        return
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    where = f"{world_size()} x {args.device}"
    print(f"{args.model}: {millions:.1f} M parameters, {args.precision} on {where}")
    print(f"{videos.source}: {videos.unit} {plan.videos}, effective epochs {args.epochs:g}")
    print(
        f"steps {plan.steps}, of {videos.unit} {args.batch_size}, clips {plan.clips}; at once "
        f"{plan.micro_batch}; learning rate {args.lr:.3g}, warm-up {args.warmup_epochs:g}"
    )
    if plan.steps < 200:
        print("warning: so few steps teach little; try more --epochs or a smaller --batch_size")
    if rest := args.img_size % model.patch_size:
        print(f"warning: {rest} of {args.img_size} rows and columns fill no patch and are dropped")
    seconds = (flops or 0) * plan.clips / 1e11
    if args.device == "cpu" and seconds > 10:
        print(f"warning: a step takes {seconds:,.0f} s on a CPU of 100 GFLOP/s")


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path; what is written there is renamed to path, on an error deleted.

    Raises InputError with the file's name if it cannot be written.
    """
    path = Path(path)
    tmp = Path(f"{path}.tmp")
    try:
        os.makedirs(path.parent, exist_ok=True)
        yield tmp
        tmp.replace(path)
    except (OSError, RuntimeError) as error:
        while error.__context__:  # torch.save hides the first error behind its own
            error = error.__context__
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be written: {error}") from None
        raise error from None  # Ctrl-C, or a worker's death, which PyTorch reports anywhere
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path, content):
    """Write a dict to a file."""
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(content, indent=1))


def append(path, line):
    """Append a line to a file. Raises InputError, naming it, if it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}") from None


def find_checkpoint(folder):
    """The path of a run's latest intact checkpoint, or None if there is no file. Changes nothing.

    Only a file that is proven to be damaged is skipped, with a warning; InputError if all are.
    """
    paths = [*filter(Path.exists, (Path(folder, name) for name in CHECKPOINTS))]
    for path in paths:
        try:
            read_checkpoint(path)
            return path
        except DamagedError as error:
            print(f"warning: {error}")
    if paths:
        raise InputError(f"{folder}: none of its checkpoints can be read; --no-resume starts over")


def was_restarted():
    """Whether torchrun started this process again, after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def resume(args, may_differ, model, optimizer, videos):
    """Load what a run begins with; returns the steps done, and the checkpoint they are from.

    1. A checkpoint in --output_dir, unless --no-resume: the run goes on. Raises InputError if
       arguments outside may_differ have changed: only --no-resume overwrites a run.
    2. Else the weights in --init.
    3. Else nothing: the model keeps its random weights.
    """
    resuming = args.resume or was_restarted()
    path = on_rank0(find_checkpoint, args.output_dir) if resuming else None
    if not path:
        if args.init and "head.weight" in load_pretrained(model, args.init):
            nn.init.trunc_normal_(model.head.weight, std=2e-5)  # a new one; as in mae_st
        return 0, None
    run = read_checkpoint(path)
    then = run.get("args", {})
    now = vars(args)
    differ = [
        f"--{name} was {then.get(name)}, is {now[name]}"
        for name in sorted(now.keys() - may_differ)
        if then.get(name) != now[name]
    ]
    if then.get("stage") != args.stage:
        differ = [f"it is of {then.get('stage')}, not of {args.stage}"]
    if differ:
        raise InputError(
            f"{path}: from a run with other arguments ({'; '.join(differ)}). Restore them to "
            "resume, give another --output_dir to keep that run, or --no-resume to overwrite it"
        )
    check_weights(path, run["model"])
    model.load_state_dict(run["model"])
    optimizer.load_state_dict(run["optimizer"])
    print_rank0(f"{path}: resuming after step {run['step']}")
    if run["videos"] != len(videos):
        print_rank0(f"warning: {run['videos']} {videos.unit} were listed, now {len(videos)}")
    return run["step"], path


def progress(*args, **settings):
    """tqdm's progress bar; redrawn only every 30 s if stderr is a file, to keep that short."""
    settings["mininterval"] = 0.2 if sys.stderr.isatty() else 30
    return tqdm(*args, ncols=79, disable=rank() > 0, **settings)


@dataclass
class Run:
    """The log, the checkpoints and the end of a run; use it in a with statement.

    Processes meet at log points only. There they exchange losses, unreadable videos, and whether
    one was asked to stop, by SIGTERM or Ctrl-C; all leave together at that point. Process 0 saves
    after the very step in which it was asked, since schedulers do not wait long.
    """

    args: argparse.Namespace
    plan: Plan
    videos: object  # a VideoList, or Keyframes
    batches: object  # Batches
    done: int  # steps
    latest: object  # path of the latest checkpoint that is intact, or None
    flops: object  # to train on a clip, or None

    asked = ""  # the signal that this process got
    stopping = ""  # the signal that any process got, known to all of them

    def __post_init__(self):
        self.out = Path(self.args.output_dir)
        self.pending = []  # losses and gradient norms since the last log point, on the device
        self.failed = set()  # names of unreadable videos
        self.logged_at = self.saved_at = time.perf_counter()
        starts = gather(self.done)
        if len(set(starts)) > 1:
            raise InputError(f"{self.out}: start at steps {starts}; do all share this folder?")
        on_rank0(self.take_folder)

    def take_folder(self):
        """Lock the folder for this process, and bring its files to where the run begins."""
        log = self.out / "log.jsonl"
        os.makedirs(self.out, exist_ok=True)
        self.lock = open(self.out / ".lock", "w")  # noqa: SIM115, held until the process ends
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(
                f"{self.out}: another run is writing there; end it, or give another --output_dir"
            ) from None
        except OSError:
            pass  # this file system knows no locks
        if self.done == 0 and not was_restarted():  # no earlier run may mix with this one
            for path in self.out.glob("*.*"):
                if path.suffix in (".pt", ".log", ".jsonl"):
                    path.replace(f"{path}.replaced")
        elif log.exists():  # a killed run wrote lines after its last save
            lines = re.findall(r'(?m)^({"step": (\d+), .*}\n)', log.read_text(errors="replace"))
            with atomic_write(log) as tmp:
                tmp.write_text("".join(x for x, step in lines if int(step) <= self.done))
        if self.done == self.plan.steps:
            print(f"{self.out}: this run is finished: step {self.done} was its last")
        write_json(self.out / "args.json", vars(self.args))
        self.keep_checkpoint()

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.request_stop)
        self.bar = progress(total=self.plan.steps, initial=self.done)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.bar.close()
        self.batches.close()

    def request_stop(self, number, _):
        """The signal handler: ask the run to save and stop; a second Ctrl-C ends it at once."""
        self.asked = signal.Signals(number).name
        self.batches.stopping = True
        self.saved_at = -math.inf  # save_due is true once
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"stopping soon; Ctrl-C again ends at once\n")

    def every(self, epochs):
        """Whether a multiple of `epochs` effective epochs was completed since the last log."""
        if not epochs:
            return False
        before = (self.done - 1) // self.args.log_interval * self.args.log_interval
        # Rounded, for 0.3 // 0.1 is 2.
        now, then = (round(self.plan.epoch(step) / epochs, 9) for step in (self.done, before))
        return int(now) > int(then)

    def record(self, loss, grad_norm):
        """Count a step. Its values stay on the device until the next log point."""
        self.pending.append(torch.stack([loss, grad_norm]))
        self.done += 1
        self.bar.update()

    def at_log_point(self):
        """Whether the processes meet now; a single process also logs when asked to stop."""
        due = self.done % self.args.log_interval == 0 or self.done == self.plan.steps
        return due or (world_size() == 1 and self.asked)

    def log(self, **settings):
        """Write a line of log.jsonl with the mean loss since the last one; all processes together.

        Raises FloatingPointError if a loss or gradient norm is not finite, InputError if too
        many videos are unreadable.
        """
        batches = self.batches
        pending = torch.stack(self.pending).tolist()
        reports = gather((pending, batches.waited, batches.failures, self.asked))
        values, waited, failures, asked = zip(*reports)
        values = torch.tensor(values, dtype=torch.float64)  # (processes, steps, loss and norm)
        for part in failures:
            self.note_failures(part)
        self.check_finite(values)
        seconds = time.perf_counter() - self.logged_at
        speed = len(pending) * self.plan.clips / seconds  # clips/s
        loss = values[..., 0].mean().item()
        self.write(
            step=self.done,
            epoch=self.plan.epoch(self.done),
            loss=loss,
            **settings,
            grad_norm=pending[-1][1],
            clips_per_s=speed,
            data_wait=max(waited) / seconds,  # all wait for the slowest
            tflops=self.flops and self.flops * speed / 1e12,
        )
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} clips/s", refresh=False)
        self.stopping = max(asked)  # a name, if any has one
        self.pending = []
        batches.waited = 0.0
        batches.failures = []

    def write(self, **line):
        """Append a line to log.jsonl, and restart its clock: that of validation does not count."""
        if rank() == 0:
            append(self.out / "log.jsonl", json.dumps(line))
        self.logged_at = time.perf_counter()

    def note_failures(self, failures):
        """Log unreadable videos in failures.log; raise InputError if there are too many."""
        for index, reason in failures:
            name = self.videos.name(index)
            if rank() == 0 and name not in self.failed:
                tqdm.write(f"skipped {name}: {reason}")
                append(self.out / "failures.log", f"{name}\t{reason}")
            self.failed.add(name)
        check_failures(self.args, len(self.failed), self.videos)

    def check_finite(self, values):
        """Raise FloatingPointError, with the names of the videos, if a loss or norm is not finite.

        values: (processes, steps, 2) since the last log point.
        """
        # The first bad step; in it a loss before a norm, which is the same on all processes.
        bad = (~values.isfinite()).permute(1, 2, 0).nonzero()  # (step, loss or norm, process)
        if len(bad):
            first, _, process = bad[0].tolist()
            step = self.done - values.shape[1] + first
            loss, norm = values[process, first].tolist()
            names = [self.videos.name(index) for _, index in self.batches.keys(step, process)[:10]]
            raise FloatingPointError(
                f"step {step}: loss {loss}, gradient norm {norm}. Lower --lr, or try --precision "
                f"fp32. Checkpoints in {self.out} are from earlier steps. The step's "
                f"{self.videos.unit}:\n" + "\n".join(names)
            )

    def save_due(self):
        """Whether process 0 saves now: at a log point, or at once if it was asked to stop."""
        if rank() > 0:
            return False
        late = time.perf_counter() - self.saved_at > 60 * self.args.save_minutes
        # Between log points (log empties pending) only a stop is saved; log has not checked these
        # losses yet.
        if self.pending:
            return self.asked and late and torch.stack(self.pending).isfinite().all()
        ends = self.stopping or self.done == self.plan.steps
        return late or ends or self.every(self.args.keep_epochs)

    def save(self, model, optimizer, **content):
        """Write a checkpoint with all a resumed run needs, and what else is given as content.

        A kill at any time leaves one intact.
        """
        path, previous = (self.out / name for name in CHECKPOINTS)
        content |= dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=self.done)
        content |= dict(args=vars(self.args), videos=len(self.videos))
        with atomic_write(path) as tmp:
            with open(tmp, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            if self.latest == path:  # a damaged file does not become the previous one
                path.replace(previous)
        self.latest = path
        self.saved_at = time.perf_counter()
        self.keep_checkpoint()

    def keep_checkpoint(self):
        """Copy the latest checkpoint if --keep_epochs asks for it, and it is not there yet."""
        kept = self.out / f"checkpoint_epoch{self.plan.epoch(self.done):.10g}.pt"
        if self.done and self.every(self.args.keep_epochs) and not kept.exists():
            with atomic_write(kept) as tmp:
                shutil.copyfile(self.latest, tmp)

    def report_end(self):
        """Print how the run ended; returns whether it was asked to stop."""
        gather(None)  # a barrier: nobody leaves before the last checkpoint is written
        if self.failed:
            print_rank0(f"unreadable {self.videos.unit}: {len(self.failed)}, see failures.log")
        if self.stopping:
            print_rank0(
                f"asked to stop ({self.stopping}): saved after step {self.done} of "
                f"{self.plan.steps} in {self.out}; the same command without --no-resume goes on"
            )
        return self.stopping


def check_failures(args, number, videos):
    """Raise InputError if all videos are unreadable, or more than --max_failures."""
    limit = max(4, len(videos) // 100) if args.max_failures is None else args.max_failures
    if number > min(limit, len(videos) - 1):
        raise InputError(
            f"{number} of {len(videos)} {videos.unit} cannot be read; --max_failures allows "
            f"{limit}; see {args.output_dir}/failures.log"
        )


def run_main(main):
    """Run a stage's main function; an error the user can fix becomes one line."""
    message = status = None
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # names may be any bytes
    try:
        status = main()
    except KeyboardInterrupt:
        message = "interrupted; the same command resumes from the last checkpoint, if there is one"
    except (ConnectionError, EOFError) as error:  # while a data worker sent something
        message = f"error: DataLoader worker exited unexpectedly: {error}"
    except (InputError, FloatingPointError, OSError) as error:
        message = f"error: {error}"
    except RuntimeError as error:
        message = "error: " + str(error).split("\n")[0]
        if dist.is_initialized() and re.search("[Cc]onnection|[Tt]imed out|NCCL|gloo", message):
            message += "; another process has ended or does not answer: see its message"
        elif "DataLoader worker" not in message:
            raise
    if message:  # raised here, not above: a traceback would keep the data workers alive
        if "DataLoader worker" in message:
            message += "; if it ran out of memory or shared memory, use fewer --num_workers"
        sys.exit(f"{Path(sys.argv[0]).name}: {message}")
    if dist.is_initialized():
        time.sleep(0.1)  # torch 2.6's gloo cannot free its last tensors once this begins
        dist.destroy_process_group()
    sys.exit(status)
