"""Stage 3: fine-tune an encoder to detect what each person does at a moment of a movie, on AVA, and score it.

    python finetune_ava.py --dataset demo --init runs/mae_pretrain_demo_vit_demo/checkpoint.pt
    torchrun --nproc_per_node 8 finetune_ava.py --init CHECKPOINT              Table 6a, ViT-L; --rel_pos as in Table 8
    torchrun --nproc_per_node 8 finetune_ava.py --eval --test_crop full --init runs/finetune_ava_ava_vit_l/checkpoint.pt
    python finetune_ava.py --score DETECTIONS.csv --ground_truth GT.csv --action_list LIST.pbtxt --excluded CSV
    python finetune_ava.py --predict a.mp4 --boxes a.csv --init runs/finetune_ava_demo_vit_demo/checkpoint.pt

CHECKPOINT is a pre-trained encoder or, as in Table 8, one that was fine-tuned on Kinetics. A batch counts keyframes:
clips of 16 frames, 4/30 s apart, around an annotated second. Persons are those of the ground truth and, at a score of
0.8 and more, of a detector; at the test the detector's alone. ViT-L, pre-trained and fine-tuned on Kinetics-400, with
relative positions, has 35.9 mAP on center crops and 36.8 on full frames (Table 8).
"""

import argparse
import contextlib
import csv
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import model as m

AVA = {  # Table 6a: AVA fine-tuning
    "optimizer": torch.optim.SGD,
    "weight decay": 1e-8,
    "learning rate": {"vit_l": 7.2, "vit_h": 4.8},
    "learning rate schedule": m.cosine_decay,
    "warmup epochs": 5,
    "epochs": 30,
    "batch size": 128,
    "drop path": 0.2,
    "dropout": 0.5,
    "layer-wise decay": {"vit_l": 0.75, "vit_h": 0.85},
}
DEMO = AVA | {  # vit_demo, minutes on two CPU cores: too few steps for SGD, and for much regularisation
    "optimizer": torch.optim.AdamW,
    "optimizer momentum": (0.9, 0.999),
    "weight decay": 0.05,
    "learning rate": 2e-3,
    "warmup epochs": 5,
    "epochs": 40,
    "batch size": 8,
    "drop path": 0.1,
    "dropout": 0.0,
    "layer-wise decay": 0.75,
}
MICRO_BATCH = {"vit_b": 32, "vit_l": 16, "vit_h": 8}  # keyframes that fit on a GPU of 80 GB with room to spare
IOU = 0.5  # overlap with a person, intersection over union, from which a detection counts
SHOWN = 3, 0.2  # what pictures name of a person: so many actions, of at least that score


def parse_args(argv=None):
    parser = m.make_parser(__doc__, data.AVA_LAYOUT)
    data.add_arguments(parser)
    m.add_finetuning_arguments(parser)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--dataset", help="ava; demo: small movies made here")
    add("--detection_threshold", type=float, default=0.8, help="score from which a detector's person boxes are used")
    add(
        "--video_start",
        type=float,
        help="second of a movie that its file begins with; default: 0, 900 for frames",
    )
    add("--allow_missing", action="store_true", help="go on where movies are missing: they are left out and counted")
    add("--rel_pos", action=switch, default=False, help="relative positions in every block (Table 8)")
    add("--test_crop", choices=("center", "full"),
        help="short side 256 and the middle 224 x 224, or the whole frame at short side 256")  # fmt: skip
    add("--score", metavar="CSV", help="do not train: score these detections by AVA's protocol; no model is needed")
    add("--ground_truth", metavar="CSV", help="to score against; --score needs it, otherwise default: the data set's")
    add(
        "--action_list",
        metavar="PBTXT",
        help="the actions that count; --score needs it, otherwise default: the data set's",
    )
    add("--excluded", metavar="CSV", help="time stamps that do not count; default: the data set's")
    add("--capacity", type=int, help="detections of a keyframe that count; 50 in later challenges; default: all")
    add(
        "--boxes",
        metavar="CSV",
        help="boxes to test on, default: the data set's; for --predict: video,second of the file,x1,y1,x2,y2",
    )
    add("--predict", metavar="VIDEO", help="do not train: say what the persons in --boxes do, and draw it")

    first = m.first_look(parser, argv, "ava")
    dataset, size = first.dataset, first.model
    name, table = ("the demo's recipe", DEMO) if size == "vit_demo" else ("Table 6a", AVA)
    elsewhere = first.score or first.predict or first.eval  # where there is no learning rate to miss
    recipe = m.column(name, table, size, 0 if elsewhere else first.lr)
    test_crop = "full" if dataset == "demo" else "center"
    parser.set_defaults(**m.defaults_of(recipe), repeats=1, hflip=True, test_crop=test_crop)
    args = parser.parse_args(argv)
    m.settle(args, recipe, "finetune_ava", parser, argv)
    if args.dataset == "demo" and args.video_start is None:
        args.video_start = 900
    return args, recipe


def config_of(args):
    """The arguments of model.Detector that the command line describes."""
    return m.SIZES[args.model] | dict(
        img_size=args.img_size,
        num_frames=args.num_frames,
        num_classes=data.AVA_CLASSES,
        drop_path=args.drop_path,
        dropout=args.dropout,
        rel_pos=args.rel_pos,
        checkpoint_activations=bool(args.checkpoint_activations),
    )


# ----------------------------------------------------------------------------------------------------------- data


def files_of(args, split):
    """The files of a split: the data set's, or those that are given for the test."""
    given = {
        "ground truth": args.ground_truth,
        "excluded time stamps": args.excluded,
        "person boxes": args.boxes,
        "action list": args.action_list,
    }
    given = {what: path for what, path in given.items() if path and split == "val"}
    files = data.find_ava(args.data, split) | given
    for what in ("ground truth", "action list") + (("person boxes",) if split == "val" else ()):
        if not files[what]:
            raise m.InputError(f"{args.data}: no {what} of {split} in it; expected\n{data.AVA_LAYOUT}")
    return files


def person_boxes(file, threshold):
    """A detector's boxes that are sure enough. Raises InputError where none are."""
    rows = data.read_boxes(file, scored=True)
    sure = rows.score >= threshold
    if not sure.any():
        raise m.InputError(f"{file}: no box of score {threshold:g} or more; see --detection_threshold")
    return rows.only(sure)


def movies_folder(args):
    """Where the movies, or their frames, are: --videos, or as in data.AVA_LAYOUT."""
    folders = (Path(args.data) / name for name in ("videos", "frames"))
    return args.videos or next((folder for folder in folders if folder.is_dir()), args.data)


def keyframes_of(args, split):
    """The keyframes of a split; to train on: true and detected persons; to test on: detected persons alone."""
    files = files_of(args, split)
    if split == "train":
        rows = data.read_boxes(files["ground truth"], scored=False)
        if files["person boxes"]:
            detected = person_boxes(files["person boxes"], args.detection_threshold)
            if not detected.action.any():
                raise m.InputError(
                    f"{files['person boxes']}: no box in it has an action; give detected boxes with the actions of the "
                    "persons they are on, or take the file away to train on the ground truth alone"
                )
            if not set(detected.names) & set(rows.names):
                raise m.InputError(f"{files['person boxes']}: for other movies than {files['ground truth']}")
            rows = rows.join(detected)
    else:
        rows = person_boxes(files["person boxes"], args.detection_threshold)
    movies = data.find_movies(rows, movies_folder(args), args.allow_missing)
    excluded = data.read_excluded(files["excluded time stamps"]) if files["excluded time stamps"] else ()
    return data.Keyframes(rows, movies, excluded, args.video_start)


# ------------------------------------------------------------------------------------------------------- training


def train(args, recipe):
    device, rank, world = m.start_process(args)
    out = Path(args.output_dir)

    # Data
    args.data = data.locate(args, rank, "ava")
    keyframes, held_out = keyframes_of(args, "train"), keyframes_of(args, "val")
    actions = data.read_action_list(files_of(args, "val")["action list"])
    steps, micro_batch, micro_steps = m.plan(args, keyframes, world, MICRO_BATCH.get(args.model))

    # Model and optimizer, new or as the run left them
    torch.manual_seed(args.seed)
    config = config_of(args)
    detector = m.Detector(**config)
    optimizer, start = m.prepare(detector, recipe, args, device, keyframes, args.layer_decay)
    ddp = m.parallel(detector, args, device, world)
    autocast = m.autocast_of(args, device)
    m.announce(args, detector, keyframes, device, world, steps, micro_batch)

    clips = data.KeyframeClips(keyframes, args)
    stream = data.Stream(len(keyframes), args.batch_size, micro_batch, rank, world, args.seed, start, steps)
    batches = data.each(data.make_loader(clips, stream, args, device))
    failures = data.Failures(out / "failures.log", keyframes, args.max_failures, start > 0)
    log = m.Log(args, start, steps, keyframes, failures)

    detector.train()
    for step in range(start, steps):
        lr = recipe["learning rate schedule"](log.epoch(step), args.lr, args.warmup_epochs, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # The loss is the mean over all boxes of the global batch: clips have different numbers of them, or none.
        micro_batches = [log.next(batches) for _ in range(micro_steps)]
        persons = torch.tensor(float(sum(len(batch["boxes"]) for batch in micro_batches)), device=device)
        if world > 1:
            dist.all_reduce(persons)
        loss = torch.zeros((), device=device)
        for micro_step, batch in enumerate(micro_batches):
            torch.manual_seed(data.stateless_seed(args.seed, step, rank, micro_step))  # of dropout and drop path
            video, boxes, target = (batch[k].to(device, non_blocking=True) for k in ("video", "boxes", "actions"))
            last = micro_step == micro_steps - 1  # only then do the processes exchange gradients
            with contextlib.nullcontext() if last or world == 1 else ddp.no_sync():
                with autocast():
                    logits = ddp(video, boxes)  # (K, 80)
                error = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="sum")
                micro_loss = error * world / (persons.clamp(min=1) * data.AVA_CLASSES)  # DDP averages over processes
                micro_loss.backward()
            loss += micro_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(detector.parameters(), args.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad()

        if log.step(loss, norm, lr=lr):
            log.save(detector, optimizer, config=config, actions=actions)
    log.close()
    batches.close()  # its workers
    test(detector, held_out, actions, args, device, rank, world)
    print(f"{out}: checkpoint.pt, log.jsonl, args.json, results.json, detections.csv, pictures/")
    print(f"next: python finetune_ava.py --predict VIDEO --boxes CSV --init {out / 'checkpoint.pt'}")


# ----------------------------------------------------------------------------------------------------- the figure


def average_precisions(truth, detections, actions, excluded=(), capacity=None):
    """Average precision of each action at IoU 0.5 by AVA's official protocol: {action: AP, nan where it never happens}.

    truth, detections: data.BoxRows. Going down in score, a detection is right if the person of its action that it
    overlaps most does so by half and was not found before; on a keyframe without ground truth it is wrong. AP is the
    area under precision, made monotonous, over recall (PASCAL VOC 2010). capacity: of a keyframe so many of the surest
    detections count; None, as in the paper: all.
    """
    numbers = {name: i for i, name in enumerate(truth.names)}
    video = np.array([numbers.setdefault(name, len(numbers)) for name in detections.names], dtype=int)
    banned = [numbers[name] * 1e6 + second for name, second in excluded if name in numbers]
    counted = list(actions)
    t_frame, d_frame = truth.video * 1e6 + truth.time, video[detections.video] * 1e6 + detections.time
    t_rows = np.flatnonzero(np.isin(truth.action, counted) & ~np.isin(t_frame, banned))
    d_rows = np.flatnonzero(np.isin(detections.action, counted) & ~np.isin(d_frame, banned))
    if capacity is not None:
        d_rows = d_rows[np.lexsort((-detections.score[d_rows], d_frame[d_rows]))]  # by keyframe, the surest first
        _, first, count = np.unique(d_frame[d_rows], return_index=True, return_counts=True)
        d_rows = d_rows[np.arange(len(d_rows)) - np.repeat(first, count) < capacity]

    result = {}
    for action in counted:
        t = t_rows[truth.action[t_rows] == action]
        d = d_rows[detections.action[d_rows] == action]
        t, d = t[np.argsort(t_frame[t], kind="stable")], d[np.argsort(-detections.score[d], kind="stable")]
        start, end = (np.searchsorted(t_frame[t], d_frame[d], side) for side in ("left", "right"))
        best, person = np.zeros(len(d)), np.full(len(d), -1)
        for i in range((end - start).max(initial=0)):  # the i-th person of the action in each keyframe
            there = np.flatnonzero(start + i < end)
            overlap = iou(detections.box[d[there]], truth.box[t[start[there] + i]])
            better = overlap > best[there]
            best[there[better]], person[there[better]] = overlap[better], start[there[better]] + i
        hits = np.flatnonzero(best >= IOU)
        right = np.zeros(len(d), dtype=bool)
        right[hits[np.unique(person[hits], return_index=True)[1]]] = True  # the surest on each person
        result[action] = area_under(right, len(t)) if len(t) else math.nan
    return result


def iou(a, b):
    """Intersection over union of pairs of boxes: (K, 4), (K, 4) -> (K,)."""
    size = (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(0)
    both = size.prod(1)
    return both / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - both)


def area_under(right, positives):
    """Area under precision over recall; right (D,): whether each detection is, the surest first."""
    found = right.cumsum()
    recall = np.concatenate([[0], found / positives, [1]])
    precision = np.concatenate([[0], found / np.arange(1, len(right) + 1), [0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(((recall[1:] - recall[:-1]) * precision[1:]).sum())


def score(file, ground_truth, actions, excluded=None, capacity=None, without=()):
    """Score a csv of detections: prints each action's AP, and the mAP; returns {"mAP": ..., "per_class": {name: AP}}.

    without: movies whose ground truth does not count.
    """
    truth, detections = data.read_boxes(ground_truth, scored=False), data.read_boxes(file, scored=True)
    if without:
        truth = truth.only(~np.isin(truth.video, [truth.names.index(name) for name in without if name in truth.names]))
    if not len(detections.score):
        print(f"warning: {file} holds no detections")
    elif not set(detections.names) & set(truth.names):
        raise m.InputError(f"{file}: for other movies ({detections.names[0]}, ...) than {ground_truth}")
    excluded = data.read_excluded(excluded) if excluded else ()
    per_class = {actions[i]: ap for i, ap in average_precisions(truth, detections, actions, excluded, capacity).items()}
    values = [ap for ap in per_class.values() if not math.isnan(ap)]
    if not values:
        raise m.InputError(f"{ground_truth}: none of the {len(actions)} actions that count happens in it")
    for name, ap in per_class.items():
        print(f"{'not there' if math.isnan(ap) else f'{ap:9.6f}'}  {name}")
    mean = sum(values) / len(values)
    print(f"mAP@0.5IOU: {mean:.6f}")
    return {"mAP": mean, "per_class": {n: None if math.isnan(ap) else ap for n, ap in per_class.items()}}


# ----------------------------------------------------------------------------------------------------------- test


@torch.no_grad()
def scores_of(detector, sample, device, autocast):
    """The scores of the boxes of one clip: a sample of data.KeyframeViews -> (K, 80) on the CPU."""
    with autocast():
        logits = detector(sample["video"].permute(3, 0, 1, 2)[None].to(device), [sample["boxes"].to(device)])
    return logits.float().sigmoid().cpu()


def detect(detector, keyframes, args, device, rank, world):
    """Scores of every box of every keyframe, each once, whatever the number of processes.

    Returns {index: (K, 80)}, [(index, reason)] of keyframes that cannot be read.
    """
    detector.eval()
    views, autocast = data.KeyframeViews(keyframes, args, detector.patch_size), m.autocast_of(args, device)
    return data.each_once(views, args, rank, world, lambda sample: scores_of(detector, sample, device, autocast))


def write_detections(path, keyframes, scores, actions):
    """Write detections in the challenge's format: video, time stamp, x1, y1, x2, y2, action, score."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        for index, values in scores.items():
            movie, second = keyframes.moments[index]
            second = f"{int(second):04d}" if second == int(second) else f"{second:.10g}"
            for box, value in zip(keyframes.boxes[keyframes.rows(index)].tolist(), values.tolist()):
                box = [f"{x:.6g}" for x in box]
                rows.writerows([keyframes.names[int(movie)], second, *box, i, f"{value[i - 1]:.6f}"] for i in actions)


def test(detector, keyframes, actions, args, device, rank, world):
    """Detect at every keyframe and score it: detections.csv, results.json and pictures/ in the run's folder."""
    scores, failures = detect(detector, keyframes, args, device, rank, world)
    if rank > 0:
        return None
    for index, reason in failures:
        print(f"its persons count as missed: {keyframes.name(index)}: {reason}")
    out, files = Path(args.output_dir), files_of(args, "val")
    out.mkdir(parents=True, exist_ok=True)
    write_detections(out / "detections.csv", keyframes, scores, actions)
    truth, excluded, missing = files["ground truth"], files["excluded time stamps"], set()
    if args.allow_missing:  # also those that no detection names: what happens in them cannot count as missed
        rows = data.read_boxes(truth, scored=False)
        missing = set(rows.names) - set(data.find_movies(rows, movies_folder(args), True))
    results = score(out / "detections.csv", truth, actions, excluded, args.capacity, missing)
    boxes = sum(map(len, scores.values()))
    results |= dict(boxes=boxes, keyframes=len(keyframes), unreadable=len(failures), movies_missing=len(missing))
    results |= dict(test_crop=args.test_crop, init=args.init)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"{boxes} boxes at {len(keyframes)} keyframes, {args.test_crop} crop")
    shown = list(scores)[:: max(1, len(scores) // 4)][:4]
    draw(keyframes, {index: scores[index] for index in shown}, actions, args, out / "pictures")
    return results


def restore(args):
    """The detector in --init and the names of its actions or None; clips will be as it was trained to see them."""
    seen = "num_frames", "sampling_rate", "img_size", "test_crop", "precision"
    detector, checkpoint = m.restore(args, m.Detector, config_of, seen)
    return detector, checkpoint.get("actions")


def evaluate(args):
    device, rank, world = m.start_process(args)
    args.data = data.locate(args, rank, "ava")
    detector, _ = restore(args)
    keyframes = keyframes_of(args, "val")
    actions = data.read_action_list(files_of(args, "val")["action list"])
    test(detector.to(device), keyframes, actions, args, device, rank, world)


def predict(args):
    device, _, _ = m.start_process(args)
    if not args.boxes:
        raise m.InputError("--predict needs --boxes CSV: rows of video,second,x1,y1,x2,y2, as shares of the frame")
    detector, actions = restore(args)
    actions = data.read_action_list(args.action_list) if args.action_list else actions
    actions = actions or {i: f"action {i}" for i in range(1, data.AVA_CLASSES + 1)}
    rows, name = data.read_boxes(args.boxes, scored=True, plain=True), Path(args.predict).stem
    if name not in rows.names:
        raise m.InputError(f"{args.boxes}: no box of {name}; it has boxes of {', '.join(rows.names[:5]) or 'nothing'}")
    if not Path(args.predict).exists():
        raise m.InputError(f"{args.predict}: no such file")
    rows = rows.only(rows.video == rows.names.index(name))
    keyframes = data.Keyframes(rows, {name: args.predict}, (), args.video_start, (-math.inf, math.inf))
    scores, failures = detect(detector.to(device), keyframes, args, device, 0, 1)
    out = Path(args.output_dir) / "predict"
    out.mkdir(parents=True, exist_ok=True)
    for index, reason in failures:
        print(f"{keyframes.name(index)}: {reason}")
    for index, values in scores.items():
        for box, text in zip(keyframes.boxes[keyframes.rows(index)], captions(values, actions)):
            print(f"{keyframes.name(index)}, {','.join(f'{x:.3f}' for x in box)}: {', '.join(text)}")
    write_detections(out / "detections.csv", keyframes, scores, actions)
    draw(keyframes, scores, actions, args, out)
    print(f"{out / 'detections.csv'}: {sum(map(len, scores.values()))} boxes")
    if failures:
        raise m.InputError(f"{args.predict}: {len(failures)} of {len(keyframes)} moments cannot be read")


# ------------------------------------------------------------------------------------------------------- pictures


def captions(scores, actions):
    """What to call each person: (K, 80) -> K lists of texts, the likeliest actions first, always at least one."""
    most, least = SHOWN
    texts = []
    for values in scores.tolist():
        ranked = sorted(((values[i - 1], name) for i, name in actions.items()), reverse=True)[:most]
        texts.append([f"{name} {value:.2f}" for i, (value, name) in enumerate(ranked) if i == 0 or value >= least])
    return texts


def draw(keyframes, scores, actions, args, out):
    """Draw boxes and what their persons do, for each index in `scores`: the keyframe as a PNG, its clip as H.264."""
    out.mkdir(parents=True, exist_ok=True)
    font = ImageFont.load_default(13)
    for index, values in scores.items():
        frames = keyframes.frames(index, args.num_frames, args.sampling_rate)
        H, W = data.upright_size(frames[0])
        size = 360, 2 * round(180 * W / H)
        pictures = []
        for frame in data.to_clip(frames, size):
            picture = Image.fromarray(frame.numpy())
            pen = ImageDraw.Draw(picture)
            for box, lines in zip(keyframes.boxes[keyframes.rows(index)], captions(values, actions)):
                x1, y1, x2, y2 = (box * (size[1], size[0], size[1], size[0])).tolist()
                pen.rectangle((x1, y1, x2, y2), outline="yellow", width=2)
                at = max(0, x1), max(0, min(y1 - 15 * len(lines) - 2, size[0] - 15 * len(lines)))
                pen.rectangle(pen.multiline_textbbox(at, "\n".join(lines), font, spacing=2), fill="black")
                pen.multiline_text(at, "\n".join(lines), "yellow", font, spacing=2)
            pictures.append(np.asarray(picture))
        movie, second = keyframes.moments[index]
        name = out / f"{keyframes.names[int(movie)]}_{second:.10g}"
        Image.fromarray(pictures[args.num_frames // 2]).save(f"{name}.png")
        data.write_video(f"{name}.mp4", np.stack(pictures), Fraction(data.FPS, max(1, args.sampling_rate)))
        print(f"{name}.png, {name}.mp4")


def main():
    args, recipe = parse_args()
    if args.score:
        if not args.ground_truth or not args.action_list:
            raise m.InputError("--score needs --ground_truth CSV and --action_list PBTXT")
        score(args.score, args.ground_truth, data.read_action_list(args.action_list), args.excluded, args.capacity)
    elif args.predict:
        predict(args)
    elif args.eval:
        evaluate(args)
    else:
        train(args, recipe)


if __name__ == "__main__":
    m.run_stage(main)
