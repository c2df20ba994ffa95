"""What the README's list on fault tolerance says, done for real; `pytest -m long` does more of it."""

import errno
import os
import random
import re
import resource
import shutil
import signal
import time
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import STAGES, checkpoint_of, contents, entries, family, line_of, run_stage, start

import data
import model as m

long = pytest.mark.long
GROUPS = [pytest.param(s, "torchrun", lost, marks=long) for s in STAGES for lost in (False, True)]
SLOW = """
load = data.TrainDataset.__getitem__  # a step takes as long as a kill needs to hit it
data.TrainDataset.__getitem__ = lambda *args: [time.sleep(0.1), load(*args)][1]
"""
HANGING = """
load, loads = data.TrainDataset.__getitem__, iter(range(8))  # then a worker is on a dead mount
data.TrainDataset.__getitem__ = lambda *args: load(*args) if next(loads, 9) < 9 else time.sleep(99)
"""
POISON = """
def poisoned(*args, forward=m.MAE.forward, calls=[], **settings):
    calls.append(1)
    loss, pred, mask = forward(*args, **settings)
    bad = m.rank() == m.world_size() - 1 and len(calls) == 4
    return loss * (float("nan") if bad else 1), pred, mask
m.MAE.forward = poisoned
"""
FULL_SHM = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))"
FAILING = """
def failing(run, *args, record=m.Run.record):
    assert m.rank() == 0 or run.done < 3, "made up"
    record(run, *args)
m.Run.record = failing
"""


def assert_same_bits(*folders):
    """Two runs ended in the same weights, optimizer and log, but for the clock."""
    clock, logs = {"clips_per_s", "data_wait", "tflops"}, []
    for folder in folders:
        logs.append([{k: v for k, v in line.items() if k not in clock} for line in entries(folder)])
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [3, 6, 9, 11]
    one, other = map(m.read_checkpoint, folders)
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    tensors = [(run["model"], run["optimizer"]["state"]) for run in (one, other)]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_had_its_folder_alone_and_goes_on_in_the_same_bits(stage, videos, whole, tmp_path):  # fmt: skip
    line = line_of(stage, videos, tmp_path)  # killed at a random moment
    job, lines = start(stage, f"{line} --num_workers 2", harm=SLOW), random.randint(1, 2)
    job.wait_for((tmp_path / "args.json").exists)
    os.kill(job.pid, signal.SIGSTOP)  # does not end meanwhile
    assert f"error: {tmp_path}: another run is writing there" in run_stage(stage, line)
    os.kill(job.pid, signal.SIGCONT)
    job.wait_for(lambda: len(entries(tmp_path)) >= lines and (tmp_path / "checkpoint.pt").exists())
    time.sleep(random.uniform(0, 0.2))
    os.kill(job.pid, signal.SIGKILL)
    job.finish()
    assert 0 < m.read_checkpoint(m.find_checkpoint(tmp_path))["step"] < 11
    with open(tmp_path / "log.jsonl", "ab") as log:  # damage, and what is beyond the checkpoint
        log.write(b'\0\xff\n[1]\n{"loss": 1}\n{"step": 11, "loss": 9.0}\n{"step": 12, "lo')
    assert run_stage(stage, line) == ""
    assert_same_bits(tmp_path, whole(stage))


@pytest.mark.parametrize("stage, launcher, lost", [("mae_pretrain", "fork", False), *GROUPS])
def test_a_group_goes_on_in_the_same_bits(stage, launcher, lost, videos, whole, tmp_path):
    """Stopped by SIGTERM, and started again; or it lost a process, and torchrun brings it back."""
    line = line_of(stage, videos, tmp_path)
    job = start(stage, line, 2, SLOW, launcher, restarts=int(lost))
    job.wait_for(lambda: len(entries(tmp_path)) >= 1)
    if lost:
        os.kill(family(job.pid)[2], signal.SIGKILL)  # rank 1; family()[0] is torchrun
    for process in () if lost else job.processes:  # or torchrun alone, which passes it on
        os.kill(process.pid, signal.SIGTERM)
    code, text = job.finish()
    if not lost:
        step = m.read_checkpoint(tmp_path)["step"]
        assert code != 0 and f"asked to stop (SIGTERM): saved after step {step} of 11" in text, text
        code, text = start(stage, line, 2, launcher=launcher).finish()
    assert code == 0 and "resuming after step" in text, text
    assert 0.1 < max(line["data_wait"] for line in entries(tmp_path)) < 1.01  # of both alike
    assert_same_bits(tmp_path, whole(stage, processes=2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_or_ctrl_c_saves_and_leaves(number, videos, tmp_path, monkeypatch, capsys):
    def asked(run, *args, record=m.Run.record):
        record(run, *args)
        if run.done == 4:  # as a scheduler does: the process and its workers alike
            for pid in reversed(family(os.getpid())):
                os.kill(pid, number)

    monkeypatch.setattr(m.Run, "record", asked)
    more = "--num_workers 1 --log_interval 100"
    assert run_stage("mae_pretrain", line_of("mae_pretrain", videos, tmp_path, more)) == "143"
    said = f"asked to stop ({number.name}): saved after step 4 of 11 in {tmp_path}; the same"
    assert f"{said} command without --no-resume goes on" in capsys.readouterr().out
    assert m.read_checkpoint(tmp_path)["step"] == 4


def test_workers_that_hang_die_or_cannot_send_end_a_run_in_one_line(videos, tmp_path):
    for error in (EOFError(), ConnectionResetError("reset by peer")):  # died while sending
        with pytest.raises(SystemExit, match="error: DataLoader worker exited unexpectedly"):
            m.run_main(Mock(side_effect=error))
    jobs, harms = {}, dict(nan=HANGING + POISON, memory=FULL_SHM, killed=SLOW)
    ends = dict(
        again="interrupted;", nan="error: step 1: loss nan", stop="error: asked to stop while"
    )
    for name in [*ends, "memory", "killed"]:
        more = f"--num_workers {1 + (name == 'killed')} --log_interval 1"
        line = line_of("mae_pretrain", videos, tmp_path / name, more)
        jobs[name] = start("mae_pretrain", line, harm=harms.get(name, HANGING))
    job = jobs["killed"]
    job.wait_for(lambda: len(entries(tmp_path / "killed")) >= 1 and len(family(job.pid)) >= 3)
    os.kill(family(job.pid)[-1], signal.SIGKILL)
    for name, number in ("stop", signal.SIGTERM), ("again", signal.SIGINT):
        jobs[name].wait_for(lambda name=name: len(entries(tmp_path / name)) == 2)
        os.kill(jobs[name].pid, number)
    jobs["again"].wait_for(lambda: "Ctrl-C again ends at once" in jobs["again"].printed)
    os.kill(jobs["again"].pid, signal.SIGINT)
    for name, job in jobs.items():
        code, text = job.finish(15)
        end = ends.get(name, "error: DataLoader worker")
        assert code == 1 and f"mae_pretrain.py: {end}" in text, text
        assert "Traceback" not in text, text
        with pytest.raises(ProcessLookupError):  # a session of its own: its worker is in it, too
            os.killpg(job.pid, 0)


def saved_run(folder):
    """A run that can do nothing but save; its weights all are the number of steps done."""
    args = dict(args=SimpleNamespace(), videos=[], keep_checkpoint=Mock())
    run, optimizer = SimpleNamespace(out=folder, latest=None, **args), Mock(state_dict=dict)

    def save(step):
        run.done = step
        weights = dict(weight=torch.full((300_000,), float(step)))
        m.Run.save(run, Mock(state_dict=lambda: weights), optimizer)

    return save


def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path):
    save, last, saved = saved_run(tmp_path), 0, torch.zeros(1).share_memory_()
    for _ in range(10):
        child = os.fork()
        if child == 0:  # writes without end, until it is killed
            while True:
                save(last := last + 1)
                saved.fill_(last)
        while saved <= last:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        run = m.read_checkpoint(m.find_checkpoint(tmp_path))
        assert (run["model"]["weight"] == run["step"]).all() and run["step"] > last
        last = run["step"]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text", "gone"])
def test_the_one_before_is_for_damaged_checkpoints_alone(damage, tmp_path, monkeypatch, capsys):
    path, previous = tmp_path / "checkpoint.pt", tmp_path / "checkpoint_previous.pt"
    for step, save in enumerate(2 * [saved_run(tmp_path)], 1):
        save(step)
    assert m.find_checkpoint(tmp_path) == path
    content = path.read_bytes()
    flipped, half = bytearray(content), content[: len(content) // 2]
    flipped[content.index(np.float32(2).tobytes() * 8) + 2] ^= 16  # one bit of one weight
    path.write_bytes(dict(cut=half, flipped=flipped, text=b"words").get(damage, b""))
    if damage == "gone":  # a kill between the two renames
        path.unlink()
    before = contents(tmp_path)
    assert m.find_checkpoint(tmp_path) == previous and m.read_checkpoint(previous)["step"] == 1
    warning = f"warning: {path}: not a readable checkpoint"
    assert (warning in capsys.readouterr().out) == (damage != "gone")
    monkeypatch.setattr(torch, "load", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(m.InputError, match="cannot be read: "):  # which may pass
        m.find_checkpoint(tmp_path)
    assert contents(tmp_path) == before


@pytest.fixture
def other_run(whole, tmp_path):
    """A copy of a run, in a folder of its own; its files are of steps 11 and 9."""
    shutil.copytree(whole("mae_pretrain"), tmp_path / "run")
    return tmp_path / "run"


def test_a_damaged_checkpoint_never_becomes_the_one_before(other_run, videos, whole, monkeypatch):
    (other_run / "checkpoint.pt").write_bytes(b"damaged")
    no_locks = Mock(side_effect=OSError(errno.ENOLCK, "no locks"))  # as on some file systems
    monkeypatch.setattr(m.fcntl, "lockf", no_locks)
    assert run_stage("mae_pretrain", line_of("mae_pretrain", videos, other_run)) == ""
    assert m.read_checkpoint(other_run / "checkpoint_previous.pt")["step"] == 9
    assert_same_bits(other_run, whole("mae_pretrain"))


@pytest.mark.parametrize("name, size, stage, more", [  # a file that grows too large, and its run
    ("checkpoint.pt", 10**5, "mae_pretrain", ""), ("log.jsonl", 99, "mae_pretrain", ""),
    ("args.json", 99, "mae_pretrain", "--output_dir NEW"),
    ("0_val0_000005_000008.png", 99, "mae_pretrain", "--visualize VIDEO --init RUN"),
    ("results.json", 99, "finetune_cls", "--eval --init RUN"),
    ("detections.csv", 99, "finetune_ava", "--eval --init RUN"),
])  # fmt: skip
def test_a_full_disk_names_the_file(name, size, stage, more, other_run, videos, whole, capsys):
    (other_run / "checkpoint.pt").unlink()  # the one before, of step 9, is taken
    words = dict(RUN=whole(stage), NEW=other_run / "a", VIDEO=next((videos / "val").glob("val0*")))
    before, more = contents(other_run), re.sub("[A-Z]{3,}", lambda x: str(words[x[0]]), more)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # as a full disk
    try:
        message = run_stage(stage, line_of(stage, videos, other_run, more))
    finally:  # here, not in a fixture: between the two pytest writes its line, perhaps to a file
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(rf"error: \S*{name}: cannot be written: .*File too large$", message)
    assert not list(other_run.rglob("*.tmp")) and m.find_checkpoint(other_run)
    assert name != "log.jsonl" or contents(other_run) == before


def test_only_no_resume_gives_a_run_up_and_keeps_it(other_run, videos, monkeypatch, capsys):
    for path in other_run.glob("*.pt"):
        path.write_bytes(b"damaged")
    line, before = line_of("mae_pretrain", videos, other_run), contents(other_run)
    message = run_stage("mae_pretrain", line)
    assert f"{other_run}: none of its checkpoints can be read; --no-resume" in message
    assert contents(other_run) == before
    line += " --no-resume --seed 1"
    hidden = RuntimeError("unexpected pos 64 vs 0")  # what torch.save makes of Ctrl-C
    hidden.__context__ = KeyboardInterrupt()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", Mock(side_effect=hidden))
        assert "py: interrupted; the same command resumes" in run_stage("mae_pretrain", line)
    assert not [path for path in other_run.iterdir() if path.suffix in (".pt", ".tmp")]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # by torchrun, before the first save
    assert run_stage("mae_pretrain", line) == "" and len(entries(other_run)) == 4
    assert run_stage("mae_pretrain", line) == ""  # and after it
    assert "this run is finished: step 11 was its last" in capsys.readouterr().out
    for name in ("checkpoint.pt", "checkpoint_previous.pt", "log.jsonl"):
        assert (other_run / f"{name}.replaced").read_bytes() == before[name]


def test_each_broken_video_is_logged_once_and_more_than_allowed_stop_the_run(videos, tmp_path):
    some, out = tmp_path / "some", tmp_path / "out"
    shutil.copytree(videos / "train", some)
    for name in (b"x.mp4", b"y.mp4", b"z.mp4", b"caf\xe9.mp4"):  # any bytes may be a name
        (some / os.fsdecode(name)).write_text("words")
    line = line_of("mae_pretrain", videos, out, f"--data {some} --epochs 8")  # two passes
    code, text = start("mae_pretrain", line, 2).finish()
    assert code == 0 and "unreadable videos: 4, see failures.log" in text, text
    names = re.findall(rf"{some}/(.*)\tcannot be opened: ", (out / "failures.log").read_text())
    assert sorted(names) == ["caf\\udce9.mp4", "x.mp4", "y.mp4", "z.mp4"]
    assert [entry["step"] for entry in entries(out)] == [3, 6]
    message = run_stage("mae_pretrain", line, "--no-resume --max_failures 3 --log_interval 6")
    assert f"4 of 12 videos cannot be read; --max_failures allows 3; see {out}/failures" in message
    many = data.VideoList("", "", 999 * ["a"])  # of which one in a hundred may be unreadable
    args = SimpleNamespace(max_failures=None, output_dir=out)
    m.check_failures(args, 9, many)
    with pytest.raises(m.InputError, match=r"10 of 999 videos cannot .* allows 9;"):
        m.check_failures(args, 10, many)


def test_a_loss_that_is_not_finite_stops_all_processes_with_what_to_do(videos, tmp_path):
    line = line_of("mae_pretrain", videos, tmp_path, "--log_interval 2")
    code, text = start("mae_pretrain", line, 2, POISON).finish(60)
    said = r"mae_pretrain.py: error: step 2: loss nan, .*Lower --lr, or try --precision fp32"
    assert code == 1 and "Traceback" not in text and len(re.findall(said, text)) == 2, text
    assert len(set(re.findall(f"(?m)^{videos}/train/.*.mp4$", text))) == 2  # of that process
    checkpoint = m.read_checkpoint(tmp_path)
    assert checkpoint["step"] == 2 and checkpoint["model"]["norm.weight"].isfinite().all()


def test_a_process_that_ends_alone_leaves_no_other_nor_a_worker(videos, tmp_path):
    line = line_of("mae_pretrain", videos, tmp_path, "--num_workers 1 --epochs 400")
    job = start("mae_pretrain", line, 2, FAILING)
    code, text = job.finish(60)
    assert code == 1 and "AssertionError: made up" in text
    assert "; another process has ended or does not answer" in text, text
    for process in job.processes:  # a session of its own: its workers are in it, too
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_test_that_is_ended(number, whole, videos, tmp_path):
    more = f"--num_workers 1 --eval --init {whole('finetune_cls')}"
    harm = "data.TestDataset.__getitem__ = lambda *_: time.sleep(99)"
    job = start("finetune_cls", line_of("finetune_cls", videos, tmp_path, more), harm=harm)
    job.wait_for(lambda: len(family(job.pid)) == 2)
    program = f"/proc/{family(job.pid)[1]}/exe"  # the dead have none, though nobody took them up
    time.sleep(0.5)  # for the worker to begin
    os.kill(job.pid, number)
    job.processes[0].join(10)
    end = time.monotonic() + 2
    while os.path.exists(program):
        assert time.monotonic() < end, "the worker works on"
        time.sleep(0.02)


def test_a_run_starts_at_one_step_and_saves_finite_weights_alone(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(m, "gather", lambda start: [start, 3])
    message = run_stage("mae_pretrain", line_of("mae_pretrain", videos, tmp_path))
    assert f"error: {tmp_path}: start at steps [0, 3]; do all share this folder?" in message
    run = m.Run.__new__(m.Run)
    run.args, run.asked, run.saved_at = SimpleNamespace(save_minutes=10), "SIGTERM", -np.inf
    run.pending = [torch.ones(2)]  # asked between log points
    assert m.Run.save_due(run)
    run.pending.append(torch.tensor([0.5, float("nan")]))
    assert not m.Run.save_due(run)


def test_other_arguments_neither_overwrite_nor_continue_a_run(other_run, videos, capsys):
    before, line = contents(other_run), line_of("mae_pretrain", videos, other_run)
    init = other_run / "checkpoint_previous.pt"
    message = run_stage("mae_pretrain", line, "--lr 2e-3 --pred_t_dim 16 --init", init)
    said = rf"--init was None, is {init}; --lr was 0.001, is 0.002; --pred_t_dim was None, is 16"
    assert re.search(rf"error: .*other arguments \({said}\).*--no-resume", message), message
    message = run_stage("finetune_cls", line_of("finetune_cls", videos, other_run))
    assert "(it is of mae_pretrain, not of finetune_cls)" in message
    assert contents(other_run) == before
    checkpoint = checkpoint_of(other_run)
    checkpoint["args"] |= dict(compile=True, device="cuda")  # as on another machine
    torch.save(checkpoint, other_run / "checkpoint.pt")
    free = "--micro_batch 4 --num_workers 1 --log_interval 4 --save_minutes 1 --max_failures 9"
    free += f" --grad_checkpointing --data {videos}/val --dataset {videos.name}"
    assert run_stage("mae_pretrain", line, free) == ""
    assert "resuming after step 11" in (out := capsys.readouterr().out)
    assert "warning: 8 videos were listed, now 5" in out
    checkpoint["model"]["cls_token"][0, 0, 0] = float("nan")
    torch.save(checkpoint, other_run / "checkpoint.pt")
    assert "cls_token is not a tensor of finite floats" in run_stage("mae_pretrain", line)
