"""The selective scan (S6), forward and backward, with skip, gate and grouped B, C in the same pass.

Grid: one program of one warp per (BD channels of one group, row of the state and split of its time). The state [N, BD] lies in fp32
registers as N BD / 32 values a thread, BD channels fastest, so that sums over N and over BD both stay mostly within a thread.
Nothing of size T x N x D reaches device memory but, for the backward, the state before every L-th token (16 bit beside 16-bit
operands): the backward walks the chunks of L tokens in reverse, recomputes the states of one into registers and takes it apart.

Per token and channel: N exponentials forward, 2 N backward (they bound both: 16 a clock and processor), bytes in bf16: x, delta, z
read and y written, 8, backward x, delta, z, dy read, dx, ddelta, dz written, 14, and 4 N / L each way for the kept states.
dB and dC are sums over channels: a program writes its part [T, N], a sum over the parts follows. No atomics: deterministic.

With G_t the gradient of h_t, c_t = a_{t+1} G_{t+1}:  G_t = dy_t C_t + c_t,  dC_t = h_t dy_t,  dB_t = G_t u_t,  du_t = B_t G_t,
w_t = G_t a_t h_{t-1},  dA = sum_t delta_t w_t,  ddelta_t = sum_n A w_t + x_t du_t.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linnet.ops.triton import _scan_table as table
from linnet.ops.triton._kernel_common import first_block, split_range
from linnet.ops.triton._plan import cdiv, next_power_of_2
from linnet.ops.triton._support import rows_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rows_of_tile(x):
    """The columns of x [D, L] as a tuple of L rows [D]: registers are renamed, nothing moves."""
    D: tl.constexpr = x.shape[0]
    L: tl.constexpr = x.shape[1]
    LEVELS: tl.constexpr = (L > 1) + (L > 2) + (L > 4) + (L > 8)
    parts = (x,)
    for level in tl.static_range(LEVELS):
        even = ()
        odd = ()
        for i in tl.static_range(1 << level):
            if level + 1 < LEVELS:
                p, q = tl.split(tl.reshape(parts[i], [D, L >> (level + 1), 2]))
            else:
                p, q = tl.split(parts[i])
            even = even + (p,)
            odd = odd + (q,)
        parts = even + odd
    return parts


@triton.jit
def tile_of_rows(rows, L: tl.constexpr):
    """The inverse of `rows_of_tile`."""
    D: tl.constexpr = rows[0].shape[0]
    LEVELS: tl.constexpr = (L > 1) + (L > 2) + (L > 4) + (L > 8)
    parts = rows
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(L >> (level + 1)):
            joined = joined + (tl.join(parts[i], parts[i + (L >> (level + 1))]),)
        parts = joined
    return tl.reshape(parts[0], [D, L])


@triton.jit
def _chunk(p, row, t, d, ok, live, stride: tl.constexpr):
    """The tile [channels, L] of an operand from token `row` on in fp32; zero where masked."""
    at = p + row * stride + (t[None, :] * stride + d[:, None])
    return tl.load(at, mask=ok[:, None] & live[None, :], other=0.0).to(tl.float32)


@triton.jit
def _put_chunk(p, x, row, t, d, ok, live, stride: tl.constexpr):
    at = p + row * stride + (t[None, :] * stride + d[:, None])
    tl.store(at, x.to(p.dtype.element_ty), mask=ok[:, None] & live[None, :])


@triton.jit
def _state(p, index, s, d, ok, N: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr):
    """State number `index` [N, BD] of [.., N, D] in fp32."""
    at = p + index.to(tl.int64) * (N * D) + (s[:, None] * D + d[None, :])
    if FULL:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(s < N)[:, None] & ok[None, :], other=0.0)
    return x.to(tl.float32)


@triton.jit
def _put_state(p, x, index, s, d, ok, N: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr):
    at = p + index.to(tl.int64) * (N * D) + (s[:, None] * D + d[None, :])
    if FULL:
        tl.store(at, x.to(p.dtype.element_ty))
    else:
        tl.store(at, x.to(p.dtype.element_ty), mask=(s < N)[:, None] & ok[None, :])


@triton.jit
def _place(W: tl.constexpr, NB: tl.constexpr, BD: tl.constexpr, V: tl.constexpr):
    """Group, channels and which of them exist, of a program; W channels and NB programs a group.

    The second list of channels addresses states: V of them lie in one thread, which fixes how all of the work is laid out.
    """
    g = tl.program_id(0) // NB
    w = tl.program_id(0) % NB * BD + tl.arange(0, BD)
    d = g * W + w
    return g, d, tl.max_contiguous(d, V), w < W


@triton.jit
def ends_kernel(
    delta, p, z, A, R, total, end, cu, T, NS, groups: tl.constexpr, groups_R: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, s_delta: tl.constexpr, s_p: tl.constexpr, s_z: tl.constexpr, s_R: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, V: tl.constexpr, L: tl.constexpr, NB: tl.constexpr, STAGES: tl.constexpr,
    REV: tl.constexpr, GATED: tl.constexpr, FULL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What every split does to the state (p, R = x, B), or in reverse to its gradient (dy, C): state_out = total state_in + end."""
    g, d, dv, ok = _place(W, NB, BD, V)
    s = tl.arange(0, BN)
    t = tl.arange(0, L)
    part = tl.program_id(1)
    row0, length, _ = split_range(cu, part // NS, part % NS, T, NS, L, PACKED)
    A2 = _state(A, part * 0, s, dv, ok, N, D, FULL) * LOG2E
    h = tl.zeros([BN, BD], tl.float32)
    time = tl.zeros([BD, L], tl.float32)
    group = g // (groups // groups_R) * N
    chunks = tl.cdiv(length, L)
    for k in tl.range(0, chunks, num_stages=STAGES):
        j = chunks - 1 - k if REV else k
        row = row0.to(tl.int64) + j * L
        live = t < length - j * L
        dt = _chunk(delta, row, t, d, ok, live, s_delta)
        u = _chunk(p, row, t, d, ok, live, s_p)
        time += dt
        if REV:
            if GATED:
                zt = _chunk(z, row, t, d, ok, live, s_z)
                u *= zt * tl.sigmoid(zt)
        else:
            u *= dt
        dts = rows_of_tile(dt)
        us = rows_of_tile(u)
        rs = rows_of_tile(_chunk(R, row, t, group + s, s < N, live, s_R))
        for i in tl.static_range(L - 1 if REV else 0, -1 if REV else L, -1 if REV else 1):
            a = tl.exp2(dts[i][None, :] * A2)
            new = rs[i][:, None] * us[i][None, :]
            h = a * (h + new) if REV else a * h + new
    total_time = tl.sum(time, 1)
    _put_state(total, tl.exp2(total_time[None, :] * A2), part, s, dv, ok, N, D, FULL)
    _put_state(end, h, part, s, dv, ok, N, D, FULL)


@triton.jit
def forward_kernel(
    delta, x, z, A, B, C, skip, h0, y, final, kept, total, end, cu, T, NS,
    groups: tl.constexpr, groups_B: tl.constexpr, groups_C: tl.constexpr, W: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    s_delta: tl.constexpr, s_x: tl.constexpr, s_z: tl.constexpr, s_B: tl.constexpr, s_C: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, V: tl.constexpr, L: tl.constexpr, NB: tl.constexpr, STAGES: tl.constexpr,
    SKIP: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, HAS_IN: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    g, d, dv, ok = _place(W, NB, BD, V)
    s = tl.arange(0, BN)
    t = tl.arange(0, L)
    part = tl.program_id(1)
    n = part // NS
    sp = part % NS
    row0, length, begin = split_range(cu, n, sp, T, NS, L, PACKED)
    A2 = _state(A, part * 0, s, dv, ok, N, D, FULL) * LOG2E
    if HAS_IN:
        h = _state(h0, n, s, dv, ok, N, D, FULL)
    else:
        h = tl.zeros([BN, BD], tl.float32)
    if SPLIT:
        for k in range(0, sp):
            h = _state(total, n * NS + k, s, dv, ok, N, D, FULL) * h + _state(end, n * NS + k, s, dv, ok, N, D, FULL)
    if SKIP:
        skip_d = tl.load(skip + d, mask=ok, other=0.0).to(tl.float32)
    group_B = g // (groups // groups_B) * N
    group_C = g // (groups // groups_C) * N
    chunk = first_block(cu, n, T, L, PACKED) + begin // L
    for j in tl.range(0, tl.cdiv(length, L), num_stages=STAGES):
        if KEEP:
            _put_state(kept, h, chunk + j, s, dv, ok, N, D, FULL)
        row = row0.to(tl.int64) + j * L
        live = t < length - j * L  # a token past the end has delta = 0 and x = 0: it changes nothing
        dt = _chunk(delta, row, t, d, ok, live, s_delta)
        xt = _chunk(x, row, t, d, ok, live, s_x)
        dts = rows_of_tile(dt)
        us = rows_of_tile(dt * xt)
        bs = rows_of_tile(_chunk(B, row, t, group_B + s, s < N, live, s_B))
        cs = rows_of_tile(_chunk(C, row, t, group_C + s, s < N, live, s_C))
        os = ()
        for i in tl.static_range(L):
            h = tl.exp2(dts[i][None, :] * A2) * h + bs[i][:, None] * us[i][None, :]
            os = os + (tl.sum(cs[i][:, None] * h, 0),)
        o = tile_of_rows(os, L)
        if SKIP:
            o += skip_d[:, None] * xt
        if GATED:
            zt = _chunk(z, row, t, d, ok, live, s_z)
            o *= zt * tl.sigmoid(zt)
        _put_chunk(y, o, row, t, d, ok, live, D)
    if sp == NS - 1:
        _put_state(final, h, n, s, dv, ok, N, D, FULL)


@triton.jit
def backward_kernel(
    dy, dfinal, delta, x, z, A, B, C, skip, kept, ddelta, dx, dz, dA, dB, dC, dskip, dh0, total, end, cu, T, tokens, NS,
    groups: tl.constexpr, groups_B: tl.constexpr, groups_C: tl.constexpr, W: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    s_dy: tl.constexpr, s_delta: tl.constexpr, s_x: tl.constexpr, s_z: tl.constexpr, s_B: tl.constexpr, s_C: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, V: tl.constexpr, L: tl.constexpr, NB: tl.constexpr, STAGES: tl.constexpr,
    SKIP: tl.constexpr, GATED: tl.constexpr, HAS_IN: tl.constexpr, HAS_END: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Parts of dB and dC [programs of a group, tokens, groups, N], of dA and dskip [rows * NS, ..]."""
    g, d, dv, ok = _place(W, NB, BD, V)
    s = tl.arange(0, BN)
    t = tl.arange(0, L)
    part = tl.program_id(1)
    n = part // NS
    sp = part % NS
    row0, length, begin = split_range(cu, n, sp, T, NS, L, PACKED)
    A2 = _state(A, part * 0, s, dv, ok, N, D, FULL) * LOG2E
    if HAS_END:
        carry = _state(dfinal, n, s, dv, ok, N, D, FULL)
    else:
        carry = tl.zeros([BN, BD], tl.float32)
    if SPLIT:
        for k in range(0, NS - 1 - sp):
            after = n * NS + NS - 1 - k
            carry = _state(total, after, s, dv, ok, N, D, FULL) * carry + _state(end, after, s, dv, ok, N, D, FULL)
    if SKIP:
        skip_d = tl.load(skip + d, mask=ok, other=0.0).to(tl.float32)
    sum_A = tl.zeros([BN, BD], tl.float32)
    sum_skip = tl.zeros([BD, L], tl.float32)
    group_B = g // (groups // groups_B) * N
    group_C = g // (groups // groups_C) * N
    chunks = tl.cdiv(length, L)
    chunk = first_block(cu, n, T, L, PACKED) + begin // L
    dB += (tl.program_id(0) % NB).to(tl.int64) * tokens * (groups * N)
    dC += (tl.program_id(0) % NB).to(tl.int64) * tokens * (groups * N)
    for k in tl.range(0, chunks, num_stages=STAGES):
        j = chunks - 1 - k
        row = row0.to(tl.int64) + j * L
        live = t < length - j * L  # a token past the end has delta = 0 and x = dy = 0: it changes nothing
        dt = _chunk(delta, row, t, d, ok, live, s_delta)
        xt = _chunk(x, row, t, d, ok, live, s_x)
        dyt = _chunk(dy, row, t, d, ok, live, s_dy)
        if GATED:
            zt = _chunk(z, row, t, d, ok, live, s_z)
            gate = tl.sigmoid(zt)
            through = dyt * (gate * (1.0 + zt * (1.0 - gate)))
            dyt *= zt * gate
        dts = rows_of_tile(dt)
        us = rows_of_tile(dt * xt)
        dys = rows_of_tile(dyt)
        bs = rows_of_tile(_chunk(B, row, t, group_B + s, s < N, live, s_B))
        cs = rows_of_tile(_chunk(C, row, t, group_C + s, s < N, live, s_C))
        states = (_state(kept, chunk + j, s, dv, ok, N, D, FULL),)
        os = ()
        for i in tl.static_range(L):
            states = states + (tl.exp2(dts[i][None, :] * A2) * states[i] + bs[i][:, None] * us[i][None, :],)
            if GATED:
                os = os + (tl.sum(cs[i][:, None] * states[i + 1], 0),)
        dus = ()
        sums = ()
        dBs = ()
        dCs = ()
        for i in tl.static_range(L - 1, -1, -1):
            G = cs[i][:, None] * dys[i][None, :] + carry
            dCs = (tl.sum(states[i + 1] * dys[i][None, :], 1),) + dCs
            dBs = (tl.sum(G * us[i][None, :], 1),) + dBs
            dus = (tl.sum(bs[i][:, None] * G, 0),) + dus
            carry = tl.exp2(dts[i][None, :] * A2) * G
            w = carry * states[i]
            sum_A += dts[i][None, :] * w
            sums = (tl.sum(A2 * w, 0),) + sums
        du = tile_of_rows(dus, L)
        own = g * N + s
        _put_chunk(dB, tile_of_rows(dBs, L), row, t, own, s < N, live, groups * N)
        _put_chunk(dC, tile_of_rows(dCs, L), row, t, own, s < N, live, groups * N)
        _put_chunk(ddelta, tile_of_rows(sums, L) * LN2 + xt * du, row, t, d, ok, live, D)
        du *= dt
        if SKIP:
            du += skip_d[:, None] * dyt
            sum_skip += xt * dyt
        _put_chunk(dx, du, row, t, d, ok, live, D)
        if GATED:
            o = tile_of_rows(os, L)
            if SKIP:
                o += skip_d[:, None] * xt
            _put_chunk(dz, through * o, row, t, d, ok, live, D)
    _put_state(dA, sum_A, part, s, dv, ok, N, D, FULL)
    if SKIP:
        tl.store(dskip + part.to(tl.int64) * D + d, tl.sum(sum_skip, 1), mask=ok)
    if HAS_IN:
        if sp == 0:
            _put_state(dh0, carry, n, s, dv, ok, N, D, FULL)


# ---- launches ------------------------------------------------------------------------------------------------------------


class Plan:
    """Sizes and flags that the launches of one call share. x, delta, z [B, T, D]; B, C [B, T, groups, N]."""

    def __init__(self, x: Tensor, groups: int, groups_B: int, groups_C: int, N: int, cu: Tensor | None):
        self.B, self.T, self.D = x.shape
        self.rows = self.B if cu is None else cu.shape[0] - 1
        self.groups, self.cu, W = groups, cu, self.D // groups
        tile = table.choose("selective_scan", x)
        BN = next_power_of_2(N)
        BD = min(tile.BD * 16 // max(BN, 16), max(16, next_power_of_2(W)))  # states keep their share of the registers
        self.NB = cdiv(W, BD)
        self.L = tile.U
        self.splits = table.splits(groups * self.NB * self.rows, self.T, tile.U, x, 4)
        self.parts = self.rows * self.splits
        self.grid = (groups * self.NB, self.parts)
        self.chunks = self.T // self.L + self.rows if cu is not None else self.rows * -(-self.T // self.L)
        self.groups_B, self.groups_C = groups_B, groups_C
        self.flags = dict(
            groups=groups, W=W, N=N, D=self.D, BD=BD, BN=BN, V=min(tile.vector, BD), L=self.L, NB=self.NB, STAGES=tile.stages,
            FULL=W % BD == 0 and BN == N, PACKED=cu is not None, num_warps=tile.warps,
        )  # fmt: skip

    def state(self, like: Tensor, count: int | None = None) -> Tensor:
        shape = (self.rows if count is None else count, self.flags["N"], self.D)
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    def ends(self, delta, p, z, A, R, reverse: bool):
        if self.splits == 1:
            return None, None
        total, end = self.state(delta, self.parts), self.state(delta, self.parts)
        ends_kernel[self.grid](
            delta, p, z, A, R, total, end, self.cu, self.T, self.splits, groups_R=R.shape[2], s_delta=delta.stride(1),
            s_p=p.stride(1), s_z=0 if z is None else z.stride(1), s_R=R.stride(1), REV=reverse, GATED=z is not None, **self.flags,
        )  # fmt: skip
        return total, end


def _groups_of(p: Tensor) -> Tensor:
    """p [B, T, groups, N] itself if its tokens are equally spaced rows of packed values, a packed copy otherwise."""
    flat = rows_of(p.flatten(2))
    return flat.unflatten(2, p.shape[2:])


def forward(delta, x, A, B, C, skip, z, h0, cu, groups: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, D], the final state [rows, N, D] and the kept states. A [N, D] and h0 [rows, N, D] have the channels last."""
    plan = Plan(x, groups, B.shape[2], C.shape[2], A.shape[0], cu)
    delta, x, B, C = rows_of(delta), rows_of(x), _groups_of(B), _groups_of(C)
    z = None if z is None else rows_of(z)
    y, final = torch.empty(x.shape, dtype=x.dtype, device=x.device), plan.state(x)
    kept = torch.empty((plan.chunks, *A.shape) if keep else 0, dtype=kept_dtype(x), device=x.device)
    total, end = plan.ends(delta, x, None, A, B, False)
    forward_kernel[plan.grid](
        delta, x, z, A, B, C, skip, h0, y, final, kept, total, end, cu, plan.T, plan.splits,
        groups_B=B.shape[2], groups_C=C.shape[2], s_delta=delta.stride(1), s_x=x.stride(1), s_z=0 if z is None else z.stride(1),
        s_B=B.stride(1), s_C=C.stride(1), SKIP=skip is not None, GATED=z is not None, KEEP=keep, HAS_IN=h0 is not None,
        SPLIT=plan.splits > 1, **plan.flags,
    )  # fmt: skip
    return y, final, kept


def kept_dtype(x: Tensor) -> torch.dtype:
    """A kept state may leave the range of fp16."""
    return torch.float32 if x.dtype == torch.float32 else torch.bfloat16


def backward(dy, dfinal, kept, delta, x, A, B, C, skip, z, h0, cu, groups: int):
    """Gradients of delta, x, A, B, C, skip, z and h0; None for what is not there."""
    plan = Plan(x, groups, B.shape[2], C.shape[2], A.shape[0], cu)
    like = [delta, x, z]
    dy, delta, x, B_, C_ = rows_of(dy), rows_of(delta), rows_of(x), _groups_of(B), _groups_of(C)
    z = None if z is None else rows_of(z)
    ddelta, dx, dz = (None if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in like)
    fp32 = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
    dA, dB, dC = fp32(plan.parts, *A.shape), *(fp32(plan.NB, plan.B, plan.T, groups, A.shape[0]) for _ in range(2))
    dskip = None if skip is None else fp32(plan.parts, plan.D)
    dh0 = None if h0 is None else plan.state(x)
    total, end = plan.ends(delta, dy, z, A, C_, True)
    backward_kernel[plan.grid](
        dy, dfinal, delta, x, z, A, B_, C_, skip, kept, ddelta, dx, dz, dA, dB, dC, dskip, dh0, total, end, cu, plan.T,
        plan.B * plan.T, plan.splits, groups_B=B.shape[2], groups_C=C.shape[2], s_dy=dy.stride(1), s_delta=delta.stride(1),
        s_x=x.stride(1), s_z=0 if z is None else z.stride(1), s_B=B_.stride(1), s_C=C_.stride(1), SKIP=skip is not None,
        GATED=z is not None, HAS_IN=h0 is not None, HAS_END=dfinal is not None, SPLIT=plan.splits > 1, **plan.flags,
    )  # fmt: skip

    def fold(parts: Tensor, p: Tensor) -> Tensor:
        parts = parts.sum(0)
        if p.shape[2] != groups:
            parts = parts.unflatten(2, (p.shape[2], -1)).sum(3)
        return parts.to(p.dtype)

    dskip = None if skip is None else dskip.sum(0).to(skip.dtype)
    return ddelta, dx, dA.sum(0), fold(dB, B), fold(dC, C), dskip, dz, dh0
