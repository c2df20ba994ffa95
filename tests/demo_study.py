"""What the paper found, in small: the tables of RESULTS.md on the demo; each run in one process.

    python tests/demo_study.py pays        does pre-training pay? each side with BEST; 3 seeds
    python tests/demo_study.py detects     the same for detection
    python tests/demo_study.py search      each side's best learning rate and decay
    python tests/demo_study.py ablations   masking, ratio, decoder, repeated sampling, image start
    python tests/demo_study.py shapes      the shapes and their names, drawn to shapes.png

Each run is a folder below --folder; ended ones are not repeated. One run per core at once.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.utils import draw_bounding_boxes, make_grid

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
import model

# What is searched, for both sides alike: learning rate, layer-wise decay; epochs, the second for the best three.
RATES = 1e-3, 2e-3, 4e-3, 8e-3
DECAYS = 1.0, 0.75, 0.6
LENGTHS = {"finetune_cls": (12, 24), "finetune_ava": (60, 60)}
BEST = {  # what is compared, among the search's best: learning rate, layer-wise decay, epochs
    "finetune_cls": {"scratch": (1e-3, 0.6, 24), "pre-trained": (8e-3, 0.6, 24)},
    "finetune_ava": {"scratch": (4e-3, 0.6, 60), "pre-trained": (8e-3, 0.45, 60)},
}


def run(args, row):
    """The results of a run, made if need be: a stage, its flags, those of its pre-training or None."""
    stage, flags, init = row
    name = flags if init is None else f"{flags} from {init}"
    out = Path(args.folder, stage, name.replace("--", "").replace(" ", "_").strip("_"))
    done = out / "done.json"
    before = run(args, ("mae_pretrain", init, None)) if init is not None else None
    if not done.exists():
        line = [sys.executable, str(ROOT / f"{stage}.py"), "--dataset", "demo", *flags.split()]
        line += ["--num_workers", "0", "--output_dir", str(out)]
        line += ["--init", before["checkpoint"]] if before else []
        print(f"{' '.join(line)}\n", end="", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "output.txt", "a") as text:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.run(line, stdout=text, stderr=text, env=environment).returncode
        if code:
            raise SystemExit(f"{' '.join(line)} ended with {code}: see {out}/output.txt")
        used = json.loads((out / "args.json").read_text())
        clips = used["batch_size"] * used.get("repeat_aug", 1) * used["log_interval"]
        log = [json.loads(entry) for entry in (out / "log.jsonl").read_text().splitlines()]
        results = dict(seconds=sum(clips / entry["clips_per_s"] for entry in log))
        if stage != "mae_pretrain":
            results |= json.loads((out / "results.json").read_text())
        done.write_text(json.dumps(results))
    return json.loads(done.read_text()) | dict(checkpoint=f"{out}/checkpoint.pt", before=before)


def run_all(args, rows):
    """The results of runs, in order; --jobs at once, each once, after the pre-trainings they need."""
    first = [("mae_pretrain", init, None) for _, _, init in rows if init is not None]
    with ThreadPoolExecutor(args.jobs) as pool:
        for once in dict.fromkeys(first), dict.fromkeys(rows):
            found = dict(zip(once, pool.map(partial(run, args), once)))
    return [found[row] for row in rows]


def scores(args, rows):
    """{row: score} of fine-tunings: stage, side, learning rate, layer-wise decay, epochs, seed."""
    runs = []
    for stage, side, lr, decay, epochs, seed in rows:
        flags = f"--lr {lr:g} --layer_decay {decay:g} --epochs {epochs} --seed {seed}"
        # A seed is one of everything: that of the pre-training, too.
        runs.append((stage, flags, f"--seed {seed}" if side == "pre-trained" else None))
    results = zip(rows, run_all(args, runs))
    return {row: result.get("top1", result.get("mAP")) for row, result in results}


def spread(values):
    return f"{np.mean(values):5.1f}  ({min(values):.1f} to {max(values):.1f})"


def search(args):
    """Every rate and decay with the first seed, then the best three of each side at full length with all seeds."""
    for stage, (short, full) in LENGTHS.items():
        rows = itertools.product([stage], BEST[stage], RATES, DECAYS, [short], args.seeds[:1])
        found = scores(args, [*rows])
        for side in BEST[stage]:
            best = sorted((row for row in found if row[1] == side), key=found.get)[-3:]
            found |= scores(args, [(*row[:4], full, seed) for row in best for seed in args.seeds])
        print(f"\n{stage:24}learning rate  layer-wise decay  epochs   score")
        for row, seeds in itertools.groupby(sorted(found), lambda row: row[:5]):
            figures = f"{row[1]:24}{row[2]:13g}{row[3]:18g}{row[4]:8}"
            print(figures, spread([found[seed] for seed in seeds]), flush=True)


def compare(stage, args):
    """From scratch and pre-trained, each at its best: mean and range of the seeds."""
    sides = BEST[stage].items()
    rows = [(stage, side, *best, seed) for side, best in sides for seed in args.seeds]
    found = scores(args, rows)
    print(f"\n{stage}: learning rate, layer-wise decay, epochs; mean (lowest to highest)")
    for side, best in sides:
        values = [score for row, score in found.items() if row[1] == side]
        print(f"{side:14}{best}   {spread(values)}", flush=True)


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


def ablations(args):
    """Pre-trainings that differ in one thing, fine-tuned alike."""
    for name, table in ABLATIONS.items():
        rows = []
        for flags, seed in itertools.product(table, args.seeds):
            before, after = ("", flags + " ") if "mask_start" in flags else (flags + " ", "")
            rows.append(("finetune_cls", f"{after}--seed {seed}", f"{before}--seed {seed}"))
        runs = run_all(args, rows)
        figures = [(run["before"]["seconds"], run["seconds"], run["top1"]) for run in runs]
        figures = np.reshape(figures, (len(table), -1, 3)).swapaxes(1, 2)
        print(f"\n{name:44}{'top-1':>22}{'pre-training':>14}{'fine-tuning':>13}{'the paper':>13}")
        for (flags, paper), (first, second, top1) in zip(table.items(), figures):
            print(f"{flags or 'the recipe':44}{spread(top1):>22}{np.mean(first):12.0f} s", end="")
            print(f"{np.mean(second):11.0f} s{paper:>13}", flush=True)


def shapes(args, zoom=3):
    """Draw a frame of a video of each shape, with the shape's name."""
    pictures = []
    for i, shape in enumerate(data.DEMO_SHAPES):
        video, _ = data.draw_scene(i, [(shape, "slides", 0.5)], (15, 17), (56, 48))
        frame = video[len(video) // 2].repeat(zoom, 0).repeat(zoom, 1)
        frame = np.pad(frame, ((16, 0), (0, 0), (0, 0)), constant_values=255)  # white, to write on
        picture, box = torch.from_numpy(frame).permute(2, 0, 1), torch.zeros(1, 4)  # for a label
        pictures.append(draw_bounding_boxes(picture, box, [shape], "white", label_colors="black"))
    data.write_png("shapes.png", make_grid(pictures, nrow=4, pad_value=255))
    print("shapes.png: the shapes of the demo")


PARTS = dict(pays=partial(compare, "finetune_cls"), detects=partial(compare, "finetune_ava"))
PARTS |= dict(search=search, ablations=ablations, shapes=shapes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=model.HelpFormatter)
    add = parser.add_argument
    add("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    add("--folder", default="runs/study", help="of the runs")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    add("--seeds", type=int, nargs="+", default=(0, 1, 2), help="of everything but shapes")
    args = parser.parse_args()
    for name in args.parts:
        PARTS[name](args)


if __name__ == "__main__":
    main()
