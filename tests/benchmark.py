"""How fast it is, as shares of limits that are measured in the same run: on a laptop as on a GPU.

python tests/benchmark.py step                pre-training step at each mask ratio; fine-tuning
python tests/benchmark.py data [VIDEO ...]    loading, on one core, against decoding alone
python tests/benchmark.py data a.mp4 --model vit_demo --img_size 48
python tests/benchmark.py plan --gpus 8       what whole runs take: hours, and cores to decode with
python tests/benchmark.py plan --tflops 400   the same for GPUs that are not at hand
"""

import argparse
import collections
import functools
import itertools
import math
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

import data
import finetune_ava
import finetune_cls
import mae_pretrain
import model as m

TASKS = {  # of a step: the stage, its model, and the classes of that
    "pre-train": (mae_pretrain, m.MAE, ()),
    "fine-tune": (finetune_cls, m.Classifier, (400,)),
}


def seconds(function, at_least=1.0):
    """The fastest of several calls, after one to warm up; of two, where they take long."""
    function()
    taken = []
    while len(taken) < 2 or sum(taken) < at_least:
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return min(taken)


def matrix_rate(device, precision):
    """FLOP/s of large square matrix products, kept up for 5 s: the limit."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    (a @ b)[0, 0].item()  # waits for the device
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 5:
        (a @ b)[0, 0].item()
        count += 1
    return 2 * n**3 * count / (time.perf_counter() - start)


def build(task, size, ratio, again=False):
    """A stage's model class, its configuration, and the FLOPs of training on a clip."""
    stage, kind, classes = TASKS[task]
    args = stage.parse_args(["--data", "x", "--model", size])
    config = stage.model_config(args, *classes) | dict(grad_checkpointing=again)
    with torch.device("meta"):
        noise = torch.zeros(1, math.prod(kind(**config).grid))
    return kind, config, m.count_flops(kind, config, ratio, noise)


def run_step(task, size, ratio, clips, device, precision, compiled, again=False):
    """Time forward + backward + optimizer, in a process of its own, whose memory tells: a dict."""
    settings = argparse.Namespace(device=device, model=size, precision=precision, compile=compiled)
    m.choose_device(settings)
    device = m.start_process(settings)
    rate = matrix_rate(device, precision)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind, config, flops = build(task, size, ratio, again)
    model = kind(**config).to(device)
    optimizer = torch.optim.AdamW(m.parameter_groups(model, 0.05), lr=1e-5, fused=True)
    m.distribute(model, settings)
    shape = clips, config["num_frames"], *2 * [config["img_size"]], 3
    video = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)
    noise = torch.rand(clips, math.prod(model.grid), device=device)
    target = torch.zeros(clips, dtype=torch.long, device=device)

    def step():
        with m.autocast(settings, device):
            output = model(video, ratio, noise)
            loss = output[0] if task == "pre-train" else F.cross_entropy(output.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.norm.bias[0].item()  # waits for the device

    taken = seconds(step, 5.0)
    rate = max(rate, matrix_rate(device, precision))  # before and after: machines are noisy
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else memory
    return dict(seconds=taken, memory=memory, rate=rate, flops=flops * clips)


def alone(args, task, ratio, again=False):
    """run_step in a fresh process: its peak memory is that of the step."""
    setting = args.model, ratio, args.clips, args.device, args.precision, args.compile, again
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run_step, (task, *setting))


def benchmark_step(args):
    print(f"{args.model}, {args.clips} clips, {args.precision} on {args.device}, {args.compile=}")
    columns = "       step  clips/s       memory  GFLOP/clip  matrix TFLOP/s   share"
    print(f"{'forward + backward + optimizer':34}{columns}")
    rows = [("pre-train", ratio, False) for ratio in args.ratios]
    rows += [("pre-train", 0.9, True)] + [("fine-tune", ratio, False) for ratio in (0, 0.5, 0.75)]
    for task, ratio, again in rows:
        row = alone(args, task, ratio, again)
        taken = row["seconds"]
        name = f"{task}, {ratio:.0%} masked{', checkpointing' * again}"
        print(f"{name:34}{taken:9.3f} s{args.clips / taken:9.2f}", end="")
        print(f"{row['memory'] / 2**30:9.2f} GiB{row['flops'] / args.clips / 1e9:12.1f}", end="")
        print(f"{row['rate'] / 1e12:16.3f}{row['flops'] / taken / row['rate']:8.0%}", flush=True)


KINETICS_FILES = {  # options of x264; the last is what the README prepares videos with
    "kinetics_gop250": {"crf": "23", "g": "250", "preset": "medium"},
    "kinetics_gop12": {"crf": "23", "g": "12", "preset": "medium"},
    "prepared": {"crf": "23", "g": "30", "tune": "fastdecode"},
}


def kinetics_video(folder, name, length=10, height=256, width=340):
    """A video as Kinetics is kept: H.264, 30 frames a second, a drifting texture with noise."""
    rng, path = np.random.RandomState(0), Path(folder) / f"{name}.mp4"
    y, x = np.mgrid[:height, :width].astype(np.float32)
    noise = rng.normal(128, 6, (8, height, width, 1))
    angle, scale = np.array([0.3, 1.2, 2.2]), np.array([9, 23, 41])  # of each colour
    waves = (x[..., None] * np.cos(angle) + y[..., None] * np.sin(angle)) / scale
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=KINETICS_FILES[name])
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for t in range(30 * length):
            picture = (35 * np.sin(waves + t / 9) + noise[t % 8]).clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    return path


def decode_floor(path, times):
    """Decode and do no more: from the key frame before the first wanted frame to the last."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        ends = times.min(), times.max()
        first, last = (int((stream.start_time or 0) + t / stream.time_base) for t in ends)
        container.seek(max(first, 0), stream=stream)
        for frame in container.decode(stream):
            if frame.pts >= last:
                return


COLUMNS = {"floor": 8, "decode": 8, "to RGB": 8, "augment": 9, "all": 8}  # widths


def benchmark_data(args):
    with tempfile.TemporaryDirectory() as folder:
        paths = list(args.videos)
        if not paths:
            demo = Path(folder) / "demo.mp4"
            scene, _ = data.draw_scene(0, [("disc", "slides", 0.5)], (15, 17), (56, 48))
            data.write_video(demo, scene, data.DEMO_FPS)
            paths = [demo, *(kinetics_video(folder, name) for name in KINETICS_FILES)]
        print_header()
        for path, task, repeats in itertools.product(paths, TASKS, args.repeats):
            one_row(path, task, repeats, args.model, args.img_size)


def print_header():
    torch.set_num_threads(1)
    print("one core; times in ms for one opening of the file, the fastest of several")
    columns = "".join(f"{name:>{width}}" for name, width in COLUMNS.items())
    print(f"{'':26}{'stage':>10}{'samples':>9}{columns}{'clips/s':>9}{'of floor':>10}")


def one_row(path, task, repeats, model, img_size=None):
    """Measure one line of the table; returns clips/s."""
    size = f"--img_size {img_size}" if img_size else ""
    line = f"--data x --model {model} --repeat_aug {repeats} {size}"
    args = TASKS[task][0].parse_args(line.split())
    augment = finetune_cls.augmentation(args) if task == "fine-tune" else None
    videos = data.VideoList("benchmark", "/", [str(Path(path).resolve())])
    clips = data.ClipDataset(videos, args, augment)
    spent = collections.Counter()

    def decode(times):
        with data.Video(path) as video:
            return video.frames(times)

    def convert(frames):
        side = 2 * int(min(data.upright_size(frames[0])) * 0.4)  # a crop of the usual size
        for first in range(0, len(frames), args.num_frames):
            clip = frames[first : first + args.num_frames]
            data.to_clip(clip, (args.img_size,) * 2, (0, 0, side, side))

    for number in range(3):  # the mean of three draws of times and crops
        seeds = [data.stateless_seed(args.seed, number, 0, repeat) for repeat in range(repeats)]
        with data.Video(path) as video:
            times = np.concatenate([clips.times(video.duration, seed) for seed in seeds])
        work = dict(floor=(decode_floor, path, times), decode=(decode, times))
        work |= {"to RGB": (convert, decode(times)), "all": (clips.load, 0, number)}
        for name, call in work.items():
            spent[name] += seconds(functools.partial(*call), 0.2) / 3
    spent["augment"] = max(0.0, spent["all"] - spent["decode"] - spent["to RGB"])
    row = "".join(f"{1000 * spent[name]:{width}.1f}" for name, width in COLUMNS.items())
    row += f"{repeats / spent['all']:9.1f}{spent['floor'] / spent['all']:10.0%}"
    print(f"{Path(path).stem[:25]:26}{task:>10}{repeats:9}{row}", flush=True)
    return repeats / spent["all"]


RECIPES = [  # task, mask ratio, sizes, stage, data set, its videos or keyframes to train on
    ("pre-train", 0.9, ("vit_b", "vit_l", "vit_h"), mae_pretrain, "kinetics400", 240_000),
    ("fine-tune", 0, ("vit_b", "vit_l", "vit_h"), finetune_cls, "kinetics400", 240_000),
    ("fine-tune", 0, ("vit_l", "vit_h"), finetune_cls, "ssv2", 169_000),
    ("fine-tune", 0, ("vit_l", "vit_h"), finetune_ava, "ava", 184_000),
]


def benchmark_plan(args):
    """Hours of each recipe: clips x FLOPs over what the GPUs reach, and cores that keep them fed."""
    if args.device == "cpu" and not args.tflops:
        sys.exit("plan: no GPU here to measure; give --tflops, what one of yours reaches in a step")
    reached, loading = dict.fromkeys(TASKS, (args.tflops or 0) * 1e12), {}
    for task, ratio in () if args.tflops else (("pre-train", 0.9), ("fine-tune", 0)):
        row = alone(args, task, ratio)
        reached[task] = row["flops"] / row["seconds"]
        print(f"{args.model} {task}: {reached[task] / 1e12:.3f} TFLOP/s", flush=True)
    print_header()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("kinetics_gop250", "prepared"):
            path = kinetics_video(folder, name)
            for task, repeats in ("pre-train", 4), ("fine-tune", 1), ("fine-tune", 2):
                loading[name, task, repeats] = one_row(path, task, repeats, "vit_b")
    print(f"\n{args.gpus} GPUs at this rate; cores of this machine that load for one GPU:")
    print(f"{'recipe':32}  epochs  M clips  GFLOP/clip     hours  GOP 250  prepared")
    for task, ratio, sizes, stage, name, count in RECIPES:
        for size in sizes:
            row = vars(stage.parse_args(["--dataset", name, "--model", size]))
            flops = build(task, size, ratio)[2]
            clips, speed = count * row["epochs"], reached[task] / flops  # clips/s
            text, hours = f"{task} {size} on {name}", clips / speed / args.gpus / 3600
            print(f"{text:32}{row['epochs']:8}{clips / 1e6:9.1f}{flops / 1e9:12.0f}", end="")
            files = ("kinetics_gop250", "prepared")
            cores = [speed / loading[file, task, row.get("repeat_aug", 1)] for file in files]
            print(f"{hours:10.1f}{cores[0]:9.1f}{cores[1]:10.1f}")


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (benchmark_step, benchmark_data, benchmark_plan):
        name = function.__name__.removeprefix("benchmark_")
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        add = command.add_argument
        add("--model", choices=m.SIZES, default="vit_b")
        add("--device", help="cuda, cpu or mps; by default cuda if there is a GPU")
        if name == "data":
            add("videos", nargs="*", help="default: the demo's, and of Kinetics' size")
            add("--repeats", type=int, nargs="+", default=(1, 2, 4), help="clips of one opening")
            add("--img_size", type=int, help="of a clip; default: the recipe's")
        else:
            add("--precision", choices=("fp32", "bf16"))
            add("--clips", type=int, default=4, help="clips in a step")
            add("--compile", action="store_true", help="torch.compile the blocks")
        if name == "step":
            add("--ratios", type=float, nargs="+", default=(0, 0.5, 0.75, 0.9, 0.95))
        if name == "plan":
            add("--gpus", type=int, default=8)
            add("--tflops", type=float, help="that a GPU reaches; default: what this does")
    args = parser.parse_args(namespace=argparse.Namespace(precision=None, compile=False))
    m.choose_device(args)
    args.function(args)


if __name__ == "__main__":
    main()
