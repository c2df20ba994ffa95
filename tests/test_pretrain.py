"""Stage 1: its recipe, its loop, its command line and its pictures."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
import finetune_ava
import finetune_cls
import mae_pretrain
import model as m
from model import InputError

ROOT = Path(__file__).parents[1]
SMALL = (
    "--model vit_demo --img_size 24 --decoder_width 32 --decoder_depth 1 --precision fp32 --num_workers 0 --log_every 1 "
    "--repeats 4"
)


def test_the_recipe_is_table_5a():
    recipe = mae_pretrain.RECIPE
    table = [
        ("optimizer", torch.optim.AdamW),
        ("optimizer momentum", (0.9, 0.95)),
        ("weight decay", 0.05),
        ("learning rate", 1.6e-3),
        ("learning rate schedule", m.cosine_decay),
        ("warmup epochs", 120),
        ("epochs", 800),
        ("repeated sampling", 4),
        ("augmentation", {"hflip": True, "crop": [0.5, 1.0]}),
        ("batch size", 512),
        ("gradient clipping", 0.02),
    ]
    assert list(recipe.items()) == table


def parse(line):
    return mae_pretrain.parse_args(line.split())[0]


def test_without_flags_the_run_is_table_5a_with_vit_l():
    args = parse("")
    assert (args.dataset, args.model, args.img_size, args.num_frames, args.sampling_rate) == (
        "kinetics400",
        "vit_l",
        224,
        16,
        4,
    )
    assert (args.epochs, args.warmup_epochs, args.lr, args.batch_size, args.repeats) == (800, 120, 1.6e-3, 512, 4)
    assert (args.weight_decay, args.clip_grad, args.hflip, args.crop) == (0.05, 0.02, True, [0.5, 1.0])
    assert (args.mask_ratio, args.masking, args.norm_pix_loss, args.target) == (0.9, "agnostic", True, "slice")
    assert (args.decoder_width, args.decoder_depth, args.decoder_heads) == (512, 4, 8)
    mae = m.MAE(**mae_pretrain.config_of(args))
    assert len(mae.decoder_blocks) == 4 and mae.decoder_pred.out_features == 768 and mae.blocks[0].attn.num_heads == 16
    assert args.output_dir == "runs/mae_pretrain_kinetics400_vit_l"


def test_blocks_computed_twice_change_neither_loss_nor_gradients():
    results = []
    for flag in ("", "--checkpoint_activations"):
        torch.manual_seed(0)
        mae = m.MAE(**mae_pretrain.config_of(parse(f"--model vit_demo {flag}")))
        begun = []
        for block in [*mae.blocks, *mae.decoder_blocks]:
            block.register_forward_pre_hook(lambda block, _, begun=begun: begun.append(block))
        loss, _, _ = mae(torch.randn(2, 3, 16, 32, 32), 0.9, torch.rand(2, 128))
        loss.backward()
        assert set(Counter(begun).values()) == {2 if flag else 1}
        results.append((loss, *(parameter.grad for parameter in mae.parameters() if parameter.grad is not None)))
    torch.testing.assert_close(*results)


def test_a_run_from_weights_does_not_write_beside_them():
    assert parse("--init weights/a.pth --target tubelet").output_dir == "runs/mae_pretrain_kinetics400_vit_l"


@pytest.mark.parametrize(
    "folder, labels, name",
    [
        ("20bn-something-something-v2", "", "ssv2"),
        ("SSv2", "", "ssv2"),
        ("any", "something-something-v2-labels.json", "ssv2"),
        ("kinetics600", "", "kinetics600"),
    ],
)
def test_a_data_set_is_known_by_its_folder(folder, labels, name, tmp_path):
    (tmp_path / folder / "labels").mkdir(parents=True)
    for file in filter(None, ("train.json", labels)):
        (tmp_path / folder / "labels" / file).touch()
    for data_set in (tmp_path / folder, tmp_path / folder / "labels" / "train.json"):
        assert parse(f"--data {data_set}").dataset == name


def test_pictures_of_a_model_lie_beside_it():
    assert parse("--visualize a.mp4 --init weights/a.pth").output_dir == "weights"
    assert parse("--visualize a.mp4 --init weights/a.pth --output_dir b").output_dir == "b"


def test_learning_rate_scales_with_the_batch_and_warmup_with_the_epochs():
    assert parse("--batch_size 128").lr == pytest.approx(4e-4)
    assert parse("--batch_size 128 --lr 1e-3").lr == 1e-3
    assert parse("--epochs 200").warmup_epochs == 30 and parse("--epochs 1600").warmup_epochs == 120
    assert parse("--decoder_width 128").decoder_heads == 2 and parse("--decoder_heads 16").decoder_heads == 16


def train(line, *more):
    mae_pretrain.train(*mae_pretrain.parse_args(f"{SMALL} {line}".split() + [str(word) for word in more]))


def entries(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory):
    """Five steps of 4 videos on one process: 10 effective epochs of 8 videos, 4 clips at a time."""
    out = tmp_path_factory.mktemp("runs") / "one"
    train("--epochs 10 --batch_size 4 --lr 1e-3 --data", demo, "--output_dir", out)
    return out


def test_a_run_leaves_what_the_readme_says(run):
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    mae = m.MAE(**checkpoint["config"])
    mae.load_state_dict(checkpoint["model"])
    args = json.loads((run / "args.json").read_text())
    assert checkpoint["step"] == 5 and args["batch_size"] == 4
    log = entries(run)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5] and log[-1]["epoch"] == 10
    for name in ("loss", "lr", "grad_norm", "clips_per_s", "data_wait"):
        assert all(np.isfinite(entry[name]) for entry in log), name
    assert log[0]["lr"] == 0 and log[2]["lr"] == pytest.approx(m.cosine_decay(4, 1e-3, args["warmup_epochs"], 10))
    assert not list(run.glob("*.tmp"))
    pictures = sorted(path.name for path in (run / "reconstructions").iterdir())
    assert pictures == [f"val{i}_000005_000008.{suffix}" for i in range(2) for suffix in ("mp4", "png")]
    with av.open(str(run / "reconstructions" / pictures[0])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 8


@pytest.mark.parametrize("change", ["--micro_batch 1", "--micro_batch 2 --num_workers 2"])
def test_accumulation_and_workers_change_nothing(change, run, demo, tmp_path):
    train(f"--epochs 10 --batch_size 4 --lr 1e-3 {change} --data", demo, "--output_dir", tmp_path)
    for ours, theirs in zip(entries(tmp_path), entries(run), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_two_processes_give_the_losses_of_one(run, demo, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "mae_pretrain.py",
    ]
    command += f"{SMALL} --epochs 10 --batch_size 4 --lr 1e-3 --micro_batch 1 --output_dir {tmp_path}".split()
    done = subprocess.run([*command, "--data", str(demo)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(entries(tmp_path), entries(run), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True)["model"] for f in (tmp_path, run))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


def test_a_stopped_run_goes_on_mid_epoch_as_if_it_had_not_stopped(run, demo, tmp_path, monkeypatch, capsys):
    class Killed(Exception):
        pass

    def step_then_die(self, *args, **kwargs):
        if self.done == 3:
            raise Killed
        return step(self, *args, **kwargs)

    step = m.Log.step
    line = "--epochs 10 --batch_size 4 --lr 1e-3 --save_minutes 0 --data", demo, "--output_dir", tmp_path
    monkeypatch.setattr(m.Log, "step", step_then_die)
    with pytest.raises(Killed):
        train(*line)
    monkeypatch.setattr(m.Log, "step", step)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    with open(tmp_path / "log.jsonl", "a") as log:  # as a kill leaves it: a line beyond the checkpoint, and half a line
        log.write('{"step": 4, "loss": 9.0}\n{"step": 5, "lo')
    train(*line)
    assert "going on after step 3" in capsys.readouterr().out
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (tmp_path, run))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    for name, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(ours["optimizer"]["state"][name][key], state[key]) for key in state)
    for ours, theirs in zip(entries(tmp_path), entries(run), strict=True):
        assert all(ours[name] == theirs[name] for name in ("step", "epoch", "loss", "lr", "grad_norm"))


def test_a_run_is_neither_overwritten_nor_continued_with_other_arguments(run, demo):
    before = (run / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match=r"other arguments \(--mask_ratio was 0.9, is 0.5\).*--no-resume"):
        train("--epochs 10 --batch_size 4 --lr 1e-3 --mask_ratio 0.5 --data", demo, "--output_dir", run)
    with pytest.raises(InputError, match=r"other arguments \(--init was None, is .*checkpoint.pt\)"):
        line = f"--epochs 10 --batch_size 4 --lr 1e-3 --init {run}/checkpoint.pt --data"
        train(line, demo, "--output_dir", run)
    with pytest.raises(InputError, match=r"other arguments \(--target was slice, is tubelet\)"):
        train("--epochs 10 --batch_size 4 --lr 1e-3 --target tubelet --data", demo, "--output_dir", run)
    assert (run / "checkpoint.pt").read_bytes() == before


def test_a_restart_by_torchrun_does_not_start_anew(run, demo, monkeypatch):
    args = parse(f"{SMALL} --epochs 10 --batch_size 4 --lr 1e-3 --data {demo} --output_dir {run} --no-resume")
    assert m.find_run(args) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert m.find_run(args)["step"] > 0


def test_a_run_that_replaces_another_leaves_nothing_of_it_to_go_on_from(run, demo, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(run / "checkpoint.pt", tmp_path / "run" / "checkpoint_previous.pt")
    line = f"--epochs 10 --batch_size 4 --lr 1e-3 --no-resume --output_dir {tmp_path}/run"
    for init in ("run", "run/checkpoint.pt"):  # but a file that the new run needs is not deleted
        with pytest.raises(InputError, match=r"--no-resume deletes what is in --output_dir"):
            train(line, "--init", tmp_path / init, "--data", demo)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == (run / "checkpoint.pt").read_bytes()

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(m.Log, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(line, "--data", demo)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_without_clipping_weights_move(demo, tmp_path):
    line = "--epochs 4 --batch_size 4 --lr 1e-2 --warmup_epochs 0 --clip_grad 0 --data"
    train(line, demo, "--output_dir", tmp_path)
    torch.manual_seed(0)
    new = m.MAE(**mae_pretrain.config_of(parse(SMALL)))
    moved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]["decoder_embed.weight"]
    assert (moved - new.decoder_embed.weight).abs().max() > 1e-3


def test_init_starts_from_weights(run, demo, tmp_path, capsys):
    line = f"--epochs 4 --batch_size 8 --lr 1e-12 --no-resume --init {run}/checkpoint.pt --data"
    train(line, demo, "--output_dir", tmp_path)
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True)["model"] for f in (tmp_path, run))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    with pytest.raises(InputError, match=r"does not fit this model.*Is --model"):
        mae_pretrain.train(*mae_pretrain.parse_args([*line.split(), str(demo), "--model", "vit_b", "--epochs", "8"]))


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_files(run, demo, tmp_path, monkeypatch):
    forward = m.MAE.forward

    def poisoned(self, video, *args):
        loss, pred, mask = forward(self, video, *args)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 3 else loss), pred, mask

    calls = []
    monkeypatch.setattr(m.MAE, "forward", poisoned)
    line = "--epochs 10 --batch_size 4 --lr 1e-3 --save_minutes 0 --data", demo, "--output_dir", tmp_path
    with pytest.raises(FloatingPointError, match=r"(?s)step 2: loss nan.*'lr': 0.000\d+.*from before.*\.mp4") as error:
        train(*line)
    stream = list(data.Stream(8, 4, 4, 0, 1, 0, 0, 5))[2]
    videos = data.find_videos(demo)
    assert str(error.value).splitlines()[1:] == [videos.path(index) for _, index in stream]
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 2 and all(value.isfinite().all() for value in checkpoint["model"].values())


def test_more_failures_than_allowed_stop_the_run_and_fewer_are_reported(demo, tmp_path, capsys):
    good = sorted(str(path) for path in (demo / "train").iterdir())
    for i in range(3):
        (tmp_path / f"bad{i}.mp4").write_bytes(b"bad")
    names = [f"bad{i}.mp4" for i in range(3)] + good
    (tmp_path / "list.txt").write_text("\n".join(f"{name} 0" for name in names))
    line = f"--epochs 4 --batch_size 4 --data {tmp_path}/list.txt --output_dir {tmp_path}/out"
    with pytest.raises(data.VideoError, match="more than --max_failures 2"):
        train(line + " --max_failures 2")
    train(line + " --no-resume")
    assert "3 of 11 videos could not be used" in capsys.readouterr().out
    failed = [line.split("\t") for line in (tmp_path / "out" / "failures.log").read_text().splitlines()]
    assert sorted(Path(path).name for path, _ in failed) == ["bad0.mp4", "bad1.mp4", "bad2.mp4"]
    assert all("cannot be opened" in reason for _, reason in failed)


# --------------------------------------------------------------------------------------------------- command line


def command(line):
    """Run the command line in this process; what it prints and the message that it exits with, if it does."""
    sys.argv = ["mae_pretrain.py", *line.split()]
    try:
        m.run_stage(mae_pretrain.main)
    except SystemExit as stop:
        return str(stop.code)
    return ""


@pytest.mark.parametrize(
    "line, error",
    [
        ("", r"data/kinetics400: no such file or folder; expected one of(?s:.*)youtube_id(?s:.*)--dataset demo"),
        ("--data DEMO --mask_ratio 1.0", r"mask ratio 1.0 is outside \[0, 1\)"),
        ("--data DEMO --mask_ratio -0.1", r"mask ratio -0.1 is outside \[0, 1\)"),
        ("--data DEMO --mask_ratio 0.95 --masking time-only", r"hides them all; use less than 0.875"),
        (
            "--data DEMO --num_frames 1",
            r"clips of 1 x 24 x 24 are smaller than a tubelet of 2 x 8 x 8; see --num_frames",
        ),
        ("--data DEMO --decoder_width 30", r"sines need widths of encoder and decoder that 4 divides"),
        ("--data DEMO --batch_size 4 --micro_batch 3", r"--micro_batch 3 does not divide the 4 videos.*: 1, 2, 4"),
        ("--data DEMO --batch_size 0", r"--batch_size 0 does not divide"),
        ("--data DEMO --batch_size 512 --epochs 4", r"4 epochs of 8 videos.*smaller --batch_size or more --epochs"),
        ("--data DEMO --batch_size 8 --init absent.pt", r"absent.pt: no such checkpoint"),
        ("--data DEMO --batch_size 8 --init README.md", r"README.md: not a checkpoint"),
        ("--visualize a.mp4", r"--visualize needs --init CHECKPOINT: the MAE"),
        ("--data DEMO --log_every 0", r"--log_every 0: must be at least 1"),
        ("--data DEMO --seed -1", r"--seed -1: must be at least 0"),
        ("--data DEMO --crop 1 0.5", r"--crop 1 0.5: shares of the frame, the smaller one first"),
        ("--data DEMO --crop 0.5 2", r"--crop 2.0: must be 0 to 1"),
        ("--data DEMO --decoder_heads 3", r"--decoder_heads 3 does not divide --decoder_width 32"),
        ("--data DEMO --device gpu", r"--device gpu: "),
        ("--data DEMO --device cuda", r"--device cuda: there is no GPU that PyTorch can use"),
        ("--data DEMO/val/val0_000005_000008.mp4", r"val0_000005_000008.mp4: a video, not a list of them"),
    ],
)
def test_bad_input_is_told_what_to_do(line, error, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("words")
    message = command(f"{SMALL if line else ''} {line.replace('DEMO', str(demo))}")
    assert message.startswith("mae_pretrain.py: error: ")
    assert re.search(error, message), message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_broken_videos_ends_with_each_and_its_reason(workers, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"broken")
    message = command(
        f"{SMALL} --data {tmp_path} --epochs 8 --batch_size 4 --output_dir {tmp_path}/out --num_workers {workers}"
    )
    assert re.fullmatch(
        r"mae_pretrain.py: error: 20 videos in a row cannot be used:(\n  .*: cannot be opened.*){2}", message
    )
    assert "/a.mp4" in message and "/b.mp4" in message


def test_on_a_cpu_the_small_model_and_its_workers_share_the_cores(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(m, "cores", lambda: 6)
    monkeypatch.setattr(data, "cores", lambda: 6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        for line, omp, expected in (("--model vit_demo", None, 3), ("--model vit_demo", "5", 1), ("", None, 1)):
            torch.set_num_threads(1)
            monkeypatch.setenv("OMP_NUM_THREADS", omp) if omp else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            m.start_process(parse(line))
            assert torch.get_num_threads() == expected
        assert data.workers(parse("")) == 3 and data.workers(parse("--num_workers 0")) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc keeps freed memory as it likes")
def test_on_a_cpu_a_freed_tensor_leaves_its_memory_to_the_next():
    script = """if 1:
        import resource
        import torch, mae_pretrain, model
        model.start_process(mae_pretrain.parse_args(["--data", "x", "--device", "cpu"])[0])
        torch.ones(2**26)  # 256 MiB, freed at once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**25)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert int(ended.stdout) < 20, ended.stderr  # page faults; 64 or 32,768 where the kernel gives the pages anew


def test_a_batch_that_does_not_divide_says_what_would():
    with pytest.raises(InputError, match=r"--batch_size 512 does not divide over 6 processes; 510 or 516 do"):
        m.split_batch(512, 6)
    assert m.split_batch(512, 8, None, at_most=16) == (16, 4)
    assert m.split_batch(12, 2, None, at_most=4) == (3, 2)
    assert m.split_batch(16, 1) == (16, 1)


def test_help_explains_epochs_and_batches():
    env = os.environ | {"COLUMNS": "120"}
    shown = subprocess.run(
        [sys.executable, "mae_pretrain.py", "--help"], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert "Epochs are effective" in shown.stdout and "512 of them are 2048 clips a step" in shown.stdout


@pytest.mark.parametrize("stage", [mae_pretrain, finetune_cls, finetune_ava], ids=lambda stage: stage.__name__)
def test_help_shows_the_values_of_the_recipe_at_hand(stage, capsys):
    demos = {mae_pretrain: mae_pretrain.DEMO_RECIPE, finetune_cls: finetune_cls.DEMO, finetune_ava: finetune_ava.DEMO}
    for size, shown in {
        "vit_h": {
            mae_pretrain: ("800", "512", "0.02"),
            finetune_cls: ("75", "256", "0.8"),
            finetune_ava: ("30", "128"),
        },
        "vit_demo": {which: (demo["epochs"], demo["batch size"]) for which, demo in demos.items()},
    }.items():
        line = ["--dataset", "demo"] if size == "vit_demo" else ["--model", size]
        with pytest.raises(SystemExit):
            stage.parse_args([*line, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert all(f"(default: {value})" in out for value in shown[stage]), size


@pytest.mark.parametrize(
    ("line", "warnings"),
    [
        ("--model vit_demo", []),
        ("--model vit_demo --img_size 36", ["of --img_size 36, 4 rows"]),
        ("--model vit_b", ["on a CPU a step of vit_b"]),
    ],
)
def test_a_run_warns_of_dropped_pixels_and_of_large_models_on_a_cpu(line, warnings, tmp_path, capsys):
    args, _ = mae_pretrain.parse_args([*line.split(), "--output_dir", str(tmp_path)])
    model = torch.nn.Linear(1, 1)
    model.patch_size = m.SIZES[args.model].get("patch_size", 16)
    m.announce(args, model, data.VideoList("list", ".", ["a.mp4"]), torch.device("cpu"), 1, 10, 1)
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith("warning")]
    assert len(said) == len(warnings) and all(text in line for text, line in zip(warnings, said))


# ------------------------------------------------------------------------------------------------------- pictures


def test_visualize_writes_figure_and_animation_and_names_what_it_skips(run, demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"")
    video = next((demo / "val").iterdir())
    shutil.copy(video, "same.mp4")
    (tmp_path / "b").mkdir()
    shutil.copy(video, "b/same.mp4")
    line = f"--visualize {video} broken.mp4 same.mp4 b/same.mp4 --init {run} --output_dir out"
    assert "1 of 4 files are no videos that can be read" in command(line)
    assert {"same_2.png", "same_3.png"} < {path.name for path in (tmp_path / "out" / "visualize").iterdir()}
    out = capsys.readouterr().out
    assert "skipped broken.mp4: cannot be opened" in out and f"out/visualize/{video.stem}.png" in out
    assert Image.open(tmp_path / "out" / "visualize" / f"{video.stem}.png").size[0] > 8 * 96
    with av.open(str(tmp_path / "out" / "visualize" / f"{video.stem}.mp4")) as container:
        frame = next(container.decode(video=0))
        assert container.streams.video[0].codec_context.name == "h264" and frame.width == 3 * frame.height


def test_pictures_are_masked_as_trained_or_as_asked(run, demo, tmp_path, monkeypatch):
    captions = []
    monkeypatch.setattr(mae_pretrain, "draw_figure", lambda path, rows, caption: captions.append(caption))
    line = f"--visualize {next((demo / 'val').iterdir())} --init {run} --output_dir {tmp_path}"
    assert command(line) == command(f"{line} --masking time-only --mask_ratio 0.5 --img_size 32") == ""
    assert "90% hidden (agnostic)" in captions[0] and "50% hidden (time-only)" in captions[1]


@pytest.mark.parametrize("target", ["slice", "tubelet"])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pictures_show_real_colours_and_leave_visible_patches_alone(norm_pix_loss, target, monkeypatch):
    flag = "--norm_pix_loss" if norm_pix_loss else "--no-norm_pix_loss"
    mae = m.MAE(**mae_pretrain.config_of(parse(f"{SMALL} {flag} --target {target}")))
    clip = torch.randint(0, 256, (16, 24, 24, 3), dtype=torch.uint8)
    forward = mae.forward

    def perfect(video, mask_ratio):  # a model that predicts its target exactly
        loss, _, mask = forward(video, mask_ratio)
        return loss, mae.target(m.patchify(video, mae.patch_size, mae.t_patch_size)), mask

    shown = clip if target == "tubelet" else clip[::2]
    original, masked, output = mae_pretrain.reconstruct(mae, clip, 0.9)
    assert torch.equal(original, shown)
    visible = (masked != 115).any(-1)  # hidden patches are grey, the mean
    assert visible.float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert torch.equal(masked[visible], shown[visible]) and torch.equal(output[visible], shown[visible])
    assert not torch.equal(output, shown)
    monkeypatch.setattr(mae, "forward", perfect)
    assert (mae_pretrain.reconstruct(mae, clip, 0.9)[2].int() - shown.int()).abs().max() <= 1
