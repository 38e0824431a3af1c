"""Small shape helpers shared by the backends."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of states and sums: at least fp32, complex if an operand is."""
    dtype = torch.float32
    for x in tensors:
        if x is not None:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def expand_heads(x: Tensor, heads: int, axis: int = 2) -> Tensor:
    """Head h of the result is head h // (heads / H_x) of x."""
    return x if x.shape[axis] == heads else x.repeat_interleave(heads // x.shape[axis], dim=axis)


def decay_per_token(g: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """A constant log-decay [H] | [H, K] as a view [B, T, H] | [B, T, H, K]; others unchanged."""
    return g.expand(batch, tokens, *g.shape) if g is not None and g.ndim <= 2 else g


def segments(cu_seqlens: Tensor | None, batch: int, tokens: int) -> list[tuple[int, int, int]]:
    """Rows of the state as (batch row, first token, end). Reads cu_seqlens on the host."""
    if cu_seqlens is None:
        return [(row, 0, tokens) for row in range(batch)]
    offsets = cu_seqlens.tolist()
    return [(0, start, end) for start, end in zip(offsets, offsets[1:], strict=False)]
