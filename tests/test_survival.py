"""What can go wrong, done for real: kills, damaged files, full disks, broken videos, lost processes.

The README's list on fault tolerance has a line for each. `pytest -m long` does the rest of it.
"""

import os
import random
import re
import shutil
import signal
import time
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import STAGES, encode, entries, family, line_of, noise_frames, run_stage, start

import data
import mae_pretrain
import model as m
from model import InputError

long = pytest.mark.long
OTHERS = [pytest.param(stage, marks=long) for stage in ("finetune_cls", "finetune_ava")]
SLOW = """
def slowed(load):  # a step takes as long as a kill needs to hit it
    return lambda *args: [time.sleep(0.1), load(*args)][1]
for kind in (data.ClipDataset, data.KeyframeDataset):
    kind.load = slowed(kind.load)
"""
EAGER = """
import torch
plain = torch.nn.Module.compile
backend = "eager" if torch.__version__ < "2.7" else "aot_eager"  # as in test_compile
torch.nn.Module.compile = lambda self: plain(self, backend=backend)
"""


def outcome(folder):
    """What a run ends in, but for the clock: weights, optimizer and log."""
    checkpoint, log, clock = m.read_checkpoint(folder), [], {"clips_per_s", "data_wait", "tflops"}
    for entry in entries(folder):
        log.append({name: value for name, value in entry.items() if name not in clock})
    return checkpoint["model"], checkpoint["optimizer"], log


def assert_same_bits(one, other):
    (weights, optimizer, log), (weights_2, optimizer_2, log_2) = outcome(one), outcome(other)
    assert log == log_2 and len(log) >= 10
    assert optimizer["param_groups"] == optimizer_2["param_groups"]
    torch.testing.assert_close(weights, weights_2, rtol=0, atol=0)
    torch.testing.assert_close(optimizer["state"], optimizer_2["state"], rtol=0, atol=0)


@pytest.mark.parametrize("stage", ["mae_pretrain", *OTHERS])
def test_a_killed_run_goes_on_in_the_same_bits(stage, videos, whole, tmp_path):
    """kill -9 at a random moment after the first checkpoint; the same command again."""
    line = line_of(stage, videos, tmp_path, "--num_workers 2 --save_minutes 0.001")
    job, lines = start(stage, line, harm=SLOW), random.randint(2, 6)
    job.wait_for(lambda: len(entries(tmp_path)) >= lines and (tmp_path / "checkpoint.pt").exists())
    time.sleep(random.uniform(0, 0.2))
    os.killpg(job.pid, signal.SIGKILL)
    job.finish()
    assert 0 < m.read_checkpoint(m.find_checkpoint(tmp_path))["step"] < 12
    with open(tmp_path / "log.jsonl", "a") as log:  # what is beyond the checkpoint is forgotten
        log.write('{"step": 11, "loss": 9.0}\n{"step": 12, "lo')
    code, text = start(stage, line_of(stage, videos, tmp_path)).finish()
    assert code == 0 and "resuming after step" in text, text
    assert_same_bits(tmp_path, whole(stage))


def stop_and_go_on(stage, more, videos, out, launcher, harm=""):
    """Stop a group with SIGTERM amid its steps, and give the command again."""
    line = line_of(stage, videos, out, more)
    job = start(stage, line, 2, SLOW + harm, launcher)
    job.wait_for(lambda: len(entries(out)) >= 3)
    for process in job.processes:  # or torchrun alone, which passes it on
        os.kill(process.pid, signal.SIGTERM)
    code, text = job.finish()
    assert code != 0 and "asked to stop (SIGTERM): saved after step" in text, text
    step = m.read_checkpoint(out)["step"]
    assert f"saved after step {step} of" in text
    code, text = start(stage, line, 2, harm, launcher).finish()
    assert code == 0 and f"resuming after step {step}" in text, text
    assert 0.5 < max(entry["data_wait"] for entry in entries(out)) < 1.01  # a share, of both alike


def test_a_group_stopped_by_sigterm_goes_on_in_the_same_bits(videos, whole, tmp_path):
    stop_and_go_on("mae_pretrain", "", videos, tmp_path, "fork")
    assert_same_bits(tmp_path, whole("mae_pretrain", processes=2))


@long
@pytest.mark.parametrize("stage", STAGES)
def test_a_compiled_group_of_torchrun_goes_on_in_the_same_bits(stage, videos, whole, tmp_path):
    stop_and_go_on(stage, "--compile", videos, tmp_path, "torchrun", EAGER)
    assert_same_bits(tmp_path, whole(stage, "--compile", processes=2, harm=EAGER))
    plain = entries(whole(stage, processes=2))
    for ours, theirs in zip(entries(tmp_path), plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


@long
@pytest.mark.parametrize("stage", STAGES)
def test_torchrun_brings_back_a_group_that_lost_a_process(stage, videos, whole, tmp_path):
    line = line_of(stage, videos, tmp_path, "--save_minutes 0")
    job = start(stage, line, 2, SLOW, launcher="torchrun", restarts=1)
    job.wait_for(lambda: len(entries(tmp_path)) >= 3)
    os.kill(family(job.pid)[2], signal.SIGKILL)  # rank 1; family()[0] is torchrun
    code, text = job.finish()
    assert code == 0 and "resuming after step" in text, text
    assert_same_bits(tmp_path, whole(stage, processes=2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_or_ctrl_c_saves_and_leaves(number, videos, tmp_path):
    line = line_of("mae_pretrain", videos, tmp_path, "--num_workers 1 --log_interval 100")
    job = start("mae_pretrain", line, harm=SLOW)
    job.wait_for(lambda: "0/12" in job.printed)
    time.sleep(1)
    os.killpg(job.pid, number)  # as a scheduler does: the process and its workers alike
    code, text = job.finish(25)
    assert code == 143 and "Traceback" not in text, text
    step = m.read_checkpoint(tmp_path)["step"]
    assert 0 < step < 12
    assert f"asked to stop ({number.name}): saved after step {step} of 12" in text
    assert "the same command resumes from there" in text


def test_ctrl_c_twice_ends_at_once(videos, tmp_path):
    harm = "m.Run.log = lambda *args, **settings: [print('slow', flush=True), time.sleep(60)]"
    job = start("mae_pretrain", line_of("mae_pretrain", videos, tmp_path), harm=harm)
    for text in "slow", "Ctrl-C again ends at once":
        job.wait_for(lambda text=text: text in job.printed)
        os.kill(job.pid, signal.SIGINT)
    began = time.monotonic()
    code, text = job.finish()
    assert code == 1 and time.monotonic() - began < 20 and "Traceback" not in text
    assert "mae_pretrain.py: interrupted; the same command resumes" in text


def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path):
    content = np.arange(300_000)
    m.save_checkpoint(tmp_path, dict(content=torch.from_numpy(content), step=0))
    rng, steps = random.Random(0), []
    for _ in range(15):
        child = os.fork()
        if child == 0:  # writes without end, until it is killed
            for step in range(10**9):
                now = torch.from_numpy(content + step)
                m.save_checkpoint(tmp_path, dict(content=now, step=step))
        time.sleep(rng.uniform(0.01, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        run = m.read_checkpoint(m.find_checkpoint(tmp_path))
        np.testing.assert_array_equal(run["content"], content + run["step"])
        steps.append(run["step"])
    assert len(set(steps)) > 4  # killed at different moments


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(damage, tmp_path, capsys):
    path, previous = tmp_path / "checkpoint.pt", tmp_path / "checkpoint_previous.pt"
    for step in (1, 2):
        m.save_checkpoint(tmp_path, dict(model=torch.full((1000,), float(step)), step=step))
    assert m.find_checkpoint(tmp_path) == path
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[content.index(np.float32(2).tobytes() * 8) + 2] ^= 16  # one bit of one weight
    if damage == "gone":  # a kill between the two renames
        path.unlink()
    else:
        damaged = dict(cut=content[: len(content) // 2], empty=b"", flipped=flipped, text=b"words")
        path.write_bytes(damaged[damage])
    assert m.find_checkpoint(tmp_path) == previous
    assert m.read_checkpoint(previous)["step"] == 1
    warning = f"warning: {path}: not a readable checkpoint"
    assert (warning in capsys.readouterr().out) == (damage != "gone")
    previous.write_bytes(b"")
    with pytest.raises(InputError, match="none of its checkpoints can be read; --no-resume"):
        m.find_checkpoint(tmp_path)


FULL = """
import resource
def full(*args, save=m.save_checkpoint, calls=[]):
    calls.append(1)
    if len(calls) == 3:  # the system lets no file grow any more, as when a disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    save(*args)
m.save_checkpoint = full
"""


def test_a_full_disk_stops_the_run_with_one_line_that_names_the_file(videos, tmp_path):
    line = line_of("mae_pretrain", videos, tmp_path, "--save_minutes 0")
    code, text = start("mae_pretrain", line, harm=FULL).finish()
    assert code == 1 and "Traceback" not in text, text
    error = rf"error: {tmp_path}/checkpoint.pt: cannot be written: .*File too large\n"
    assert re.search(error, text), text
    assert m.read_checkpoint(m.find_checkpoint(tmp_path))["step"] == 2  # the last good one


@pytest.fixture
def other_run(whole, tmp_path):
    """A copy of a run, in a folder of its own."""
    shutil.copytree(whole("mae_pretrain"), tmp_path / "run")
    shutil.copy(tmp_path / "run" / "checkpoint.pt", tmp_path / "run" / "checkpoint_previous.pt")
    return tmp_path / "run"


def test_no_resume_keeps_what_it_replaces_for_good(other_run, videos, monkeypatch, capsys):
    old = (other_run / "checkpoint.pt").read_bytes()
    line = line_of("mae_pretrain", videos, other_run, "--no-resume --seed 1")
    with monkeypatch.context() as patch:
        patch.setattr(m.Run, "record", Mock(side_effect=KeyboardInterrupt))
        assert "interrupted" in run_stage("mae_pretrain", line)
    assert not list(other_run.glob("*.pt"))
    assert (other_run / "checkpoint.pt.replaced").read_bytes() == old
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # by torchrun, before the first save
    assert run_stage("mae_pretrain", line) == "" and len(entries(other_run)) == 12
    capsys.readouterr()
    assert run_stage("mae_pretrain", line) == ""  # and after it
    assert "resuming after step 12" in capsys.readouterr().out
    assert (other_run / "checkpoint.pt.replaced").read_bytes() == old


FORMATS = {"a.mp4": "libx264", "a.mkv": "libx264", "a.webm": "libvpx-vp9", "a.avi": "mpeg4"}


def test_damaged_videos_give_a_clip_or_a_reason(tmp_path):
    rng, paths = random.Random(0), []
    for name, codec in FORMATS.items():
        content = encode(tmp_path / name, noise_frames(40), codec=codec).read_bytes()
        for i in range(12):
            damaged, at = bytearray(content), rng.randrange(len(content))
            length = rng.randint(1, len(content) // 5)
            if i % 3 == 0:
                del damaged[at:]
            elif i % 3 == 1:
                del damaged[at : at + length]
            else:
                damaged[at : at + length] = rng.randbytes(length)
            paths.append(tmp_path / f"{i}{name}")
            paths[-1].write_bytes(damaged)
    args = mae_pretrain.parse_args(["--model", "vit_demo", "--img_size", "24"])
    views = data.MultiViewDataset(data.VideoList("", "", paths), args, (2, 3))
    handles = len(os.listdir("/proc/self/fd"))
    samples = [views[i] for i in range(len(paths))]
    assert len(os.listdir("/proc/self/fd")) == handles  # none is left open
    clips = [sample["video"] for sample in samples if "video" in sample]
    reasons = {sample["failure"] for sample in samples if "video" not in sample}
    assert len(clips) > 10 and all(clip.shape == (6, 16, 24, 24, 3) for clip in clips)
    assert len(reasons) > 1


def test_each_broken_video_is_logged_once_and_more_than_allowed_stop_the_run(videos, tmp_path):
    some, out = tmp_path / "some", tmp_path / "out"
    broken = ["x.mp4", "y.mp4", "z.mp4", os.fsdecode(b"caf\xe9.mp4")]  # any bytes may be a name
    shutil.copytree(videos / "train", some)
    for name in broken:
        (some / name).write_text("words")
    line = line_of("mae_pretrain", videos, out, f"--data {some} --epochs 8")  # two passes
    code, text = start("mae_pretrain", line, 2).finish()
    assert code == 0 and "4 videos could not be read: see failures.log" in text, text
    rows = [row.split("\t") for row in (out / "failures.log").read_text().splitlines()]
    names = ["caf\\xe9.mp4", "x.mp4", "y.mp4", "z.mp4"]
    assert sorted(path for path, _ in rows) == [f"{some}/{name}" for name in names]
    assert all("cannot be opened" in reason for _, reason in rows)
    assert [entry["step"] for entry in entries(out)] == [1, 2, 3, 4, 5, 6]
    message = run_stage("mae_pretrain", line, "--no-resume --max_failures 3 --log_interval 6")
    assert "error: 4 of 12 videos cannot be read, more than --max_failures 3; " in message
    assert "failures.log" in message and "\n" not in message


def test_one_video_in_a_hundred_may_be_unreadable(tmp_path):
    args, videos = SimpleNamespace(max_failures=None), data.VideoList("", "", map(str, range(999)))
    run = SimpleNamespace(videos=videos, args=args, out=tmp_path, failed=set())
    with pytest.raises(InputError, match=r"10 of 999 videos cannot .* more than --max_failures 9;"):
        for index in range(99):
            m.Run.note_failure(run, index, "broken")


def test_a_killed_worker_is_one_line_and_no_hang(videos, tmp_path):
    line = line_of("mae_pretrain", videos, tmp_path, "--num_workers 2")
    job = start("mae_pretrain", line, harm=SLOW)
    job.wait_for(lambda: len(entries(tmp_path)) >= 1 and len(family(job.pid)) >= 3)
    os.kill(family(job.pid)[-1], signal.SIGKILL)
    code, text = job.finish(40)
    assert code == 1 and "Traceback" not in text, text
    error = r"error: DataLoader worker .*(Killed|exited unexpectedly).*; if it.*--num_workers\n"
    assert re.search(f"mae_pretrain.py: {error}", text), text


POISON = """
def poisoned(*args, forward=m.MAE.forward, calls=[], **settings):
    calls.append(1)
    loss, pred, mask = forward(*args, **settings)
    return loss * (float("nan") if m.RANK == 1 and len(calls) == 4 else 1), pred, mask
m.MAE.forward = poisoned
"""


def test_a_loss_that_is_not_finite_stops_all_processes_with_what_to_do(videos, tmp_path):
    line = line_of("mae_pretrain", videos, tmp_path, "--save_minutes 0")
    code, text = start("mae_pretrain", line, 2, POISON).finish(60)
    assert code == 1 and "Traceback" not in text
    said = r"mae_pretrain.py: error: step 2: loss nan, .*Lower --lr, or try --precision fp32"
    assert len(re.findall(said, text)) == 2, text
    names = {line for line in text.splitlines() if re.fullmatch(f"{videos}/train/.*.mp4", line)}
    assert len(names) == 2  # those of the process whose loss it was
    checkpoint = m.read_checkpoint(tmp_path)
    assert checkpoint["step"] == 2 and checkpoint["model"]["norm.weight"].isfinite().all()


FAILING = """
def failing(run, *args, record=m.Run.record, **settings):
    if m.RANK == 1 and run.done == 3:
        raise ValueError("made up")
    return record(run, *args, **settings)
m.Run.record = failing
"""


def test_a_process_that_ends_alone_leaves_no_other_nor_a_worker(videos, tmp_path):
    line = line_of("mae_pretrain", videos, tmp_path, "--num_workers 1 --epochs 400")
    job = start("mae_pretrain", line, 2, FAILING)
    code, text = job.finish(60)
    assert code == 1 and "ValueError: made up" in text
    assert "; another process has ended or does not answer" in text, text
    for process in job.processes:  # a session of its own: its workers are in it, too
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


def test_other_arguments_neither_overwrite_nor_continue_a_run(other_run, videos, capsys):
    before = (other_run / "checkpoint.pt").read_bytes()
    line = line_of("mae_pretrain", videos, other_run)
    message = run_stage("mae_pretrain", line, "--lr 2e-3 --pred_t_dim 16")
    said = r"\(--lr was 0.001, is 0.002; --pred_t_dim was None, is 16\)"
    assert re.search(rf"error: .*other arguments {said}.*--no-resume", message), message
    message = run_stage("finetune_cls", line_of("finetune_cls", videos, other_run))
    assert "--stage was mae_pretrain, is finetune_cls" in message
    assert (other_run / "checkpoint.pt").read_bytes() == before
    capsys.readouterr()
    free = "--micro_batch 4 --num_workers 1 --log_interval 3 --save_minutes 1 --max_failures 9"
    assert run_stage("mae_pretrain", line, free, "--grad_checkpointing") == ""
    assert "resuming after step 12" in capsys.readouterr().out


def test_a_list_that_changed_between_runs_is_said_with_both_hashes(videos, tmp_path, capsys):
    folder, digests = tmp_path / "train", []
    shutil.copytree(videos / "train", folder)
    line = line_of("mae_pretrain", videos, tmp_path / "out", f"--data {folder} --epochs 4")
    for name in ("train0_000005_000008.mp4", "renamed.mp4"):
        (folder / "train0_000005_000008.mp4").replace(folder / name)
        digests.append(data.find_videos(folder).digest)
        assert run_stage("mae_pretrain", line) == ""
    said = "warning: the list has changed: was {}, is {}".format(*digests)
    assert said in capsys.readouterr().out and len(set(digests)) == 2
