"""Laws of scan, selective_scan, short_conv, token_shift and cumulative_logsumexp, over both backends."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import linnet.ops as ops

few = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TOLERANCE = 1e-12
OPS = ("scan", "selective_scan", "short_conv", "token_shift", "cumulative_logsumexp")
LENGTHS = (1, 2, 3, 15, 16, 17, 33, 64, 65, 100)
TIMELESS = {"A_DN", "D_D", "weight_DW", "bias_D"}


@dataclass
class Call:
    """One operator call in float64. `tensors` are differentiable; time is axis 1 of those not in `timeless`."""

    op: str
    tensors: dict[str, torch.Tensor]
    state_shape: tuple[int, ...]
    options: dict[str, Any]
    timeless: frozenset[str]
    state: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None

    def run(self, backend: str | None = "torch", **extra):
        given = {"initial_state": self.state, "cu_seqlens": self.cu_seqlens, "return_state": True, **extra}
        return getattr(ops, self.op)(**self.tensors, **self.options, **given, backend=backend)

    def cut(self, start: int, end: int, **changes) -> Call:
        """The same call on tokens start ... end."""
        tensors = {n: x if n in self.timeless else x[:, start:end] for n, x in self.tensors.items()}
        return replace(self, tensors=tensors, **changes)

    def copy(self) -> Call:
        """With fresh leaves that require gradients."""
        leaf = lambda x: x.detach().clone().requires_grad_()  # noqa: E731
        state = None if self.state is None else leaf(self.state)
        return replace(self, tensors={n: leaf(x) for n, x in self.tensors.items()}, state=state)

    def leaves(self) -> dict[str, torch.Tensor]:
        return self.tensors | ({} if self.state is None else {"initial_state": self.state})

    @property
    def tokens(self) -> int:
        return next(iter(self.tensors.values())).shape[1]


def build(op: str, batch: int, tokens: int, rng: torch.Generator, variant: int) -> Call:
    """A call of `op`; `variant` selects layouts and options."""
    bit = lambda i: variant >> i & 1  # noqa: E731
    width = (6, 3, 16)[variant % 3]

    def normal(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=rng, dtype=dtype)

    def uniform(*shape):
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    options, timeless = {}, set(TIMELESS)
    if op == "scan":
        channels = (width, 2) if bit(0) else (width,)
        tensors = {"x": normal(batch, tokens, *channels)}
        shape = channels if bit(1) else (batch, tokens, *channels[:-1], 1 if bit(2) else channels[-1])
        if bit(3):
            tensors["log_a"] = -4 * uniform(*shape)
            if not bit(1):
                tensors["log_a"][:, ::5] = -torch.inf
        elif bit(4):
            tensors["a"] = normal(*shape, dtype=torch.complex128) * 0.7
        else:
            tensors["a"] = 2.1 * uniform(*shape) - 1.05  # signed, also beyond 1
        timeless |= {"a", "log_a"} if bit(1) else set()
        state = channels
    elif op == "selective_scan":
        groups, size = (1, 3)[bit(0)], (4, 1)[bit(1)]
        B = normal(batch, tokens, groups, size) if bit(0) else normal(batch, tokens, size)
        tensors = {
            "x_BTD": normal(batch, tokens, width // 3 * 3), "delta_BTD": 3 * uniform(batch, tokens, width // 3 * 3),
            "A_DN": -3 * uniform(width // 3 * 3, size), "B_BTN": B, "C_BTN": normal(batch, tokens, size),
        }  # fmt: skip
        tensors["delta_BTD"][:, 1::7] = 0
        if bit(2):
            tensors |= {"D_D": normal(width // 3 * 3), "z_BTD": normal(batch, tokens, width // 3 * 3)}
        state = (width // 3 * 3, size)
    elif op == "short_conv":
        taps = 1 + variant % 5
        tensors = {"x_BTD": normal(batch, tokens, width), "weight_DW": normal(width, taps)}
        if bit(0):
            tensors["bias_D"] = normal(width)
        options["activation"] = "silu" if bit(1) else None
        state = (width, taps - 1)
    elif op == "token_shift":
        tensors, state = {"x_BTD": normal(batch, tokens, width)}, (width,)
    else:
        channels = (width, 2) if bit(0) else (width,)
        tensors, state = {"x": 20 * normal(batch, tokens, *channels)}, channels
        if bit(1):
            tensors["x"][:, : tokens // 2, 0] = -torch.inf
            tensors["x"][:, ::3] = -torch.inf
    return Call(op, tensors, state, options, frozenset(timeless))


@st.composite
def calls(draw, packed: bool | None = None):
    op, variant = draw(st.sampled_from(OPS)), draw(st.integers(0, 31))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    if draw(st.booleans()) if packed is None else packed:
        lengths = draw(st.lists(st.sampled_from([0, 1, 2, 5, 16, 33, 40]), min_size=1, max_size=5).filter(any))
        call = build(op, 1, sum(lengths), rng, variant)
        call.cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        rows = len(lengths)
    else:
        rows = draw(st.sampled_from([1, 2]))
        call = build(op, rows, draw(st.sampled_from(LENGTHS)), rng, variant)
    if draw(st.booleans()):
        call.state = torch.randn(rows, *call.state_shape, generator=rng, dtype=torch.float64)
    return call


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference relative to the largest value; infinite where one is finite and the other is not."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    finite = torch.isfinite(want)
    if not torch.equal(torch.isfinite(got), finite) or not torch.equal(got[~finite], want[~finite]):
        return float("inf")
    if not finite.any():
        return 0.0
    return float((got - want)[finite].detach().abs().max() / want[finite].detach().abs().max().clamp_min(1e-30))


def functional(outputs, seed: int = 1):
    """A random linear functional of the finite entries."""
    rng = torch.Generator().manual_seed(seed)
    total = 0.0
    for x in outputs:
        weight = torch.randn(x.shape, generator=rng, dtype=x.dtype)
        value = (torch.where(torch.isfinite(x), x, 0) * weight).sum()
        total = total + (value.real if value.is_complex() else value)
    return total


def gradients(call: Call, outputs, seed: int = 1) -> dict[str, torch.Tensor]:
    leaves, loss = call.leaves(), functional(outputs, seed)
    if not loss.requires_grad:  # nothing of the arguments is left in the outputs
        return {n: torch.zeros_like(x) for n, x in leaves.items()}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


@settings(few, max_examples=80)
@given(calls())
def test_torch_backend_is_the_recurrence(call):
    results = []
    for backend in ("torch", "reference"):
        own = call.copy()
        o, (state,) = own.run(backend)
        results.append({"o": o, "state": state} | gradients(own, (o, state)))
    for name, want in results[1].items():
        assert error(results[0][name], want) < TOLERANCE, f"{call.op} {name}: {error(results[0][name], want):.1e}"


@few
@given(calls(packed=False), st.floats(0, 1), st.sampled_from(["torch", "reference"]))
def test_any_split_is_the_whole(call, where, backend):
    whole, (final,) = call.run(backend)
    cut = round(where * call.tokens)
    pieces, state = [], call.state
    for start, end in ((0, cut), (cut, call.tokens)):
        if start < end:
            o, (state,) = call.cut(start, end, state=state).run(backend)
            pieces.append(o)
    assert error(torch.cat(pieces, 1), whole) < TOLERANCE
    assert error(state, final) < TOLERANCE


@few
@given(calls(packed=False))
def test_decoding_token_by_token_is_prefill(call):
    call = call.cut(0, min(call.tokens, 17))
    whole, (final,) = call.run()
    state, pieces = call.state, []
    for t in range(call.tokens):
        o, (state,) = call.cut(t, t + 1, state=state).run()
        pieces.append(o)
    assert error(torch.cat(pieces, 1), whole) < TOLERANCE and error(state, final) < TOLERANCE


@few
@given(calls(), st.floats(0, 0.999), st.sampled_from([torch.float64, torch.float32]))
def test_causal_bit_for_bit(call, where, dtype):
    t = int(where * call.tokens)
    cast = lambda x: x if x is None or x.is_complex() else x.to(dtype)  # noqa: E731
    call = replace(call, tensors={n: cast(x) for n, x in call.tensors.items()}, state=cast(call.state))
    before, _ = call.run()
    changed = {n: x.clone() for n, x in call.tensors.items()}
    for name, x in changed.items():
        if name not in call.timeless and x.shape[1] == call.tokens:
            x[:, t] = -7.0 if name == "log_a" else 7.0
    after, _ = replace(call, tensors=changed).run()
    assert torch.equal(before[:, :t], after[:, :t])


@few
@given(calls(packed=True), st.sampled_from(["torch", "reference"]))
def test_packed_segments_are_separate_sequences(call, backend):
    packed = call.copy()
    o, (state,) = packed.run(backend)
    grads = gradients(packed, (o,), seed=3)
    single, outputs = call.copy(), []
    for n, (start, end) in enumerate(zip(call.cu_seqlens[:-1].tolist(), call.cu_seqlens[1:].tolist(), strict=True)):
        own = None if single.state is None else single.state[n : n + 1]
        if start == end:
            nothing = -torch.inf if call.op == "cumulative_logsumexp" else 0.0
            assert error(state[n : n + 1], torch.full_like(state[n : n + 1], nothing) if own is None else own) == 0
            continue
        part, (last,) = single.cut(start, end, cu_seqlens=None, state=own).run(backend)
        outputs.append(part)
        assert error(state[n : n + 1], last) < TOLERANCE
    assert error(o, torch.cat(outputs, 1)) < TOLERANCE
    for name, want in gradients(single, (torch.cat(outputs, 1),), seed=3).items():
        assert error(grads[name], want) < TOLERANCE, name


@few
@given(calls(packed=False), st.permutations([0, 1, 2]))
def test_state_rows_can_be_reordered_and_resumed(call, order):
    """Beam search: the state of row `order[i]` continues with the tokens of that row."""
    call = build(call.op, 3, max(call.tokens, 2), torch.Generator().manual_seed(7), call.tokens % 32)
    half = call.tokens // 2
    _, (state,) = call.cut(0, half).run()
    state = torch.stack([state[i] for i in order])  # saved and reordered
    rest = call.cut(half, call.tokens, state=state)
    rest.tensors = {n: x if n in call.timeless else x[list(order)] for n, x in rest.tensors.items()}
    got, _ = rest.run()
    whole, _ = call.run()
    assert error(got, whole[list(order)][:, half:]) < TOLERANCE


@pytest.mark.parametrize("decay", [0.0, -1e-6, -20.0, -1e4, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scan_of_any_decay_strength(decay, dtype):
    x = torch.randn(2, 200, 3, dtype=dtype)
    log_a = torch.full_like(x, decay)
    log_a[:, ::3] = 0.0
    x.requires_grad_(), log_a.requires_grad_()
    results = []
    for backend in ("torch", "reference"):
        h, _ = ops.scan(x, log_a=log_a, backend=backend)
        results.append([h, *torch.autograd.grad(functional((h,)), (x, log_a))])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for got, want in zip(*results, strict=True):
        assert torch.isfinite(got).all() and error(got, want) < tolerance


@pytest.mark.parametrize("strength", [0.0, 1e-6, 20.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selective_scan_of_any_decay_strength(strength, dtype):
    call = build("selective_scan", 2, 150, torch.Generator().manual_seed(0), 4)
    call.tensors["A_DN"] = -torch.ones_like(call.tensors["A_DN"])
    call.tensors["delta_BTD"] = torch.full_like(call.tensors["delta_BTD"], strength)
    call.tensors["delta_BTD"][:, ::3] = 0
    call.tensors = {n: x.to(dtype) for n, x in call.tensors.items()}
    results = []
    for backend in ("torch", "reference"):
        own = call.copy()
        o, (state,) = own.run(backend)
        results.append({"o": o, "state": state} | gradients(own, (o, state)))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for name, want in results[1].items():
        got = results[0][name]
        assert torch.isfinite(got).all() and error(got, want) < tolerance, f"{name} {error(got, want):.1e}"


@pytest.mark.parametrize("chunk", [1 << 6, 1 << 9, 1 << 13, 1 << 21])
def test_selective_scan_chunk_and_tile_change_nothing(chunk, monkeypatch):
    call = build("selective_scan", 3, 130, torch.Generator().manual_seed(0), 5)
    call.state = torch.randn(3, *call.state_shape, dtype=torch.float64)
    packed = build("selective_scan", 1, 130, torch.Generator().manual_seed(1), 4)
    packed.cu_seqlens = torch.tensor([0, 1, 1, 16, 17, 80, 130, 130], dtype=torch.int32)
    packed.state = torch.randn(7, *packed.state_shape, dtype=torch.float64)
    monkeypatch.setattr(importlib.import_module("linnet.ops.torch.selective_scan"), "CHUNK_ELEMENTS", chunk)
    for case in (call, packed):
        results = []
        for backend in ("torch", "reference"):
            own = case.copy()
            o, (state,) = own.run(backend)
            results.append({"o": o, "state": state} | gradients(own, (o, state)))
        for name, want in results[1].items():
            assert error(results[0][name], want) < TOLERANCE, name


def test_logsumexp_of_large_values_does_not_drift():
    x = torch.full((1, 5000, 2), 80.0)
    x[..., 1] = -3e38
    y, _ = ops.cumulative_logsumexp(x)
    want = 80.0 + torch.arange(1, 5001, dtype=torch.float64).log()
    assert error(y[0, :, 0].double(), want) < 1e-6 and torch.isfinite(y).all()


def test_scan_does_not_drift_over_64k_tokens():
    x, log_a = torch.randn(1, 65536, 2), -1e-3 * torch.rand(1, 65536, 2)
    got, _ = ops.scan(x, log_a=log_a)
    want, _ = ops.scan(x.double(), log_a=log_a.double())
    assert error(got.double(), want) < 1e-5
