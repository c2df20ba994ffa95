"""Stage 2: fine-tune a pre-trained encoder to classify Kinetics or Something-Something v2, and test it.

    python finetune_cls.py --dataset demo --init runs/mae_pretrain_demo_vit_demo/checkpoint.pt
    torchrun --nproc_per_node 8 finetune_cls.py --init CHECKPOINT                    Table 5b, ViT-L on Kinetics-400
    torchrun --nproc_per_node 8 finetune_cls.py --dataset ssv2 --init CHECKPOINT     Table 6b
    torchrun --nproc_per_node 8 finetune_cls.py --eval --init runs/finetune_cls_kinetics400_vit_l/checkpoint.pt
    python finetune_cls.py --predict a.mp4 b.mp4 --init runs/finetune_cls_demo_vit_demo/checkpoint.pt

Without --init it trains from scratch. After training it tests: clips evenly over each video x 3 crops, their softmax
averaged. Epochs are effective and batches count videos, as in pre-training. With the paper's ViT-L, pre-trained on
Kinetics-400 for 800 epochs, this gives 84.4 % there (Table 11).
"""

import contextlib
import functools
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import model as m

KINETICS = {  # Table 5b: Kinetics fine-tuning
    "optimizer": torch.optim.AdamW,
    "optimizer momentum": (0.9, 0.999),
    "weight decay": 0.05,
    "learning rate": {"vit_b": 1.6e-2, "vit_l": 4.8e-3, "vit_h": 1.6e-3},
    "learning rate schedule": m.cosine_decay,
    "warmup epochs": 5,
    "epochs": {"vit_b": 150, "vit_l": 100, "vit_h": 75},
    "repeated sampling": {"vit_b": 2, "vit_l": 2, "vit_h": 1},
    "augmentation": {"RandAug": (9, 0.5)},
    "batch size": {"vit_b": 768, "vit_l": 256, "vit_h": 256},
    "mixup": 0.8,
    "cutmix": 1.0,
    "label smoothing": 0.1,
    "drop path": {"vit_b": 0.1, "vit_l": 0.2, "vit_h": 0.2},
    "dropout": {"vit_b": 0.3, "vit_l": 0.3, "vit_h": 0.5},
    "layer-wise decay": {"vit_b": 0.65, "vit_l": 0.75, "vit_h": 0.8},
}
SSV2 = {  # Table 6b: SSv2 fine-tuning
    "optimizer": torch.optim.SGD,
    "weight decay": 1e-4,
    "learning rate": {"vit_l": 0.64, "vit_h": 0.32},
    "learning rate schedule": m.cosine_decay,
    "warmup epochs": 3,
    "epochs": 40,
    "augmentation": {"RandAug": (9, 0.5)},
    "batch size": 256,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label smoothing": 0.1,
    "drop path": 0.2,
    "dropout": 0.5,
    "layer-wise decay": {"vit_l": 0.75, "vit_h": 0.85},
}
K600_INTERMEDIATE = KINETICS | {  # appendix A: a checkpoint that was fine-tuned on Kinetics-600, on Kinetics-400
    "learning rate": 8e-4,
    "epochs": {"vit_l": 40, "vit_h": 30},
    "drop path": {"vit_l": 0.2, "vit_h": 0.3},
}
DEMO = KINETICS | {  # vit_demo, minutes on two CPU cores
    "learning rate": 4e-3,
    "warmup epochs": 10,
    "epochs": 80,
    "repeated sampling": 2,
    "augmentation": {"RandAug": (0, 0), "crop": [0.5, 1.0]},
    "batch size": 16,
    "drop path": 0.1,
    "dropout": 0.0,
    "layer-wise decay": 0.75,
}
RECIPES = {"kinetics": KINETICS, "ssv2": SSV2, "k600_intermediate": K600_INTERMEDIATE, "demo": DEMO}
CROP = [0.08, 1.0]  # share of the frame that a random crop keeps
VIEWS = {"ssv2": "1x3", "demo": "2x3"}  # clips x crops; on Kinetics 7x3 (Tables 7 and 9)
CLASSES = {"kinetics400": 400, "kinetics600": 600, "kinetics700": 700, "ssv2": 174}
MICRO_BATCH = {"vit_b": 16, "vit_l": 8, "vit_h": 4}  # videos that fit on a GPU of 80 GB with room to spare


def parse_args(argv=None):
    parser = m.make_parser(__doc__, data.LAYOUTS)
    data.add_arguments(parser)
    data.add_sampling_arguments(parser)
    m.add_finetuning_arguments(parser)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, help="ssv2 for ssv2, demo for vit_demo, else kinetics")
    add("--num_classes", type=int, help="default: the data set's, or as many as the training list names")
    add("--rand_augment", type=float, nargs=2, metavar=("MAGNITUDE", "DEVIATION"), help="of 0 to 10; 0 0: none")
    add("--erasing", type=float, default=0.0, help="chance of random erasing; the released configuration has 0.25")
    add("--mixup", type=float, help="its alpha; each batch has MixUp or CutMix; 0: never")
    add("--cutmix", type=float, help="its alpha; 0: never")
    add("--label_smoothing", type=float, help="share of the target that all classes get")
    add("--mask_start", type=float, default=0.0, help="share of tokens hidden at first, 0 at the end (Table 11)")
    add("--views", help="clips x crops of a video to test on: 7x3 on Kinetics, 1x3 on SSv2")
    add("--save_scores", action="store_true", help="keep each test video's averaged scores, in scores.pt")
    add("--predict", nargs="+", metavar="VIDEO", help="do not train: print the 5 likeliest classes of each video")

    first = m.first_look(parser, argv)
    dataset, size = first.dataset, first.model
    name = first.recipe or ("ssv2" if dataset == "ssv2" else "demo" if size == "vit_demo" else "kinetics")
    ssv2 = "ssv2" in (name, dataset)
    elsewhere = first.predict or first.eval  # where there is no learning rate to miss
    recipe = m.column(f"--recipe {name}", RECIPES[name], size, 0 if elsewhere else first.lr)
    parser.set_defaults(
        recipe=name,
        **m.defaults_of(recipe),
        hflip=not ssv2,
        crop=recipe["augmentation"].get("crop", CROP),
        rand_augment=list(recipe["augmentation"]["RandAug"]),
        segments=ssv2,
        views=VIEWS.get("ssv2" if ssv2 else dataset, "7x3"),
    )
    args = parser.parse_args(argv)
    m.settle(args, recipe, "finetune_cls", parser, argv)
    views = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", args.views)
    if not views:
        raise m.InputError(f"--views {args.views}: expected clips x crops, both at least 1, such as 7x3")
    args.views = [int(count) for count in views.groups()]
    if not 0 <= args.mask_start < 1:
        raise m.InputError(f"--mask_start {args.mask_start} is outside [0, 1)")
    return args, recipe


def config_of(args, num_classes):
    """The arguments of model.Classifier that the command line describes."""
    return m.SIZES[args.model] | dict(
        img_size=args.img_size,
        num_frames=args.num_frames,
        num_classes=num_classes,
        drop_path=args.drop_path,
        dropout=args.dropout,
        checkpoint_activations=bool(args.checkpoint_activations),
    )


def train(args, recipe):
    device, rank, world = m.start_process(args)
    out = Path(args.output_dir)

    # Data
    args.data = data.locate(args, rank, "kinetics")
    if Path(args.data).is_file():
        raise m.InputError(
            f"{args.data}: one list, of videos to train on or to test on? Give the folder that holds both"
        )
    count = args.num_classes or CLASSES.get(args.dataset)
    videos = data.find_videos(args.data, "train", args.videos, need_labels=True, classes=count)
    classes = videos.class_names
    count = count or (len(classes) if classes else int(videos.labels.max()) + 1)
    if classes and len(classes) != count:
        raise m.InputError(
            f"{videos.source}: {len(classes)} classes, not {count}; if that is meant: --num_classes {len(classes)}"
        )
    held_out = data.find_videos(args.data, "val", args.videos, need_labels=True, classes=classes or count)
    steps, micro_batch, micro_steps = m.plan(args, videos, world, MICRO_BATCH.get(args.model))

    # Model and optimizer, new or as the run left them
    torch.manual_seed(args.seed)
    config = config_of(args, count)
    classifier = m.Classifier(**config)
    optimizer, start = m.prepare(classifier, recipe, args, device, videos, args.layer_decay)
    ddp = m.parallel(classifier, args, device, world)
    autocast = m.autocast_of(args, device)
    m.announce(args, classifier, videos, device, world, steps, micro_batch)

    # Clips, and what mixes them: whole clips, on the device, MixUp or CutMix for each batch
    noise_of = functools.partial(m.masking_noise, classifier.grid, args.mask_start) if args.mask_start else None
    rand_augment = args.rand_augment if args.rand_augment[0] else None
    clips = data.Clips(videos, args, noise_of, rand_augment, args.erasing)
    stream = data.Stream(len(videos), args.batch_size, micro_batch, rank, world, args.seed, start, steps)
    batches = data.each(data.make_loader(clips, stream, args, device))
    failures = data.Failures(out / "failures.log", videos, args.max_failures, start > 0)
    mixing = mixing_of(args, count)
    if mixing and micro_batch == 1:
        print("warning: a micro-batch of 1 video has no other to be mixed with: MixUp and CutMix need --micro_batch 2")
    log = m.Log(args, start, steps, videos, failures)

    classifier.train()
    for step in range(start, steps):
        lr = recipe["learning rate schedule"](log.epoch(step), args.lr, args.warmup_epochs, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        mask_ratio = mask_ratio_at(step, steps, args.mask_start)

        loss = torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            batch = log.next(batches)
            torch.manual_seed(data.stateless_seed(args.seed, step, rank, micro_step))  # of mixing, dropout, drop path
            video, label = (batch[name].to(device, non_blocking=True) for name in ("video", "label"))
            noise = batch["noise"].to(device, non_blocking=True) if mask_ratio else None
            video, target = mix_clips(m.normalize(video), label, mixing, count)
            last = micro_step == micro_steps - 1  # only then do the processes exchange gradients
            with contextlib.nullcontext() if last or world == 1 else ddp.no_sync():
                with autocast():
                    logits = ddp(video, mask_ratio, noise)
                micro_loss = F.cross_entropy(logits.float(), target, label_smoothing=args.label_smoothing)
                (micro_loss / micro_steps).backward()
            loss += micro_loss.detach() / micro_steps
        norm = torch.nn.utils.clip_grad_norm_(classifier.parameters(), args.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad()

        if log.step(loss, norm, lr=lr, mask_ratio=mask_ratio):
            log.save(classifier, optimizer, config=config, class_names=classes)
    log.close()
    batches.close()  # its workers
    test(classifier, held_out, args, device, rank, world, classes)
    print(f"{out}: checkpoint.pt, log.jsonl, args.json, results.json")
    print(f"next: python finetune_cls.py --predict VIDEO --init {out / 'checkpoint.pt'}")


def mask_ratio_at(step, steps, start):
    """Share of tokens to hide at a step: from `start` at the first to 0 at the last, along a cosine (Table 11)."""
    return start * 0.5 * (1 + math.cos(math.pi * step / max(1, steps - 1)))


def mixing_of(args, num_classes):
    """What the batches are mixed by: MixUp and CutMix, each where its alpha is not 0."""
    from torchvision.transforms import v2  # where it is used: torchvision takes as long to load as torch

    kinds = (v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)
    return [mix(alpha=alpha, num_classes=num_classes) for mix, alpha in kinds if alpha]


def mix_clips(video, label, mixing, num_classes):
    """MixUp or CutMix, one of them at random: (B, 3, T, H, W) floats, (B,) -> mixed clips, targets (B, num_classes)."""
    if not mixing or len(video) == 1:
        return video, F.one_hot(label, num_classes).float()
    from torchvision import tv_tensors

    mix = mixing[torch.randint(len(mixing), ()).item()]
    frames, target = mix(tv_tensors.Video(video.transpose(1, 2)), label)  # torchvision's order: (B, T, 3, H, W)
    return frames.as_subclass(torch.Tensor).transpose(1, 2), target


@torch.no_grad()
def average_views(classifier, video, device, autocast=contextlib.nullcontext, most=32):
    """Class probabilities averaged over the views of one video: uint8 (V, T, H, W, 3) -> (num_classes,) on the CPU."""
    total = 0
    for views in video.permute(0, 4, 1, 2, 3).split(most):
        with autocast():
            logits = classifier(views.to(device, non_blocking=True))
        total = total + logits.float().softmax(1).sum(0)
    return (total / len(video)).cpu()


def scores_of(classifier, videos, args, device, rank, world):
    """The scores of every video, each once, whatever the number of processes.

    Returns {index: (num_classes,)}, [(index, reason)] of videos that cannot be read.
    """
    classifier.eval()
    views, autocast = data.Views(videos, args, args.views), m.autocast_of(args, device)
    return data.each_once(
        views, args, rank, world, lambda sample: average_views(classifier, sample["video"], device, autocast)
    )


def test(classifier, videos, args, device, rank, world, classes):
    """Multi-view test: prints and writes results.json. A video that cannot be read counts as wrong, and is reported.

    Returns the results, on process 0.
    """
    scores, failures = scores_of(classifier, videos, args, device, rank, world)
    if rank > 0:
        return None
    for index, reason in failures:
        print(f"counted as wrong: {videos.path(index)}: {reason}")
    order = {index: score.argsort(descending=True, stable=True).tolist() for index, score in scores.items()}
    ranks = [ranking.index(videos.labels[index]) for index, ranking in order.items()]  # of the true class
    shape = "x".join(map(str, args.views))
    results = dict(
        top1=100 * sum(place < 1 for place in ranks) / len(videos),
        top5=100 * sum(place < 5 for place in ranks) / len(videos),
        views=shape,
        videos=len(videos),
        unreadable=len(failures),
        init=args.init,
    )
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    if args.save_scores and scores:
        kept = dict(scores=torch.stack(list(scores.values())), labels=torch.from_numpy(videos.labels[list(scores)]))
        kept |= dict(paths=[videos.path(index) for index in scores], class_names=classes)
        torch.save(kept, out / "scores.pt")
    print(f"top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} % on {len(videos)} videos, {shape} views each")
    return results


def restore(args):
    """The classifier in --init and its class names or None; clips will be sampled as it was trained to see them."""

    def from_elsewhere(args):
        count = args.num_classes or CLASSES.get(args.dataset)
        if not count:
            raise m.InputError(f"{args.init}: not a checkpoint of this stage; --num_classes says how many it knows")
        return config_of(args, count)

    seen = "num_frames", "sampling_rate", "img_size", "segments", "views", "precision"
    classifier, checkpoint = m.restore(args, m.Classifier, from_elsewhere, seen)
    return classifier, checkpoint.get("class_names")


def evaluate(args):
    device, rank, world = m.start_process(args)
    args.data = data.locate(args, rank, "kinetics")
    classifier, classes = restore(args)
    known = classes or classifier.head.out_features
    videos = data.find_videos(args.data, "val", args.videos, need_labels=True, classes=known)
    if videos.class_names and len(videos.class_names) != classifier.head.out_features:
        raise m.InputError(
            f"{videos.source}: {len(videos.class_names)} classes, the classifier has {classifier.head.out_features}"
        )
    test(classifier.to(device), videos, args, device, rank, world, classes)


def predict(args):
    device, _, _ = m.start_process(args)
    classifier, classes = restore(args)
    videos = data.VideoList("--predict", ".", args.predict)
    scores, failures = scores_of(classifier.to(device), videos, args, device, 0, 1)
    for index, reason in failures:
        print(f"{args.predict[index]}: {reason}")
    for index, score in scores.items():
        print(f"{args.predict[index]}:")
        for probability, i in zip(*(values.tolist() for values in score.topk(min(5, len(score))))):
            print(f"  {probability:6.1%}  {classes[i] if classes else f'class {i}'}")
    if failures:
        raise m.InputError(f"{len(failures)} of {len(args.predict)} files are no videos that can be read")


def main():
    args, recipe = parse_args()
    if args.predict:
        predict(args)
    elif args.eval:
        evaluate(args)
    else:
        train(args, recipe)


if __name__ == "__main__":
    m.run_stage(main)
