"""Videos in, clips out: lists, decoding, sampling, batches, the demo.

Read from top to bottom:

    lists      what is on disk becomes a VideoList                        (README, "Data layouts")
    decoding   from wanted times to frames, from frames to a clip of pixels                 (PyAV)
    sampling   which clips of a video, and their crop and flip                 (Tables 5 to 7, 9)
    batches    which videos make a step, on which process; loading them
    demo       small H.264 videos, made here, in the layouts of the real data sets; writing files

A clip is (T, H, W, 3), as pictures are stored, until model_order turns a batch of them to what the
model takes. A sample depends on (seed, pass over the list, index, repeat) alone: workers and
processes change nothing, and a resumed run needs no generator states.
"""

import contextlib
import csv
import ctypes
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import Pool
from pathlib import Path

import av
import av.filter
import numpy as np
import torch
from av.video.frame import PictureType
from torch.utils.data import DataLoader, Dataset
from torchvision.io import encode_png
from torchvision.transforms import RandomResizedCrop

from model import InputError, append, atomic_write, autocast, check_failures, gather, progress, rank
from model import world_size

FPS = 30  # --sampling_rate counts in frames of this rate: 16 frames, every 4th, span 64 / 30 s
SPLITS = {"train": ["train"], "val": ["val", "validate", "validation"]}  # their names on disk
VIDEO_SUFFIXES = "mp4|mkv|webm|avi|mov|m4v|mpg|mpeg|flv|wmv|3gp|ts"
is_video = re.compile(rf"(?is)^(?!\._).*\.({VIDEO_SUFFIXES})$").match  # macOS adds ._a.mp4
# Never lists, though they may be named after a split: hidden files, videos and archives.
is_ignored = re.compile(rf"(?i)\.|.*\.({VIDEO_SUFFIXES}|zip|tar|gz)$").match

LAYOUTS = """\
  DATA/train.csv                'path label' lines (blank, comma or tab; a label is a number or a
                                name), paths relative to DATA; or the official csv
                                (label,youtube_id,time_start,time_end,split), its videos named
                                ID_000001_000011.mp4 anywhere below DATA
  DATA/train/CLASS/any.mp4      a folder for each class
  DATA/labels/train.json        Something-Something v2 as it is distributed, labels.json beside it,
                                its videos ID.webm anywhere below DATA
  DATA/any.mp4                  any folder of videos (no labels: for pre-training)
Likewise val.csv, val/, validation.json. --data also takes a list itself. No data at hand? Use
--dataset demo."""


def stateless_seed(*numbers):
    """A seed derived from integers >= 0 alone, such as (seed, pass, index, repeat)."""
    # Their count comes first, or (seed, pass) would equal (seed, pass, 0, 0).
    state = np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)
    return state.item() >> 1  # 63 bits


# ----------------------------------------------------------------------------------------- lists


@dataclass
class VideoList:
    """The videos of a data set."""

    source: Path  # the file or folder the list was made from
    root: Path  # the folder below which the paths are
    paths: np.ndarray  # an array: 240,000 Python strings would be copied into every worker
    labels: np.ndarray = None
    class_names: list = None
    num_classes: int = None
    unit = "videos"

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        return os.path.join(self.root, self.paths[index])

    name = path  # what messages call a video


def find_videos(args, split, classes=0):
    """Find the videos of a split in --data, which has any of LAYOUTS; returns a VideoList.

    classes: names, or their number, that labels must fit; None: any; 0: labels may be missing.
    Raises InputError if nothing fits.
    """
    data = Path(args.data)
    names = None
    source = data if data.is_file() else find_list(data, split)
    if source:
        folder = source.parent
        root = args.videos or (folder.parent if folder.name in LIST_FOLDERS else folder)
        names = read_ssv2_classes(source)
        if names and args.dataset != "ssv2":  # its labels tell left from right: no flips
            raise InputError(f"{data}: this is Something-Something v2; add --dataset ssv2")
        found = (read(source, root, split) for read in LIST_READERS)
        pairs = next(pairs for pairs in found if pairs is not None)
    else:
        folders = [data / name for name in SPLITS[split] if (data / name).is_dir()]
        source = root = folders[0] if folders else data
        pairs = read_folders(root, split)
        # Without train/ and val/, DATA itself is a folder of videos, to train on without labels.
        if not folders and (split == "val" or classes != 0):
            in_classes = pairs and None not in dict(pairs).values()
            if in_classes and not (data / "train").is_dir():
                raise InputError(f"{data}: has class folders, but not in folders train/ and val/")
            pairs = pairs if split == "train" else []
    if not pairs:
        text = f"no folder or list of {split} videos in a known layout"
        raise InputError(f"{data}: {text}.\n{LAYOUTS}")
    paths, labels = zip(*pairs)
    if None in labels:
        if classes != 0:
            text = f"videos without labels, such as {paths[labels.index(None)]}"
            raise InputError(f"{source}: {text}.\n{LAYOUTS}")
        return VideoList(source, root, np.array(paths))

    # Names are numbered as class folders are sorted; the labels of a list may be numbers.
    if isinstance(classes, list):
        names = classes
    if isinstance(labels[0], str):
        names = names or sorted(set(labels))
        numbers = {name: number for number, name in enumerate(names)}
        labels = [numbers.get(label, len(names)) for label in labels]  # unknown: see below
    count = len(names) if names else classes or max(labels) + 1
    if isinstance(classes, int) and classes not in (0, count):
        text = f"{count} classes, not {classes}; if intended, use --num_classes {count}"
        if split == "val":
            text = f"{count} classes, but the model knows {classes}"
        raise InputError(f"{source}: {text}")
    if max(labels) >= count:
        path, label = pairs[labels.index(max(labels))]
        raise InputError(f"{source}: class {label!r} of {path} is not among the {count} classes")
    return VideoList(source, root, np.array(paths), np.array(labels), names, count)


LIST_FOLDERS = "annotations", "labels"  # subfolders in which lists may be


def find_list(folder, split):
    """The file in a data set's folder whose name says that it lists the split, or None."""
    for name in ("", *LIST_FOLDERS):
        for file in sorted((folder / name).glob("*.*")):
            listed = re.split("[-_]", file.stem)[-1] in SPLITS[split]
            if listed and file.is_file() and not is_ignored(file.name):
                return file
    return None


def read_entries(file, convert, expected, parse=None, unit="line"):
    """Yield convert(entry) of each entry of a text file: of parse(text), by default a csv's rows.

    Those that become None are left out. Whatever is wrong with a file becomes an InputError that
    names it, the entry, and what was expected.
    """
    number, entry = 0, ""  # 0: while the file as a whole is read
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        entries = parse(text) if parse else csv.reader(io.StringIO(text), skipinitialspace=True)
        number = 1
        for entry in entries:
            if entry not in ("", []) and (value := convert(entry)) is not None:
                yield value
            number, entry = number + 1, ""  # the next one may not even be parsed
    except Exception as error:
        found = f"{','.join(entry) if isinstance(entry, list) else entry}"[:99]
        place = f"{file}, {unit} {number}: {found!r}" if number else file
        raise InputError(f"{place}: {error}; expected {expected}, in UTF-8") from None


LIST_FORMATS = (
    "'path label' or 'path,label', or label,youtube_id,time_start,time_end,split with a header"
)

# A list reader takes (file, folder of the videos, split). It returns None for a format it does not
# know, else pairs of a path and a label: a name, a number or None.


def read_kinetics(file, root, split):
    """The official csv: label,youtube_id,time_start,time_end,split, columns in any order."""
    header = next(read_entries(file, list, LIST_FORMATS), [])
    if "youtube_id" not in header:
        return None

    def convert(row):
        row = dict(zip(header, row))
        if row["youtube_id"] == "youtube_id" or (row.get("split") or split) not in SPLITS[split]:
            return None  # the header itself, or another split
        start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
        return f"{row['youtube_id']}_{start:06d}_{end:06d}", row.get("label") or None

    return match_files(file, root, split, list(read_entries(file, convert, LIST_FORMATS)))


def read_ssv2(file, root, split):
    """Something-Something v2 as it is distributed: labels.json, train.json, a folder of ID.webm."""
    if file.suffix != ".json":
        return None
    if not read_ssv2_classes(file):
        raise InputError(f"{file}: no labels.json beside it, as Something-Something v2 has")

    def convert(item):
        return str(item["id"]), re.sub(r"[\[\]]", "", item["template"])

    expected = '[{"id": "1", "template": "Holding [something]"}, ...]'
    items = read_entries(file, convert, expected, json.loads, "item")
    return match_files(file, root, split, list(items))


def read_ssv2_classes(file):
    """The classes beside a list of Something-Something v2, sorted by their numbers; or None."""
    class_file = max(file.parent.glob("*labels.json"), default=None)
    if file.suffix != ".json" or not class_file:
        return None

    def parse(text):
        return [(int(number), name) for name, number in json.loads(text).items()]

    numbered = read_entries(class_file, tuple, '{"Holding something": "0", ...}', parse, "item")
    return [name for _, name in sorted(numbered)]


def read_list(file, root, split):
    """A plain list: lines of a path and a label, quoted or not, perhaps below a header."""

    def parse(text):
        first, *lines = (line.strip() for line in text.split("\n"))
        return [first if "." in first else "", *lines]  # a header has no suffix

    def convert(line):
        # A path has a suffix. A label is a number, or it has a letter.
        form = r'"?(.+?\.\w+)"?[\s,]+(?=[^\s,])"?(\d+|.*[^\W\d].*?)"?'
        match = re.fullmatch(form, line)
        if not match:
            raise ValueError("no path with a suffix, or no label")
        return match[1].replace('""', '"'), int(match[2]) if match[2].isdecimal() else match[2]

    pairs = list(read_entries(file, convert, LIST_FORMATS, parse))
    for path, label in pairs:
        if type(label) is not type(pairs[0][1]):
            raise InputError(
                f"{file}: label {label!r} of {path}: expected all numbers or all names"
            )
    return pairs


LIST_READERS = [read_ssv2, read_kinetics, read_list]


def read_folders(folder, split):
    """One folder per class; or any folder of videos, without labels."""
    pairs = []
    held_out = 0
    for path in files_below(folder):
        *folders, _ = path.split(os.sep)
        if split == "train" and set(folders) & set(SPLITS["val"]):
            held_out += 1
        else:
            pairs.append((path, folders[0] if folders else None))
    if held_out:
        print(f"{folder}: videos left out, in folders named val: {held_out}")
    return pairs


def files_below(folder):
    """The videos anywhere below a folder, sorted, relative to it."""
    found = []
    seen = set()
    folders = [""]
    for name in folders:  # which grows: breadth first, so real folders come before links to them
        listing = next(os.walk(os.path.join(folder, name), onerror=print), None)
        if listing is None:
            continue
        path, subfolders, files = listing
        identity = os.stat(path)[1:3]  # inode and device
        if identity not in seen:  # links may loop
            folders += sorted(os.path.join(name, subfolder) for subfolder in subfolders)
            found += [os.path.join(name, file) for file in files if is_video(file)]
        seen.add(identity)
    return sorted(found)


def match_files(file, root, split, pairs):
    """Find videos below root: (stem, label) -> (path, label); prints how many are missing."""
    if not pairs:
        raise InputError(f"{file}: lists no {split} videos")
    paths = {Path(path).stem: path for path in files_below(root)}
    found = [(paths[stem], label) for stem, label in pairs if stem in paths]
    if len(found) < len(pairs):
        print(f"{file}: {len(pairs) - len(found)} of {len(pairs)} videos are not below {root}")
    if not found:
        first = pairs[0][0]
        raise InputError(f"{file}: none of its videos, such as {first}, is below {root}: --videos?")
    return found


# -------------------------------------------------------------------------------------- decoding


DECODE_LIMIT = 60.0  # seconds that decoding one video may take
MAX_PIXELS = 2**25  # of a frame, as 8K has: a damaged header may claim any number
SEEK_GAP = 10.0  # seconds between wanted frames above which a seek is cheaper than reading on
REORDER = 16  # frames a decoder may hold back for reordering; H.264 allows no more
MAX_PACKETS = 2**11  # kept in memory, to choose from
NO_INDEX = "mpegts", "mpeg", "flv"  # formats whose files may be cut or joined anywhere
MAX_READ = 2**27  # bytes of a file without an index that is read through, to find its end
FORMATS = ",".join(av.formats_available - {"concat", "dash", "hls", "imf", "sdp"})  # no playlists


class VideoError(InputError):
    """A video that cannot be used, with the reason."""


@contextlib.contextmanager
def video_errors(failure):
    """Turn any exception inside into a VideoError, with FFmpeg's reason if it has one."""
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or repr(error)
        raise VideoError(f"{failure}: {reason}") from None


class Video:
    """An open video file; use it in a with statement. Raises VideoError if it cannot be opened.

    Files lie, so none is believed. A fast pass chooses packets by their stamps and skips the rest.
    It is used if all wanted frames came out, none damaged or interlaced, and each run of packets
    began with an I-frame. If not, a careful pass decodes everything from ten seconds earlier on and
    takes the nearest frames, by their own stamps. If it did not begin with an I-frame, or one of
    the nearest is damaged, it is repeated from the start of the file.

    duration: seconds. Times count from the first frame, whatever time stamp the file gives it.
    second: a second in units of time_base, as packet.pts and frame.pts are.
    """

    container = None
    can_seek = True
    careful = 0  # careful passes in this process

    @video_errors("cannot be opened")
    def __init__(self, path):
        self.path = path
        self.deadline = time.monotonic() + DECODE_LIMIT
        stamps = self.stamps(-math.inf, -math.inf)  # of the first packets; opens the file
        name = self.container.format.name
        self.reorders = name == "avi" and self.codec.has_b_frames  # its stamps are decoding times
        # A file may begin inside a group of pictures: find the first frame that comes out.
        if name in NO_INDEX or [*stamps][:1] != sorted(stamps)[:1]:
            stamps, _ = self.decode_all([-1e15])  # nearest to long ago
        if not stamps:
            raise VideoError("has no time stamps; to add some: ffmpeg -i a.h264 -c copy a.mp4")
        self.start = min(stamps)
        whole = name in NO_INDEX and os.path.getsize(path) < MAX_READ
        tail = {} if whole else self.stamps(1e6 * self.second)  # from the last key frame on
        end = max((tail or self.stamps(-math.inf)).values())
        self.duration = (end - self.start) / self.second

    def open(self):
        if not os.path.isfile(self.path):  # a pipe would wait, a device never end
            raise VideoError("cannot be opened: no such file, or not a regular one")
        if self.container:
            self.container.close()
        options = {"format_whitelist": FORMATS}
        self.container = av.open(
            str(self.path), metadata_errors="ignore", timeout=DECODE_LIMIT, options=options
        )
        streams = self.container.streams.video
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in streams if s.codec_context and not s.disposition & cover]
        if not streams:
            raise VideoError("has no video stream that can be decoded")
        self.stream = streams[0]
        self.codec = self.stream.codec_context
        if self.codec.width * self.codec.height > MAX_PIXELS:
            raise VideoError(f"has frames of {self.codec.width} x {self.codec.height} pixels")
        self.codec.thread_count = 1  # the workers are the threads
        self.second = float(1 / self.stream.time_base)
        self.can_seek &= self.codec.pix_fmt != "pal8"  # a palette may come with the first packet

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()

    def packets(self, first, last):
        """Packets from the key frame before time stamp `first` (-inf: the start of the file) until
        REORDER shown ones came after `last`.

        Where files were joined and stamps start again, they are made to go on.
        """
        try:
            self.container.seek(int(first), stream=self.stream)  # empties the decoder, too
        except Exception:
            self.open()  # not open yet, -inf, or it cannot seek: begin at the start
        packets = self.container.demux(self.stream)
        shift = later = 0  # what stamps go on by; shown packets after `last`
        latest = -math.inf
        while later <= REORDER:
            if time.monotonic() > self.deadline:
                raise VideoError(f"takes more than {DECODE_LIMIT:g} s to decode")
            try:
                packet = next(packets)
            except Exception:  # the end, or damaged from here on: use what was read
                return
            if packet.dts is not None:
                if packet.dts < latest - self.second:
                    shift += latest - packet.dts
                    self.can_seek = False
                latest = packet.dts
            if packet.pts is not None:
                packet.pts += shift
                later += packet.pts > last and not packet.is_discard
            if packet.size:
                yield packet

    def stamps(self, first, last=math.inf):
        """The time stamps of packets from first to last that show something: {start: end}."""
        shown = (p for p in self.packets(first, last) if p.pts is not None and not p.is_discard)
        return {p.pts: p.pts + (p.duration or 0) for p in shown}

    @video_errors("cannot be decoded")
    def frames(self, times):
        """The frames nearest to the given times: seconds (any shape and order, repeats allowed) ->
        av.VideoFrame in lists of that shape.

        Beyond the last frame, the last frame. If up to half of the wanted frames are damaged, the
        nearest intact ones stand in; raises VideoError if more are.
        """
        times = self.start + np.clip(times, 0, self.duration) * self.second
        ordered = np.unique(times)
        far = np.flatnonzero(np.diff(ordered) > SEEK_GAP * self.second) + 1
        found = {}
        damaged = 0
        for group in np.split(ordered, far):
            part = self.can_seek and not self.reorders and self.decode_chosen(group)
            if not part:  # something looked off, or was known to
                Video.careful += 1
                if Video.careful == 100:
                    print("decoding took a careful pass 100 times: loading is slow for such files")
                self.open()  # a new decoder, in which nothing of the fast pass is left
                part, damaged = self.decode_all(group, 10 if self.can_seek else math.inf)
            if damaged:
                found, damaged = self.decode_all(ordered)
                break
            found |= part
        if damaged > len(ordered) / 2:
            raise VideoError(f"{damaged} of {len(ordered)} wanted frames cannot be decoded")
        return np.frompyfunc(found.get, 1, 1)(nearest(found, times)).tolist()

    def decode_chosen(self, times):
        """The fast pass: {time stamp: frame} of the frames nearest to times, from few packets.

        None if anything looks off.
        """
        packets = self.packets(times[0] - self.second, times[-1])
        packets = list(itertools.islice(packets, MAX_PACKETS))
        shown = {p.pts for p in packets if not p.is_discard}
        if len(packets) == MAX_PACKETS or None in shown or min(shown, default=math.inf) > times[0]:
            return None
        wanted = set(nearest(shown, times))
        chosen = [None]  # from last to first; None: flush the decoder, at a gap or the end
        earliest = math.inf  # of the wanted time stamps seen, until their key frame is reached
        for packet in reversed(packets):
            if packet.pts in wanted:
                earliest = min(earliest, packet.pts)
            chosen.append(packet if earliest < math.inf else None)
            # In an open GOP, frames shown before the key frame need the GOP before it, too.
            if packet.is_keyframe and packet.pts <= earliest:
                earliest = math.inf
        found = {}
        broken = True  # until a run of packets has begun with an I-frame
        for packet, _ in itertools.groupby(reversed(chosen)):  # one None for each gap
            if self.codec.name == "h264":  # leave out what is neither wanted nor referred to
                skip = packet and packet.pts not in wanted
                self.codec.skip_frame = "NONREF" if skip else "DEFAULT"
            try:
                out = self.codec.decode(packet)
            except av.error.FFmpegError:
                return None
            for frame in out:
                broken = broken and frame.pict_type != PictureType.I
                # Interlaced: a packet may be one field, half a frame.
                if broken or frame.is_corrupt or frame.interlaced_frame:
                    return None
                if frame.pts in wanted:
                    found[frame.pts] = frame
            if packet is None:
                self.codec.flush_buffers()
                broken = True
        return found if len(found) == len(wanted) else None

    def decode_all(self, times, lead=math.inf):
        """The careful pass, from `lead` seconds before: {time stamp: frame} of the frames that came
        out nearest to times, and how many of these are damaged.
        """
        found = {}  # the intact frames nearest to times, so far
        damaged = [1e99]  # stamps of what is damaged; the first is far from all times
        intra = lead == math.inf or None  # False: not begun by an I-frame; None: not known yet
        waiting = []  # frames that came out, not looked at yet
        later = 0  # frames shown after the last time
        packets = self.packets(times[0] - lead * self.second, math.inf)
        for packet in itertools.chain(packets, [None]):
            try:  # None: what the decoder still holds
                waiting += [frame for frame in self.codec.decode(packet) if frame.pts is not None]
            except av.error.FFmpegError:
                damaged.append(1e99 if packet is None or packet.pts is None else packet.pts)
            if self.reorders:  # the lowest time of decoding belongs to the first frame shown
                for frame, stamp in zip(waiting, sorted(frame.pts for frame in waiting)):
                    frame.pts = stamp
            while len(waiting) > (REORDER if self.reorders and packet else 0):
                frame = waiting.pop(0)
                if intra is None:  # the seek may have led too far
                    intra = frame.pict_type == PictureType.I and frame.pts <= times[0]
                if not intra or frame.is_corrupt:
                    damaged.append(frame.pts)
                else:
                    found.setdefault(frame.pts, frame)
                    found = {stamp: found[stamp] for stamp in nearest(found, times)}
                later += frame.pts > times[-1]
            if later > REORDER:
                break
        # Damaged: something damaged is nearer to a time than what is intact.
        return found, sum(stamp not in found for stamp in nearest([*found, *damaged], times))


def nearest(values, targets):
    """For each target the nearest of the values; the lower one in a tie."""
    values = np.array(sorted(values))
    return values[abs(np.subtract.outer(targets, values)).argmin(-1)]


def upright_size(frame):
    """Height and width of a frame as displayed."""
    size = frame.height, frame.width
    return size[::-1] if frame.rotation % 180 == 90 else size


@video_errors("cannot be cropped and scaled")
def to_clip(frames, size, box=None, flip=False):
    """Crop, scale, flip and convert frames: T av.VideoFrame -> uint8 RGB (T, height, width, 3).

    size: (height, width) to scale to. box: (top, left, height, width) in pixels of the upright
    frame, all of it by default; rounded to what the pixel format allows. Raises VideoError
    if FFmpeg cannot do this.
    """
    first = frames[0]
    pix_fmt = first.format
    # Palettes and 15-bit RGB would be scaled in their few colors: convert them first.
    pix_fmt = "rgb24" if pix_fmt.is_rgb or pix_fmt.has_palette else pix_fmt.name
    top, left, height, width = box or (0, 0, *upright_size(first))
    turns = {90: ["transpose=cclock"], 180: ["hflip", "vflip"], 270: ["transpose=clock"]}
    steps = [
        f"buffer=width={first.width}:height={first.height}:pix_fmt={pix_fmt}"
        f":colorspace={first.colorspace}:range={first.color_range}:time_base=1/{FPS}",
        *turns.get(first.rotation % 360, []),
        f"crop={width}:{height}:{left}:{top}",
        f"scale={size[1]}:{size[0]}:flags=bilinear",
        f"format={pix_fmt}",  # scale, then convert: both in one step take twice as long
        "format=rgb24",
        *["hflip"] * flip,
        "buffersink",
    ]
    graph = av.filter.Graph()
    graph.threads = 1  # the workers are the threads
    graph.link_nodes(*(graph.add(*step.split("=", 1)) for step in steps)).configure()

    @functools.cache  # frames may repeat
    def picture(frame):
        graph.push(frame.reformat(first.width, first.height, pix_fmt))  # the size may change
        return torch.from_numpy(graph.pull().to_ndarray())

    return torch.stack([picture(frame) for frame in frames])


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


@dataclass
class VideoDataset(Dataset):
    """Samples made from a list of videos, or of keyframes."""

    videos: object
    args: object  # the stage's arguments


class TrainDataset(VideoDataset):
    """Samples to train on, indexed by (pass, index): the dicts that load(index, pass) returns.

    An unreadable video is replaced by another, also drawn from (pass, index); "failures" lists
    them: [(index, reason)].
    """

    def __getitem__(self, key):
        pass_number, index = key
        failures = []
        candidate = index
        for attempt in range(1, 21):
            try:
                return self.load(candidate, pass_number) | {"failures": failures}
            except VideoError as error:
                failures.append((candidate, str(error)))
            seed = stateless_seed(self.args.seed, pass_number, index, attempt)
            candidate = seed % len(self.videos)
        reasons = [f"  {self.videos.name(i)}: {reason}" for i, reason in dict(failures).items()]
        raise VideoError("\n".join([f"{attempt} videos in a row cannot be read:", *reasons]))


class TestDataset(VideoDataset):
    """Samples to test on: dicts of "index" and what load(index) returns, or "failure": a reason."""

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        try:
            return {"index": index} | self.load(index)
        except VideoError as error:
            return {"index": index, "failure": str(error)}


@dataclass
class ClipDataset(TrainDataset):
    """Clips to train on: repeated sampling, random resized crop, flip.

    A sample has: video uint8 (R, T, H, W, 3) of R clips; label (R,) if the list has labels.
    """

    augment: object = None  # what else is done to a clip: uint8 (T, 3, H, W) -> the same

    def load(self, index, pass_number):
        repeats = range(self.args.repeat_aug)
        seeds = [stateless_seed(self.args.seed, pass_number, index, repeat) for repeat in repeats]
        with Video(self.videos.path(index)) as video:
            frames = video.frames([self.times(video.duration, seed) for seed in seeds])
        clips = []
        for seed, clip in zip(seeds, frames):
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                # Not torch.manual_seed, which is slow: it seeds all devices.
                torch.default_generator.manual_seed(seed)
                clips.append(self.crop(clip))
        sample = {"video": torch.stack(clips)}
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
        scale = sorted(self.args.crop_scale)
        box = RandomResizedCrop.get_params(whole, scale, (3 / 4, 4 / 3))
        flip = self.args.hflip and torch.rand(()).item() < 0.5
        clip = to_clip(frames, (self.args.img_size,) * 2, box, flip)
        if self.augment:
            clip = self.augment(clip.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return clip


@dataclass
class MultiViewDataset(TestDataset):
    """Clips to test on: K clips spread over a video x S crops along its longer side (Tables 7, 9).

    A sample has: video uint8 (K * S, T, H, W, 3).
    """

    views: tuple  # (K, S)

    def load(self, index):
        size = (self.args.img_size,) * 2
        views = []
        with Video(self.videos.path(index)) as video:
            clips = video.frames(self.times(video.duration))
        for clip in clips:
            views += [to_clip(clip, size, box) for box in self.boxes(*upright_size(clip[0]))]
        return {"video": torch.stack(views)}

    def times(self, duration):
        """The times of the K clips: from start to end of the video, or its middle if K is 1."""
        K = self.views[0]
        middles = (np.arange(K) + 0.5) / K  # of segments: one clip takes their middle
        places = middles if self.args.segments else spread(K)
        return [sample_times(duration, self.args, place) for place in places]

    def boxes(self, height, width):
        """S squares of the shorter side along the longer one, touching both its ends."""
        short = min(height, width)
        down, right = height - short, width - short  # one of them is 0
        return [(round(down * p), round(right * p), short, short) for p in spread(self.views[1])]


def spread(n):
    """n numbers from 0 to 1, both included; the middle if n is 1."""
    return np.linspace(0, 1, n) if n > 1 else [0.5]


# --------------------------------------------------------------------------------------- batches


@functools.lru_cache(2)
def permutation(length, seed, pass_number):
    """The order of a pass over the list."""
    generator = torch.Generator().manual_seed(stateless_seed(seed, pass_number))
    return torch.randperm(length, generator=generator).tolist()


def collate(samples, device="cpu"):
    """Join samples, or batches: tensors along their first dimension, lists end to end. Tensors,
    those in lists, too, are moved to the device first.
    """
    on_gpu = torch.device(device).type == "cuda"  # on MPS, a copy may be read before it is done

    def move(value):
        return value.to(device, non_blocking=on_gpu) if torch.is_tensor(value) else value

    batch = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if torch.is_tensor(first):
            batch[name] = torch.cat([*map(move, values)])
        else:
            batch[name] = [*map(move, itertools.chain(*values))]
    return batch


def model_order(clips):
    """Clips as pictures are stored, (B, T, H, W, 3), as the model takes them: (B, 3, T, H, W)."""
    return clips.permute(0, 4, 1, 2, 3)


class Batches:
    """The micro-batches of a run from step `start` on, loaded by workers, moved to the device.

    Passes over the list follow one another without a gap, so nothing is dropped at their ends. Each
    is a permutation that follows from (seed, pass).
    """

    def __init__(self, dataset, plan, device, start):
        args = self.args = dataset.args
        self.length = len(dataset.videos)
        self.device = device
        # Workers hand over one video at a time, since whole batches need far more shared memory;
        # small ones go together, since each hand-over takes a millisecond.
        clips = plan.clips // args.batch_size * plan.micro_batch  # repeats x videos at once
        small = clips * args.num_frames * args.img_size**2 * 3 < 2**23  # bytes
        self.parts = 1 if small else plan.micro_batch  # loaded one after another
        videos = plan.micro_batch // self.parts  # in a part
        keys = (key for step in range(start, plan.steps) for key in self.keys(step, rank()))
        self.stopping = False  # whether the run was asked to stop
        self.samples = load_samples(dataset, keys, videos, lambda: self.stopping)
        self.waited = 0.0  # seconds
        self.failures = []
        self.close = self.samples.close

    def keys(self, step, process):
        """The (pass, index) pairs a process takes in a step."""
        share = self.args.batch_size // world_size()
        first = step * self.args.batch_size + process * share
        places = [divmod(place, self.length) for place in range(first, first + share)]
        return [(n, permutation(self.length, self.args.seed, n)[i]) for n, i in places]

    def __next__(self):
        """A dict: video (B*R, 3, T, H, W) uint8, the R clips of a video side by side; label (B*R,);
        on AVA boxes, a list of B tensors (K, 4), and the actions of all boxes (sum of K, 80).
        """
        began = time.perf_counter()
        parts = [next(self.samples) for _ in range(self.parts)]
        self.waited += time.perf_counter() - began
        for part in parts:
            self.failures += part.pop("failures")
        batch = collate(parts, self.device)
        return batch | {"video": model_order(batch["video"])}


def cores():
    """How many of this machine's cores a training process and its workers may take."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def load_samples(dataset, keys, batch_size=None, stopping=lambda: False):
    """Yield dataset[key] for each key, by --num_workers processes, which end with it.

    batch_size: how many to join by collate; None: single samples. Nothing random is left to the
    workers, so their number changes nothing. stopping(): whether to give up on one that hangs.
    """
    args = dataset.args
    others = multiprocessing.active_children()
    number = cores() if args.num_workers is None else args.num_workers
    samples = iter(
        DataLoader(
            dataset,
            sampler=keys,
            batch_size=batch_size,
            collate_fn=collate if batch_size else None,
            num_workers=number,
            pin_memory=args.device.startswith("cuda"),
            worker_init_fn=start_worker,
            timeout=5 if number else 0,  # seconds; then it waits on, unless stopping()
        )
    )
    workers = [child for child in multiprocessing.active_children() if child not in others]
    try:
        while True:
            try:
                yield next(samples)
            except StopIteration:
                return
            except VideoError as error:
                reason = str(error).rpartition("VideoError: ")[2]  # without the worker's traceback
                raise VideoError(reason.rstrip()) from None
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                if stopping():
                    raise InputError(
                        "asked to stop while no worker sent data, so nothing was saved now; "
                        "the same command resumes from the last checkpoint"
                    ) from None
    finally:  # they ignore SIGTERM, and one that hangs would keep this process alive
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's reports each death
        for worker in workers:
            worker.kill()
            worker.join()
        del samples
        signal.signal(signal.SIGCHLD, handler)


def start_worker(_):
    """Workers ignore Ctrl-C and SIGTERM, to work on until the run has saved, and end with it."""
    if hasattr(libc := ctypes.CDLL(None), "prctl"):
        PR_SET_PDEATHSIG = 1
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # when the main process ends
    # If shared memory is full, a worker dies; else its sample would never come.
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def run_test(dataset, device, function):
    """Call function(sample) for each video or keyframe of a test, whatever the number of processes.

    Returns {index: value}, and {index: reason} of the unreadable ones, on all processes.
    """
    count = len(dataset)
    # Equally many on each process: some take the last one again
    mine = [min(first + rank(), count - 1) for first in range(0, count, world_size())]
    values = {}
    failures = {}
    samples = load_samples(dataset, mine)
    for i, sample in enumerate(progress(samples, total=len(mine))):
        if i % 20 == 0:
            gather(None)  # else a slow process may lag until the others time out
        if "failure" in sample:
            failures[sample["index"]] = sample["failure"]
        else:
            sample["video"] = model_order(sample["video"].to(device))
            with torch.no_grad(), autocast(dataset.args, device):
                values[sample["index"]] = function(sample)
    for more_values, more_failures in gather((values, failures)):
        values |= more_values
        failures |= more_failures
    return dict(sorted(values.items())), dict(sorted(failures.items()))


def report_failures(args, videos, failures):
    """Print the unreadable videos of a test, {index: reason}, and add them to failures.log.

    Call it last: raises InputError if all are, or more than --max_failures. Process 0 alone does
    it: if another ended first, torchrun would stop it before it has written the results.
    """
    if rank() == 0:
        for index, reason in failures.items():
            print(f"unreadable, counted as wrong: {videos.name(index)}: {reason}")
            append(Path(args.output_dir, "failures.log"), f"{videos.name(index)}\t{reason}")
        check_failures(args, len(failures), videos)


# ------------------------------------------------------------------------------------------ demo

DEMO_MOTIONS = {  # how many pixels to the right and down, and how much larger
    "rises": (0, -20, 0),
    "falls": (0, 20, 0),
    "slides": (20, 0, 0),
    "swells": (0, 0, 0.5),
}
DEMO_FRAMES, DEMO_FPS = 20, Fraction(15, 2)  # every 4th of 30 frames a second: all that clips use
DEMO_VIDEOS = {  # videos of each split
    "mae_pretrain": dict(train=2400, val=8),  # to pre-train on
    "finetune_cls": dict(train=320, val=400),  # a few labelled ones, and more to test on
    "finetune_ava": dict(train=50, val=200),  # movies of two things
}
DEMO_KEYFRAME = 1.5  # the second of a movie that is annotated


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
DEMO_ACTIONS = [*DEMO_SHAPES, *DEMO_MOTIONS]  # in its movies, numbered from 1


def draw_scene(seed, things, radius, size):
    """Draw things of any color that move before a background of any other.

    things: (shape, motion, x) of each; x: its position halfway through, in 0..1. radius: its range
    in pixels. size: (width, height). Returns the video, uint8 (T, H, W, 3), and the boxes (T, 4) of
    each thing, as shares of the frame.
    """
    rng = np.random.RandomState(seed % 2**32)
    width, height = size
    colors = np.zeros((1 + len(things), 3))
    while (abs(colors[1:] - colors[0]).sum(1) < 300).any():  # things must stand out
        colors = rng.uniform(0, 255, colors.shape)
    t = np.arange(DEMO_FRAMES)[:, None, None] / DEMO_FRAMES - 0.5
    y, x = np.mgrid[:height, :width]
    video = colors[0]
    drawn = []
    for (shape, motion, place), color in zip(things, colors[1:]):
        right, down, growth = DEMO_MOTIONS[motion]
        left, top = ((place, 0.5) + rng.uniform(-0.05, 0.05, 2)) * size
        center_x = left + right * t
        center_y = top + down * t
        scale = rng.uniform(*radius) * (1 + growth * t)
        distance = scale * DEMO_SHAPES[shape]((x - center_x) / scale, (y - center_y) / scale)
        inside = (0.5 - distance).clip(0, 1)[..., None]  # with a soft edge
        video = video + inside * (color - video)
        box = center_x - scale, center_y - scale, center_x + scale, center_y + scale
        drawn.append(np.hstack(box)[..., 0] / (size * 2))
    return video.astype(np.uint8), drawn


def write_scene(task):
    """Write a scene to a file: (path, arguments of draw_scene). Returns its boxes."""
    path, scene = task
    video, drawn = draw_scene(**scene)
    write_video(path, video, DEMO_FPS, crf=20)
    return drawn


def write_scenes(tasks):
    """write_scene for each task, with all cores."""
    with Pool() as pool:
        scenes = pool.imap(write_scene, tasks, 8)
        return list(progress(scenes, total=len(tasks), desc="making videos"))


def make_demo(args):
    """Make the demo of a stage, once, if --data is its folder: real H.264 files, in the layouts of
    the real data sets.
    """
    part = args.stage
    folder = Path("data/demo", part)
    if Path(args.data) != folder or folder.exists():
        return
    making = folder.with_name(f"{part}.making{os.getpid()}")  # two runs may make it at once
    for split, count in DEMO_VIDEOS[part].items():
        if part == "finetune_ava":
            make_demo_ava(making, split, count)
        else:
            make_demo_videos(making, split, count, labelled=part == "finetune_cls")
    try:
        making.rename(folder)
    except OSError:  # the other one was faster
        shutil.rmtree(making)


def make_demo_videos(folder, split, count, labelled):
    """Shapes in turn, and motions; labelled ones in a folder for each shape."""
    tasks = []
    for i in range(count):
        shape = [*DEMO_SHAPES][i % 8]
        motion = [*DEMO_MOTIONS][(i // 2 + i // 8) % 4]
        seed = stateless_seed(i, split == "val", labelled)
        scene = dict(seed=seed, things=[(shape, motion, 0.5)], radius=(15, 17), size=(56, 48))
        label = shape if labelled else ""
        tasks.append((folder / split / label / f"{i:05d}.mp4", scene))
    write_scenes(tasks)


def make_demo_ava(folder, split, count):
    """Movies with two things each, and AVA's files about them; detected boxes are a little off."""
    rng = np.random.RandomState(split == "val")
    shapes, motions = [*DEMO_SHAPES], [*DEMO_MOTIONS]
    tasks = []
    for i in range(count):
        things = [(rng.choice(shapes), rng.choice(motions), place) for place in (0.25, 0.75)]
        seed = stateless_seed(i, split == "val", 2)
        scene = dict(seed=seed, things=things, radius=(14, 16), size=(96, 64))
        tasks.append((folder / "videos" / f"{split}{i:04d}.mp4", scene))
    truth, detected = [], []
    for (path, scene), drawn in zip(tasks, write_scenes(tasks)):
        for person, ((*actions, _), boxes) in enumerate(zip(scene["things"], drawn)):
            box = boxes[int(DEMO_KEYFRAME * DEMO_FPS)]
            shifted = box + rng.normal(0, 0.01, 4)
            for action in actions:  # shape and motion: a person does two things
                keyframe = path.stem, DEMO_KEYFRAME
                number = DEMO_ACTIONS.index(action) + 1
                truth.append([*keyframe, *box.clip(0, 1), number, person])
                detected.append([*keyframe, *shifted.clip(0, 1), number, 0.9])
    notes = folder / "annotations"
    write_csv(notes / f"ava_{split}_v2.2.csv", truth)
    write_csv(notes / f"ava_detection_{split}_boxes_and_labels.csv", detected)
    item = 'item {{\n  name: "{}"\n  id: {}\n}}\n'
    entries = [item.format(name, number) for number, name in enumerate(DEMO_ACTIONS, 1)]
    (notes / "ava_action_list_v2.2_for_activitynet_2019.pbtxt").write_text("".join(entries))


def write_csv(path, rows):
    with atomic_write(path) as tmp, open(tmp, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_png(path, picture):
    """Write a picture, uint8 (3, H, W)."""
    with atomic_write(path) as tmp:  # torchvision's write_png would not notice a full disk
        tmp.write_bytes(encode_png(picture).numpy().tobytes())


def write_video(path, frames, fps, crf=18):
    """Write frames, uint8 (T, H, W, 3), as H.264, cropped to even height and width."""
    height, width = (n // 2 * 2 for n in frames.shape[1:3])
    frames = np.ascontiguousarray(frames[:, :height, :width])
    file = io.BytesIO()  # a full disk would pass unnoticed
    with av.open(file, "w", format="mp4") as container:
        # ultrafast looks ahead at nothing: with lookahead, the same frames gave different files
        options = {"crf": str(crf), "preset": "ultrafast"}
        size = dict(height=height, width=width)
        stream = container.add_stream("libx264", fps, options, thread_count=1, **size)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    with atomic_write(path) as tmp:
        tmp.write_bytes(file.getvalue())
