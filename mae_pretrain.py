"""Stage 1: pre-train a masked autoencoder on unlabelled video (section 3; settings of Table 5a).

    python mae_pretrain.py --dataset demo                     minutes on a laptop, on videos that are made here
    torchrun --nproc_per_node 8 mae_pretrain.py               ViT-L on data/kinetics400: Table 5a as it stands
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 mae_pretrain.py --model vit_h
    python mae_pretrain.py --data FOLDER --model vit_demo --epochs 40 --repeats 4 --batch_size 8 --lr 2e-3
    python mae_pretrain.py --visualize a.mp4 b.mp4 --init runs/mae_pretrain_demo_vit_demo/checkpoint.pt

Epochs are effective: how often each video is sampled. A video that is opened gives 4 clips, so 800 epochs are 200
passes over the list. A batch counts videos: 512 of them are 2048 clips a step. In the paper, 800 epochs of ViT-L on
Kinetics-400 give 84.4 % after fine-tuning (Table 11). They are 192 million clips of 476 GFLOP, forward and backward:
8 hours on 8 GPUs that each reach 400 TFLOP/s, if decoding keeps up.
"""

import argparse
import contextlib
import functools
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import data
import model as m

RECIPE = {  # Table 5a: Kinetics pre-training
    "optimizer": torch.optim.AdamW,
    "optimizer momentum": (0.9, 0.95),
    "weight decay": 0.05,
    "learning rate": 1.6e-3,
    "learning rate schedule": m.cosine_decay,
    "warmup epochs": 120,
    "epochs": 800,
    "repeated sampling": 4,
    "augmentation": {"hflip": True, "crop": [0.5, 1.0]},
    "batch size": 512,
    "gradient clipping": 0.02,
}
DEMO_RECIPE = RECIPE | {  # vit_demo, minutes on two CPU cores: many small steps of many different videos
    "learning rate": 2e-3,
    "warmup epochs": 4,
    "epochs": 48,
    "repeated sampling": 1,  # clips of such short videos are much alike, and opening one costs little
    "batch size": 32,
    "gradient clipping": 1.0,
}
DECODERS = {"vit_demo": {"width": 64, "depth": 2}}  # every other model: 512 wide, 4 blocks (Table 12)
MICRO_BATCH = {"vit_b": 32, "vit_l": 16, "vit_h": 8}  # videos that fit on a GPU of 80 GB with room to spare


def parse_args(argv=None):
    parser = m.make_parser(__doc__, data.LAYOUTS)
    data.add_arguments(parser)
    data.add_sampling_arguments(parser)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--mask_ratio", type=float, default=0.9, help="share of tokens that are hidden, in [0, 1)")
    add("--masking", choices=m.MASKINGS, default="agnostic", help="which tokens are hidden together (Figure 4)")
    add("--norm_pix_loss", action=switch, help="normalise each target patch by its mean and deviation")
    add("--target", choices=("slice", "tubelet"), default="slice", help="predict a tubelet's first frame, or all of it")
    add("--decoder_width", type=int, help="Table 12b: 128, 256 or 512")
    add("--decoder_depth", type=int, help="Table 12c: 1, 2, 4 or 8 blocks")
    add("--decoder_heads", type=int, help="default: 64 wide each; later released files have 16 at width 512")
    add("--visualize", nargs="+", metavar="VIDEO", help="do not train: draw what the model in --init reconstructs")

    first = m.first_look(parser, argv)
    dataset, size = first.dataset, first.model
    recipe = DEMO_RECIPE if size == "vit_demo" else RECIPE
    parser.set_defaults(
        **m.defaults_of(recipe),
        hflip=recipe["augmentation"]["hflip"] and dataset != "ssv2",
        crop=recipe["augmentation"]["crop"],
        segments=dataset == "ssv2",
        norm_pix_loss=size != "vit_demo",  # in the demo's plain patches, nearly all that counts is their mean
        decoder_width=DECODERS.get(size, {}).get("width", 512),
        decoder_depth=DECODERS.get(size, {}).get("depth", 4),
    )
    args = parser.parse_args(argv)
    m.settle(args, recipe, "mae_pretrain", parser, argv)
    if args.decoder_heads is None:
        args.decoder_heads = max(1, args.decoder_width // 64)
    if args.decoder_width % args.decoder_heads:
        raise m.InputError(f"--decoder_heads {args.decoder_heads} does not divide --decoder_width {args.decoder_width}")
    return args, recipe


def config_of(args):
    """The arguments of model.MAE that the command line describes."""
    return m.SIZES[args.model] | dict(
        img_size=args.img_size,
        num_frames=args.num_frames,
        decoder_embed_dim=args.decoder_width,
        decoder_depth=args.decoder_depth,
        decoder_num_heads=args.decoder_heads,
        norm_pix_loss=args.norm_pix_loss,
        pred_t_dim=args.num_frames if args.target == "tubelet" else None,
        masking=args.masking,
        checkpoint_activations=bool(args.checkpoint_activations),
    )


def train(args, recipe):
    device, rank, world = m.start_process(args)
    out = Path(args.output_dir)

    # Data
    args.data = data.locate(args, rank, "unlabelled")
    videos = held_out = data.find_videos(args.data, "train", args.videos)
    if Path(args.data).is_dir():
        try:
            held_out = data.find_videos(args.data, "val", args.videos)
        except m.InputError as error:
            print(f"pictures will be of training videos: {error}")
    steps, micro_batch, micro_steps = m.plan(args, videos, world, MICRO_BATCH.get(args.model))

    # Model and optimizer, new or as the run left them
    torch.manual_seed(args.seed)
    config = config_of(args)
    mae = m.MAE(**config)
    m.num_visible(mae.grid, args.mask_ratio, args.masking)  # says what is wrong with a ratio before anything starts
    optimizer, start = m.prepare(mae, recipe, args, device, videos)
    ddp = m.parallel(mae, args, device, world)
    autocast = m.autocast_of(args, device)
    m.announce(args, mae, videos, device, world, steps, micro_batch)

    # Clips: each brings the noise that it is masked by
    noise_of = functools.partial(m.masking_noise, mae.grid, args.mask_ratio, args.masking)
    clips = data.Clips(videos, args, noise_of)
    stream = data.Stream(len(videos), args.batch_size, micro_batch, rank, world, args.seed, start, steps)
    batches = data.each(data.make_loader(clips, stream, args, device))
    failures = data.Failures(out / "failures.log", videos, args.max_failures, start > 0)
    log = m.Log(args, start, steps, videos, failures)

    for step in range(start, steps):
        lr = recipe["learning rate schedule"](log.epoch(step), args.lr, args.warmup_epochs, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        loss = torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            batch = log.next(batches)
            video, noise = (batch[name].to(device, non_blocking=True) for name in ("video", "noise"))
            last = micro_step == micro_steps - 1  # only then do the processes exchange gradients
            with contextlib.nullcontext() if last or world == 1 else ddp.no_sync():
                with autocast():
                    micro_loss, _, _ = ddp(video, args.mask_ratio, noise)
                (micro_loss / micro_steps).backward()
            loss += micro_loss.detach() / micro_steps
        norm = torch.nn.utils.clip_grad_norm_(mae.parameters(), args.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad()

        if log.step(loss, norm, lr=lr):
            log.save(mae, optimizer, config=config)
    log.close()
    batches.close()  # its workers

    if rank == 0:
        shown = min(4, len(held_out))
        paths = [held_out.path(i * len(held_out) // shown) for i in range(shown)]
        visualize(mae, paths, out / "reconstructions", args, device)
        print(f"{out}: checkpoint.pt, log.jsonl, args.json, reconstructions/")
        print(f"next: python mae_pretrain.py --visualize VIDEO --init {out / 'checkpoint.pt'}")
        labelled = "--dataset demo" if args.dataset == "demo" else f"--model {args.model} --data LABELLED_VIDEOS"
        print(f"  or: python finetune_cls.py {labelled} --init {out / 'checkpoint.pt'}")


# ------------------------------------------------------------------------------------------------------- pictures


@torch.no_grad()
def reconstruct(mae, clip, mask_ratio):
    """Original, masked input and reconstruction of one clip: uint8 (T, H, W, 3) -> three of (T', H', W', 3).

    T' counts the frames that are predicted. Visible patches are shown as they are. Where the model predicts normalised
    patches, each is scaled back with the mean and deviation of the patch that it stands for.
    """
    video = clip.permute(3, 0, 1, 2)[None]  # (1, 3, T, H, W)
    _, pred, mask = mae(video, mask_ratio)
    truth = m.normalize(m.patchify(video, mae.patch_size, mae.t_patch_size)[..., : pred.shape[-1]])  # (1, N, p*p*3)
    if mae.norm_pix_loss:
        var, mean = torch.var_mean(truth, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    hidden = mask[..., None] == 1
    pictures = []
    for tokens in (truth, truth.masked_fill(hidden, 0.0), torch.where(hidden, pred.float(), truth)):
        pixels = m.unpatchify(tokens, mae.grid_of(video), mae.patch_size)[0].permute(1, 2, 3, 0)
        pictures.append(((pixels * m.PIXEL_STD + m.PIXEL_MEAN) * 255).round().clamp(0, 255).byte().cpu())
    return pictures


def draw_figure(path, rows, caption):
    """Write a PNG laid out as Figures 2 and 7: a row for each name of {name: (T, H, W, 3)}, time from left to right."""
    T, H, W = next(iter(rows.values())).shape[:3]
    zoom, gap, left = max(1, 96 // H), 2, 120
    H, W = H * zoom + gap, W * zoom + gap
    picture = Image.new("RGB", (left + T * W, len(rows) * H + 24), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for i, (name, frames) in enumerate(rows.items()):
        draw.text((8, i * H + H // 2 - 10), name, "black", font)
        for j, frame in enumerate(frames):
            tile = Image.fromarray(frame.numpy()).resize((W - gap, H - gap), Image.Resampling.NEAREST)
            picture.paste(tile, (left + j * W, i * H))
    draw.text((8, len(rows) * H + 2), caption, "black", font)
    picture.save(path)


def visualize(mae, paths, out, args, device):
    """For each video the clip in its middle as a PNG and an H.264 animation in `out`; names what cannot be drawn.

    Returns how many cannot.
    """
    mae.eval()
    out.mkdir(parents=True, exist_ok=True)
    stems, failed = Counter(Path(path).stem for path in paths), 0
    views = data.Views(data.VideoList("--visualize", ".", paths), args, (1, 1))
    for i, path in enumerate(paths):
        sample = views[i]
        if "failure" in sample:
            print(f"skipped {path}: {sample['failure']}")
            failed += 1
            continue
        torch.manual_seed(data.stateless_seed(args.seed, i))  # of the mask
        pictures = reconstruct(mae, sample["video"][0].to(device), args.mask_ratio)
        caption = f"{Path(path).name}: {args.mask_ratio:.0%} hidden ({mae.masking}). "
        if mae.norm_pix_loss:
            caption += "Predicted patches are scaled back with the mean and deviation of the true ones."
        stem = Path(path).stem
        name = out / (stem if stems[stem] == 1 else f"{stem}_{i}")
        draw_figure(f"{name}.png", dict(zip(("original", "masked", "reconstruction"), pictures)), caption)
        span = max(1, args.sampling_rate) * args.num_frames  # of the clip, in 30ths of a second
        zoom, fps = max(1, 240 // args.img_size), Fraction(data.FPS * len(pictures[0]), span)
        strip = torch.cat(pictures, 2).numpy().repeat(zoom, 1).repeat(zoom, 2)  # side by side
        data.write_video(f"{name}.mp4", strip, fps)
        print(f"{name}.png, {name}.mp4")
    return failed


def main():
    args, recipe = parse_args()
    if not args.visualize:
        return train(args, recipe)
    device, _, _ = m.start_process(args)
    seen = "num_frames", "sampling_rate", "img_size", "segments", "mask_ratio", "masking"
    mae, _ = m.restore(args, m.MAE, config_of, seen)
    mae.masking = args.masking
    failed = visualize(mae.to(device), args.visualize, Path(args.output_dir) / "visualize", args, device)
    if failed:
        raise m.InputError(f"{failed} of {len(args.visualize)} files are no videos that can be read")


if __name__ == "__main__":
    m.run_stage(main)
