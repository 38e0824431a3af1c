"""Laws of softmax_attention, over both backends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import linnet.ops as ops

few = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TOLERANCE = 1e-12


@dataclass
class Call:
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    state: tuple[torch.Tensor, ...] | None = None
    cu_seqlens: torch.Tensor | None = None

    def run(self, backend: str = "torch", **extra):
        """(o, state, lse); o from the path without lse, so that both paths are seen."""
        given = {"initial_state": self.state, "cu_seqlens": self.cu_seqlens, "return_state": True, **extra}
        o, state = ops.softmax_attention(**self.tensors, **self.options, **given, backend=backend)
        again, _, lse = ops.softmax_attention(**self.tensors, **self.options, **given, backend=backend, return_lse=True)
        assert error(again, o) < TOLERANCE
        return o, state, lse

    def cut(self, start: int, end: int, **changes) -> Call:
        return replace(self, tensors={n: x[:, start:end] for n, x in self.tensors.items()}, **changes)

    def copy(self) -> Call:
        leaf = lambda x: x.detach().clone().requires_grad_()  # noqa: E731
        state = None if self.state is None else (leaf(self.state[0]), leaf(self.state[1]), self.state[2])
        return replace(self, tensors={n: leaf(x) for n, x in self.tensors.items()}, state=state)

    def leaves(self) -> dict[str, torch.Tensor]:
        return self.tensors | ({} if self.state is None else {"k_cache": self.state[0], "v_cache": self.state[1]})

    @property
    def tokens(self) -> int:
        return self.tensors["q_BTHK"].shape[1]


def valid(state) -> list[torch.Tensor]:
    """The valid slots of a cache, row after row."""
    k, v, length = state
    return [torch.cat([x[n, :size] for n, size in enumerate(length.tolist())]) for x in (k, v)]


@st.composite
def calls(draw, packed: bool | None = None, cache: bool | None = None):
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    heads, k_heads, v_heads = draw(st.sampled_from([(4, 4, 4), (4, 2, 2), (4, 1, 2), (3, 1, 1)]))
    key_size, value_size = draw(st.sampled_from([(8, 8), (6, 9), (9, 4)]))
    window = draw(st.sampled_from([None, None, 1, 2, 5, 40, 140, 1000]))
    options = {"causal": window is not None or draw(st.booleans()), "window": window, "scale": draw(st.sampled_from([None, 0.7]))}
    cu = None
    if draw(st.booleans()) if packed is None else packed:
        lengths = draw(st.lists(st.sampled_from([0, 1, 2, 5, 16, 40]), min_size=1, max_size=5).filter(any))
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        batch, tokens, rows = 1, sum(lengths), len(lengths)
    else:
        batch = rows = draw(st.sampled_from([1, 2]))
        tokens = draw(st.sampled_from([1, 2, 17, 64, 129, 300]))

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    tensors = {
        "q_BTHK": normal(batch, tokens, heads, key_size), "k_BTHK": normal(batch, tokens, k_heads, key_size),
        "v_BTHV": normal(batch, tokens, v_heads, value_size),
    }  # fmt: skip
    state = None
    if draw(st.booleans()) if cache is None else cache:
        slots = draw(st.sampled_from([0, 1, 7]))
        length = torch.randint(0, slots + 1, (rows,), generator=rng) if draw(st.booleans()) else torch.full((rows,), slots)
        state = normal(rows, slots, k_heads, key_size), normal(rows, slots, v_heads, value_size), length
    return Call(tensors, options, state, cu)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    assert torch.isfinite(got).all()
    return float((got - want).detach().abs().max() / want.detach().abs().max().clamp_min(1e-30)) if want.numel() else 0.0


def gradients(call: Call, outputs, seed: int = 1) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    loss = sum((x * torch.randn(x.shape, generator=rng, dtype=x.dtype)).sum() for x in outputs)
    leaves = call.leaves()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


@few
@given(calls())
def test_torch_backend_is_the_definition(call):
    results = []
    for backend in ("torch", "reference"):
        own = call.copy()
        o, state, lse = own.run(backend)
        k, v = valid(state)
        named = {"o": o, "lse": lse, "k": k, "v": v, "length": state[2].double()}
        results.append(named | gradients(own, (o, lse, k, v)))
    for name, want in results[1].items():
        assert error(results[0][name], want) < TOLERANCE, f"{name}: {error(results[0][name], want):.1e}"


@few
@given(calls(packed=False), st.floats(0, 1), st.sampled_from(["torch", "reference"]))
def test_any_split_is_the_whole(call, where, backend):
    call.options["causal"] = True
    whole, final, _ = call.run(backend)
    cut = round(where * call.tokens)
    pieces, state = [], call.state
    for start, end in ((0, cut), (cut, call.tokens)):
        if start < end:
            o, state, _ = call.cut(start, end, state=state).run(backend)
            pieces.append(o)
    assert error(torch.cat(pieces, 1), whole) < TOLERANCE
    assert torch.equal(state[2], final[2])
    for got, want in zip(valid(state), valid(final), strict=True):
        assert torch.equal(got, want)


@few
@given(calls(packed=True))
def test_packed_prefill_then_batched_decode(call):
    """Rows of unequal length: packed at prefill, one token each afterwards."""
    call.options["causal"] = True
    rows, steps = call.cu_seqlens.numel() - 1, 3
    _, state, _ = call.run()
    rng = torch.Generator().manual_seed(0)
    new = {n: torch.randn(rows, steps, *x.shape[2:], generator=rng, dtype=x.dtype) for n, x in call.tensors.items()}
    decoded = []
    for t in range(steps):
        o, state, _ = Call({n: x[:, t : t + 1] for n, x in new.items()}, call.options, state).run()
        decoded.append(o)
    for n, (start, end) in enumerate(zip(call.cu_seqlens[:-1].tolist(), call.cu_seqlens[1:].tolist(), strict=True)):
        row = {m: torch.cat([x[:, start:end], new[m][n : n + 1]], 1) for m, x in call.tensors.items()}
        past = None
        if call.state is not None:
            size = int(call.state[2][n])
            past = call.state[0][n : n + 1, :size], call.state[1][n : n + 1, :size], call.state[2][n : n + 1]
        want, _, _ = Call(row, call.options, past).run("reference")
        assert error(torch.cat(decoded, 1)[n], want[0, end - start :]) < TOLERANCE


@few
@given(calls(), st.floats(0, 0.999), st.sampled_from([torch.float64, torch.float32]))
def test_causal_bit_for_bit(call, where, dtype):
    call.options["causal"] = True
    t = int(where * call.tokens)
    tensors = {n: x.to(dtype) for n, x in call.tensors.items()}
    state = None if call.state is None else (call.state[0].to(dtype), call.state[1].to(dtype), call.state[2])
    changed = {n: x.clone() for n, x in tensors.items()}
    for x in changed.values():
        x[:, t] += 5
    extra = {"initial_state": state, "cu_seqlens": call.cu_seqlens, "backend": "torch", **call.options}
    for lse in (False, True):
        before = ops.softmax_attention(**tensors, **extra, return_lse=lse)
        after = ops.softmax_attention(**changed, **extra, return_lse=lse)
        for x, y in zip(before, after, strict=True):
            assert x is None or torch.equal(x[:, :t], y[:, :t])


@few
@given(calls(packed=True), st.sampled_from(["torch", "reference"]))
def test_packed_segments_are_separate_sequences(call, backend):
    packed, single, outputs = call.copy(), call.copy(), []
    o, state, _ = packed.run(backend)
    grads = gradients(packed, (o,))
    for n, (start, end) in enumerate(zip(call.cu_seqlens[:-1].tolist(), call.cu_seqlens[1:].tolist(), strict=True)):
        if start < end:
            own = None if single.state is None else tuple(x[n : n + 1] for x in single.state)
            part, (k, _, length), _ = single.cut(start, end, cu_seqlens=None, state=own).run(backend)
            outputs.append(part)
            assert torch.equal(state[2][n : n + 1], length)
            assert torch.equal(state[0][n, : int(length)], k[0, : int(length)])
    assert error(o, torch.cat(outputs, 1)) < TOLERANCE
    for name, want in gradients(single, (torch.cat(outputs, 1),)).items():
        assert error(grads[name], want) < TOLERANCE, name


@few
@given(calls(packed=False, cache=True))
def test_padding_slots_and_row_order_do_not_matter(call):
    k, v, length = call.state
    padded = torch.arange(k.shape[1]) >= length[:, None]
    soiled = (k + 3 * padded[..., None, None], v - 5 * padded[..., None, None], length)
    o, _, _ = call.run()
    again, _, _ = replace(call, state=soiled).run()
    assert torch.equal(o, again)
    flipped = {n: x.flip(0) for n, x in call.tensors.items()}
    turned, _, _ = Call(flipped, call.options, tuple(x.flip(0) for x in call.state)).run()
    assert error(turned.flip(0), o) < TOLERANCE


@pytest.mark.parametrize("window", [1, 4, 33])
def test_windowed_state_has_constant_size(window):
    state = None
    for tokens in (1, 7, 50, 1, 1):
        x = torch.randn(2, tokens, 2, 8)
        _, state = ops.softmax_attention(x, x, x, window=window, initial_state=state, return_state=True)
        assert state[0].shape[1] <= window - 1 and (state[2] <= window - 1).all()
    assert state[0].shape[1] == window - 1 and (state[2] == window - 1).all()
