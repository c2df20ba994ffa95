"""Stage 3: fine-tune an encoder to detect what each person does at a second of a movie, on AVA.

    python finetune_ava.py --dataset demo --init runs/mae_pretrain_demo_vit_demo/checkpoint.pt
    torchrun --nproc_per_node 8 finetune_ava.py --init CHECKPOINT        ViT-L, Table 6a
    torchrun --nproc_per_node 8 finetune_ava.py --eval --test_crop full --init DETECTOR
    python finetune_ava.py --predict a.mp4 --boxes a.csv --init DETECTOR
    python finetune_ava.py --score DETECTIONS.csv --ground_truth GT.csv --action_list LIST.pbtxt

CHECKPOINT is a pre-trained encoder or, as in Table 8, one that was fine-tuned on Kinetics; Table 8
also has --rel_pos. Batches count keyframes: clips of 16 frames, 4/30 s apart, around an annotated
second. Training boxes are true ones plus detections that score 0.8 or more; test boxes are
detections only. ViT-L, pre-trained and fine-tuned on Kinetics-400, with relative positions,
reaches 35.9 % mAP on center crops and 36.8 % on full frames (Table 8).
"""

import contextlib
import glob
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

# Before torch: model.py sets how its threads wait.
from model import RUN_FLAGS, SIZES, STOPPED, Detector, InputError, Run, autocast, bounded
from model import cosine_decay, count_flops, distribute, fraction, load_pretrained, make_optimizer
from model import make_parser, make_plan, on_rank0, parse_with_recipe, positive_int, print_plan
from model import rank, rate, read_checkpoint, resume, run_main, start_process, switch, world_size
from model import write_json
from data import FPS, Batches, TestDataset, TrainDataset, Video, VideoError, files_below, make_demo
from data import read_entries, report_failures, run_test, stateless_seed, to_clip, upright_size
from data import write_csv, write_png

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.ops import box_iou
from torchvision.utils import draw_bounding_boxes

AVA = dict(  # Table 6a: AVA fine-tuning. Keys are flags, comments the table's words
    optimizer="sgd",  # optimizer: SGD
    weight_decay=1e-8,  # weight decay
    lr={"vit_l": 7.2, "vit_h": 4.8},  # learning rate; its schedule: cosine decay
    warmup_epochs=5,  # warmup epochs
    epochs=30,  # epochs
    batch_size=128,  # batch size
    drop_path=0.2,  # drop path
    dropout=0.5,  # dropout
    layer_decay={"vit_l": 0.75, "vit_h": 0.85},  # layer-wise decay
    # Not in the table: keyframes that a GPU of 80 GB takes at once.
    micro_batch={"vit_b": 32, "vit_l": 16, "vit_h": 8},
)
DEMO = AVA | dict(  # vit_demo, minutes on two CPU cores: too few steps for SGD
    optimizer="adamw",
    betas=[0.9, 0.999],
    weight_decay=0.05,
    lr=8e-3,
    warmup_epochs=2,
    epochs=60,
    batch_size=8,
    micro_batch=None,  # all of them
    drop_path=0.2,
    dropout=0.0,
    layer_decay=0.45,
    test_crop="full",
    img_size=48,
    precision="fp32",  # matrices this small are slower in bf16
)
MAY_DIFFER = RUN_FLAGS | {  # on resume
    "dataset", "data", "videos", "video_start", "test_crop", "test_size", "boxes", "ground_truth",
    "excluded", "action_list",
}  # fmt: skip

AVA_CLASSES = 80  # actions, numbered from 1; 60 of them are evaluated
AVA_FILES = {  # official names; of several matches the last counts, by name, then by path
    "ground_truth": "**/ava_{split}_v2.?.csv",
    "excluded": "**/ava_{split}_excluded_timestamps_v2.?.csv",
    "boxes": "**/ava_detection_{split}_boxes*.csv",
    "action_list": "**/ava_action_list_v2.?_for_activitynet_*.pbtxt",
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


def recipe_of(args):
    return DEMO if args.model == "vit_demo" else AVA


def parse_args(argv=None):
    parser = make_parser(__doc__, AVA_LAYOUT)
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--drop_path", type=rate, help="stochastic depth rate of the last block")
    add("--dropout", type=rate, help="before the head")
    add("--layer_decay", type=fraction, help="layer-wise lr decay; 0 trains the head only")
    add("--rel_pos", action=switch, default=False, help="relative positions (Table 8)")
    add("--detection_threshold", type=fraction, default=0.8, help="drop boxes with lower scores")
    add(
        "--video_start",
        type=float,
        help="second at which files begin; by default 0, or 900 for frames",
    )
    add("--allow_missing", action="store_true", help="skip missing movies, and do not score them")
    add = parser.add_argument_group("test").add_argument
    add(
        "--test_crop",
        choices=("center", "full"),
        default="center",
        help="part of a frame (Table 8)",
    )
    add("--test_size", type=positive_int, help="short side in pixels; by default --img_size")
    add("--eval", action="store_true", help="test the detector in --init")
    add("--predict", metavar="VIDEO", help="say and draw what the people in --boxes do")
    add("--score", metavar="CSV", help="score detections by AVA's protocol; needs no model")
    add(
        "--boxes",
        metavar="CSV",
        help="to predict on: video,second of the file,x1,y1,x2,y2; to test on: the data set's",
    )
    add("--ground_truth", metavar="CSV", help="to score against; by default the data set's")
    add("--action_list", metavar="PBTXT", help="actions that count; by default the data set's")
    add("--excluded", metavar="CSV", help="seconds that do not count; by default the data set's")
    return parse_with_recipe(parser, "finetune_ava", "ava", recipe_of, argv)


def model_config(args):
    """The keywords of model.Detector."""
    return SIZES[args.model] | dict(
        img_size=args.img_size,
        num_frames=args.num_frames,
        num_classes=AVA_CLASSES,
        drop_path=args.drop_path,
        dropout=args.dropout,
        rel_pos=args.rel_pos,
        grad_checkpointing=args.grad_checkpointing,
    )


# ----------------------------------------------------------------------------- AVA's annotations


def find_file(args, split, what, needed=True):
    """The path of a split's annotation file; os.devnull if there is none and none is needed.

    what: a key of AVA_FILES. For val, the flag of that name comes first.
    """
    if split == "val" and vars(args)[what]:
        return vars(args)[what]
    folder = Path(args.data, "annotations")
    pattern = AVA_FILES[what].format(split=split)
    found = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
    if not found and needed:
        raise InputError(f"{args.data}: no {what} of {split} in it; expected\n{AVA_LAYOUT}")
    found.sort(key=os.path.basename)
    if len(found) > 1:
        print(f"{folder}: {what} of {split}: {found[-1]}, the last of {len(found)} files")
    return folder / found[-1] if found else os.devnull


finite = bounded(float, -1e18)  # a number, not nan or infinite
action_number = bounded(int, 1, AVA_CLASSES)


def read_boxes(file, proposals=False, threshold=-math.inf, excluded=()):
    """Read boxes: {(video, second): array (R, 6) of x1, y1, x2, y2, action, score}, as in the file.

    Rows are video,second,x1,y1,x2,y2,action,score, with boxes as shares of the frame; true boxes
    have a person in the place of a score. proposals: detected boxes, to train or predict on, whose
    action may be empty or -1 (then 0), or missing with the score (then 1).
    Rows with lower scores than the threshold and those of excluded (video, second) are left out.
    Raises InputError with file and line.
    """

    def convert(row):
        if proposals and len(row) == 6:
            row = row + ["", "1"]
        video, second, *box, action, score = row
        x1, y1, x2, y2 = map(float, box)
        thin = 1e-5  # thinner boxes are empty when they are written with six digits
        if not (-1 < x1 < x2 - thin < 2 and -1 < y1 < y2 - thin < 2):
            raise ValueError("not a box; expected x1 < x2 and y1 < y2, as shares of the frame")
        action = 0 if proposals and action in ("", "-1") else action_number(action)
        return (video.strip(), finite(second)), (x1, y1, x2, y2, action, finite(score))

    boxes = {}
    expected = "video,second,x1,y1,x2,y2,action,score (or person)"
    for key, values in read_entries(file, convert, expected):
        if key not in excluded and values[-1] >= threshold:
            boxes.setdefault(key, []).append(values)
    return {key: np.array(rows) for key, rows in boxes.items()}


def read_excluded(file):
    """Read the seconds that are not evaluated: a set of (video, second)."""

    def convert(row):
        video, second = row
        return video.strip(), finite(second)

    return set(read_entries(file, convert, "video,second"))


def read_action_list(file):
    """Read a list of actions in either form it is distributed in: {number: name}."""

    def convert(entry):
        ((name, number),) = re.findall(r'name:\s*"(.*?)"\s*(?:label_)?id:\s*(-?\d+)', entry)
        return action_number(number), name

    expected = 'entries like item { name: "walk" id: 14 }'
    items = re.compile(r"(?:item|label)\s*\{([^}]*)\}").findall
    actions = dict(read_entries(file, convert, expected, items, "item"))
    if not actions:
        raise InputError(f"{file}: no action list; expected {expected}")
    return actions


def find_movies(args, names):
    """The movies with these names: {video: path of its file, or of the folder with its frames}.

    Raises InputError if one is missing, unless --allow_missing: then it is reported and left out.
    """
    folders = [Path(args.data, name) for name in ("videos", "frames")]
    folder = Path(args.videos or next(filter(Path.is_dir, folders), args.data))
    movies = {Path(path).stem: folder / path for path in files_below(folder)}
    movies |= {path.name: path for path in folder.glob("*") if path.is_dir()}
    if missing := sorted(names - movies.keys()):
        text = f"{len(missing)} of {len(names)} movies are not below {folder}: {missing[0]}, ..."
        if not args.allow_missing:
            raise InputError(f"{text}; --videos says where they are, --allow_missing skips them")
        print(text)
    return {name: str(movies[name]) for name in names & movies.keys()}


def read_ground_truth(args):
    """What a test is scored against: true boxes, actions that count, and excluded seconds."""
    excluded = read_excluded(find_file(args, "val", "excluded", needed=False))
    truth = read_boxes(find_file(args, "val", "ground_truth"), excluded=excluded)
    actions = read_action_list(find_file(args, "val", "action_list"))
    if args.allow_missing:  # what happens in missing movies must not count as missed
        movies = find_movies(args, {video for video, _ in truth})
        truth = {key: rows for key, rows in truth.items() if key[0] in movies}
    return truth, actions, excluded


def read_keyframes(args, split):
    """The Keyframes of a split: true and detected boxes to train on, detected ones to test on.

    Those that are excluded or of missing movies are left out and counted.
    """
    train = split == "train"
    excluded = read_excluded(find_file(args, split, "excluded", needed=False))
    source = find_file(args, split, "boxes", needed=not train)
    boxes = read_boxes(source, proposals=True, threshold=args.detection_threshold)
    if train:  # keyframes of the ground truth, or detected
        if boxes and not any(rows[:, 4].any() for rows in boxes.values()):
            raise InputError(f"{source}: boxes without actions cannot be trained on")
        source = find_file(args, split, "ground_truth")
        for key, rows in read_boxes(source).items():
            boxes[key] = np.concatenate([rows, boxes.get(key, rows[:0])])
    movies = find_movies(args, {video for video, _ in boxes})
    kept = {key: boxes[key] for key in sorted(boxes.keys() - excluded) if key[0] in movies}
    if out := len(boxes) - len(kept):
        print(f"{source}: keyframes left out, excluded or of missing movies: {out}")
    if not kept:
        raise InputError(f"{source}: no keyframe is left, or no box reaches --detection_threshold")
    return Keyframes(str(source), kept, movies, args.video_start)


# --------------------------------------------------------------------------- keyframes and clips


@dataclass
class Keyframes:
    """Annotated seconds of movies, with their person boxes: what AVA trains and tests on."""

    source: str  # the file they are from
    rows: dict  # {(video, second): (R, 6)}, as from read_boxes
    movies: dict  # {video: path}
    video_start: float  # the second that files begin with; None: 0, or 900 for a folder of frames
    unit = "keyframes"

    def __post_init__(self):
        self.keys = list(self.rows)

    def __len__(self):
        return len(self.keys)

    def name(self, index):
        video, second = self.keys[index]
        return f"{self.movies[video]}, second {second:g}"

    def boxes(self, index):
        """A keyframe's boxes (K, 4), shares of the frame, and their actions (K, 80), 0 or 1."""
        rows = self.rows[self.keys[index]]  # one for each action of each box
        boxes, box_of_row = np.unique(rows[:, :4], axis=0, return_inverse=True)
        actions = torch.zeros(len(boxes), 1 + AVA_CLASSES)  # column 0: no action
        actions[box_of_row.reshape(-1), rows[:, 4].astype(int)] = 1
        return boxes, actions[:, 1:]

    def frames(self, index, num_frames, sampling_rate):
        """A clip with the keyframe at num_frames // 2; beyond the movie's ends, its end frames."""
        video, second = self.keys[index]
        path = self.movies[video]
        is_folder = os.path.isdir(path)
        start = 900 * is_folder if self.video_start is None else self.video_start
        with contextlib.nullcontext(FrameFolder(path)) if is_folder else Video(path) as movie:
            if not 0 <= second - start <= movie.duration:
                raise VideoError(
                    f"has no second {second:g}: it holds {start:g} to {start + movie.duration:g}; "
                    "--video_start says at which second files begin: 900 for cuts of 15 minutes"
                )
            offsets = (np.arange(num_frames) - num_frames // 2) * sampling_rate / FPS
            return movie.frames(second - start + offsets)


class FrameFolder:
    """A folder of frames, from ID/ID_000001.jpg, 30 a second; duration and frames as of a Video."""

    def __init__(self, path):
        self.path = Path(path)
        self.count = sum(name.endswith(".jpg") for name in os.listdir(path))
        self.duration = self.count / FPS

    def frames(self, times):
        """The frames nearest to the given times in seconds, as Video.frames gives them."""
        frames = []
        for number in 1 + np.rint(times * FPS).astype(int).clip(0, self.count - 1):
            file = f"{self.path}/{self.path.name}_{number:06d}.jpg"
            try:
                with Video(file) as picture:
                    frames += picture.frames([0])
            except VideoError as error:
                raise VideoError(f"{file} {error}") from None
        return frames


def cut_clip(frames, boxes, crop, size, flip=False):
    """A clip, as from to_clip, and boxes moved to match: (T, h, w, 3), (K, 4) in pixels of it.

    boxes (K, 4): shares of the frame; those returned are clipped to the crop. crop: (top, left,
    height, width) in the frame; size: (height, width) of the clip.
    """
    # Even numbers: most videos store color at half the resolution.
    top, left, height, width = crop = [2 * int(n / 2) for n in crop]
    H, W = upright_size(frames[0])
    corners = (boxes.reshape(-1, 2, 2) * (W, H) - (left, top)) / (width, height)  # (K, 2, 2)
    corners = corners.clip(0, 1)  # shares of the crop
    if flip:
        corners[..., 0] = 1 - corners[:, ::-1, 0]
    boxes = (corners * size[::-1]).reshape(-1, 4)
    return to_clip(frames, size, crop, flip), torch.from_numpy(boxes).float()


class KeyframeDataset(TrainDataset):
    """Clips around keyframes to train on: short side 256 to 320, random crop of 224, flip.

    A sample has: video uint8 (1, T, H, W, 3), boxes (K, 4) in its pixels, actions (K, 80). K counts
    the boxes left in the crop; it may be 0.
    """

    def load(self, index, pass_number):
        args = self.args
        frames = self.videos.frames(index, args.num_frames, args.sampling_rate)
        generator = torch.Generator().manual_seed(stateless_seed(args.seed, pass_number, index, 0))
        scale, down, right, mirror = torch.rand(4, generator=generator).tolist()
        H, W = upright_size(frames[0])
        side = min(H, W) * 224 / (256 + (320 - 256) * scale)
        crop = (H - side) * down, (W - side) * right, side, side
        boxes, actions = self.videos.boxes(index)
        flip = args.hflip and mirror < 0.5
        clip, boxes = cut_clip(frames, boxes, crop, (args.img_size,) * 2, flip)
        inside = (boxes[:, :2] < boxes[:, 2:]).all(1)
        return {"video": clip[None], "boxes": [boxes[inside]], "actions": actions[inside]}


@dataclass
class KeyframeTestDataset(TestDataset):
    """Clips around keyframes to test on: short side --test_size; its middle square, or all of it.

    A sample has: video uint8 (1, T, H, W, 3), boxes (K, 4) in its pixels. Whole frames ("full") are
    rounded to patches. All boxes are kept: each needs scores.
    """

    patch_size: int

    def load(self, index):
        args = self.args
        clip_side = args.test_size or args.img_size
        frames = self.videos.frames(index, args.num_frames, args.sampling_rate)
        H, W = upright_size(frames[0])
        side = min(H, W)
        size = (clip_side, clip_side)
        crop = (H - side) / 2, (W - side) / 2, side, side
        if args.test_crop == "full":
            crop = (0, 0, H, W)
            patch = side / clip_side * self.patch_size  # in pixels of the frame
            size = [max(1, round(n / patch)) * self.patch_size for n in (H, W)]
        clip, boxes = cut_clip(frames, self.videos.boxes(index)[0], crop, size)
        return {"video": clip[None], "boxes": boxes}


# ----------------------------------------------------------------------------------------- train


def train(args):
    device = start_process(args)

    # ---------------------------------------------------------------- data
    keyframes, held_out = (on_rank0(read_keyframes, args, split) for split in ("train", "val"))
    # Read before training, so that an error in the ground truth is found now.
    _, action_names, _ = on_rank0(read_ground_truth, args)
    plan = make_plan(args, len(keyframes), repeat_aug=1)

    # --------------------------------------------------------------- model
    torch.manual_seed(args.seed)
    config = model_config(args)
    detector = Detector(**config)
    if args.layer_decay == 0:
        detector.freeze_encoder()
    detector.to(device)
    ddp = distribute(detector, args)

    # ---------------------------------------- optimizer, --init or resume
    optimizer = make_optimizer(args, detector, layer_decay=args.layer_decay)
    start, latest = resume(args, MAY_DIFFER, detector, optimizer, keyframes)
    flops = count_flops(Detector, config, [torch.zeros(1, 4, device="meta")])
    print_plan(args, plan, detector, keyframes, flops)

    # ---------------------------------------------------------------- loop
    batches = Batches(KeyframeDataset(keyframes, args), plan, device, start)
    with Run(args, plan, keyframes, batches, start, latest, flops) as run:
        for step in range(start, plan.steps):
            lr = cosine_decay(plan.epoch(step), args.lr, args.warmup_epochs, args.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            # loss = cross entropy summed over all boxes of the global batch / (boxes * 80): a mean
            # over boxes, not over clips, for a clip may have none.
            micro_batches = [next(batches) for _ in range(plan.micro_steps)]
            count = sum(len(batch["actions"]) for batch in micro_batches)
            num_boxes = torch.full((), count, device=device)
            if world_size() > 1:
                dist.all_reduce(num_boxes)
            loss = 0
            for micro_step, batch in enumerate(micro_batches):
                # Seeds dropout and drop path; the 0 keeps them apart from seeds of clips.
                torch.manual_seed(stateless_seed(args.seed, step, rank(), micro_step, 0))
                # With DDP: exchange gradients at the last micro-batch only.
                ddp.require_backward_grad_sync = micro_step == plan.micro_steps - 1
                with autocast(args, device):
                    logits = ddp(batch["video"], batch["boxes"]).float()  # (K, 80)
                actions = batch["actions"]
                error = F.binary_cross_entropy_with_logits(logits, actions, reduction="sum")
                # DDP averages over processes; times world_size, that is a sum.
                micro_loss = error * world_size() / (num_boxes.clamp(min=1) * AVA_CLASSES)
                micro_loss.backward()
                loss += micro_loss.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), args.clip_grad or math.inf)
            optimizer.step()
            optimizer.zero_grad()

            run.record(loss, grad_norm)
            if run.at_log_point():
                run.log(lr=lr)  # raises if the loss is not finite
            if run.save_due():
                run.save(detector, optimizer, config=config, classes=action_names)
            if run.stopping:
                break
    if run.report_end():
        return STOPPED
    test(detector, held_out, args, action_names)


# -------------------------------------------------------------------------------------- evaluate


def evaluate(args, file):
    """Evaluate a csv of detections by AVA's protocol, in %: {"mAP": ..., "per_class": {name: AP}}.

    Prints them. Mean average precision at IoU 0.5 over the actions that happen in the ground truth;
    the others have None.
    """
    truth, actions, excluded = read_ground_truth(args)
    detections = read_boxes(file, excluded=excluded)
    if detections and not detections.keys() & truth.keys():
        raise InputError(f"the detections are of other keyframes, such as {min(detections)}")
    per_class = {}
    for action, name in actions.items():
        people = {key: rows[rows[:, 4] == action] for key, rows in truth.items()}
        scores = []
        tp = []
        for key, rows in detections.items():
            rows = rows[rows[:, 4] == action]
            rows = rows[np.argsort(rows[:, 5])[::-1]]  # ties as in the official evaluator
            scores.extend(rows[:, 5])
            tp.extend(true_positives(rows, people.get(key, ())))
        positives = sum(map(len, people.values()))
        ap = average_precision(np.array(scores), np.array(tp), positives)
        per_class[name] = ap
        print("no labels" if ap is None else f"{ap:7.2f} %", name, sep="  ")
    values = [ap for ap in per_class.values() if ap is not None]
    if not values:
        raise InputError(f"the ground truth has none of the {len(actions)} actions of the list")
    print(f"mAP@0.5IOU: {sum(values) / len(values):.4f} %")
    return {"mAP": sum(values) / len(values), "per_class": per_class}


def true_positives(rows, people):
    """Which detections of an action at a keyframe, highest score first, are true positives.

    Those with IoU >= 0.5 with the true box that they overlap most, if no higher score has taken it.
    """
    tp = np.zeros(len(rows), dtype=bool)
    if len(people):
        overlap = box_iou(torch.from_numpy(rows[:, :4]), torch.from_numpy(people[:, :4])).numpy()
        hits = np.flatnonzero(overlap.max(1) >= 0.5)
        # Of several hits on a true box, the first has the highest score.
        _, first = np.unique(overlap[hits].argmax(1), return_index=True)
        tp[hits[first]] = True
    return tp


def average_precision(scores, tp, positives):
    """Area under monotonic precision over recall, in % (PASCAL VOC 2010); None if no positives."""
    if positives == 0:
        return None
    tp = tp[np.argsort(scores)[::-1]]
    precision = tp.cumsum() / np.arange(1, len(tp) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(100 * precision @ tp / positives)  # each adds 1 / positives of recall


# ------------------------------------------------------------------------------------------ test


def detect(detector, keyframes, args, actions):
    """Score the boxes of keyframes and write them to detections.csv, in AVA's format.

    actions: {number: name} of those that are written.
    Returns {index: (K, 80)}, and {index: reason} of unreadable keyframes.
    """
    device = detector.cls_token.device
    detector.eval()

    def scores_of(sample):
        logits = detector(sample["video"], [sample["boxes"].to(device)])
        return logits.float().sigmoid().cpu()  # each action has its own score

    clips = KeyframeTestDataset(keyframes, args, detector.patch_size)
    scores, failures = run_test(clips, device, scores_of)

    def rows():
        for index, values in scores.items():
            video, second = keyframes.keys[index]
            for box, value in zip(keyframes.boxes(index)[0], values.tolist()):
                start = video, f"{second:04.10g}", *(f"{x:.6g}" for x in box)
                for action in actions:
                    yield *start, action, f"{value[action - 1]:.6f}"

    if rank() == 0:
        write_csv(f"{args.output_dir}/detections.csv", rows())
    return scores, failures


def test(detector, keyframes, args, actions):
    """Score all boxes and evaluate; writes detections.csv, results.json and pictures/."""
    scores, failures = detect(detector, keyframes, args, actions)
    if rank() == 0:
        out = Path(args.output_dir)
        results = evaluate(args, out / "detections.csv")
        boxes = sum(map(len, scores.values()))
        results |= dict(
            boxes=boxes,
            keyframes=len(keyframes),
            unreadable=len(failures),
            test_crop=args.test_crop,
            test_size=args.test_size or args.img_size,
            init=args.init,
        )
        write_json(out / "results.json", results)
        print(f"{boxes} boxes at {len(keyframes)} keyframes, {args.test_crop} crop")
        shown = list(scores.items())[:: 1 + len(scores) // 4]  # at most four
        draw(keyframes, dict(shown), actions, out / "pictures")
    report_failures(args, keyframes, failures)


def draw(keyframes, scores, actions, out):
    """Print what the model says of the boxes of keyframes, and draw it, as PNG files."""
    for index, values in scores.items():
        frame = keyframes.frames(index, 1, 0)
        H, W = upright_size(frame[0])
        size = 360, round(360 * W / H)
        picture = to_clip(frame, size)[0].permute(2, 0, 1) // 2  # dark: labels can be read
        boxes, _ = keyframes.boxes(index)
        labels = [caption(value, actions) for value in values]
        for box, label in zip(boxes.round(3).tolist(), labels):
            print(f"{keyframes.name(index)}, {box}: {label}")
        boxes = torch.from_numpy(boxes * (size[::-1] * 2))
        picture = draw_bounding_boxes(picture, boxes, labels, colors="yellow", width=2)
        path = out / "{}_{:g}.png".format(*keyframes.keys[index])
        write_png(path, picture)
        print(path)


def caption(scores, actions):
    """The highest-scoring action of a person, and up to two more from 0.2 on: (80,) -> text."""
    ranked = sorted(actions, key=lambda i: -scores[i - 1])
    shown = ranked[:1] + [i for i in ranked[1:3] if scores[i - 1] >= 0.2]
    return ", ".join(f"{actions[i]} {scores[i - 1]:.2f}" for i in shown)


# ------------------------------------------------------------------------------------ prediction


def predict(detector, args, actions):
    """Print and draw what the people in --boxes do in a video, and write detections.csv."""
    video = Path(args.predict).stem
    boxes = read_boxes(args.boxes, proposals=True)
    boxes = {key: rows for key, rows in boxes.items() if key[0] == video}
    if not boxes:
        raise InputError(f"{args.boxes}: no box of {video}")
    keyframes = Keyframes(args.boxes, boxes, {video: args.predict}, video_start=0)
    scores, failures = detect(detector, keyframes, args, actions)
    draw(keyframes, scores, actions, Path(args.output_dir))
    if failures:
        reasons = "\n".join(f"{keyframes.name(i)}: {failures[i]}" for i in failures)
        raise InputError(f"{len(failures)} of {len(keyframes)} seconds cannot be read:\n{reasons}")


def main():
    args = parse_args()
    make_demo(args)
    if args.score:
        evaluate(args, args.score)
        return None
    if not (args.eval or args.predict):
        return train(args)
    if args.predict and not args.boxes:
        raise InputError("--predict needs --boxes CSV: rows of video,second,x1,y1,x2,y2 in 0..1")
    device = start_process(args)
    detector = Detector(**model_config(args)).to(device)
    load_pretrained(detector, args.init, strict=True)
    if args.eval:
        keyframes = on_rank0(read_keyframes, args, "val")
        _, actions, _ = on_rank0(read_ground_truth, args)
        return test(detector, keyframes, args, actions)
    actions = read_checkpoint(args.init).get("classes")
    if args.action_list:
        actions = read_action_list(args.action_list)
    return predict(detector, args, actions or {i: f"action {i}" for i in range(1, AVA_CLASSES + 1)})


if __name__ == "__main__":
    run_main(main)
