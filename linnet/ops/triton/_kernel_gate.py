"""The gated linear unit y = x act(g) in one pass each way: nothing but x and g is kept, dx = dy act(g), dg = dy x act'(g).

bf16: forward 6 bytes a value, backward 10; act(g) and its product with x would be 10 and 18, and one more tensor kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linnet.ops.triton._kernel_norm import activation, rows_of
from linnet.ops.triton._plan import cdiv

BLOCK, WARPS = 2048, 4  # values a program: one fetch of 16 bytes a thread in bf16, of which two are under way


@triton.jit
def _at(i, D, stride, PACKED: tl.constexpr):
    """Where value i of rows of D values is, rows `stride` apart."""
    return i if PACKED else i // D * stride + i % D


@triton.jit
def forward_kernel(
    x, gate, y, count, D, s_x, s_gate, BLOCK: tl.constexpr, SILU: tl.constexpr, P_X: tl.constexpr, P_G: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    a, _ = activation(tl.load(gate + _at(i, D, s_gate, P_G), mask=mask, other=0.0).to(tl.float32), SILU)
    v = tl.load(x + _at(i, D, s_x, P_X), mask=mask, other=0.0).to(tl.float32) * a
    tl.store(y + i, v.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dy, x, gate, dx, dgate, count, D, s_dy, s_x, s_gate, BLOCK: tl.constexpr, SILU: tl.constexpr, P_DY: tl.constexpr,
    P_X: tl.constexpr, P_G: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    a, slope = activation(tl.load(gate + _at(i, D, s_gate, P_G), mask=mask, other=0.0).to(tl.float32), SILU)
    u = tl.load(dy + _at(i, D, s_dy, P_DY), mask=mask, other=0.0).to(tl.float32)
    v = tl.load(x + _at(i, D, s_x, P_X), mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + i, (u * a).to(dx.dtype.element_ty), mask=mask)
    tl.store(dgate + i, (u * v * slope).to(dgate.dtype.element_ty), mask=mask)


# ---- launches ------------------------------------------------------------------------------------------------------------


def _packed(x: Tensor) -> tuple[Tensor, int, bool]:
    """x [..., D] in equally spaced rows, their distance, and whether they touch."""
    x, stride = rows_of(x, 1)
    return x, stride, stride == x.shape[-1]


def forward(x: Tensor, gate: Tensor, silu: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (x, s_x, p_x), (gate, s_g, p_g) = _packed(x), _packed(gate)
    forward_kernel[(cdiv(y.numel(), BLOCK),)](
        x, gate, y, y.numel(), y.shape[-1], s_x, s_g, BLOCK=BLOCK, SILU=silu, P_X=p_x, P_G=p_g, num_warps=WARPS
    )
    return y


def backward(dy: Tensor, x: Tensor, gate: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    dx, dgate = (torch.empty(x.shape, dtype=p.dtype, device=x.device) for p in (x, gate))
    (dy, s_dy, p_dy), (x, s_x, p_x), (gate, s_g, p_g) = _packed(dy), _packed(x), _packed(gate)
    backward_kernel[(cdiv(dx.numel(), BLOCK),)](
        dy, x, gate, dx, dgate, dx.numel(), dx.shape[-1], s_dy, s_x, s_g, BLOCK=BLOCK, SILU=silu, P_DY=p_dy, P_X=p_x, P_G=p_g,
        num_warps=WARPS,
    )  # fmt: skip
    return dx, dgate
