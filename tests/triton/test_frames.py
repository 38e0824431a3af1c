"""Kernels whose powers have anchors: they compute the recurrence, and no later token changes a bit of an earlier output.

Frames of 32 tokens of the delta rule for a declared bound, chunks of 64 of linear attention for any decay per channel. Without a
GPU the interpreter runs these kernels on fp32 operands, for which other kernels are chosen otherwise.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_delta_rule as delta
import test_linear_attention as linear
import torch
import torch.nn.functional as F
from accuracy import error

import linnet.ops as ops
from linnet.ops.triton import _plan, _table

BOUND = {"log_decay_min": -5.0}


@pytest.fixture
def framed(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(_plan, "SAFE_EXPONENT_FP32", _plan.SAFE_EXPONENT)
        monkeypatch.setattr(_plan.DeltaCall, "framed", property(lambda call: call.frame > 0))
        monkeypatch.setattr(_table, "DELTA_FP32", replace(_table.DELTA_FP32, C=64, BD=32))
        monkeypatch.setitem(_table.FP32, "channel", _table.Tile(BZ=128, warps=8, M=2, stages=1))
        monkeypatch.setattr(_plan.Call, "in_channels", property(lambda call: call.kind == "vector"))


def limit(device):
    return (torch.float32, 2e-5) if device == "cpu" else (torch.bfloat16, 5e-3)


CASES = {
    "mild": ({}, {}),
    "at the bound": ({"decay": "bound"}, {}),
    "reads before": ({"write": True, "write_key": True}, {"read": "before", "erase_read": "before_decay"}),
    "reads before, erases after": ({"write_key": True}, {"read": "before"}),
    "groups": ({"heads": (1, 2, 4, 4, 2), "write": True}, {}),
    "gates per channel": ({"channels": True}, {}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_delta_rule_is_the_recurrence(framed, device, case):
    operands, options = CASES[case]
    dtype, most = limit(device)
    x, state = delta.operands(device, "vector", 70, B=1, dtype=dtype, **operands)
    delta.assert_is_the_recurrence(x, state, most, **BOUND, **options)


def test_delta_rule_of_packed_documents(framed, device):
    cu = torch.tensor([0, 3, 3, 40, 110], dtype=torch.int32, device=device)
    dtype, most = limit(device)
    x, state = delta.operands(device, "vector", 110, B=1, rows=4, dtype=dtype)
    delta.assert_is_the_recurrence(x, state, most, cu_seqlens=cu, **BOUND)


@pytest.mark.parametrize(("read", "T"), [("after", 128), ("before", 70)])
@pytest.mark.parametrize("strength", [0.05, 1.0, 5.0, "20", "reset"])
def test_linear_attention_is_the_recurrence(framed, device, strength, read, T):
    """Of the strengths the first is near, the second on the border. Sums in far chunks reach 1e3: their rounding in fp32 allows
    1e-4 here, which is nothing in 16 bit. Read before the decay, a decay of -20 has a gradient of 1e-9, below rounding."""
    if strength == "20" and read == "before":
        pytest.skip("nothing to compare")
    dtype, most = limit(device)
    most = 1e-4 if device == "cpu" and isinstance(strength, str) else most
    x, state = linear.operands(device, T, 32, 16, B=1, kind="vector", heads=(1, 1, 1, 1), strength=strength, dtype=dtype)
    linear.assert_is_the_recurrence(x, state, most, read=read)


@pytest.mark.parametrize("bound", [-5.0, -1.0])
def test_linear_attention_with_a_bound(framed, device, bound):
    dtype, most = limit(device)
    x, state = linear.operands(device, 130, 32, 16, B=1, kind="vector", heads=(1, 1, 1, 1), strength=-bound, dtype=dtype)
    linear.assert_is_the_recurrence(x, state, most, log_decay_min=bound)


@pytest.mark.parametrize("bound", [-5.0, -1.0])
def test_a_decay_below_its_bound_stays_finite(framed, device, bound):
    x, _ = linear.operands(device, 70, B=1, kind="vector", heads=(1, 1, 1, 1), strength=100.0, dtype=limit(device)[0])
    leaves = [a.requires_grad_() for a in x.values()]
    o, _ = ops.linear_attention(*leaves, log_decay_min=bound, backend="triton")
    assert all(a.isfinite().all() for a in (o, *torch.autograd.grad(o.float().sum(), leaves)))


@pytest.mark.parametrize("strength", [0.05, 5.0])
def test_linear_attention_without_a_gradient_of_the_decay(framed, device, strength):
    dtype, most = limit(device)
    x, _ = linear.operands(device, 130, 32, 16, B=1, kind="vector", heads=(1, 1, 1, 1), strength=strength, dtype=dtype)
    results = []
    for backend, to in (("triton", dtype), ("torch", torch.float64)):
        leaves = [x[n].to(to).detach().requires_grad_() for n in "qkv"]
        o, _ = ops.linear_attention(*leaves, x["log_decay"].to(torch.promote_types(to, torch.float32)), backend=backend)
        results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert error(got, want) < most


@pytest.mark.parametrize(("K", "V", "heads"), [(24, 33, (4, 2, 1, 1)), (192, 16, (1, 1, 1, 1))])
def test_linear_attention_of_groups_and_odd_widths(framed, device, K, V, heads):
    dtype, most = limit(device)
    x, state = linear.operands(device, 64, K, V, B=2, kind="vector", heads=heads, strength=4.0, dtype=dtype)
    linear.assert_is_the_recurrence(x, state, most)


def test_linear_attention_of_packed_documents(framed, device):
    cu = torch.tensor([0, 0, 33, 34, 34, 150], dtype=torch.int32, device=device)
    dtype, most = limit(device)
    x, state = linear.operands(device, 150, kind="vector", B=1, heads=(2, 1, 1, 1), rows=5, strength=3.0, dtype=dtype)
    linear.assert_is_the_recurrence(x, state, most, cu_seqlens=cu)


def test_linear_attention_in_parts_and_blocks(framed, device, monkeypatch):
    monkeypatch.setattr(_table, "splits", lambda *_: 3)
    monkeypatch.setattr(_plan, "SHORT", 0)  # blocks of several chunks
    dtype, most = limit(device)
    x, state = linear.operands(device, 700, kind="vector", B=1, heads=(2, 1, 1, 1), strength=1.5, dtype=dtype)
    linear.assert_is_the_recurrence(x, state, most)


def assert_causal(device, op, x, futures, times, **options):
    """Bit for bit: other tokens, and decays that make far chunks near and near ones far, from a time on."""
    run = lambda y: getattr(ops, op)(**y, backend="triton", **options)[0]
    o = run(x)
    for t in times:
        for future in futures:
            y = {n: a.clone() for n, a in x.items()}
            for n in "qkv":
                y[n][:, t:] = x[n][:, t:].roll(1, -1)  # as long as before: what overflows reaches earlier tokens, as 0 * inf
            y["log_decay"][:, t:] = future
            assert torch.equal(run(y)[:, :t], o[:, :t]), f"tokens from {t} on with decay {future}"


def operands(device, T, K, decay, normal):
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: normal(torch.randn(*shape, generator=rng)).to(device, limit(device)[0])
    return {n: draw(1, T, 1, K) for n in "qkv"} | {"log_decay": decay * torch.rand(1, T, 1, K, generator=rng).to(device)}


@pytest.mark.parametrize("decay", [-5.0, -0.05])
def test_delta_rule_is_causal_bit_for_bit(framed, device, decay):
    """The anchor of a frame lies in the future of its first tokens: it may change exponents, never a mantissa.

    With decay -0.05 a later token also decides whether a chunk is one frame or two; 64 channels are two tiles, whose
    products must be added up in the same order either way.
    """
    x = operands(device, 70, 64, decay, lambda a: F.normalize(a, dim=-1))
    x["erase"] = torch.rand(1, 70, 1, generator=torch.Generator().manual_seed(2)).to(device)
    assert_causal(device, "delta_rule", x, (-5.0, 0.0), (1, 7, 20, 33, 50), **BOUND)


@pytest.mark.parametrize(("decay", "read"), [(-20.0, "after"), (-1.4, "after"), (-1.4, "before")])
def test_linear_attention_is_causal_bit_for_bit(framed, device, decay, read):
    """A later token decides whether a chunk is near, and with it which kernel forms its pairs."""
    x = operands(device, 128, 64, decay, lambda a: a)
    assert_causal(device, "linear_attention", x, (0.0, -100.0), (20, 33, 63, 100), read=read)
