"""The error that the laws of the kernels are about."""

from __future__ import annotations

import torch


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative root-mean-square error; infinite where a value is not finite."""
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach().double()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def values_and_gradients(op, x, state, backend, dtype=None, **options):
    """o, the final state, and the gradients of a random weighing of both by every argument and the initial state."""
    leaves = {n: a.to(dtype or a.dtype).detach().requires_grad_() for n, a in {**x, "state": state}.items()}
    inputs = {n: a for n, a in leaves.items() if n != "state"}
    o, (S,) = op(**inputs, initial_state=(leaves["state"],), return_state=True, backend=backend, **options)
    rng = torch.Generator().manual_seed(5)
    weigh = lambda a: (a * torch.randn(a.shape, generator=rng).to(x["v"].dtype).to(a)).sum()
    grads = torch.autograd.grad(weigh(o) + weigh(S), list(leaves.values()))
    return {"o": o.detach(), "S": S.detach(), **{"d" + n: a for n, a in zip(leaves, grads, strict=True)}}


def misses(op, x, state, limit, **options):
    """The tensors of which the kernels are not within `limit` of what backend torch computes in fp64, and their errors."""
    got = values_and_gradients(op, x, state, "triton", **options)
    want = values_and_gradients(op, x, state, "torch", torch.float64, **options)
    errors = {n: error(a, want[n]) for n, a in got.items()}
    return {n: e for n, e in errors.items() if not e < limit}


def assert_is_the_recurrence(op, x, state, limit, **options):
    """The kernels compute what backend torch computes in fp64, every tensor."""
    found = misses(op, x, state, limit, **options)
    assert not found, {n: f"{e:.1e}" for n, e in found.items()}
