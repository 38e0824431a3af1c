"""Laws of linear_attention, delta_rule and dplr: the chunkwise backend is the recurrence, whatever the chunk, split or packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recurrent_cases import Call, calls, offsets

import linnet.ops as ops
from linnet.ops._dispatch import execute

few = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TOLERANCE = 1e-12


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative root-mean-square error; infinite where one is finite and the other is not."""
    if got.shape != want.shape:
        raise AssertionError(f"shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    finite = torch.isfinite(want)
    if not torch.equal(got[~finite], want[~finite]):
        return float("inf")
    got, want = got[finite], want[finite]
    return float((got - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0


def flatten(result) -> list[torch.Tensor]:
    o, state, *rest = result
    return [o, *(state or ()), *(x for pair in rest for x in pair)]


def values_and_gradients(call: Call, backend: str, **extra):
    """Outputs, and gradients of a random functional of the outputs and the final state (of true, unscaled quantities)."""
    tensors = {n: x.clone().requires_grad_() for n, x in call.tensors.items()}
    state = None if call.state is None else tuple(x.clone().requires_grad_() for x in call.state)
    outputs = flatten(call.run(backend, tensors=tensors, state=state, **extra))
    rng = torch.Generator().manual_seed(1)
    loss = 0.0
    for x in outputs:
        if x.requires_grad:
            loss = loss + (torch.where(torch.isfinite(x), x, 0) * torch.randn(x.shape, generator=rng, dtype=x.dtype)).sum()
    leaves = [*tensors.values(), *(state or ())]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    names = [*tensors, *(f"state{i}" for i in range(len(state or ())))]
    return [x.detach() for x in outputs], {n: g for n, g in zip(names, grads, strict=True) if g is not None}


def assert_same(got, want, tolerance=TOLERANCE):
    (outputs, grads), (expected, expected_grads) = got, want
    for i, (x, y) in enumerate(zip(outputs, expected, strict=True)):
        assert error(x, y) < tolerance, f"output {i}: {error(x, y):.1e}"
    assert grads.keys() == expected_grads.keys()
    for name, y in expected_grads.items():
        assert error(grads[name], y) < tolerance, f"gradient of {name}: {error(grads[name], y):.1e}"


@few
@given(calls())
def test_torch_backend_is_the_recurrence(call):
    assert_same(values_and_gradients(call, "torch"), values_and_gradients(call, "reference"))
