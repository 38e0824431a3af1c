"""Operators whose state enters a nonlinearity: no parallel form exists, and every backend goes token by token.

Shape legend: B batch, T tokens, H heads, K channels per head, M units, N rows of the state (the batch, or the packed segments).
"""

from __future__ import annotations

from torch import Tensor

from linnet.ops import _checks as check
from linnet.ops._dispatch import call

State = tuple[Tensor, ...]
GATES = 4  # i, f, z, o


def _operand(op: str, name: str, x: object, shape: str, expected: tuple[int, ...], like: Tensor | None = None) -> Tensor:
    """A real tensor of exactly `expected` shape (-1: any size)."""
    check.tensor(op, name, x, shape, len(expected), like)
    if any(size not in (-1, came) for size, came in zip(expected, x.shape, strict=True)):
        check.refuse(op, name, f"{shape} of sizes {list(expected)} (-1: any)", check.describe(x))
    if x.is_complex():
        check.refuse(op, name, "real", check.describe(x))
    return x


def almost_linear_rnn(
    x_BTM: Tensor,
    decay_M: Tensor,
    weight_MM: Tensor,
    relu_units: int,
    *,
    target_BTM: Tensor | None = None,
    strength_BTM: Tensor | None = None,
    initial_state: State | Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""The almost-linear recurrent network: M units, of which the last P pass through a ReLU before they are mixed.

        p_t = z_{t-1} + strength_t * (target_t - z_{t-1})       teacher forcing; p_t = z_{t-1} without a target
        z_t = decay * p_t + W phi(p_t) + x_t                    phi: identity on units 1 .. M-P, ReLU on the last P

    Args:
        x_BTM: [B, T, M], the external input (with the bias).
        decay_M: [M], the diagonal, of any sign and size. weight_MM: W [M, M], row i: what unit i receives.
        relu_units: P, 0 .. M. The network is piecewise linear with 2^P regions.
        target_BTM, strength_BTM: [B, T, M] both or neither. Strength 1 replaces the unit by its target and stops its gradient
            (sparse teacher forcing where it is 1 every few tokens), a value between 0 and 1 mixes (generalised teacher forcing).
        initial_state: (z [N, M],), zero if None. cu_seqlens: [N+1] token offsets of packed segments (B = 1).

    Returns:
        (z [B, T, M] in the dtype of x, state): (z_T [N, M],) in at least fp32, None unless `return_state`.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Sources: Brenner et al. 2024, Almost-Linear RNNs Yield Highly Interpretable Symbolic Codes in Dynamical Systems
    Reconstruction (arXiv 2410.14240); forcing: Hess et al. 2023, Generalized Teacher Forcing (arXiv 2306.04406).
    """
    op = "almost_linear_rnn"
    _operand(op, "x_BTM", x_BTM, "[B, T, M]", (-1, -1, -1))
    batch, tokens, units = x_BTM.shape
    if tokens < 1:
        check.refuse(op, "x_BTM", "of at least one token", check.describe(x_BTM))
    _operand(op, "decay_M", decay_M, "[M]", (units,), x_BTM)
    _operand(op, "weight_MM", weight_MM, "[M, M]", (units, units), x_BTM)
    if not isinstance(relu_units, int) or isinstance(relu_units, bool) or not 0 <= relu_units <= units:
        check.refuse(op, "relu_units", f"an integer in 0 .. {units}", repr(relu_units))
    if (target_BTM is None) != (strength_BTM is None):
        check.refuse(op, "strength_BTM", "given if and only if target_BTM is", check.describe(strength_BTM))
    for name, x in (("target_BTM", target_BTM), ("strength_BTM", strength_BTM)):
        if x is not None:
            _operand(op, name, x, "[B, T, M]", (batch, tokens, units), x_BTM)
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, x_BTM.device)
    return call(
        op, backend, x_BTM=x_BTM, decay_M=decay_M, weight_MM=weight_MM, relu_units=relu_units, target_BTM=target_BTM,
        strength_BTM=strength_BTM, initial_state=check.state(op, initial_state, {"z": (rows, units)}, x_BTM.device),
        return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def slstm(
    x_BTHGK: Tensor,
    weight_HKGK: Tensor,
    *,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""The sLSTM cell: exponential input gate, normaliser, and gates that read the last output of their head.

        (i, f, z, o)_t = x_t + R h_{t-1}
        m_t = max(log sigmoid(f_t) + m_{t-1}, i_t),   i' = exp(i_t - m_t),   f' = exp(log sigmoid(f_t) + m_{t-1} - m_t)
        C_t = f' C_{t-1} + i' tanh(z_t),   n_t = f' n_{t-1} + i',   h_t = sigmoid(o_t) C_t / n_t

    h does not depend on the maximum m, which only keeps C and n in range; the true values are e^m C and e^m n.

    Args:
        x_BTHGK: [B, T, H, 4, K], the gates without their recurrent part, in the order i, f, z, o.
        weight_HKGK: R [H, K, 4, K]: (gate g, channel l) of head h receives sum_k h[k] R[h, k, g, l].
        initial_state: (h, C, n, m), [N, H, K] each; zero if None. Where n = 0 nothing was seen, and m does not count.
        cu_seqlens: [N+1] token offsets of packed segments (B = 1).

    Returns:
        (h [B, T, H, K] in the dtype of x, state): (h, C, n, m) in at least fp32, None unless `return_state`.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: Beck et al. 2024, xLSTM (arXiv 2405.04517).
    """
    op = "slstm"
    _operand(op, "x_BTHGK", x_BTHGK, "[B, T, H, 4, K]", (-1, -1, -1, GATES, -1))
    batch, tokens, heads, _, size = x_BTHGK.shape
    if tokens < 1:
        check.refuse(op, "x_BTHGK", "of at least one token", check.describe(x_BTHGK))
    _operand(op, "weight_HKGK", weight_HKGK, "[H, K, 4, K]", (heads, size, GATES, size), x_BTHGK)
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, x_BTHGK.device)
    shapes = dict.fromkeys(("h", "C", "n", "m"), (rows, heads, size))
    return call(
        op, backend, x_BTHGK=x_BTHGK, weight_HKGK=weight_HKGK,
        initial_state=check.state(op, initial_state, shapes, x_BTHGK.device), return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
