"""What can go wrong, done for real: kills, damaged files, full disks, broken videos, processes that die or differ.

The README's table "What can go wrong and what happens" has a row for each. `pytest -m long` does the rest of it.
"""

import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED_VIDEOS, encode, noise_frames

import data
import finetune_ava
import mae_pretrain
import model as m
from model import InputError

ROOT = Path(__file__).parents[1]
SMALL = "--model vit_demo --img_size 24 --precision fp32 --log_every 1 --save_minutes 100 --lr 1e-3 --batch_size 4"
STAGES = {  # epochs that make 12 steps of 8 videos or keyframes, in micro-batches
    "mae_pretrain.py": "--epochs 24 --repeats 4 --micro_batch 2 --clip_grad 0.5",
    "finetune_cls.py": "--epochs 12 --repeats 2 --micro_batch 2 --mixup 0.8 --cutmix 1 --drop_path 0.2 --num_classes 12 --views 1x1",
    "finetune_ava.py": "--epochs 6 --micro_batch 2 --drop_path 0.2 --rel_pos --video_start 900",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """8 labelled videos to train on and 2 to validate, and the demo's AVA part with 8 keyframes."""
    folder = tmp_path_factory.mktemp("videos")
    for split, count in {"train": 8, "val": 2}.items():
        lines = []
        for i in range(count):
            (folder / split).mkdir(exist_ok=True)
            path = folder / split / f"{i}.mp4"
            data.write_video(path, data.draw_demo_video(data.DEMO_SHAPES[i], "slides", i), 15)
            lines.append(f"{split}/{i}.mp4 {i}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DEMO_AVA, "train", 4)
        patch.setitem(data.DEMO_AVA, "val", 2)
        data.make_demo_ava(folder / "ava")
    return folder


def start(stage, line, processes=1, restarts=0, harm=None, folder=None):
    """Start a stage as a user does, in a session of its own. harm: code to run first, in each process."""
    program = [str(ROOT / stage)]
    if harm:
        script = folder / stage
        script.write_text(
            f"import os, sys, runpy\nsys.path.insert(0, {str(ROOT)!r})\nRANK = int(os.environ.get('RANK', 0))\n"
            f"import model as m, data\n{harm}\nrunpy.run_path({program[0]!r}, run_name='__main__')\n"
        )
        program = [str(script)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        program = launcher + ["--max-restarts", str(restarts), *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    command, output = [sys.executable, *program, *line.split()], tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    process.output = output
    return process


def printed(process):
    """All that a process has printed."""
    process.output.seek(0)
    return process.output.read()


def family(pid):
    """A process and all that it has started, as Linux tells."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(one for child in children for one in family(int(child)))]


def finish(process, seconds=120):
    """Wait for a process, in bounded time: (exit status, all that it printed)."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        for pid in family(process.pid):
            os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"still running after {seconds} s:\n{printed(process)}") from None
    return process.returncode, printed(process)


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, printed(process)
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def steps_logged(folder):
    path = folder / "log.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def line_of(stage, videos, out, workers=0):
    where = videos / "ava" if stage == "finetune_ava.py" else videos
    return f"{SMALL} {STAGES[stage]} --data {where} --output_dir {out} --num_workers {workers}"


def facts(folder):
    """What a run ends in, but for the clock: its checkpoint's bits and the log."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for entry in log:
        del entry["clips_per_s"], entry["data_wait"]
    return checkpoint["model"], checkpoint["optimizer"], log


def assert_same_bits(one, other):
    (weights, optimizer, log), (weights_2, optimizer_2, log_2) = facts(one), facts(other)
    assert log == log_2 and len(log) >= 10
    assert weights.keys() == weights_2.keys() and all(torch.equal(weights[name], weights_2[name]) for name in weights)
    assert optimizer["param_groups"] == optimizer_2["param_groups"]
    for key, state in optimizer["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer_2["state"][key][name])), (key, name)


def ranks_of(launcher):
    """The processes that torchrun has started, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children if "--model" in Path(f"/proc/{pid}/cmdline").read_text()]


# -------------------------------------------------------------------------------------------------------------- kills


def kill_and_resume(stage, seed, videos, folder, whole):
    """Kill a run with SIGKILL at a random moment after its first checkpoint, and run it again."""
    rng = random.Random(seed)
    process = start(stage, line_of(stage, videos, folder, workers=2))
    lines = rng.randint(2, 9)
    wait_for(lambda: steps_logged(folder) >= lines and (folder / "checkpoint.pt").exists(), process)
    time.sleep(rng.uniform(0, 0.1))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    code, out = finish(start(stage, line_of(stage, videos, folder, workers=0)))
    assert code == 0, out
    assert "going on after step" in out
    assert_same_bits(folder, whole)


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
    """Runs that nothing stopped, each made when it is first asked for."""
    made = {}

    def run(stage, processes=1):
        if (stage, processes) not in made:
            out = tmp_path_factory.mktemp("whole")
            code, text = finish(start(stage, line_of(stage, videos, out), processes))
            assert code == 0, text
            made[stage, processes] = out
        return made[stage, processes]

    return run


def test_a_run_killed_at_a_random_moment_ends_in_the_same_bits(videos, whole, tmp_path):
    kill_and_resume("mae_pretrain.py", 0, videos, tmp_path, whole("mae_pretrain.py"))


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_killed_at_random_moments_ends_in_the_same_bits(stage, seed, videos, whole, tmp_path):
    kill_and_resume(stage, seed, videos, tmp_path, whole(stage))


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_torchrun_brings_back_a_group_that_lost_a_process(stage, videos, whole, tmp_path):
    process = start(stage, line_of(stage, videos, tmp_path, workers=1), processes=2, restarts=1)
    wait_for(lambda: steps_logged(tmp_path) >= 2, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    code, out = finish(process)
    assert code == 0 and "going on after step" in out, out
    assert_same_bits(tmp_path, whole(stage, 2))


SLOW = """
def slow(*args, load=data.Clips.load):  # the loss of a worker is felt at once: there are no batches in stock
    import time
    time.sleep(0.15)
    return load(*args)
data.Clips.load = slow
"""


@pytest.mark.parametrize(
    "number, processes",
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.long),
    ],
)
def test_sigterm_saves_and_stops(number, processes, videos, whole, tmp_path):
    line = line_of("mae_pretrain.py", videos, tmp_path / "run", workers=1).replace("--log_every 1", "--log_every 100")
    process = start("mae_pretrain.py", line, processes, harm=SLOW, folder=tmp_path)
    wait_for(lambda: "0/12" in printed(process), process)
    time.sleep(1)
    began = time.monotonic()
    os.killpg(process.pid, number)  # as a scheduler does: launcher, processes and workers alike
    code, out = finish(process)
    assert (code == 143 or processes > 1) and time.monotonic() - began < 20, out
    assert f"asked to stop ({number.name}): saved after step" in out and "the same command goes on from there" in out
    assert "Traceback" not in out or processes > 1  # torchrun reports the signal in its own way
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < step < 12 and f"after step {step} of 12" in out
    code, out = finish(start("mae_pretrain.py", line, processes))
    assert code == 0 and f"going on after step {step}" in out
    ours, theirs = facts(tmp_path / "run")[0], facts(whole("mae_pretrain.py", processes))[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ctrl_c_twice_ends_at_once(videos, tmp_path):
    line = line_of("mae_pretrain.py", videos, tmp_path / "run")
    harm = "import time\nm.Log.step = lambda *args, **settings: [print('slow', flush=True), time.sleep(60)]"
    process = start("mae_pretrain.py", line, harm=harm, folder=tmp_path)
    for text in "slow", "Ctrl-C again ends at once":
        wait_for(lambda text=text: text in printed(process), process)
        process.send_signal(signal.SIGINT)
    began = time.monotonic()
    code, out = finish(process)
    assert code == 1 and time.monotonic() - began < 20 and "mae_pretrain.py: interrupted; a run that" in out, out
    assert "Traceback" not in out


def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path):
    content = np.arange(300_000)
    m.save_checkpoint(tmp_path, content=torch.from_numpy(content), step=0)
    rng, steps = random.Random(0), []
    for _ in range(25):
        child = os.fork()
        if child == 0:  # writes without end, until it is killed
            for step in range(10**9):
                m.save_checkpoint(tmp_path, content=torch.from_numpy(content + step), step=step)
        time.sleep(rng.uniform(0.01, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        run = m.find_checkpoint(tmp_path)
        np.testing.assert_array_equal(run["content"], content + run["step"])
        steps.append(run["step"])
    assert len(set(steps)) > 5  # killed at different moments


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def saved(tmp_path):
    for step in (1, 2):
        m.save_checkpoint(tmp_path, model={"weight": torch.full((1000,), float(step))}, step=step)
    return tmp_path


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "zeroed", "text"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(damage, saved, capsys):
    path = saved / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    assert m.find_checkpoint(saved)["step"] == 2
    if damage == "flipped":
        content[content.index(np.float32(2).tobytes() * 8) + 2] ^= 16  # one bit of one weight
    elif damage == "zeroed":
        content[300:600] = bytes(300)
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"words"}.get(damage, content))
    assert m.find_checkpoint(saved)["step"] == 1
    assert f"warning: {path}: not a checkpoint that can be read" in capsys.readouterr().out
    (saved / "checkpoint_previous.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint in it can be read; --no-resume starts anew"):
        m.find_checkpoint(saved)


def test_a_kill_between_the_two_renames_leaves_the_one_before(saved):
    (saved / "checkpoint.pt").unlink()
    assert m.find_checkpoint(saved)["step"] == 1


def test_a_full_disk_stops_the_run_and_names_the_last_good_checkpoint(videos, tmp_path):
    """The system refuses to let the file grow, as it does when a disk is full."""
    line = line_of("mae_pretrain.py", videos, tmp_path / "run").split()
    harm = "import resource\nsave, count = m.save_checkpoint, [0]\n"
    harm += "def full(*args, **kwargs):\n    count[0] += 1\n    if count[0] == 3:\n"
    harm += "        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
    harm += "    save(*args, **kwargs)\nm.save_checkpoint = full"
    code, out = finish(start("mae_pretrain.py", " ".join(line), harm=harm, folder=tmp_path))
    assert code == 1 and "Traceback" not in out
    last = f"The last good checkpoint: {tmp_path}/run/checkpoint.pt"
    assert re.search(rf"run/checkpoint.pt: cannot be written: .*File too large. {last}\n", out), out
    assert m.find_checkpoint(tmp_path / "run")["step"] == 4
    assert not (tmp_path / "run" / "checkpoint.tmp").exists()


def test_a_log_that_cannot_grow_stops_the_run_just_so(videos, tmp_path):
    harm = "import resource\nstep = m.Log.step\ndef full(log, *args, **settings):\n    if log.done == 4:\n"
    harm += "        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
    harm += "        log.path.write_text(100_000 * ' ')\n"
    harm += "    return step(log, *args, **settings)\nm.Log.step = full"
    line = line_of("mae_pretrain.py", videos, tmp_path / "run")
    code, out = finish(start("mae_pretrain.py", line, harm=harm, folder=tmp_path))
    assert code == 1 and "Traceback" not in out
    last = f"The last good checkpoint: {tmp_path}/run/checkpoint.pt"
    assert re.search(rf"run/log.jsonl: cannot be written: .*File too large. {last}\n", out), out


class Payload:
    def __reduce__(self):
        return os.system, ("touch RAN",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("use", ["--init", "resume", "--visualize x.mp4 --init"])
def test_code_in_a_checkpoint_does_not_run(use, zipped, videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "checkpoint.pt" if use == "resume" else tmp_path / "evil.pt"
    path.parent.mkdir(exist_ok=True)
    if zipped:
        torch.save({"model": {"a": torch.zeros(1)}, "step": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps(Payload()))
    line = line_of("mae_pretrain.py", videos, tmp_path / "run") + ("" if use == "resume" else f" {use} {path}")
    monkeypatch.setattr(sys, "argv", ["mae_pretrain.py", *line.split()])
    with pytest.raises(SystemExit) as stop:
        m.run_stage(mae_pretrain.main)
    assert "checkpoint" in str(stop.value.code) and not (tmp_path / "RAN").exists()


def test_lists_read_what_they_name_and_no_more(tmp_path):
    (tmp_path / "inside").mkdir()
    for path in (tmp_path / "beside.mp4", tmp_path / "inside" / "a.mp4", tmp_path / "inside" / "not_named.mp4"):
        encode(path, noise_frames(4))
    listed = f"a.mp4 0\n../beside.mp4 1\n{tmp_path}/inside/a.mp4 2\n__import__('os').system('touch_RAN') 3\n"
    (tmp_path / "inside" / "train.csv").write_text(listed)
    videos = data.find_videos(tmp_path / "inside")
    paths = [os.path.normpath(videos.path(i)) for i in range(3)]
    assert paths == [str(tmp_path / name) for name in ("inside/a.mp4", "beside.mp4", "inside/a.mp4")]
    with pytest.raises(data.VideoError, match="cannot be opened: No such file"), data.Video(videos.path(3)):
        pass


# ------------------------------------------------------------------------------------------------------------- videos


def bases(folder):
    """Good videos in several formats, to be damaged."""
    frames = noise_frames(40)
    formats = [
        ("mp4", "libx264"),
        ("mkv", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("mp4", "libx265"),
        ("ts", "mpeg2video"),
    ]
    paths = []
    for i, (suffix, codec) in enumerate(formats):
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        paths.append(encode(folder / f"base{i}.{suffix}", frames, codec=codec, options=options))
    if SHARED_VIDEOS.exists():
        small = [path for path in sorted(SHARED_VIDEOS.iterdir()) if path.suffix != ".md" and path.stat().st_size < 2e6]
        paths += small
    return paths


def damaged(paths, count, folder, seed=0):
    """Files with damage of every kind: cut, bytes flipped, ranges zeroed, headers swapped, pieces doubled or lost."""
    rng, made = random.Random(seed), []
    for i in range(count):
        source = paths[i % len(paths)]
        content = bytearray(source.read_bytes())
        kind, size = i // len(paths) % 6, len(content)
        at, length = rng.randrange(size), rng.randint(1, max(1, size // 10))
        if kind == 0:
            content = content[: rng.randint(0, size)]
        elif kind == 1:
            for _ in range(rng.choice((1, 10, 1000))):
                content[rng.randrange(size)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            content[at : at + length] = bytes(min(length, size - at))
        elif kind == 3:
            content[:2000] = paths[rng.randrange(len(paths))].read_bytes()[:2000]
        elif kind == 4:
            for _ in range(20):
                content[rng.randrange(min(size, 4000))] = rng.randrange(256)  # where the headers are
        else:
            del content[at : at + length]
        made.append(f"{i}{source.suffix}")
        (folder / made[-1]).write_bytes(content)
    return data.VideoList(folder, folder, made)


def fuzz(count, folder):
    """Read damaged files by the workers of a loader; (clips, reasons of those without)."""
    videos = damaged(bases(folder), count, folder)
    args = mae_pretrain.parse_args(["--model", "vit_demo", "--img_size", "24", "--data", "x"])[0]
    loader = torch.utils.data.DataLoader(data.Views(videos, args, (2, 3)), batch_size=None, num_workers=2)
    good, reasons = 0, []
    for sample in data.each(loader):
        if "failure" in sample:
            assert isinstance(sample["failure"], str) and len(sample["failure"]) > 5
            reasons.append(sample["failure"])
        else:
            assert sample["video"].shape == (6, 16, 24, 24, 3) and sample["video"].dtype == torch.uint8
            good += 1
    assert good + len(reasons) == count
    return good, reasons


def test_damaged_videos_give_a_clip_or_a_reason(tmp_path):
    good, reasons = fuzz(90, tmp_path)
    assert good > 20 and len(reasons) > 10 and len(set(reasons)) > 2


@pytest.mark.long
def test_damaged_videos_by_the_hundred(tmp_path):
    began = time.monotonic()
    good, reasons = fuzz(600, tmp_path)
    print(f"600 damaged files: {good} gave clips, {len(reasons)} a reason, {time.monotonic() - began:.0f} s")
    assert good > 100 and len(reasons) > 60


def test_the_shared_videos_give_clips_or_a_reason():
    if not SHARED_VIDEOS.exists():
        pytest.skip("needs ../shared: real videos")
    videos = data.find_videos(SHARED_VIDEOS)
    args = mae_pretrain.parse_args(["--model", "vit_demo", "--data", "x"])[0]
    for i in range(len(videos)):
        sample = data.Views(videos, args, (1, 1))[i]
        assert sample["video"].shape == (1, 16, 32, 32, 3) if "video" in sample else sample["failure"]


def decode_again_and_again(times, folder):
    """Memory and open files before and after: decode a good, a damaged and a missing video in turn."""
    encode(folder / "good.mp4", noise_frames(60))
    content = (folder / "good.mp4").read_bytes()
    (folder / "bad.mp4").write_bytes(content[:2000] + bytes(len(content) - 2000))
    videos = data.VideoList(folder, folder, ["good.mp4", "bad.mp4", "missing.mp4"])
    args = mae_pretrain.parse_args(["--model", "vit_demo", "--img_size", "24", "--data", "x"])[0]
    views, before = data.Views(videos, args, (1, 3)), None
    for i in range(times):
        if i == times // 4:  # caches have filled up
            before = memory(), len(os.listdir("/proc/self/fd"))
        assert ("video" in views[i % 3]) == (i % 3 == 0)
    return before, (memory(), len(os.listdir("/proc/self/fd")))


def memory():
    """This process's memory in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def test_decoding_leaks_no_file_handles(tmp_path):
    before, after = decode_again_and_again(90, tmp_path)
    assert after[1] == before[1]


@pytest.mark.long
def test_2000_decodes_leak_neither_memory_nor_file_handles(tmp_path):
    before, after = decode_again_and_again(2700, tmp_path)
    print(f"memory after 675 decodes {before[0]:.0f} MB, after 2,700 {after[0]:.0f} MB")
    assert after[1] == before[1] and after[0] < before[0] + 10


def test_a_decode_that_takes_too_long_is_a_failure(tmp_path, monkeypatch):
    encode(tmp_path / "a.mp4", noise_frames(60))
    monkeypatch.setattr(data, "DECODE_LIMIT", 0.05)
    with (
        data.Video(tmp_path / "a.mp4") as video,
        pytest.raises(data.VideoError, match="takes more than 0.05 s to decode"),
    ):
        video.frames([0.5])
        time.sleep(0.06)
        video.frames([1.0])


def test_a_frame_too_large_for_memory_is_a_failure(tmp_path, monkeypatch):
    encode(tmp_path / "a.mp4", noise_frames(4))
    monkeypatch.setattr(data, "LARGEST", 48 * 64 - 1)
    with pytest.raises(data.VideoError, match="has frames of 64 x 48 pixels"):
        data.Video(tmp_path / "a.mp4")


# ---------------------------------------------------------------------------------------------------------- processes


def test_a_killed_worker_is_an_error_and_no_hang(videos, tmp_path):
    line = line_of("mae_pretrain.py", videos, tmp_path / "run", workers=2)
    process = start("mae_pretrain.py", line, harm=SLOW, folder=tmp_path)
    wait_for(lambda: steps_logged(tmp_path / "run") >= 1 and len(family(process.pid)) >= 3, process)
    os.kill(family(process.pid)[-1], signal.SIGKILL)
    code, out = finish(process, 40)
    assert code == 1 and "Traceback" not in out, out
    assert re.search(
        r"mae_pretrain.py: error: DataLoader worker .*(killed by signal: Killed|exited unexpectedly); if memory.*--num_workers",
        out,
    ), out


def test_a_loss_that_is_not_finite_on_one_process_stops_all_with_the_reason(videos, tmp_path):
    harm = "forward, count = m.MAE.forward, [0]\ndef poisoned(*args, **kwargs):\n    count[0] += 1\n"
    harm += "    loss, pred, mask = forward(*args, **kwargs)\n"
    harm += (
        "    return loss * (float('nan') if RANK == 1 and count[0] == 3 else 1), pred, mask\nm.MAE.forward = poisoned"
    )
    line = line_of("mae_pretrain.py", videos, tmp_path / "run").replace("--micro_batch 2", "")
    code, out = finish(start("mae_pretrain.py", line, processes=2, harm=harm, folder=tmp_path), 60)
    assert code != 0 and out.count("mae_pretrain.py: error: step 2: loss nan") == 2, out
    names = {line for line in out.splitlines() if re.fullmatch(rf"{videos}/train/\d.mp4", line)}
    assert len(names) == 2  # those of the process whose loss it was


def test_a_process_that_ends_alone_leaves_no_other_waiting(videos, tmp_path):
    harm = "step = m.Log.step\ndef failing(self, *args, **kwargs):\n    if RANK == 1 and self.done == 3:\n"
    harm += "        raise m.InputError('made up')\n    return step(self, *args, **kwargs)\nm.Log.step = failing"
    line = line_of("mae_pretrain.py", videos, tmp_path / "run")
    began = time.monotonic()
    code, out = finish(start("mae_pretrain.py", line, processes=2, harm=harm, folder=tmp_path), 60)
    assert code != 0 and "mae_pretrain.py: error: made up" in out and time.monotonic() - began < 50


@pytest.mark.parametrize("error", ["m.InputError('made up')", "ValueError('made up')"])
def test_an_error_in_the_loop_ends_the_workers_too(error, videos, tmp_path):
    harm = f"def failing(self, *args, **kwargs):\n    raise {error}\nm.Log.step = failing"
    line = line_of("mae_pretrain.py", videos, tmp_path / "run") + " --num_workers 2 --epochs 400"
    code, out = finish(start("mae_pretrain.py", line, harm=harm, folder=tmp_path), 60)
    assert code == 1 and "made up" in out, out


@pytest.mark.long
def test_a_process_that_hangs_is_given_up_after_the_time_limit(videos, tmp_path):
    harm = SLOW + "\nimport datetime\nm.TIMEOUT = datetime.timedelta(seconds=8)"
    line = line_of("mae_pretrain.py", videos, tmp_path / "run")
    process = start("mae_pretrain.py", line, processes=2, harm=harm, folder=tmp_path)
    wait_for(lambda: steps_logged(tmp_path / "run") >= 1, process)
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    code, out = finish(process, 90)
    assert code != 0 and "another process has ended or does not answer" in out, out


def test_processes_out_of_step_are_told_apart(videos, tmp_path, monkeypatch):
    args = mae_pretrain.parse_args(line_of("mae_pretrain.py", videos, tmp_path).split())[0]
    found = data.find_videos(videos)
    monkeypatch.setattr(m, "gather", lambda value: [value, value + 1 if isinstance(value, int) else value])
    with pytest.raises(InputError, match=r"start at steps \[0, 1\]: .* must be a folder that all machines share"):
        m.Log(args, 0, 12, found, data.Failures(tmp_path / "failures.log", found))
    monkeypatch.setattr(m, "gather", lambda value: [value, (12, "other") if isinstance(value, tuple) else value])
    with pytest.raises(InputError, match=r"different lists of videos: is .* alike on all machines"):
        m.Log(args, 0, 12, found, data.Failures(tmp_path / "failures.log", found))
    monkeypatch.setattr(m, "gather", lambda value: [value, value | {"step": 7} if isinstance(value, dict) else value])
    log = m.Log(args, 11, 12, found, data.Failures(tmp_path / "failures.log", found))
    with pytest.raises(InputError, match=r"out of step, at \[12, 7\]"):
        log.step(torch.zeros(()), torch.zeros(()), lr=0)
    log.close()


def test_failures_of_all_processes_are_reported_once_and_one_process_writes(videos, tmp_path):
    for name in os.listdir(videos / "train"):
        (tmp_path / name).symlink_to(videos / "train" / name)
    for name in ("x.mp4", "y.mp4", "z.mp4", "w.mp4"):
        (tmp_path / name).write_text("words")
    line = f"{SMALL} --epochs 4 --data {tmp_path} --output_dir {tmp_path}/run --num_workers 0"  # one pass
    code, out = finish(start("mae_pretrain.py", line, processes=2))
    assert code == 0, out
    skipped = [line.split("\t")[0] for line in (tmp_path / "run" / "failures.log").read_text().splitlines()]
    assert sorted(skipped) == [str(tmp_path / name) for name in ("w.mp4", "x.mp4", "y.mp4", "z.mp4")]
    assert "4 of 12 videos could not be used" in out
    log = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log == list(range(1, len(log) + 1))


# ---------------------------------------------------------------------------------------------------------- wrong use


def command(main, *words):
    sys.argv = ["stage.py", *map(str, words)]
    with pytest.raises(SystemExit) as stop:
        m.run_stage(main)
    return str(stop.value.code)


def test_wrong_use_is_told_in_one_line(videos, whole, tmp_path, capsys):
    run, line = whole("mae_pretrain.py"), line_of("mae_pretrain.py", videos, tmp_path)
    shutil.copytree(run, tmp_path / "copy")
    checkpoint = run / "checkpoint.pt"
    same = line_of("mae_pretrain.py", videos, tmp_path / "copy").split()
    assert "other arguments (--lr was 0.001, is 0.002; --repeats was 4, is 2)" in command(
        mae_pretrain.main, *same, "--lr", 2e-3, "--repeats", 2
    )
    ava = line_of("finetune_ava.py", videos, tmp_path / "copy")
    assert "a checkpoint of mae_pretrain; give this run another --output_dir" in command(
        finetune_ava.main, *ava.split()
    )
    assert "does not fit this model" in command(
        mae_pretrain.main, *line.replace("vit_demo --img_size 24", "vit_b --img_size 48").split(), "--init", checkpoint
    )
    (tmp_path / "file").write_text("")
    assert f"stage.py: error: {tmp_path}/file" in command(
        mae_pretrain.main, *line.split(), "--output_dir", tmp_path / "file" / "run"
    )
    assert command(mae_pretrain.main, *line.split(), "--learning_rate", 1) == "2"
    assert "unrecognized arguments: --learning_rate 1" in capsys.readouterr().err


def test_a_list_that_changed_between_runs_is_said_with_both_hashes(videos, tmp_path, capsys):
    shutil.copytree(videos / "train", tmp_path / "train")
    line = f"{SMALL} --epochs 16 --num_workers 0 --data {tmp_path}/train --output_dir {tmp_path}/run".split()
    before = data.find_videos(tmp_path / "train").digest
    mae_pretrain.train(*mae_pretrain.parse_args(line))
    (tmp_path / "train" / "0.mp4").rename(tmp_path / "train" / "renamed.mp4")
    after = data.find_videos(tmp_path / "train").digest
    capsys.readouterr()
    mae_pretrain.train(*mae_pretrain.parse_args(line))
    assert f"warning: the list of videos is another one than before: {before}, now {after}" in capsys.readouterr().out
    assert before != after
