"""Laws of long_conv: both backends, all methods, in fp64 to 1e-12."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import linnet.ops as ops

few = settings(max_examples=40, deadline=None, derandomize=True)
TOLERANCE = 1e-12
LENGTHS = (1, 2, 5, 17, 64, 65, 100)
LAGS = (1, 2, 4, 33, 64, 65, 90)
METHODS = ("auto", "fft", "direct")


@dataclass
class Call:
    u: Tensor
    kernel: Tensor
    skip: Tensor | None = None
    state: Tensor | None = None
    lookahead: int = 0
    method: str = "auto"
    cu_seqlens: Tensor | None = None

    def run(self, backend: str | None = "torch", **extra):
        options = {"return_state": self.lookahead == 0, "method": self.method, "lookahead": self.lookahead} | extra
        return ops.long_conv(
            self.u, self.kernel, self.skip, initial_state=self.state, cu_seqlens=self.cu_seqlens, backend=backend, **options
        )

    def copy(self) -> Call:
        leaf = lambda x: None if x is None else x.detach().clone().requires_grad_()
        return replace(self, u=leaf(self.u), kernel=leaf(self.kernel), skip=leaf(self.skip), state=leaf(self.state))

    def results(self, backend: str, state_counts: bool = True) -> dict[str, Tensor]:
        """Outputs, final state and the gradients of a random linear functional of them."""
        own, rng = self.copy(), torch.Generator().manual_seed(5)
        y, state = own.run(backend)
        outputs = {"y": y} | ({} if state is None or not state_counts else {"state": state[0]})
        loss = sum((x * torch.randn(x.shape, generator=rng, dtype=x.dtype)).sum() for x in outputs.values())
        leaves = {n: x for n in ("u", "kernel", "skip", "state") if (x := getattr(own, n)) is not None}
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        zero = lambda x, g: torch.zeros_like(x) if g is None else g
        return outputs | {f"d{n}": zero(x, g) for (n, x), g in zip(leaves.items(), grads, strict=True)}


@st.composite
def calls(draw, packed: bool | None = None, causal: bool = False):
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    cu = None
    if draw(st.booleans()) if packed is None else packed:
        lengths = draw(st.lists(st.sampled_from([0, 1, 2, 5, 16, 33, 70]), min_size=1, max_size=5).filter(any))
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        batch, tokens, rows = 1, sum(lengths), len(lengths)
    else:
        batch = rows = draw(st.sampled_from([1, 2]))
        tokens = draw(st.sampled_from(LENGTHS))
    lags, groups = draw(st.sampled_from(LAGS)), draw(st.sampled_from([6, 3, 1]))
    call = Call(normal(batch, tokens, 6), normal(groups, lags), method=draw(st.sampled_from(METHODS)), cu_seqlens=cu)
    if draw(st.booleans()):
        call.skip = normal(6)
    if not causal and draw(st.booleans()):
        call.lookahead = draw(st.sampled_from([0, (lags - 1) // 2, lags - 1]))
    if call.lookahead == 0 and draw(st.booleans()):
        call.state = normal(rows, 6, lags - 1)
    return call


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    return float((got - want).detach().abs().max() / want.detach().abs().max().clamp_min(1e-30)) if want.numel() else 0.0


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    for name, x in want.items():
        assert error(got[name], x) < tolerance, f"{name}: {error(got[name], x):.1e}"


@settings(few, max_examples=80)
@given(calls())
def test_torch_backend_is_the_sum(call):
    assert_same(call.results("torch"), call.results("reference"))


@few
@given(calls(packed=False, causal=True), st.floats(0, 1), st.sampled_from(["torch", "reference"]))
def test_any_split_is_the_whole(call, where, backend):
    whole, (final,) = call.run(backend)
    tokens, state, pieces = call.u.shape[1], call.state, []
    cut = round(where * tokens)
    for start, end in ((0, cut), (cut, tokens)):
        if start < end:
            y, (state,) = replace(call, u=call.u[:, start:end], state=state).run(backend)
            pieces.append(y)
    assert error(torch.cat(pieces, 1), whole) < TOLERANCE and error(state, final) < TOLERANCE


@few
@given(calls(packed=False, causal=True))
def test_decoding_token_by_token_is_prefill(call):
    call = replace(call, u=call.u[:, :17])
    whole, (final,) = call.run()
    state, pieces = call.state, []
    for t in range(call.u.shape[1]):
        y, (state,) = replace(call, u=call.u[:, t : t + 1], state=state).run()
        pieces.append(y)
    assert error(torch.cat(pieces, 1), whole) < TOLERANCE and torch.equal(state, final)


@few
@given(calls(packed=True), st.sampled_from(["torch", "reference"]))
def test_packed_segments_are_separate_sequences(call, backend):
    got = call.results(backend, state_counts=False)
    single, pieces = call.copy(), []
    for n, (start, end) in enumerate(zip(call.cu_seqlens[:-1].tolist(), call.cu_seqlens[1:].tolist(), strict=True)):
        own = None if single.state is None else single.state[n : n + 1]
        if start < end:
            pieces.append(replace(single, u=single.u[:, start:end], state=own, cu_seqlens=None).run(backend)[0])
    y = torch.cat(pieces, 1)
    leaves = {n: x for n in ("u", "kernel", "skip", "state") if (x := getattr(single, n)) is not None}
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    grads = torch.autograd.grad((y * weight).sum(), list(leaves.values()), allow_unused=True)
    want = {f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads, strict=True)}
    assert_same(got, {"y": y} | want)


@few
@given(calls(causal=True), st.floats(0, 0.999))
def test_the_direct_method_is_causal_bit_for_bit(call, where):
    call, t = replace(call, method="direct"), int(where * call.u.shape[1])
    other = call.u.clone()
    other[:, t] = torch.inf
    assert torch.equal(call.run()[0][:, :t], replace(call, u=other).run()[0][:, :t])


@few
@given(calls(causal=True), st.floats(0, 0.999))
def test_the_fft_method_is_causal_up_to_rounding(call, where):
    call, t = replace(call, method="fft"), int(where * call.u.shape[1])
    other = call.u.clone()
    other[:, t:] = 100 * torch.randn_like(other[:, t:])
    before, after = call.run()[0], replace(call, u=other).run()[0]
    if t:
        assert float((before[:, :t] - after[:, :t]).abs().max() / after.abs().max()) < 1e-14


@pytest.mark.parametrize("workspace", [1, 300, 1 << 12])
@pytest.mark.parametrize("shape", [(2, 700, 6, 20), (1, 3000, 4, 100), (3, 50, 6, 70)])
def test_blocks_of_time_and_channels_change_nothing(workspace, shape, monkeypatch):
    batch, tokens, width, lags = shape
    monkeypatch.setattr(importlib.import_module("linnet.ops.torch.long_conv"), "WORKSPACE", workspace)
    rng = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=rng, dtype=torch.float64)
    call = Call(normal(batch, tokens, width), normal(width // 2, lags), normal(width), normal(batch, width, lags - 1))
    assert_same(replace(call, method="fft").results("torch"), replace(call, method="direct").results("torch"))


def test_gradients_are_those_of_finite_differences():
    u, kernel, past = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 5, 2), (1, 4), (2, 2, 3)))
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    run = lambda u, k, c: ops.long_conv(u, k, method="fft", initial_state=c, return_state=True)
    assert torch.autograd.gradcheck(lambda *x: (run(*x)[0], run(*x)[1][0]), (u, kernel, past), check_forward_ad=False)
    one = u[:1].detach().requires_grad_()
    packed = lambda u, k: ops.long_conv(u, k, method="fft", lookahead=2, cu_seqlens=cu)[0]
    assert torch.autograd.gradcheck(packed, (one, kernel))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_precision_is_near_double(dtype, tolerance):
    rng = torch.Generator().manual_seed(0)
    u, kernel = torch.randn(2, 4096, 3, generator=rng).to(dtype), torch.randn(3, 4096, generator=rng).to(dtype)
    y, (state,) = ops.long_conv(u, kernel, return_state=True)
    want, _ = ops.long_conv(u.double(), kernel.double())
    assert y.dtype == dtype and state.dtype == torch.float32
    assert float((y.double() - want).norm() / want.norm()) < tolerance


@pytest.mark.slow
def test_a_million_tokens_fit_in_a_bounded_workspace():
    """With 32 channels in one piece each spectrum alone would take 256 MB; here temporaries are a few times WORKSPACE."""
    import resource

    T, D = 1 << 20, 32
    u, kernel = torch.randn(1, T, D), torch.exp(-torch.arange(T) / 1e5).expand(D, T).contiguous()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    y, _ = ops.long_conv(u, kernel)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # MiB; the output is 128
    assert grown < 128 + 8 * 16 + 100
    for t in (0, 1000, T - 1):
        want = (kernel[:, : t + 1].double() * u[0, : t + 1].flip(0).mT.double()).sum(1)
        assert float((y[0, t] - want).abs().max()) < 1e-3 * float(y[0, T // 2 :].abs().max())


def test_compiles_as_one_graph():
    run = lambda u, k: ops.long_conv(u, k, method="fft", return_state=True)
    u, k = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(3, 70, dtype=torch.float64)
    torch._dynamo.reset()
    y, (state,) = torch.compile(run, fullgraph=True, backend="aot_eager")(u, k)
    want, (expected,) = run(u, k)
    assert torch.equal(y, want) and torch.equal(state, expected)


def test_double_backward_is_refused():
    u = torch.randn(1, 4, 2, requires_grad=True)
    y, _ = ops.long_conv(u, torch.randn(2, 70), method="fft")
    (g,) = torch.autograd.grad(y.sin().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        g.sum().backward()


U, K = torch.randn(2, 7, 6), torch.randn(6, 4)
CU = torch.tensor([0, 7], dtype=torch.int32)


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda: ops.long_conv(U[0], K), r"'u_BTD' must be of shape \[B, T, D\]"),
        (lambda: ops.long_conv(U[:, :0], K), "'u_BTD' must be of at least one token"),
        (lambda: ops.long_conv(U, K[0]), r"'kernel_DL' must be of shape \[D, L\] or \[G, L\]"),
        (lambda: ops.long_conv(U, torch.randn(4, 4)), "'kernel_DL' must be of a number of kernels that divides the 6 channels"),
        (lambda: ops.long_conv(U, K[:, :0]), "'kernel_DL' must be of at least one lag"),
        (lambda: ops.long_conv(U, K.to(torch.complex64)), "'kernel_DL' must be real"),
        (lambda: ops.long_conv(U, K, torch.randn(5)), "'skip_D' must be of size 6"),
        (lambda: ops.long_conv(U, K, lookahead=4), r"'lookahead' must be an integer in 0 .. 3.*; got 4"),
        (lambda: ops.long_conv(U, K, lookahead=True), "'lookahead' must be an integer"),
        (lambda: ops.long_conv(U, K, method="toeplitz"), "'method' must be one of 'auto', 'fft', 'direct'; got 'toeplitz'"),
        (lambda: ops.long_conv(U, K, lookahead=1, return_state=True), "'return_state' must be False where lookahead > 0"),
        (lambda: ops.long_conv(U, K, lookahead=1, initial_state=torch.zeros(2, 6, 3)), "'initial_state' must be None where"),
        (lambda: ops.long_conv(U, K, initial_state=torch.zeros(2, 6, 4)), r"'initial_state' must be a tuple \(c \[2, 6, 3\]\)"),
        (lambda: ops.long_conv(U, K, cu_seqlens=CU), "'cu_seqlens' must be None unless the batch size is 1"),
        (lambda: ops.long_conv(U, K, backend="cuda"), "backend must be one of"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match="long_conv: .*" + match):
        call()
