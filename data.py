"""Videos in, clips out: which files there are, decoding, sampling, augmentation, and the embedded demo data.

Read from top to bottom:

    lists        what people have on disk becomes one VideoList                       (README, "Data layouts")
    decoding     from wanted times to frames, and from frames to a clip of pixels     (PyAV)
    sampling     which clips of a video, with which crop, flip and mask               (Table 5a; appendix A)
    AVA          csv files of person boxes, and the clips around them           (appendix A, AVA)
    batches      which videos make a step, on which process; what happens to those that fail
    demo         small H.264 videos, made here, in the layouts of the real data sets
    pictures     PNG and H.264 files of what a model does

A sample follows from (seed, epoch, index, repeat) alone: the number of workers or processes changes nothing of it,
and a run that is taken up again needs no generator states. Here, an epoch is a pass over the list; in arguments and
tables it is an effective one, of which a pass holds --repeats.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import time
from fractions import Fraction
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import av
import av.filter
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import PIXEL_MEAN, InputError, bar_interval, cores, gather, writing

DECODE_LIMIT = 60.0  # seconds that the decoding of one video may take
LARGEST = 2**26  # pixels of a frame: a damaged header may promise any number, and the memory is taken
FPS = 30  # what sampling rates count in: a clip of 16 frames, every 4th of 30 a second, spans 64 / 30 s
READ_THROUGH = 10.0  # seconds between wanted frames above which a new seek is cheaper than reading on
ATTEMPTS = 20  # videos tried in place of one that fails, before the sample is given up
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ts")
SPLITS = {"train": ("train",), "val": ("val", "validate", "validation")}  # their names on disk

LAYOUTS = """\
  DATA/train.csv                     a list: 'path label' lines (space or comma), paths relative to the list; or the
                                     official csv (label,youtube_id,time_start,time_end,split), its videos named
                                     ID_000001_000011.mp4 anywhere below DATA
  DATA/train/CLASS/any name.mp4      a folder for each class
  DATA/labels/train.json             Something-Something v2 as it is distributed, with labels.json beside it and its
                                     videos ID.webm anywhere below DATA
  DATA/any name.mp4                  any folder of videos (no labels: for pre-training)
--data also takes such a list or folder itself. No data at hand? Use --dataset demo."""


def stateless_seed(*numbers):
    """A seed that follows from whole numbers >= 0 alone, such as (seed, epoch, index, repeat)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def add_arguments(parser):
    """The arguments on data that the stages share."""
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", help="the data set, as laid out below; default: data/DATASET")
    add("--videos", metavar="FOLDER", help="where the videos of a list lie, if not beside it")
    add("--hflip", action=switch, help="mirror half of the clips; not on SSv2, whose labels know left from right")
    add("--num_frames", type=int, default=16, help="frames in a clip")
    add(
        "--sampling_rate",
        type=int,
        default=4,
        help="30ths of a second from a frame to the next; 0: one frame, repeated",
    )
    add("--img_size", type=int, help="height and width of a clip in pixels")
    add("--num_workers", type=int, help="processes that decode for each GPU; default: its share of the cores, up to 16")
    add("--max_failures", type=int, help="stop when more videos cannot be read; default: 1 in 100, at least 4")


def add_sampling_arguments(parser):
    """The arguments on where in a video the clips are: in the stages that know no more of it than its label."""
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--dataset", help="kinetics400, kinetics600, kinetics700, ssv2; demo: small videos made here")
    add(
        "--repeats",
        type=int,
        default=1,
        help="clips from a video that was opened: reading costs more than a second clip",
    )
    add("--crop", type=float, nargs=2, metavar=("MIN", "MAX"), help="area of a random crop, as a share of the frame")
    add("--segments", action=switch, help="a frame from each of --num_frames equal parts of a video, as on SSv2")


def locate(args, rank, part):
    """Where the data set is: args.data, or data/DATASET; the demo's part is made if need be, by one process."""
    if args.data:
        return args.data
    if args.dataset != "demo":
        return f"data/{args.dataset}"
    if rank == 0:
        make_demo(part)
    gather(None)  # the others wait until it is there
    return f"data/demo/{part}"


# ---------------------------------------------------------------------------------------------------------- lists


class VideoList:
    """The videos of a data set: paths, and labels or None.

    Kept as one string of bytes and two arrays: a list of 240,000 Python strings would be copied into every worker.
    """

    unit = "videos"

    def __init__(self, source, root, paths, labels=None, class_names=None):
        """source: the file or folder the list was made of. Paths are relative to root, or absolute."""
        if len(paths) == 0:
            raise InputError(f"{source}: no videos in it; expected one of\n{LAYOUTS}")
        self.source, self.root, self.class_names = str(source), str(root), class_names
        encoded = [os.fsencode(path) for path in paths]
        self.names = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(name) for name in encoded])
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)

    def __len__(self):
        return len(self.ends)

    def path(self, index):
        start = self.ends[index - 1] if index else 0
        return os.path.join(self.root, os.fsdecode(self.names[start : self.ends[index]].tobytes()))

    name = path  # how messages call it

    @functools.cached_property
    def digest(self):
        """A short hash of names and labels: the same list has the same."""
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hashlib.blake2b(self.names.tobytes() + self.ends.tobytes() + labels, digest_size=8).hexdigest()


def find_videos(data, split="train", videos=None, need_labels=False, classes=None):
    """Find the videos of a split in any of LAYOUTS.

    data: a list file or a folder. videos: the folder that the paths of a list are relative to, or that the videos of
    an official list lie below, where that is not the list's own. need_labels: each video must have one, and the split
    must be there. classes: names or a number of classes that the labels must fit; None: those that are found.
    Raises InputError where nothing fits.
    """
    data = Path(data)
    if not data.exists():
        raise InputError(f"{data}: no such file or folder; expected one of\n{LAYOUTS}")
    if data.suffix == ".json" and (labels := sorted(data.parent.glob("*labels.json"))):
        beside = data.parent.parent if data.parent.name in ("labels", "annotations") else data.parent
        return read_ssv2(data, labels[0], videos or beside)
    if data.is_file():
        return read_list(data, videos or data.parent, split, need_labels, classes)
    names = SPLITS[split]
    for folder in (data, data / "annotations", data / "labels"):
        for file in (folder / f"{name}{suffix}" for name in names for suffix in (".csv", ".txt")):
            if file.is_file():
                return read_list(file, videos or data, split, need_labels, classes)
        labels = sorted(folder.glob("*labels.json"))
        for file in (file for name in names for file in sorted(folder.glob(f"*{name}.json"))):
            if labels:
                return read_ssv2(file, labels[0], videos or data)
    folders = [data / name for name in names if (data / name).is_dir()]
    if need_labels and not folders and split != "train":
        raise InputError(f"{data}: no {split} split; expected {split}.csv or a folder {split}/, see\n{LAYOUTS}")
    folder = folders[0] if folders else data
    paths = files_below(folder)
    stray = [path for path in paths if os.sep not in path]
    if stray or not paths:
        if need_labels and paths:
            raise InputError(f"{folder / stray[0]}: no class; expected a folder for each class, or a list with labels")
        return VideoList(folder, folder, paths)
    labels, classes = number([path.split(os.sep)[0] for path in paths], classes, lambda i: folder / paths[i])
    return VideoList(folder, folder, paths, labels, classes)


def number(names, classes, place):
    """Class names -> (their numbers, the classes); classes: a list of those allowed, else the sorted names that occur.

    place: a function of an index, for the message of the InputError about a name that is not in the list.
    """
    classes = classes if isinstance(classes, list) else sorted(set(names))
    index = {name: i for i, name in enumerate(classes)}
    for i, name in enumerate(names):
        if name not in index:
            few = ", ".join(map(repr, classes[:3]))
            raise InputError(f"{place(i)}: class {name!r} is none of the {len(classes)} classes ({few}, ...)")
    return [index[name] for name in names], classes


def files_below(folder):
    """The video files anywhere below a folder, sorted, relative to it."""
    found = []
    for top, _, names in os.walk(folder, followlinks=True):
        below = os.path.relpath(top, folder)
        found += [os.path.normpath(os.path.join(below, n)) for n in names if n.lower().endswith(SUFFIXES)]
    return sorted(found)


def read_list(file, root, split, need_labels=False, classes=None):
    """Read a list of videos: 'path label' lines, or the official Kinetics csv."""
    if str(file).lower().endswith(SUFFIXES):
        raise InputError(f"{file}: a video, not a list of them; give the folder that it is in")
    with open(file, encoding="utf-8-sig", newline="") as text:
        first = text.readline()
        text.seek(0)
        if "youtube_id" in first:
            return read_kinetics_csv(file, text, root, split, need_labels, classes)
        lines = text.read().splitlines()
    count = len(classes) if isinstance(classes, list) else classes
    paths, labels = [], []
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*(\S.*?)(\s*,\s*|\s+)(\d+)\s*", line)
        wrong = f"{file}, line {i}: {line.strip()!r}: {{}}; expected 'path label' or 'path,label'"
        if not match:
            raise InputError(wrong.format("no label after the path (a whole number; any will do for pre-training)"))
        if re.search(r"[\s,]\d+$", match[1]):
            raise InputError(wrong.format("more than two columns"))
        if count and int(match[3]) >= count:
            raise InputError(wrong.format(f"label {match[3]} is outside 0..{count - 1}, the {count} classes there are"))
        paths.append(match[1])
        labels.append(int(match[3]))
    return VideoList(file, root, paths, labels, classes if isinstance(classes, list) else None)


def read_kinetics_csv(file, text, root, split, need_labels=False, classes=None):
    """Read the official csv: rows of label,youtube_id,time_start,time_end,split, in the order its first row gives.

    Rows of other splits are left out. Rows whose video is not on disk are left out, counted and reported: Kinetics
    lives on YouTube, and no two copies of it are the same.
    """
    rows = csv.reader(text)
    header = next(rows)
    stems, names, lines = [], [], []
    for row in rows:
        if len(row) != len(header):
            raise InputError(f"{file}, line {rows.line_num}: {len(row)} columns; expected {','.join(header)}")
        row = dict(zip(header, row))
        if row.get("split", split) not in SPLITS[split]:
            continue
        try:
            start, end = float(row["time_start"]), float(row["time_end"])
        except (KeyError, ValueError):
            raise InputError(f"{file}, line {rows.line_num}: time_start and time_end must be seconds") from None
        if need_labels and not row.get("label"):
            raise InputError(f"{file}, line {rows.line_num}: no label; expected {','.join(header)}")
        stems.append(f"{row['youtube_id']}_{int(start):06d}_{int(end):06d}")
        names.append(row.get("label", ""))
        lines.append(rows.line_num)
    labels, classes = number(names, classes, lambda i: f"{file}, line {lines[i]}")
    return VideoList(file, root, *on_disk(file, root, stems, labels), classes)


def read_ssv2(file, labels_file, root):
    """Read Something-Something v2 as it is distributed: labels json, train / validation json, a folder of ID.webm."""
    with open(labels_file, encoding="utf-8") as text:
        numbers = {name: int(i) for name, i in json.load(text).items()}
    with open(file, encoding="utf-8") as text:
        items = json.load(text)
    labels = []
    for i, item in enumerate(items):
        name = item["template"].replace("[", "").replace("]", "") if "template" in item else None
        if name not in numbers:
            raise InputError(f"{file}, entry {i}, id {item.get('id')}: class {name!r} is not in {labels_file}")
        labels.append(numbers[name])
    found = on_disk(file, root, [str(item["id"]) for item in items], labels)
    return VideoList(file, root, *found, sorted(numbers, key=numbers.get))


def on_disk(file, root, stems, labels):
    """The videos below root by their names without suffix, with their labels; counts and reports those not there."""
    there = {Path(path).stem: path for path in files_below(root)}
    missing = [stem for stem in stems if stem not in there]
    if missing:
        print(f"{file}: {len(missing)} of {len(stems)} videos are not below {root}, the first of them {missing[0]}")
    if stems and len(missing) == len(stems):
        raise InputError(f"{file}: none of its videos is below {root}; expected files such as {missing[0]}.mp4")
    kept = [(there[stem], label) for stem, label in zip(stems, labels) if stem in there]
    return [path for path, _ in kept], [label for _, label in kept]


# ------------------------------------------------------------------------------------------------------- decoding


class VideoError(InputError):
    """A video that cannot be used, with the reason."""


class Video:
    """An open video file; use it in a with statement. Raises VideoError where it cannot be opened.

    duration: seconds. Times count from the first frame, whatever time stamp the file gives it.
    """

    def __init__(self, path):
        self.path, self.deadline = path, time.monotonic() + DECODE_LIMIT
        self.open()
        self.start = self.stream.start_time or 0
        self.second = 1 / self.stream.time_base  # in units of time stamps
        head = self.packets(self.start, self.start)  # headers may be wrong about the first frame
        self.start = min((p.pts for p in head if not p.is_discard), default=self.start)
        if self.stream.duration:
            self.duration = float(self.stream.duration / self.second)
        elif self.container.duration:
            self.duration = self.container.duration / av.time_base
            if "matroska" in self.container.format.name:  # this one is counted from 0, not from the first frame
                self.duration -= float(self.start / self.second)
        else:  # the header does not say: read to the end
            ends = [p.pts + (p.duration or 0) - self.start for p in self.packets(self.start, math.inf)]
            self.duration = float(max(ends, default=0) / self.second)

    def open(self):
        try:
            self.container = av.open(str(self.path), metadata_errors="ignore", timeout=DECODE_LIMIT)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"cannot be opened: {getattr(error, 'strerror', None) or error}") from None
        if not self.container.streams.video:
            self.container.close()
            raise VideoError("has no video stream")
        self.stream = self.container.streams.video[0]
        self.codec = self.stream.codec_context
        if self.codec is None:
            self.container.close()
            raise VideoError("is in a format that cannot be decoded")
        if self.codec.width * self.codec.height > LARGEST:
            self.container.close()
            raise VideoError(f"has frames of {self.codec.width} x {self.codec.height} pixels")
        if self.container.format.name == "avi" and self.codec.name in ("h264", "hevc") and self.codec.has_b_frames:
            self.container.close()
            raise VideoError("has B-frames, whose order AVI does not give; convert it: ffmpeg -i a.avi a.mp4")
        self.codec.thread_count = 1  # the workers are the threads
        self.used = False  # nothing has been read yet

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()

    def in_time(self):
        if time.monotonic() > self.deadline:
            raise VideoError(f"takes more than {DECODE_LIMIT:g} s to decode")

    def packets(self, first, last):
        """The packets needed for the frames at time stamps first to last, from a key frame on, in decoding order."""
        for margin in (0, 2, 10, math.inf):  # seconds to seek ahead of `first`: some files seek to after what is asked
            target = first - margin * float(self.second)
            if target > self.start:
                try:
                    self.container.seek(math.floor(target), stream=self.stream)
                except av.error.FFmpegError:  # no seeking in this file: read it from its start
                    target = self.start
            if target <= self.start and self.used:
                self.container.close()
                self.open()
            self.used = True
            found, after = [], math.inf
            try:
                for packet in self.container.demux(self.stream):
                    self.in_time()
                    if packet.pts is None or not packet.size:
                        continue
                    found.append(packet)
                    if packet.pts > last:
                        after = min(after, packet.pts)
                    if packet.dts is not None and packet.dts > after:
                        break  # pts >= dts, and dts only rises: what comes next is shown after `after`
            except av.error.FFmpegError:
                pass  # damaged from here on: what has been read may do
            if target <= self.start or (found and found[0].is_keyframe and found[0].pts <= first):
                break
        return found

    def frames(self, times):
        """The frames nearest to the given times: seconds (any order, repeats allowed) -> as many av.VideoFrame.

        Beyond the last frame, the last frame. No frame is decoded twice, and groups of pictures without a wanted
        frame are not decoded. Where damage hides up to half of the wanted frames the nearest that decode stand in;
        raises VideoError where it hides more.
        """
        wanted = self.start + np.asarray(times, dtype=np.float64) * float(self.second)
        order = np.sort(wanted)
        cuts = np.flatnonzero(np.diff(order) > READ_THROUGH * float(self.second)) + 1
        stamps, decoded = [], {}
        for group in np.split(order, cuts):
            packets = self.packets(group[0], group[-1])
            shown = np.array(sorted({p.pts for p in packets if not p.is_discard}), dtype=np.float64)
            if len(shown):
                stamps.append(shown)
                decoded |= self.decode(packets, set(shown[nearest(shown, group)].astype(int).tolist()))
        if not stamps:
            raise VideoError("no frame in it can be read")
        stamps = np.unique(np.concatenate(stamps))
        chosen = stamps[nearest(stamps, wanted)].astype(int).tolist()
        missing = len(set(chosen) - set(decoded))
        if missing > len(set(chosen)) / 2:
            raise VideoError(f"{missing} of {len(set(chosen))} wanted frames cannot be decoded")
        there = np.array(sorted(decoded))
        return [decoded[stamp] for stamp in there[nearest(there, np.array(chosen))].tolist()]

    def decode(self, packets, wanted):
        """Decode the frames with the wanted time stamps, and of the rest only what they refer to: {stamp: frame}."""
        needed, key, keys = np.zeros(len(packets), dtype=bool), 0, []
        for i, packet in enumerate(packets):
            if packet.is_keyframe:
                keys.append(i)
            if packet.pts in wanted and not packet.is_discard:
                # From the last key frame that is not shown later: frames shown before a key frame may need others.
                key = next((k for k in reversed(keys) if packets[k].pts <= packet.pts), 0)
                needed[key : i + 1] = True
        frames, ends = {}, np.append(~needed[1:], True)
        for packet, need, end in zip(packets, needed, ends):
            if not need:
                continue
            self.in_time()
            if self.codec.name in ("h264", "hevc"):  # these can leave out frames that are not wanted nor referred to
                self.codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            for part in (packet, None) if end else (packet,):  # None: let out what the decoder still holds
                with contextlib.suppress(av.error.FFmpegError):  # a damaged packet: frames() counts what is missing
                    frames |= {f.pts: f for f in self.codec.decode(part) if f.pts in wanted}
            if end:
                self.codec.flush_buffers()
        return frames


def nearest(sorted_values, targets):
    """For each target the index of the nearest value; the earlier of two that are as near."""
    right = np.searchsorted(sorted_values, targets).clip(0, len(sorted_values) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(abs(targets - sorted_values[left]) <= abs(sorted_values[right] - targets), left, right)


def upright_size(frame):
    """Height and width of a frame as it is meant to be shown."""
    return (frame.width, frame.height) if frame.rotation % 180 == 90 else (frame.height, frame.width)


def to_clip(frames, size, box=None, flip=False):
    """Cut, scale, mirror and convert frames: T av.VideoFrame -> uint8 RGB (T, height, width, 3).

    size: (height, width) to scale to. box: (top, left, height, width) in pixels of the upright frame, all of it by
    default; rounded to what the pixel format can be cut at. One pass of libswscale per distinct frame, so that an
    RGB picture of full size never exists. Raises VideoError where that cannot be done with them.
    """
    first = frames[0]
    top, left, height, width = box or (0, 0, *upright_size(first))
    turn = {90: ["transpose=cclock"], 180: ["hflip", "vflip"], 270: ["transpose=clock"]}.get(first.rotation % 360, [])
    steps = [f"crop={width}:{height}:{left}:{top}", f"scale={size[1]}:{size[0]}:flags=bilinear", "format=rgb24"]
    steps = turn + steps + ["hflip"] * flip
    pictures, graph = {}, av.filter.Graph()
    graph.threads = 1
    try:
        source = dict(width=first.width, height=first.height, format=first.format, time_base=Fraction(1, FPS))
        chain = [graph.add_buffer(**source), *(graph.add(*step.split("=", 1)) for step in steps)]
        graph.link_nodes(*chain, graph.add("buffersink")).configure()
        for frame in frames:
            if id(frame) not in pictures:
                if (frame.width, frame.height, frame.format.name) != (first.width, first.height, first.format.name):
                    same = frame.reformat(first.width, first.height, first.format)  # the size may change within a file
                else:
                    same = frame
                graph.push(same)
                pictures[id(frame)] = torch.from_numpy(graph.pull().to_ndarray())
    except av.error.FFmpegError as error:
        raise VideoError(f"cannot be cut to {height} x {width} and scaled: {error.strerror}") from None
    return torch.stack([pictures[id(frame)] for frame in frames])


# ------------------------------------------------------------------------------------------------------- sampling


def clip_times(duration, num_frames, sampling_rate, place):
    """Times in seconds of a clip's frames; place in 0..1 puts the clip between the start and the end of the video."""
    span = num_frames * sampling_rate / FPS
    return max(0.0, duration - span) * place + np.arange(num_frames) * sampling_rate / FPS


def segment_times(duration, num_frames, places):
    """Times in seconds of one frame from each of num_frames equal parts, at places (num_frames,) in 0..1 of them."""
    return (np.arange(num_frames) + np.asarray(places)) * duration / num_frames


class Clips(torch.utils.data.Dataset):
    """Clips to train on: repeated sampling, random resized crop, flip, RandAugment, random erasing (Tables 5 and 6b).

    Indexed by (epoch, index). A sample is a dict: video uint8 (R, T, H, W, 3) of R clips, label (R,) where the list
    has labels, noise (R, N) where clips are masked, index, failures [(index, reason)] of videos that were replaced.
    """

    def __init__(self, videos, args, noise_of=None, rand_augment=None, erasing=0.0):
        """args: the stage's arguments on clips. noise_of() gives the noise (N,) that a clip is masked by.

        rand_augment: (magnitude of 10, its standard deviation) or None. erasing: the chance of random erasing.
        """
        from torchvision.transforms import v2  # where it is used: torchvision takes as long to load as torch

        self.videos, self.noise_of, self.seed, self.repeats = videos, noise_of, args.seed, args.repeats
        self.num_frames, self.sampling_rate, self.img_size = args.num_frames, args.sampling_rate, args.img_size
        self.segments, self.rand_augment = args.segments, rand_augment
        self.crop = v2.RandomResizedCrop(args.img_size, scale=args.crop, ratio=(3 / 4, 4 / 3))
        self.hflip = args.hflip
        self.erase = v2.RandomErasing(erasing, value=round(255 * PIXEL_MEAN))

    def __getitem__(self, key):
        return with_replacement(self, *key)

    def times(self, duration, seed):
        """A random clip of a video of this duration."""
        # Not torch's generator: the crop is drawn by that one, from this seed, and would follow from the place.
        places = np.random.default_rng(seed).random(self.num_frames)
        if self.segments:
            return segment_times(duration, self.num_frames, places)
        return clip_times(duration, self.num_frames, self.sampling_rate, places[0])

    def load(self, index, epoch):
        seeds = [stateless_seed(self.seed, epoch, index, repeat) for repeat in range(self.repeats)]
        with Video(self.videos.path(index)) as video:
            frames = video.frames(np.concatenate([self.times(video.duration, seed) for seed in seeds]))
        clips, noise = [], []
        for repeat, seed in enumerate(seeds):
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would take note of it for each device
                clips.append(self.augment(frames[repeat * self.num_frames : (repeat + 1) * self.num_frames]))
                noise += [self.noise_of()] if self.noise_of else []
        sample = {"video": torch.stack(clips)}
        if noise:
            sample["noise"] = torch.stack(noise)
        if self.videos.labels is not None:
            sample["label"] = torch.full((self.repeats,), int(self.videos.labels[index]))
        return sample

    def augment(self, frames):
        """T av.VideoFrame -> uint8 (T, H, W, 3); whatever is drawn is the same for all frames of the clip."""
        box = self.crop.make_params([torch.empty(3, *upright_size(frames[0]), device="meta")])
        box = [box[name] for name in ("top", "left", "height", "width")]
        flip = self.hflip and torch.rand(()).item() < 0.5
        clip = to_clip(frames, (self.img_size, self.img_size), box, flip).permute(0, 3, 1, 2)  # (T, 3, H, W)
        if self.rand_augment:
            from torchvision.transforms import v2

            magnitude, deviation = self.rand_augment
            level = (magnitude + deviation * torch.randn(()).item()) * 100
            clip = v2.RandAugment(2, min(max(round(level), 0), 1000), num_magnitude_bins=1001)(clip.contiguous())
        return self.erase(clip).permute(0, 2, 3, 1)


class Views(torch.utils.data.Dataset):
    """Clips to test on: K clips evenly over the video x S crops along its longer side (K x 3 in Tables 7 and 9).

    A sample is a dict: index, and video uint8 (K * S, T, H, W, 3), or the reason why there is none in "failure".
    """

    def __init__(self, videos, args, views):
        self.videos, self.views, self.segments = videos, views, args.segments
        self.num_frames, self.sampling_rate, self.img_size = args.num_frames, args.sampling_rate, args.img_size

    def __len__(self):
        return len(self.videos)

    def times(self, duration):
        """The times of the K clips: from the start to the end, or the middle where there is one."""
        K = self.views[0]
        if self.segments:  # one clip takes the middle of each part, K clips as many places evenly over it
            return [segment_times(duration, self.num_frames, (k + 0.5) / K) for k in range(K)]
        places = (np.arange(K) / (K - 1)) if K > 1 else [0.5]
        return [clip_times(duration, self.num_frames, self.sampling_rate, place) for place in places]

    def boxes(self, height, width):
        """The S square crops as high as the shorter side, along the longer one and touching both its ends."""
        short, S = min(height, width), self.views[1]
        shifts = [round((max(height, width) - short) * (s / (S - 1) if S > 1 else 0.5)) for s in range(S)]
        return [(shift, 0, short, short) if height > width else (0, shift, short, short) for shift in shifts]

    def __getitem__(self, index):
        try:
            with Video(self.videos.path(index)) as video:
                times = self.times(video.duration)
                frames = video.frames(np.concatenate(times))
            clips = []
            for k in range(len(times)):
                clip = frames[k * self.num_frames : (k + 1) * self.num_frames]
                size = (self.img_size, self.img_size)
                clips += [to_clip(clip, size, box) for box in self.boxes(*upright_size(clip[0]))]
        except VideoError as error:
            return {"index": index, "failure": str(error)}
        return {"index": index, "video": torch.stack(clips)}


def with_replacement(dataset, epoch, index):
    """dataset.load(index, epoch); a video that fails is replaced by another, which follows from the same numbers."""
    failures, tried = [], index
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return dataset.load(tried, epoch) | {"index": index, "failures": failures}
        except VideoError as error:
            failures.append((tried, str(error)))
        tried = stateless_seed(dataset.seed, epoch, index, attempt) % len(dataset.videos)
    reasons = "\n".join(f"  {dataset.videos.name(i)}: {reason}" for i, reason in dict(failures).items())
    raise VideoError(f"{ATTEMPTS} videos in a row cannot be used:\n{reasons}")


# ------------------------------------------------------------------------------------------------------------ AVA

AVA_TIMES = (902, 1798)  # the seconds of each movie that are annotated
AVA_CLASSES = 80  # actions, numbered from 1; 60 of them are evaluated
AVA_FILES = {  # what a data set of AVA consists of: strings that the file's name contains, and does not
    "ground truth": (("ava_{split}_v2", ".csv"), ("excluded", "detection", "predicted")),
    "excluded time stamps": (("{split}", "excluded", ".csv"), ()),
    "person boxes": (("{split}", "box", ".csv"), ("excluded",)),
    "action list": ((".pbtxt",), ()),
}
AVA_LAYOUT = """\
  DATA/annotations/ava_train_v2.2.csv             rows of video,time stamp,x1,y1,x2,y2,action,person; ava_val_v2.2.csv
  DATA/annotations/ava_train_excluded_timestamps_v2.2.csv     rows of video,time stamp; and of val
  DATA/annotations/ava_action_list_v2.2_for_activitynet_2019.pbtxt     the 60 actions that are evaluated
  DATA/annotations/.../ava_detection_val_boxes_and_labels.csv     a detector's person boxes, anywhere below
                                     DATA/annotations: rows of video,time stamp,x1,y1,x2,y2,action,score; the action
                                     may be empty or -1 (none). Of train, too: to train on beside the ground truth
  DATA/videos/VIDEO.mkv              movies, or the cuts of 15 minutes that people keep (--video_start 900); or
  DATA/frames/VIDEO/VIDEO_000001.jpg     their frames, 30 a second, from second 900 on
--videos FOLDER where these lie elsewhere. No data at hand? Use --dataset demo."""


class BoxRows(NamedTuple):
    """The rows of a csv of boxes, as columns; boxes are x1, y1, x2, y2 as shares of the frame's width and height."""

    source: str
    video: np.ndarray  # (R,) numbers into names
    time: np.ndarray  # (R,) seconds
    box: np.ndarray  # (R, 4)
    action: np.ndarray  # (R,) 1..80; 0 where a box has none
    score: np.ndarray  # (R,) 1 in the ground truth
    names: list  # of the videos

    def only(self, rows):
        """Some of the rows, and the videos that are in them."""
        columns = [column[rows] for column in self[1:6]]
        there, columns[0] = np.unique(columns[0], return_inverse=True)
        return BoxRows(self.source, *columns, [self.names[i] for i in there])

    def join(self, other):
        """The rows of both."""
        numbers = {name: i for i, name in enumerate(self.names)}
        video = np.array([numbers.setdefault(name, len(numbers)) for name in other.names], dtype=int)[other.video]
        columns = [np.concatenate(pair) for pair in zip(self[1:6], (video, *other[2:6]))]
        return BoxRows(f"{self.source} and {other.source}", *columns, list(numbers))


def read_rows(file):
    """The rows of a csv with their line numbers, without empty ones."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            yield from ((line, row) for line, row in enumerate(csv.reader(text), 1) if row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: cannot be read as a csv: {error}") from None


def read_boxes(file, scored, plain=False):
    """Read a csv of boxes in AVA's form: video, time stamp, x1, y1, x2, y2, action, and person or score.

    scored: the last column is a score, and the action may be missing (detections); else it is the person, and there
    must be an action (ground truth). plain: nothing but video, time stamp and box is needed. Raises InputError, naming
    file and line, where a row has another form, a box has no area or an action is outside 1..80.
    """
    expected = "video,time stamp,x1,y1,x2,y2" + ("" if plain else ",action," + ("score" if scored else "person"))
    expected += ", and no header line"
    numbers, video, time, box, action, score = {}, [], [], [], [], []

    def wrong(line, row, what):
        return InputError(f"{file}, line {line}: {','.join(row)!r}: {what}; expected {expected}")

    for line, row in read_rows(file):
        if len(row) not in ((6, 7, 8) if plain else (7, 8)):
            raise wrong(line, row, f"{len(row)} columns")
        try:
            video.append(numbers.setdefault(row[0], len(numbers)))
            time.append(float(row[1]))
            x1, y1, x2, y2 = map(float, row[2:6])
            act = int(row[6]) if len(row) > 6 and row[6] not in ("", "-1") else 0
            score.append(float(row[7]) if scored and len(row) > 7 and row[7] else 1.0)
        except ValueError as error:
            raise wrong(line, row, str(error)) from None
        if not (x1 < x2 and y1 < y2):
            raise wrong(line, row, "a box without area; x1 < x2 and y1 < y2")
        if min(x1, y1) < -1 or max(x2, y2) > 2:
            raise wrong(line, row, "a box far outside the frame; give shares of its width and height, 0 to 1")
        if not 0 <= act <= AVA_CLASSES or (act == 0 and not scored):
            raise wrong(line, row, f"action {row[6]!r} is outside 1..{AVA_CLASSES}")
        box.append((x1, y1, x2, y2))
        action.append(act)
    columns = np.array(video, dtype=np.int64), np.array(time), np.array(box).reshape(-1, 4), np.array(action, dtype=int)
    return BoxRows(str(file), *columns, np.array(score), list(numbers))


def read_excluded(file):
    """Read a csv of time stamps that are not evaluated: a set of (video, seconds)."""
    excluded = set()
    for line, row in read_rows(file):
        try:
            name, time = row
            excluded.add((name, float(time)))
        except ValueError:
            raise InputError(f"{file}, line {line}: {','.join(row)!r}; expected video,time stamp") from None
    return excluded


def read_action_list(file):
    """Read a list of actions in either form it is distributed in: {number: name}."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    entries = re.findall(r'(?:item|label)\s*\{\s*name:\s*"(.*?)"\s*(?:label_)?id:\s*(\d+)', text)
    actions = {int(number): name for name, number in entries}
    if not actions or not all(1 <= number <= AVA_CLASSES for number in actions):
        raise InputError(f'{file}: no action list; expected entries such as item {{ name: "walk" id: 14 }}')
    return actions


def find_ava(data, split):
    """The files of a split in AVA_LAYOUT: {what: path, or None}; of several that fit, those of the latest version."""
    top = Path(data) / "annotations" if (Path(data) / "annotations").is_dir() else Path(data)
    if not top.is_dir():
        raise InputError(f"{data}: no such folder; expected\n{AVA_LAYOUT}")
    names, found = sorted(path for path in top.rglob("*") if path.suffix in (".csv", ".pbtxt")), {}
    for what, (parts, others) in AVA_FILES.items():
        parts = [part.format(split=split) for part in parts]
        fit = [p for p in names if all(s in p.name for s in parts) and not any(s in p.name for s in others)]
        for better in ("v2.2", "include_negative", "activitynet", "2019"):
            fit = [path for path in fit if better in path.name] or fit
        if len(fit) > 1:
            raise InputError(f"{top}: {len(fit)} files of {split} {what} ({', '.join(map(str, fit))}); leave one there")
        found[what] = str(fit[0]) if fit else None
    return found


class FrameFolder:
    """A video as a folder of its frames, ID/ID_000001.jpg and on, 30 a second; it is read as a Video is."""

    def __init__(self, path):
        self.path, self.count = Path(path), count_frames(path)
        self.duration = self.count / FPS

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def frames(self, times):
        """The frames nearest to the given times, as Video.frames has them."""
        numbers = 1 + np.rint(np.asarray(times) * FPS).astype(int).clip(0, self.count - 1)
        decoded = {number: self.decode(self.path / f"{self.path.name}_{number:06d}.jpg") for number in set(numbers)}
        return [decoded[number] for number in numbers]

    @staticmethod
    def decode(file):
        try:
            with av.open(str(file)) as container:
                return next(container.decode(video=0))
        except (av.error.FFmpegError, StopIteration, OSError) as error:
            raise VideoError(f"{file.name} cannot be read: {error}") from None


@functools.cache
def count_frames(folder):
    """How many frames a folder of them holds."""
    return sum(name.endswith(".jpg") for name in os.listdir(folder))


def find_movies(rows, folder, allow_missing=False):
    """The movies that BoxRows are about: {video: path of its file, or of the folder with its frames}.

    Raises InputError where one is missing from `folder`, unless allow_missing: then it is reported and left out.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --videos says where the movies are")
    there = {name: str(folder / name) for name in rows.names if (folder / name).is_dir()}
    if not there:  # no folders of frames: files, anywhere below
        there = {Path(path).stem: str(folder / path) for path in files_below(folder)}
    movies = {name: there[name] for name in rows.names if name in there}
    missing = [name for name in rows.names if name not in there]
    if missing:
        found = f"{len(missing)} of {len(rows.names)} movies are not below {folder}: {', '.join(missing[:5])}"
        if not allow_missing or not movies:
            raise InputError(f"{rows.source}: {found}; --videos says where they are, --allow_missing goes on without")
        print(f"{rows.source}: {found}")
    return movies


class Keyframes:
    """The moments of movies that have person boxes, with the actions of each: what AVA trains and tests on.

    Indexed like a VideoList, by keyframe. moments (K, 2): the movie's number and the second. rows(index): the boxes of
    a keyframe in boxes (R, 4), shares of the frame, and in actions (R, 80), booleans.
    """

    unit = "keyframes"

    def __init__(self, rows, movies, excluded=(), video_start=None, span=AVA_TIMES):
        """rows: BoxRows; a box with several actions has a row for each. movies: {video: path}, see find_movies.

        excluded: (video, second) that are left out, as is what lies outside `span`, and what movies has no path for.
        video_start: the second of the movie that a file begins with; None: 0, or 900 for a folder of frames. What is
        left out is counted and reported; raises InputError where nothing is left.
        """
        self.source, self.names, self.video_start = rows.source, rows.names, video_start
        self.paths = [movies.get(name) for name in rows.names]
        table = np.concatenate([rows.video[:, None], rows.time[:, None], rows.box], 1)
        table, which = np.unique(table, axis=0, return_inverse=True)  # sorted by video, second, box
        acts = rows.action > 0
        actions = np.zeros((len(table), AVA_CLASSES), dtype=bool)
        actions[which.reshape(-1)[acts], rows.action[acts] - 1] = True
        moment = table[:, 0] * 1e6 + table[:, 1]  # one number, for np.isin
        number = {name: i for i, name in enumerate(self.names)}
        banned = [number[name] * 1e6 + second for name, second in excluded if name in number]
        missing = [i for i, path in enumerate(self.paths) if path is None]
        out = {
            "of movies that are missing": np.isin(table[:, 0], missing),
            f"outside the seconds {span[0]} to {span[1]}": (table[:, 1] < span[0]) | (table[:, 1] > span[1]),
            "at excluded time stamps": np.isin(moment, banned),
        }
        for why, rule in out.items():
            if rule.any():
                print(f"{self.source}: {rule.sum()} boxes {why} are left out")
        kept = ~np.any(list(out.values()), 0)
        if not kept.any():
            raise InputError(f"{self.source}: no box is left to use")
        self.boxes, self.actions = table[kept, 2:], actions[kept]
        self.moments, first = np.unique(table[kept, :2], axis=0, return_index=True)
        self.ends = np.append(first[1:], len(self.boxes))

    def __len__(self):
        return len(self.moments)

    def name(self, index):
        movie, second = self.moments[index]
        return f"{self.paths[int(movie)]}, second {second:g}"

    def rows(self, index):
        return slice(self.ends[index - 1] if index else 0, self.ends[index])

    @functools.cached_property
    def digest(self):
        """A short hash of movies, moments, boxes and actions: the same list has the same."""
        parts = ("\n".join(self.names).encode(), self.moments.tobytes(), self.boxes.tobytes(), self.actions.tobytes())
        return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()

    def frames(self, index, num_frames, sampling_rate):
        """The frames of the clip around a keyframe, which is number num_frames // 2 of them; clamped at the ends."""
        movie, second = self.moments[index]
        path = self.paths[int(movie)]
        reader, start = (FrameFolder, 900.0) if os.path.isdir(path) else (Video, 0.0)
        start = start if self.video_start is None else self.video_start
        with reader(path) as video:
            at = second - start
            if not 0 <= at <= video.duration:
                raise VideoError(
                    f"has no second {second:g}: it holds {start:g} to {start + video.duration:g}; --video_start says "
                    "with which second of the movie the files begin: 900 for cuts of 15 minutes"
                )
            return video.frames(at + (np.arange(num_frames) - num_frames // 2) * sampling_rate / FPS)


def cut_boxes(boxes, frame, crop, size, flip=False):
    """Move boxes along with a crop: shares of a frame (K, 4) -> pixels of the clip (K, 4), and which are left (K,).

    frame, size: (height, width) of frame and clip. crop: (top, left, height, width) in pixels of the frame. What
    reaches beyond the clip is cut off; a box is left where it still has an area.
    """
    (H, W), (top, left, height, width) = frame, crop
    x = (boxes[:, 0::2] * W - left) * size[1] / width  # (K, 2)
    y = (boxes[:, 1::2] * H - top) * size[0] / height
    if flip:
        x = size[1] - x[:, ::-1]
    x, y = x.clip(0, size[1]), y.clip(0, size[0])
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)
    return torch.from_numpy(boxes).float(), torch.from_numpy((x[:, 0] < x[:, 1]) & (y[:, 0] < y[:, 1]))


class KeyframeClips(torch.utils.data.Dataset):
    """Clips around keyframes to train on: short side scaled to 256 to 320, a random crop of 224, flipped or not.

    Indexed by (epoch, index). A sample is a dict: video uint8 (1, T, H, W, 3), boxes (K, 4) in its pixels, actions
    (K, 80); index and failures as in Clips. Boxes move along and are cut; K counts those left, and may be 0.
    """

    SHORT_SIDES = 256 / 224, 320 / 224  # the frame's short side, in sides of the crop

    def __init__(self, videos, args):
        self.videos, self.seed, self.hflip, self.img_size = videos, args.seed, args.hflip, args.img_size
        self.num_frames, self.sampling_rate = args.num_frames, args.sampling_rate

    def __getitem__(self, key):
        return with_replacement(self, *key)

    def load(self, index, epoch):
        frames = self.videos.frames(index, self.num_frames, self.sampling_rate)
        generator = torch.Generator().manual_seed(stateless_seed(self.seed, epoch, index, 0))
        scale, down, along, mirror = torch.rand(4, generator=generator).tolist()
        H, W = upright_size(frames[0])
        low, high = self.SHORT_SIDES
        side = even(min(H, W) / (low + (high - low) * scale))
        crop = even((H - side) * down), even((W - side) * along), side, side
        flip, size = self.hflip and mirror < 0.5, (self.img_size, self.img_size)
        clip = to_clip(frames, size, crop, flip)
        rows = self.videos.rows(index)
        boxes, left = cut_boxes(self.videos.boxes[rows], (H, W), crop, size, flip)
        actions = torch.from_numpy(self.videos.actions[rows]).float()
        return {"video": clip[None], "boxes": boxes[left], "actions": actions[left]}


class KeyframeViews(torch.utils.data.Dataset):
    """Clips around keyframes to test on.

    A sample is a dict: index, and video uint8 (T, H, W, 3) and boxes (K, 4) in its pixels, or the reason why there are
    none in "failure".

    center: short side 256, the middle 224 x 224. full: the whole frame at short side 256, at which persons are as large
    as in the center crop and as in training; rounded to whole patches, so that nothing of it is dropped. All boxes are
    kept, also what is left of one beyond the crop: each must get its scores.
    """

    def __init__(self, videos, args, patch_size):
        self.videos, self.test_crop, self.img_size, self.patch_size = videos, args.test_crop, args.img_size, patch_size
        self.num_frames, self.sampling_rate = args.num_frames, args.sampling_rate

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        try:
            frames = self.videos.frames(index, self.num_frames, self.sampling_rate)
            H, W = upright_size(frames[0])
            low = KeyframeClips.SHORT_SIDES[0]
            if self.test_crop == "center":
                side = even(min(H, W) / low)
                crop, size = (even((H - side) / 2), even((W - side) / 2), side, side), (self.img_size, self.img_size)
            else:
                unit = low * self.img_size / min(H, W) / self.patch_size  # patches a pixel
                crop, size = (0, 0, H, W), tuple(max(1, round(n * unit)) * self.patch_size for n in (H, W))
            clip = to_clip(frames, size, crop)
        except VideoError as error:
            return {"index": index, "failure": str(error)}
        boxes, _ = cut_boxes(self.videos.boxes[self.videos.rows(index)], (H, W), crop, size)
        return {"index": index, "video": clip, "boxes": boxes}


def even(x):
    """The largest even number up to x: video stores colours at half the resolution, and can be cut only there."""
    return 2 * int(x / 2)


# -------------------------------------------------------------------------------------------------------- batches


class Stream:
    """The order of training: passes over the list without end, cut into steps, processes and micro-batches.

    Passes follow one another without a gap, so that nothing is dropped at their ends. Each is a permutation that
    follows from (seed, epoch). Iterating yields, for one process, the micro-batches of each step from `start` to
    `stop`, as lists of (epoch, index).
    """

    def __init__(self, length, batch_size, micro_batch, rank, world, seed, start, stop):
        self.length, self.batch_size, self.micro_batch, self.seed = length, batch_size, micro_batch, seed
        self.rank, self.world, self.start, self.stop = rank, world, start, stop
        self.permutation = functools.lru_cache(2)(self.permutation)

    def permutation(self, epoch):
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(stateless_seed(self.seed, epoch)))

    def __iter__(self):
        share = self.batch_size // self.world
        for step in range(self.start, self.stop):
            first = step * self.batch_size + self.rank * share
            for begin in range(first, first + share, self.micro_batch):
                places = (divmod(place, self.length) for place in range(begin, begin + self.micro_batch))
                yield [(epoch, int(self.permutation(epoch)[place])) for epoch, place in places]


def collate(samples):
    """Samples of R clips each -> one batch: video (R*B, 3, T, H, W) uint8, every other tensor (R*B, ...).

    First one clip of each video, then the next of each: what is mixed with its neighbour is mixed with another video.
    Boxes, of which clips have different numbers, become (K, 5) with the clip's number first, and their actions (K, 80).
    """
    tensors = [name for name in samples[0] if torch.is_tensor(samples[0][name]) and name not in ("boxes", "actions")]
    batch = {name: torch.stack([s[name] for s in samples], 1).flatten(0, 1) for name in tensors}
    if "boxes" in samples[0]:
        batch["boxes"] = torch.cat([F.pad(s["boxes"], (1, 0), value=i) for i, s in enumerate(samples)])
        batch["actions"] = torch.cat([s["actions"] for s in samples])
    batch["video"] = batch["video"].permute(0, 4, 1, 2, 3)  # a view: the bytes stay as they were decoded
    batch["index"] = [s["index"] for s in samples]
    batch["failures"] = [failure for s in samples for failure in s["failures"]]
    return batch


def workers(args):
    """Decoding processes for each training process: --num_workers, or its share of the cores, up to 16.

    Half of its share where there is no GPU.
    """
    if args.num_workers is not None:
        return args.num_workers
    return min(16, cores() if torch.cuda.is_available() else max(1, cores() // 2))


def make_loader(dataset, stream, args, device):
    """A DataLoader over a Stream. Nothing random is left to the workers, so their number changes nothing."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=stream,
        num_workers=workers(args),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=outlast_signals,
    )


def outlast_signals(_):
    """Ctrl-C and SIGTERM often reach all processes of a run at once: its workers go on until it has saved and ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))  # the second one ends them


def each(loader):
    """Iterate over a DataLoader; a VideoError in a worker is raised without the traceback that it comes with."""
    try:
        yield from loader
    except VideoError as error:
        error.__traceback__ = None  # a cycle that holds the loader: now it ends at once, and in order
        raise VideoError(str(error).rpartition("data.VideoError: ")[2].rstrip()) from None


def each_once(views, args, rank, world, function):
    """Call function(sample) for each video or keyframe of Views, once, whatever the number of processes.

    Returns what it gave, {index: value} in the order of the indices, and [(index, reason)] of those that cannot be
    read; on all processes.
    """
    mine = range(rank, len(views), world)
    loader = torch.utils.data.DataLoader(views, sampler=mine, batch_size=None, num_workers=workers(args))
    values, failures, samples, rounds = {}, [], each(loader), math.ceil(len(views) / world)
    for number in tqdm(range(rounds), "test", disable=rank > 0, mininterval=bar_interval()):
        if number % 20 == 0:
            gather(None)  # else a slow machine could be so late in the end that the others take it for dead
        if (sample := next(samples, None)) is None:
            break  # in the last round there may not be one for each
        if "failure" in sample:
            failures.append((sample["index"], sample["failure"]))
        else:
            values[sample["index"]] = function(sample)
    reports = gather((values, failures))
    values = {index: value for report in reports for index, value in report[0].items()}
    return dict(sorted(values.items())), sorted(failure for report in reports for failure in report[1])


class Failures:
    """Counts the videos that failed, names each once in failures.log, stops when there are more than `limit`."""

    def __init__(self, log, videos, limit=None, resumed=False):
        """limit: None is the default, one video in a hundred, and at least four. resumed: go on counting."""
        self.log, self.videos, self.known = Path(log), videos, set()
        self.limit = max(4, len(videos) // 100) if limit is None else limit
        if resumed and self.log.exists():
            self.known = {line.split("\t")[0] for line in self.log.read_text().splitlines()}
        if not resumed or len(self.known) > self.limit:  # what stopped the run before may have been mended
            self.known = set()
            self.log.unlink(missing_ok=True)

    def add(self, failures, write=True):
        """failures: [(index, reason)], from all processes; one of them writes. Raises VideoError beyond the limit."""
        for index, reason in failures:
            name = self.videos.name(index).encode(errors="backslashreplace").decode()  # any bytes can be a file's name
            if name not in self.known:
                self.known.add(name)
                if write:
                    tqdm.write(f"skipped {name}: {reason}")
                    with writing(self.log), open(self.log, "a") as log:
                        log.write(f"{name}\t{reason}\n")
        if len(self.known) > self.limit:
            raise VideoError(
                f"{len(self.known)} of {len(self.videos)} {self.videos.unit} cannot be used, more than --max_failures "
                f"{self.limit}; {self.log} names each with its reason. Repair them, or allow more"
            )


# ----------------------------------------------------------------------------------------------------------- demo

DEMO_SHAPES = ("disc", "triangle", "cross", "square", "ring", "bars", "corner", "twins")  # also the classes
DEMO_MOTIONS = ("rises", "falls", "slides", "swells", "shrinks", "turns")
DEMO_ACTIONS = dict(enumerate(DEMO_SHAPES + DEMO_MOTIONS[:4], 1))  # of the AVA part: what a thing is, and does
DEMO = dict(height=48, fps=15)
DEMO_VIDEOS = {"unlabelled": dict(train=2400, val=8), "kinetics": dict(train=200, val=400)}  # videos of each split
DEMO_AVA = dict(train=100, val=100, seconds=5, times=(902, 903))  # movies a split, and their annotated seconds from 900
DEMO_VERSION = "4"  # of what is drawn: a folder of another version is made again


def shape_distance(shape, x, y):
    """Signed distance, about, from the outline of a shape of size 1; below 0 inside."""

    def box(left, top, right, bottom):
        return np.maximum(np.maximum(left - x, x - right), np.maximum(top - y, y - bottom))

    if shape == "disc":
        return np.hypot(x, y) - 0.9
    if shape == "triangle":
        return np.maximum(0.87 * abs(x) + 0.5 * y, -y) - 0.55
    if shape == "square":
        return box(-0.8, -0.8, 0.8, 0.8)
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.7) - 0.25
    if shape == "twins":
        return np.hypot(abs(x) - 0.5, y) - 0.42
    a, b = {
        "cross": (box(-1, -0.33, 1, 0.33), box(-0.33, -1, 0.33, 1)),
        "bars": (box(-0.8, -0.95, -0.2, 0.95), box(0.2, -0.95, 0.8, 0.95)),
        "corner": (box(-0.85, -0.9, -0.25, 0.9), box(-0.85, 0.3, 0.85, 0.9)),
    }[shape]
    return np.minimum(a, b)


def draw_background(rng, color, width, seconds):
    """A colour that changes a little across the picture: (T, H, W, 3)."""
    y, x = np.mgrid[: DEMO["height"], :width][..., None].astype(np.float32)
    slope = rng.uniform(-30, 30, 2)
    picture = color + slope[0] * (x / width - 0.5) + slope[1] * (y / DEMO["height"] - 0.5)
    return np.broadcast_to(picture, (DEMO["fps"] * seconds, *picture.shape))


def draw_thing(rng, picture, shape, motion, place, radius, color):
    """Draw a thing that moves slowly; returns the picture (T, H, W, 3) and where the thing is in it.

    place: about where its centre is halfway, as shares of the frame; radius: about, in pixels.
    """
    T, H, W, _ = picture.shape
    t = np.arange(T, dtype=np.float32).reshape(-1, 1, 1) / T - 0.5
    y, x = np.mgrid[:H, :W][:, None].astype(np.float32)
    path, angle = rng.uniform(0.2, 0.3) * t, rng.uniform(-0.3, 0.3)
    center_x, center_y = (place + rng.uniform(-0.07, 0.07, 2)) * (W, H)
    if motion == "rises":
        center_y = center_y - path * H
    elif motion == "falls":
        center_y = center_y + path * H
    elif motion == "slides":
        center_x = center_x + rng.choice([-1, 1]) * path * H
    elif motion == "turns":
        angle = angle + rng.choice([-4, 4]) * path
    elif motion in ("swells", "shrinks"):
        radius = radius * (1 + {"swells": 2, "shrinks": -2}[motion] * path)
    u, v = (x - center_x) / radius, (y - center_y) / radius
    u, v = u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)
    inside = (0.5 - shape_distance(shape, u, v) * radius).clip(0, 1)[..., None]
    return picture * (1 - inside) + inside * color, np.broadcast_to(inside[..., 0] > 0.5, (T, H, W))


def demo_colors(rng, things):
    """A colour for the background and for each thing, (1 + things, 3); these stand out from the background."""
    while True:
        colors = rng.uniform(0, 255, (1 + things, 3)).astype(np.float32)
        if (abs(colors[1:] - colors[0]).sum(1) >= 200).all():
            return colors


def draw_demo_video(shape, motion, seed, width=56, seconds=3):
    """One video: a thing that moves slowly before a plain background; uint8 (T, H, W, 3)."""
    rng = np.random.RandomState(seed)
    colors = demo_colors(rng, 1)
    picture = draw_background(rng, colors[0], width, seconds)
    picture, _ = draw_thing(rng, picture, shape, motion, (0.5, 0.5), rng.uniform(14.5, 18), colors[1])
    return picture.clip(0, 255).astype(np.uint8)


def draw_demo_movie(seed, width=72):
    """One movie of the demo's AVA part: two things, most of them moving.

    Returns uint8 (T, H, W, 3) and, for each of DEMO_AVA["times"], what is there: [(box, actions), ...], the box in
    shares of the frame, the actions numbers into DEMO_ACTIONS.
    """
    rng = np.random.RandomState(seed)
    numbers = {name: number for number, name in DEMO_ACTIONS.items()}
    colors = demo_colors(rng, 2)
    picture = draw_background(rng, colors[0], width, DEMO_AVA["seconds"])
    things = [[] for _ in DEMO_AVA["times"]]
    for place, color in zip((0.28, 0.72), colors[1:]):
        shape, motion = rng.choice(DEMO_SHAPES), rng.choice(DEMO_MOTIONS)
        picture, inside = draw_thing(rng, picture, shape, motion, (place, 0.5), rng.uniform(11, 13.5), color)
        actions = [numbers[name] for name in (shape, motion) if name in numbers]
        for there, second in zip(things, DEMO_AVA["times"]):
            rows, columns = (np.flatnonzero(inside[round((second - 900) * DEMO["fps"])].any(axis)) for axis in (1, 0))
            corners = columns[0] / width, rows[0] / DEMO["height"]
            there.append(((*corners, (columns[-1] + 1) / width, (rows[-1] + 1) / DEMO["height"]), actions))
    return picture.clip(0, 255).astype(np.uint8), things


def detect_demo(rng, things):
    """What a person detector would make of a keyframe: most things, not quite in place, and some that are not there."""
    rows = []
    for box, actions in things:
        if rng.rand() < 0.95:
            x1, y1, x2, y2 = box
            shift = rng.normal(0, 0.04, 4) * (x2 - x1, y2 - y1, x2 - x1, y2 - y1)
            rows.append((np.clip(np.add(box, shift), 0, 1), actions, rng.uniform(0.85, 1)))
    if rng.rand() < 0.3:
        x, y = rng.uniform(0, 0.7, 2)
        rows.append(((x, y, x + 0.25, y + 0.3), [-1], rng.uniform(0.4, 0.95)))
    return rows


def write_demo_video(task):
    path, shape, motion, seed = task
    write_video(path, draw_demo_video(shape, motion, seed), DEMO["fps"], crf=20)


def write_demo_movie(task):
    path, seed = task
    frames, things = draw_demo_movie(seed)
    write_video(path, frames, DEMO["fps"], crf=20)
    return things


def make_demo(part, folder="data/demo"):
    """Make a part of the demo's data, once: real H.264 files, in a folder or in the layout of Kinetics or of AVA.

    unlabelled: to pre-train on. kinetics: a few labelled videos of the same kind, and more to test on. ava: movies.
    """
    folder = Path(folder) / part
    version = folder / "VERSION"
    if not version.exists() or version.read_text() != DEMO_VERSION:
        making = folder.with_name(f"{part}.making{os.getpid()}")  # two runs may make it at once: the first one's stays
        make_demo_ava(making) if part == "ava" else make_demo_videos(part, making)
        (making / "VERSION").write_text(DEMO_VERSION)
        if folder.exists() and not (version.exists() and version.read_text() == DEMO_VERSION):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            making.rename(folder)
        except OSError:
            shutil.rmtree(making)


def make_videos(write, tasks):
    """Write videos with all cores; returns what `write` does, in the order of the tasks."""
    with Pool(cores()) as pool:
        made = pool.imap(write, tasks, 8)
        return list(tqdm(made, "making the demo's videos", len(tasks), mininterval=bar_interval()))


def make_demo_videos(part, folder):
    tasks = []
    for split, count in DEMO_VIDEOS[part].items():
        (folder / split).mkdir(parents=True)
        lines = [["label", "youtube_id", "time_start", "time_end", "split"]]
        for i in range(count):
            shape, motion = DEMO_SHAPES[i % 8], DEMO_MOTIONS[i // 8 % 6]  # every shape in every motion
            name = f"{split}{i:05d}"
            lines.append([shape, name, 0, 3, split])
            path = folder / split / f"{name}_000000_000003.mp4"
            tasks.append((str(path), shape, motion, stateless_seed(i, split == "val", part == "kinetics") % 2**32))
        if part == "kinetics":
            with open(folder / f"{split}.csv", "w", newline="") as file:
                csv.writer(file).writerows(lines)
    make_videos(write_demo_video, tasks)


def make_demo_ava(folder):
    (folder / "videos").mkdir(parents=True)
    (folder / "annotations").mkdir()
    names = [f"{split}{i:04d}" for split in ("train", "val") for i in range(DEMO_AVA[split])]
    tasks = [(str(folder / "videos" / f"{name}.mp4"), stateless_seed(i, 2) % 2**32) for i, name in enumerate(names)]
    movies = dict(zip(names, make_videos(write_demo_movie, tasks)))
    for split in ("train", "val"):
        truth, detected, excluded, rng = [], [], [], np.random.RandomState(split == "val")
        for name in (name for name in names if name.startswith(split)):
            for second, things in zip(DEMO_AVA["times"], movies[name]):
                row = [name, f"{second:04d}"]
                for person, (box, actions) in enumerate(things):
                    truth += [[*row, *(f"{x:.3f}" for x in box), action, person] for action in actions]
                for box, actions, score in detect_demo(rng, things):
                    box = [f"{x:.3f}" for x in box]
                    detected += [[*row, *box, "" if act < 0 else act, f"{score:.3f}"] for act in actions]
                if rng.rand() < 0.02:
                    excluded.append(row)
        files = {
            f"ava_{split}_v2.2.csv": truth,
            f"ava_{split}_excluded_timestamps_v2.2.csv": excluded,
            f"ava_detection_{split}_boxes_and_labels.csv": detected,
        }
        for name, rows in files.items():
            with open(folder / "annotations" / name, "w", newline="") as file:
                csv.writer(file).writerows(rows)
    entries = [f'item {{\n  name: "{name}"\n  id: {i}\n}}\n' for i, name in DEMO_ACTIONS.items()]
    (folder / "annotations" / "ava_action_list_v2.2_for_activitynet_2019.pbtxt").write_text("".join(entries))


# ------------------------------------------------------------------------------------------------------- pictures


def write_video(path, frames, fps, crf=18):
    """Write frames, uint8 (T, H, W, 3), as H.264, which has no odd sizes: a last odd row or column is cut off."""
    frames = np.ascontiguousarray(np.asarray(frames)[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2])
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
