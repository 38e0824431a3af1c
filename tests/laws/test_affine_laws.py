"""A segment's affine map: composing the maps of parts is running the whole, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from recurrent_cases import calls
from test_recurrent_laws import error, true_state

import linnet.ops as ops

few = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def arguments(call, tensors):
    named = dict(tensors)
    return {**named, **call.options, "cu_seqlens": call.cu_seqlens}


@few
@given(calls())
def test_map_of_a_segment_gives_its_final_state(call):
    if call.state is None:
        return
    segment = ops.summarize(call.op, **arguments(call, call.tensors))
    _, want = call.run("torch")
    for x, y in zip(true_state(call, segment.apply(call.state)), true_state(call, want), strict=True):
        assert error(x, y) < 1e-11


@few
@given(calls(packed=False, lengths=(16, 33, 100)))
def test_maps_of_parts_compose(call):
    half = call.tokens // 2
    first = ops.summarize(call.op, **arguments(call, call.slice(0, half)))
    second = ops.summarize(call.op, **arguments(call, call.slice(half, call.tokens)))
    whole, joined = ops.summarize(call.op, **arguments(call, call.tensors)), first.then(second)
    # relative to the identity from which the factors 1 - beta k k^T are formed: a nearly erased channel is a difference
    assert float((joined.transition - whole.transition).abs().max()) < 1e-12
    for x, y in zip(true_state(call, joined.offset), true_state(call, whole.offset), strict=True):
        assert error(x, y) < 1e-11


@few
@given(calls(ops_=("delta_rule", "dplr"), packed=False, lengths=(16, 33, 100)))
def test_gradient_of_the_initial_state_by_parts(call):
    if call.state is None:
        return
    half, tokens = call.tokens // 2, call.tokens
    rng = torch.Generator().manual_seed(0)
    o, _ = call.run("torch")
    do = torch.randn(o.shape, generator=rng, dtype=o.dtype)
    whole = ops.summarize_grad(call.op, do, **arguments(call, call.tensors), initial_state=call.state)
    first, second = call.slice(0, half), call.slice(half, tokens)
    segment = ops.summarize(call.op, **arguments(call, first))
    middle = segment.apply(call.state)
    later = ops.summarize_grad(call.op, do[:, half:], **arguments(call, second), initial_state=middle)
    own = ops.summarize_grad(call.op, do[:, :half], **arguments(call, first), initial_state=call.state)
    assert error(own[0] + segment.backward(later[0]), whole[0]) < 1e-11


def test_scans_compose():
    x, log_a = torch.randn(1, 12, 3).double(), -torch.rand(1, 12, 3).double()
    state = (torch.randn(1, 3).double(),)
    parts = [ops.summarize("scan", x[:, s], log_a=log_a[:, s]) for s in (slice(0, 5), slice(5, 12))]
    _, want = ops.scan(x, log_a=log_a, initial_state=state, return_state=True)
    assert error(parts[0].then(parts[1]).apply(state)[0], want[0]) < 1e-12
    delta, A, B = torch.rand(1, 12, 3).double(), -torch.rand(3, 4).double(), torch.randn(1, 12, 4).double()
    state = (torch.randn(1, 3, 4).double(),)
    segment = ops.summarize("selective_scan", x, delta, A, B, B)
    _, want = ops.selective_scan(x, delta, A, B, B, initial_state=state, return_state=True)
    assert error(segment.apply(state)[0], want[0]) < 1e-12


def test_operators_without_an_affine_state_are_refused():
    with pytest.raises(ValueError, match="short_conv"):
        ops.summarize("short_conv", torch.randn(1, 4, 2), torch.randn(2, 3))
