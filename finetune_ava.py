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
reaches 35.9 mAP on center crops and 36.8 on full frames (Table 8).
"""

import argparse
import csv
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.io import write_png
from torchvision.ops import box_iou
from torchvision.utils import draw_bounding_boxes

import data
from data import AVA_CLASSES, Batches, KeyframeDataset, Keyframes, KeyframeTestDataset
from model import (
    RANK,
    RUN_FLAGS,
    SIZES,
    STOPPED,
    WORLD,
    Detector,
    InputError,
    Run,
    autocast,
    compile_blocks,
    cosine_decay,
    count_flops,
    fraction,
    load_for_use,
    make_optimizer,
    make_parser,
    on_rank0,
    parameter_groups,
    parse_twice,
    positive_int,
    print_plan,
    print_rank0,
    resume,
    run_main,
    split_batch,
    start_from_sines,
    start_process,
)

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
)
DEMO = AVA | dict(  # vit_demo, minutes on two CPU cores: too few steps for SGD
    optimizer="adamw",
    betas=[0.9, 0.999],
    weight_decay=0.05,
    lr=2e-3,
    epochs=40,
    batch_size=8,
    drop_path=0.1,
    dropout=0.0,
    layer_decay=0.75,
    test_crop="full",
    img_size=32,
    precision="fp32",  # matrices this small are slower in bf16
    sine_positions=True,
)
MICRO_BATCH = {"vit_b": 32, "vit_l": 16, "vit_h": 8}  # keyframes that fit on a GPU of 80 GB
TEST_FLAGS = {"test_crop", "test_size", "boxes", "ground_truth", "excluded", "action_list"}
MAY_DIFFER = RUN_FLAGS | TEST_FLAGS | {"data", "videos", "video_start"}  # on resume


def recipe_of(args):
    return DEMO if args.model == "vit_demo" else AVA


def parse_args(argv=None):
    parser = make_parser(__doc__, data.AVA_LAYOUT)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--drop_path", type=fraction, help="stochastic depth rate of the last block")
    add("--dropout", type=fraction, help="before the head")
    add("--layer_decay", type=fraction, help="layer-wise lr decay; 0 trains the head only")
    add("--rel_pos", action=switch, default=False, help="relative positions (Table 8)")
    add("--detection_threshold", type=float, default=0.8, help="drop boxes with lower scores")
    add("--video_start", type=float, help="second at which files begin; None: 0, or 900 for frames")
    add("--allow_missing", action="store_true", help="skip missing movies, and do not score them")
    add = parser.add_argument_group("test").add_argument
    add(
        "--test_crop",
        choices=("center", "full"),
        default="center",
        help="part of a frame (Table 8)",
    )
    add("--test_size", type=positive_int, help="short side in pixels; None: --img_size")
    add("--eval", action="store_true", help="test the detector in --init")
    add("--predict", metavar="VIDEO", help="say and draw what the people in --boxes do")
    add("--score", metavar="CSV", help="score detections by AVA's protocol; needs no model")
    help = "to test on, None: the data set's; to predict on: video,second of the file,x1,y1,x2,y2"
    add("--boxes", metavar="CSV", help=help)
    add("--ground_truth", metavar="CSV", help="to score against; None: the data set's")
    add("--action_list", metavar="PBTXT", help="actions that count; None: the data set's")
    add("--excluded", metavar="CSV", help="seconds that do not count; None: the data set's")
    parser.set_defaults(repeat_aug=1, actions=None)
    args = parse_twice(parser, "finetune_ava", "ava", recipe_of, argv)
    if args.dataset == "demo" and args.video_start is None:
        args.video_start = 900
    return args


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


def train(args):
    device = start_process(args)

    # ---------------------------------------------------------------- data
    data.locate_data(args, "ava")
    keyframes, held_out = (on_rank0(data.read_keyframes, args, split) for split in ("train", "val"))
    args.actions = data.read_action_list(data.find_ava(args, "val")["action_list"])
    steps, micro_steps = split_batch(args, len(keyframes), device, MICRO_BATCH)

    # --------------------------------------------------------------- model
    torch.manual_seed(args.seed)
    config = model_config(args)
    detector = Detector(**config)
    if args.sine_positions:
        start_from_sines(detector)
    if args.layer_decay == 0:
        detector.freeze_encoder()
    detector.to(device).train()
    if args.compile:
        compile_blocks(detector)
    ddp = DistributedDataParallel(detector, broadcast_buffers=False) if WORLD > 1 else detector

    # ------------------------------------------------ optimizer and resume
    groups = parameter_groups(detector, args.weight_decay, args.layer_decay)
    optimizer = make_optimizer(args, groups)
    start = resume(args, MAY_DIFFER, detector, optimizer, keyframes)
    flops = count_flops(Detector, config, [torch.zeros(1, 4, device="meta")])
    print_plan(args, detector, keyframes, steps, flops)

    # ---------------------------------------------------------------- loop
    batches = Batches(KeyframeDataset(keyframes, args), device, start, steps)
    with Run(args, keyframes, batches, start, steps, flops) as run:
        for step in range(start, steps):
            lr = cosine_decay(run.epoch(step), args.lr, args.warmup_epochs, args.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            # The loss is a mean over the boxes of the global batch: a clip may have none.
            micro_batches = [next(batches) for _ in range(micro_steps)]
            count = sum(len(boxes) for batch in micro_batches for boxes in batch["boxes"])
            num_boxes = torch.full((), float(count), device=device)
            if WORLD > 1:
                dist.all_reduce(num_boxes)
            loss = torch.zeros((), device=device)
            for micro_step, batch in enumerate(micro_batches):
                # Seeds dropout and drop path. Five numbers: clips are seeded by four.
                torch.manual_seed(data.stateless_seed(args.seed, step, RANK, micro_step, 0))
                # DDP exchanges gradients at the last micro-batch only, and averages over processes;
                # WORLD (below) turns that into a sum.
                ddp.require_backward_grad_sync = micro_step == micro_steps - 1
                with autocast(args, device):
                    logits = ddp(batch["video"], batch["boxes"]).float()  # (K, 80)
                actions = torch.cat(batch["actions"])
                error = F.binary_cross_entropy_with_logits(logits, actions, reduction="sum")
                micro_loss = error * WORLD / (num_boxes.clamp(min=1) * AVA_CLASSES)
                micro_loss.backward()
                loss += micro_loss.detach()
            parameters = detector.parameters()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
            optimizer.step()
            optimizer.zero_grad()

            run.record(loss, grad_norm)
            if run.at_log_point():
                run.log(lr=lr)  # raises if the loss is not finite
            if run.save_due():
                run.save(detector, optimizer, config)
            if run.stopping:
                break
    if run.was_stopped():
        return STOPPED
    test(detector, held_out, args)
    print_rank0(
        f"next: python finetune_ava.py --predict VIDEO --boxes CSV --init {run.out}/checkpoint.pt"
    )


# ------------------------------------------------------------------------------------------ test


def detect(detector, keyframes, args):
    """Score the boxes of keyframes: {index: (K, 80)}, and {index: reason} of unreadable ones."""
    device = detector.cls_token.device
    detector.eval()

    @torch.no_grad()
    def scores_of(sample):
        video = sample["video"].permute(3, 0, 1, 2)[None].to(device)
        with autocast(args, device):
            logits = detector(video, [sample["boxes"].to(device)])
        return logits.float().sigmoid().cpu()  # each action has its own score

    return data.run_test(KeyframeTestDataset(keyframes, args, detector.patch_size), scores_of)


def test(detector, keyframes, args):
    """Detect at all keyframes and score; writes detections.csv, results.json and pictures/."""
    scores, failures = detect(detector, keyframes, args)
    if RANK > 0:
        return
    for index, reason in failures.items():
        print(f"unreadable, its people count as missed: {keyframes.name(index)}: {reason}")
    out = Path(args.output_dir)
    files = data.find_ava(args, "val")
    out.mkdir(parents=True, exist_ok=True)
    write_detections(out / "detections.csv", keyframes, scores, args.actions)
    truth = data.read_boxes(files["ground_truth"], scored=False)
    excluded = data.read_excluded(files["excluded"])
    if args.allow_missing:  # what happens in them must not count as missed
        movies = data.find_movies(args, {video for video, _ in truth})
        truth = {key: rows for key, rows in truth.items() if key[0] in movies}
    results = score(truth, data.read_boxes(out / "detections.csv"), args.actions, excluded)
    boxes = sum(map(len, scores.values()))
    results |= dict(boxes=boxes, keyframes=len(keyframes), unreadable=len(failures))
    size = args.test_size or args.img_size
    results |= dict(test_crop=args.test_crop, test_size=size, init=args.init)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"{boxes} boxes at {len(keyframes)} keyframes, {args.test_crop} crop")
    shown = list(scores)[:: max(1, len(scores) // 4)][:4]
    draw(keyframes, {index: scores[index] for index in shown}, args, out / "pictures")


def write_detections(path, keyframes, scores, actions):
    """Write detections in AVA's format: video,second,x1,y1,x2,y2,action,score."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        for index, values in scores.items():
            video, second = keyframes.keys[index]
            second = f"{int(second):04d}" if second == int(second) else f"{second:.10g}"
            for box, value in zip(keyframes.boxes(index)[0], values.tolist()):
                box = [f"{x:.6g}" for x in box]
                for action in actions:
                    rows.writerow([video, second, *box, action, f"{value[action - 1]:.6f}"])


def score(truth, detections, actions, excluded=()):
    """Score detections by AVA's protocol: {"mAP": ..., "per_class": {name: AP or None}}; prints it.

    truth, detections: as from data.read_boxes. Mean average precision at IoU 0.5 over the actions
    that happen in the ground truth. In order of falling score, a detection is right if the true box
    of its action that it overlaps most has IoU >= 0.5 and is not taken yet.
    """
    truth = {key: rows for key, rows in truth.items() if key not in excluded}
    detections = {key: rows for key, rows in detections.items() if key not in excluded}
    if detections and not {video for video, _ in detections} & {video for video, _ in truth}:
        raise InputError(f"the detections are of other movies, such as {next(iter(detections))[0]}")
    found = {action: [] for action in actions}  # (scores, right or wrong) of each keyframe
    for key, rows in detections.items():
        people = truth.get(key, np.zeros((0, 6)))
        overlap = box_iou(torch.from_numpy(rows[:, :4]), torch.from_numpy(people[:, :4])).numpy()
        overlap = overlap * (rows[:, None, 4] == people[:, 4])  # (detections, people)
        best = overlap.argmax(1) if len(people) else None
        matched = set()
        for action in np.unique(rows[:, 4]).astype(int).tolist():
            if action not in found:
                continue
            ids = np.flatnonzero(rows[:, 4] == action)
            ids = ids[np.argsort(rows[ids, 5])[::-1]]  # ties as in the official evaluator
            right = np.zeros(len(ids), dtype=bool)
            for i, row in enumerate(ids):
                if best is not None and overlap[row, best[row]] >= 0.5 and best[row] not in matched:
                    right[i] = True
                    matched.add(best[row])
            found[action].append((rows[ids, 5], right))
    true_actions = np.concatenate([[], *(rows[:, 4] for rows in truth.values())])
    per_class = {}
    for action, name in actions.items():
        scores, right = (np.concatenate(part) for part in zip(*found[action] or [((), ())]))
        per_class[name] = average_precision(scores, right, (true_actions == action).sum())
        text = "no labels" if per_class[name] is None else f"{per_class[name]:9.6f}"
        print(f"{text}  {name}")
    values = [ap for ap in per_class.values() if ap is not None]
    if not values:
        raise InputError(f"the ground truth has none of the {len(actions)} actions of the list")
    print(f"mAP@0.5IOU: {sum(values) / len(values):.6f}")
    return {"mAP": sum(values) / len(values), "per_class": per_class}


def average_precision(scores, right, positives):
    """Area under monotonic precision over recall (PASCAL VOC 2010); None without positives."""
    if positives == 0:
        return None
    found = right[np.argsort(scores)[::-1]].cumsum()
    recall = np.concatenate([[0], found / positives, [1]])
    precision = np.concatenate([[0], found / np.arange(1, len(found) + 1), [0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(((recall[1:] - recall[:-1]) * precision[1:]).sum())


def draw(keyframes, scores, args, out):
    """Draw the boxes of keyframes and what the model says of them, as PNG files."""
    out.mkdir(parents=True, exist_ok=True)
    for index, values in scores.items():
        frame = keyframes.frames(index, 1, 0)
        H, W = data.upright_size(frame[0])
        size = 360, round(360 * W / H)
        picture = data.to_clip(frame, size)[0].permute(2, 0, 1)
        boxes = torch.from_numpy(keyframes.boxes(index)[0] * (size[::-1] * 2))
        labels = [caption(value, args.actions) for value in values]
        picture = draw_bounding_boxes(picture, boxes, labels, colors="yellow", width=2)
        path = out / "{}_{:g}.png".format(*keyframes.keys[index])
        write_png(picture, str(path))
        print(f"{path}: boxes with predicted actions")


def caption(scores, actions, most=3, least=0.2):
    """The highest-scoring actions of a person, at least one: (80,) -> text."""
    ranked = sorted(((scores[i - 1].item(), name) for i, name in actions.items()), reverse=True)
    shown = ranked[:1] + [pair for pair in ranked[1:most] if pair[0] >= least]
    return ", ".join(f"{name} {value:.2f}" for value, name in shown)


def predict(detector, args):
    """Print and draw what the people in --boxes do in a video, and write detections.csv."""
    boxes = data.read_boxes(args.boxes)
    video = Path(args.predict).stem
    boxes = {key: rows for key, rows in boxes.items() if key[0] == video}
    if not boxes or not Path(args.predict).exists():
        raise InputError(f"{args.predict}: no such file, or no box of {video} in {args.boxes}")
    keyframes = Keyframes(args.boxes, boxes, {video: args.predict}, video_start=0)
    scores, failures = detect(detector, keyframes, args)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    for index, values in scores.items():
        for box, value in zip(keyframes.boxes(index)[0], values):
            corners = ",".join(f"{x:.3f}" for x in box)
            print(f"{keyframes.name(index)}, {corners}: {caption(value, args.actions)}")
    write_detections(out / "detections.csv", keyframes, scores, args.actions)
    draw(keyframes, scores, args, out)
    if failures:
        count = f"{len(failures)} of {len(keyframes)}"
        raise InputError(f"{args.predict}: {count} seconds cannot be read")


def main():
    args = parse_args()
    if args.score:
        if not args.ground_truth or not args.action_list:
            raise InputError("--score needs --ground_truth CSV and --action_list PBTXT")
        truth = data.read_boxes(args.ground_truth, scored=False)
        actions = data.read_action_list(args.action_list)
        excluded = data.read_excluded(args.excluded)
        score(truth, data.read_boxes(args.score), actions, excluded)
        return None
    if not (args.eval or args.predict):
        return train(args)
    if args.predict and not args.boxes:
        raise InputError("--predict needs --boxes CSV: rows of video,second,x1,y1,x2,y2 in 0..1")
    device = start_process(args)
    detector = load_for_use(Detector(**model_config(args)), args).to(device)
    if args.predict:
        if args.action_list:
            args.actions = data.read_action_list(args.action_list)
        args.actions = args.actions or {i: f"action {i}" for i in range(1, AVA_CLASSES + 1)}
        return predict(detector, args)
    data.locate_data(args, "ava")
    args.actions = data.read_action_list(data.find_ava(args, "val")["action_list"])
    test(detector, on_rank0(data.read_keyframes, args, "val"), args)


if __name__ == "__main__":
    run_main(main)
