"""The Gluon kernels for Hopper, run on a CPU with fp32 operands: the recurrence to fp32's accuracy, and no event out of order.

On a GPU they are what the laws with 16-bit operands of K = V = 128 run.
"""

from __future__ import annotations

from dataclasses import replace

import gluon_on_cpu
import pytest
import torch
from accuracy import assert_is_the_recurrence, error

import linnet.ops as ops
from linnet.ops.triton import _channel, _delta, _dplr, _hopper, _linear, _plan, _table

NAMES = ("gradients_hopper", "delta_hopper", "channel_hopper", "queries_hopper", "dplr_hopper")
D, LIMIT = 64, 2e-5
FAR = 1e-4  # the delta rule adds up log-decays in fp32: sums of a chunk of strong ones reach 2,000, where fp32 has steps of 1e-4


def check(op, x, state, limit=LIMIT, **options):
    assert_is_the_recurrence(op, x, state, limit, **options)


@pytest.fixture
def kernels(monkeypatch, device):
    """Every call goes to the Gluon kernels; their launches by name."""
    if device != "cpu":
        pytest.skip("for the interpreter")
    found = {name: gluon_on_cpu.Kernel(name) for name in NAMES}
    for module in (_linear, _delta):
        monkeypatch.setattr(module, "_fits_hopper", lambda call, *_: call.kind != "vector")
    monkeypatch.setattr(_delta, "_fits_channel_hopper", lambda *_: True)
    monkeypatch.setattr(_channel, "fits_hopper", lambda *_: True)
    monkeypatch.setattr(_dplr, "_fits_hopper", lambda *_: True)
    monkeypatch.setattr(_hopper, "kernel", found.get)
    monkeypatch.setattr(_hopper, "_tiles", gluon_on_cpu.tiles)
    return found


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operands(B, T, heads=(2, 2, 2, 2), decay="mild"):
    Hq, Hk, Hv, Hg = heads
    u = torch.rand(B, T, Hg, generator=torch.Generator().manual_seed(9))
    g = {"mild": -0.3 * u, "strong": -20 * u, "reset": torch.where(u < 0.2, -torch.inf, -u)}[decay]
    x = {n: normal(B, T, H, D, seed=i) for i, (n, H) in enumerate((("q", Hq), ("k", Hk), ("v", Hv)))}
    return x | {"log_decay": g}, normal(B, max(heads[1:]), D, D, seed=7)


@pytest.mark.parametrize("decay", ["mild", "strong", "reset"])
@pytest.mark.parametrize("read", ["after", "before"])
def test_scalar_decay(kernels, decay, read):
    x, state = operands(2, 128, decay=decay)
    check(ops.linear_attention, x, state, read=read)
    assert kernels["gradients_hopper"].launches == 1


@pytest.mark.parametrize("heads", [(4, 1, 2, 2), (2, 2, 1, 1), (1, 1, 1, 1)])
def test_scalar_decay_with_shared_heads_and_split_time(kernels, heads):
    x, state = operands(1, 1024 if heads[0] == 1 else 128, heads)
    check(ops.linear_attention, x, state)


@pytest.mark.parametrize("bound", [None, -1.0])
@pytest.mark.parametrize("strength", [0.05, 1.0, "mixed", "20", "reset"])
def test_decay_per_channel(kernels, monkeypatch, strength, bound):
    """Chunks that decay too far have their pairs from `far_kernel`: "mixed" has one of them, for one head of two."""
    if bound is not None and strength not in (0.05, 1.0):
        pytest.skip("beyond the bound")
    monkeypatch.setitem(_table.FP32, "channel", _table.Tile(BZ=128, warps=8, M=2, stages=1))
    monkeypatch.setattr(_plan.Call, "in_channels", property(lambda call: call.kind == "vector"))
    x, state = operands(1, 128)
    u = torch.rand(1, 128, 2, D, generator=torch.Generator().manual_seed(9))
    g = {"mixed": -0.4 * u, "20": -20 * u, "reset": torch.where(u < 0.2, -torch.inf, -u)}
    x["log_decay"] = g[strength] if isinstance(strength, str) else -strength * u
    if strength == "mixed":
        x["log_decay"][:, 70:90, 1, 3] = -4
    check(ops.linear_attention, x, state, 1e-4 if strength in ("20", "reset") else LIMIT, log_decay_min=bound)
    assert kernels["queries_hopper"].launches == 1


@pytest.mark.parametrize("floor", ["floor", "sum"])
@pytest.mark.parametrize("gate", ["exponential", "sigmoid"])
def test_gain_and_normalizer(kernels, gate, floor):
    x, _ = operands(2, 128)
    i = normal(2, 128, 2, seed=8)
    x["log_gain"] = i if gate == "exponential" else torch.nn.functional.logsigmoid(i)
    if floor == "sum":
        x["q"], x["k"] = x["q"].exp(), x["k"].exp()
    grads = {}
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = {n: a.to(dtype).requires_grad_() for n, a in x.items()}
        o = ops.linear_attention(**leaves, normalizer=floor, backend=backend)[0]
        weights = normal(*o.shape, seed=5).to(dtype)
        grads[backend] = torch.autograd.grad((o * weights).sum(), list(leaves.values()))
    assert all(error(a, b) < 1e-4 for a, b in zip(*grads.values(), strict=True))
    assert kernels["gradients_hopper"].launches == 1


@pytest.mark.parametrize("decay", ["none", "mild", "strong", "reset"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_delta_rule(kernels, decay, beta):
    x, state = operands(2, 128, decay="mild" if decay == "none" else decay)
    if decay == "none":
        x.pop("log_decay")
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    x["erase"] = beta * torch.rand(2, 128, 2, generator=torch.Generator().manual_seed(4))
    check(ops.delta_rule, x, state, FAR if decay in ("strong", "reset") else LIMIT)
    assert kernels["delta_hopper"].launches == 1


@pytest.mark.parametrize("gate", ["token", "token, up to 2", "channel"])
@pytest.mark.parametrize("strength", [0.3, 5.0, "mixed"])
def test_delta_rule_with_decay_per_channel(kernels, monkeypatch, gate, strength):
    """Tiles with a channel that decays too far are the frame kernel's: all of them, or in "mixed" one tile of one chunk."""
    monkeypatch.setattr(_plan, "SAFE_EXPONENT_FP32", _plan.SAFE_EXPONENT)  # as test_frames runs the kernels for 16-bit operands
    monkeypatch.setattr(_plan.DeltaCall, "framed", property(lambda call: call.frame > 0))
    monkeypatch.setattr(_table, "DELTA_FP32", replace(_table.DELTA_FP32, C=64, BD=32))
    K, T = 128, 128
    rng = torch.Generator().manual_seed(9)
    x = {n: torch.randn(1, T, 1, K, generator=rng) for n in "qkv"}
    x["erase"] = (2 if "2" in gate else 1) * torch.rand(*x["k"].shape[: 4 if gate == "channel" else 3], generator=rng)
    if gate == "channel":
        x["write"] = torch.rand(1, T, 1, K, generator=rng)
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    u = torch.rand(1, T, 1, K, generator=rng)
    if strength == "mixed":
        u[:, 70:, :, 3] *= 12
    x["log_decay"] = (-(0.4 if strength == "mixed" else strength) * u).clamp_min(-5)
    check(ops.delta_rule, x, torch.randn(1, 1, K, K, generator=rng), log_decay_min=-5.0)
    assert kernels["channel_hopper"].launches == 1


def test_delta_rule_with_a_write_gate_and_one_head(kernels):
    x, state = operands(1, 64, (1, 1, 1, 1))
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    x["erase"], x["write"] = (torch.rand(1, 64, 1, generator=torch.Generator().manual_seed(s)) for s in (4, 5))
    check(ops.delta_rule, x, state)


@pytest.mark.parametrize("V", [64, 128])
@pytest.mark.parametrize("strength", [0.02, 0.6])
def test_dplr(kernels, monkeypatch, strength, V):
    """Two programs for four chunks of heads, so that each goes from one to the next."""
    monkeypatch.setattr(_table, "DELTA_FP32", replace(_table.DELTA_FP32, C=64))
    rng = torch.Generator().manual_seed(9)
    x = {n: torch.randn(1, 128, 2, D, generator=rng) for n in "qka"} | {"v": torch.randn(1, 128, 2, V, generator=rng)}
    x |= {n: torch.nn.functional.normalize(x[n], dim=-1) for n in "qka"}
    x["b"] = -x["a"] * torch.rand(1, 128, 2, D, generator=rng)
    x["log_decay"] = -strength * torch.rand(1, 128, 2, D, generator=rng)
    check(ops.dplr, x, torch.randn(1, 2, D, V, generator=rng), log_decay_min=-0.61, scale=1.0)
    assert kernels["dplr_hopper"].launches == 1


def test_what_comes_too_early_is_noticed(kernels):
    """The order that this file checks: a kernel that reads before it waited, or overwrites what is still read, fails."""
    x, state = operands(1, 64)
    text = gluon_on_cpu.source()
    for early in (
        "mbarrier.wait(bars.index(3), 0)",  # R
        "mbarrier.wait(bars.index(2), 0)",  # q and k
    ):
        assert early in text
        kernels["gradients_hopper"].code = compile(text.replace(early, "pass", 1), "early", "exec")
        with pytest.raises(AssertionError):
            check(ops.linear_attention, x, state)
