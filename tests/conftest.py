"""What several tests need: small videos, made once, and ways to run a stage: here, or in processes of its own."""

import functools
import importlib
import itertools
import json
import multiprocessing
import os
import runpy
import signal
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
from torch.distributed.elastic.utils.distributed import get_free_port
from tqdm import tqdm

import data
import model

ROOT = Path(__file__).parents[1]
SCRIPTS = tempfile.TemporaryDirectory(prefix="stages")  # of start(); removed when the tests end
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
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
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
    small = np.random.RandomState(seed).randint(0, 256, (n, 6, 8, 3))
    large = small.repeat(-(-height // 6), 1).repeat(-(-width // 8), 2)
    return large[:, :height, :width].astype(np.uint8)


@pytest.fixture(autouse=True)
def process():
    """Put back what a DataLoader sets, and end the processes that a test which failed has left."""
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, handler)
    for child in multiprocessing.active_children():
        child.kill()


def make_videos(folder, **counts):
    """Demo videos in the official layout of Kinetics; their classes are shapes. AVA's files in ava/."""
    for split, count in counts.items():
        data.make_demo_videos(folder, split, count, labelled=False)
        rows = ["label,youtube_id,time_start,time_end,split"]
        for i, shape in zip(range(count), itertools.cycle(data.DEMO_SHAPES)):
            path = folder / split / f"{i:05d}.mp4"
            path.rename(path.with_name(f"{split}{i}_000005_000008.mp4"))
            rows.append(f"{shape},{split}{i},5,8,{split}")
        (folder / f"{split}.csv").write_text("\n".join(rows))
        data.make_demo_ava(folder / "ava", split, count)
    return folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """8 videos to train on, 5 to validate, which 2 and 3 do not divide; as many keyframes."""
    return make_videos(tmp_path_factory.mktemp("videos"), train=8, val=5)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """12 videos of 8 classes to train on, and 1 to test on; a keyframe of AVA's is excluded, and of
    the boxes detected to train on a third each has a score above, at and below 0.8.
    """
    folder = make_videos(tmp_path_factory.mktemp("folder"), train=12, val=1)
    notes, scores = folder / "ava" / "annotations", itertools.cycle([0.95, 0.8, 0.79])
    file = notes / "ava_detection_train_boxes_and_labels.csv"
    lines = file.read_text().splitlines()
    file.write_text("".join(f"{line.rpartition(',')[0]},{next(scores)}\n" for line in lines))
    (notes / "ava_train_excluded_timestamps_v2.2.csv").write_text("train0000,1.5\n")
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
        for process in self.processes:
            process.join(seconds)
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
    output = Path(tempfile.mkdtemp(dir=SCRIPTS.name), "printed.txt")
    output.touch()
    script = output.with_name(f"{stage}.py")
    begin = f"import os, sys, runpy, time, data, model as m\n{harm}\n"
    script.write_text(f"{begin}runpy.run_path({str(ROOT / script.name)!r}, run_name='__main__')\n")
    words, environment, count = [str(script), *line.split()], {}, processes
    if launcher == "torchrun":
        settings = [f"--max-restarts={restarts}", f"--nproc_per_node={processes}"]
        words, count = [torch.distributed.run.__file__, "--standalone", *settings, *words], 1
        environment = {"PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    elif processes > 1:
        environment = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(get_free_port()))
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    fork = multiprocessing.get_context("fork").Process
    jobs = [fork(target=run_forked, args=(words, environment, i, output)) for i in range(count)]
    for job in jobs:
        job.start()
    return Job(jobs, output)


def run_forked(words, environment, rank, output):
    """In a process that was forked: run a program as if Python had just begun."""
    os.setsid()
    for name in ("model", "data", *STAGES):
        sys.modules.pop(name, None)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def entries(folder):
    log = Path(folder, "log.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def contents(folder):
    """All files of a folder: {name: bytes}."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def json_of(folder, name="results.json"):
    return json.loads(Path(folder, name).read_text())


def checkpoint_of(path):
    path = Path(path)
    return torch.load(path / "checkpoint.pt" if path.is_dir() else path, weights_only=True)


@pytest.fixture(scope="session")
def whole(videos, tmp_path_factory):
    """Runs that nothing stopped, each made when it is first asked for: their folders."""

    @functools.cache
    def run(stage, *more, processes=1):
        out = tmp_path_factory.mktemp("whole")
        code, text = start(stage, line_of(stage, videos, out, *more), processes).finish()
        assert code == 0, text
        return out

    return run


@pytest.fixture(scope="session")
def bad_files(videos, whole, tmp_path_factory):
    """A folder of files that are of no use."""
    folder = tmp_path_factory.mktemp("bad")
    video = videos / "train" / "train0_000005_000008.mp4"
    texts = {
        "lists/train.csv": 4 * f"{video} 0\n{video} 7\n",
        "lists/val.csv": f"{video} 9\n",
        "other.csv": "other,0902,0.1,0.1,0.5,0.5,1,0.9\n",
    }
    broken = ["text.mp4", "other/val/zebra/a.mp4", *(f"broken/{name}.mp4" for name in "abcd")]
    for name, text in (texts | dict.fromkeys(broken, "words")).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for stage in STAGES:
        checkpoint = checkpoint_of(whole(stage))
        checkpoint["model"]["cls_token"][0, 0, 0] = float("nan")
        torch.save(checkpoint, folder / f"{stage}.pt")
    return folder
