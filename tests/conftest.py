"""What several tests need: small videos, made once."""

import csv
import os
import signal
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import data

SHARED_VIDEOS = Path(__file__).parents[2] / "shared" / "videos"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # figures are compared on the CPU


def encode(path, frames, rate=30, codec="libx264", pix_fmt="yuv420p", options=None, times=None, start=0):
    """Write frames (T, H, W, 3) with any codec, at any time stamps (in units of 1/rate), to any container."""
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"} if start else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = start + (i if times is None else times[i])
            picture.time_base = Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def noise_frames(n, height=48, width=64, seed=0):
    """Frames that differ, smooth enough to code well: (n, height, width, 3)."""
    rng = np.random.RandomState(seed)
    small = rng.randint(0, 256, (n, 6, 8, 3))
    return small.repeat(-(-height // 6), 1).repeat(-(-width // 8), 2)[:, :height, :width].astype(np.uint8)


@pytest.fixture(autouse=True)
def process():
    """A run leaves its handlers, for processes that are forked later, and its number of threads: both are put back."""
    threads = torch.get_num_threads()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A small demo data set in the official layout: 8 videos to train on, 2 to validate."""
    folder = tmp_path_factory.mktemp("demo")
    for split, count in {"train": 8, "val": 2}.items():
        (folder / split).mkdir()
        with open(folder / f"{split}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
            for i in range(count):
                shape, motion = data.DEMO_SHAPES[i], data.DEMO_MOTIONS[i % 6]
                path = folder / split / f"{split}{i}_000005_000008.mp4"
                data.write_video(path, data.draw_demo_video(shape, motion, i), 15)
                rows.writerow([shape, f"{split}{i}", 5, 8, split])
    return folder
