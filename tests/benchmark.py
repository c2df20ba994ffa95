"""How fast it is, as shares of limits that are measured in the same run: on a laptop as on a GPU.

python tests/benchmark.py step                pre-training step at each mask ratio; fine-tuning
python tests/benchmark.py step --model vit_l --clips 1 --ratios 0 0.9
python tests/benchmark.py data [VIDEO ...]    loading, on one core, against decoding alone
python tests/benchmark.py plan --gpus 8       what whole runs take: hours, and cores to decode with
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

DEMO_DECODER = dict(decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=1)
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
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    synchronize(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 5:
        a @ b
        synchronize(device)
        count += 1
    return 2 * n**3 * count / (time.perf_counter() - start)


def build(task, size, device="cpu", again=False):
    """The model of a stage, and a function of (video, mask_ratio, noise) that gives its loss."""
    config, decoder = m.SIZES[size] | dict(grad_checkpointing=again), {}
    if size == "vit_demo":
        config, decoder = config | dict(img_size=32), DEMO_DECODER
    with torch.device(device):
        if task == "pretrain":
            return m.MAE(**config, **decoder), lambda mae, *clips: mae(*clips)[0]
        classifier = m.Classifier(400, **config).train()

    def loss_of(classifier, video, ratio, noise):
        target = torch.zeros(len(video), dtype=torch.long, device=device)
        return F.cross_entropy(classifier(video, ratio, noise).float(), target)

    return classifier, loss_of


def clip_shape(model):
    """Frames, height and width of a model's clips."""
    t, h, w = model.grid
    return t * model.t_patch_size, h * model.patch_size, w * model.patch_size


def step_flops(task, size, ratio):
    """Floating point operations of a step for one clip, forward and backward, counted on shapes alone."""
    model, loss_of = build(task, size, "meta")
    video = torch.zeros(1, 3, *clip_shape(model), dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        loss_of(model, video, ratio, torch.zeros(1, np.prod(model.grid), device="meta")).backward()
    return counter.get_total_flops()


def run_step(task, size, ratio, clips, device, precision, compiled, again=False):
    """Time forward + backward + optimizer; in a process of its own, whose memory tells. Prints nothing: a dict."""
    settings = argparse.Namespace(device=device, model=size, precision=precision, compile=compiled)
    device = m.start_process(settings)
    rate = matrix_rate(device, precision)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model, loss_of = build(task, size, device, again)
    optimizer = torch.optim.AdamW(m.parameter_groups(model, 0.05), lr=1e-5, fused=True)
    if compiled:
        m.compile_blocks(model)
    shape = clips, *clip_shape(model), 3
    video = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)
    noise = torch.rand(clips, int(np.prod(model.grid)), device=device)

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


def benchmark_step(args):
    def measure(task, ratio, name, **more):
        setting = args.clips, args.device, args.precision, args.compile
        row = alone(run_step, task, args.model, ratio, *setting, **more)
        flops, taken = step_flops(task, args.model, ratio), row["seconds"]
        print(f"{name:34}{taken:9.3f} s{args.clips / taken:9.2f}", end="")
        print(f"{row['memory'] / 2**30:9.2f} GiB{flops / 1e9:10.1f}", end="")
        share = flops * args.clips / taken / row["rate"]
        print(f"{row['rate'] / 1e12:9.3f}{share:8.0%}", flush=True)
        return taken

    how = f"{args.precision} on {args.device}{', compiled' if args.compile else ''}"
    print(f"{args.model}, {args.clips} clips, {how}")
    print(f"{'forward + backward + optimizer':34}{'step':>11}{'clips/s':>9}{'memory':>13}", end="")
    print(f"{'GFLOP/clip':>12}  matrix TFLOP/s   share")
    times = {}
    for ratio in args.ratios:
        times[ratio] = measure("pretrain", ratio, f"pre-train, {ratio:.0%} masked")
        if ratio == 0.9:
            measure("pretrain", ratio, "  with --grad_checkpointing", again=True)
    if 0 in times and 0.9 in times:
        gain = times[0] / times[0.9]
        print(f"90 % masked is {gain:.1f} x faster than none (paper: 4.1; bar for ViT-L: 4.5)")
    for ratio in (0, 0.5, 0.75) if args.finetune else ():
        measure("finetune", ratio, f"fine-tune, {ratio:.0%} masked")


KINETICS_FILES = {  # options of x264; the last is what the README prepares videos with
    "kinetics_gop250": {"crf": "23", "g": "250", "preset": "medium"},
    "kinetics_gop12": {"crf": "23", "g": "12", "preset": "medium"},
    "prepared": {"crf": "23", "g": "30", "tune": "fastdecode"},
}


def kinetics_video(folder, name, length=10, height=256, width=340):
    """A video as Kinetics is kept: H.264, 30 frames a second, a drifting texture with noise."""
    rng, path = np.random.RandomState(0), Path(folder) / f"{name}.mp4"
    y, x = np.mgrid[:height, :width].astype(np.float32)
    noise = rng.normal(0, 6, (8, height, width, 1))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=KINETICS_FILES[name])
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for t in range(30 * length):
            colours = []
            for angle, scale in ((0.3, 9), (1.2, 23), (2.2, 41)):
                place = x * np.cos(angle) + y * np.sin(angle)
                colours.append(np.sin(place / scale + t / 9))
            picture = (128 + 35 * np.stack(colours, -1) + noise[t % 8]).clip(0, 255)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8))))
        container.mux(stream.encode(None))
    return path


def decode_floor(path, times):
    """Decode, and do nothing else: from the key frame before the first wanted frame to the last, in one go."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        ends = times.min(), times.max()
        first, last = (int((stream.start_time or 0) + t / stream.time_base) for t in ends)
        container.seek(max(first, 0), stream=stream)
        for packet in container.demux(stream):
            for frame in packet.decode():
                if frame.pts >= last:
                    return


def benchmark_data(args):
    torch.set_num_threads(1)
    print("one core; times in ms for one opening of the file, the fastest of several")
    print(f"{'':26}{'stage':>10}{'samples':>9}{'floor':>8}{'decode':>8}{'to RGB':>8}", end="")
    print(f"{'augment':>9}{'all':>8}{'clips/s':>9}{'of floor':>10}")
    with tempfile.TemporaryDirectory() as folder:
        paths = list(args.videos)
        if not paths:
            demo = Path(folder) / "demo.mp4"
            data.write_video(demo, data.draw_scene(0, [("disc", "slides", 0.5)], (14.5, 18))[0], 15)
            paths = [demo, *(kinetics_video(folder, name) for name in KINETICS_FILES)]
        for path in paths:
            for stage in STAGES:
                for repeats in args.repeats:
                    one_row(path, stage, repeats)


STAGES = {"pre-train": mae_pretrain, "fine-tune": finetune_cls}


def one_row(path, stage, repeats):
    """Measure one line of the table; returns clips/s."""
    args = STAGES[stage].parse_args(["--model", "vit_b", "--data", "x"])
    args.repeat_aug = repeats
    augment = finetune_cls.augmentation(args) if stage == "fine-tune" else None
    videos = data.VideoList("benchmark", "/", [str(Path(path).resolve())])
    clips = data.ClipDataset(videos, args, None, augment)
    spent = dict.fromkeys(("floor", "decode", "to RGB", "all"), 0.0)
    draws, size = 3, (args.img_size,) * 2  # the mean of three draws of times and crops
    for epoch in range(draws):
        seeds = [data.stateless_seed(args.seed, epoch, 0, repeat) for repeat in range(repeats)]
        with data.Video(path) as video:
            times = np.concatenate([clips.times(video.duration, seed) for seed in seeds])
            frames = video.frames(times)
        side = data.even(min(data.upright_size(frames[0])) * 0.8)  # a crop of the usual size
        boxes = [(0, 0, side, side)] * repeats

        def decode(times=times):
            with data.Video(path) as video:
                video.frames(times)

        def convert(frames=frames, boxes=boxes):
            for i, box in enumerate(boxes):
                data.to_clip(frames[i * args.num_frames : (i + 1) * args.num_frames], size, box)

        jobs = {
            "floor": lambda times=times: decode_floor(path, times),
            "decode": decode,
            "to RGB": convert,
            "all": lambda epoch=epoch: clips.load(0, epoch),
        }
        for name, job in jobs.items():
            spent[name] += seconds(job, 0.2) / draws
    spent["augment"] = max(0.0, spent["all"] - spent["decode"] - spent["to RGB"])
    print(f"{Path(path).stem[:25]:26}{stage:>10}{repeats:9}", end="")
    for name, width in ("floor", 8), ("decode", 8), ("to RGB", 8), ("augment", 9), ("all", 8):
        print(f"{1000 * spent[name]:{width}.1f}", end="")
    print(f"{repeats / spent['all']:9.1f}{spent['floor'] / spent['all']:10.0%}", flush=True)
    return repeats / spent["all"]


SETS = {"Kinetics-400": 240_000, "SSv2": 169_000, "AVA": 184_000}  # videos or keyframes to train on
RECIPES = [  # stage, sizes, recipe, data set, mask ratio
    ("pre-train", ("vit_b", "vit_l", "vit_h"), mae_pretrain.KINETICS, "Kinetics-400", 0.9),
    ("fine-tune", ("vit_b", "vit_l", "vit_h"), finetune_cls.KINETICS, "Kinetics-400", 0),
    ("fine-tune", ("vit_l", "vit_h"), finetune_cls.SSV2, "SSv2", 0),
    ("detect", ("vit_l", "vit_h"), finetune_ava.AVA, "AVA", 0),
]


def benchmark_plan(args):
    """Hours of each recipe: clips x FLOPs over what the GPUs reach, and cores that keep them fed."""
    reached, loading = {}, {}
    for stage, task, ratio in ("pre-train", "pretrain", 0.9), ("fine-tune", "finetune", 0):
        reached[stage] = (args.tflops or 0) * 1e12
        if not args.tflops:
            setting = args.clips, args.device, args.precision, args.compile
            row = alone(run_step, task, args.model, ratio, *setting)
            reached[stage] = step_flops(task, args.model, ratio) * args.clips / row["seconds"]
        print(f"{args.model} {stage}: {reached[stage] / 1e12:.3f} TFLOP/s on this {args.device}")
    print("loading, one core (columns as in `data`):")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("kinetics_gop250", "prepared"):
            path = kinetics_video(folder, name)
            for stage, repeats in ("pre-train", 4), ("fine-tune", 1), ("fine-tune", 2):
                loading[name, stage, repeats] = one_row(path, stage, repeats)
    print(f"\n{args.gpus} GPUs at this rate; cores of this machine that load for one GPU:")
    print(f"{'recipe':32}{'epochs':>8}{'M clips':>9}{'GFLOP/clip':>12}{'hours':>7}", end="")
    print(f"{'GOP 250':>9}{'prepared':>10}")
    for stage, sizes, table, name, ratio in RECIPES:
        for size in sizes:
            row, kind = m.column(table, size), stage if stage == "pre-train" else "fine-tune"
            flops = step_flops("pretrain" if ratio else "finetune", size, ratio)
            clips, speed = SETS[name] * row["epochs"], reached[kind] / flops  # clips/s
            text, hours = f"{stage} {size} on {name}", clips / speed / args.gpus / 3600
            print(f"{text:32}{row['epochs']:8}{clips / 1e6:9.1f}{flops / 1e9:12.0f}", end="")
            print(f"{hours:7.1f}", end="")
            for file, width in ("kinetics_gop250", 9), ("prepared", 10):
                cores = speed / loading[file, kind, row.get("repeat_aug", 1)]
                print(f"{cores:{width}.1f}", end="")
            print()


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    here = argparse.Namespace(device=None, model=None, precision=None, compile=None)
    device = m.start_process(here).type
    step, loading, plan = (commands.add_parser(name) for name in ("step", "data", "plan"))
    functions = benchmark_step, benchmark_data, benchmark_plan
    for command, function in zip((step, loading, plan), functions):
        command.set_defaults(function=function)
    for command in step, plan:
        command.add_argument("--model", choices=m.SIZES, default="vit_b")
        command.add_argument("--device", default=device)
        command.add_argument("--precision", choices=("fp32", "bf16"), default=here.precision)
        command.add_argument("--clips", type=int, default=4, help="clips in a step")
        command.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    step.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="to pre-train at")
    step.add_argument("--finetune", action=argparse.BooleanOptionalAction, default=True)
    text = "default: the demo's, and of Kinetics' size"
    loading.add_argument("videos", nargs="*", metavar="VIDEO", help=text)
    text = "clips of one opening"
    loading.add_argument("--repeats", type=int, nargs="+", default=(1, 2, 4), help=text)
    plan.add_argument("--gpus", type=int, default=8)
    plan.add_argument("--tflops", type=float, help="that a GPU reaches; default: what this does")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
