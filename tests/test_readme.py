"""What the README says holds: its code runs, its flags exist, its names are there."""

import re
from pathlib import Path

import data
import finetune_ava
import finetune_cls
import mae_pretrain
import model

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_features_example_runs_as_it_stands(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = mae_pretrain.parse_args(["--dataset", "demo"])
    config = mae_pretrain.model_config(args)
    content = dict(model=model.MAE(**config).state_dict(), args=vars(args), config=config)
    Path(args.output_dir).mkdir(parents=True)
    model.save_checkpoint(args.output_dir, content)
    (tmp_path / "a.mp4").symlink_to(folder / "train" / "train0_000005_000008.mp4")
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    exec(code, {})
    assert capsys.readouterr().out.endswith("torch.Size([1, 128, 128]) torch.Size([1, 128])\n")


def test_every_flag_and_name_in_the_readme_exists(capsys):
    known = set()
    for stage in (mae_pretrain, finetune_cls, finetune_ava):
        try:
            stage.parse_args(["--help"])
        except SystemExit:
            known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    text = re.sub(r"(?m)^(\(cd |torchrun|# a tree|ffmpeg|.*(docker|benchmark.py)).*$", "", README)
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - {"--max-restarts"}
    assert flags <= known, flags - known
    modules = dict(model=model, data=data, mae_pretrain=mae_pretrain)
    modules |= dict(finetune_cls=finetune_cls, finetune_ava=finetune_ava)
    for module, name in re.findall(r"`(\w+)\.(\w+)`", README):
        if module in modules and name != "py":
            assert hasattr(modules[module], name), f"{module}.{name}"
