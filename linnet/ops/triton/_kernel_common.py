"""Device functions shared by the linear-attention kernels: where a program works, masked tiles, states."""

import triton
import triton.language as tl

from linnet.ops.triton import _ptxas

_ptxas.install()


@triton.jit
def split_range(cu, n, sp, T, NS, UNIT: tl.constexpr, PACKED: tl.constexpr):
    """First row and length of split `sp` of row `n` of the state. Splits are multiples of UNIT tokens; some may be empty."""
    if PACKED:
        first = tl.load(cu + n).to(tl.int32)
        length = tl.load(cu + n + 1).to(tl.int32) - first
    else:
        first = n * T
        length = T
    per = ((length + UNIT - 1) // UNIT + NS - 1) // NS * UNIT
    begin = tl.minimum(sp * per, length)
    end = tl.minimum(begin + per, length)
    return first + begin, end - begin, begin


@triton.jit
def first_block(cu, n, T, L: tl.constexpr, PACKED: tl.constexpr):
    """Number of the first block of L tokens of row `n`: every row has its own blocks, counted without reading other rows."""
    if PACKED:
        b = tl.load(cu + n).to(tl.int32) // L + n
    else:
        b = n * ((T + L - 1) // L)
    return b


@triton.jit
def load_tile(p, row, ok, stride, column, width, d, DESC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile [rows, d] of an operand: through its tensor descriptor (p, first row `row`) or by pointers; zero where masked."""
    if DESC:
        x = p.load([row, column])
        if ROWS:
            x = tl.where(ok[:, None], x, tl.zeros_like(x))
    else:
        at = p + (row.to(tl.int64) * stride + column) + (tl.arange(0, ok.shape[0])[:, None] * stride + d[None, :])
        if ROWS:
            if COLUMNS:
                x = tl.load(at, mask=ok[:, None] & (d < width)[None, :], other=0.0)
            else:
                x = tl.load(at, mask=ok[:, None], other=0.0)
        else:
            if COLUMNS:
                x = tl.load(at, mask=(d < width)[None, :], other=0.0)
            else:
                x = tl.load(at)
    return x


@triton.jit
def store_tile(p, x, row, row64, ok, stride, column, left, z, DESC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write tile x [rows, z] at first row `row` (of the descriptor) or `row64` (of the pointer); masked as `load_tile`."""
    if DESC:
        p.store([row, column], x)
    else:
        at = p + (row64 * stride + column) + (tl.arange(0, ok.shape[0])[:, None] * stride + z[None, :])
        if ROWS or COLUMNS:
            tl.store(at, x, mask=ok[:, None] & (z < left)[None, :])
        else:
            tl.store(at, x)


@triton.jit
def state_at(p, index, d, z, D, Z, stride_d, stride_z, TR: tl.constexpr):
    """Pointers and mask of tile [z, d] (TR) or [d, z] of state number `index`."""
    base = p + index.to(tl.int64) * D * Z
    if TR:
        at = base + d[None, :] * stride_d + z[:, None] * stride_z
        mask = (d < D)[None, :] & (z < Z)[:, None]
    else:
        at = base + d[:, None] * stride_d + z[None, :] * stride_z
        mask = (d < D)[:, None] & (z < Z)[None, :]
    return at, mask


@triton.jit
def save_state(p, S, part, h, H, H_out, d, z, D, Z, stride_d, stride_z, TR: tl.constexpr):
    """Write a tile of the final state; of the heads that share a state only the first one does."""
    rep = H // H_out
    at, mask = state_at(p, part * H_out + h // rep, d, z, D, Z, stride_d, stride_z, TR)
    tl.store(at, S, mask=mask & (h % rep == 0))


@triton.jit
def save_block(p, S, index, cd, cz, d, z, D, Z, DESC: tl.constexpr, TR: tl.constexpr):
    """Keep a tile of state number `index` [D, Z] in 16 bit; by descriptor it costs the fewest registers."""
    if DESC:
        x = S.to(p.dtype)
        p.store([index * D + cd, cz], tl.trans(x) if TR else x)
    else:
        at, mask = state_at(p, index, cd + d, cz + z, D, Z, Z, 1, TR)
        tl.store(at, S.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_block(p, index, cd, cz, d, z, D, Z, DESC: tl.constexpr, TR: tl.constexpr):
    """A kept state's tile, [z, d] if TR."""
    if DESC:
        x = p.load([index * D + cd, cz])
        if TR:
            x = tl.trans(x)
    else:
        at, mask = state_at(p, index, cd + d, cz + z, D, Z, Z, 1, TR)
        x = tl.load(at, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def block_owner(cu, block, T, N, L: tl.constexpr, PACKED: tl.constexpr):
    """Row of the state that owns block `block` of L tokens, the row's first token and length, the block's first token in it."""
    if PACKED:
        n = 0
        high = N
        while high - n > 1:  # the last row whose first block is not after this one
            middle = (n + high) // 2
            if tl.load(cu + middle).to(tl.int32) // L + middle <= block:
                n = middle
            else:
                high = middle
        first = tl.load(cu + n).to(tl.int32)
        length = tl.load(cu + n + 1).to(tl.int32) - first
        begin = (block - (first // L + n)) * L
    else:
        per = (T + L - 1) // L
        n = block // per
        first = n * T
        length = T
        begin = block % per * L
    return n, first, length, begin


@triton.jit
def block_range(cu, block, T, N, L: tl.constexpr, PACKED: tl.constexpr):
    """`block_owner` without the row's number."""
    _, first, length, begin = block_owner(cu, block, T, N, L, PACKED)
    return first, length, begin


@triton.jit
def load_sums(p, h, row, r, ok, BT, C: tl.constexpr, DESC: tl.constexpr):
    """C prepared sums of head h from row `row` on; past the end of a sequence they mean nothing."""
    if DESC:
        x = tl.reshape(p.load([h, row]), [C])
    else:
        x = tl.load(p + h.to(tl.int64) * BT + row + r, mask=ok, other=0.0)
    return x


@triton.jit
def shifted_exp2(x, n):
    """2^(x + n) for integers n, |x + n| <= 126: mantissa and exponent are formed apart, so n changes no bit of the mantissa."""
    magic: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which is then in the lowest bits
    t = x + magic
    bits = tl.exp2(x - (t - magic)).to(tl.int32, bitcast=True)
    return (bits + (t.to(tl.int32, bitcast=True) << 23) + (n.to(tl.int32) << 23)).to(tl.float32, bitcast=True)
