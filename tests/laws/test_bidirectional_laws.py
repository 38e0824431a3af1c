"""Laws of bidirectional_attention: both backends in fp64 to 1e-12."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import linnet.ops as ops

few = settings(max_examples=40, deadline=None, derandomize=True)
TOLERANCE = 1e-12


@dataclass
class Call:
    tensors: dict[str, Tensor]
    options: dict
    cu_seqlens: Tensor | None = None

    def run(self, backend: str | None = "torch") -> Tensor:
        o, state = ops.bidirectional_attention(**self.tensors, **self.options, cu_seqlens=self.cu_seqlens, backend=backend)
        assert state is None
        return o

    def results(self, backend: str) -> dict[str, Tensor]:
        leaves = {n: x.detach().clone().requires_grad_() for n, x in self.tensors.items()}
        o = replace(self, tensors=leaves).run(backend)
        weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(5), dtype=o.dtype)
        grads = torch.autograd.grad((o * weight).sum(), list(leaves.values()))
        return {"o": o} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}

    def at(self, index) -> Call:
        return replace(self, tensors={n: x[:, index] for n, x in self.tensors.items()}, cu_seqlens=None)


@st.composite
def calls(draw, packed: bool | None = None):
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    cu, batch, tokens = None, draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 17, 70]))
    if draw(st.booleans()) if packed is None else packed:
        lengths = draw(st.lists(st.sampled_from([0, 1, 2, 16, 63, 64, 65, 150]), min_size=1, max_size=5).filter(any))
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        batch, tokens = 1, sum(lengths)
    counts = draw(st.sampled_from([(2, 2, 2), (4, 2, 1), (4, 1, 2), (1, 2, 4), (2, 4, 4), (6, 3, 1)]))
    K, V = draw(st.sampled_from([(3, 5), (8, 2), (1, 1)]))
    normalizer = draw(st.sampled_from([None, "sum"]))
    shape = lambda heads, size: (batch, tokens, heads, size)
    q, k, v = (normal(*shape(h, n)) for h, n in zip(counts, (K, K, V), strict=True))
    if normalizer:
        q, k = q.abs() + 0.5, k.abs() + 0.5  # a sum near zero would measure the condition of the division
    tensors = {"q": q, "k": k, "v": v}
    if draw(st.booleans()):
        gain = 5 * normal(batch, tokens, draw(st.sampled_from(counts)))
        tensors["log_gain"] = gain + 300 if normalizer else gain.clamp_max(0)  # e^300 needs the stabilised sum in fp32, not here
    options = {"normalizer": normalizer, "scale": draw(st.sampled_from([None, 0.7]))}
    if normalizer:
        options["normalizer_eps"] = draw(st.sampled_from([0.0, 1e-6, 0.5]))
    return Call(tensors, options, cu)


def error(got: Tensor, want: Tensor) -> float:
    """Relative to the largest value, or to the operands (of size 1): with one token the sums cancel and gradients are zero."""
    assert got.shape == want.shape
    return float((got - want).detach().abs().max() / want.detach().abs().max().clamp_min(1.0)) if want.numel() else 0.0


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, x in want.items():
        assert error(got[name], x) < TOLERANCE, f"{name}: {error(got[name], x):.1e}"


@settings(few, max_examples=80)
@given(calls())
def test_torch_backend_is_the_sum(call):
    assert_same(call.results("torch"), call.results("reference"))


@few
@given(calls(packed=False), st.sampled_from(["torch", "reference"]))
def test_it_is_attention_with_all_weights_in_memory(call, backend):
    """The matrix of weights, written out."""
    t, heads = call.tensors, max(x.shape[2] for x in call.tensors.values())
    q, k, v = (t[n].repeat_interleave(heads // t[n].shape[2], 2) for n in "qkv")
    scale = call.options["scale"] or q.shape[-1] ** -0.5
    A = scale * torch.einsum("bthk,bshk->bhts", q, k)
    if "log_gain" in t:
        gain = t["log_gain"].repeat_interleave(heads // t["log_gain"].shape[2], 2)
        A = A * gain.exp().permute(0, 2, 1)[:, :, None]
    if call.options["normalizer"]:
        A = A / (A.sum(-1, keepdim=True) + call.options["normalizer_eps"])
    assert error(call.run(backend), torch.einsum("bhts,bshv->bthv", A, v)) < 1e-11


@few
@given(calls(packed=True), st.sampled_from(["torch", "reference"]))
def test_packed_segments_are_separate_sequences(call, backend):
    got = call.results(backend)
    single = {n: x.detach().clone().requires_grad_() for n, x in call.tensors.items()}
    bounds = call.cu_seqlens.tolist()
    whole = replace(call, tensors=single)
    o = torch.cat([whole.at(slice(a, b)).run(backend) for a, b in zip(bounds, bounds[1:], strict=False) if a < b], 1)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(5), dtype=o.dtype)
    grads = torch.autograd.grad((o * weight).sum(), list(single.values()))
    assert_same(got, {"o": o} | {f"d{n}": g for n, g in zip(single, grads, strict=True)})


@few
@given(calls(packed=True), st.sampled_from(["torch", "reference"]), st.sampled_from([torch.nan, torch.inf]))
def test_a_segment_never_sees_another(call, backend, bad):
    bounds = call.cu_seqlens.tolist()
    row = max(range(len(bounds) - 1), key=lambda n: bounds[n + 1] - bounds[n])
    own = slice(bounds[row], bounds[row + 1])
    tensors = {n: x.clone() for n, x in call.tensors.items()}
    for x in tensors.values():
        x[:, own] = bad
    mine, theirs = call.results(backend), replace(call, tensors=tensors).results(backend)
    for name, x in mine.items():
        keep = torch.ones(x.shape[1], dtype=torch.bool)
        keep[own] = False
        assert torch.equal(theirs[name][:, keep], x[:, keep]), name


@few
@given(calls(packed=False), st.integers(0, 99))
def test_the_order_of_the_tokens_does_not_matter(call, seed):
    order = torch.randperm(call.tensors["q"].shape[1], generator=torch.Generator().manual_seed(seed))
    assert error(call.at(order).run(), call.run()[:, order]) < TOLERANCE


def test_gradients_are_those_of_finite_differences():
    q, k, v, i = (
        torch.rand(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 5, 2, 2), (1, 5, 1, 2), (1, 5, 2, 3), (1, 5, 1))
    )
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    run = lambda q, k, v, i: ops.bidirectional_attention(q, k, v, log_gain=i, normalizer="sum", normalizer_eps=0.1, cu_seqlens=cu)[
        0
    ]
    assert torch.autograd.gradcheck(run, (q, k, v, i))
    assert torch.autograd.gradgradcheck(run, (q, k, v, i))


@pytest.mark.parametrize("gain", [500.0, -500.0, -torch.inf])
def test_large_gains_stay_finite_in_fp32(gain):
    q, k, v = (torch.rand(2, 9, 2, 4) for _ in range(3))
    i = torch.full((2, 9, 2), gain) + torch.randn(2, 9, 2)
    o, _ = ops.bidirectional_attention(q, k, v, log_gain=i, normalizer="sum", normalizer_eps=1e-6)
    want, _ = ops.bidirectional_attention(
        q.double(), k.double(), v.double(), log_gain=i.double(), normalizer="sum", backend="reference"
    )
    assert bool(o.isfinite().all()) and float((o - want).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_lower_precision_is_near_double(dtype, tolerance):
    q, k, v = (torch.rand(2, 4096, 2, 8).to(dtype) for _ in range(3))
    o, _ = ops.bidirectional_attention(q, k, v, normalizer="sum")
    want, _ = ops.bidirectional_attention(q.double(), k.double(), v.double(), normalizer="sum")
    assert o.dtype == dtype and float((o.double() - want).norm() / want.norm()) < tolerance


def test_compiles_as_one_graph():
    q, k, v = (torch.rand(2, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    run = lambda *x: ops.bidirectional_attention(*x, log_gain=x[0][..., 0], normalizer="sum")[0]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v), rtol=1e-12, atol=0)


@pytest.mark.slow
def test_nothing_as_long_as_the_sequence_is_kept_for_the_backward_but_the_operands():
    """T x K x V would be 4 GiB here, T x T 256 GiB."""
    import resource

    T = 1 << 18
    q, k, v = (torch.rand(1, T, 1, 64).requires_grad_() for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ops.bidirectional_attention(q, k, v, normalizer="sum")[0].square().sum().backward()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 14 * 64  # MiB; an operand is 64


Q, K, V = torch.randn(2, 7, 2, 4), torch.randn(2, 7, 2, 4), torch.randn(2, 7, 2, 3)
CU = torch.tensor([0, 7], dtype=torch.int32)


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda f: f(Q[0], K, V), r"'q' must be of shape \[B, T, H, K\]"),
        (lambda f: f(Q[:, :0], K[:, :0], V[:, :0]), "'q' must be of at least one token"),
        (lambda f: f(Q, K[:, :5], V), "'k' must be of size 7 on axis 1"),
        (lambda f: f(Q, K[..., :3], V), "'k' must be of size 4 on axis 3"),
        (lambda f: f(Q, K, V.double()), "'v' must be of the dtype of 'q'"),
        (lambda f: f(torch.randn(2, 7, 3, 4), K, V), "'k' must be a tensor whose head count divides 3"),
        (lambda f: f(Q, K, V, normalizer="floor"), "'normalizer' must be one of None, 'sum'; got 'floor'"),
        (lambda f: f(Q, K, V, log_gain=torch.zeros(2, 7)), r"'log_gain' must be of shape \[B, T, H\]"),
        (lambda f: f(Q, K, V, log_gain=torch.zeros(2, 6, 2)), "'log_gain' must be of size 7 on axis 1"),
        (lambda f: f(Q, K, V, cu_seqlens=CU), "'cu_seqlens' must be None unless the batch size is 1"),
        (lambda f: f(Q, K, V, backend="cuda"), "backend must be one of"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match="bidirectional_attention: .*" + match):
        call(ops.bidirectional_attention)
