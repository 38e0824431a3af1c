"""Causal depthwise convolution over W taps, with bias and SiLU, forward and backward in one pass each.

Grid: one program of one warp per (BD channels, block of L tokens of a row of the state). It walks its tokens, U at a time, and
keeps the last W - 1 inputs (backward: also gradients) in registers, so that every value is read once, besides the W - 1 tokens
around a block. In bf16 forward moves 4 bytes per token and channel, backward 6 (x, dz read, dx written): nothing else costs time.
dtap_j = sum_t dy_t x_{t-j} and dbias are sums of fp32 parts, one per block; no atomics: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linnet.ops.triton import _scan_table as table
from linnet.ops.triton._kernel_common import block_owner
from linnet.ops.triton._plan import cdiv, next_power_of_2
from linnet.ops.triton._support import rows_of


@triton.jit
def _row(p, d, D: tl.constexpr, COL: tl.constexpr, live):
    """A row of channels in fp32, zero where there is no such token."""
    if COL:
        x = tl.load(p + d, mask=(d < D) & live, other=0.0)
    else:
        x = tl.load(p + d, mask=live, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _put(p, x, d, D: tl.constexpr, COL: tl.constexpr, live):
    if COL:
        tl.store(p + d, x.to(p.dtype.element_ty), mask=(d < D) & live)
    else:
        tl.store(p + d, x.to(p.dtype.element_ty), mask=live)


@triton.jit
def _taps(weight, bias, d, D: tl.constexpr, W: tl.constexpr, COL: tl.constexpr, BIAS: tl.constexpr):
    """(tap_{W-1}, .., tap_0), the factors of the oldest to the newest input, and the bias."""
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (_row(weight + w, d * W, D * W, COL, True),)
    if BIAS:
        b = _row(bias, d, D, COL, True)
    else:
        b = tl.zeros_like(taps[0])
    return taps, b


@triton.jit
def _before(
    x, past, n, row0, begin, d, s_x: tl.constexpr, D: tl.constexpr, W: tl.constexpr, COL: tl.constexpr, HAS_IN: tl.constexpr
):
    """The W - 1 inputs before token `begin` of a row: its own, of its state, or zero."""
    window = ()
    for w in tl.static_range(W - 1):
        t = begin - (W - 1) + w
        value = _row(x + (row0 + t) * s_x, d, D, COL, t >= 0)
        if HAS_IN:
            value += _row(past + (n.to(tl.int64) * (W - 1) + (W - 1 + t)) * D, d, D, COL, t < 0)
        window = window + (value,)
    return window


@triton.jit
def _dot(taps, window, start, W: tl.constexpr):
    y = start
    for w in tl.static_range(W):
        y += taps[w] * window[w]
    return y


@triton.jit
def forward_kernel(
    x, weight, bias, past, y, cu, T, N, s_x: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    U: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, HAS_IN: tl.constexpr, COL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    n, first, length, begin = block_owner(cu, tl.program_id(1), T, N, L, PACKED)
    if begin < length:
        row0 = first.to(tl.int64)
        taps, b = _taps(weight, bias, d, D, W, COL, BIAS)
        window = _before(x, past, n, row0, begin, d, s_x, D, W, COL, HAS_IN)
        for j in tl.range(0, tl.cdiv(tl.minimum(length - begin, L), U), num_stages=STAGES):
            t = begin + j * U
            px = x + (row0 + t) * s_x
            py = y + (row0 + t) * D
            for i in tl.static_range(U):
                window = window + (_row(px + i * s_x, d, D, COL, t + i < length),)
                o = _dot(taps, window, b, W)
                if SILU:
                    o *= tl.sigmoid(o)
                _put(py + i * D, o, d, D, COL, t + i < length)
                window = window[1:]


@triton.jit
def _back(
    pz, px, pdx, dpast, window, later, taps, b, sums, sum_b, t, n, begin, length, d, D: tl.constexpr, W: tl.constexpr,
    COL: tl.constexpr, SILU: tl.constexpr, HAS_IN: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Token t: its gradient before the activation, and with it the finished gradient of the input W - 1 tokens before.

    pdx points to that token. OWN: the token belongs to the block, which then owns its share of the taps' gradient.
    """
    window = window + (_row(px, d, D, COL, t < length),)
    g = _row(pz, d, D, COL, t < length)
    if SILU:
        y = _dot(taps, window, b, W)
        s = tl.sigmoid(y)
        g *= s * (1.0 + y * (1.0 - s))
    later = later + (g,)
    if OWN:
        new = ()
        for w in tl.static_range(W):
            new = new + (sums[w] + g * window[w],)
        sums = new
        sum_b += g
    dx = tl.zeros_like(b)
    for w in tl.static_range(W):
        dx += taps[W - 1 - w] * later[w]
    past = t - (W - 1)
    _put(pdx, dx, d, D, COL, (past >= begin) & (past < length))
    if HAS_IN:
        _put(dpast + (n.to(tl.int64) * (W - 1) + t) * D, dx, d, D, COL, past < 0)
    return window[1:], later[1:], sums, sum_b


@triton.jit
def backward_kernel(
    dz, x, weight, bias, past, dx, dweight, dbias, dpast, cu, T, N, s_dz: tl.constexpr, s_x: tl.constexpr, D: tl.constexpr,
    W: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, U: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr,
    SILU: tl.constexpr, HAS_IN: tl.constexpr, COL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    block = tl.program_id(1)
    n, first, length, begin = block_owner(cu, block, T, N, L, PACKED)
    row0 = first.to(tl.int64)
    taps, b = _taps(weight, bias, d, D, W, COL, BIAS)
    later = ()
    for _w in tl.static_range(W - 1):
        later = later + (tl.zeros_like(b),)
    sums = later + (tl.zeros_like(b),)
    sum_b = tl.zeros_like(b)
    if begin < length:
        window = _before(x, past, n, row0, begin, d, s_x, D, W, COL, HAS_IN)
        steps = tl.cdiv(tl.minimum(length - begin, L), U)
        for j in tl.range(0, steps, num_stages=STAGES):
            t = begin + j * U
            row = row0 + t
            for i in tl.static_range(U):
                window, later, sums, sum_b = _back(
                    dz + row * s_dz + i * s_dz, x + row * s_x + i * s_x, dx + (row - (W - 1)) * D + i * D, dpast, window, later,
                    taps, b, sums, sum_b, t + i, n, begin, length, d, D, W, COL, SILU, HAS_IN, True,
                )  # fmt: skip
        after = begin + steps * U
        row = row0 + after
        for i in tl.static_range(W - 1):
            window, later, sums, sum_b = _back(
                dz + row * s_dz + i * s_dz, x + row * s_x + i * s_x, dx + (row - (W - 1)) * D + i * D, dpast, window, later,
                taps, b, sums, sum_b, after + i, n, begin, length, d, D, W, COL, SILU, HAS_IN, False,
            )  # fmt: skip
    for w in tl.static_range(W):
        _put(dweight + (block.to(tl.int64) * W + w) * D, sums[w], d, D, COL, True)
    if BIAS:
        _put(dbias + block.to(tl.int64) * D, sum_b, d, D, COL, True)


# ---- launches ------------------------------------------------------------------------------------------------------------

UNROLLED = 8


def _plan(x: Tensor, weight: Tensor, cu: Tensor | None, bias: Tensor | None, silu: bool, past: Tensor | None):
    """Grid, rows of the state, flags. L holds at least the W - 1 tokens that a block's neighbour may need."""
    (B, T, D), W = x.shape, weight.shape[1]
    t = table.choose("short_conv", x)
    BD = min(t.BD, max(32, next_power_of_2(D)))
    N = B if cu is None else cu.shape[0] - 1
    blocks = T // t.U + N if cu is not None else N * cdiv(T, t.U)
    flags = dict(
        D=D, W=W, BD=BD, L=t.U, U=UNROLLED, STAGES=t.stages, BIAS=bias is not None, SILU=silu, HAS_IN=past is not None,
        COL=D % BD != 0, PACKED=cu is not None, num_warps=t.warps,
    )  # fmt: skip
    return (cdiv(D, BD), blocks), N, flags


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu: Tensor | None, silu: bool) -> Tensor:
    """y [B, T, D] in the dtype of x; past [N, W-1, D], oldest first."""
    grid, N, flags = _plan(x, weight, cu, bias, silu, past)
    x = rows_of(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    forward_kernel[grid](x, weight, bias, past, y, cu, x.shape[1], N, s_x=x.stride(1), **flags)
    return y


def backward(dz: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu: Tensor | None, silu: bool):
    """Gradients of x, weight, bias and past; None for what is not there."""
    grid, N, flags = _plan(x, weight, cu, bias, silu, past)
    x, dz, W = rows_of(x), rows_of(dz), weight.shape[1]
    fp32 = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = fp32(grid[1], W, x.shape[2]), None if bias is None else fp32(grid[1], x.shape[2])
    dpast = None if past is None else torch.zeros(past.shape, dtype=torch.float32, device=x.device)  # an empty row writes nothing
    backward_kernel[grid](
        dz, x, weight, bias, past, dx, dweight, dbias, dpast, cu, x.shape[1], N, s_dz=dz.stride(1), s_x=x.stride(1), **flags
    )
    dbias = None if bias is None else dbias.sum(0).to(bias.dtype)
    return dx, dweight.sum(0).mT.contiguous().to(weight.dtype), dbias, dpast
