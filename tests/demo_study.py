"""What the paper found, in small: every figure of the README's tables on the demo, by the stages' own commands.

    python tests/demo_study.py pays        does pre-training pay? classification, both sides searched alike; 3 seeds
    python tests/demo_study.py detects     the same for detection
    python tests/demo_study.py ablations   masking, ratio, decoder, repeated sampling, masked fine-tuning, image start
    python tests/demo_study.py             all of it: hours

Each run is a folder below --folder (default runs/study), and is not repeated where it has ended: stop the study when you
like, the same command goes on. As many runs at once as there are cores, each on one: the figures are those of the
commands that are printed, to float tolerance; times are those of one core.
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
            batch = json.loads((out / "args.json").read_text())
            clips = batch["batch_size"] * batch["repeat_aug"] * batch["log_interval"]
            results = {
                "loss": log[-1]["loss"],
                "seconds": sum(clips / entry["clips_per_s"] for entry in log),
            }
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


def compare(study, stage):
    """From scratch and pre-trained: each with its own best learning rate, decay and length; then three seeds.

    A seed is one of everything: a pre-trained run of seed 1 starts from a pre-training of seed 1.
    """
    short, long = LENGTHS[stage]
    sides = "scratch", "pre-trained"
    for seed in SEEDS:  # they take longest: first in the queue
        study.start("mae_pretrain", f"seed{seed}", seed=seed)

    def start(side, lr, decay, epochs, seed=0):
        init = {"init": study.pretrain(f"seed{seed}", seed=seed)} if side == "pre-trained" else {}
        name = f"{side}_lr{lr:g}_decay{decay:g}_epochs{epochs}_seed{seed}"
        return study.start(stage, name, **init, lr=lr, layer_decay=decay, epochs=epochs, seed=seed)

    settings = list(itertools.product(sides, RATES[stage], DECAYS))
    searched = {setting: start(*setting, short) for setting in settings}
    searched = {
        (*setting, short): score_of(stage, run.result()) for setting, run in searched.items()
    }
    longer = {}
    for side in sides:
        better = sorted((s for s in searched if s[0] == side), key=searched.get, reverse=True)[:3]
        longer |= {(*s[:3], long): start(*s[:3], long) for s in better}
    searched |= {setting: score_of(stage, run.result()) for setting, run in longer.items()}
    print(
        f"\n{stage}, seed 0      learning rate  layer-wise decay  epochs   {'top-1' if 'cls' in stage else 'mAP'}"
    )
    for (side, lr, decay, epochs), score in sorted(searched.items()):
        print(f"{side:24}{lr:12g}{decay:18g}{epochs:8}{score:9.1f}")
    best = {side: max((s for s in searched if s[0] == side), key=searched.get) for side in sides}
    finals = {side: [start(*best[side], seed) for seed in SEEDS] for side in sides}
    print(f"\n{stage}, the best of each, mean of {len(SEEDS)} seeds (lowest to highest)")
    for side, runs in finals.items():
        print(
            f"{side:14}{best[side][1:]}   {spread([score_of(stage, run.result()) for run in runs])}",
            flush=True,
        )
    if stage == "finetune_cls":
        probes = {side: [start(side, lr, 0, short) for lr in PROBE_RATES] for side in sides}
        for side, runs in probes.items():
            score = max(score_of(stage, run.result()) for run in runs)
            print(f"{side}, a linear probe (--layer_decay 0): {score:.1f}", flush=True)


# What the ablations start from: the demo's recipes, both shortened.
BASE = {"epochs": 32}
FINETUNING = {"epochs": 40}
# Each ablation: what it varies, and the paper's figure for it ("": it gives none).
ABLATIONS = {
    "nothing changed: what chance does": {
        f"pre-training's seed {n}": ({"seed": n} if n else {}, "") for n in (0, 1)
    },
    "masked fine-tuning (Table 11)": {
        f"from {start:.0%}": ({"mask_start": start} if start else {}, paper)
        for start, paper in ((0, "84.4, 1.0 x"), (0.5, "84.1, 1.2 x"), (0.75, "83.8, 1.3 x"))
    },
    "mask sampling (Table 12a, SSv2)": {
        "agnostic 90 %": ({}, 63.4),
        "space-only 90 %": ({"mask_type": "space-only"}, 59.5),
        "time-only 75 %": ({"mask_type": "time-only", "mask_ratio": 0.75}, 61.9),
        "block-wise 75 %": ({"mask_type": "block-wise", "mask_ratio": 0.75}, ""),
    },
    "mask ratio (Figure 6)": {
        f"{ratio:.0%}": ({"mask_ratio": ratio} if ratio != 0.9 else {}, "")
        for ratio in (0.5, 0.75, 0.9, 0.95)
    },
    "repeated sampling at equal effective epochs": {
        f"{n} samples": ({"repeat_aug": n, "batch_size": 32 // n, "lr": 2e-3} if n > 1 else {}, "")
        for n in (1, 2, 4)
    },
    "pre-trained on (Table 3)": {
        "video": ({}, ""),
        "images: one frame, its 2D kernel repeated": (
            {"num_frames": 2, "sampling_rate": 0, "mask_ratio": 0.75},
            "",
        ),
    },
    "decoder width (Table 12b: 128, 256, 512)": {
        "16": ({"decoder_embed_dim": 16}, 59.4),
        "32": ({"decoder_embed_dim": 32}, 63.2),
        "64": ({}, 63.4),
    },
    "decoder depth (Table 12c)": {
        f"{n} blocks": ({"decoder_depth": n} if n != 2 else {}, paper)
        for n, paper in ((1, 63.9), (2, 63.4), (4, 63.4))
    },
}


def ablate(study, flags):
    """One row: the pre-training with these flags (mask_start is one of fine-tuning), and its fine-tunings, as results."""
    flags = BASE | flags
    masked = {"mask_start": flags.pop("mask_start")} if "mask_start" in flags else {}
    name, after = (
        "_".join(f"{key}{value}" for key, value in chosen.items())
        for chosen in (flags, flags | masked)
    )
    init = study.pretrain(name, **flags)
    runs = [
        study.start(
            "finetune_cls", f"from_{after}_seed{s}", init=init, seed=s, **FINETUNING, **masked
        )
        for s in SEEDS[:2]
    ]
    return study.start("mae_pretrain", name, **flags).result(), [run.result() for run in runs]


def ablations(study, epochs, jobs):
    """Pre-trainings that differ in one thing, each fine-tuned alike.

    epochs: of each pre-training; None: those of BASE.
    """
    waiting = concurrent.futures.ThreadPoolExecutor(
        jobs
    )  # rows wait for their runs, which share the study's own pool
    more = {"epochs": epochs} if epochs else {}
    rows = {(name, row): waiting.submit(ablate, study, flags | more) for name, table in ABLATIONS.items()
            for row, (flags, _) in table.items()}  # fmt: skip
    for name, table in ABLATIONS.items():
        print(f"\n{name:44}{'top-1':>22}{'pre-training':>14}{'fine-tuning':>13}{'the paper':>13}")
        for row, (_, paper) in table.items():
            pretraining, runs = rows[name, row].result()
            seconds = mean(run["seconds"] for run in runs)
            scores = spread([run["top1"] for run in runs])
            with study.printing:
                print(
                    f"{row:44}{scores:>22}{pretraining['seconds']:12.0f} s{seconds:11.0f} s{paper:>13}",
                    flush=True,
                )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="pays, detects, ablations; default: all"
    )
    parser.add_argument("--folder", default="runs/study")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at once"
    )
    parser.add_argument(
        "--epochs", type=int, help=f"of each pre-training in `ablations`; default: {BASE['epochs']}"
    )
    args = parser.parse_args()
    unknown = set(args.parts) - {"pays", "detects", "ablations"}
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    study, parts = Study(args.folder, args.jobs), args.parts or ["pays", "detects", "ablations"]
    if "pays" in parts:
        compare(study, "finetune_cls")
    if "detects" in parts:
        compare(study, "finetune_ava")
    if "ablations" in parts:
        ablations(study, args.epochs, args.jobs)


if __name__ == "__main__":
    main()
