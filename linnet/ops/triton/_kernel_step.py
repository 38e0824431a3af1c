"""A few tokens of a matrix-state recurrence (decoding), on states that are updated in place or copied.

    S <- Diag(e^g) S + p v^T                                       LINEAR
    S <- Diag(e^g) S + p (write v - r)^T                           DELTA, e = erase * k
    S <- Diag(e^g) S + b r^T + p v^T                               DPLR,  e = k
    r = e^T S, of the decayed state or (BEFORE) the undecayed one;   o = scale S^T q, after the token or (EXCL) before it

Grid: one program per (tile of V, state head, row). It owns all of K for its columns, so that r, the write and the read need no
other program: the state is read once before anything else and written once, 8 K V bytes per head in fp32 for any number of tokens,
which is all the traffic that matters. Floor = 2 * state bytes / memory bandwidth. State, gates and sums are fp32 in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linnet.ops.triton import _plan
from linnet.ops.triton._plan import cdiv, next_power_of_2

LINEAR, DELTA, DPLR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
KINDS = {"linear": 0, "delta": 1, "dplr": 2}
NONE, SCALAR, CHANNEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
TILE = 4096  # state values a program: 32 registers a thread at four warps
NARROWEST = 32  # bytes of a row of the tile: a sector of memory
PROGRAMS = 4  # programs a processor below which tiles become narrower


@triton.jit
def _vector(p, d, size, MASKED: tl.constexpr):
    """A vector in fp32, zero beyond its size."""
    if MASKED:
        x = tl.load(p + d, mask=d < size, other=0.0)
    else:
        x = tl.load(p + d)
    return x.to(tl.float32)


@triton.jit
def _read(
    S, q, o, t, row, h, kk, vv, scale, q_token, T, HS, rep, rq, K, V, MK: tl.constexpr, MV: tl.constexpr
):  # fmt: skip
    """Token t of every query head of state head h."""
    for i in range(0, rep):
        head = h * rep + i
        q_K = _vector(q + t * q_token + (head // rq) * K, kk, K, MK)
        o_V = tl.sum(S * q_K[:, None], 0) * scale
        tl.store(o + ((row * T + t) * HS * rep + head) * V + vv, o_V.to(o.dtype.element_ty), mask=vv < V)


@triton.jit
def step_kernel(
    q, k, p, v, b, erase, write, g, S_in, S_out, slots, counts, o,
    q_row, k_row, p_row, v_row, b_row, e_row, w_row, g_row, S_row,
    q_token, k_token, p_token, v_token, b_token, e_token, w_token, g_token,
    scale, T, HS, rep, rq, rk, rp, rv, rb, re, rw, rg, K, V, NV,
    BK: tl.constexpr, BV: tl.constexpr, STEPS: tl.constexpr, KIND: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr,
    WRITE: tl.constexpr, SAME: tl.constexpr, BEFORE: tl.constexpr, EXCL: tl.constexpr, HAS_IN: tl.constexpr,
    SLOTS: tl.constexpr, COUNTS: tl.constexpr, UPDATE: tl.constexpr, OUTPUT: tl.constexpr, MK: tl.constexpr, MV: tl.constexpr,
):  # fmt: skip
    """Head h of the state uses head h // r of an operand. Gates: NONE, SCALAR or CHANNEL. SAME: k is p. MK, MV: masks needed."""
    program = tl.program_id(0)
    iv = program % NV
    h = program // NV % HS
    row = (program // NV // HS).to(tl.int64)
    kk = tl.arange(0, BK)
    vv = iv * BV + tl.arange(0, BV)
    slot = row
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    count = T
    if COUNTS:
        count = tl.minimum(tl.maximum(tl.load(counts + row).to(tl.int32), 0), T)
    if slot < 0:
        if OUTPUT:
            for n in range(0, T * rep):
                at = ((row * T + n // rep) * HS * rep + h * rep + n % rep) * V + vv
                tl.store(o + at, tl.zeros([BV], o.dtype.element_ty), mask=vv < V)
    else:
        at = slot * S_row + (h * K + kk[:, None]) * V + vv[None, :]
        mask = (kk < K)[:, None] & (vv < V)[None, :]
        if HAS_IN:
            if MK or MV:
                S = tl.load(S_in + at, mask=mask, other=0.0).to(tl.float32)
            else:
                S = tl.load(S_in + at).to(tl.float32)
        else:
            S = tl.zeros([BK, BV], tl.float32)
        q += row * q_row
        p += row * p_row + (h // rp) * K
        v += row * v_row + (h // rv) * V
        if KIND != LINEAR and not SAME:
            k += row * k_row + (h // rk) * K
        if KIND == DPLR:
            b += row * b_row + (h // rb) * K
        if ERASE != NONE:
            erase += row * e_row + (h // re) * (K if ERASE == CHANNEL else 1)
        if WRITE != NONE:
            write += row * w_row + (h // rw) * (V if WRITE == CHANNEL else 1)
        if DECAY != NONE:
            g += row * g_row + (h // rg) * (K if DECAY == CHANNEL else 1)
        last = count
        if OUTPUT:
            last = T
        for t in range(0, last):
            for j in tl.static_range(STEPS):
                n = t * STEPS + j
                p_K = _vector(p + n * p_token, kk, K, MK)
                u_V = _vector(v + n * v_token, vv, V, MV)
                if WRITE == SCALAR:
                    u_V = u_V * tl.load(write + n * w_token).to(tl.float32)
                elif WRITE == CHANNEL:
                    u_V = u_V * _vector(write + n * w_token, vv, V, MV)
                if KIND != LINEAR:
                    if SAME:
                        e_K = p_K
                    else:
                        e_K = _vector(k + n * k_token, kk, K, MK)
                    if ERASE == SCALAR:
                        e_K = e_K * tl.load(erase + n * e_token).to(tl.float32)
                    elif ERASE == CHANNEL:
                        e_K = e_K * _vector(erase + n * e_token, kk, K, MK)
                if EXCL and OUTPUT and j == 0:
                    _read(S, q, o, t, row, h, kk, vv, scale, q_token, T, HS, rep, rq, K, V, MK, MV)
                if KIND != LINEAR and BEFORE:
                    r_V = tl.sum(S * e_K[:, None], 0)
                if j == 0:
                    if DECAY == SCALAR:
                        S = S * tl.exp(tl.load(g + t * g_token).to(tl.float32))
                    elif DECAY == CHANNEL:
                        S = S * tl.exp(_vector(g + t * g_token, kk, K, MK))[:, None]
                if KIND != LINEAR and not BEFORE:
                    r_V = tl.sum(S * e_K[:, None], 0)
                if KIND == DELTA:
                    u_V = u_V - r_V
                elif KIND == DPLR:
                    S = S + _vector(b + n * b_token, kk, K, MK)[:, None] * r_V[None, :]
                S = S + p_K[:, None] * u_V[None, :]
                if not EXCL and OUTPUT and j == STEPS - 1:
                    _read(S, q, o, t, row, h, kk, vv, scale, q_token, T, HS, rep, rq, K, V, MK, MV)
            if UPDATE and COUNTS and OUTPUT:  # the state in between is the one to keep
                tl.store(S_out + at, S.to(S_out.dtype.element_ty), mask=mask & (t + 1 == count))
        if UPDATE and not (COUNTS and OUTPUT):
            if COUNTS:
                mask = mask & (count > 0)
            if MK or MV or COUNTS:
                tl.store(S_out + at, S.to(S_out.dtype.element_ty), mask=mask)
            else:
                tl.store(S_out + at, S.to(S_out.dtype.element_ty))


def tile(K: int, V: int, heads: int, element_size: int, processors: int) -> tuple[int, int, int]:
    """BK, BV and warps of a call on `heads` states in all: wide tiles where there is work for all processors, narrow ones else."""
    BK = next_power_of_2(K)
    least = min(NARROWEST // element_size, next_power_of_2(V))
    BV = max(least, min(next_power_of_2(V), TILE // BK, 64))
    while BV > least and heads * cdiv(V, BV) < PROGRAMS * processors:
        BV //= 2
    return BK, BV, max(1, min(4, BK * BV // 1024))


def _rows(x: Tensor | None) -> Tensor | None:
    """x [B, T, H, D] itself if the heads of a token are packed, a packed copy otherwise."""
    packed = x is None or ((x.shape[3] == 1 or x.stride(3) == 1) and (x.shape[2] == 1 or x.stride(2) == x.shape[3]))
    return x if packed else x.contiguous()


def _kind(x: Tensor | None) -> int:
    return 0 if x is None else 1 if x.shape[3] == 1 else 2


def step(
    kind: str, q: Tensor, k: Tensor | None, p: Tensor, v: Tensor, b: Tensor | None, erase: Tensor | None, write: Tensor | None,
    g: Tensor | None, S_in: Tensor | None, S_out: Tensor, slots: Tensor | None, counts: Tensor | None, scale: float, before: bool,
    exclusive: bool, steps: int, update: bool, output: bool,
) -> Tensor:  # fmt: skip
    """o [B, T, H, V] (empty without output). Operands [B, T or T*steps, heads, channels], gates with 1 or all channels.

    S_in, S_out: [P, HS, K, V], the same tensor for a step in place, S_in None for zeros. k None: it is p.
    """
    (B, T, Hq, K), V, HS = q.shape, v.shape[3], S_out.shape[1]
    H = max(Hq, HS)
    operands = [_rows(x) for x in (q, k, p, v, b, erase, write, g)]
    o = torch.empty((B, T, H, V) if output else (0,), dtype=v.dtype, device=v.device)
    BK, BV, warps = tile(K, V, B * HS, S_out.element_size(), _plan.facts(q)[1])
    NV = cdiv(V, BV)
    step_kernel[(B * HS * NV,)](
        *operands, S_in, S_out, slots, counts, o,
        *(0 if x is None else x.stride(0) for x in operands), S_out.stride(0),
        *(0 if x is None else x.stride(1) for x in operands),
        scale, T, HS, H // HS, H // Hq, *(1 if x is None else HS // x.shape[2] for x in operands[1:]), K, V, NV,
        BK=BK, BV=BV, STEPS=steps, KIND=KINDS[kind], DECAY=_kind(g), ERASE=_kind(erase), WRITE=_kind(write), SAME=k is None,
        BEFORE=before, EXCL=exclusive, HAS_IN=S_in is not None, SLOTS=slots is not None, COUNTS=counts is not None,
        UPDATE=update, OUTPUT=output, MK=BK != K, MV=V % BV != 0, num_warps=warps,
    )  # fmt: skip
    return o
