"""The diagonal scan h_t = a_t h_{t-1} + x_t and its backward, one launch each (two where time is split).

Grid: one program of one warp per (BD channels, row of the state and split of its time). It walks its tokens, U at a time, with the
state in fp32 registers; the rows of the next tokens are on their way through a ring of STAGES buffers in shared memory, because the
chain of products is short (4 cycles a token) and only bytes in flight matter. Device memory: forward reads a, x and writes h;
backward reads dh, a, h and writes dx, da. Where rows and channels are too few to fill the processors, `ends` first advances every
split from zero and the sweep starts from the composed maps (h -> total h + end) of the splits before it: one more pass over a, x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linnet.ops.triton import _scan_table as table
from linnet.ops.triton._kernel_common import split_range
from linnet.ops.triton._plan import cdiv
from linnet.ops.triton._support import rows_of

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(p, f, F, COL: tl.constexpr):
    """A row of BD channels in fp32."""
    if COL:
        x = tl.load(p + f, mask=f < F, other=0.0)
    else:
        x = tl.load(p + f)
    return x.to(tl.float32)


@triton.jit
def _store(p, x, f, F, COL: tl.constexpr):
    if COL:
        tl.store(p + f, x.to(p.dtype.element_ty), mask=f < F)
    else:
        tl.store(p + f, x.to(p.dtype.element_ty))


@triton.jit
def _factor(p, f, F, LOG: tl.constexpr, COL: tl.constexpr):
    a = _load(p, f, F, COL)
    if LOG:
        a = tl.exp2(a * LOG2E)
    return a


@triton.jit
def _start(a, x, f, row, n, sb, sa: tl.constexpr, sx: tl.constexpr, TIME: tl.constexpr):
    """Pointers to the factors and inputs of token `row`."""
    return a + (row * sa if TIME else n.to(tl.int64) * sb), x + row * sx


@triton.jit
def ends_kernel(
    a, x, total, end, cu, T, sb, NS, sa: tl.constexpr, sx: tl.constexpr, F: tl.constexpr,
    BD: tl.constexpr, U: tl.constexpr, STAGES: tl.constexpr, REV: tl.constexpr, LOG: tl.constexpr, TIME: tl.constexpr,
    COL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What every split does to the state (REV: to the gradient that leaves it): state_out = total state_in + end."""
    f = tl.program_id(0) * BD + tl.arange(0, BD)
    part = tl.program_id(1)
    n = part // NS
    row0, length, _ = split_range(cu, n, part % NS, T, NS, U, PACKED)
    row0 = row0.to(tl.int64)
    h = tl.zeros([BD], tl.float32)
    product = tl.full([BD], 1.0, tl.float32)
    ST: tl.constexpr = -1 if REV else 1
    if REV:
        row0 += length - 1
    for j in tl.range(0, length // U, num_stages=STAGES):
        pa, px = _start(a, x, f, row0 + ST * j * U, n, sb, sa, sx, TIME)
        for i in tl.static_range(U):
            at = _factor(pa + ST * i * sa, f, F, LOG, COL)
            xt = _load(px + ST * i * sx, f, F, COL)
            h = at * (h + xt) if REV else at * h + xt
            product *= at
    for r in range(length // U * U, length):
        pa, px = _start(a, x, f, row0 + ST * r, n, sb, sa, sx, TIME)
        at = _factor(pa, f, F, LOG, COL)
        xt = _load(px, f, F, COL)
        h = at * (h + xt) if REV else at * h + xt
        product *= at
    out = part.to(tl.int64) * F
    _store(total + out, product, f, F, COL)
    _store(end + out, h, f, F, COL)


@triton.jit
def forward_kernel(
    a, x, h0, h, final, total, end, cu, T, sb, NS, sa: tl.constexpr, sx: tl.constexpr, F: tl.constexpr,
    BD: tl.constexpr, U: tl.constexpr, STAGES: tl.constexpr, LOG: tl.constexpr, TIME: tl.constexpr, COL: tl.constexpr,
    PACKED: tl.constexpr, HAS_IN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0) * BD + tl.arange(0, BD)
    part = tl.program_id(1)
    n = part // NS
    sp = part % NS
    row0, length, _ = split_range(cu, n, sp, T, NS, U, PACKED)
    row0 = row0.to(tl.int64)
    if HAS_IN:
        s = _load(h0 + n.to(tl.int64) * F, f, F, COL)
    else:
        s = tl.zeros([BD], tl.float32)
    if SPLIT:
        for k in range(0, sp):
            before = (n * NS + k).to(tl.int64) * F
            s = _load(total + before, f, F, COL) * s + _load(end + before, f, F, COL)
    for j in tl.range(0, length // U, num_stages=STAGES):
        row = row0 + j * U
        pa, px = _start(a, x, f, row, n, sb, sa, sx, TIME)
        ph = h + row * F
        for i in tl.static_range(U):
            s = _factor(pa + i * sa, f, F, LOG, COL) * s + _load(px + i * sx, f, F, COL)
            _store(ph + i * F, s, f, F, COL)
    for r in range(length // U * U, length):
        pa, px = _start(a, x, f, row0 + r, n, sb, sa, sx, TIME)
        s = _factor(pa, f, F, LOG, COL) * s + _load(px, f, F, COL)
        _store(h + (row0 + r) * F, s, f, F, COL)
    if sp == NS - 1:
        _store(final + n.to(tl.int64) * F, s, f, F, COL)


@triton.jit
def _back(
    pd, pa, previous, px, pda, c, sum_a, f, F: tl.constexpr, LOG: tl.constexpr, TIME: tl.constexpr, COL: tl.constexpr
):  # fmt: skip
    """One token: G = dh + c, dx = G, da = G h_{t-1} (times a for a logarithm), and c = a G for the token before."""
    at = _factor(pa, f, F, LOG, COL)
    G = _load(pd, f, F, COL) + c
    _store(px, G, f, F, COL)
    c = at * G
    d = (c if LOG else G) * previous
    if TIME:
        _store(pda, d, f, F, COL)
    else:
        sum_a += d
    return c, sum_a


@triton.jit
def backward_kernel(
    dh, dfinal, a, h, h0, dx, da, dh0, total, end, cu, T, sb, NS, sa: tl.constexpr, sd: tl.constexpr, F: tl.constexpr,
    BD: tl.constexpr, U: tl.constexpr, STAGES: tl.constexpr, LOG: tl.constexpr, TIME: tl.constexpr, COL: tl.constexpr,
    PACKED: tl.constexpr, HAS_IN: tl.constexpr, HAS_END: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0) * BD + tl.arange(0, BD)
    part = tl.program_id(1)
    n = part // NS
    sp = part % NS
    row0, length, begin = split_range(cu, n, sp, T, NS, U, PACKED)
    row0 = row0.to(tl.int64)
    if HAS_END:
        c = _load(dfinal + n.to(tl.int64) * F, f, F, COL)
    else:
        c = tl.zeros([BD], tl.float32)
    if SPLIT:
        for k in range(0, NS - 1 - sp):
            after = (n * NS + NS - 1 - k).to(tl.int64) * F
            c = _load(total + after, f, F, COL) * c + _load(end + after, f, F, COL)
    sum_a = tl.zeros([BD], tl.float32)
    # the first token of a row meets h0, not the token before: it is left out of the unrolled part
    alone = length - tl.maximum(length - 1, 0) // U * U
    for j in tl.range(0, (length - alone) // U, num_stages=STAGES):
        row = row0 + (length - 1 - j * U)
        pa, pd = _start(a, dh, f, row, n, sb, sa, sd, TIME)
        at = row * F
        for i in tl.static_range(U):
            previous = _load(h + at - (i + 1) * F, f, F, COL)
            c, sum_a = _back(
                pd - i * sd, pa - i * sa, previous, dx + at - i * F, da + at - i * F, c, sum_a, f, F, LOG, TIME, COL
            )  # fmt: skip
    for r in range(0, alone):
        row = row0 + (alone - 1 - r)
        pa, pd = _start(a, dh, f, row, n, sb, sa, sd, TIME)
        at = row * F
        previous = tl.zeros([BD], tl.float32)
        if begin + alone - 1 - r > 0:
            previous = _load(h + at - F, f, F, COL)
        elif HAS_IN:
            previous = _load(h0 + n.to(tl.int64) * F, f, F, COL)
        c, sum_a = _back(pd, pa, previous, dx + at, da + at, c, sum_a, f, F, LOG, TIME, COL)
    if not TIME:
        _store(da + part.to(tl.int64) * F, sum_a, f, F, COL)
    if HAS_IN:
        if sp == 0:
            _store(dh0 + n.to(tl.int64) * F, c, f, F, COL)


# ---- launches ------------------------------------------------------------------------------------------------------------


class Plan:
    """Sizes and flags that the launches of one call share. x [B, T, F]; a [B|1, T|1, F]."""

    def __init__(self, x: Tensor, a: Tensor, log: bool, cu: Tensor | None):
        self.B, self.T, self.F = x.shape
        self.N = self.B if cu is None else cu.shape[0] - 1
        self.tile = table.choose("scan", x)
        self.time = a.shape[1] > 1 or self.T == 1
        a = a.expand(self.B, -1, -1) if self.time else a
        self.a = rows_of(a) if self.time else a.contiguous()
        BD = self.tile.BD
        self.programs = cdiv(self.F, BD) * self.N
        self.splits = table.splits(self.programs, self.T, self.tile.U, x)
        self.grid = (cdiv(self.F, BD), self.N * self.splits)
        self.cu = cu
        self.sb = self.F if a.shape[0] > 1 else 0
        self.sa = self.a.stride(1) if self.time else 0
        self.flags = dict(
            BD=BD, U=self.tile.U, STAGES=self.tile.stages, LOG=log, TIME=self.time, COL=self.F % BD != 0, PACKED=cu is not None,
            F=self.F, sa=self.sa, num_warps=self.tile.warps,
        )  # fmt: skip

    def ends(self, x: Tensor, reverse: bool) -> tuple[Tensor | None, Tensor | None]:
        if self.splits == 1:
            return None, None
        total, end = torch.empty(2, self.N * self.splits, self.F, dtype=torch.float32, device=x.device)
        ends_kernel[self.grid](
            self.a, x, total, end, self.cu, self.T, self.sb, self.splits, sx=x.stride(1), REV=reverse, **self.flags
        )
        return total, end


def forward(x: Tensor, a: Tensor, log: bool, h0: Tensor | None, cu: Tensor | None) -> tuple[Tensor, Tensor]:
    """h [B, T, F] in the dtype of x and the final state [N, F] in fp32."""
    plan, x = Plan(x, a, log, cu), rows_of(x)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty(plan.N, plan.F, dtype=torch.float32, device=x.device)
    total, end = plan.ends(x, False)
    forward_kernel[plan.grid](
        plan.a, x, h0, h, final, total, end, cu, plan.T, plan.sb, plan.splits, sx=x.stride(1),
        HAS_IN=h0 is not None, SPLIT=plan.splits > 1, **plan.flags,
    )  # fmt: skip
    return h, final


def backward(
    dh: Tensor, dfinal: Tensor | None, h: Tensor, a: Tensor, log: bool, h0: Tensor | None, cu: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx [B, T, F] in the dtype of h, da of the shape of a, dh0 [N, F] in fp32 (None without h0)."""
    plan, dh = Plan(h, a, log, cu), rows_of(dh)
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    own = a.shape == h.shape  # every value of a has one gradient: no sum follows
    shape = h.shape if plan.time else (plan.N, plan.splits, plan.F)
    da = torch.empty(shape, dtype=a.dtype if own and plan.time else torch.float32, device=h.device)
    dh0 = None if h0 is None else torch.empty(plan.N, plan.F, dtype=torch.float32, device=h.device)
    total, end = plan.ends(dh, True)
    backward_kernel[plan.grid](
        dh, dfinal, plan.a, h, h0, dx, da, dh0, total, end, cu, plan.T, plan.sb, plan.splits, sd=dh.stride(1),
        HAS_IN=h0 is not None, HAS_END=dfinal is not None, SPLIT=plan.splits > 1, **plan.flags,
    )  # fmt: skip
    if not plan.time:
        da = da.sum(1, keepdim=True)
        da = da if a.shape[0] > 1 else da.sum(0, keepdim=True)
    return dx, da.sum_to_size(a.shape).to(a.dtype), dh0
