"""Operators whose state is a vector: scans, the selective scan (S6), short convolution, token shift, running log-sum-exp.

Shape legend: B batch, T tokens, D channels, N state channels (selective scan) or rows of the state (the batch, or the packed
segments), W taps of a convolution, G groups. `...` stands for any number of channel axes.
"""

from __future__ import annotations

from torch import Tensor

from linnet.ops import _checks as check
from linnet.ops._dispatch import call

State = tuple[Tensor, ...]


def _sequence(op: str, name: str, x: object, shape: str, ndim: int | None = None) -> tuple[int, int]:
    """Check the operand that defines batch and time; return both."""
    check.tensor(op, name, x, shape, max(x.ndim, 2) if ndim is None and isinstance(x, Tensor) else (ndim or 2))
    if x.shape[1] < 1:
        check.refuse(op, name, "of at least one token", check.describe(x))
    return x.shape[0], x.shape[1]


def _real(op: str, **operands: Tensor | None) -> None:
    for name, x in operands.items():
        if x is not None and x.is_complex():
            check.refuse(op, name, "real", check.describe(x))


def _coefficient(op: str, name: str, a: object, x: Tensor) -> Tensor:
    """A decay of `scan` as [B|1, T|1, ...]: broadcastable to x, a constant [...] gets the two leading axes."""
    expected = f"a tensor broadcastable to x, of shape {list(x.shape)}, or a constant of shape {list(x.shape[2:])}"
    if not isinstance(a, Tensor) or not (a.is_floating_point() or a.is_complex()):
        check.refuse(op, name, expected, check.describe(a))
    check.tensor(op, name, a, f"[B, T, ...] (axes of x) or [...] ({x.ndim - 2} axes)", (x.ndim, x.ndim - 2), x)
    if a.ndim == x.ndim - 2:
        a = a[None, None]
    if any(size not in (1, full) for size, full in zip(a.shape, x.shape, strict=True)):
        check.refuse(op, name, expected, check.describe(a))
    return a


def _decay(op: str, x: Tensor, a: Tensor | None, log_a: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Check the factor of a scan or its logarithm; both in the layout of the backends."""
    if (a is None) == (log_a is None):
        check.refuse(op, "a", "given if and only if log_a is not", "both" if a is not None else "neither")
    if a is not None:
        return _coefficient(op, "a", a, x), None
    log_a = _coefficient(op, "log_a", log_a, x)
    _real(op, log_a=log_a)
    if check.debugging() and bool((log_a > 0).any()):
        check.refuse(op, "log_a", "<= 0 (a natural logarithm)", f"a largest value of {float(log_a.max())}")
    return None, log_a


def scan(
    x: Tensor,
    *,
    a: Tensor | None = None,
    log_a: Tensor | None = None,
    initial_state: State | Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""The linear recurrence with a diagonal transition.

        h_t = a_t h_{t-1} + x_t                         elementwise, h_0 from `initial_state` (zero if None)

    Args:
        x: [B, T, ...], real or complex.
        a: the factor per token, signed or complex, of any modulus; or
        log_a: its natural logarithm, real, <= 0, down to -inf (exact: nothing of the past is left). Exactly one of the two;
            [B, T, ...] broadcastable to x, or a constant per channel [...].
        initial_state: (h [N, ...],). cu_seqlens: [N+1] token offsets of packed segments (B = 1); empty segments are allowed.

    Returns:
        (h [B, T, ...], state): h in the dtype of x (complex if a is), the state (h_T [N, ...],) in at least fp32, None unless
        `return_state`.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Sources: Martin & Cundy 2018, Parallelizing Linear Recurrent Neural Nets (arXiv 1709.04057); used by HGRN (2311.04823).
    """
    op = "scan"
    batch, tokens = _sequence(op, "x", x, "[B, T, ...]")
    a, log_a = _decay(op, x, a, log_a)
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, x.device)
    initial_state = check.state(op, initial_state, {"h": (rows, *x.shape[2:])}, x.device)
    if initial_state is not None and initial_state[0].is_complex() and not (x.is_complex() or (a is not None and a.is_complex())):
        check.refuse(op, "initial_state", "real where x and a are", check.describe(initial_state[0]))
    return call(
        op, backend, x=x, a=a, log_a=log_a, initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens
    )  # fmt: skip


def _selective_operands(
    op: str, x_BTD: Tensor, delta_BTD: Tensor, A_DN: Tensor, B_BTN: Tensor, C_BTN: Tensor, D_D: Tensor | None, z_BTD: Tensor | None
) -> tuple[int, int]:  # fmt: skip
    """Check the operands of a selective scan; batch and tokens."""
    batch, tokens = _sequence(op, "x_BTD", x_BTD, "[B, T, D]", 3)
    width = x_BTD.shape[2]
    check.tensor(op, "A_DN", A_DN, "[D, N]", 2, x_BTD)
    check.sizes(op, "A_DN", A_DN, {0: ("channels", width)})
    time = {0: ("batch", batch), 1: ("time", tokens)}
    for name, x in (("delta_BTD", delta_BTD), ("z_BTD", z_BTD)):
        if x is not None or name == "delta_BTD":
            check.tensor(op, name, x, "[B, T, D]", 3, x_BTD)
            check.sizes(op, name, x, time | {2: ("channels", width)})
    for name, x in (("B_BTN", B_BTN), ("C_BTN", C_BTN)):
        check.tensor(op, name, x, "[B, T, N] or [B, T, G, N]", (3, 4), x_BTD)
        check.sizes(op, name, x, time | {-1: ("state channels", A_DN.shape[1])})
        if x.ndim == 4 and (x.shape[2] < 1 or width % x.shape[2]):
            check.refuse(op, name, f"of a number of groups that divides the {width} channels", f"{x.shape[2]} groups")
    if D_D is not None:
        check.tensor(op, "D_D", D_D, "[D]", 1, x_BTD)
        check.sizes(op, "D_D", D_D, {0: ("channels", width)})
    _real(op, x_BTD=x_BTD, delta_BTD=delta_BTD, A_DN=A_DN, B_BTN=B_BTN, C_BTN=C_BTN, D_D=D_D, z_BTD=z_BTD)
    if check.debugging():
        if bool((delta_BTD < 0).any()):
            check.refuse(op, "delta_BTD", ">= 0 (a step size, after softplus)", f"a smallest value of {float(delta_BTD.min())}")
        if bool((A_DN > 0).any()):
            check.refuse(op, "A_DN", "<= 0", f"a largest value of {float(A_DN.max())}")
    return batch, tokens


def selective_scan(
    x_BTD: Tensor,
    delta_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_D: Tensor | None = None,
    z_BTD: Tensor | None = None,
    *,
    initial_state: State | Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""The selective state-space recurrence S6 of Mamba, with skip connection and SiLU gate.

        h_t[d, n] = exp(delta_t[d] A[d, n]) h_{t-1}[d, n] + delta_t[d] B_t[n] x_t[d]
        y_t[d] = (sum_n C_t[n] h_t[d, n] + D[d] x_t[d]) * silu(z_t[d])

    Args:
        x_BTD: [B, T, D]. delta_BTD: [B, T, D], the step size, >= 0 (the softplus is the caller's).
        A_DN: [D, N], real, <= 0.
        B_BTN, C_BTN: [B, T, N], or [B, T, G, N] with G dividing D: channel d uses group d // (D / G).
        D_D: [D] or None (no skip). z_BTD: [B, T, D] or None (no gate).
        initial_state: (h [rows, D, N],). cu_seqlens: [rows+1] token offsets of packed segments (B = 1).

    Returns:
        (y [B, T, D] in the dtype of x, state): (h_T [rows, D, N],) in at least fp32, None unless `return_state`.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: Gu & Dao 2023, Mamba (arXiv 2312.00752).
    """
    op = "selective_scan"
    batch, tokens = _selective_operands(op, x_BTD, delta_BTD, A_DN, B_BTN, C_BTN, D_D, z_BTD)
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, x_BTD.device)
    initial_state = check.state(op, initial_state, {"h": (rows, *A_DN.shape)}, x_BTD.device)
    return call(
        op, backend, x_BTD=x_BTD, delta_BTD=delta_BTD, A_DN=A_DN, B_BTN=B_BTN, C_BTN=C_BTN, D_D=D_D, z_BTD=z_BTD,
        initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _conv_operands(
    op: str, x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, activation: str | None
) -> tuple[int, int]:  # fmt: skip
    """Check the operands of a short convolution; batch and tokens."""
    batch, tokens = _sequence(op, "x_BTD", x_BTD, "[B, T, D]", 3)
    width = x_BTD.shape[2]
    check.tensor(op, "weight_DW", weight_DW, "[D, W]", 2, x_BTD)
    check.sizes(op, "weight_DW", weight_DW, {0: ("channels", width)})
    if weight_DW.shape[1] < 1:
        check.refuse(op, "weight_DW", "of at least one tap", check.describe(weight_DW))
    if bias_D is not None:
        check.tensor(op, "bias_D", bias_D, "[D]", 1, x_BTD)
        check.sizes(op, "bias_D", bias_D, {0: ("channels", width)})
    check.choice(op, "activation", activation, (None, "silu"))
    _real(op, x_BTD=x_BTD, weight_DW=weight_DW, bias_D=bias_D)
    return batch, tokens


def short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: State | Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""Causal depthwise convolution over time.

        y_t[d] = act(bias[d] + sum_{w<W} weight[d, w] x_{t-W+1+w}[d])      weight[:, W-1] meets the current token

    Args:
        x_BTD: [B, T, D]. weight_DW: [D, W], any W >= 1. bias_D: [D] or None. activation: None | "silu".
        initial_state: (c [N, D, W-1],), the last W-1 inputs, oldest first; zero if None.
        cu_seqlens: [N+1] token offsets of packed segments (B = 1); no segment sees another.

    Returns:
        (y [B, T, D] in the dtype of x, state): (c [N, D, W-1],) in at least fp32, None unless `return_state`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    op = "short_conv"
    batch, tokens = _conv_operands(op, x_BTD, weight_DW, bias_D, activation)
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, x_BTD.device)
    initial_state = check.state(op, initial_state, {"c": (rows, x_BTD.shape[2], weight_DW.shape[1] - 1)}, x_BTD.device)
    return call(
        op, backend, x_BTD=x_BTD, weight_DW=weight_DW, bias_D=bias_D, activation=activation, initial_state=initial_state,
        return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def token_shift(
    x_BTD: Tensor,
    *,
    initial_state: State | Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""The previous token.

        y_t = x_{t-1},      y_1 from `initial_state` (zero if None)

    Args:
        x_BTD: [B, T, D]. initial_state: (x_0 [N, D],), the token before the first.
        cu_seqlens: [N+1] token offsets of packed segments (B = 1); each segment starts from its own state.

    Returns:
        (y [B, T, D] in the dtype of x, state): (x_T [N, D],) in at least fp32, None unless `return_state`.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: Peng et al. 2023, RWKV (arXiv 2305.13048).
    """
    op = "token_shift"
    batch, tokens = _sequence(op, "x_BTD", x_BTD, "[B, T, D]", 3)
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, x_BTD.device)
    initial_state = check.state(op, initial_state, {"x": (rows, x_BTD.shape[2])}, x_BTD.device)
    return call(
        op, backend, x_BTD=x_BTD, initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens
    )  # fmt: skip


def cumulative_logsumexp(
    x: Tensor,
    *,
    initial_state: State | Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""The running log-sum-exp.

        y_t = log(e^{y_0} + sum_{s<=t} e^{x_s})         e^{y_0} = 0 without an initial state

    Exact for inputs of -inf (also a whole row of them: y = -inf, gradients 0) and for inputs of any size.

    Args:
        x: [B, T, ...], real. initial_state: (y [N, ...],), natural logarithms.
        cu_seqlens: [N+1] token offsets of packed segments (B = 1).

    Returns:
        (y [B, T, ...] in the dtype of x, state): (y_T [N, ...],) in at least fp32, None unless `return_state`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    op = "cumulative_logsumexp"
    batch, tokens = _sequence(op, "x", x, "[B, T, ...]")
    _real(op, x=x)
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, x.device)
    initial_state = check.state(op, initial_state, {"y": (rows, *x.shape[2:])}, x.device)
    return call(op, backend, x=x, initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens)
