"""Parity with code of others, dtypes, compilation and refusals of the vector-state operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import linnet
import linnet.ops as ops


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


# ---- parity ----------------------------------------------------------------------------------------------------------


def test_selective_scan_and_short_conv_are_transformers_mamba_mixer():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=1, time_step_rank=4, conv_kernel=4)
    mixer = MambaMixer(config, layer_idx=0).eval()
    with torch.no_grad():
        mixer.A_log.copy_(torch.rand_like(mixer.A_log) * 2)
        mixer.D.copy_(torch.randn_like(mixer.D))
        mixer.dt_proj.bias.copy_(torch.randn_like(mixer.dt_proj.bias))
    hidden = torch.randn(2, 37, 32)
    theirs = mixer(hidden.clone())
    x, z = mixer.in_proj(hidden).chunk(2, dim=-1)
    x, _ = ops.short_conv(x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, "silu")
    dt, B, C = mixer.x_proj(x).split([4, 8, 8], dim=-1)
    y, _ = ops.selective_scan(x, F.softplus(mixer.dt_proj(dt)), -mixer.A_log.exp(), B, C, mixer.D, z)
    ours = mixer.out_proj(y)
    assert relative(ours, theirs) < 2e-6
    weight = torch.randn_like(ours)
    for name in ("A_log", "D", "in_proj.weight", "x_proj.weight", "dt_proj.bias", "conv1d.weight"):
        parameter = mixer.get_parameter(name)
        want = torch.autograd.grad((theirs * weight).sum(), parameter, retain_graph=True)[0]
        got = torch.autograd.grad((ours * weight).sum(), parameter, retain_graph=True)[0]
        assert relative(got, want) < 1e-5, name


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_short_conv_is_conv1d(backend):
    x, weight, bias = torch.randn(2, 20, 6), torch.randn(6, 4), torch.randn(6)
    want = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=6)).mT
    assert relative(ops.short_conv(x, weight, bias, "silu", backend=backend)[0], want) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_cumulative_logsumexp_is_torch_logcumsumexp(backend):
    x = (10 * torch.randn(2, 50, 3, dtype=torch.float64)).requires_grad_()
    weight = torch.randn_like(x)
    got, want = ops.cumulative_logsumexp(x, backend=backend)[0], torch.logcumsumexp(x, 1)
    assert relative(got, want) < 1e-14
    grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want)]
    assert relative(*grads) < 1e-12


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nothing_is_minus_infinity_with_zero_gradient(backend):
    x = torch.full((1, 40, 2), -torch.inf)
    x[:, 20:, 1] = 1.0
    x.requires_grad_()
    y, (state,) = ops.cumulative_logsumexp(x, return_state=True, backend=backend)
    assert (y[..., 0] == -torch.inf).all() and (y[:, :20, 1] == -torch.inf).all() and not y.isnan().any()
    torch.where(y.isfinite(), y, 0).sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad[..., 0] == 0).all()
    assert abs(float(x.grad[..., 1].sum()) - 20) < 1e-4


def test_scan_of_ones_is_cumsum():
    x = torch.randn(2, 100, 3, dtype=torch.float64)
    assert relative(ops.scan(x, log_a=torch.zeros(3, dtype=torch.float64))[0], x.cumsum(1)) < 1e-14


# ---- dtypes and layout -----------------------------------------------------------------------------------------------


def operands(dtype=torch.float32):
    x = torch.randn(2, 40, 6, dtype=dtype)
    delta, A = torch.rand(2, 40, 6, dtype=dtype), -torch.rand(6, 4)
    B, C = torch.randn(2, 40, 4, dtype=dtype), torch.randn(2, 40, 4, dtype=dtype)
    return {
        "scan": {"x": x, "log_a": -torch.rand(2, 40, 6)},
        "selective_scan": {"x_BTD": x, "delta_BTD": delta, "A_DN": A, "B_BTN": B, "C_BTN": C, "z_BTD": x},
        "short_conv": {"x_BTD": x, "weight_DW": torch.randn(6, 4, dtype=dtype), "activation": "silu"},
        "token_shift": {"x_BTD": x},
        "cumulative_logsumexp": {"x": x},
    }


OPS = list(operands())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_have_fp32_states(op, dtype):
    arguments = operands(dtype)[op]
    o, (state,) = getattr(ops, op)(**arguments, return_state=True, backend="torch")
    assert o.dtype == dtype and state.dtype == torch.float32
    wide = {n: x.float() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    want, (wanted,) = getattr(ops, op)(**wide, return_state=True, backend="reference")
    assert relative(o, want) < torch.finfo(dtype).eps and relative(state, wanted) < 1e-6


@pytest.mark.parametrize("op", OPS)
def test_strides_do_not_matter(op):
    arguments = operands()[op]
    want, _ = getattr(ops, op)(**arguments)
    strided = {n: x.mT.contiguous().mT if isinstance(x, torch.Tensor) and x.ndim == 3 else x for n, x in arguments.items()}
    assert relative(getattr(ops, op)(**strided)[0], want) < 1e-6


def test_state_is_none_unless_asked_for():
    for op, arguments in operands().items():
        assert getattr(ops, op)(**arguments)[1] is None


# ---- mechanics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_compiles_in_one_graph(op):
    arguments = operands()[op]
    x = next(iter(arguments.values()))
    x.requires_grad_()
    eager, _ = getattr(ops, op)(**arguments)
    want = torch.autograd.grad(eager.sum(), x)[0]
    call = lambda arguments: getattr(ops, op)(**arguments, return_state=True)  # noqa: E731
    o, _ = torch.compile(call, fullgraph=True, backend="aot_eager")(arguments)
    assert relative(o, eager) < 1e-6 and relative(torch.autograd.grad(o.sum(), x)[0], want) < 1e-6


def test_compiles_for_changing_lengths():
    leaves = operands()["selective_scan"]
    call = torch.compile(lambda a: ops.selective_scan(**a, return_state=True), fullgraph=True, backend="aot_eager")
    for tokens in (40, 33, 1, 21, 22):
        a = {n: x if n == "A_DN" else x[:, :tokens].clone().requires_grad_() for n, x in leaves.items()}
        (o, (state,)), (want, (wanted,)) = call(a), ops.selective_scan(**a, return_state=True)
        assert relative(o, want) < 1e-6 and relative(state, wanted) < 1e-6
        assert torch.isfinite(torch.autograd.grad(o.sum(), a["x_BTD"])[0]).all()


@pytest.mark.slow
def test_compiles_with_inductor():
    a = operands()["selective_scan"]
    o, _ = torch.compile(lambda a: ops.selective_scan(**a), fullgraph=True)(a)
    assert relative(o, ops.selective_scan(**a)[0]) < 1e-6


@pytest.mark.parametrize("packed", [False, True])
def test_custom_operators_keep_their_contract(packed):
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    cu = torch.tensor([0, 3, 3, 20], dtype=torch.int32) if packed else None
    leaf = lambda *s: torch.randn(*s, requires_grad=True)  # noqa: E731
    library, rows = torch.ops.linnet, 3 if packed else 1
    x, a, h0 = leaf(1, 20, 4), leaf(1, 20, 4), leaf(rows, 4)
    torch.library.opcheck(library.scan, (x, a, False, h0, cu, torch.float32), test_utils=checks)
    torch.library.opcheck(library.cumulative_logsumexp, (x, h0, cu, torch.float32), test_utils=checks)
    delta, A = torch.rand(1, 20, 4, requires_grad=True), (-torch.rand(4, 2)).requires_grad_()
    operands = (delta, x, A, leaf(1, 20, 2, 2), leaf(1, 20, 2, 2), leaf(rows, 4, 2), cu, True, True)
    torch.library.opcheck(library.selective_scan, operands, test_utils=checks)


@pytest.mark.parametrize("op", ["scan", "selective_scan", "cumulative_logsumexp"])
def test_double_backward_is_refused(op):
    arguments = operands()[op]
    x = next(iter(arguments.values())).requires_grad_()
    o, _ = getattr(ops, op)(**arguments, backend="torch")
    (grad,) = torch.autograd.grad((o**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        grad.sum().backward()


# ---- refusals --------------------------------------------------------------------------------------------------------

X = torch.randn(2, 5, 6)
CU = torch.tensor([0, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.scan(X), "scan: argument 'a' must be given"),
        (lambda: ops.scan(X, a=X, log_a=-X.abs()), "scan: argument 'a' must be given"),
        (lambda: ops.scan(X, a=torch.randn(5)), "scan: argument 'a'.*broadcastable to x"),
        (lambda: ops.scan(X, a=torch.randn(2, 5)), "scan: argument 'a'.*\\(2, 5\\)"),
        (lambda: ops.scan(X, log_a=X.to(torch.complex64)), "'log_a' must be real"),
        (lambda: ops.scan(X, a="no"), "argument 'a' must be a tensor"),
        (lambda: ops.scan(X[:, :0], a=X[:, :0]), "'x' must be of at least one token"),
        (lambda: ops.scan(torch.randn(3), a=torch.randn(3)), "argument 'x' must be of shape"),
        (lambda: ops.scan(X, a=X, initial_state=X), "initial_state"),
        (lambda: ops.scan(X, a=X, initial_state=torch.zeros(2, 6, dtype=torch.complex64)), "initial_state.*real"),
        (lambda: ops.scan(X, a=X, cu_seqlens=CU), "cu_seqlens.*batch size"),
        (lambda: ops.scan(X, a=X, backend="cuda"), "backend must be one of"),
        (lambda: ops.selective_scan(X, X, torch.randn(5, 4), X, X), "'A_DN'.*size 6 on axis 0"),
        (lambda: ops.selective_scan(X, X[:, :4], torch.randn(6, 4), X, X), "'delta_BTD'.*time"),
        (lambda: ops.selective_scan(X, X, torch.randn(6, 4), X, X), "'B_BTN'.*size 4.*state channels"),
        (lambda: ops.selective_scan(X, X, torch.randn(6, 6), torch.randn(2, 5, 4, 6), X), "'B_BTN'.*divides the 6 channels"),
        (lambda: ops.selective_scan(X, X, torch.randn(6, 6), X, X, torch.ones(5)), "'D_D'.*size 6"),
        (lambda: ops.selective_scan(X, X, torch.randn(6, 6, dtype=torch.complex64), X, X), "'A_DN' must be real"),
        (lambda: ops.short_conv(X, torch.randn(5, 4)), "'weight_DW'.*size 6"),
        (lambda: ops.short_conv(X, torch.randn(6, 0)), "'weight_DW' must be of at least one tap"),
        (lambda: ops.short_conv(X, torch.randn(6, 4), activation="gelu"), "'activation'.*'gelu'"),
        (lambda: ops.short_conv(X, torch.randn(6, 4), initial_state=torch.zeros(2, 6, 4)), "initial_state.*\\[2, 6, 3\\]"),
        (lambda: ops.token_shift(X[0]), "'x_BTD' must be of shape"),
        (lambda: ops.token_shift(X, initial_state=(X[:, 0], X[:, 0])), "initial_state.*2 tensors"),
        (lambda: ops.cumulative_logsumexp(X.long()), "'x' must be a floating-point tensor"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_debug_mode_checks_values():
    calls = [
        (lambda: ops.scan(X, log_a=X.abs()), "'log_a' must be <= 0"),
        (lambda: ops.selective_scan(X, -X.abs(), -X[0, 0, :, None].abs(), X[..., :1], X[..., :1]), "'delta_BTD' must be >= 0"),
        (lambda: ops.selective_scan(X, X.abs(), X[0, 0, :, None].abs(), X[..., :1], X[..., :1]), "'A_DN' must be <= 0"),
        (lambda: ops.token_shift(X * torch.nan), "NaN"),
        (lambda: ops.token_shift(X[:1], cu_seqlens=torch.tensor([0, 3, 2, 5], dtype=torch.int32)), "non-decreasing"),
    ]
    for call, message in calls:
        call()
        with linnet.debug(), pytest.raises(ValueError, match=message):
            call()
