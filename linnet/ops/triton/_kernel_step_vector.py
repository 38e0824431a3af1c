"""A few tokens of the operators with a vector state (decoding), on states that are updated in place.

short_conv, state [P, D, W-1], the last inputs, oldest first: one program per (BD channels, row). What it needs of the past and of
the new tokens is loaded again for every tap; it is in the cache. The new state is read before any of it is written.

selective_scan, state [P, D, N]: one program per (BD channels, row), which keeps its [BD, N] states and A in registers.

Either reads the state once and writes it once; floor = 2 * state bytes / memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linnet.ops.triton._plan import cdiv, next_power_of_2

CONV_CHANNELS, CONV_WARPS = 128, 1
STATES = 1024  # values of the state of a selective scan that a program of one warp keeps


@triton.jit
def _entry(slots, counts, row, T, SLOTS: tl.constexpr, COUNTS: tl.constexpr):
    """The row's entry of the pool and the number of tokens that enter its state."""
    slot = row
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    count = T
    if COUNTS:
        count = tl.minimum(tl.maximum(tl.load(counts + row).to(tl.int32), 0), T)
    return slot, count


@triton.jit
def _zeros(y, row, T, d, D, BD: tl.constexpr):
    """The output of a padding row."""
    for t in range(0, T):
        tl.store(y + (row * T + t) * D + d, tl.zeros([BD], y.dtype.element_ty), mask=d < D)


@triton.jit
def _input(x, past, t, d, D, x_token, W: tl.constexpr):
    """Input of token t in fp32; for t < 0 from the state."""
    new = tl.load(x + t * x_token + d, mask=(d < D) & (t >= 0), other=0.0).to(tl.float32)
    if W == 1:
        value = new
    else:
        value = new + tl.load(past + d * (W - 1) + (W - 1) + t, mask=(d < D) & (t < 0), other=0.0).to(tl.float32)
    return value


@triton.jit
def conv_kernel(
    x, weight, bias, state, slots, counts, y, x_row, x_token, S_row, T, D, ND,
    BD: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, SLOTS: tl.constexpr, COUNTS: tl.constexpr,
    UPDATE: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    d = (tl.program_id(0) % ND) * BD + tl.arange(0, BD)
    row = (tl.program_id(0) // ND).to(tl.int64)
    slot, count = _entry(slots, counts, row, T, SLOTS, COUNTS)
    if slot < 0:
        if OUTPUT:
            _zeros(y, row, T, d, D, BD)
    else:
        past = state + slot * S_row
        x += row * x_row
        if OUTPUT:
            for t in range(0, T):
                sum_D = tl.zeros([BD], tl.float32)
                if BIAS:
                    sum_D += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
                for w in tl.static_range(W):
                    tap_D = tl.load(weight + d * W + w, mask=d < D, other=0.0).to(tl.float32)
                    sum_D += tap_D * _input(x, past, t - (W - 1) + w, d, D, x_token, W)
                if SILU:
                    sum_D = sum_D * tl.sigmoid(sum_D)
                tl.store(y + (row * T + t) * D + d, sum_D.to(y.dtype.element_ty), mask=d < D)
        if UPDATE:
            new = ()
            for w in tl.static_range(W - 1):
                new = new + (_input(x, past, count - (W - 1) + w, d, D, x_token, W),)
            tl.debug_barrier()  # nothing is overwritten before all threads have read
            for w in tl.static_range(W - 1):
                tl.store(past + d * (W - 1) + w, new[w].to(state.dtype.element_ty), mask=d < D)


@triton.jit
def selective_kernel(
    x, delta, A, B, C, skip, z, state, slots, counts, y,
    x_row, d_row, b_row, c_row, z_row, x_token, d_token, b_token, c_token, z_token, S_row, T, D, N, ND, b_width, c_width,
    BD: tl.constexpr, BN: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, B_GROUPS: tl.constexpr, C_GROUPS: tl.constexpr,
    SLOTS: tl.constexpr, COUNTS: tl.constexpr, UPDATE: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """b_width, c_width: channels that share a group of B, of C."""
    d = (tl.program_id(0) % ND) * BD + tl.arange(0, BD)
    row = (tl.program_id(0) // ND).to(tl.int64)
    n = tl.arange(0, BN)
    slot, count = _entry(slots, counts, row, T, SLOTS, COUNTS)
    if slot < 0:
        if OUTPUT:
            _zeros(y, row, T, d, D, BD)
    else:
        at = d[:, None] * N + n[None, :]
        mask = (d < D)[:, None] & (n < N)[None, :]
        h = tl.load(state + slot * S_row + at, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(A + at, mask=mask, other=0.0).to(tl.float32)
        x += row * x_row
        delta += row * d_row
        B += row * b_row
        C += row * c_row
        last = count
        if OUTPUT:
            last = T
        for t in range(0, last):
            x_D = tl.load(x + t * x_token + d, mask=d < D, other=0.0).to(tl.float32)
            dt_D = tl.load(delta + t * d_token + d, mask=d < D, other=0.0).to(tl.float32)
            if B_GROUPS:
                b_DN = tl.load(B + t * b_token + (d // b_width)[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32)
            else:
                b_DN = tl.load(B + t * b_token + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            h = tl.exp(dt_D[:, None] * a) * h + (dt_D * x_D)[:, None] * b_DN
            if OUTPUT:
                if C_GROUPS:
                    c_DN = tl.load(C + t * c_token + (d // c_width)[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32)
                else:
                    c_DN = tl.load(C + t * c_token + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
                y_D = tl.sum(h * c_DN, 1)
                if SKIP:
                    y_D += tl.load(skip + d, mask=d < D, other=0.0).to(tl.float32) * x_D
                if GATE:
                    z_D = tl.load(z + row * z_row + t * z_token + d, mask=d < D, other=0.0).to(tl.float32)
                    y_D = y_D * z_D * tl.sigmoid(z_D)
                tl.store(y + (row * T + t) * D + d, y_D.to(y.dtype.element_ty), mask=d < D)
            if UPDATE and COUNTS and OUTPUT:  # the state in between is the one to keep
                tl.store(state + slot * S_row + at, h.to(state.dtype.element_ty), mask=mask & (t + 1 == count))
        if UPDATE and not (COUNTS and OUTPUT):
            tl.store(state + slot * S_row + at, h.to(state.dtype.element_ty), mask=mask & (count > 0))


def _packed(x: Tensor | None) -> Tensor | None:
    """x [B, T, ...] itself if the values of a token are packed, a packed copy otherwise."""
    return x if x is None or x[0, 0].is_contiguous() else x.contiguous()


def conv(x, weight, bias, state, slots, counts, silu: bool, update: bool, output: bool) -> Tensor:
    """y [B, T, D]; x [B, T, D], weight [D, W], state [P, D, W-1]."""
    (B, T, D), W = x.shape, weight.shape[1]
    x = _packed(x)
    y = torch.empty((B, T, D) if output else (0,), dtype=x.dtype, device=x.device)
    ND = cdiv(D, CONV_CHANNELS)
    conv_kernel[(B * ND,)](
        x, weight, bias, state, slots, counts, y, x.stride(0), x.stride(1), state.stride(0), T, D, ND,
        BD=CONV_CHANNELS, W=W, BIAS=bias is not None, SILU=silu, SLOTS=slots is not None, COUNTS=counts is not None,
        UPDATE=update and W > 1, OUTPUT=output, num_warps=CONV_WARPS,
    )  # fmt: skip
    return y


def selective(x, delta, A, B, C, skip, z, state, slots, counts, update: bool, output: bool) -> Tensor:
    """y [B, T, D]; x, delta, z [B, T, D], A [D, N], B, C [B, T, G, N], state [P, D, N]."""
    (rows, T, D), N = x.shape, A.shape[1]
    x, delta, B, C, z = (_packed(p) for p in (x, delta, B, C, z))
    y = torch.empty((rows, T, D) if output else (0,), dtype=x.dtype, device=x.device)
    BN = next_power_of_2(N)
    BD = max(32, STATES // BN)
    ND = cdiv(D, BD)
    timed = (x, delta, B, C, z)
    selective_kernel[(rows * ND,)](
        x, delta, A, B, C, skip, z, state, slots, counts, y,
        *(0 if p is None else p.stride(0) for p in timed), *(0 if p is None else p.stride(1) for p in timed), state.stride(0),
        T, D, N, ND, D // B.shape[2], D // C.shape[2],
        BD=BD, BN=BN, SKIP=skip is not None, GATE=z is not None, B_GROUPS=B.shape[2] > 1, C_GROUPS=C.shape[2] > 1,
        SLOTS=slots is not None, COUNTS=counts is not None, UPDATE=update, OUTPUT=output, num_warps=max(1, BD * BN // STATES),
    )  # fmt: skip
    return y
