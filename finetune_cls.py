"""Stage 2: fine-tune an encoder to classify Kinetics or Something-Something v2 (Tables 5b, 6b).

    python finetune_cls.py --dataset demo --init runs/mae_pretrain_demo_vit_demo/checkpoint.pt
    torchrun --nproc_per_node 8 finetune_cls.py --init CHECKPOINT                 ViT-L, Table 5b
    torchrun --nproc_per_node 8 finetune_cls.py --dataset ssv2 --init CHECKPOINT  ViT-L, Table 6b
    python finetune_cls.py --eval --init runs/finetune_cls_demo_vit_demo/checkpoint.pt
    python finetune_cls.py --predict a.mp4 --init runs/finetune_cls_demo_vit_demo/checkpoint.pt

Without --init it trains from scratch. Then it tests: the softmax of a video is the mean of several
views, clips spread evenly over it x crops of each. Epochs are effective and batches count videos,
as in pre-training. With the paper's ViT-L, pre-trained on Kinetics-400 for 800 epochs, this gives
84.4 % there (Table 11).
"""

import dataclasses
import math
from pathlib import Path

# Before torch: model.py sets how its threads wait.
from model import PIXEL_MEAN, RUN_FLAGS, SIZES, STOPPED, Classifier, InputError, Run, autocast
from model import cosine_decay, count_flops, distribute, fraction, load_pretrained, make_optimizer
from model import make_parser, make_plan, nonnegative, normalize, on_rank0, parse_with_recipe
from model import positive_int, print_plan, print_rank0, rank, rate, read_checkpoint, resume
from model import run_main, start_process, switch, write_json
from data import LAYOUTS, Batches, ClipDataset, MultiViewDataset, VideoList, find_videos, make_demo
from data import report_failures, run_test, stateless_seed

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

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
    views=(7, 3),
    micro_batch={"vit_b": 16, "vit_l": 8, "vit_h": 4},  # videos that a GPU of 80 GB takes at once
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
    views=(1, 3),
    micro_batch=KINETICS["micro_batch"],
)
K600_INTERMEDIATE = KINETICS | dict(  # appendix A: Kinetics-400 after fine-tuning on Kinetics-600
    lr={"vit_l": 8e-4, "vit_h": 8e-4},
    epochs={"vit_l": 40, "vit_h": 30},
    drop_path={"vit_l": 0.2, "vit_h": 0.3},
)
DEMO = KINETICS | dict(  # vit_demo, minutes on two CPU cores
    lr=8e-3,
    warmup_epochs=2,
    epochs=24,
    repeat_aug=2,
    rand_augment=[0, 0],
    batch_size=16,
    mixup=0.0,  # so few steps teach more without it
    cutmix=0.0,
    micro_batch=None,  # all of them
    drop_path=0.1,
    dropout=0.0,
    layer_decay=0.6,
    crop_scale=[0.5, 1.0],
    views=(2, 3),
    img_size=48,
    precision="fp32",  # matrices this small are slower in bf16
)
RECIPES = dict(kinetics=KINETICS, ssv2=SSV2, k600_intermediate=K600_INTERMEDIATE, demo=DEMO)
CLASSES = {"kinetics400": 400, "kinetics600": 600, "kinetics700": 700, "ssv2": 174}
MAY_DIFFER = RUN_FLAGS | {"dataset", "data", "videos", "views", "val_epochs"}  # on resume


def recipe_of(args):
    if args.recipe:
        return RECIPES[args.recipe]
    ssv2 = args.dataset == "ssv2"
    if args.model == "vit_demo":
        return DEMO | dict(segments=True, hflip=False, views=(1, 3)) if ssv2 else DEMO
    return SSV2 if ssv2 else KINETICS


def clips_x_crops(text):
    """An argparse type: clips x crops of a test, such as 7x3."""
    clips, crops = map(positive_int, text.split("x"))
    return clips, crops


def parse_args(argv=None):
    parser = make_parser(__doc__, LAYOUTS)
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--recipe", choices=RECIPES, help="by default that of --dataset and --model")
    add("--num_classes", type=positive_int, help="by default the data set's")
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
        "--rand_augment",
        type=nonnegative,
        nargs=2,
        metavar=("MAGNITUDE", "DEVIATION"),
        help="magnitude, 0 to 10, and its standard deviation; 0 0 disables it",
    )
    add("--random_erasing", type=fraction, default=0.0, help="probability; mae_st has 0.25")
    add("--mixup", type=nonnegative, help="alpha; a batch gets MixUp or CutMix; 0 disables it")
    add("--cutmix", type=nonnegative, help="alpha; 0 disables it")
    add("--label_smoothing", type=fraction, help="share of the target spread over all classes")
    add("--drop_path", type=rate, help="stochastic depth rate of the last block")
    add("--dropout", type=rate, help="before the head")
    add("--layer_decay", type=fraction, help="layer-wise lr decay; 0 trains the head only")
    add("--mask_start", type=rate, default=0.0, help="mask ratio at the first step (Table 11)")
    add = parser.add_argument_group("test").add_argument
    add("--val_epochs", type=nonnegative, default=0, help="epochs between validations; 0: none")
    add("--views", type=clips_x_crops, help="clips x crops per video, such as 7x3")
    add("--eval", action="store_true", help="test the classifier in --init")
    add("--predict", nargs="+", metavar="VIDEO", help="print the most likely classes of videos")
    return parse_with_recipe(parser, "finetune_cls", "kinetics400", recipe_of, argv)


def model_config(args, num_classes):
    """The keywords of model.Classifier."""
    return SIZES[args.model] | dict(
        img_size=args.img_size,
        num_frames=args.num_frames,
        num_classes=num_classes,
        drop_path=args.drop_path,
        dropout=args.dropout,
        grad_checkpointing=args.grad_checkpointing,
    )


def train(args):
    device = start_process(args)

    # ---------------------------------------------------------------- data
    on_rank0(make_demo, args)
    if Path(args.data).is_file():
        raise InputError(f"{args.data}: a single list; give the folder with train and val lists")
    expected = args.num_classes or CLASSES.get(args.dataset)  # None: as many as there are
    videos = on_rank0(find_videos, args, "train", expected)
    # The labels of the test must be among the training classes.
    held_out = on_rank0(find_videos, args, "val", videos.class_names or videos.num_classes)
    plan = make_plan(args, len(videos), args.repeat_aug)

    # --------------------------------------------------------------- model
    torch.manual_seed(args.seed)
    config = model_config(args, videos.num_classes)
    classifier = Classifier(**config)
    if args.layer_decay == 0:
        classifier.freeze_encoder()
    classifier.to(device)
    ddp = distribute(classifier, args)

    # ---------------------------------------- optimizer, --init or resume
    optimizer = make_optimizer(args, classifier, layer_decay=args.layer_decay)
    start, latest = resume(args, MAY_DIFFER, classifier, optimizer, videos)
    flops = None if args.mask_start else count_flops(Classifier, config)
    print_plan(args, plan, classifier, videos, flops)
    if plan.micro_batch == 1 and (args.mixup or args.cutmix):
        print_rank0("warning: one video at once leaves no second one to mix with")

    # ---------------------------------------------------------------- loop
    batches = Batches(ClipDataset(videos, args, augmentation(args)), plan, device, start)
    with Run(args, plan, videos, batches, start, latest, flops) as run:
        for step in range(start, plan.steps):
            lr = cosine_decay(plan.epoch(step), args.lr, args.warmup_epochs, args.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            # Share of hidden tokens: from --mask_start to 0 at the last step (Table 11).
            mask_ratio = cosine_decay(step, args.mask_start, 0, max(1, plan.steps - 1))

            loss = 0
            for micro_step in range(plan.micro_steps):
                batch = next(batches)
                # Seeds mixing, masks and dropout; the 0 keeps them apart from seeds of clips.
                torch.manual_seed(stateless_seed(args.seed, step, rank(), micro_step, 0))
                video, target = mix_clips(batch["video"], batch["label"], videos.num_classes, args)
                # With DDP: exchange gradients at the last micro-batch only.
                ddp.require_backward_grad_sync = micro_step == plan.micro_steps - 1
                with autocast(args, device):
                    logits = ddp(video, mask_ratio).float()  # (B*R, num_classes)
                micro_loss = F.cross_entropy(logits, target, label_smoothing=args.label_smoothing)
                micro_loss = micro_loss / plan.micro_steps
                micro_loss.backward()
                loss += micro_loss.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), args.clip_grad or math.inf)
            optimizer.step()
            optimizer.zero_grad()

            run.record(loss, grad_norm)
            if run.at_log_point():
                run.log(lr=lr, mask_ratio=mask_ratio)  # raises if the loss is not finite
                if run.every(args.val_epochs) and not run.stopping:
                    results, _ = test(classifier, held_out, args, (1, 1))
                    run.write(step=run.done, val_top1=results["top1"])
                    classifier.train()
            if run.save_due():
                run.save(classifier, optimizer, config=config, classes=videos.class_names)
            if run.stopping:
                break
    if run.report_end():
        return STOPPED
    report(classifier, held_out, args)


# ------------------------------------------------------------------------ augmentation and mixing


def warp(clip, degrees=0.0, shear_x=0, shear_y=0, right=0, down=0):
    """Rotate about the middle, shear about the top left corner, shift by shares of the size."""
    H, W = clip.shape[2:]
    shift = [right * W, down * H]
    angles = np.degrees(np.arctan([shear_x, shear_y])).tolist()  # as torchvision wants them
    center = [0, 0] if any(angles) else None
    flat = clip.flatten(0, 1)  # as channels of one picture: one sampling grid for all
    bilinear = v2.InterpolationMode.BILINEAR
    return TF.affine(flat, degrees, shift, 1.0, angles, bilinear, 128, center).view_as(clip)


def enhance(adjust):
    """An operation from adjust(clip, factor), with a factor of 0.1 to 1.9."""
    return lambda clip, s: adjust(clip, 1 + 0.9 * s)


RAND_AUGMENT = {  # operations; s: magnitude / 10 with a random sign, in -1..1
    "AutoContrast": lambda clip, s: TF.autocontrast(clip.contiguous()),  # strided: 3 x slower
    "Equalize": lambda clip, s: TF.equalize(clip),
    "Invert": lambda clip, s: TF.invert(clip),
    "Rotate": lambda clip, s: warp(clip, degrees=30 * s),
    "Posterize": lambda clip, s: TF.posterize(clip, 4 - int(4 * abs(s))),  # bits to keep
    # 256.0, not 256, which would wrap around to 0 as uint8
    "Solarize": lambda clip, s: torch.where(clip >= 256.0 - int(256 * abs(s)), ~clip, clip),
    "SolarizeAdd": lambda clip, s: clip + int(110 * abs(s)) * (clip < 128).byte(),
    "Color": enhance(TF.adjust_saturation),
    "Contrast": enhance(TF.adjust_contrast),
    "Brightness": enhance(TF.adjust_brightness),
    "Sharpness": enhance(TF.adjust_sharpness),
    "ShearX": lambda clip, s: warp(clip, shear_x=0.3 * s),
    "ShearY": lambda clip, s: warp(clip, shear_y=0.3 * s),
    "TranslateX": lambda clip, s: warp(clip, right=0.45 * s),
    "TranslateY": lambda clip, s: warp(clip, down=0.45 * s),
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
                clip = operations[index](clip, m if sign else -m)
        return clip


def augmentation(args):
    """RandAugment and random erasing of clips, uint8 (T, 3, H, W); erased pixels get the mean."""
    erase = v2.RandomErasing(args.random_erasing, value=round(255 * PIXEL_MEAN))
    if args.rand_augment[0] == 0:
        return erase
    return v2.Compose([RandAugment(*args.rand_augment), erase])


def mix_clips(video, label, num_classes, args):
    """MixUp or CutMix of whole clips, chosen at random; also turns labels into soft targets.

    uint8 (B*R, 3, T, H, W), (B*R,) -> mixed and normalised clips, (B*R, num_classes).
    """
    kinds = (v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    if not mixes or len(video) == args.repeat_aug:  # a single video has nothing to mix with
        return normalize(video), F.one_hot(label, num_classes).float()
    # torchvision mixes each clip with the one before it. So all videos' first clips come first,
    # then their second ones, ...: no two of a video are neighbours.
    order = torch.arange(len(video), device=video.device).view(-1, args.repeat_aug).T.flatten()
    pictures = normalize(video[order]).flatten(1, 2)  # (B*R, 3*T, H, W)
    pictures, target = v2.RandomChoice(mixes)(pictures, label[order])
    return pictures.unflatten(1, (3, -1)), target


# ------------------------------------------------------------------------------------------ test


def predict(classifier, videos, args, views, chunk=32):
    """Class probabilities of each video, averaged over its views, `chunk` of them at once.

    Returns {index: (num_classes,)}, and {index: reason} of unreadable videos.
    """
    device = classifier.cls_token.device
    classifier.eval()

    def average_views(sample):
        logits = [classifier(clips) for clips in sample["video"].split(chunk)]
        return torch.cat(logits).float().softmax(1).mean(0).cpu()  # (num_classes,)

    return run_test(MultiViewDataset(videos, args, views), device, average_views)


def test(classifier, videos, args, views):
    """Multi-view test: top-1 and top-5 in %, as a dict, and {index: reason} of unreadable videos.

    An unreadable video counts as wrong.
    """
    scores, failures = predict(classifier, videos, args, views)
    ranks = []  # of the true class among the scores
    for index, values in scores.items():
        order = values.argsort(descending=True, stable=True).tolist()
        ranks.append(order.index(videos.labels[index]))
    top1, top5 = (100 * sum(place < k for place in ranks) / len(videos) for k in (1, 5))
    return dict(top1=top1, top5=top5, videos=len(videos), unreadable=len(failures)), failures


def report(classifier, videos, args):
    """Test with --views, print the results, and write them to results.json."""
    results, failures = test(classifier, videos, args, args.views)
    results |= dict(views="{}x{}".format(*args.views), init=args.init)
    text = "top-1 {top1:.2f} %, top-5 {top5:.2f} %; videos {videos}, views {views}"
    print_rank0(text.format(**results))
    on_rank0(write_json, f"{args.output_dir}/results.json", results)
    report_failures(args, videos, failures)


def main():
    args = parse_args()
    if not (args.eval or args.predict):
        return train(args)
    device = start_process(args)
    saved = read_checkpoint(args.init)
    names = saved.get("classes")
    num_classes = saved.get("config", vars(args)).get("num_classes") or CLASSES.get(args.dataset)
    if not num_classes:
        raise InputError("--num_classes is needed: how many classes does the checkpoint have?")
    classifier = Classifier(**model_config(args, num_classes)).to(device)
    load_pretrained(classifier, args.init, strict=True)
    if args.eval:
        on_rank0(make_demo, args)
        videos = on_rank0(find_videos, args, "val", names or num_classes)
        return report(classifier, videos, args)
    videos = VideoList("--predict", ".", args.predict)
    scores, failures = predict(classifier, videos, args, args.views)
    for index, values in scores.items():
        print(f"{args.predict[index]}:")
        for score, i in zip(*values.topk(min(5, len(values)))):
            print(f"  {score:6.1%}  {names[i] if names else f'class {i}'}")
    if failures:
        reasons = "\n".join(f"{args.predict[i]} {failures[i]}" for i in failures)
        raise InputError(f"{len(failures)} of {len(videos)} videos cannot be read: {reasons}")


if __name__ == "__main__":
    run_main(main)
