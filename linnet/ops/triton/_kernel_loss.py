"""Softmax cross-entropy and its gradient, which replaces the logits.

Grid: one program per row. It reads its row twice, first for the running maximum and sum of exponentials, then (from the L2 cache,
where the rows in flight fit) to write softmax - onehot over it: 4 bytes a logit of device memory in bf16, no logit in fp32 there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linnet.ops.triton import _scan_table as table
from linnet.ops.triton._plan import next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def loss_kernel(
    logits, target, loss, s_row, V: tl.constexpr, BV: tl.constexpr, IGNORE: tl.constexpr, GRADIENT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(target + row).to(tl.int32)
    v = tl.arange(0, BV)
    p = logits + row * s_row
    valid = own != IGNORE
    if valid:
        chosen = tl.load(p + own).to(tl.float32)  # before the sums below, whose barriers keep faster warps from overwriting it
        top = -float("inf")
        total = 0.0
        for i in tl.range(0, V, BV, num_stages=STAGES):
            x = tl.load(p + i + v, mask=i + v < V, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, 0))
            safe = tl.where(higher == -float("inf"), 0.0, higher)  # a block of -inf adds nothing
            total = total * tl.exp2((top - safe) * LOG2E) + tl.sum(tl.exp2((x - safe) * LOG2E), 0)
            top = higher
        lse = top + tl.log(total)
        tl.store(loss + row, lse - chosen)
        if GRADIENT:
            for i in tl.range(0, V, BV, num_stages=STAGES):
                x = tl.load(p + i + v, mask=i + v < V, other=-float("inf")).to(tl.float32)
                g = tl.exp2((x - lse) * LOG2E) - tl.where(i + v == own, 1.0, 0.0)
                tl.store(p + i + v, g.to(p.dtype.element_ty), mask=i + v < V)
    else:
        tl.store(loss + row, 0.0)
        if GRADIENT:
            for i in range(0, V, BV):
                tl.store(p + i + v, tl.zeros([BV], p.dtype.element_ty), mask=i + v < V)


def cross_entropy_(logits: Tensor, target: Tensor, ignore: int, gradient: bool) -> Tensor:
    """Losses [C] in fp32; with `gradient` the logits [C, V] become their gradient."""
    C, V = logits.shape
    tile = table.choose("softmax_cross_entropy", logits)
    loss = torch.empty(C, dtype=torch.float32, device=logits.device)
    BV = min(tile.U, next_power_of_2(V))
    flags = dict(V=V, BV=BV, IGNORE=ignore, GRADIENT=gradient, STAGES=tile.stages, num_warps=tile.warps)
    loss_kernel[(C,)](logits, target, loss, logits.stride(0), **flags)
    return loss
