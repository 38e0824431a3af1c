"""Means over aligned blocks of time: the smooth part of a Haar wavelet transform."""

from __future__ import annotations

from torch import Tensor

from linnet.ops import _checks as check
from linnet.ops._dispatch import call
from linnet.ops.elementwise import _sequence


def block_mean(x_BTD: Tensor, width: int, *, cu_seqlens: Tensor | None = None, backend: str | None = None) -> Tensor:
    r"""For every token the mean over its block of `width` tokens, aligned to the start of its row or segment.

        y_t = (1 / width) sum_{s in block(t)} x_s,      block(t) = t // width;  the last block is filled with zeros

    With width = 2^l this is the approximation of level l of the Haar transform of the zero-padded sequence, spread over its tokens.
    Not causal: a token sees the rest of its block.

    Args:
        x_BTD: [B, T, D]. width: >= 1. cu_seqlens: [N+1] token offsets of packed segments (B = 1).

    Returns:
        y [B, T, D] in the dtype of x; sums are in at least fp32.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: Mallat 1989, A Theory for Multiresolution Signal Decomposition.
    """
    op = "block_mean"
    batch, tokens = _sequence(op, "x_BTD", x_BTD, "[B, T, D]", 3)
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        check.refuse(op, "width", "an integer >= 1", repr(width))
    check.cu_seqlens(op, cu_seqlens, batch, tokens, x_BTD.device)
    return call(op, backend, x_BTD=x_BTD, width=width, cu_seqlens=cu_seqlens)
