"""Frames of 32 tokens for a declared bound: they compute the recurrence, and no later token changes a bit of an earlier output.

Without a GPU the interpreter runs these kernels on fp32 operands, for which other kernels are chosen otherwise.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_delta_rule as delta
import test_linear_attention as linear
import torch
import torch.nn.functional as F

import linnet.ops as ops
from linnet.ops.triton import _plan, _table

BOUND = {"log_decay_min": -5.0}


@pytest.fixture
def framed(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(_plan, "SAFE_EXPONENT_FP32", _plan.SAFE_EXPONENT)
        monkeypatch.setattr(_plan.DeltaCall, "framed", property(lambda call: call.frame > 0))
        monkeypatch.setattr(_table, "DELTA_FP32", replace(_table.DELTA_FP32, C=64, BD=32))
        monkeypatch.setitem(_table.FP32, "vector", replace(_table.FP32["vector"], C=32, M=4))


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


@pytest.mark.parametrize("read", ["after", "before"])
def test_linear_attention_is_the_recurrence(framed, device, read):
    x, state = linear.operands(device, 70, B=1, kind="vector", heads=(1, 1, 1, 1), strength=5.0)
    linear.assert_is_the_recurrence(x, state, read=read, **BOUND)


@pytest.mark.parametrize("op", ["delta_rule", "linear_attention"])
@pytest.mark.parametrize("decay", [-5.0, -0.05])
def test_causal_bit_for_bit(framed, device, op, decay):
    """The anchor of a frame lies in the future of its first tokens: it may change exponents, never a mantissa.

    With decay -0.05 a later token also decides whether the delta rule's chunk is one frame or two; 64 channels are two tiles, whose
    products must be added up in the same order either way.
    """
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: F.normalize(torch.randn(*shape, generator=rng), dim=-1).to(device, limit(device)[0])
    T, K = 70, 64
    x = {n: normal(1, T, 1, K) for n in "qkv"} | {"log_decay": decay * torch.rand(1, T, 1, K, generator=rng).to(device)}
    if op == "delta_rule":
        x["erase"] = torch.rand(1, T, 1, generator=rng).to(device)
    run = lambda y: getattr(ops, op)(**y, backend="triton", **BOUND)[0]
    o = run(x)
    for t in (1, 7, 20, 33, 50):
        for future in (-5.0, 0.0):
            y = {n: a.clone() for n, a in x.items()}
            for n in "qkv":
                y[n][:, t:] = normal(1, T - t, 1, K)
            y["log_decay"][:, t:] = future
            assert torch.equal(run(y)[:, :t], o[:, :t]), f"tokens from {t} on with decay {future}"
