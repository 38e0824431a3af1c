"""RMSNorm with its gate, and the L2 norm: y = act(gate) weight v r with r = (sum v^2 / size + eps)^-1/2, in one pass each way.

Grid: (programs, groups). A program takes tiles of BR rows in fp32 registers, whole rows, so that the backward computes r again
instead of reading it. Its sum for the weight's gradient stays in registers over all its tiles; the parts are added afterwards, in
fixed order. bf16, gated: forward reads x, gate and writes y, 6 bytes a value; backward reads dy, x, gate and writes dx, dgate, 10.

    v = x (norm first) or x act(gate);  u = dy weight [act(gate)],  dv = r (u - n mean(u n)) with n = v r
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linnet.ops.triton import _scan_table as table
from linnet.ops.triton._plan import cdiv, facts, next_power_of_2


@triton.jit
def _tile(p, at, mask, MASK: tl.constexpr):
    if MASK:
        x = tl.load(p + at, mask=mask, other=0.0)
    else:
        x = tl.load(p + at)
    return x.to(tl.float32)


@triton.jit
def _put(p, at, x, mask, MASK: tl.constexpr):
    if MASK:
        tl.store(p + at, x.to(p.dtype.element_ty), mask=mask)
    else:
        tl.store(p + at, x.to(p.dtype.element_ty))


@triton.jit
def _at(i, w, rows, BR: tl.constexpr, heads: tl.constexpr, stride: tl.constexpr, size: tl.constexpr):
    """Offsets of tile i: row r is head r % heads of token r // heads; tokens are `stride` apart, heads `size`."""
    r = i * BR + tl.arange(0, BR)
    return ((r // heads).to(tl.int64) * stride + (r % heads) * size)[:, None] + w[None, :]


@triton.jit
def activation(z, SILU: tl.constexpr):
    """act(z) and its slope."""
    s = tl.sigmoid(z)
    if SILU:
        a = z * s
        slope = s * (1.0 + z * (1.0 - s))
    else:
        a = s
        slope = s * (1.0 - s)
    return a, slope


@triton.jit
def forward_kernel(
    x, gate, weight, y, rows, eps, heads: tl.constexpr, s_x: tl.constexpr, s_gate: tl.constexpr, size: tl.constexpr,
    W: tl.constexpr, DEN: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr,
    FIRST: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    c = tl.arange(0, BW)
    w = tl.program_id(1) * W + c
    mask = (i * BR + tl.arange(0, BR) < rows)[:, None] & (c < W)[None, :]
    v = _tile(x, _at(i, w, rows, BR, heads, s_x, size), mask, MASK)
    if GATED:
        a, _ = activation(_tile(gate, _at(i, w, rows, BR, heads, s_gate, size), mask, MASK), SILU)
        if not FIRST:
            v *= a
    n = v * tl.rsqrt(tl.sum(v * v, 1) / DEN + eps)[:, None]
    if WEIGHT:
        n *= tl.load(weight + w, mask=c < W, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if FIRST:
            n *= a
    _put(y, _at(i, w, rows, BR, heads, heads * size, size), n, mask, MASK)


@triton.jit
def backward_kernel(
    dy, x, gate, weight, dx, dgate, dweight, rows, tiles, eps, heads: tl.constexpr, s_dy: tl.constexpr, s_x: tl.constexpr,
    s_gate: tl.constexpr, size: tl.constexpr, W: tl.constexpr, DEN: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
    GATED: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr, WEIGHT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BW)
    w = tl.program_id(1) * W + c
    if WEIGHT:
        factor = tl.load(weight + w, mask=c < W, other=0.0).to(tl.float32)
        total = tl.zeros([BR, BW], tl.float32)
    for i in range(tl.program_id(0), tiles, tl.num_programs(0)):
        mask = (i * BR + tl.arange(0, BR) < rows)[:, None] & (c < W)[None, :]
        xt = _tile(x, _at(i, w, rows, BR, heads, s_x, size), mask, MASK)
        u = _tile(dy, _at(i, w, rows, BR, heads, s_dy, size), mask, MASK)
        v = xt
        if GATED:
            a, slope = activation(_tile(gate, _at(i, w, rows, BR, heads, s_gate, size), mask, MASK), SILU)
            if FIRST:
                dact = u
                u *= a
            else:
                v = xt * a
        r = tl.rsqrt(tl.sum(v * v, 1) / DEN + eps)[:, None]
        n = v * r
        if WEIGHT:
            total += u * n
            u *= factor[None, :]
        dv = r * (u - n * (tl.sum(u * n, 1) / DEN)[:, None])
        own = _at(i, w, rows, BR, heads, heads * size, size)
        if GATED:
            if FIRST:
                dact *= n
                if WEIGHT:
                    dact *= factor[None, :]
            else:
                dact = dv * xt
                dv *= a
            _put(dgate, own, dact * slope, mask, MASK)
        _put(dx, own, dv, mask, MASK)
    if WEIGHT:
        tl.store(dweight + tl.program_id(0) * size + w, tl.sum(total, 0), mask=c < W)


# ---- launches ------------------------------------------------------------------------------------------------------------


def rows_of(x: Tensor, heads: int) -> tuple[Tensor, int]:
    """x [..., heads, size] with packed heads and equally spaced tokens, a copy if it is not so, and the distance of tokens."""
    size = x.shape[-1]
    flat = x.flatten(-2) if heads > 1 and x.stride(-1) == 1 and x.stride(-2) == size else x.contiguous().view(*x.shape[:-2], -1)
    if heads == 1:
        flat = x
    outer = [(n, s) for n, s in zip(flat.shape[:-1], flat.stride()[:-1], strict=True) if n > 1]
    spaced = all(s == n * t for (_, s), (n, t) in zip(outer, outer[1:], strict=False))
    if not spaced or (flat.shape[-1] > 1 and flat.stride(-1) != 1):
        flat = flat.contiguous()
        return flat, flat.shape[-1]
    return flat, outer[-1][1] if outer else flat.shape[-1]


def _plan(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, silu: bool, first: bool, groups: int, mean: bool):
    size, tile = x.shape[-1], table.choose("norm", x)
    W, heads = size // groups, x.shape[-2] if x.ndim >= 3 else 1
    rows, BW = x.numel() // size, next_power_of_2(W)
    BR = max(1, tile.U * 128 // BW)
    warps = min(max(tile.warps, BW // 512), 16)
    flags = dict(
        heads=heads, size=size, W=W, DEN=W if mean else 1, BR=BR, BW=BW, GATED=gate is not None, SILU=silu, FIRST=first,
        WEIGHT=weight is not None, MASK=rows % BR != 0 or BW != W, num_warps=warps,
    )  # fmt: skip
    return rows, cdiv(rows, BR), heads, flags


def forward(x, gate, weight, eps: float, silu: bool, first: bool, groups: int, mean: bool) -> Tensor:
    rows, tiles, heads, flags = _plan(x, gate, weight, eps, silu, first, groups, mean)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, s_x = rows_of(x, heads)
    gate, s_gate = (None, 0) if gate is None else rows_of(gate, heads)
    forward_kernel[(tiles, groups)](x, gate, weight, y, rows, eps, s_x=s_x, s_gate=s_gate, **flags)
    return y


def backward(dy, x, gate, weight, eps: float, silu: bool, first: bool, groups: int, mean: bool):
    """Gradients of x, gate and weight; None for what is not there."""
    rows, tiles, heads, flags = _plan(x, gate, weight, eps, silu, first, groups, mean)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    programs = min(tiles, max(1, 8 * facts(x)[1] // groups))
    dweight = None if weight is None else torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
    (x, s_x), (dy, s_dy) = rows_of(x, heads), rows_of(dy, heads)
    gate, s_gate = (None, 0) if gate is None else rows_of(gate, heads)
    backward_kernel[(programs, groups)](
        dy, x, gate, weight, dx, dgate, dweight, rows, tiles, eps, s_dy=s_dy, s_x=s_x, s_gate=s_gate, **flags
    )
    return dx, dgate, None if weight is None else dweight.sum(0).to(weight.dtype)
