"""What several tests need: small videos, made once, and ways to run a stage: here, or in processes of its own."""

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.distributed.run
from tqdm import tqdm

import data
import model

ROOT = Path(__file__).parents[1]
SHARED_VIDEOS = ROOT.parent / "shared" / "videos"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # figures are compared on the CPU
os.environ["OMP_NUM_THREADS"] = "1"  # and bit by bit, here and in processes of their own
torch.set_num_threads(1)
tqdm.monitor_interval = 0  # its thread would be lost in a fork
torch.ones(1, requires_grad=True).backward()  # begun in torch.compile, autograd forbids forks


def encode(path, frames, rate=30, codec="libx264", pix_fmt="yuv420p", options=(), times=()):
    """Write frames (T, H, W, 3) with any codec, at any time stamps (in 1/rate s), to any container."""
    shift = {"avoid_negative_ts": "disabled"} if len(times) else {}
    with av.open(str(path), "w", options=shift) as container:
        stream = container.add_stream(codec, rate=rate, options=dict(options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = times[i] if len(times) else i
            picture.time_base = Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def noise_frames(n, height=48, width=64, seed=0):
    """Frames that differ, smooth enough to code well: (n, height, width, 3)."""
    rng = np.random.RandomState(seed)
    small = rng.randint(0, 256, (n, 6, 8, 3))
    large = small.repeat(-(-height // 6), 1).repeat(-(-width // 8), 2)
    return large[:, :height, :width].astype(np.uint8)


@pytest.fixture(autouse=True)
def process():
    """Put back what a run changes in its process, and end what a test that failed has left."""
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGCHLD
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    for child in multiprocessing.active_children():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def make_videos(folder, videos, movies):
    """Demo videos in the official layout of Kinetics; their classes are shapes. AVA's files in ava/."""
    for split, count in videos.items():
        (folder / split).mkdir()
        rows = ["label,youtube_id,time_start,time_end,split"]
        for i in range(count):
            shape, motion = [*data.DEMO_SHAPES][i % 8], [*data.DEMO_MOTIONS][i % 4]
            seed = i + 100 * (split == "val")
            frames, _ = data.draw_scene(seed, [(shape, motion, 0.5)], (14.5, 18), (56, 48))
            path = folder / split / f"{split}{i}_000005_000008.mp4"
            data.write_video(path, frames, data.DEMO_FPS)
            rows.append(f"{shape},{split}{i},5,8,{split}")
        (folder / f"{split}.csv").write_text("\n".join(rows))
    for split, count in movies.items():
        data.make_demo_ava(folder / "ava", split, count)
    return folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """8 videos to train on, 5 to validate, which 2 and 3 do not divide; as many keyframes."""
    folder = tmp_path_factory.mktemp("videos")
    return make_videos(folder, dict(train=8, val=5), dict(train=8, val=5))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """12 videos of 8 classes to train on, and 1 to test on; a keyframe of AVA's is excluded.

    Of the boxes detected in AVA's training movies a third each has a score above, at and below 0.8.
    """
    folder = tmp_path_factory.mktemp("folder")
    make_videos(folder, dict(train=12, val=1), dict(train=12, val=1))
    file = folder / "ava" / "annotations" / "ava_detection_train_boxes_and_labels.csv"
    lines, scores = file.read_text().splitlines(), itertools.cycle([0.95, 0.8, 0.79])
    file.write_text("".join(f"{line.rpartition(',')[0]},{next(scores)}\n" for line in lines))
    (file.parent / "ava_train_excluded_timestamps_v2.2.csv").write_text("train0000,1.5\n")
    return folder


SMALL = "--model vit_demo --img_size 24 --precision fp32 --lr 1e-3 --batch_size 4 --micro_batch 2 --log_interval 3"
STAGES = {  # 11 steps of 4 of 8 videos or keyframes; checkpoints and log lines at 3, 6, 9 and 11
    "mae_pretrain": "--epochs 22 --repeat_aug 4 --clip_grad 0.5 --decoder_embed_dim 32",
    "finetune_cls": "--epochs 11 --repeat_aug 2 --drop_path 0.2 --num_classes 8 --views 2x3",
    "finetune_ava": "--epochs 5.5 --drop_path 0.2 --rel_pos",
}


def line_of(stage, videos, out, *more):
    """The command line of a small run of a stage."""
    where = videos / "ava" if stage == "finetune_ava" else videos
    line = f"{SMALL} {STAGES[stage]} --save_minutes 0 --num_workers 0 --data {where} --output_dir {out}"
    return " ".join([line, *map(str, more)])


def run_stage(stage, *words):
    """Run a stage's main function in this process: the message it exits with, or "" if all is well."""
    sys.argv = [f"{stage}.py", *" ".join(map(str, words)).split()]
    others = multiprocessing.active_children()
    with pytest.raises(SystemExit) as stop:
        model.run_main(importlib.import_module(stage).main)
    assert set(multiprocessing.active_children()) <= set(others), "workers are left"
    return str(stop.value.code or "")


class Job:
    """Processes that run a stage, and what they print."""

    def __init__(self, processes, output):
        self.processes, self.output, self.pid = processes, output, processes[0].pid

    @property
    def printed(self):
        return self.output.read_text(errors="replace")

    def finish(self, seconds=120):
        """Wait, in bounded time: (exit status, the first that is not 0; all that was printed)."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
            assert process.exitcode is not None, f"still running after {seconds} s:\n{self.printed}"
        return next(filter(None, (p.exitcode for p in self.processes)), 0), self.printed

    def wait_for(self, condition, seconds=90):
        """Wait until a condition holds, while all processes run."""
        end = time.monotonic() + seconds
        while not condition():
            assert {p.exitcode for p in self.processes} == {None}, self.printed
            assert time.monotonic() < end, f"waited in vain:\n{self.printed}"
            time.sleep(0.005)


def family(pid):
    """A process and all that it has started, as Linux tells."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in family(int(child)))]


def start(stage, line, processes=1, harm="", launcher="fork", restarts=0):
    """Start a stage in processes of its own: a Job. harm: code to run first, in each of them.

    launcher: "torchrun", as a user does; "fork" saves the 4 s that it takes to import torch.
    """
    output = Path(tempfile.mkdtemp(prefix="stage"), "printed.txt")
    output.touch()
    words = [str(ROOT / f"{stage}.py"), *line.split()]
    if harm:
        script = output.with_name(f"{stage}.py")
        head = f"import os, sys, runpy, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        tail = f"runpy.run_path({words[0]!r}, run_name='__main__')\n"
        script.write_text(f"{head}import model as m, data\n{harm}\n{tail}")
        words[0] = str(script)
    environments = [{"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"} for _ in range(processes)]
    if launcher == "torchrun":
        settings = [f"--max-restarts={restarts}", f"--nproc_per_node={processes}"]
        words = [torch.distributed.run.__file__, "--standalone", *settings, *words]
        environments = environments[:1]
        # As the README asks for restarts.
        environments[0]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    elif processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        group |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        for rank, environment in enumerate(environments):
            environment |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    jobs, fork = [], multiprocessing.get_context("fork").Process
    for environment in environments:
        jobs.append(fork(target=run_forked, args=(words, environment, output)))
        jobs[-1].start()
    return Job(jobs, output)


def run_forked(words, environment, output):
    """In a process that was forked: run a program as if Python had just begun."""
    os.setsid()
    for name in ("model", "data", "mae_pretrain", "finetune_cls", "finetune_ava"):
        sys.modules.pop(name, None)
    os.environ.update(environment)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(file, number)
        setattr(sys, stream, open(number, "w", buffering=1))  # noqa: SIM115
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def entries(folder):
    """The lines of a run's log.jsonl."""
    log = Path(folder, "log.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def contents(folder):
    """All files of a folder: {name: bytes}."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def json_of(folder, name="results.json"):
    """A run's results, or another JSON file of it."""
    return json.loads(Path(folder, name).read_text())


def checkpoint_of(path):
    """A checkpoint, or the last one in a run's folder."""
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else path
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="session")
def whole(videos, tmp_path_factory):
    """Runs that nothing stopped, each made when it is first asked for: their folders."""
    made = {}

    def run(stage, *more, processes=1):
        key = stage, more, processes
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            code, text = start(stage, line_of(stage, videos, made[key], *more), processes).finish()
            assert code == 0, text
        return made[key]

    return run


@pytest.fixture(scope="session")
def bad_files(videos, whole, tmp_path_factory):
    """A folder of files that are of no use."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("lists", "broken", "other/val/zebra"):
        (folder / name).mkdir(parents=True)
    video = videos / "train" / "train0_000005_000008.mp4"
    for name, text in {
        "lists/train.csv": 4 * f"{video} 0\n{video} 7\n",
        "lists/val.csv": f"{video} 9\n",
        **dict.fromkeys(["text.mp4", *(f"broken/{name}.mp4" for name in "abcd")], "words"),
        "other/val/zebra/a.mp4": "words",
        "other.csv": "other,0902,0.1,0.1,0.5,0.5,1,0.9\n",
    }.items():
        (folder / name).write_text(text)
    for stage in STAGES:
        checkpoint = checkpoint_of(whole(stage))
        checkpoint["model"]["cls_token"][0, 0, 0] = float("nan")
        torch.save(checkpoint, folder / f"{stage}.pt")
    return folder
