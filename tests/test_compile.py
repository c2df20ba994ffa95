"""The same code paths under torch.compile, on the CPU: the losses of a compiled run are those of a plain one."""

import json
import shutil

import numpy as np
import pytest
from test_survival import finish, line_of, start, videos  # noqa: F401

STAGES = {
    "mae_pretrain.py": "",
    "finetune_cls.py": "--mask_start 0.75",  # another number of tokens at each step
    "finetune_ava.py": "--test_crop full",  # other sizes, and other numbers of boxes
}


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: torch.compile writes C++")
@pytest.mark.parametrize("stage", STAGES)
def test_a_compiled_run_gives_the_losses_of_a_plain_one(stage, videos, tmp_path):  # noqa: F811
    losses = {}
    for name in ("plain", "compile"):
        line = (
            f"{line_of(stage, videos, tmp_path / name)} {STAGES[stage]} --drop_path 0 --mixup 0 --cutmix 0 --epochs 12"
        )
        if stage != "finetune_cls.py":
            line = line.replace("--mixup 0 --cutmix 0", "")
        if stage == "mae_pretrain.py":
            line = line.replace("--drop_path 0", "")
        code, out = finish(start(stage, line + (" --compile" if name == "compile" else "")), 600)
        assert code == 0, out
        log = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses[name] = [json.loads(entry)["loss"] for entry in log]
    assert len(losses["plain"]) >= 6
    np.testing.assert_allclose(losses["compile"], losses["plain"], rtol=2e-3)
