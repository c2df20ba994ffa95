"""Videos in, clips out: lists, decoding, sampling, augmentation, AVA, batches, the demo.

Read from top to bottom:

    lists      what is on disk becomes a VideoList                        (README, "Data layouts")
    decoding   from wanted times to frames, from frames to a clip of pixels                 (PyAV)
    sampling   which clips of a video, and their crop, flip, RandAugment, mask    (Tables 5 and 6)
    AVA        person boxes, and clips around annotated seconds                       (appendix A)
    batches    which videos make a step, on which process; loading them
    demo       small H.264 videos, made here, in the layouts of the real data sets

A sample depends on (seed, epoch, index, repeat) alone: workers and processes change nothing, and a
resumed run needs no generator states. Here, an epoch is a pass over the list; in arguments and
tables it is an effective one: a pass counts as --repeat_aug of them.
"""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import itertools
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

import av
import av.filter
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as TF

from model import RANK, WORLD, InputError, cores, gather, on_rank0, progress

FPS = 30  # --sampling_rate counts in frames of this rate: 16 frames, every 4th, span 64 / 30 s
SPLITS = {"train": ["train"], "val": ["val", "validate", "validation"]}  # their names on disk
is_video = re.compile(r"(?i)\.(mp4|mkv|webm|avi|mov|m4v|mpg|mpeg|flv|wmv|3gp|ts)$").search
is_archive = re.compile(r"(?i)\.(zip|tar|gz)$").search

LAYOUTS = """\
  DATA/train.csv                'path label' lines (space or comma), paths relative to DATA; or the
                                official csv (label,youtube_id,time_start,time_end,split), its
                                videos named ID_000001_000011.mp4 anywhere below DATA
  DATA/train/CLASS/any.mp4      a folder for each class
  DATA/labels/train.json        Something-Something v2 as it is distributed, labels.json beside it,
                                its videos ID.webm anywhere below DATA
  DATA/any.mp4                  any folder of videos (no labels: for pre-training)
Likewise val.csv, val/, validation.json. --data also takes a list itself. No data at hand? Use
--dataset demo."""


def stateless_seed(*numbers):
    """A seed derived from integers >= 0 alone, such as (seed, epoch, index, repeat)."""
    # Their count comes first, or (seed, epoch) would equal (seed, epoch, 0, 0).
    state = np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def short_hash(*arrays):
    """A hash of a list, to notice when it changes."""
    content = b"".join(np.asarray(array).tobytes() for array in arrays)
    return hashlib.blake2b(content, digest_size=8).hexdigest()


# ----------------------------------------------------------------------------------------- lists


class VideoList:
    """The videos of a data set: paths, and labels or None."""

    unit = "videos"

    def __init__(self, source, root, paths, labels=None, class_names=None, num_classes=None):
        """source: the file or folder the list was made from. paths: absolute, or below root."""
        self.source = str(source)
        self.root = root
        self.class_names = class_names
        self.num_classes = num_classes
        # Arrays: 240,000 Python strings would be copied into every worker.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = None if labels is None else np.array(labels)

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    name = path  # what messages call it

    def clips(self, index, times_of):
        """Clips of a video, lists of av.VideoFrame; times_of(duration) gives the times of each."""
        with Video(self.path(index)) as video:
            times = times_of(video.duration)
            frames = iter(video.frames(np.concatenate(times)))
        return [[next(frames) for _ in clip] for clip in times]

    @property
    def digest(self):
        return short_hash(self.paths, [] if self.labels is None else self.labels)


def locate_data(args, part):
    """Fill in --data, making the demo's `part` if needed; SSv2 needs --dataset ssv2."""
    if args.data is None and args.dataset == "demo":
        on_rank0(make_demo, part)
        args.data = f"data/demo/{part}"
    args.data = args.data or f"data/{args.dataset}"
    lists = [Path(args.data), *lists_in(Path(args.data), "train")]
    ssv2 = any(file.suffix == ".json" and [*file.parent.glob("*labels.json")] for file in lists)
    if args.dataset != "ssv2" and ssv2:
        raise InputError(f"{args.data}: this is Something-Something v2; add --dataset ssv2")


def find_videos(data, split="train", videos=None, classes=0):
    """Find the videos of a split in any of LAYOUTS; returns a VideoList.

    data: a list or folder. videos: the folder that a list's videos are in. classes: names or number
    of the classes that labels must fit; None: any; 0: labels are optional. Raises InputError if
    nothing fits.
    """
    data = Path(data)
    found = None
    if not data.exists() or is_video(data.name):
        raise InputError(f"{data}: no folder or list of videos; expected one of\n{LAYOUTS}")
    if lists := [data] if data.is_file() else lists_in(data, split):
        source = lists[0]
        root = source.parent.parent if source.parent.name in LIST_FOLDERS else source.parent
        root = Path(videos or root)
        found = next(filter(None, (read(source, root, split) for read in LIST_READERS)), None)
    else:
        folders = [data / name for name in SPLITS[split] if (data / name).is_dir()]
        source = root = folders[0] if folders else data
        if folders or split == "train":
            found = read_folders(source)
    if not found or not found[0]:
        raise InputError(f"{data}: no {split} videos; expected one of\n{LAYOUTS}")
    paths, labels, names = found
    if not labels or None in labels:
        if classes != 0:
            raise InputError(f"{source}: videos without labels; expected one of\n{LAYOUTS}")
        return VideoList(source, root, paths)
    names = classes if isinstance(classes, list) else names
    if isinstance(labels[0], str):
        names = names or sorted(set(labels))
        if unknown := set(labels) - set(names):
            text = f"{source}: class {min(unknown)!r} is not among the {len(names)} classes"
            raise InputError(text)
        numbers = {name: i for i, name in enumerate(names)}
        labels = [numbers[name] for name in labels]
    count = len(names) if names else classes or max(labels) + 1
    if isinstance(classes, int) and classes not in (0, count):
        raise InputError(
            f"{source}: {count} classes, not {classes}; if intended, use --num_classes {count}"
        )
    if max(labels) >= count:
        path = paths[labels.index(max(labels))]
        raise InputError(f"{source}: label {max(labels)} of {path} is outside 0..{count - 1}")
    return VideoList(source, root, paths, labels, names, count)


LIST_FOLDERS = "annotations", "labels"  # subfolders in which lists may be


def lists_in(folder, split):
    """The files in a data set's folder whose names say they list the split."""
    found = []
    for name in ("", *LIST_FOLDERS):
        for file in sorted((folder / name).glob("*.*")):
            named = re.split("[-_]", file.stem)[-1] in SPLITS[split]
            if named and file.is_file() and not is_video(file.name) and not is_archive(file.name):
                found.append(file)
    return found


# A list reader takes (file, folder of the videos, split). It returns None for a format it does not
# know, else (paths, labels, class names). Labels are names or numbers; both may be None.


def read_kinetics(file, root, split):
    """The official csv: rows of label,youtube_id,time_start,time_end,split, in any order."""
    with open(file, encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text)
        stems = []
        labels = []
        if "youtube_id" not in (rows.fieldnames or ()):
            return None
        for row in rows:
            if (row.get("split") or split) not in SPLITS[split]:
                continue
            try:
                start = int(float(row["time_start"]))
                end = int(float(row["time_end"]))
            except (TypeError, KeyError, ValueError):
                line = f"{file}, line {rows.line_num}"
                raise InputError(f"{line}: no time_start and time_end in seconds") from None
            stems.append(f"{row['youtube_id']}_{start:06d}_{end:06d}")
            labels.append(row.get("label") or None)
    return *match_files(file, root, stems, labels), None


def read_ssv2(file, root, split):
    """Something-Something v2 as it is distributed: labels.json, train.json, a folder of ID.webm."""
    if file.suffix != ".json":
        return None
    names = next(file.parent.glob("*labels.json"), None)
    if not names:
        raise InputError(f"{file}: no labels.json beside it, as Something-Something v2 has")
    numbers = json.loads(names.read_text(encoding="utf-8"))
    items = json.loads(file.read_text(encoding="utf-8"))
    labels = [
        re.sub(r"[\[\]]", "", item["template"]) if "template" in item else None for item in items
    ]
    found = match_files(file, root, [str(item["id"]) for item in items], labels)
    return *found, sorted(numbers, key=lambda name: int(numbers[name]))


def read_list(file, root, split):
    """A plain list: lines of 'path label' or 'path,label'."""
    paths = []
    labels = []
    for i, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        match = re.fullmatch(r"\s*(\S.*?)(\s*,\s*|\s+)(\d+)\s*", line)
        if line.strip() and (not match or re.search(r"[\s,]\d+$", match[1])):
            raise InputError(
                f"{file}, line {i}: {line.strip()!r}; expected 'path label' or 'path,label'"
            )
        if match:
            paths.append(match[1])
            labels.append(int(match[3]))
    return paths, labels, None


LIST_READERS = [read_ssv2, read_kinetics, read_list]


def read_folders(folder):
    """One folder per class; or any folder of videos, without labels."""
    paths = [path for path in files_below(folder) if path.split(os.sep)[0] not in SPLITS["val"]]
    classes = [path.split(os.sep)[0] for path in paths if os.sep in path]
    return paths, classes if len(classes) == len(paths) else None, None


def files_below(folder):
    """The video files anywhere below a folder, sorted, relative to it."""
    found = []
    for top, _, names in os.walk(folder, followlinks=True):
        found += [os.path.join(top, name) for name in filter(is_video, names)]
    return sorted(os.path.relpath(path, folder) for path in found)


def match_files(file, root, stems, labels):
    """Find videos below root by file stem, with their labels; prints how many are missing."""
    there = {Path(path).stem: path for path in files_below(root)}
    kept = [i for i, stem in enumerate(stems) if stem in there]
    if len(kept) < len(stems):
        print(f"{file}: {len(stems) - len(kept)} of {len(stems)} videos are not below {root}")
    if not kept:
        raise InputError(
            f"{file}: none of its videos, such as {stems[:1]}, is below {root}; see --videos"
        )
    return [there[stems[i]] for i in kept], [labels[i] for i in kept]


# -------------------------------------------------------------------------------------- decoding


DECODE_LIMIT = 60.0  # seconds that decoding one video may take
LARGEST = 2**26  # pixels of a frame: a damaged header may claim any number
READ_THROUGH = 10.0  # seconds between wanted frames above which a seek is cheaper than reading on
REORDER = 16  # frames a decoder may hold back for reordering; H.264 allows no more
UNSHOWN = 2  # packets in a row that may show nothing: VP8 and VP9 have one at a time


class VideoError(InputError):
    """A video that cannot be used, with the reason."""


class Video:
    """An open video file; use it in a with statement. Raises VideoError if it cannot be opened.

    duration: seconds. Times count from the first frame, whatever time stamp the file gives it.
    second: time stamps (packet.pts, frame.pts) per second, 1 / time_base.
    """

    def __init__(self, path):
        self.path = path
        self.deadline = time.monotonic() + DECODE_LIMIT
        self.open()
        self.second = float(1 / self.stream.time_base)
        head = self.read(self.stream.start_time or 0)
        # Not the header's start: it may be wrong about the first frame.
        self.start = min((p.pts for p in head if not p.is_discard), default=0)
        if self.stream.duration:
            self.duration = self.stream.duration / self.second
        elif self.container.duration:  # unlike the stream's, this one counts from time stamp 0
            self.duration = self.container.duration / av.time_base - self.start / self.second
        else:  # the header does not say: read to the end
            ends = [p.pts + (p.duration or 0) for p in head + self.read(math.inf)]
            self.duration = (max(ends, default=self.start) - self.start) / self.second

        # Packets are chosen by their time stamps, before they are decoded. To be on the safe side,
        # decode from `lead` (in their unit) before a chosen packet to `tail` packets after it.
        rising = head == sorted(head, key=lambda packet: packet.pts)
        early = all(p.dts is not None and p.dts < p.pts for p in head[:1])
        distrusted = rising and (self.container.format.name == "avi" or not early)
        can_skip = self.codec.name in ("h264", "hevc")
        if self.codec.has_b_frames and (distrusted or not can_skip):
            # With reordering, the first packet is decoded before it is shown: dts < pts. If stamps
            # rise from packet to packet instead, they are decoding times: AVI has no others, and
            # some tools copy them. With MPEG-2 and MPEG-4, one never knows.
            self.lead = self.second
            self.tail = REORDER
        else:
            self.lead = 0
            self.tail = 0 if can_skip else UNSHOWN  # H.264 and HEVC; VP8, VP9 and the like

    def open(self):
        try:
            self.container = av.open(str(self.path), metadata_errors="ignore", timeout=DECODE_LIMIT)
        except (av.error.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise VideoError(f"cannot be opened: {reason}") from None
        if not self.container.streams.video:
            raise VideoError("has no video stream")
        self.stream = self.container.streams.video[0]
        self.codec = self.stream.codec_context
        if self.codec is None:
            raise VideoError("is in a format that cannot be decoded")
        if self.codec.width * self.codec.height > LARGEST:
            raise VideoError(f"has frames of {self.codec.width} x {self.codec.height} pixels")
        self.codec.thread_count = 1  # the workers are the threads

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()

    def check_time(self):
        if time.monotonic() > self.deadline:
            raise VideoError(f"takes more than {DECODE_LIMIT:g} s to decode")

    def packets(self, first, last):
        """The packets needed for frames at time stamps first to last, in decoding order."""
        for margin in (0, 2, 10):  # seconds: in some files a seek lands too late
            try:
                self.container.seek(int(first - margin * self.second), stream=self.stream)
            except av.error.FFmpegError:
                break
            found = self.read(last)
            if found and found[0].is_keyframe and found[0].pts <= first:
                return found
        self.container.close()
        self.open()
        return self.read(last)

    def read(self, last):
        """Read on to time stamp `last`, and beyond as far as frames can be out of order."""
        found = []
        later = 0
        with contextlib.suppress(av.error.FFmpegError):  # damaged from here on: use what was read
            for packet in self.container.demux(self.stream):
                self.check_time()
                if packet.pts is None or not packet.size:
                    continue
                found.append(packet)
                later += packet.pts > last
                if later > REORDER:
                    break
        return found

    def frames(self, times):
        """The frames nearest to the given times: seconds (any order, repeats allowed) -> list of
        as many av.VideoFrame.

        Beyond the last frame, the last frame. No frame is decoded twice, and groups of pictures
        without a wanted frame are not decoded. If up to half of the wanted frames are damaged, the
        nearest intact ones stand in; raises VideoError if more are.
        """
        times = self.start + np.asarray(times, float) * self.second
        ordered = np.sort(times)
        far = np.flatnonzero(np.diff(ordered) > READ_THROUGH * self.second) + 1
        found = {}
        for group in np.split(ordered, far):
            packets = self.packets(max(group[0] - self.lead, self.start), group[-1])
            found |= self.decode(packets, group)
        if not found:
            raise VideoError("no frame can be read")
        stamps = sorted(found)
        wanted = {stamps[i] for i in nearest(stamps, times)}
        damaged = sum(found[stamp] is None for stamp in wanted)
        if damaged > len(wanted) / 2:
            raise VideoError(f"{damaged} of {len(wanted)} wanted frames cannot be decoded")
        stamps = [stamp for stamp in stamps if found[stamp] is not None]
        return [found[stamps[i]] for i in nearest(stamps, times)]

    def choose(self, packets, times):
        """What to decode for the frames nearest to the times (in time stamps).

        Returns the packets, with None in place of those to skip, and the time stamps of the
        packets nearest to the times.
        """
        shown = np.unique([p.pts for p in packets if not p.is_discard])
        wanted = set(shown[nearest(shown, times)].tolist()) if len(shown) else set()
        needed = np.zeros(len(packets), dtype=bool)
        keys = []
        for i, packet in enumerate(packets):
            if packet.is_keyframe:
                keys.append(i)
            if packet.pts in wanted:
                # Frames shown before a key frame may need those before it: start at an earlier one.
                latest = packet.pts - self.lead
                start = max((k for k in keys if packets[k].pts <= latest), default=0)
                needed[start : i + 1 + self.tail] = True
        return [p if need else None for p, need in zip(packets, needed)] + [None], wanted

    def decode(self, packets, times):
        """Decode what the frames nearest to the times (in time stamps) need, each packet once.

        Returns {time stamp: frame} with these frames, and None for those that are damaged.
        """
        chosen, wanted = self.choose(packets, times)
        found = dict.fromkeys(wanted)
        frames, stamps = [], []  # decoded, but not yet matched to each other
        last = {}  # the last frame shown
        unshown = False  # whether a packet after it showed none
        for packet, _ in itertools.groupby(chosen):  # several None in a row become one
            self.check_time()
            if packet and not self.tail:  # skip what is neither wanted nor a reference
                self.codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            try:
                out = self.codec.decode(packet)  # None: drain the decoder
                out = [frame for frame in out if frame.pts is not None]
            except av.error.FFmpegError:
                out = []
            else:
                if packet and not out and self.tail == UNSHOWN:
                    # VP8 and VP9 have packets that show nothing: take the frames on both sides.
                    found.pop(packet.pts, None)
                    found |= last
                    unshown = True
            frames += out
            stamps = sorted(stamps + [frame.pts for frame in out])
            # Frames come out in the order in which they are shown: the first has the lowest stamp.
            # Where stamps are not to be trusted, wait until no lower one can follow.
            while frames and (packet is None or not self.lead or len(frames) > REORDER):
                frame = frames.pop(0)
                frame.pts = stamps.pop(0)
                if not frame.is_corrupt:
                    last = {frame.pts: frame}
                    if unshown or frame.pts in wanted:
                        found |= last
                    unshown = False
            if packet is None:
                self.codec.flush_buffers()
        return found


def nearest(sorted_values, targets):
    """For each target the index of the nearest value; the earlier one in a tie."""
    return abs(np.subtract.outer(targets, sorted_values)).argmin(-1)


def upright_size(frame):
    """Height and width of a frame as displayed."""
    size = frame.height, frame.width
    return size[::-1] if frame.rotation % 180 == 90 else size


def to_clip(frames, size, box=None, flip=False):
    """Crop, scale, flip and convert frames: T av.VideoFrame -> uint8 RGB (T, height, width, 3).

    size: (height, width) to scale to. box: (top, left, height, width) in pixels of the upright
    frame, all of it by default; rounded to what the pixel format allows. Raises VideoError
    if FFmpeg cannot do this.
    """
    first = frames[0]
    top, left, height, width = box or (0, 0, *upright_size(first))
    turns = {90: ["transpose=cclock"], 180: ["hflip", "vflip"], 270: ["transpose=clock"]}
    steps = [
        f"buffer=width={first.width}:height={first.height}:pix_fmt={first.format.name}"
        f":colorspace={first.colorspace}:range={first.color_range}:time_base=1/{FPS}",
        *turns.get(first.rotation % 360, []),
        f"crop={width}:{height}:{left}:{top}",
        f"scale={size[1]}:{size[0]}:flags=bilinear",
        f"format={first.format.name}",  # RGB comes next: together, they take twice as long
        "format=rgb24",
        *["hflip"] * flip,
        "buffersink",
    ]
    pictures = {}
    graph = av.filter.Graph()
    with contextlib.suppress(AttributeError):  # PyAV before 17 cannot set it
        graph.threads = 1  # the workers are the threads
    try:
        graph.link_nodes(*(graph.add(*step.split("=", 1)) for step in steps)).configure()
        for frame in frames:
            if frame not in pictures:
                # The size may change within a file.
                graph.push(frame.reformat(first.width, first.height, first.format))
                pictures[frame] = torch.from_numpy(graph.pull().to_ndarray())
    except av.error.FFmpegError as error:
        raise VideoError(f"cannot be cut to {height} x {width}: {error.strerror}") from None
    return torch.stack([pictures[frame] for frame in frames])


# -------------------------------------------------------------------------------------- sampling


def clip_times(duration, num_frames, sampling_rate, place):
    """Times of a clip's frames in seconds; place in 0..1: from start to end of the video."""
    span = num_frames * sampling_rate / FPS
    return max(0.0, duration - span) * place + np.arange(num_frames) * sampling_rate / FPS


def sample_times(duration, args, place):
    """Times of a clip; with --segments, one from each of equal parts, at `place` in them."""
    if args.segments:
        return (np.arange(args.num_frames) + place) * duration / args.num_frames
    return clip_times(duration, args.num_frames, args.sampling_rate, place)


def warp(clip, degrees=0.0, shear=(0, 0), shift=(0, 0)):
    """Rotate about the middle, shear about the top left corner, shift by shares of the size."""
    T, C, H, W = clip.shape
    center = [0, 0] if any(shear) else None
    shear = np.degrees(np.arctan(shear)).tolist()
    shift = [shift[0] * W, shift[1] * H]
    flat = clip.reshape(T * C, H, W)  # as channels of one picture: one sampling grid for all
    bilinear = v2.InterpolationMode.BILINEAR
    return TF.affine(flat, degrees, shift, 1.0, shear, bilinear, 128, center).view(T, C, H, W)


RAND_AUGMENT = {  # operations; m, a tenth of the magnitude, is in 0..1, and s is m or -m
    "AutoContrast": lambda clip, m, s: TF.autocontrast(clip.contiguous()),  # strided: 3 x slower
    "Equalize": lambda clip, m, s: TF.equalize(clip),
    "Invert": lambda clip, m, s: TF.invert(clip),
    "Rotate": lambda clip, m, s: warp(clip, degrees=30 * s),
    "Posterize": lambda clip, m, s: TF.posterize(clip, 4 - int(4 * m)),  # bits to keep
    # 256.0, not 256, which would wrap around to 0 as uint8
    "Solarize": lambda clip, m, s: torch.where(clip >= 256.0 - int(256 * m), ~clip, clip),
    "SolarizeAdd": lambda clip, m, s: clip + int(110 * m) * (clip < 128).byte(),
    "Color": lambda clip, m, s: TF.adjust_saturation(clip, 1 + 0.9 * s),
    "Contrast": lambda clip, m, s: TF.adjust_contrast(clip, 1 + 0.9 * s),
    "Brightness": lambda clip, m, s: TF.adjust_brightness(clip, 1 + 0.9 * s),
    "Sharpness": lambda clip, m, s: TF.adjust_sharpness(clip, 1 + 0.9 * s),
    "ShearX": lambda clip, m, s: warp(clip, shear=(0.3 * s, 0)),
    "ShearY": lambda clip, m, s: warp(clip, shear=(0, 0.3 * s)),
    "TranslateX": lambda clip, m, s: warp(clip, shift=(0.45 * s, 0)),
    "TranslateY": lambda clip, m, s: warp(clip, shift=(0, 0.45 * s)),
}


@dataclasses.dataclass
class RandAugment:
    """RandAugment as timm has it (rand-m9-mstd0.5-inc1), for clips: uint8 (T, 3, H, W) -> the same.

    Two operations, drawn with replacement, are each applied with probability 0.5, to all frames
    alike. Each has a magnitude of its own from normal(magnitude, deviation), clipped to 0..10.
    Draws come from torch's global generator.
    """

    magnitude: float
    deviation: float

    def __call__(self, clip):
        operations = list(RAND_AUGMENT.values())
        for index in torch.randint(len(operations), (2,)):
            apply, sign = torch.rand(2) < 0.5
            m = self.magnitude + self.deviation * torch.randn(()).item()
            m = min(max(m, 0), 10) / 10
            if apply:
                clip = operations[index](clip, m, m if sign else -m)
        return clip


class TrainDataset(Dataset):
    """Samples to train on, indexed by (epoch, index): the dicts that load(index, epoch) returns.

    An unreadable video is replaced by another, also drawn from (epoch, index); "failures" lists
    them: [(index, reason)].
    """

    def __init__(self, videos, args):
        self.videos, self.args = videos, args  # the stage's arguments

    def __getitem__(self, key, attempts=20):
        epoch, index = key
        failures = []
        candidate = index
        for attempt in range(1, attempts + 1):
            try:
                return self.load(candidate, epoch) | {"failures": failures}
            except VideoError as error:
                failures.append((candidate, str(error)))
            candidate = stateless_seed(self.args.seed, epoch, index, attempt) % len(self.videos)
        reasons = [f"  {self.videos.name(i)}: {reason}" for i, reason in dict(failures).items()]
        raise VideoError("\n".join([f"{attempts} videos in a row cannot be read:", *reasons]))


class TestDataset(Dataset):
    """Samples to test on: dicts of "index" and what load(index) returns, or "failure": a reason."""

    def __init__(self, videos, args):
        self.videos = videos
        self.args = args

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        try:
            return {"index": index} | self.load(index)
        except VideoError as error:
            return {"index": index, "failure": str(error)}


class ClipDataset(TrainDataset):
    """Clips to train on: repeated sampling, random resized crop, flip, RandAugment, random erasing.

    A sample has: video uint8 (R, T, H, W, 3) of R clips; label (R,) if the list has labels; noise
    (R, N) if clips are masked.
    """

    def __init__(self, videos, args, draw_noise=None, augment=None):
        """draw_noise() returns noise (N,) to mask a clip; augment takes clips (T, 3, H, W)."""
        super().__init__(videos, args)
        self.draw_noise = draw_noise
        self.augment = augment
        low, high = args.crop_scale
        if low > high:
            raise InputError(f"--crop_scale {low:g} {high:g}: the smaller number comes first")

    def load(self, index, epoch):
        repeats = range(self.args.repeat_aug)
        sample = {"video": [], "noise": []}
        seeds = [stateless_seed(self.args.seed, epoch, index, repeat) for repeat in repeats]
        clips = self.videos.clips(index, lambda length: [self.times(length, s) for s in seeds])
        for seed, clip in zip(seeds, clips):
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                # Not torch.manual_seed, which is slow: it seeds all devices.
                torch.default_generator.manual_seed(seed)
                sample["video"].append(self.crop(clip))
                if self.draw_noise:
                    sample["noise"].append(self.draw_noise())
        sample = {name: torch.stack(parts) for name, parts in sample.items() if parts}
        if self.videos.labels is not None:
            sample["label"] = torch.full((len(seeds),), int(self.videos.labels[index]))
        return sample

    def times(self, duration, seed):
        """The times of a random clip of a video."""
        # Not torch's generator: with the same seed it draws the crop; the two would correlate.
        places = np.random.default_rng(seed).random(self.args.num_frames)
        return sample_times(duration, self.args, places if self.args.segments else places[0])

    def crop(self, frames):
        """T av.VideoFrame -> uint8 (T, H, W, 3); draws are the same for all frames of the clip."""
        whole = torch.empty(3, *upright_size(frames[0]), device="meta")
        ratio = (3 / 4, 4 / 3)
        box = RandomResizedCrop.get_params(whole, self.args.crop_scale, ratio)
        flip = self.args.hflip and torch.rand(()).item() < 0.5
        clip = to_clip(frames, (self.args.img_size,) * 2, box, flip)
        if self.augment:
            clip = self.augment(clip.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return clip


class MultiViewDataset(TestDataset):
    """Clips to test on: K clips evenly over a video x S crops along its longer side (Tables 7, 9).

    A sample has: video uint8 (K * S, T, H, W, 3).
    """

    def __init__(self, videos, args, views):
        """views: (K, S)."""
        super().__init__(videos, args)
        self.views = views

    def load(self, index):
        size = (self.args.img_size,) * 2
        views = []
        for clip in self.videos.clips(index, self.times):
            views += [to_clip(clip, size, box) for box in self.boxes(*upright_size(clip[0]))]
        return {"video": torch.stack(views)}

    def times(self, duration):
        """The times of the K clips: from start to end of the video, or its middle if K is 1."""
        K = self.views[0]
        middles = (np.arange(K) + 0.5) / K  # of segments: one clip takes their middle
        places = middles if self.args.segments else evenly(K)
        return [sample_times(duration, self.args, place) for place in places]

    def boxes(self, height, width):
        """S squares of the shorter side along the longer one, touching both its ends."""
        short = min(height, width)
        shifts = [round(abs(height - width) * place) for place in evenly(self.views[1])]
        return [(s, 0, short, short) if height > width else (0, s, short, short) for s in shifts]


def evenly(n):
    """n numbers from 0 to 1, both included; the middle if n is 1."""
    return np.linspace(0, 1, n) if n > 1 else [0.5]


# ------------------------------------------------------------------------------------------- AVA

AVA_TIMES = 902, 1798  # the seconds of each movie that are annotated
AVA_CLASSES = 80  # actions, numbered from 1; 60 of them are evaluated
AVA_FILES = {  # by their distributed names; of several, the last by name
    "ground_truth": "ava_{split}_v2.?.csv",
    "excluded": "ava_{split}_excluded_timestamps_v2.?.csv",
    "boxes": "ava_detection_{split}_boxes*.csv",
    "action_list": "ava_action_list_v2.?_for_activitynet_*.pbtxt",
}
AVA_LAYOUT = """\
  DATA/annotations/         with everything below at any depth:
    ava_train_v2.2.csv      rows of video,second,x1,y1,x2,y2,action,person; ava_val_v2.2.csv
    ava_train_excluded_timestamps_v2.2.csv                      rows of video,second; and of val
    ava_action_list_v2.2_for_activitynet_2019.pbtxt             the 60 actions that are evaluated
    ava_detection_val_boxes_and_labels.csv     a detector's boxes: video,second,x1,y1,x2,y2,action,
                            score; the action may be empty or -1. Of train: to train on, as well
  DATA/videos/VIDEO.mkv     movies, or cuts of 15 minutes (--video_start 900); or
  DATA/frames/VIDEO/VIDEO_000001.jpg    their frames, 30 a second, from second 900 on
--videos FOLDER if these are elsewhere. No data at hand? Use --dataset demo."""


def find_ava(args, split):
    """The annotation files of a split: {what: path or None}; flags replace those of the test."""
    files = {}
    for what, pattern in AVA_FILES.items():
        found = Path(args.data, "annotations").rglob(pattern.format(split=split))
        found = sorted(found, key=lambda path: path.name)
        given = vars(args)[what] if split == "val" else None
        files[what] = given or (found[-1] if found else None)
        if not files[what] and what != "excluded" and (what, split) != ("boxes", "train"):
            raise InputError(f"{args.data}: no {what} of {split} in it; expected\n{AVA_LAYOUT}")
    return files


def read_rows(file, form):
    """The rows of a csv file, each converted by form(row).

    Raises InputError with file and line if that raises ValueError.
    """
    with open(file, encoding="utf-8-sig", newline="") as text:
        for line, row in enumerate(csv.reader(text), 1):
            try:
                if row:
                    yield form(row)
            except (ValueError, IndexError) as error:
                raise InputError(f"{file}, line {line}: {','.join(row)!r}: {error}") from None


def read_boxes(file, scored=True, threshold=-math.inf):
    """Read boxes: {(video, second): array (R, 6) of x1, y1, x2, y2, action, score}, as in the file.

    Rows are video,second,x1,y1,x2,y2,action,score, boxes as shares of the frame; the action may be
    missing (0), or the score (1). Not scored: the last column is a person, and actions are needed.
    threshold: drop lower scores. Raises InputError with file and line.
    """

    def form(row):
        x1, y1, x2, y2 = (float(number) for number in row[2:6])
        action = int(row[6]) if len(row) > 6 and row[6] not in ("", "-1") else 0
        score = float(row[7]) if scored and len(row) > 7 else 1.0
        if not (-1 < x1 < x2 < 2 and -1 < y1 < y2 < 2):
            raise ValueError("not a box; expected x1 < x2 and y1 < y2, as shares of the frame")
        if not (0 if scored else 1) <= action <= AVA_CLASSES:
            raise ValueError(f"action {action} is outside 1..{AVA_CLASSES}")
        return (row[0], float(row[1])), (x1, y1, x2, y2, action, score)

    boxes = {}
    for key, values in read_rows(file, form):
        if values[5] >= threshold:
            boxes.setdefault(key, []).append(values)
    return {key: np.array(rows) for key, rows in boxes.items()}


def read_excluded(file):
    """Read the seconds that are not evaluated: a set of (video, second)."""
    return set(read_rows(file, lambda row: (row[0], float(row[1])))) if file else set()


def read_action_list(file):
    """Read a list of actions in either form it is distributed in: {number: name}."""
    text = Path(file).read_text(encoding="utf-8")
    entries = re.findall(r'(?:item|label)\s*\{\s*name:\s*"(.*?)"\s*(?:label_)?id:\s*(\d+)', text)
    if not entries:
        raise InputError(
            f'{file}: no action list; expected entries like item {{ name: "walk" id: 14 }}'
        )
    return {int(number): name for name, number in entries}


def find_movies(args, names):
    """The movies with these names: {video: path of its file, or of the folder with its frames}.

    Raises InputError if one is missing, unless --allow_missing: then it is reported and left out.
    """
    folders = [Path(args.data, name) for name in ("videos", "frames")]
    folder = Path(args.videos or next((path for path in folders if path.is_dir()), args.data))
    there = {Path(path).stem: folder / path for path in files_below(folder)}
    there |= {path.name: path for path in folder.glob("*") if path.is_dir()}
    if missing := sorted(names - there.keys()):
        first = ", ".join(missing[:5])
        text = f"{len(missing)} of {len(names)} movies are not below {folder}: {first}"
        if not args.allow_missing:
            raise InputError(
                f"{text}; --videos FOLDER says where they are, --allow_missing skips them"
            )
        print(text)
    return {name: str(there[name]) for name in names & there.keys()}


def read_keyframes(args, split):
    """The Keyframes of a split: true and detected boxes to train on, detected ones to test on.

    Those that are excluded, of missing movies or outside AVA_TIMES are left out and counted.
    """
    files = find_ava(args, split)
    boxes = {}
    source = files["boxes"] or files["ground_truth"]
    if files["boxes"]:
        boxes = read_boxes(files["boxes"], threshold=args.detection_threshold)
        if not boxes:
            raise InputError(f"{source}: no box reaches --detection_threshold")
    if split == "train":
        if boxes and not any(rows[:, 4].any() for rows in boxes.values()):
            raise InputError(f"{source}: boxes without actions cannot be trained on")
        for key, rows in read_boxes(files["ground_truth"], scored=False).items():
            boxes[key] = np.concatenate([rows, boxes.get(key, rows[:0])])
    movies = find_movies(args, {video for video, _ in boxes})
    kept, (first, last) = {}, AVA_TIMES
    for key in sorted(boxes.keys() - read_excluded(files["excluded"])):
        if key[0] in movies and first <= key[1] <= last:
            kept[key] = boxes[key]
    if out := len(boxes) - len(kept):
        print(f"{source}: {out} keyframes are excluded, of missing movies or not in {AVA_TIMES}")
    if not kept:
        raise InputError(f"{source}: no keyframe is left to use")
    return Keyframes(str(source), kept, movies, args.video_start)


class Keyframes:
    """Annotated seconds of movies, with their person boxes: what AVA trains and tests on."""

    unit = "keyframes"

    def __init__(self, source, boxes, movies, video_start=None):
        """boxes: as from read_boxes. movies: {video: path}. video_start: the second that files
        begin with; None: 0, or 900 for a folder of frames.
        """
        self.source = source
        self.movies = movies
        self.video_start = video_start
        self.keys, self.rows = list(boxes), list(boxes.values())  # (video, second), (R, 6)

    def __len__(self):
        return len(self.keys)

    def name(self, index):
        video, second = self.keys[index]
        return f"{self.movies[video]}, second {second:g}"

    @property
    def digest(self):
        return short_hash(self.keys, *self.rows)

    def boxes(self, index):
        """A keyframe's boxes (K, 4), shares of the frame, and their actions (K, 80), booleans."""
        boxes, box = np.unique(self.rows[index][:, :4], axis=0, return_inverse=True)
        actions = np.zeros((len(boxes), 1 + AVA_CLASSES), dtype=bool)
        actions[box.reshape(-1), self.rows[index][:, 4].astype(int)] = True
        return boxes, actions[:, 1:]

    def frames(self, index, num_frames, sampling_rate):
        """A clip with the keyframe at num_frames // 2; beyond the movie's ends, its end frames."""
        video, second = self.keys[index]
        folder = os.path.isdir(self.movies[video])
        start = 900 * folder if self.video_start is None else self.video_start
        with (FrameFolder if folder else Video)(self.movies[video]) as movie:
            if not 0 <= second - start <= movie.duration:
                raise VideoError(
                    f"has no second {second:g}: it holds {start:g} to {start + movie.duration:g}; "
                    "--video_start says at which second files begin: 900 for cuts of 15 minutes"
                )
            offsets = (np.arange(num_frames) - num_frames // 2) * sampling_rate / FPS
            return movie.frames(second - start + offsets)


class FrameFolder:
    """A video as a folder of frames, from ID/ID_000001.jpg, 30 a second; used like a Video."""

    def __init__(self, path):
        self.path = Path(path)
        self.count = sum(name.endswith(".jpg") for name in os.listdir(path))
        self.duration = self.count / FPS

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def frames(self, times):
        """The frames nearest to the given times in seconds, as Video.frames gives them."""
        numbers = 1 + np.rint(np.asarray(times) * FPS).astype(int).clip(0, self.count - 1)
        decoded = {}
        for number in set(numbers):
            file = self.path / f"{self.path.name}_{number:06d}.jpg"
            try:
                with av.open(str(file)) as container:
                    decoded[number] = next(container.decode(video=0))
            except (av.error.FFmpegError, StopIteration, OSError) as error:
                raise VideoError(f"{file.name} cannot be read: {error}") from None
        return [decoded[number] for number in numbers]


def cut_clip(frames, boxes, crop, size, flip=False):
    """A clip, as from to_clip, and boxes moved to match: (T, h, w, 3), (K, 4) in pixels of it.

    boxes (K, 4): shares of the frame; those returned are clipped to the crop. crop: (top, left,
    height, width) in the frame; size: (height, width) of the clip.
    """
    (H, W), (top, left, height, width) = upright_size(frames[0]), crop
    x = (boxes[:, 0::2] * W - left) * size[1] / width  # (K, 2)
    y = (boxes[:, 1::2] * H - top) * size[0] / height
    x = size[1] - x[:, ::-1] if flip else x
    boxes = np.stack([x, y], 2).reshape(-1, 4).clip(0, [size[1], size[0]] * 2)
    return to_clip(frames, size, crop, flip), torch.from_numpy(boxes).float()


def even(x):
    """The largest even number up to x: most videos store color at half the resolution."""
    return 2 * int(x / 2)


class KeyframeDataset(TrainDataset):
    """Clips around keyframes to train on: short side 256 to 320, random crop of 224, flip.

    A sample has: video uint8 (1, T, H, W, 3), boxes (K, 4) in its pixels, actions (K, 80). K counts
    the boxes left in the crop; it may be 0.
    """

    def load(self, index, epoch):
        args = self.args
        frames = self.videos.frames(index, args.num_frames, args.sampling_rate)
        generator = torch.Generator().manual_seed(stateless_seed(args.seed, epoch, index, 0))
        scale, down, along, mirror = torch.rand(4, generator=generator).tolist()
        H, W = upright_size(frames[0])
        side = even(min(H, W) * 224 / (256 + (320 - 256) * scale))
        crop = even((H - side) * down), even((W - side) * along), side, side
        boxes, actions = self.videos.boxes(index)
        flip = args.hflip and mirror < 0.5
        clip, boxes = cut_clip(frames, boxes, crop, (args.img_size,) * 2, flip)
        inside = (boxes[:, :2] < boxes[:, 2:]).all(1)
        actions = torch.from_numpy(actions)[inside].float()
        return {"video": clip[None], "boxes": boxes[inside], "actions": actions}


class KeyframeTestDataset(TestDataset):
    """Clips around keyframes to test on: short side --test_size; its middle square, or all of it.

    A sample has: video uint8 (T, H, W, 3), boxes (K, 4) in its pixels. Whole frames ("full") are
    rounded to patches. All boxes are kept: each needs scores.
    """

    def __init__(self, videos, args, patch_size):
        super().__init__(videos, args)
        self.patch_size = patch_size

    def load(self, index):
        args = self.args
        short_side = self.args.test_size or self.args.img_size
        frames = self.videos.frames(index, args.num_frames, args.sampling_rate)
        H, W = upright_size(frames[0])
        short = even(min(H, W))
        size = (short_side, short_side)
        crop = even((H - short) / 2), even((W - short) / 2), short, short
        if args.test_crop == "full":
            crop = (0, 0, H, W)
            patch = min(H, W) / short_side * self.patch_size
            size = [max(1, round(n / patch)) * self.patch_size for n in (H, W)]
        clip, boxes = cut_clip(frames, self.videos.boxes(index)[0], crop, size)
        return {"video": clip, "boxes": boxes}


# --------------------------------------------------------------------------------------- batches


@functools.lru_cache(2)
def permutation(length, seed, epoch):
    """The order of a pass over the list."""
    generator = torch.Generator().manual_seed(stateless_seed(seed, epoch))
    return torch.randperm(length, generator=generator).tolist()


LISTS = "failures", "boxes", "actions"  # what stays a list in a batch, one item per video


def collate(samples):
    """Join samples into lists: of one tensor (R, B, ...), or, for LISTS, an item per video."""
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    for name in batch.keys() - LISTS:
        batch[name] = [torch.stack(batch[name], 1)]  # in a list, as the others are
    return batch


class Batches:
    """The micro-batches of a run from step start to stop, loaded by workers, moved to the device.

    Passes over the list follow one another without a gap, so nothing is dropped at their ends. Each
    is a permutation that follows from (seed, epoch).
    """

    def __init__(self, dataset, device, start, stop):
        args = self.args = dataset.args
        self.length = len(dataset.videos)
        self.device = device
        # Workers hand over one video at a time, since whole batches need far more shared memory;
        # small ones go together, since each hand-over takes a millisecond.
        size = args.micro_batch * args.repeat_aug * args.num_frames * args.img_size**2 * 3  # bytes
        self.parts = 1 if size < 2**23 else args.micro_batch  # that make a micro-batch
        keys = (key for step in range(start, stop) for key in self.keys(step, RANK))
        self.samples = load_samples(dataset, keys, args.micro_batch // self.parts)
        self.waited = 0.0
        self.failures = []
        self.close = self.samples.close

    def keys(self, step, rank):
        """The (epoch, index) pairs a process takes in a step."""
        share = self.args.batch_size // WORLD
        first = step * self.args.batch_size + rank * share
        places = [divmod(place, self.length) for place in range(first, first + share)]
        return [(epoch, permutation(self.length, self.args.seed, epoch)[i]) for epoch, i in places]

    def __next__(self):
        """A dict: video (R*B, 3, T, H, W) uint8, noise (R*B, N), label (R*B,); on AVA boxes and
        actions, lists of B tensors (K, 4) and (K, 80).

        First one clip of each video, then the next of each, so mixing neighbours mixes videos.
        """
        began = time.perf_counter()
        parts = [next(self.samples) for _ in range(self.parts)]
        self.waited += time.perf_counter() - began
        for part in parts:
            self.failures += itertools.chain(*part.pop("failures"))
        batch = {}
        for name in parts[0]:
            values = [x.to(self.device, non_blocking=True) for part in parts for x in part[name]]
            batch[name] = values if name in LISTS else torch.cat(values, 1).flatten(0, 1)
        batch["video"] = batch["video"].permute(0, 4, 1, 2, 3)  # a view of the bytes
        return batch


def load_samples(dataset, sampler, together=None):
    """Yield dataset[key] for each key, by --num_workers processes, which end with it.

    together: how many to join by collate. Nothing random is left to the workers, so their
    number changes nothing. By default there is one for each of the process's cores.
    """
    workers = dataset.args.num_workers
    if workers is None:
        workers = cores()
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=together,
        collate_fn=collate if together else None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals,
    )
    try:
        yield from loader
    except BaseException as error:
        error.__traceback__ = None  # it would keep the loader alive, and so the workers
        if isinstance(error, VideoError):
            reason = str(error).rpartition("VideoError: ")[2]  # without the worker's traceback
            raise VideoError(reason.rstrip()) from None
        raise


def ignore_signals(_):
    """Ctrl-C and SIGTERM reach workers, too; they must work on until the run has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def run_test(dataset, function):
    """Call function(sample) for each video or keyframe of a test, whatever the number of processes.

    Returns {index: value}, and {index: reason} of the unreadable ones, on all processes.
    """
    rounds = math.ceil(len(dataset) / WORLD)
    last = len(dataset) - 1
    mine = [min(RANK + WORLD * i, last) for i in range(rounds)]  # equally many on each process
    values = {}
    failures = {}
    samples = load_samples(dataset, mine)
    for i, sample in enumerate(progress(samples, rounds)):
        if i % 20 == 0:
            gather(None)  # else a slow process may lag until the others time out
        if "failure" in sample:
            failures[sample["index"]] = sample["failure"]
        else:
            values[sample["index"]] = function(sample)
    for more_values, more_failures in gather((values, failures)):
        values |= more_values
        failures |= more_failures
    return dict(sorted(values.items())), dict(sorted(failures.items()))


# ------------------------------------------------------------------------------------------ demo

DEMO_MOTIONS = ("rises", "falls", "slides", "swells", "shrinks", "turns")
DEMO_HEIGHT, DEMO_FPS = 48, Fraction(15, 2)  # every 4th of 30 frames a second: all that clips use
DEMO_VIDEOS = {  # videos of each split
    "unlabelled": dict(train=2400, val=8),  # to pre-train on
    "kinetics": dict(train=200, val=400),  # a few labelled ones, and more to test on
    "ava": dict(train=100, val=100),  # movies of two things
}
DEMO_SECONDS = 902, 904  # that are annotated; a movie starts at 900
DEMO_VERSION = "6"  # of the drawings: a change makes the demo anew


def bar(x, y, left, top, right, bottom):
    """Roughly the signed distance to an upright rectangle."""
    return np.maximum(np.maximum(left - x, x - right), np.maximum(top - y, y - bottom))


DEMO_SHAPES = {  # classes; roughly the signed distance to the outline of a shape of size 1
    "disc": lambda x, y: np.hypot(x, y) - 0.9,
    "triangle": lambda x, y: np.maximum(0.87 * abs(x) + 0.5 * y, -y) - 0.55,
    "cross": lambda x, y: np.minimum(bar(x, y, -1, -0.33, 1, 0.33), bar(x, y, -0.33, -1, 0.33, 1)),
    "square": lambda x, y: bar(x, y, -0.8, -0.8, 0.8, 0.8),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.7) - 0.25,
    "bars": lambda x, y: bar(abs(x), y, 0.2, -0.95, 0.8, 0.95),
    "corner": lambda x, y: np.minimum(
        bar(x, y, -0.85, -0.9, -0.25, 0.9), bar(x, y, -0.85, 0.3, 0.85, 0.9)
    ),
    "twins": lambda x, y: np.hypot(abs(x) - 0.5, y) - 0.42,
}
DEMO_ACTIONS = [*DEMO_SHAPES, *DEMO_MOTIONS[:4]]  # of AVA's part, numbered from 1


def draw_scene(seed, things, radius, width=56, num_frames=24):
    """Draw things moving slowly over a plain background: uint8 (T, H, W, 3), and what is
    there.

    things: (shape, motion, x) of each, None for random; x: its position halfway through, in 0..1.
    radius: its range in pixels. What is there: (shape, motion, boxes (4, T) in pixels) of each
    thing.
    """
    rng = np.random.RandomState(seed)
    H, W, T = DEMO_HEIGHT, width, num_frames
    colors = np.zeros((1 + len(things), 3))
    while (abs(colors[1:] - colors[0]).sum(1) < 200).any():  # things stand out from the background
        colors = rng.uniform(0, 255, colors.shape).astype(np.float32)
    y, x = np.mgrid[:H, :W].astype(np.float32)
    slope = rng.uniform(-30, 30, 2)
    picture = (slope[0] * (x / W - 0.5) + slope[1] * (y / H - 0.5))[..., None] + colors[0]
    t = np.arange(T, dtype=np.float32).reshape(-1, 1, 1) / T - 0.5
    drawn = []
    for (shape, motion, place), color in zip(things, colors[1:]):
        shape = shape or rng.choice([*DEMO_SHAPES])
        motion = motion or rng.choice(DEMO_MOTIONS)
        size = rng.uniform(*radius)
        path = rng.uniform(0.2, 0.3) * t
        angle = rng.uniform(-0.3, 0.3)
        center_x, center_y = ((place, 0.5) + rng.uniform(-0.07, 0.07, 2)) * (W, H)
        if motion in ("rises", "falls"):
            center_y = center_y + {"rises": -H, "falls": H}[motion] * path
        elif motion == "slides":
            center_x = center_x + rng.choice([-H, H]) * path
        elif motion == "turns":
            angle = angle + rng.choice([-4, 4]) * path
        else:
            size = size * (1 + {"swells": 2, "shrinks": -2}[motion] * path)
        u = (x - center_x) / size
        v = (y - center_y) / size
        u, v = u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)
        inside = (0.5 - DEMO_SHAPES[shape](u, v) * size).clip(0, 1)[..., None]  # soft at the edge
        picture = picture * (1 - inside) + inside * color
        box = center_x - size, center_y - size, center_x + size, center_y + size
        drawn.append((shape, motion, [np.broadcast_to(side, t.shape).ravel() for side in box]))
    return picture.clip(0, 255).astype(np.uint8), drawn


def write_scene(task):
    """Write a scene to a file: (path, arguments of draw_scene). Returns what is there."""
    path, scene = task
    path.parent.mkdir(parents=True, exist_ok=True)
    picture, drawn = draw_scene(**scene)
    write_video(path, picture, DEMO_FPS, crf=20)
    return drawn


def write_scenes(tasks):
    """write_scene for each task, with all cores."""
    with Pool(cores()) as pool:
        return list(progress(pool.imap(write_scene, tasks, 8), len(tasks), "making videos"))


def make_demo(part, folder="data/demo"):
    """Make a part of DEMO_VIDEOS, once: real H.264 files in the layouts of the real data sets."""
    folder = Path(folder) / part
    version = folder / "VERSION"
    if version.exists() and version.read_text() == DEMO_VERSION:
        return
    making = folder.with_name(f"{part}.making{os.getpid()}")  # two runs may make it at once
    (make_demo_ava if part == "ava" else make_demo_videos)(part, making)
    (making / "VERSION").write_text(DEMO_VERSION)
    if version.exists() and version.read_text() == DEMO_VERSION:
        shutil.rmtree(making)  # the other one was faster
        return
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)


def make_demo_videos(part, folder):
    """Every shape in every motion; labelled videos in a folder for each shape."""
    tasks = []
    shapes = [*DEMO_SHAPES]
    for split, count in DEMO_VIDEOS[part].items():
        for i in range(count):
            shape = shapes[i % 8]
            motion = DEMO_MOTIONS[i // 8 % 6]
            seed = stateless_seed(i, split == "val", part == "kinetics") % 2**32
            scene = dict(seed=seed, things=[(shape, motion, 0.5)], radius=(14.5, 18))
            label = shape if part == "kinetics" else ""
            tasks.append((folder / split / label / f"{i:05d}.mp4", scene))
    write_scenes(tasks)


def make_demo_ava(part, folder):
    """Movies with two things each, and AVA's files about them; detected boxes are a little off."""
    notes, size = folder / "annotations", np.array([72, DEMO_HEIGHT] * 2)  # of a frame, for boxes
    numbers = {name: number for number, name in enumerate(DEMO_ACTIONS, 1)}
    things = [(None, None, 0.28), (None, None, 0.72)]
    for split, count in DEMO_VIDEOS[part].items():
        tasks = []
        truth = []
        detected = []
        for i in range(count):
            seed = stateless_seed(i, split == "val", 2) % 2**32
            scene = dict(seed=seed, things=things, radius=(11, 13.5), width=72, num_frames=48)
            tasks.append((folder / "videos" / f"{split}{i:04d}.mp4", scene))
        rng = np.random.RandomState(split == "val")
        for (path, _), drawn in zip(tasks, write_scenes(tasks)):
            for second, person in itertools.product(DEMO_SECONDS, range(len(things))):
                shape, motion, boxes = drawn[person]
                box = np.array(boxes)[:, int((second - 900) * DEMO_FPS)] / size
                off = box + rng.normal(0, 0.01, 4)
                score = round(rng.uniform(0.75, 1), 3)
                for name in {shape, motion} & numbers.keys():
                    row = [path.stem, f"{second:04d}"]
                    truth.append([*row, *box.clip(0, 1).round(3), numbers[name], person])
                    detected.append([*row, *off.clip(0, 1).round(3), numbers[name], score])
        write_csv(notes / f"ava_{split}_v2.2.csv", truth)
        write_csv(notes / f"ava_detection_{split}_boxes_and_labels.csv", detected)
    entries = [f'item {{\n  name: "{name}"\n  id: {i}\n}}\n' for name, i in numbers.items()]
    (notes / "ava_action_list_v2.2_for_activitynet_2019.pbtxt").write_text("".join(entries))


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_video(path, frames, fps, crf=18):
    """Write frames, uint8 (T, H, W, 3), as H.264, without the last row or column if odd: it
    needs even sizes.
    """
    height, width = (n // 2 * 2 for n in frames.shape[1:3])
    frames = np.ascontiguousarray(np.asarray(frames)[:, :height, :width])
    with av.open(str(path), "w", format="mp4") as container:
        options = {"crf": str(crf), "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height = height
        stream.width = width
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
