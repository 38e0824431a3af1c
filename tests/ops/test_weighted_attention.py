"""Laws of relative_attention, softplus_attention, cell_attention and span_attention, over both backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import linnet.ops as ops
from linnet.ops.torch import weighted_attention as backend

few = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TOLERANCE = 1e-12
OPTIONS = {
    "relative_attention": [{"beyond": "clip"}, {"beyond": "zero", "scale": 0.7}],
    "softplus_attention": [{}, {"power": 3.0}, {"power": 1.5, "offset": 0.5, "scale": 2.0}],
    "cell_attention": [{"top_keys": 3}, {"top_keys": 6, "prior": False}, {"top_keys": 40}],
    "span_attention": [
        {"window_stripes": 1, "spans": 2},
        {"window_stripes": 1, "spans": 3, "forward": 0.7, "backward": 1.3, "span_power": 0.6, "search_power": 0.6},
        {"window_stripes": 4, "spans": 1},
    ],
}
every_op = pytest.mark.parametrize("op,options", [(op, options) for op, rows in OPTIONS.items() for options in rows])
QUERIES = {"cell_attention": {"estimate_BTHC": 7}, "span_attention": {"search_q_BTHA": 3}}
STORES = {"span_attention": {"search_k_BTHA": 3}}


def operands(op, batch, tokens, heads, key_heads, rng, dtype=torch.float64):
    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    tensors = {"q_BTHK": normal(batch, tokens, heads, 4)}
    tensors |= {"k_BTHK": normal(batch, tokens, key_heads, 4), "v_BTHV": normal(batch, tokens, key_heads, 5)}
    tensors |= {name: normal(batch, tokens, heads, size) for name, size in QUERIES.get(op, {}).items()}
    return tensors | {name: normal(batch, tokens, key_heads, size) for name, size in STORES.get(op, {}).items()}


def constants(op, heads, rng, dtype=torch.float64):
    if op != "relative_attention":
        return {}
    return {"distance_RHK": torch.randn(6, heads, 4, generator=rng, dtype=torch.float64).to(dtype)}


@st.composite
def shapes(draw):
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 9, 17]), min_size=1, max_size=4).filter(any)) if packed else None
    rows = len(lengths) if packed else draw(st.sampled_from([1, 2]))
    tokens = sum(lengths) if packed else draw(st.sampled_from([1, 2, 20]))
    past = draw(st.sampled_from([None, [0] * rows, [5] * rows, [(3 * n + 1) % 7 for n in range(rows)]]))
    return lengths, rows, tokens, past, draw(st.sampled_from([(2, 2), (4, 2), (3, 1)])), draw(st.integers(0, 999))


def make(op, shape):
    lengths, rows, tokens, past, (heads, key_heads), seed = shape
    rng = torch.Generator().manual_seed(seed)
    tensors = operands(op, 1 if lengths else rows, tokens, heads, key_heads, rng)
    cu = None if lengths is None else torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    state = None
    if past is not None:
        stored = ["k_BTHK", "v_BTHV", *STORES.get(op, {})]
        slots = max(past)
        state = [torch.randn(rows, slots, *tensors[n].shape[2:], generator=rng, dtype=torch.float64) for n in stored]
        state.append(torch.tensor(past))
    return tensors, constants(op, heads, rng), cu, state


def valid(state):
    return [torch.cat([x[n, :size] for n, size in enumerate(state[-1].tolist())]) for x in state[:-1]]


def error(got, want):
    """Relative to the largest value, or to 1e-2 where that is a difference that cancels (the gate of a single anchor)."""
    assert got.shape == want.shape and torch.isfinite(got).all()
    return float((got - want).detach().abs().max() / want.detach().abs().max().clamp_min(1e-2)) if want.numel() else 0.0


@every_op
@few
@given(shape=shapes(), elements=st.sampled_from([2**22, 200]))
def test_torch_backend_is_the_definition(op, options, shape, elements):
    results, usual = [], backend.BLOCK_ELEMENTS
    backend.BLOCK_ELEMENTS = elements
    try:
        for name in ("torch", "reference"):
            tensors, more, cu, state = make(op, shape)
            leaves = [x.requires_grad_() for x in (*tensors.values(), *more.values(), *((state or [None])[:-1]))]
            call = getattr(ops, op)
            o, new = call(**tensors, **more, **options, initial_state=state, return_state=True, cu_seqlens=cu, backend=name)
            outputs = [o, *valid(new)]
            rng = torch.Generator().manual_seed(1)
            loss = sum((x * torch.randn(x.shape, generator=rng, dtype=x.dtype)).sum() for x in outputs)
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
            results.append((*outputs, new[-1].double(), *grads))
    finally:
        backend.BLOCK_ELEMENTS = usual
    for index, (got, want) in enumerate(zip(*results, strict=True)):
        assert error(got, want) < TOLERANCE, (index, error(got, want))


@every_op
@pytest.mark.parametrize("elements", [2**22, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_causal_bit_for_bit(op, options, elements, dtype, monkeypatch):
    monkeypatch.setattr(backend, "BLOCK_ELEMENTS", elements)
    rng = torch.Generator().manual_seed(0)
    tensors, more = operands(op, 2, 40, 4, 2, rng, dtype), constants(op, 4, rng, dtype)
    before, _ = getattr(ops, op)(**tensors, **more, **options)
    for t in (0, 11, 39):
        changed = {name: x.clone() for name, x in tensors.items()}
        for x in changed.values():
            x[:, t] += 5
        after, _ = getattr(ops, op)(**changed, **more, **options)
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t], after[:, t])


@every_op
def test_bad_operands_are_refused_by_name(op, options):
    rng = torch.Generator().manual_seed(0)
    tensors, more = operands(op, 1, 5, 4, 2, rng), constants(op, 4, rng)
    call = getattr(ops, op)
    for name, x in tensors.items():
        with pytest.raises(ValueError, match=f"{op}: argument '{name}' must be"):
            call(**tensors | {name: x[..., 0]}, **more, **options)
    with pytest.raises(ValueError, match="argument 'initial_state' must be a tuple .k .*length"):
        call(**tensors, **more, **options, initial_state=(tensors["k_BTHK"],))
    with pytest.raises(ValueError, match="'cu_seqlens'"):
        call(**tensors, **more, **options, cu_seqlens=torch.tensor([0.0, 5.0]))


def test_the_skew_puts_every_distance_at_its_slot():
    Q, S = 3, 7
    by_distance = torch.arange(S - 1, -1, -1).expand(Q, S).float()
    distance = torch.arange(S - Q, S)[:, None] - torch.arange(S)
    assert torch.equal(backend.skew(by_distance)[distance >= 0], distance[distance >= 0].float())


@pytest.mark.parametrize("power", [0.5, 0.4, 0.55])
def test_every_earlier_key_is_in_reach_of_some_anchor(power):
    """Random context access: the window and the spans of all anchors together are all visible keys."""
    from linnet.ops.weighted_attention import reach, stripe_distance, stripe_distances

    span = max(power, 1 - power)  # a gap between anchors is about n^(1-p) / p wide
    for n in (1, 2, 9, 100, 1000, 4097):
        seen = set(range(max(0, n - stripe_distance(4, power) + 1), n))
        for d in stripe_distances(n, 4, power):
            seen |= set(range(max(0, n - d - reach(n, 1 / power, span)), n - d + 1))
        low = n - (stripe_distances(n, 4, power) or [n])[-1] - reach(n, 1 / power, span)
        assert seen == set(range(n)) or low <= 0 and seen == set(range(n)), n


def test_expanded_cells_are_rows_of_probabilities():
    estimate = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    p = ops.expand_cells(estimate)
    assert torch.allclose(p.sum(-1), torch.ones(2, 3, 12, dtype=torch.float64))
    assert not p.triu(1).any()
    row = estimate[1, 11, 2].softmax(0)
    for s in range(12):
        cell = s * 5 // 12
        assert abs(float(p[1, 2, 11, s]) - float(row[cell]) / sum(t * 5 // 12 == cell for t in range(12))) < 1e-14
