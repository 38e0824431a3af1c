"""Laws of short_conv on the Triton kernels: any taps, length, packing, state, with bias and activation."""

from __future__ import annotations

import pytest
import torch
from accuracy import error

import linnet.ops as ops
from linnet.ops.triton import _scan_table

LIMITS = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def short_blocks(device, monkeypatch):
    if device == "cpu":  # a short sequence has many blocks, too
        monkeypatch.setitem(_scan_table.TABLE["sm90"], "short_conv", _scan_table.Tile(32, 8, 1))


def operands(device, B, T, D, W=4, bias=True, state=True, dtype=torch.float32, rows=None, seed=0):
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng).to(device)
    return {
        "x": normal(B, T, D).to(dtype),
        "weight": normal(D, W),
        "bias": normal(D) if bias else None,
        "state": normal(rows or B, D, W - 1) if state else None,
    }


def results(x, backend, dtype=None, **options):
    leaves = {n: p.to(dtype or p.dtype).detach().requires_grad_() for n, p in x.items() if p is not None}
    y, (S,) = ops.short_conv(
        leaves["x"], leaves["weight"], leaves.get("bias"), initial_state=leaves.get("state"), return_state=True, backend=backend,
        **options,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(1)
    weigh = lambda p: (p * torch.randn(p.shape, generator=rng).to(x["x"].dtype).to(p)).sum()
    grads = torch.autograd.grad(weigh(y) + weigh(S), list(leaves.values()))
    return {"y": y.detach(), "S": S.detach(), **{"d" + n: g for n, g in zip(leaves, grads, strict=True)}}


def assert_is_the_convolution(x, **options):
    got, want = results(x, "triton", **options), results(x, "torch", torch.float64, **options)
    misses = {n: error(value, want[n]) for n, value in got.items()}
    assert all(miss < LIMITS[x["x"].dtype] for miss in misses.values()), {n: f"{m:.1e}" for n, m in misses.items()}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("T", [2, 7, 8, 9, 17, 33])
def test_any_length(device, T, activation):
    assert_is_the_convolution(operands(device, 1, T, 40), activation=activation)


@pytest.mark.parametrize("W", [1, 2, 3, 8])
@pytest.mark.parametrize("T", [2, 11])
def test_any_number_of_taps(device, W, T):
    assert_is_the_convolution(operands(device, 1, T, 12, W, state=W > 1), activation="silu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_with_and_without_bias_and_state(device, bias, state):
    assert_is_the_convolution(operands(device, 1, 20, 33, bias=bias, state=state))


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_packed_documents(device, state, activation):
    cu = torch.tensor([0, 0, 2, 3, 3, 14, 24], dtype=torch.int32, device=device)
    assert_is_the_convolution(operands(device, 1, 24, 20, state=state, rows=6), activation=activation, cu_seqlens=cu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_operands(device, dtype):
    assert_is_the_convolution(operands(device, 1, 16, 32, dtype=dtype), activation="silu")


def test_prefill_continues_and_nothing_leaks(device):
    x = operands(device, 1, 40, 16)
    run = lambda a, b, S: ops.short_conv(x["x"][:, a:b], x["weight"], initial_state=S, return_state=True, backend="triton")
    whole, final = run(0, 40, x["state"])
    left, S = run(0, 19, x["state"])
    right, S = run(19, 40, S)
    assert torch.equal(torch.cat([left, right], 1), whole) and torch.equal(S[0], final[0])
    x["x"][:, 25:] = float("nan")
    assert torch.equal(run(0, 40, x["state"])[0][:, :25], whole[:, :25])
