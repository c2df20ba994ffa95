"""What the paper found, in small: every figure of the README's tables on the demo, by its commands.

    python tests/demo_study.py pays        does pre-training pay? each side at its best; 3 seeds
    python tests/demo_study.py detects     the same for detection
    python tests/demo_study.py search      each side's best learning rate, decay and length
    python tests/demo_study.py ablations   masking, ratio, decoder, repeated sampling, image start
    python tests/demo_study.py shapes      the shapes and their names, drawn to shapes.png

Each run is a folder below --folder; ended ones are not repeated. One run per core at once.
"""

import argparse
import collections
import concurrent.futures
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torchvision.io import write_png
from torchvision.utils import draw_bounding_boxes, make_grid

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data

SEEDS = 0, 1, 2
# What is searched, for both sides alike: learning rate, layer-wise decay and epochs, the longer for the best three.
RATES = 1e-3, 2e-3, 4e-3, 8e-3
DECAYS = 1.0, 0.75, 0.6
LENGTHS = {"finetune_cls": (12, 24), "finetune_ava": (60, 120)}
PROBE_RATES = 1e-2, 3e-2
BEST = {  # what the search found: learning rate, layer-wise decay, epochs
    "finetune_cls": {"scratch": (1e-3, 0.6, 24), "pre-trained": (4e-3, 0.75, 24)},
    "finetune_ava": {"scratch": (2e-3, 1.0, 60), "pre-trained": (4e-3, 0.6, 60)},
}


class Study:
    """Runs below a folder, `jobs` at once; one that two rows need is made once."""

    def __init__(self, folder, jobs):
        self.folder, self.pool = Path(folder), concurrent.futures.ThreadPoolExecutor(jobs)
        self.locks = collections.defaultdict(threading.Lock)

    def all(self, function, rows):
        """What function(*row) returns for each row, in order."""
        return list(self.pool.map(lambda row: function(*row), rows))

    def out(self, stage, flags, init):
        name = flags if init is None else f"{flags} from {init}"
        return self.folder / stage / name.replace("--", "").replace(" ", "_").strip("_")

    def run(self, stage, flags, init=None):
        """The results of a run, made if need be; init: flags of the pre-training to start from."""
        line = [f"{stage}.py", "--dataset", "demo", "--num_workers", "0", *flags.split()]
        if init is not None:
            self.run("mae_pretrain", init)
            line += ["--init", str(self.out("mae_pretrain", init, None) / "checkpoint.pt")]
        out = self.out(stage, flags, init)
        done = out / "done.json"
        with self.locks[out]:
            if not done.exists():
                self.start([*line, "--output_dir", str(out)], out)
                log = [json.loads(entry) for entry in (out / "log.jsonl").read_text().splitlines()]
                args = json.loads((out / "args.json").read_text())
                clips = args["batch_size"] * args.get("repeat_aug", 1) * args["log_interval"]
                results = dict(seconds=sum(clips / entry["clips_per_s"] for entry in log))
                if (out / "results.json").exists():
                    results |= json.loads((out / "results.json").read_text())
                done.write_text(json.dumps(results))
        return json.loads(done.read_text())

    def start(self, line, out):
        print(f"python {' '.join(line)}\n", end="", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "output.txt", "a") as text:
            command = [sys.executable, str(ROOT / line[0]), *line[1:]]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.run(command, stdout=text, stderr=text, env=environment).returncode
        if code:
            raise SystemExit(f"{' '.join(line)} ended with {code}: see {out}/output.txt")

    def score(self, stage, side, lr, decay, epochs, seed=0):
        """The score of a fine-tuning. A seed is one of everything: that of the pre-training, too."""
        flags = f"--lr {lr:g} --layer_decay {decay:g} --epochs {epochs} --seed {seed}"
        results = self.run(stage, flags, f"--seed {seed}" if side == "pre-trained" else None)
        return results["top1" if stage == "finetune_cls" else "mAP"]


def spread(values):
    return f"{mean(values):5.1f}  ({min(values):.1f} to {max(values):.1f})"


def search(study, stage):
    """Every rate and decay at the short length with seed 0, then the best three of each side at the long one."""
    short, long = LENGTHS[stage]
    rows = list(itertools.product([stage], BEST[stage], RATES, DECAYS, [short]))
    scores = dict(zip(rows, study.all(study.score, rows)))
    for side in BEST[stage]:
        better = sorted((row for row in rows if row[1] == side), key=scores.get)[-3:]
        better = [(*row[:4], long) for row in better]
        scores |= zip(better, study.all(study.score, better))
    print(f"\n{stage}, seed 0      learning rate  layer-wise decay  epochs     score")
    for (_, side, lr, decay, epochs), score in sorted(scores.items()):
        print(f"{side:24}{lr:12g}{decay:18g}{epochs:8}{score:9.1f}", flush=True)


def compare(study, stage):
    """From scratch and pre-trained, each at its best: mean and range of the seeds."""
    rows = [(stage, side, *BEST[stage][side], seed) for side in BEST[stage] for seed in SEEDS]
    scores = study.all(study.score, rows)
    print(f"\n{stage}: learning rate, layer-wise decay, epochs; mean (lowest to highest)")
    for i, (side, best) in enumerate(BEST[stage].items()):
        print(f"{side:14}{best}   {spread(scores[3 * i : 3 * i + 3])}", flush=True)
    for side in BEST[stage] if stage == "finetune_cls" else ():
        rows = [(stage, side, lr, 0, LENGTHS[stage][0]) for lr in PROBE_RATES]
        score = max(study.all(study.score, rows))
        print(f"{side}, a linear probe (--layer_decay 0): {score:.1f}", flush=True)


# fmt: off
ABLATIONS = {  # flags of each row, and the paper's figure
    "masked fine-tuning (Table 11)":
        {"": "84.4, 1.0 x", "--mask_start 0.5": "84.1, 1.2 x", "--mask_start 0.75": "83.8, 1.3 x"},
    "mask sampling (Table 12a, SSv2)":
        {"": 63.4, "--mask_type space-only": 59.5, "--mask_type time-only --mask_ratio 0.75": 61.9,
         "--mask_type block-wise --mask_ratio 0.75": ""},
    "mask ratio (Figure 6)": {"--mask_ratio 0.5": "", "--mask_ratio 0.75": "", "": "", "--mask_ratio 0.95": ""},
    "repeated sampling at equal effective epochs":
        {"": "", "--repeat_aug 2 --batch_size 8 --lr 3e-3": "", "--repeat_aug 4 --batch_size 4 --lr 3e-3": ""},
    "images, their 2D kernel repeated (Table 3)": {"": "", "--num_frames 2 --sampling_rate 0 --mask_ratio 0.75": ""},
    "decoder width (Table 12b: 128, 256, 512)": {"--decoder_embed_dim 16": 59.4, "--decoder_embed_dim 32": 63.2, "": 63.4},
    "decoder depth (Table 12c)": {"": 63.9, "--decoder_depth 2": 63.4, "--decoder_depth 4": 63.4},
}
# fmt: on


def ablate(study, flags, seed):
    """Seconds of a pre-training and of a fine-tuning, and the latter's top-1."""
    before, after = ("", flags + " ") if "mask_start" in flags else (flags + " ", "")
    before += f"--seed {seed}"
    finetuned = study.run("finetune_cls", f"{after}--seed {seed}", before)
    return study.run("mae_pretrain", before)["seconds"], finetuned["seconds"], finetuned["top1"]


def ablations(study, seeds):
    """Pre-trainings that differ in one thing, fine-tuned alike."""
    for name, table in ABLATIONS.items():
        runs = study.all(ablate, [(study, flags, seed) for flags in table for seed in seeds])
        print(f"\n{name:44}{'top-1':>22}{'pre-training':>14}{'fine-tuning':>13}{'the paper':>13}")
        for i, (flags, paper) in enumerate(table.items()):
            before, after, scores = zip(*runs[i * len(seeds) :][: len(seeds)])
            print(f"{flags or 'the recipe':44}{spread(scores):>22}{mean(before):12.0f} s", end="")
            print(f"{mean(after):11.0f} s{paper:>13}", flush=True)


def shapes(path="shapes.png", zoom=3):
    """Draw a frame of a video of each shape, with the shape's name."""
    pictures = []
    for i, shape in enumerate(data.DEMO_SHAPES):
        motion = [*data.DEMO_MOTIONS][i % len(data.DEMO_MOTIONS)]
        video, _ = data.draw_scene(i, [(shape, motion, 0.5)], (15, 17), (56, 48))
        frame = torch.from_numpy(video[len(video) // 2]).permute(2, 0, 1)
        frame = frame.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
        frame = F.pad(frame, (0, 0, 16, 0), value=255)  # white, to write on
        corner = torch.zeros(1, 4)  # a label needs a box
        pictures.append(draw_bounding_boxes(frame, corner, [shape], "white", label_colors="black"))
    write_png(make_grid(torch.stack(pictures), nrow=4, pad_value=255), str(path))
    print(f"{path}: the shapes of the demo")


PARTS = {
    "pays": lambda study, args: compare(study, "finetune_cls"),
    "detects": lambda study, args: compare(study, "finetune_ava"),
    "ablations": lambda study, args: ablations(study, args.seeds),
    "search": lambda study, args: [search(study, stage) for stage in BEST],
    "shapes": lambda study, args: shapes(),
}


def main():
    formatter, cores = argparse.RawDescriptionHelpFormatter, os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    add("--folder", default="runs/study")
    add("--jobs", type=int, default=cores, help="runs at once")
    add("--seeds", type=int, nargs="+", default=SEEDS, help="of `ablations` alone")
    args = parser.parse_args()
    unknown = set(args.parts) - {*PARTS}
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    study = Study(args.folder, args.jobs)
    for name, part in PARTS.items():
        if name in args.parts or not args.parts:
            part(study, args)


if __name__ == "__main__":
    main()
