"""How fast it is, as shares of limits that are measured in the same run: the same on a laptop and on a GPU.

    python tests/benchmark.py step                     pre-training step at each mask ratio; fine-tuning, masked and not
    python tests/benchmark.py step --model vit_l --clips 1 --ratios 0 0.9
    python tests/benchmark.py data [VIDEO ...]         loading, on one core, against decoding alone
    python tests/benchmark.py plan --gpus 8            what whole runs take: hours, and cores to decode with

What was tried for speed, and what it gave (2 CPU cores with AVX-512 bf16, unless another machine is named):

    tubelets instead of Conv3d       embed only what is visible: a masked ViT-B fine-tuning step is 5.2 x faster at 0.75;
                                     a convolution over all pixels, then dropping, costs the same embedding at any ratio
    crop + scale + RGB in one pass   libswscale per wanted frame: a 16-frame clip of 224 takes 5 ms; whole frames to RGB
                                     and resizing in torch took 4 to 8 times as long
    TorchCodec instead of PyAV       stays out: version 0.17, on one core, with torchvision's crop and resize, takes 1.0 times
                                     as long for one clip of a 340 x 256 video with GOP 250, 1.3 times for four; 1.2 to
                                     1.3 times with GOP 12; 1.0 to 1.5 times at 854 x 480
    skip_frame NONREF                frames that are neither wanted nor referred to are not decoded: 25-30 % less time on
                                     H.264 with B-frames
    torchvision loaded where used    --help in 2.3 s instead of 3.7 s: importing it loads torch._dynamo
    mirrored in the same pass        "augment" of 4 Kinetics-size clips takes 10.7 ms instead of 14.8: 86 % of the floor,
                                     not 80
    one generator seeded a clip      torch.manual_seed also notes a stack trace for each device that is not in use:
                                     a 32 x 32 demo clip in 1.4 ms instead of 1.7
    half the cores for vit_demo      one thread and one worker on two cores: 315 clips/s instead of 255 to 270; where other
                                     programs run beside it, 190 clips/s instead of 9: OpenMP's threads wait for one another
    fp32 for vit_demo                its matrices are too small for bf16 on a CPU: fine-tuning 73 clips/s instead of 53
    GELU computed twice              stays out: 6 % less memory of a ViT-B step, no slower; inductor does it by itself
    glibc keeping what is freed      model.keep_freed_memory: a ViT-B step in fp32 takes 7.7 s instead of 10.3, as the kernel
                                     clears fewer pages, and 2.77 GiB instead of 2.71; with N x N attention, 10.8 s instead
                                     of 17.0, and 6.2 GiB instead of 4.4: what is freed does not always fit (AMD EPYC)
    huge pages for tensors           stays out: THP_MEM_ALLOC_ENABLE=1 saves two page faults in three, and no time that
                                     shows: 5.3 to 6.4 s a ViT-B step in fp32, against 5.4 to 7.1
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import finetune_ava
import finetune_cls
import mae_pretrain
import model as m

RATIOS = 0, 0.5, 0.75, 0.9, 0.95


def seconds(function, at_least=1.0):
    """The fastest of several calls, after one to warm up; of two, where they take long."""
    function()
    taken = []
    while len(taken) < 2 or sum(taken) < at_least:
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return min(taken)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device, precision):
    """FLOP/s of large square matrix products, kept up as long as steps take: the limit these are measured against."""
    n, dtype = (8192 if device.type == "cuda" else 2048), torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    synchronize(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 5:
        a @ b
        synchronize(device)
        count += 1
    return 2 * n**3 * count / (time.perf_counter() - start)


# --------------------------------------------------------------------------------------------------------------- step


def build(task, size, device="cpu", again=False):
    """The model of a stage, and a function of (video, mask_ratio, noise) that gives its loss."""
    config = m.SIZES[size] | {"checkpoint_activations": again}
    with torch.device(device):
        if task == "pretrain":
            decoder = dict(decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=1) if size == "vit_demo" else {}
            mae = m.MAE(**config, **decoder)
            return mae, lambda net, video, ratio, noise: net(video, ratio, noise)[0]
        classifier = m.Classifier(400, **config).train()
        target = torch.zeros(1, dtype=torch.long, device=device)
        return classifier, lambda net, video, ratio, noise: F.cross_entropy(
            net(video, ratio, noise).float(), target.expand(len(video))
        )


def step_flops(task, size, ratio):
    """Floating point operations of a step for one clip, forward and backward, counted on shapes alone."""
    model, loss_of = build(task, size, "meta")
    side, frames = model.grid[1] * model.patch_size, model.grid[0] * model.t_patch_size
    video = torch.zeros(1, 3, frames, side, side, dtype=torch.uint8, device="meta")
    counter = FlopCounterMode(display=False)
    with counter:
        loss_of(model, video, ratio, torch.zeros(1, np.prod(model.grid), device="meta")).backward()
    return counter.get_total_flops()


def matrix_attention(self, x, grid=None):
    """Attention as it was before flash kernels: the N x N matrices of all heads are held, and kept to go backward."""
    q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # (B, heads, N, N)
    return self.proj((weights @ v).transpose(1, 2).flatten(2))


def run_step(task, size, ratio, clips, device, precision, compiled=False, attention=None, again=False):
    """Time forward + backward + optimizer; in a process of its own, whose memory tells. Prints nothing: a dict."""
    device, _, _ = m.start_process(argparse.Namespace(device=device, model=size))
    if attention == "N x N":
        m.Attention.forward = matrix_attention
    rate = matrix_rate(device, precision)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model, loss_of = build(task, size, device, again)
    optimizer = torch.optim.AdamW(m.parameter_groups(model, 0.05), lr=1e-5, fused=True)
    if compiled:
        model.compile()
    side, frames = model.grid[1] * model.patch_size, model.grid[0] * model.t_patch_size
    video = torch.randint(0, 256, (clips, frames, side, side, 3), dtype=torch.uint8, device=device)
    video, noise = video.permute(0, 4, 1, 2, 3), torch.rand(clips, int(np.prod(model.grid)), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(model, video, ratio, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)

    taken = seconds(step, 5.0)
    rate = max(rate, matrix_rate(device, precision))  # before and after: machines are noisy
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base
    return dict(seconds=taken, memory=memory, rate=rate)


def alone(function, *args, **kwargs):
    """Call a function in a fresh process: its peak memory is that of the function."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args, kwargs)


def report(name, flops, clips, row):
    share = flops * clips / row["seconds"] / row["rate"]
    print(
        f"{name:34}{row['seconds']:9.3f} s{clips / row['seconds']:9.2f}{row['memory'] / 2**30:9.2f} GiB"
        f"{flops / 1e9:10.1f}{row['rate'] / 1e12:9.3f}{share:8.0%}",
        flush=True,
    )


def masked_schedule(times, start, steps=1000):
    """Mean time of a step whose mask ratio falls from `start` to 0 along the cosine of finetune_cls (Table 11)."""
    ratios = sorted(times)
    at = [finetune_cls.mask_ratio_at(step, steps, start) for step in range(steps)]
    return float(np.interp(at, ratios, [times[ratio] for ratio in ratios]).mean())


def benchmark_step(args):
    setting = dict(device=args.device, precision=args.precision, compiled=args.compile)
    print(f"{args.model}, {args.clips} clips, {args.precision} on {args.device}{', compiled' if args.compile else ''}")
    print(f"{'forward + backward + optimizer':34}{'step':>11}{'clips/s':>9}{'memory':>13}{'GFLOP/clip':>12}", end="")
    print("  matrix TFLOP/s   share")
    times = {}
    for ratio in args.ratios:
        row = alone(run_step, "pretrain", args.model, ratio, args.clips, **setting)
        times[ratio] = row["seconds"]
        flops = step_flops("pretrain", args.model, ratio)
        report(f"pre-train, {ratio:.0%} masked", flops, args.clips, row)
        if ratio == 0.9:
            matrix = alone(run_step, "pretrain", args.model, ratio, args.clips, attention="N x N", **setting)
            report("  with N x N attention", flops, args.clips, matrix)
            again = alone(run_step, "pretrain", args.model, ratio, args.clips, again=True, **setting)
            report("  with --checkpoint_activations", flops, args.clips, again)
            both = ", ".join(f"{r['memory'] / matrix['memory']:.2f}" for r in (row, again))
            print(f"  memory, as a share of N x N attention's, and so with --checkpoint_activations: {both}")
    if 0 in times and 0.9 in times:
        print(f"90 % masked is {times[0] / times[0.9]:.1f} x faster than none (paper: 4.1; bar for ViT-L: 4.5)")
    if args.finetune:
        times = {}
        for ratio in (0, 0.25, 0.5, 0.75):
            row = alone(run_step, "finetune", args.model, ratio, args.clips, **setting)
            times[ratio] = row["seconds"]
            report(f"fine-tune, {ratio:.0%} masked", step_flops("finetune", args.model, ratio), args.clips, row)
        for start, paper in ((0.5, 1.2), (0.75, 1.3)):
            gain = times[0] / masked_schedule(times, start)
            print(f"whole fine-tuning, masked from {start:.0%} to 0: {gain:.2f} x (Table 11: {paper})")


# --------------------------------------------------------------------------------------------------------------- data


def kinetics_video(path, gop, length=10, height=256, width=340):
    """A video of the size that Kinetics is kept in: H.264, 30 frames a second, a drifting texture with noise."""
    rng = np.random.RandomState(0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    noise = rng.normal(0, 6, (8, height, width, 1))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "23", "g": str(gop), "preset": "medium"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for t in range(30 * length):
            waves = [np.sin((x * np.cos(a) + y * np.sin(a)) / s + t / 9) for a, s in ((0.3, 9), (1.2, 23), (2.2, 41))]
            picture = 128 + 35 * np.stack(waves, -1) + noise[t % 8]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8))))
        container.mux(stream.encode(None))
    return path


def times_of(args, duration, repeats, seed):
    videos = data.VideoList("benchmark", ".", ["x"])
    clips = data.Clips(videos, argparse.Namespace(**vars(args) | {"repeats": repeats}))
    return np.concatenate([clips.times(duration, data.stateless_seed(seed, repeat)) for repeat in range(repeats)])


def decode_floor(path, times):
    """Decode, and do nothing else: from the key frame before the first wanted frame to the last, in one go."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        first, last = (int((stream.start_time or 0) + t / stream.time_base) for t in (times.min(), times.max()))
        container.seek(max(first, 0), stream=stream)
        for packet in container.demux(stream):
            for frame in packet.decode():
                if frame.pts >= last:
                    return


def plain_loader(path, times, size, boxes):
    """What a straightforward loader does: decode every frame to RGB, pick, crop and resize in torch."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [(float(f.time or 0), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    stamps = np.array([time for time, _ in frames])
    chosen = data.nearest(stamps, times)
    clips = []
    for box, ids in zip(boxes, np.split(chosen, len(boxes))):
        clip = torch.from_numpy(np.stack([frames[i][1] for i in ids])).permute(0, 3, 1, 2)
        top, left, height, width = box
        clip = clip[:, :, top : top + height, left : left + width].float()
        clips.append(F.interpolate(clip, size=size, mode="bilinear").round().byte())
    return torch.stack(clips)


def count_decoded(path, times):
    """How many frames are decoded for the wanted ones, and whether any is decoded twice."""
    seen = []
    decode = data.Video.decode

    def counted(self, packets, wanted):
        seen.extend(packet.pts for packet in packets)
        return decode(self, packets, wanted)

    data.Video.decode = counted
    try:
        with data.Video(path) as video:
            video.frames(times)
    finally:
        data.Video.decode = decode
    return len(seen), len(seen) - len(set(seen))


def benchmark_data(args):
    torch.set_num_threads(1)
    settings = {
        "pre-train": mae_pretrain.parse_args(["--model", "vit_b", "--data", "x"])[0],
        "fine-tune": finetune_cls.parse_args(["--model", "vit_b", "--data", "x"])[0],
    }
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = list(args.videos)
        if not paths:
            demo = Path(folder) / "demo.mp4"
            data.write_video(demo, data.draw_demo_video("disc", "slides", 0), 15)
            paths = [demo, *(kinetics_video(f"{folder}/kinetics_gop{gop}.mp4", gop) for gop in (250, 12))]
        print("one core; times in ms for one opening of the file, the fastest of several")
        print(
            f"{'':26}{'stage':>10}{'samples':>9}{'floor':>8}{'decode':>8}{'to RGB':>8}{'augment':>9}{'all':>8}", end=""
        )
        print(f"{'clips/s':>9}{'of floor':>10}{'plain loader':>14}{'twice':>7}")
        for path in paths:
            with data.Video(path) as video:
                duration = video.duration
            for stage, stage_args in settings.items():
                for repeats in args.repeats:
                    key = (Path(path).stem, stage, repeats)
                    rates[key] = one_row(path, stage, stage_args, repeats, duration)
    return rates


def one_row(path, stage, args, repeats, duration):
    """Measure one line of the table; returns clips/s and the ratio to the floor."""
    args = argparse.Namespace(**vars(args) | {"repeats": repeats})
    rand_augment = args.rand_augment if stage == "fine-tune" else None
    clips = data.Clips(data.VideoList("benchmark", "/", [str(Path(path).resolve())]), args, None, rand_augment)
    spent = dict.fromkeys(("floor", "decode", "to RGB", "all", "plain"), 0.0)
    twice = 0
    draws = 3  # several draws of times and crops: their mean is reported, each the fastest of several calls
    for epoch in range(draws):
        seeds = [data.stateless_seed(args.seed, epoch, 0, repeat) for repeat in range(repeats)]
        times = np.concatenate([clips.times(duration, seed) for seed in seeds])
        with data.Video(path) as video:
            frames = video.frames(times)
        side = data.even(min(data.upright_size(frames[0])) * 0.8)  # a crop of the usual size
        boxes = [(0, 0, side, side)] * repeats
        groups = [frames[i * args.num_frames : (i + 1) * args.num_frames] for i in range(repeats)]

        def decode(times=times):
            with data.Video(path) as video:
                video.frames(times)

        jobs = {
            "floor": lambda times=times: decode_floor(path, times),
            "decode": decode,
            "to RGB": lambda g=groups, b=boxes: [data.to_clip(f, (args.img_size,) * 2, x) for f, x in zip(g, b)],
            "all": lambda epoch=epoch: clips.load(0, epoch),
            "plain": lambda t=times, b=boxes: plain_loader(path, t, (args.img_size,) * 2, b),
        }
        for name, job in jobs.items():
            spent[name] += seconds(job, 0.2) / draws
        twice += count_decoded(path, times)[1]
    rest = max(0.0, spent["all"] - spent["decode"] - spent["to RGB"])
    ms = {name: 1000 * value for name, value in spent.items()}
    print(
        f"{Path(path).stem[:25]:26}{stage:>10}{repeats:9}{ms['floor']:8.1f}{ms['decode']:8.1f}{ms['to RGB']:8.1f}"
        f"{1000 * rest:9.1f}{ms['all']:8.1f}{repeats / spent['all']:9.1f}{spent['floor'] / spent['all']:10.0%}"
        f"{spent['plain'] / spent['all']:12.1f} x{twice:7}",
        flush=True,
    )
    return repeats / spent["all"], spent["floor"] / spent["all"]


# --------------------------------------------------------------------------------------------------------------- plan

SIZES_OF_SETS = {"Kinetics-400": 240_000, "SSv2": 169_000, "AVA": 184_000}  # videos, or keyframes, to train on


def benchmark_plan(args):
    """Hours of each recipe: clips x FLOPs over what the GPUs reach, and the cores that keep them fed."""
    recipes = [
        ("pre-train", size, mae_pretrain.RECIPE, "Kinetics-400", "pretrain", 0.9)
        for size in ("vit_b", "vit_l", "vit_h")
    ]
    recipes += [
        ("fine-tune", size, finetune_cls.KINETICS, "Kinetics-400", "finetune", 0)
        for size in ("vit_b", "vit_l", "vit_h")
    ]
    recipes += [("fine-tune", size, finetune_cls.SSV2, "SSv2", "finetune", 0) for size in ("vit_l", "vit_h")]
    recipes += [("detect", size, finetune_ava.AVA, "AVA", "finetune", 0) for size in ("vit_l", "vit_h")]
    reached = {}
    for task, ratio in (("pretrain", 0.9), ("finetune", 0)):
        if args.tflops:
            reached[task] = args.tflops * 1e12
        else:
            row = alone(run_step, task, args.model, ratio, args.clips, args.device, args.precision, args.compile)
            reached[task] = step_flops(task, args.model, ratio) * args.clips / row["seconds"]
            print(f"{args.model} {task}: {reached[task] / 1e12:.3f} TFLOP/s reached on this {args.device}")
    with tempfile.TemporaryDirectory() as folder:
        path, loading = kinetics_video(f"{folder}/kinetics_gop250.mp4", 250), {}
        torch.set_num_threads(1)
        print("loading, one core (columns as in `data`):")
        for stage, parse, repeats in (("pre-train", mae_pretrain, (4,)), ("fine-tune", finetune_cls, (1, 2))):
            stage_args = parse.parse_args(["--model", "vit_b", "--data", "x"])[0]
            for n in repeats:
                loading[stage, n] = one_row(path, stage, stage_args, n, 10.0)[0]
    print(f"\n{args.gpus} GPUs, each at the rate above; a core of this machine decodes")
    print(f"{'recipe':42}{'epochs':>8}{'M clips':>9}{'GFLOP/clip':>12}{'hours':>9}{'cores a GPU':>13}")
    for stage, size, table, name, task, ratio in recipes:
        row = m.column("", table, size)
        repeats = row.get("repeated sampling", 1)
        clips, flops = SIZES_OF_SETS[name] * row["epochs"], step_flops(task, size, ratio)
        per_gpu = reached[task] / flops  # clips/s
        hours = clips / per_gpu / args.gpus / 3600
        cores = per_gpu / loading["pre-train" if stage == "pre-train" else "fine-tune", repeats]
        text = f"{stage} {size} on {name}"
        print(f"{text:42}{row['epochs']:8}{clips / 1e6:9.1f}{flops / 1e9:12.0f}{hours:9.1f}{cores:13.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cuda = torch.cuda.is_available()
    best = "bf16" if m.has_bf16(torch.device("cuda" if cuda else "cpu")) else "fp32"
    for name, function in {"step": benchmark_step, "data": benchmark_data, "plan": benchmark_plan}.items():
        command = commands.add_parser(name, help=function.__doc__)
        command.set_defaults(function=function)
        if name == "data":
            command.add_argument(
                "videos", nargs="*", metavar="VIDEO", help="default: the demo's, and of Kinetics' size"
            )
            command.add_argument("--repeats", type=int, nargs="+", default=(1, 2, 4), help="clips of one opening")
            continue
        command.add_argument("--model", choices=m.SIZES, default="vit_b")
        command.add_argument("--device", default="cuda" if cuda else "cpu")
        command.add_argument("--precision", choices=("fp32", "bf16"), default=best)
        command.add_argument("--clips", type=int, default=4, help="clips in a step")
        command.add_argument("--compile", action="store_true", help="torch.compile the model")
        if name == "step":
            command.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="mask ratios to pre-train at")
            command.add_argument("--finetune", action=argparse.BooleanOptionalAction, default=True)
        else:
            command.add_argument("--gpus", type=int, default=8)
            command.add_argument("--tflops", type=float, help="what a GPU reaches; default: what this device does")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
