"""Reference block means: block after block."""

from __future__ import annotations

import torch

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, segments


@implements("block_mean", "reference")
def block_mean(x_BTD, width, cu_seqlens):
    x, batch, tokens = x_BTD.to(accumulate_dtype(x_BTD)), x_BTD.shape[0], x_BTD.shape[1]
    rows = [[] for _ in range(batch)]
    for b, start, end in segments(cu_seqlens, batch, tokens):
        for first in range(start, end, width):
            block = x[b, first : min(first + width, end)]
            rows[b].append((block.sum(0) / width).expand_as(block))
    return torch.stack([torch.cat(row) for row in rows]).to(x_BTD.dtype)
