"""Compiled blocks: few graphs and equal losses, also with checkpointing."""

import argparse

import pytest
import torch
from test_model import BOXES, VIDEO, loss_of, tiny
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from model import MAE, Classifier, Detector, cosine_decay, distribute

RUNS = {  # mask ratios; the most graphs to train, and with tests
    MAE: ([0.9, 0.75, 0.5, 0.95, 0.6, 0.25], 3, 5),  # an ablation's
    Classifier: ([cosine_decay(step, 0.75, 0, 5) for step in range(6)], 2, 3),
    Detector: ([0], 1, 6),
}
FULL_FRAMES = (32, 40), (40, 48), (48, 32), (32, 56), (64, 32), (64, 72)
TORCH_2_6 = torch.__version__ < "2.7"  # its aot_eager fails on relative positions; inductor works


def step(model, ratio):
    """The loss and the gradients of a training step."""
    torch.manual_seed(1)
    loss = loss_of(model, ratio)
    return loss, *torch.autograd.grad(loss, [*model.parameters()])


CASES = [(kind, "aot_eager", again) for kind in RUNS for again in (False, True)]
CASES = [pytest.param(*case, marks=pytest.mark.long) for case in CASES]


@pytest.mark.parametrize("kind, backend, again", [(Classifier, "eager", False), *CASES])
def test_blocks_take_few_graphs_and_give_the_same_losses(kind, backend, again, monkeypatch):
    torch._dynamo.reset()
    backend = "eager" if TORCH_2_6 and kind is Detector else backend
    graphs, compile_module = CompileCounterWithBackend(backend), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=graphs))
    more = {"grad_checkpointing": again} | ({} if kind is MAE else {"drop_path": 0.2})
    model, plain = (tiny(kind, **more) for _ in range(2))
    distribute(model, argparse.Namespace(compile=True))
    ratios, most, most_with_tests = RUNS[kind]
    for ratio in 2 * ratios:
        assert_close(step(model, ratio), step(plain, ratio), atol=1e-5, rtol=1e-5)
    assert 0 < graphs.frame_count <= most
    inputs = [(VIDEO, 0.5, torch.rand(2, 64))]
    if kind is Detector:
        inputs = [(torch.randn(1, 3, 8, *size), BOXES[1:]) for size in FULL_FRAMES]
    with torch.no_grad():
        for values in inputs:
            assert_close(model.eval()(*values), plain.eval()(*values))
    model.train(), plain.train()
    assert_close(step(model, ratios[0]), step(plain, ratios[0]), atol=1e-5, rtol=1e-5)
    assert graphs.frame_count <= most_with_tests < torch._dynamo.config.cache_size_limit
