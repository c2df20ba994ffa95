"""Compiled blocks: few graphs and equal losses, also with checkpointing."""

import argparse

import pytest
import torch
from test_model import BOXES, THREE_MODELS, clip, loss_of
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from model import cosine_decay, distribute

RATIOS = {
    "MAE": (0.9, 0.75, 0.5, 0.95, 0.6, 0.25),  # an ablation's
    "Classifier": [cosine_decay(step, 0.75, 0, 5) for step in range(6)],
    "Detector": (0,),
}
FULL_FRAMES = (32, 40), (40, 48), (48, 32), (32, 56), (64, 32), (64, 72)
MOST = {"MAE": (3, 5), "Classifier": (2, 3), "Detector": (1, 6)}  # graphs: to train; to test, too
TORCH_2_6 = torch.__version__ < "2.7"  # its aot_eager fails on relative positions; inductor works


def compiled(name, backend, patch, **more):
    """A model with compiled blocks, the same one without, and what counts the graphs."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    backend = "eager" if TORCH_2_6 and name == "Detector" else backend
    graphs, compile_module = CompileCounterWithBackend(backend), nn.Module.compile
    patch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=graphs))
    model, plain = (THREE_MODELS[name](**more) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    distribute(model, argparse.Namespace(compile=True))
    return model, plain, graphs


def assert_equal_steps(model, plain, ratio):
    """A step of each has the same loss and gradients."""
    losses = []
    for network in (model, plain):
        torch.manual_seed(1)
        network.zero_grad()
        losses.append(loss_of(network, ratio))
        losses[-1].backward()
    assert_close(*losses)
    for one, other in zip(model.parameters(), plain.parameters()):
        assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-3)


CASES = [(name, "aot_eager", again) for name in THREE_MODELS for again in (False, True)]
CASES = [pytest.param(*case, marks=pytest.mark.long) for case in CASES]


@pytest.mark.parametrize("name, backend, again", [("Classifier", "eager", False), *CASES])
def test_blocks_take_few_graphs_and_give_the_same_losses(name, backend, again, monkeypatch):
    more = {"grad_checkpointing": again} | ({} if name == "MAE" else {"drop_path": 0.2})
    model, plain, graphs = compiled(name, backend, monkeypatch, **more)
    for ratio in RATIOS[name]:
        for _ in range(2):
            assert_equal_steps(model, plain, ratio)
    assert 0 < graphs.frame_count <= MOST[name][0]
    args = [clip(model), 0.5, torch.rand(2, 64)]
    with torch.no_grad():
        for size in FULL_FRAMES if name == "Detector" else ((32, 32),):
            if name == "Detector":
                args = [torch.randn(1, 3, 8, *size), BOXES[1:]]
            assert_close(model.eval()(*args), plain.eval()(*args))
    assert_equal_steps(model.train(), plain.train(), RATIOS[name][0])
    assert graphs.frame_count <= MOST[name][1] < torch._dynamo.config.cache_size_limit
