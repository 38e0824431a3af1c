"""Laws of softmax_cross_entropy: the formula, any number of classes, rows left out, -inf logits, no autograd record."""

from __future__ import annotations

import pytest
import torch
from accuracy import error

import linnet.ops as ops
from linnet.models import linear_cross_entropy
from linnet.ops.triton import _scan_table


@pytest.fixture(autouse=True)
def short_blocks(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setitem(_scan_table.TABLE["sm90"], "softmax_cross_entropy", _scan_table.Tile(U=32, stages=1, warps=1))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("V", [1, 7, 32, 100])
def test_is_the_formula(device, backend, V):
    rng = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(9, V, generator=rng)).to(device)
    target = torch.randint(0, V, (9,), generator=rng).to(device)
    target[3] = -100
    logits[5] = logits[5].masked_fill(torch.arange(V, device=device) < target[5], -torch.inf)
    loss, gradient = ops.softmax_cross_entropy(logits.double(), target, backend="reference")
    got_loss, got = ops.softmax_cross_entropy(logits.clone(), target, backend=backend)
    assert error(got_loss, loss) < 1e-6 and error(got, gradient) < 1e-6 and not bool(got[3].any())
    only, none = ops.softmax_cross_entropy(logits.clone(), target, return_gradient=False, backend=backend)
    assert none is None and torch.equal(only, got_loss)


def test_loss_of_a_linear_layer(device):
    rng = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 12, generator=rng).to(device).requires_grad_() for n in (30, 50))
    target = torch.randint(0, 50, (30,), generator=rng).to(device)
    target[::4] = -100
    run = lambda backend: linear_cross_entropy(x, w, target, chunk_tokens=8, backend=backend)
    for got, want in zip(torch.autograd.grad(run("triton"), (x, w)), torch.autograd.grad(run("torch"), (x, w)), strict=True):
        assert error(got, want) < 1e-5
    assert error(run("triton"), run("torch")) < 1e-6
