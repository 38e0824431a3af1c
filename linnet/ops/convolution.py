"""Convolution over time with a kernel as long as the sequence: the operator of the time-invariant mixers.

Shape legend: B batch, T tokens, D channels, G groups of channels with one kernel each, L lags, N rows of the state (the batch,
or the packed segments).
"""

from __future__ import annotations

from torch import Tensor

from linnet.ops import _checks as check
from linnet.ops._dispatch import call
from linnet.ops.elementwise import State, _real, _sequence

METHODS = ("auto", "fft", "direct")


def long_conv(
    u_BTD: Tensor,
    kernel_DL: Tensor,
    skip_D: Tensor | None = None,
    *,
    lookahead: int = 0,
    method: str = "auto",
    initial_state: State | Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""Depthwise convolution over time with a kernel of any length, also longer than the sequence.

        y_t[d] = sum_{j<L} kernel[d, j] u_{t + lookahead - j}[d] + skip[d] u_t[d]        u = 0 outside the sequence

    Args:
        u_BTD: [B, T, D], real.
        kernel_DL: [D, L], real, or [G, L] with G dividing D: channel d uses kernel d // (D / G). Column j is lag j - lookahead.
        skip_D: [D] or None.
        lookahead: F, future tokens that are seen, 0 <= F < L. 0 is causal; a two-sided kernel of lags -F .. F has L = 2F + 1.
        method: how the `torch` backend sums. "fft": blocks of Fourier transforms, O(T log L), causal up to rounding only (a
            token moves earlier outputs of its block by about 1e-7 of the largest value in fp32, 1e-16 in fp64; a NaN or inf
            spreads over its block). "direct": shifted products, O(T L), causal bit for bit. "auto": direct where at most 64
            lags matter or T = 1, else fft.
        initial_state: (c [N, D, L-1],), the last L - 1 inputs, oldest first; zero if None. Causal convolutions only.
        cu_seqlens: [N+1] token offsets of packed segments (B = 1); no segment sees another.

    Returns:
        (y [B, T, D] in the dtype of u, state): (c [N, D, L-1],) in at least fp32, None unless `return_state`. Sums are in at
        least fp32.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: Gu et al. 2021, Linear State-Space Layers (arXiv 2110.13985) and every convolutional state-space model since.
    """
    op = "long_conv"
    batch, tokens = _sequence(op, "u_BTD", u_BTD, "[B, T, D]", 3)
    width = u_BTD.shape[2]
    check.tensor(op, "kernel_DL", kernel_DL, "[D, L] or [G, L]", 2, u_BTD)
    groups, lags = kernel_DL.shape
    if groups < 1 or width % groups:
        check.refuse(op, "kernel_DL", f"of a number of kernels that divides the {width} channels", f"{groups} kernels")
    if lags < 1:
        check.refuse(op, "kernel_DL", "of at least one lag", check.describe(kernel_DL))
    if skip_D is not None:
        check.tensor(op, "skip_D", skip_D, "[D]", 1, u_BTD)
        check.sizes(op, "skip_D", skip_D, {0: ("channels", width)})
    _real(op, u_BTD=u_BTD, kernel_DL=kernel_DL, skip_D=skip_D)
    if not isinstance(lookahead, int) or isinstance(lookahead, bool) or not 0 <= lookahead < lags:
        check.refuse(op, "lookahead", f"an integer in 0 .. {lags - 1}, fewer than the lags of the kernel", repr(lookahead))
    check.choice(op, "method", method, METHODS)
    if lookahead and return_state:
        check.refuse(op, "return_state", "False where lookahead > 0: a state exists only for a causal convolution", "True")
    if lookahead and initial_state is not None:
        check.refuse(op, "initial_state", "None where lookahead > 0: a state exists only for a causal convolution", "a state")
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, u_BTD.device)
    initial_state = check.state(op, initial_state, {"c": (rows, width, lags - 1)}, u_BTD.device)
    return call(
        op, backend, u_BTD=u_BTD, kernel_DL=kernel_DL, skip_D=skip_D, lookahead=lookahead, method=method,
        initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
