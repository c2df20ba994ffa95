"""Stage 1: pre-train a masked autoencoder on unlabelled video (section 3, Table 5a).

    python mae_pretrain.py --dataset demo                       minutes on a laptop, no download
    torchrun --nproc_per_node 8 mae_pretrain.py                 ViT-L on data/kinetics400, Table 5a
    python mae_pretrain.py --visualize a.mp4 --init runs/mae_pretrain_demo_vit_demo/checkpoint.pt

Epochs are effective, as in the paper: how often each video is sampled. Each opened video gives 4
clips, so 800 epochs read the list 200 times. Batches count videos: 512 of them are 2048 clips. In
the paper, 800 epochs of ViT-L on Kinetics-400 give 84.4 % after fine-tuning (Table 11). That is
192 million clips of 476 GFLOP, forward and backward: 8 hours on 8 GPUs of 400 TFLOP/s each.
"""

import math
from fractions import Fraction
from pathlib import Path

# Before torch: model.py sets how its threads wait.
from model import MAE, MASK_TYPES, PIXEL_MEAN, PIXEL_STD, RUN_FLAGS, SIZES, STOPPED, InputError, Run
from model import autocast, cosine_decay, count_flops, distribute, fraction, load_pretrained
from model import make_optimizer, make_parser, make_plan, normalize, on_rank0, parse_with_recipe
from model import positive_int, print_plan, rank, rate, resume, run_main, start_process, switch
from data import FPS, LAYOUTS, Batches, ClipDataset, MultiViewDataset, VideoList, find_videos
from data import make_demo, model_order, stateless_seed, write_png, write_video

import torch
from torchvision.utils import make_grid

KINETICS = dict(  # Table 5a: Kinetics pre-training. Keys are flags, comments the table's words
    optimizer="adamw",  # optimizer: AdamW
    betas=[0.9, 0.95],  # optimizer momentum
    weight_decay=0.05,  # weight decay
    lr=1.6e-3,  # learning rate; its schedule: cosine decay
    warmup_epochs=120,  # warmup epochs
    epochs=800,  # epochs
    repeat_aug=4,  # repeated sampling
    hflip=True,  # augmentation: hflip,
    crop_scale=[0.5, 1.0],  # crop [0.5, 1]
    batch_size=512,  # batch size
    clip_grad=0.02,  # gradient clipping
    # Not in the table: videos that a GPU of 80 GB takes at once.
    micro_batch={"vit_b": 32, "vit_l": 16, "vit_h": 8},
)
SSV2 = dict(hflip=False, segments=True)  # added to a recipe: its labels tell left from right
DEMO = KINETICS | dict(  # vit_demo, minutes on two CPU cores: many small steps of different videos
    lr=3e-3,
    warmup_epochs=2,
    epochs=26,
    repeat_aug=1,  # clips of such short videos are much alike, and opening one costs little
    crop_scale=[0.8, 1.0],  # with more scale jitter, it learns slowly here
    batch_size=16,
    micro_batch=None,  # all of them
    clip_grad=1.0,
    img_size=48,
    precision="fp32",  # matrices this small are slower in bf16
    norm_pix_loss=False,  # it would erase a flat patch's color, nearly all it has
    decoder_embed_dim=64,
    decoder_depth=1,
    decoder_num_heads=4,  # with one, it takes far longer to tell shapes apart
)
MAY_DIFFER = RUN_FLAGS | {"dataset", "data", "videos"}  # on resume


def recipe_of(args):
    recipe = DEMO if args.model == "vit_demo" else KINETICS
    return recipe | SSV2 if args.dataset == "ssv2" else recipe


def parse_args(argv=None):
    parser = make_parser(__doc__, LAYOUTS)
    add = parser.add_argument_group("pre-training").add_argument
    add("--mask_ratio", type=rate, default=0.9, help="share of tokens to hide")
    help = "Figure 4: agnostic = random, space-only = tube, time-only = frame, block-wise"
    add("--mask_type", choices=MASK_TYPES, default="agnostic", help=help)
    add("--repeat_aug", type=positive_int, help="clips per opened video")
    add(
        "--crop_scale",
        type=fraction,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="relative area of a crop",
    )
    add("--segments", action=switch, default=False, help="sample frames by segments, as on SSv2")
    add("--norm_pix_loss", action=switch, default=True, help="normalise target patches")
    add("--pred_t_dim", type=positive_int, help="frames to predict; by default one per tubelet")
    add("--decoder_embed_dim", type=int, default=512, help="Table 12b: 128, 256 or 512")
    add("--decoder_depth", type=int, default=4, help="Table 12c: 1, 2, 4 or 8 blocks")
    add("--decoder_num_heads", type=int, help="by default 64 wide each")
    add("--visualize", nargs="+", metavar="VIDEO", help="draw reconstructions of videos")
    return parse_with_recipe(parser, "mae_pretrain", "kinetics400", recipe_of, argv)


def model_config(args):
    """The keywords of model.MAE."""
    return SIZES[args.model] | dict(
        img_size=args.img_size,
        num_frames=args.num_frames,
        decoder_embed_dim=args.decoder_embed_dim,
        decoder_depth=args.decoder_depth,
        decoder_num_heads=args.decoder_num_heads or max(1, args.decoder_embed_dim // 64),
        norm_pix_loss=args.norm_pix_loss,
        pred_t_dim=args.pred_t_dim,
        mask_type=args.mask_type,
        grad_checkpointing=args.grad_checkpointing,
    )


def train(args):
    device = start_process(args)

    # ---------------------------------------------------------------- data
    on_rank0(make_demo, args)
    videos = on_rank0(find_videos, args, "train")
    plan = make_plan(args, len(videos), args.repeat_aug)

    # --------------------------------------------------------------- model
    torch.manual_seed(args.seed)
    config = model_config(args)
    mae = MAE(**config)
    mae.to(device)
    ddp = distribute(mae, args)

    # ---------------------------------------- optimizer, --init or resume
    optimizer = make_optimizer(args, mae, decay_positions=True)
    start, latest = resume(args, MAY_DIFFER, mae, optimizer, videos)
    flops = count_flops(MAE, config, args.mask_ratio)  # raises if no token is left
    print_plan(args, plan, mae, videos, flops)

    # ---------------------------------------------------------------- loop
    batches = Batches(ClipDataset(videos, args), plan, device, start)
    with Run(args, plan, videos, batches, start, latest, flops) as run:
        for step in range(start, plan.steps):
            lr = cosine_decay(plan.epoch(step), args.lr, args.warmup_epochs, args.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            loss = 0
            for micro_step in range(plan.micro_steps):
                batch = next(batches)
                # Seeds the masks; the 0 keeps them apart from seeds of clips.
                torch.manual_seed(stateless_seed(args.seed, step, rank(), micro_step, 0))
                # With DDP: exchange gradients at the last micro-batch only.
                ddp.require_backward_grad_sync = micro_step == plan.micro_steps - 1
                with autocast(args, device):
                    micro_loss, _, _ = ddp(batch["video"], args.mask_ratio)
                micro_loss = micro_loss / plan.micro_steps
                micro_loss.backward()
                loss += micro_loss.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), args.clip_grad or math.inf)
            optimizer.step()
            optimizer.zero_grad()

            run.record(loss, grad_norm)
            if run.at_log_point():
                run.log(lr=lr)  # raises if the loss is not finite
            if run.save_due():
                run.save(mae, optimizer, config=config)
            if run.stopping:
                break
    if run.report_end():
        return STOPPED

    # -------------------------------------------------------------- figure
    if rank() == 0:
        try:
            videos = find_videos(args, "val")
        except InputError as error:
            print(f"drawing training videos instead: {str(error).splitlines()[0]}")
        count = min(4, len(videos))
        paths = [videos.path(i * len(videos) // count) for i in range(count)]
        visualize(mae, paths, run.out / "reconstructions", args, device)


def unpatchify(tubelets, grid, patch_size):
    """The inverse of patchify: (B, t*h*w, u*p*p*3) -> (B, 3, t*u, h*p, w*p)."""
    p = patch_size
    x = tubelets.unflatten(2, (-1, p, p, 3)).unflatten(1, grid)  # (B, t, h, w, u, p, p, 3)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def reconstruct(mae, video, mask_ratio):
    """Original, masked input, reconstruction: uint8 (1, 3, T, H, W) -> (3 or 4, T', 3, H', W').

    T' counts the predicted frames. Visible patches are shown as they are. With norm_pix_loss,
    predictions get the mean and deviation of the true patch, and in a fourth row, which uses no
    hidden pixels, those of the visible patches on average.
    """
    _, pred, mask = mae(video, mask_ratio)
    tubelets, grid = mae.patchify(video)
    truth = normalize(tubelets[..., : pred.shape[-1]])  # (1, N, pred_frames*p*p*3)
    hidden = mask[..., None] == 1  # (1, N, 1)
    if mae.norm_pix_loss:
        std, mean = torch.std_mean(truth, 2, keepdim=True)  # (1, N, 1)
        average = pred * std[~hidden].mean() + mean[~hidden].mean()
        pred = torch.cat([pred * std + mean, average])  # (2, N, pred_frames*p*p*3)
    rows = torch.cat([truth, truth.masked_fill(hidden, 0), torch.where(hidden, pred, truth)])
    pixels = unpatchify(rows, grid, mae.patch_size) * PIXEL_STD + PIXEL_MEAN
    return (255 * pixels).round().clamp(0, 255).byte().transpose(1, 2).cpu()


def visualize(mae, paths, out, args, device):
    """Draw the middle of each video to `out`: a PNG laid out as Figure 2, and an animation.

    Rows, or columns of the animation, are those of reconstruct. Returns how many videos are
    unreadable.
    """
    mae.eval()
    views = MultiViewDataset(VideoList("--visualize", ".", paths), args, (1, 1))
    failed = 0
    for i, path in enumerate(paths):
        sample = views[i]
        if "failure" in sample:
            print(f"skipped {path}: {sample['failure']}")
            failed += 1
            continue
        torch.manual_seed(stateless_seed(args.seed, i))  # of the mask
        pictures = reconstruct(mae, model_order(sample["video"]).to(device), args.mask_ratio)
        zoom = max(1, 144 // args.img_size)
        pictures = pictures.repeat_interleave(zoom, 3).repeat_interleave(zoom, 4)
        T = pictures.shape[1]
        name = out / f"{i}_{Path(path).stem}"
        grid = make_grid(pictures.flatten(0, 1), nrow=T, pad_value=255)
        write_png(f"{name}.png", grid)
        fps = Fraction(FPS * T, max(1, args.sampling_rate) * args.num_frames)
        write_video(f"{name}.mp4", torch.cat(list(pictures), 3).permute(0, 2, 3, 1), fps)
        rows = f"original, masked ({args.mask_ratio:.0%} {args.mask_type}), reconstruction"
        if mae.norm_pix_loss:
            rows += " as bright as the true patches, and as the visible ones on average"
        print(f"{name}.png, .mp4: {rows}")
    return failed


def main():
    args = parse_args()
    if not args.visualize:
        return train(args)
    device = start_process(args)
    mae = MAE(**model_config(args)).to(device)
    load_pretrained(mae, args.init, strict=True)
    failed = visualize(mae, args.visualize, Path(args.output_dir), args, device)
    if failed:
        raise InputError(f"{failed} of {len(args.visualize)} videos cannot be read")


if __name__ == "__main__":
    run_main(main)
