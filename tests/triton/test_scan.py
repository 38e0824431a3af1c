"""Laws of scan on the Triton kernels: they compute the recurrence, whatever the factor, packing, split of time or state."""

from __future__ import annotations

import pytest
import torch
from accuracy import error

import linnet.ops as ops
from linnet.ops.triton import _scan_table

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def short_steps(device, monkeypatch):
    if device == "cpu":  # a short sequence has unrolled parts and splits, too
        monkeypatch.setitem(_scan_table.TABLE["sm90"], "scan", _scan_table.Tile(U=4, stages=1))


def operands(device, B, T, F, kind="log_a", shape=None, dtype=torch.float32, strength=1.0, rows=None, seed=0):
    """x, the factor `kind` of shape `shape`, and an initial state."""
    rng = torch.Generator().manual_seed(seed)
    shape = (B, T, F) if shape is None else shape
    u = torch.rand(*shape, generator=rng)
    if kind == "a":
        a = 1.98 * u - 0.99
    elif strength == "reset":
        a = torch.where(u < 0.2, -torch.inf, -u)
    else:
        a = -strength * u
    x = {"x": torch.randn(B, T, F, generator=rng).to(dtype), kind: a}
    return {n: p.to(device) for n, p in x.items()}, torch.randn(rows or B, F, generator=rng).to(device)


def results(x, state, backend, dtype=None, **options):
    leaves = {n: p.to(dtype or p.dtype).detach().requires_grad_() for n, p in {**x, "state": state}.items()}
    factors = {n: p for n, p in leaves.items() if n in ("a", "log_a")}
    h, (S,) = ops.scan(leaves["x"], **factors, initial_state=(leaves["state"],), return_state=True, backend=backend, **options)
    rng = torch.Generator().manual_seed(1)
    weigh = lambda p: (p * torch.randn(p.shape, generator=rng).to(x["x"].dtype).to(p)).sum()
    grads = torch.autograd.grad(weigh(h) + weigh(S), list(leaves.values()))
    return {"h": h.detach(), "S": S.detach(), **{"d" + n: g for n, g in zip(leaves, grads, strict=True)}}


def assert_is_the_recurrence(x, state, **options):
    got, want = results(x, state, "triton", **options), results(x, state, "torch", torch.float64, **options)
    limit = LIMITS[x["x"].dtype]
    for name, value in got.items():
        miss = error(value, want[name])
        assert miss < limit, f"{name}: {miss:.1e}"


@pytest.mark.parametrize("kind", ["a", "log_a"])
@pytest.mark.parametrize("T", [1, 3, 4, 5, 17, 33])
def test_any_length(device, kind, T):
    assert_is_the_recurrence(*operands(device, 1, T, 70, kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_operands(device, dtype):
    assert_is_the_recurrence(*operands(device, 1, 20, 64, dtype=dtype))


@pytest.mark.parametrize("strength", [0.0, 20.0, "reset"])
def test_no_decay_strong_decay_and_resets(device, strength):
    assert_is_the_recurrence(*operands(device, 1, 20, 30, strength=strength))


@pytest.mark.parametrize("shape", [(2, 1, 30), (1, 9, 30), (1, 1, 30), (2, 9, 1), (30,)])
@pytest.mark.parametrize("kind", ["a", "log_a"])
def test_a_factor_that_is_constant_along_an_axis(device, shape, kind):
    assert_is_the_recurrence(*operands(device, 2, 9, 30, kind, shape=shape))


@pytest.mark.parametrize("shape", [None, (30,)])
@pytest.mark.parametrize("splits", [1, 3])
def test_packed_documents(device, monkeypatch, splits, shape):
    monkeypatch.setattr(_scan_table, "splits", lambda *_: splits)
    cu = torch.tensor([0, 0, 13, 14, 14, 40], dtype=torch.int32, device=device)
    assert_is_the_recurrence(*operands(device, 1, 40, 30, rows=5, shape=shape), cu_seqlens=cu)


@pytest.mark.parametrize("shape", [None, (30,)])
def test_splitting_the_time_is_exact(device, monkeypatch, shape):
    monkeypatch.setattr(_scan_table, "splits", lambda *_: 5)
    for T in (5, 43):
        assert_is_the_recurrence(*operands(device, 1, T, 30, shape=shape, strength=0.1))


def test_rows_of_a_wider_tensor_and_more_axes(device):
    x, state = operands(device, 2, 20, 60)
    whole = torch.cat([x["x"], x["x"]], -1)
    want, _ = ops.scan(x["x"], log_a=x["log_a"], backend="torch")
    got, _ = ops.scan(whole[..., :60], log_a=x["log_a"], backend="triton")
    assert error(got, want) < 2e-6
    fold = lambda p: p.unflatten(-1, (3, 20))
    got, (S,) = ops.scan(fold(x["x"]), log_a=fold(x["log_a"]), initial_state=fold(state), return_state=True, backend="triton")
    assert got.shape == (2, 20, 3, 20) and S.shape == (2, 3, 20)


def test_causal_bit_for_bit(device):
    x, state = operands(device, 2, 40, 30)
    changed = {n: p.clone() for n, p in x.items()}
    for p in changed.values():
        p[:, 23:] = -torch.rand_like(p[:, 23:])
    run = lambda y: ops.scan(**y, initial_state=state, backend="triton")[0][:, :23]
    assert torch.equal(run(x), run(changed))


def test_complex_operands_fall_back(device):
    x, a = torch.randn(1, 4, 3, dtype=torch.complex64, device=device), torch.rand(3, device=device)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        ops.scan(x, a=a, backend="triton")
    assert ops.scan(x, a=a)[0].is_complex()
