"""Torch block means: one reshape; in packed segments one sum by block index."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype


@implements("block_mean", "torch")
def block_mean(x_BTD, width, cu_seqlens):
    x, tokens = x_BTD.to(accumulate_dtype(x_BTD)), x_BTD.shape[1]
    if cu_seqlens is None:
        blocks = F.pad(x, (0, 0, 0, -tokens % width)).unflatten(1, (-1, width))
        y = blocks.sum(2, keepdim=True).div(width).expand(-1, -1, width, -1).flatten(1, 2)[:, :tokens]
        return y.to(x_BTD.dtype)
    t, starts = torch.arange(tokens, device=x.device), cu_seqlens.to(torch.int64)
    start = starts[torch.searchsorted(starts[1:].contiguous(), t, right=True).clamp_max(starts.numel() - 2)]
    block = ((t - start) % width == 0).cumsum(0) - 1
    sums = x.new_zeros(tokens, x.shape[2]).index_add(0, block, x[0])
    return sums.div(width)[block][None].to(x_BTD.dtype)
