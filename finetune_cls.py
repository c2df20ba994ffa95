"""Stage 2: fine-tune an encoder to classify Kinetics or Something-Something v2 (Tables 5b, 6b).

    python finetune_cls.py --dataset demo --init runs/mae_pretrain_demo_vit_demo/checkpoint.pt
    torchrun --nproc_per_node 8 finetune_cls.py --init CHECKPOINT                 ViT-L, Table 5b
    torchrun --nproc_per_node 8 finetune_cls.py --dataset ssv2 --init CHECKPOINT  ViT-L, Table 6b
    python finetune_cls.py --eval --init runs/finetune_cls_demo_vit_demo/checkpoint.pt
    python finetune_cls.py --predict a.mp4 --init runs/finetune_cls_demo_vit_demo/checkpoint.pt

Without --init it trains from scratch. Then it tests: clips evenly over each video x 3 crops, with
softmax averaged. Epochs are effective and batches count videos, as in pre-training. With the
paper's ViT-L, pre-trained on Kinetics-400 for 800 epochs, this gives 84.4 % there (Table 11).
"""

import argparse
import functools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision import tv_tensors
from torchvision.transforms import v2

import data
from data import Batches, ClipDataset, MultiViewDataset, RandAugment, VideoList
from model import (
    PIXEL_MEAN,
    RANK,
    RUN_FLAGS,
    SIZES,
    STOPPED,
    WORLD,
    Classifier,
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
    normalize,
    on_rank0,
    parameter_groups,
    parse_twice,
    positive_int,
    print_plan,
    print_rank0,
    random_mask,
    resume,
    run_main,
    split_batch,
    start_from_sines,
    start_process,
)

KINETICS = dict(  # Table 5b: Kinetics fine-tuning. Keys are flags, comments the table's words
    optimizer="adamw",  # optimizer: AdamW
    betas=[0.9, 0.999],  # optimizer momentum
    weight_decay=0.05,  # weight decay
    lr={"vit_b": 1.6e-2, "vit_l": 4.8e-3, "vit_h": 1.6e-3},  # learning rate; schedule: cosine decay
    warmup_epochs=5,  # warmup epochs
    epochs={"vit_b": 150, "vit_l": 100, "vit_h": 75},  # epochs
    repeat_aug={"vit_b": 2, "vit_l": 2, "vit_h": 1},  # repeated sampling
    rand_augment=[9, 0.5],  # augmentation: RandAug (9, 0.5)
    batch_size={"vit_b": 768, "vit_l": 256, "vit_h": 256},  # batch size
    mixup=0.8,  # mixup
    cutmix=1.0,  # cutmix
    label_smoothing=0.1,  # label smoothing
    drop_path={"vit_b": 0.1, "vit_l": 0.2, "vit_h": 0.2},  # drop path
    dropout={"vit_b": 0.3, "vit_l": 0.3, "vit_h": 0.5},  # dropout
    layer_decay={"vit_b": 0.65, "vit_l": 0.75, "vit_h": 0.8},  # layer-wise decay
    # Not in the table: crops and flips of the released code, and the views of Table 7.
    crop_scale=[0.08, 1.0],
    hflip=True,
    views="7x3",  # argparse parses defaults that are strings
)
SSV2 = dict(  # Table 6b: SSv2 fine-tuning
    optimizer="sgd",  # optimizer: SGD
    weight_decay=1e-4,  # weight decay
    lr={"vit_l": 0.64, "vit_h": 0.32},  # learning rate; its schedule: cosine decay
    warmup_epochs=3,  # warmup epochs
    epochs=40,  # epochs
    rand_augment=[9, 0.5],  # augmentation: RandAug (9, 0.5)
    batch_size=256,  # batch size
    mixup=0.8,  # mixup
    cutmix=1.0,  # cutmix
    label_smoothing=0.1,  # label smoothing
    drop_path=0.2,  # drop path
    dropout=0.5,  # dropout
    layer_decay={"vit_l": 0.75, "vit_h": 0.85},  # layer-wise decay
    # Segments as in appendix A; labels tell left from right; views as in Table 9.
    segments=True,
    repeat_aug=1,
    crop_scale=[0.08, 1.0],
    hflip=False,
    views="1x3",
)
K600_INTERMEDIATE = KINETICS | dict(  # appendix A: a Kinetics-600 classifier, on Kinetics-400
    lr={"vit_l": 8e-4, "vit_h": 8e-4},
    epochs={"vit_l": 40, "vit_h": 30},
    drop_path={"vit_l": 0.2, "vit_h": 0.3},
)
DEMO = KINETICS | dict(  # vit_demo, minutes on two CPU cores
    lr=4e-3,
    warmup_epochs=10,
    epochs=80,
    repeat_aug=2,
    rand_augment=[0, 0],
    batch_size=16,
    drop_path=0.1,
    dropout=0.0,
    layer_decay=0.75,
    crop_scale=[0.5, 1.0],
    views="2x3",
    img_size=32,
    precision="fp32",  # matrices this small are slower in bf16
    sine_positions=True,
)
RECIPES = dict(kinetics=KINETICS, ssv2=SSV2, k600_intermediate=K600_INTERMEDIATE, demo=DEMO)
CLASSES = {"kinetics400": 400, "kinetics600": 600, "kinetics700": 700, "ssv2": 174}
MICRO_BATCH = {"vit_b": 16, "vit_l": 8, "vit_h": 4}  # videos that fit on a GPU of 80 GB
MAY_DIFFER = RUN_FLAGS | {"data", "videos", "views", "val_epochs"}  # on resume


def recipe_of(args):
    if args.recipe:
        return RECIPES[args.recipe]
    ssv2 = args.dataset == "ssv2"
    if args.model == "vit_demo":
        return DEMO | dict(segments=True, hflip=False, views="1x3") if ssv2 else DEMO
    return SSV2 if ssv2 else KINETICS


def views(text):
    """An argparse type: clips x crops of a test, such as 7x3."""
    clips, crops = (positive_int(number) for number in text.split("x"))
    return clips, crops


def parse_args(argv=None):
    parser = make_parser(__doc__, data.LAYOUTS)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--recipe", choices=RECIPES, help="None: by --dataset and --model")
    add("--num_classes", type=positive_int, help="None: the data set's")
    add("--repeat_aug", type=positive_int, help="clips per opened video")
    add(
        "--crop_scale",
        type=fraction,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="relative area of a crop",
    )
    add("--segments", action=switch, default=False, help="sample frames by segments, as on SSv2")
    add(
        "--rand_augment", type=float, nargs=2, metavar=("M", "STD"), help="M of 10; 0 0 disables it"
    )
    add("--random_erasing", type=fraction, default=0.0, help="probability; mae_st has 0.25")
    add("--mixup", type=float, help="alpha; a batch gets MixUp or CutMix; 0 disables it")
    add("--cutmix", type=float, help="alpha; 0 disables it")
    add("--label_smoothing", type=fraction, help="share of the target spread over all classes")
    add("--drop_path", type=fraction, help="stochastic depth rate of the last block")
    add("--dropout", type=fraction, help="before the head")
    add("--layer_decay", type=fraction, help="layer-wise lr decay; 0 trains the head only")
    add("--mask_start", type=fraction, default=0.0, help="first mask ratio, of Table 11")
    add = parser.add_argument_group("test").add_argument
    add("--val_epochs", type=float, default=0, help="epochs between validations; 0: none")
    add("--views", type=views, help="clips x crops per video, such as 7x3")
    add("--eval", action="store_true", help="test the classifier in --init")
    add("--predict", nargs="+", metavar="VIDEO", help="print the most likely classes of videos")
    parser.set_defaults(class_names=None)
    return parse_twice(parser, "finetune_cls", "kinetics400", recipe_of, argv)


def model_config(args):
    """The keywords of model.Classifier."""
    return SIZES[args.model] | dict(
        img_size=args.img_size,
        num_frames=args.num_frames,
        num_classes=args.num_classes,
        drop_path=args.drop_path,
        dropout=args.dropout,
        grad_checkpointing=args.grad_checkpointing,
    )


def train(args):
    device = start_process(args)

    # ---------------------------------------------------------------- data
    data.locate_data(args, "kinetics")
    if Path(args.data).is_file():
        raise InputError(f"{args.data}: a single list; give the folder with train and val lists")
    classes = args.num_classes or CLASSES.get(args.dataset)
    videos = on_rank0(data.find_videos, args.data, "train", args.videos, classes)
    args.num_classes = videos.num_classes
    args.class_names = videos.class_names
    classes = args.class_names or args.num_classes
    held_out = on_rank0(data.find_videos, args.data, "val", args.videos, classes)
    steps, micro_steps = split_batch(args, len(videos), device, MICRO_BATCH)

    # --------------------------------------------------------------- model
    torch.manual_seed(args.seed)
    config = model_config(args)
    classifier = Classifier(**config)
    if args.sine_positions:
        start_from_sines(classifier)
    if args.layer_decay == 0:
        classifier.freeze_encoder()
    classifier.to(device).train()
    if args.compile:
        compile_blocks(classifier)
    ddp = DistributedDataParallel(classifier, broadcast_buffers=False) if WORLD > 1 else classifier

    # ------------------------------------------------ optimizer and resume
    groups = parameter_groups(classifier, args.weight_decay, args.layer_decay)
    optimizer = make_optimizer(args, groups)
    start = resume(args, MAY_DIFFER, classifier, optimizer, videos)
    flops = None if args.mask_start else count_flops(Classifier, config)
    print_plan(args, classifier, videos, steps, flops)

    # ---------------------------------------------------------------- loop
    draw_noise = None
    if args.mask_start:
        draw_noise = functools.partial(random_mask, classifier.grid, args.mask_start)
    if args.micro_batch == 1 and (args.mixup or args.cutmix):
        print_rank0("warning: --micro_batch 1 leaves no second video to mix with")
    clips = ClipDataset(videos, args, draw_noise, augmentation(args))
    batches = Batches(clips, device, start, steps)
    with Run(args, videos, batches, start, steps, flops) as run:
        for step in range(start, steps):
            lr = cosine_decay(run.epoch(step), args.lr, args.warmup_epochs, args.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            mask_ratio = mask_ratio_at(step, steps, args.mask_start)

            loss = torch.zeros((), device=device)
            for micro_step in range(micro_steps):
                batch = next(batches)
                # Seeds mixing, dropout and drop path. Five numbers: clips are seeded by four.
                torch.manual_seed(data.stateless_seed(args.seed, step, RANK, micro_step, 0))
                video, target = mix_clips(normalize(batch["video"]), batch["label"], args)
                # DDP exchanges gradients at the last micro-batch only.
                ddp.require_backward_grad_sync = micro_step == micro_steps - 1
                with autocast(args, device):
                    logits = ddp(video, mask_ratio, batch.get("noise"))
                smoothing = args.label_smoothing
                micro_loss = F.cross_entropy(logits.float(), target, label_smoothing=smoothing)
                (micro_loss / micro_steps).backward()
                loss += micro_loss.detach() / micro_steps
            parameters = classifier.parameters()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
            optimizer.step()
            optimizer.zero_grad()

            run.record(loss, grad_norm)
            validate = run.every(args.val_epochs)
            if run.at_log_point() or validate:
                run.log(lr=lr, mask_ratio=mask_ratio)  # raises if the loss is not finite
            if validate and not run.stopping:
                top1 = test(classifier, held_out, args, (1, 1))["top1"]
                run.write(step=run.done, val_top1=top1)
                classifier.train()
            if run.save_due():
                run.save(classifier, optimizer, config)
            if run.stopping:
                break
    if run.was_stopped():
        return STOPPED
    report(test(classifier, held_out, args, args.views), args)
    print_rank0(f"next: python finetune_cls.py --predict VIDEO --init {run.out}/checkpoint.pt")


def augmentation(args):
    """RandAugment and random erasing of clips, uint8 (T, 3, H, W); erased pixels get the mean."""
    rand_augment = [RandAugment(*args.rand_augment)] if args.rand_augment[0] else []
    erase = v2.RandomErasing(args.random_erasing, value=round(255 * PIXEL_MEAN))
    return v2.Compose([*rand_augment, erase])


def mask_ratio_at(step, steps, start):
    """Share of hidden tokens: from `start` to 0 at the last step, along a cosine (Table 11)."""
    return start * 0.5 * (1 + math.cos(math.pi * step / max(1, steps - 1)))


def mix_clips(video, label, args):
    """MixUp or CutMix of whole clips, chosen at random; also turns labels into soft targets.

    (B, 3, T, H, W) floats, (B,) -> mixed clips, (B, num_classes).
    """
    kinds = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]
    kinds = [(kind, alpha) for kind, alpha in kinds if alpha]
    if not kinds or len(video) == args.repeat_aug:
        return video, F.one_hot(label, args.num_classes).float()
    kind, alpha = kinds[torch.randint(len(kinds), ())]
    frames = tv_tensors.Video(video.transpose(1, 2))  # torchvision's order: (B, T, 3, H, W)
    frames, target = kind(alpha=alpha, num_classes=args.num_classes)(frames, label)
    return frames.as_subclass(torch.Tensor).transpose(1, 2), target


# ------------------------------------------------------------------------------------------ test


def predict(classifier, videos, args, views, most=32):
    """Class probabilities of each video, averaged over its views, `most` of them at once.

    Returns {index: (num_classes,)}, and {index: reason} of unreadable videos.
    """
    device = classifier.cls_token.device
    classifier.eval()

    @torch.no_grad()
    def average_views(sample):
        total, video = 0, sample["video"].permute(0, 4, 1, 2, 3)  # (views, 3, T, H, W)
        for clips in video.split(most):
            with autocast(args, device):
                logits = classifier(clips.to(device))
            total = total + logits.float().softmax(1).sum(0)
        return (total / len(video)).cpu()

    return data.run_test(MultiViewDataset(videos, args, views), average_views)


def test(classifier, videos, args, views):
    """Multi-view test: top-1 and top-5 in %, as a dict. An unreadable video counts as wrong."""
    scores, failures = predict(classifier, videos, args, views)
    for index, reason in failures.items():
        print_rank0(f"unreadable, counted as wrong: {videos.path(index)}: {reason}")
    ranks = []  # of the true class among the scores
    for index, values in scores.items():
        order = values.argsort(descending=True, stable=True).tolist()
        ranks.append(order.index(videos.labels[index]))
    top1, top5 = (100 * sum(rank < k for rank in ranks) / len(videos) for k in (1, 5))
    return dict(top1=top1, top5=top5, videos=len(videos), unreadable=len(failures))


def report(results, args):
    """Print the results of a test with --views, and write them to results.json."""
    results |= dict(views="{}x{}".format(*args.views), init=args.init)
    top5 = f", top-5 {results['top5']:.2f} %" if args.num_classes > 5 else ""
    count = f"{results['videos']} videos x {results['views']}"
    print_rank0(f"top-1 {results['top1']:.2f} %{top5}, {count}")
    if RANK == 0:
        path = Path(args.output_dir, "results.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1))


def main():
    args = parse_args()
    if not (args.eval or args.predict):
        return train(args)
    device = start_process(args)
    args.num_classes = args.num_classes or CLASSES.get(args.dataset)
    if not args.num_classes:
        raise InputError("--num_classes is needed: how many classes does the checkpoint have?")
    classifier = load_for_use(Classifier(**model_config(args)), args).to(device)
    classes = args.class_names or args.num_classes
    if args.eval:
        data.locate_data(args, "kinetics")
        videos = on_rank0(data.find_videos, args.data, "val", args.videos, classes)
        return report(test(classifier, videos, args, args.views), args)
    videos = VideoList("--predict", ".", args.predict)
    scores, failures = predict(classifier, videos, args, args.views)
    for index, values in scores.items():
        print(f"{args.predict[index]}:")
        for score, i in zip(*values.topk(min(5, len(values)))):
            print(f"  {score:6.1%}  {args.class_names[i] if args.class_names else f'class {i}'}")
    if failures:
        reasons = "\n".join(f"{args.predict[i]} {failures[i]}" for i in failures)
        raise InputError(f"{len(failures)} of {len(videos)} videos cannot be read: {reasons}")


if __name__ == "__main__":
    run_main(main)
