"""How fast it is, as shares of limits that are measured in the same run: on a laptop as on a GPU.

python tests/benchmark.py step                pre-training step at each mask ratio; fine-tuning
python tests/benchmark.py data [VIDEO ...]    loading, on one core, against decoding alone
python tests/benchmark.py data a.mp4 --model vit_demo --img_size 48
python tests/benchmark.py plan --gpus 8       what whole runs take: hours, and cores to decode with
python tests/benchmark.py plan --tflops 400   the same for GPUs that are not at hand
"""

import argparse
import itertools
import multiprocessing
import resource
import sys
import tempfile
import timeit
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np
import torch

import data
import finetune_ava
import finetune_cls
import mae_pretrain
import model as m

TASKS = {"pre-train": (mae_pretrain, m.MAE), "fine-tune": (finetune_cls, m.Classifier, 400)}


def print_row(name, *cells):
    cells = (cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells)
    print(f"{name:31}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def seconds(function, at_least):
    """How long each of several calls takes, after one to warm up."""
    function()
    taken = []
    while len(taken) < 2 or sum(taken) < at_least:
        taken.append(timeit.timeit(function, number=1))
    return taken


def matrix_rate(device, precision):
    """FLOP/s of large square matrix products, kept up for 5 s: the limit."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / np.mean(seconds(lambda: (a @ b)[0, 0].item(), 5.0))  # item() waits for it


def build(task, args, ratio):
    """The class of a model, its configuration by a stage's arguments, FLOPs to train on a clip."""
    stage, kind, *classes = TASKS[task]
    config = stage.model_config(args, *classes)
    return kind, config, m.count_flops(kind, config, ratio)


def run_step(args, row):
    """Time forward + backward + optimizer: seconds, FLOPs, FLOP/s of matrices, bytes of memory."""
    task, ratio, more = row
    m.choose_device(args)
    device = m.start_process(args)
    rate = matrix_rate(device, args.precision)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recipe = TASKS[task][0].parse_args(f"--data x --model {args.model} {more}".split())
    kind, config, flops = build(task, recipe, ratio)
    model = kind(**config).to(device)
    optimizer = torch.optim.AdamW(m.parameter_groups(model, 0.05), lr=1e-5, fused=True)
    m.distribute(model, args)
    shape = args.clips, config["num_frames"], *2 * [config["img_size"]], 3
    video = data.model_order(torch.randint(256, shape, dtype=torch.uint8, device=device))

    def step():
        with m.autocast(args, device):
            output = model(video, ratio)
        (output[0] if task == "pre-train" else output.float().logsumexp(1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.norm.bias[0].item()  # waits for the device

    taken = min(seconds(step, 5.0))
    rate = max(rate, matrix_rate(device, args.precision))  # before and after: machines are noisy
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else memory
    return taken, flops * args.clips, rate, memory


def run_steps(args, rows):
    """Each row and its run_step, in a fresh process: its peak memory is that of the step."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        yield from zip(rows, pool.imap(partial(run_step, args), rows))


def benchmark_step(args):
    print(f"{args.model}, {args.clips} clips, {args.precision} on {args.device}, {args.compile=}")
    print("step: forward, backward, optimizer; limit: TFLOP/s of large matrices; share: % of that")
    print_row("step", "% masked", "seconds", "clips/s", "GiB", "GFLOP/clip", "limit", "share")
    rows = [*itertools.product(TASKS, args.ratios, [""])]
    rows += [("pre-train", 0.9, "--grad_checkpointing")]
    for (task, ratio, more), (taken, flops, rate, memory) in run_steps(args, rows):
        speeds = args.clips / taken, memory / 2**30, flops / args.clips / 1e9, rate / 1e12
        print_row(f"{task} {more}", 100 * ratio, taken, *speeds, 100 * flops / taken / rate)


FILES = {"kinetics_gop250": {"g": "250"}, "kinetics_gop12": {"g": "12"}}  # with x264's options
FILES["prepared"] = {"g": "30", "tune": "fastdecode"}  # as the README prepares videos


def kinetics_video(folder, name):
    """10 s as Kinetics is kept: H.264, 30 frames a second, a drifting texture with noise."""
    rng, path, height, width = np.random.RandomState(0), f"{folder}/{name}.mp4", 256, 340
    y, x = np.mgrid[:height, :width].astype(np.float32)
    noise = rng.normal(128, 6, (8, height, width, 1))
    angle, scale = np.array([0.3, 1.2, 2.2]), np.array([9, 23, 41])  # of each colour
    waves = (x[..., None] * np.cos(angle) + y[..., None] * np.sin(angle)) / scale
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30, options=FILES[name] | {"crf": "23"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for t in range(300):
            picture = (35 * np.sin(waves + t / 9) + noise[t % 8]).clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    return path


def decode_floor(path, times):
    """Decode and do no more: from the key frame before the first wanted frame to the last."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        start = stream.start_time or 0
        first, last = (start + int(t / stream.time_base) for t in (times.min(), times.max()))
        container.seek(first, stream=stream)
        next((frame for frame in container.decode(stream) if frame.pts >= last), None)


def one_row(path, task, repeats, flags):
    """Print the mean of three draws of times and crops; returns clips/s."""
    args = TASKS[task][0].parse_args(f"--data x --repeat_aug {repeats} {flags}".split())
    augment = finetune_cls.augmentation(args) if task == "fine-tune" else None
    videos = data.VideoList("", "", [path])
    clips, decoding = data.ClipDataset(videos, args, augment), data.ClipDataset(videos, args)
    decoding.crop = lambda frames: torch.empty(0)  # leaves out what comes after decoding

    def measure(number):
        seeds = [data.stateless_seed(args.seed, number, 0, repeat) for repeat in range(repeats)]
        with data.Video(path) as video:
            times = np.array([clips.times(video.duration, seed) for seed in seeds])
        floor = partial(decode_floor, path, times)
        calls = floor, partial(decoding.load, 0, number), partial(clips.load, 0, number)
        return [min(seconds(call, 0.2)) for call in calls]

    floor, decoded, whole = np.mean([measure(number) for number in range(3)], 0)
    times = 1000 * floor, 1000 * decoded, 1000 * max(0.0, whole - decoded), 1000 * whole
    name = f"{task} {Path(path).stem[:20]}"
    print_row(name, repeats, *times, repeats / whole, 100 * floor / whole)
    return repeats / whole


def table_of_loading(paths, cases, flags):
    """Print a row for each file and case, (task, repeats); returns {(file, *case): clips/s}."""
    torch.set_num_threads(1)
    print("one core; times in ms for one opening of the file, the fastest of several")
    print_row("case", "samples", "floor", "decode", "to pixels", "all", "clips/s", "% of floor")
    return {(path, *case): one_row(path, *case, flags) for path in paths for case in cases}


def benchmark_data(args):
    flags = f"--model {args.model}" + f" --img_size {args.img_size}" * bool(args.img_size)
    with tempfile.TemporaryDirectory() as folder:
        paths = args.videos or [kinetics_video(folder, name) for name in FILES]
        table_of_loading(paths, [*itertools.product(TASKS, args.repeats)], flags)


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
    reached = dict.fromkeys(TASKS, (args.tflops or 0) * 1e12)
    rows = [] if args.tflops else [("pre-train", 0.9, ""), ("fine-tune", 0, "")]
    for (task, _, _), (taken, flops, _, _) in run_steps(args, rows):
        reached[task] = flops / taken
        print(f"{args.model} {task}: {reached[task] / 1e12:.3f} TFLOP/s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        files = [kinetics_video(folder, name) for name in ("kinetics_gop250", "prepared")]
        cases = ("pre-train", 4), ("fine-tune", 1), ("fine-tune", 2)
        loading = table_of_loading(files, cases, "--model vit_b")
    print(f"\n{args.gpus} GPUs at this rate; cores of this machine that load for one GPU:")
    print_row("recipe", "epochs", "M clips", "GFLOP/clip", "hours", "GOP 250", "prepared")
    for task, ratio, sizes, stage, name, count in RECIPES:
        for size in sizes:
            recipe = stage.parse_args(["--dataset", name, "--model", size])
            _, _, flops = build(task, recipe, ratio)
            clips, speed = count * recipe.epochs, reached[task] / flops  # clips/s
            hours, repeats = clips / speed / args.gpus / 3600, getattr(recipe, "repeat_aug", 1)
            cores = [speed / loading[file, task, repeats] for file in files]
            text = f"{task} {size} on {name}"
            print_row(text, recipe.epochs, clips / 1e6, flops / 1e9, hours, *cores)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=m.HelpFormatter)
    commands = {"step": benchmark_step, "data": benchmark_data, "plan": benchmark_plan}
    add = parser.add_argument
    add("command", choices=commands)
    add("videos", nargs="*", help="for data; by default ones made here, of Kinetics' size")
    add("--model", choices=m.SIZES, default="vit_b", help="its size")
    add("--img_size", type=int, help="for data: of a clip; by default the recipe's")
    add("--repeats", type=int, nargs="+", default=(1, 2, 4), help="for data: clips of one opening")
    add("--device", help="cuda, cpu or mps; by default cuda if there is a GPU")
    add("--precision", choices=("fp32", "bf16"), help="by default the best for the device")
    add("--compile", action="store_true", help="torch.compile the blocks")
    add("--clips", type=int, default=4, help="in a step")
    add("--ratios", type=float, nargs="+", default=(0, 0.5, 0.75, 0.9, 0.95), help="for step")
    add("--gpus", type=int, default=8, help="for plan: how many of them")
    add("--tflops", type=float, help="for plan: that a GPU reaches; by default what this one does")
    args = parser.parse_intermixed_args()
    m.choose_device(args)
    commands[args.command](args)


if __name__ == "__main__":
    main()
