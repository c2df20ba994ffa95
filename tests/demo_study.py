"""What the paper found, in small: every figure of the README's tables on the demo, by its commands.

    python tests/demo_study.py pays        does pre-training pay? each side at its best; 3 seeds
    python tests/demo_study.py detects     the same for detection
    python tests/demo_study.py search      each side's best learning rate, decay and length
    python tests/demo_study.py ablations   masking, ratio, decoder, repeated sampling, image start

Each run is a folder below --folder; ended ones are not repeated. One run per core at once.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 0, 1, 2
# What is searched, for both sides alike: learning rate, layer-wise decay and epochs, the longer for the best three.
RATES = {"finetune_cls": (5e-4, 1e-3, 2e-3, 4e-3), "finetune_ava": (1e-3, 2e-3, 4e-3, 8e-3)}
DECAYS = 1.0, 0.75
LENGTHS = {"finetune_cls": (40, 80), "finetune_ava": (20, 40)}
PROBE_RATES = 1e-2, 3e-2
BEST = {  # what the search found: learning rate, layer-wise decay, epochs
    "finetune_cls": {"scratch": (5e-4, 1.0, 80), "pre-trained": (4e-3, 0.75, 80)},
    "finetune_ava": {"scratch": (4e-3, 1.0, 40), "pre-trained": (2e-3, 0.75, 40)},
}


class Study:
    def __init__(self, folder, jobs):
        self.folder, self.pool = Path(folder), concurrent.futures.ThreadPoolExecutor(jobs)
        self.printing, self.pending = threading.Lock(), {}

    def start(self, stage, name, **flags):
        """Start a run, or find what it left; returns a Future of its results: results.json, or the end of log.jsonl."""
        out = self.folder / stage / name
        if out not in self.pending:
            self.pending[out] = self.pool.submit(self.run, stage, out, flags)
        return self.pending[out]

    def run(self, stage, out, flags):
        line = [stage + ".py", "--dataset", "demo", "--output_dir", str(out)]
        for flag, value in flags.items():
            line += [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
        done = out / "done.json"
        if not done.exists():
            with self.printing:
                print("python", *line, flush=True)
            out.mkdir(parents=True, exist_ok=True)
            with open(out / "output.txt", "a") as text:
                command = [sys.executable, str(ROOT / line[0]), *line[1:], "--num_workers", "0"]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                code = subprocess.run(command, stdout=text, stderr=text, env=environment).returncode
            if code:
                raise SystemExit(f"{' '.join(line)} ended with {code}: see {out}/output.txt")
            log = [json.loads(entry) for entry in (out / "log.jsonl").read_text().splitlines()]
            args = json.loads((out / "args.json").read_text())
            clips = args["batch_size"] * args["repeat_aug"] * args["log_interval"]
            seconds = sum(clips / entry["clips_per_s"] for entry in log)
            results = dict(loss=log[-1]["loss"], seconds=seconds)
            if (out / "results.json").exists():
                results |= json.loads((out / "results.json").read_text())
            done.write_text(json.dumps(results))
        return json.loads(done.read_text())

    def pretrain(self, name, **flags):
        """The checkpoint of a pre-training; waits for it."""
        self.start("mae_pretrain", name, **flags).result()
        return str(self.folder / "mae_pretrain" / name / "checkpoint.pt")


def spread(values):
    return f"{mean(values):5.1f}  ({min(values):.1f} to {max(values):.1f})"


def score_of(stage, results):
    return results["top1"] if stage == "finetune_cls" else 100 * results["mAP"]


def start(study, stage, side, lr, decay, epochs, seed=0):
    """A fine-tuning. A seed is one of everything: that of the pre-training, too."""
    init = {"init": study.pretrain(f"seed{seed}", seed=seed)} if side == "pre-trained" else {}
    name = f"{side}_lr{lr:g}_decay{decay:g}_epochs{epochs}_seed{seed}"
    return study.start(stage, name, **init, lr=lr, layer_decay=decay, epochs=epochs, seed=seed)


def search(study, stage):
    """Every rate and decay at the short length with seed 0, then the best three of each side at the long one."""
    short, long = LENGTHS[stage]
    settings = list(itertools.product(BEST[stage], RATES[stage], DECAYS))
    runs = {(*setting, short): start(study, stage, *setting, short) for setting in settings}
    scores = {setting: score_of(stage, run.result()) for setting, run in runs.items()}
    for side in BEST[stage]:
        better = sorted((s for s in scores if s[0] == side), key=scores.get, reverse=True)[:3]
        runs = {(*s[:3], long): start(study, stage, *s[:3], long) for s in better}
        scores |= {setting: score_of(stage, run.result()) for setting, run in runs.items()}
    print(f"\n{stage}, seed 0      learning rate  layer-wise decay  epochs     score")
    for (side, lr, decay, epochs), score in sorted(scores.items()):
        print(f"{side:24}{lr:12g}{decay:18g}{epochs:8}{score:9.1f}", flush=True)


def compare(study, stage):
    """From scratch and pre-trained, each at its best: mean and range of the seeds."""
    print(f"\n{stage}: learning rate, layer-wise decay, epochs; mean (lowest to highest)")
    runs = {}
    for seed, side in itertools.product(SEEDS, BEST[stage]):
        runs.setdefault(side, []).append(start(study, stage, side, *BEST[stage][side], seed))
    for side, best in BEST[stage].items():
        scores = spread([score_of(stage, run.result()) for run in runs[side]])
        print(f"{side:14}{best}   {scores}", flush=True)
    if stage == "finetune_cls":
        for side in BEST[stage]:
            probes = [start(study, stage, side, lr, 0, LENGTHS[stage][0]) for lr in PROBE_RATES]
            score = max(score_of(stage, run.result()) for run in probes)
            print(f"{side}, a linear probe (--layer_decay 0): {score:.1f}", flush=True)


FINETUNING = {"epochs": 40}  # half as long as the demo's recipe
# Each ablation: flags that it varies, and the paper's figure ("": it gives none).
IMAGES = {"num_frames": 2, "sampling_rate": 0, "mask_ratio": 0.75}
# fmt: off
ABLATIONS = {
    "masked fine-tuning (Table 11)": {
        "from 0%": ({}, "84.4, 1.0 x"),
        "from 50%": ({"mask_start": 0.5}, "84.1, 1.2 x"),
        "from 75%": ({"mask_start": 0.75}, "83.8, 1.3 x"),
    },
    "mask sampling (Table 12a, SSv2)": {
        "agnostic 90 %": ({}, 63.4),
        "space-only 90 %": ({"mask_type": "space-only"}, 59.5),
        "time-only 75 %": ({"mask_type": "time-only", "mask_ratio": 0.75}, 61.9),
        "block-wise 75 %": ({"mask_type": "block-wise", "mask_ratio": 0.75}, ""),
    },
    "mask ratio (Figure 6)": {
        "50%": ({"mask_ratio": 0.5}, ""),
        "75%": ({"mask_ratio": 0.75}, ""),
        "90%": ({}, ""),
        "95%": ({"mask_ratio": 0.95}, ""),
    },
    "repeated sampling at equal effective epochs": {
        "1 samples": ({}, ""),
        "2 samples": ({"repeat_aug": 2, "batch_size": 16, "lr": 2e-3}, ""),
        "4 samples": ({"repeat_aug": 4, "batch_size": 8, "lr": 2e-3}, ""),
    },
    "pre-trained on (Table 3)": {
        "video": ({}, ""),
        "images: one frame, its 2D kernel repeated": (IMAGES, ""),
    },
    "decoder width (Table 12b: 128, 256, 512)": {
        "16": ({"decoder_embed_dim": 16}, 59.4),
        "32": ({"decoder_embed_dim": 32}, 63.2),
        "64": ({}, 63.4),
    },
    "decoder depth (Table 12c)": {
        "1 blocks": ({}, 63.9),
        "2 blocks": ({"decoder_depth": 2}, 63.4),
        "4 blocks": ({"decoder_depth": 4}, 63.4),
    },
}
# fmt: on


def ablate(study, flags, seeds):
    """One row: for each seed the results of a pre-training and, with its own flag mask_start, a fine-tuning."""
    masked = {name: value for name, value in flags.items() if name == "mask_start"}
    flags = {name: value for name, value in flags.items() if name != "mask_start"}
    pretrained, finetuned = [], []
    for seed in seeds:
        name = "_".join(f"{key}{value}" for key, value in {**flags, "seed": seed}.items())
        init = study.pretrain(name, **flags, seed=seed)
        pretrained.append(study.start("mae_pretrain", name, **flags, seed=seed).result())
        after = "_".join(f"{key}{value}" for key, value in {"from": name, **masked}.items())
        more = dict(init=init, seed=seed, **FINETUNING, **masked)
        finetuned.append(study.start("finetune_cls", after, **more).result())
    return pretrained, finetuned


def ablations(study, seeds, jobs):
    """Pre-trainings that differ in one thing, fine-tuned alike."""
    waiting = concurrent.futures.ThreadPoolExecutor(jobs)  # for runs, which share the study's pool
    rows = {}
    for name, table in ABLATIONS.items():
        for row, (flags, _) in table.items():
            rows[name, row] = waiting.submit(ablate, study, flags, seeds)
    for name, table in ABLATIONS.items():
        print(f"\n{name:44}{'top-1':>22}{'pre-training':>14}{'fine-tuning':>13}{'the paper':>13}")
        for row, (_, paper) in table.items():
            pretraining, runs = rows[name, row].result()
            before, seconds = (mean(run["seconds"] for run in part) for part in (pretraining, runs))
            scores = spread([run["top1"] for run in runs])
            text = f"{row:44}{scores:>22}{before:12.0f} s{seconds:11.0f} s{paper:>13}"
            with study.printing:
                print(text, flush=True)


PARTS = {
    "pays": lambda study, args: compare(study, "finetune_cls"),
    "detects": lambda study, args: compare(study, "finetune_ava"),
    "ablations": lambda study, args: ablations(study, args.seeds, args.jobs),
    "search": lambda study, args: [search(study, stage) for stage in BEST],
}


def main():
    formatter, cores = argparse.RawDescriptionHelpFormatter, len(os.sched_getaffinity(0))
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
