"""DPLR, S' = Diag(e^g) S + b r^T + k v^T with r = a^T S: a preparation, one sweep used in both directions, two gradient kernels.

With operands decayed from the chunk's start (q~; a~ before its token) and to its end (k^, b^), decay W of the chunk, pair matrices
A_xy and T = (I - A_ab)^-1, the preparation folds the solve into what a chunk does to its start state S and its values,
    E = T a~,  M = T A_ak,      q' = q~ + A_qb E,  P = A_qk + A_qb M,  k' = k^ + M^T b^,  N = b^^T E
so that the sweeps are linear attention with one matrix N more: one dependent product a chunk. With Z the adjoint of S,
    forward      o = q' S + P v,              S' = W S + N S + k'^T v
    backward     dv = k' Z' + P^T do,         Z = W Z' + N^T Z' + q'^T do         the same kernel, q' and k' exchanged
    solved       R = E S + M v,               X = T^T (b^ Z' + A_qb^T do)
    gradients    readers (q, do) and (a, X) against writers (k, v) and (b, R), S at the chunk's start, Z' at its end
A sweep keeps its state transposed, [V, K], in fp32 registers, as _kernel_delta.py does. What is folded is what the recurrence
itself reads, writes and carries from token to token: as small as a, b, q and k while the transitions do not grow.

Decay of a pair (t, s): inside a frame of F tokens the factors e^{G_t} and e^{-G_s} are anchored at the frame's start; F is as long
as the declared log_decay_min allows (the whole chunk for RWKV-7), 1 without one. Between frames: halving, anchored at the middle of
the smallest common aligned block of 2 h rows, h = F, 2F, ..., C/2, every factor <= 1. All anchors lie before the token they serve.
"""

import triton
import triton.language as tl

from linnet.ops.triton._kernel_common import block_range, first_block, load_tile, save_state, split_range, state_at, store_tile
from linnet.ops.triton._kernel_delta import chunk_rows, keep_state, square, state_tile, unit_lower_inverse

LOG2E = tl.constexpr(1.4426950408889634)
# which tokens s a token t chooses
UPTO, BEFORE, SINCE, AFTER, FRAME, HALF, HALF_BEFORE = (tl.constexpr(n) for n in range(7))


@triton.jit
def over_time(high, low, which: tl.constexpr, level, C: tl.constexpr, F: tl.constexpr, SPLIT: tl.constexpr, IP: tl.constexpr):
    """Sums over chosen tokens of values [C, channels] given as high and low parts. Token t chooses the tokens up to it (or before,
    since, after), those up to it in its frame, or those between it and the middle of its block of 2^(level+1) rows (HALF: with
    itself behind the middle, HALF_BEFORE: without)."""
    t = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    if which == UPTO:
        m = s <= t
    elif which == BEFORE:
        m = s < t
    elif which == SINCE:
        m = s >= t
    elif which == AFTER:
        m = s > t
    elif which == FRAME:
        m = (s // F == t // F) & (s <= t)
    else:
        middle = ((t >> (level + 1)) << (level + 1)) + (1 << level)
        last = (s <= t) if which == HALF else (s < t)
        m = ((t >= middle) & (s >= middle) & last) | ((t < middle) & (s < middle) & (s > t))
    m = m.to(high.dtype)
    x = tl.dot(m, high, input_precision=IP)
    if SPLIT:
        x = tl.dot(m, low, x, input_precision=IP)
    return x


@triton.jit
def parts(x, DT: tl.constexpr):
    """x in fp32 as two values of the type of the products."""
    high = x.to(DT)
    return high, (x - high.to(tl.float32)).to(DT)


@triton.jit
def pair_mask(level, C: tl.constexpr, LATER_FIRST: tl.constexpr):
    """Pairs across the middle of a block of 2^(level+1) rows; rows are the later tokens or the earlier ones."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if LATER_FIRST:
        t, s = i, j
    else:
        t, s = j, i
    return ((t >> (level + 1)) == (s >> (level + 1))) & ((t >> level) > (s >> level))


@triton.jit
def load_decay(
    g, row, ok, stride, column, width, d, floor, SCALAR: tl.constexpr, DESC: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Log-decays [C, channels] in fp32, base e, 0 where masked."""
    if SCALAR:
        x = tl.load(g + (row + tl.arange(0, ok.shape[0])).to(tl.int64) * stride + column, mask=ok, other=0.0).to(tl.float32)
        x = x[:, None] + tl.zeros([ok.shape[0], d.shape[0]], tl.float32)
    else:
        x = load_tile(g, row, ok, stride, column, width, d, DESC, ROWS, COLUMNS).to(tl.float32)
    return tl.maximum(x, floor)


@triton.jit
def add_matrices(
    A, B, x, b, k, gb, high, low, E, C: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr, DECAY: tl.constexpr,
    STRICT: tl.constexpr, SPLIT: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Add to the pair matrices A, B [C, C] of a reader x [C, BD] with the writers b and k [C, BD]; E: sums inside the frames.

    Later tokens of the same frame are added, too (the caller drops them): a mask would cost registers.
    """
    F: tl.constexpr = 1 << FIRST
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if DECAY:
        if F > 1:
            far = tl.exp2(-E)
            near = tl.exp2(E - gb * LOG2E if STRICT else E)
            near = (x * near).to(DT)
            if F == C:
                A = tl.dot(near, tl.trans((b * far).to(DT)), A, input_precision=IP)
                B = tl.dot(near, tl.trans((k * far).to(DT)), B, input_precision=IP)
            else:
                m = i // F == j // F
                A += tl.where(m, tl.dot(near, tl.trans((b * far).to(DT)), input_precision=IP), 0.0)
                B += tl.where(m, tl.dot(near, tl.trans((k * far).to(DT)), input_precision=IP), 0.0)
        elif not STRICT:  # the pairs t = s
            xf = x.to(tl.float32)
            A += tl.where(i == j, tl.sum(xf * b, 1)[:, None], 0.0)
            B += tl.where(i == j, tl.sum(xf * k, 1)[:, None], 0.0)
        if F < C:
            for level in tl.range(FIRST, LEVELS, num_stages=1):
                far = tl.exp2(over_time(high, low, HALF, level, C, F, SPLIT, IP) * LOG2E)
                near = far
                if STRICT:
                    near = tl.exp2(over_time(high, low, HALF_BEFORE, level, C, F, SPLIT, IP) * LOG2E)
                near = (x * near).to(DT)
                m = pair_mask(level, C, True)
                A += tl.where(m, tl.dot(near, tl.trans((b * far).to(DT)), input_precision=IP), 0.0)
                B += tl.where(m, tl.dot(near, tl.trans((k * far).to(DT)), input_precision=IP), 0.0)
    else:
        A = tl.dot(x, tl.trans(b), A, input_precision=IP)
        B = tl.dot(x, tl.trans(k), B, input_precision=IP)
    return A, B


@triton.jit
def chunk_decay(
    g, row, ok, stride, column, width, d, floor, C: tl.constexpr, F: tl.constexpr, DECAY: tl.constexpr, SCALAR: tl.constexpr,
    DESC: tl.constexpr, ROWS: tl.constexpr, COL: tl.constexpr, SPLIT: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Log-decays [C, BD] as they are summed, their two parts, and their sums inside the frames, base 2."""
    if DECAY:
        gb = load_decay(g, row, ok, stride, column, width, d, floor, SCALAR, DESC and not SCALAR, ROWS, COL)
        high, low = parts(gb, DT)
        gb = high.to(tl.float32) + low.to(tl.float32)
        E = over_time(high, low, FRAME, 0, C, F, SPLIT, IP) * LOG2E if F > 1 else gb
    else:
        gb = tl.zeros([C, d.shape[0]], tl.float32)
        high, low = parts(gb, DT)
        E = gb
    return gb, high, low, E


@triton.jit
def prepare(
    q, k, a, b, g, pairs, solve_pairs, back_pairs, inverse, carry, cu,
    T, N, stride_q, stride_k, stride_a, stride_b, stride_g, scale, floor, H, Rq, Rk, Ra, Rb, Rg, K, ND,
    BD: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr, DECAY: tl.constexpr, SCALAR: tl.constexpr,
    ROWS: tl.constexpr, COL: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, DT: tl.constexpr, INV: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """P, M, A_qb, T - I [NB, H, C, C] and W [NB, H, K]. A program per chunk and head.

    One kernel with fold(), ptxas 12.8 gave a product the wrong address in shared memory (test_compile.py looks for it).
    """
    h = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    first, length, begin = block_range(cu, chunk, T, N, C, PACKED)
    if begin < length:
        F: tl.constexpr = 1 << FIRST
        row = first + begin
        r = tl.arange(0, C)
        i = r[:, None]
        j = r[None, :]
        ok = begin + r < length
        d = tl.arange(0, BD)
        OT: tl.constexpr = pairs.dtype.element_ty
        index = chunk.to(tl.int64) * H + h
        at = index * (C * C) + i * C + j
        A_ab = tl.zeros([C, C], tl.float32)
        A_ak = tl.zeros([C, C], tl.float32)
        A_qb = tl.zeros([C, C], tl.float32)
        A_qk = tl.zeros([C, C], tl.float32)
        for block in tl.range(0, ND, num_stages=1):
            cd = block * BD
            gcolumn = (h // Rg) * (1 if SCALAR else K) + (0 if SCALAR else cd)
            gb, high, low, G = chunk_decay(
                g, row, ok, stride_g, gcolumn, K - cd, d, floor, C, F, DECAY, SCALAR, False, ROWS, COL, SPLIT, DT, IP
            )
            tl.store(carry + index * K + cd + d, tl.exp2(tl.sum(gb, 0) * LOG2E), mask=cd + d < K)
            bb = load_tile(b, row, ok, stride_b, (h // Rb) * K + cd, K - cd, d, False, ROWS, COL)
            kb = load_tile(k, row, ok, stride_k, (h // Rk) * K + cd, K - cd, d, False, ROWS, COL)
            x = load_tile(a, row, ok, stride_a, (h // Ra) * K + cd, K - cd, d, False, ROWS, COL)
            A_ab, A_ak = add_matrices(A_ab, A_ak, x, bb, kb, gb, high, low, G, C, FIRST, LEVELS, DECAY, True, SPLIT, DT, IP)
            x = load_tile(q, row, ok, stride_q, (h // Rq) * K + cd, K - cd, d, False, ROWS, COL)
            A_qb, A_qk = add_matrices(A_qb, A_qk, x, bb, kb, gb, high, low, G, C, FIRST, LEVELS, DECAY, False, SPLIT, DT, IP)
        A_ak = tl.where(i > j, A_ak, 0.0)
        Ah = tl.where(i >= j, A_qb * scale, 0.0).to(DT)
        A_qk = tl.where(i >= j, A_qk * scale, 0.0)
        X = unit_lower_inverse(tl.where(i > j, -A_ab, 0.0), C, INV, IP)
        X = tl.where(i > j, X, 0.0).to(DT)
        M = tl.dot(X, A_ak.to(DT), A_ak, input_precision=IP).to(DT)  # the unit diagonal of T stays exact
        A_qk = tl.dot(Ah, M, A_qk, input_precision=IP)
        tl.store(pairs + at, A_qk.to(OT))
        tl.store(solve_pairs + at, M.to(OT))
        tl.store(inverse + at, X.to(OT))
        tl.store(back_pairs + at, Ah.to(OT))


@triton.jit
def fold(
    q, k, a, b, g, solve_pairs, back_pairs, inverse, read, write, transfer, solve, back, cu,
    T, N, stride_q, stride_k, stride_a, stride_b, stride_g, scale, floor, H, Rq, Rk, Ra, Rb, Rg, K, ND,
    BD: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr, DECAY: tl.constexpr,
    SCALAR: tl.constexpr, ROWS: tl.constexpr, COL: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, DT: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """q', k', E, b^ [BT, H, K] and N [NB, H, K, K]. A program per chunk and head."""
    h = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    first, length, begin = block_range(cu, chunk, T, N, C, PACKED)
    if begin < length:
        F: tl.constexpr = 1 << FIRST
        row = first + begin
        row64 = row.to(tl.int64)
        r = tl.arange(0, C)
        ok = begin + r < length
        d = tl.arange(0, BD)
        wide = H * K
        column = h * K
        OT: tl.constexpr = read.dtype.element_ty
        index = chunk.to(tl.int64) * H + h
        at = index * (C * C) + r[:, None] * C + r[None, :]
        for block in tl.range(0, ND, num_stages=1):
            cd = block * BD
            gcolumn = (h // Rg) * (1 if SCALAR else K) + (0 if SCALAR else cd)
            gb, high, low, G = chunk_decay(
                g, row, ok, stride_g, gcolumn, K - cd, d, floor, C, F, DECAY, SCALAR, False, ROWS, COL, SPLIT, DT, IP
            )
            x = load_tile(a, row, ok, stride_a, (h // Ra) * K + cd, K - cd, d, False, ROWS, COL).to(tl.float32)
            if DECAY:
                if F == C:
                    x = x * tl.exp2(G - gb * LOG2E)
                else:
                    x = x * tl.exp2(over_time(high, low, BEFORE, 0, C, F, SPLIT, IP) * LOG2E)
            E = tl.dot(tl.load(inverse + at), x.to(DT), x, input_precision=IP).to(DT)
            store_tile(solve, E.to(OT), row, row64, ok, wide, column + cd, K - cd, d, False, ROWS, COL)
            x = load_tile(q, row, ok, stride_q, (h // Rq) * K + cd, K - cd, d, False, ROWS, COL).to(tl.float32) * scale
            if DECAY:
                if F == C:
                    x = x * tl.exp2(G)
                else:
                    x = x * tl.exp2(over_time(high, low, UPTO, 0, C, F, SPLIT, IP) * LOG2E)
            x = tl.dot(tl.load(back_pairs + at), E, x, input_precision=IP)
            store_tile(read, x.to(OT), row, row64, ok, wide, column + cd, K - cd, d, False, ROWS, COL)
            x = load_tile(b, row, ok, stride_b, (h // Rb) * K + cd, K - cd, d, False, ROWS, COL)
            y = load_tile(k, row, ok, stride_k, (h // Rk) * K + cd, K - cd, d, False, ROWS, COL).to(tl.float32)
            if DECAY:
                if F == C:
                    far = tl.exp2((tl.sum(gb, 0) * LOG2E)[None, :] - G)
                else:
                    far = tl.exp2(over_time(high, low, AFTER, 0, C, F, SPLIT, IP) * LOG2E)
                x = (x * far).to(DT)
                y = y * far
            store_tile(back, x.to(OT), row, row64, ok, wide, column + cd, K - cd, d, False, ROWS, COL)
            y = tl.dot(tl.trans(tl.load(solve_pairs + at)), x, y, input_precision=IP)
            store_tile(write, y.to(OT), row, row64, ok, wide, column + cd, K - cd, d, False, ROWS, COL)
        tl.debug_barrier()
        n = tl.arange(0, BN)
        for ib in tl.range(0, K, BN, num_stages=1):
            bt = tl.trans(load_tile(back, row, ok, wide, column + ib, K - ib, n, False, ROWS, COL))
            for jb in tl.range(0, K, BN, num_stages=1):
                x = tl.dot(bt, load_tile(solve, row, ok, wide, column + jb, K - jb, n, False, ROWS, COL), input_precision=IP)
                to = transfer + index * K * K + (ib + n)[:, None] * K + (jb + n)[None, :]
                if COL:
                    tl.store(to, x.to(OT), mask=(ib + n < K)[:, None] & (jb + n < K)[None, :])
                else:
                    tl.store(to, x.to(OT))


@triton.jit
def sweep(
    read, write, values, transfer, pairs, carry, out, states, S_in, S_out, cu,
    T, stride_v, H, Rv, H_in, H_out, K, V, NV, NS,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr, REV: tl.constexpr, VALUES: tl.constexpr,
    KEEP: tl.constexpr, OUT: tl.constexpr, DESC: tl.constexpr, STORE: tl.constexpr, ROWS: tl.constexpr, COL_D: tl.constexpr,
    COL_V: tl.constexpr, PACKED: tl.constexpr, HAS_IN: tl.constexpr, FIRST: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Forward: o, (KEEP) the states at chunk starts, the state behind a split. REV: dv, Z' at chunk ends, Z before a split.

    VALUES False: the map of a split from its start to its end, no values and from the identity. OUT False: the state only.
    FIRST: S_in enters the first head of a group only.
    """
    pid = tl.program_id(0)
    iv = pid % NV
    h = (pid // NV) % H
    part = pid // (NV * H)
    n = part // NS
    row0, length, begin = split_range(cu, n, part % NS, T, NS, C, PACKED)
    d = tl.arange(0, BD)
    v = tl.arange(0, BV)
    cv = iv * BV
    r = tl.arange(0, C)
    DT: tl.constexpr = write.dtype if DESC else write.dtype.element_ty
    S = tl.zeros([BV, BD], tl.float32)
    if HAS_IN:
        at, mask = state_at(S_in, part * H_in + h // (H // H_in), d, cv + v, K, V, V, 1, True)
        if FIRST:
            mask = mask & (h % (H // H_in) == 0)
        S = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if not VALUES:
        S = tl.where((cv + v)[:, None] == d[None, :], 1.0, 0.0)
    chunks = (length + C - 1) // C
    chunk0 = first_block(cu, n, T, C, PACKED) + begin // C
    if chunks == 0:
        save_state(S_out, S, part, h, H, H_out, d, cv + v, K, V, V, 1, True)
    for i in tl.range(0, chunks, num_stages=STAGES):
        j = chunks - 1 - i if REV else i
        row = row0 + j * C
        ok = j * C + r < length
        index = (chunk0 + j) * H + h
        if KEEP:
            keep_state(states, S, index, cv, v, d, V, K, DESC)
        Sh = S.to(DT)
        step = state_tile(transfer, index, 0, 0, d, d, K, K, DESC, COL_D)
        w = tl.load(carry + index.to(tl.int64) * K + d, mask=d < K, other=0.0)
        S = tl.dot(Sh, step if REV else tl.trans(step), S * w[None, :], input_precision=IP)
        if VALUES:
            vt = tl.trans(load_tile(values, row, ok, stride_v, (h // Rv) * V + cv, V - cv, v, DESC, ROWS, COL_V))
            S = tl.dot(vt, load_tile(write, row, ok, H * K, h * K, K, d, DESC, ROWS, COL_D), S, input_precision=IP)
        if OUT:
            O = tl.dot(Sh, tl.trans(load_tile(read, row, ok, H * K, h * K, K, d, DESC, ROWS, COL_D)), input_precision=IP)
            p = square(pairs, index, C, DESC)
            O = tl.dot(vt, p if REV else tl.trans(p), O, input_precision=IP)
            ob = tl.trans(O.to(out.dtype if STORE else out.dtype.element_ty))
            store_tile(out, ob, row, row.to(tl.int64), ok, H * V, h * V + cv, V - cv, v, STORE, ROWS, COL_V)
        if i == chunks - 1:  # in the loop: a store behind it would impose its layout on the state in every iteration
            save_state(S_out, S, part, h, H, H_out, d, cv + v, K, V, V, 1, True)


@triton.jit
def product(x, y, row, ok, stride_x, stride_y, column_x, column_y, V, z, NV, DX: tl.constexpr, DY: tl.constexpr,
            C: tl.constexpr, ROWS: tl.constexpr, COL: tl.constexpr, IP: tl.constexpr):  # fmt: skip
    """x y^T [C, C] of values [C, V], through their descriptors or by pointers."""
    P = tl.zeros([C, C], tl.float32)
    for block in tl.range(0, NV, num_stages=1):
        cv = block * z.shape[0]
        xb = load_tile(x, row, ok, stride_x, column_x + cv, V - cv, z, DX, ROWS, COL)
        yb = load_tile(y, row, ok, stride_y, column_y + cv, V - cv, z, DY, ROWS, COL)
        P = tl.dot(xb, tl.trans(yb), P, input_precision=IP)
    return P


@triton.jit
def solved(
    v, do, solve, back, solve_pairs, back_pairs, inverse, S, Z, r, x, products, cu,
    T, N, NB, stride_v, stride_o, scale, H, Rv, K, V, NV,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DESC: tl.constexpr, ROWS: tl.constexpr, COL_D: tl.constexpr,
    COL_V: tl.constexpr, PACKED: tl.constexpr, PRODUCTS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """R, what the tokens of a chunk read before they erase, and its gradient X [BT, H, V]; with PRODUCTS do v^T, do R^T, X v^T,
    X R^T of every chunk [4, NB, H, C, C], rows the later tokens. A program per chunk and head."""
    h = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    row, left = chunk_rows(cu, chunk, T, N, C, PACKED)
    if left > 0:
        DT: tl.constexpr = r.dtype.element_ty
        row64 = row.to(tl.int64)
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        d = tl.arange(0, BD)
        z = tl.arange(0, BV)
        ok = tl.arange(0, C) < left
        index = chunk * H + h
        vcolumn = (h // Rv) * V
        for block in tl.range(0, NV, num_stages=1):
            cv = block * BV
            eb = load_tile(solve, row, ok, H * K, h * K, K, d, DESC, ROWS, COL_D)
            y = tl.dot(eb, tl.trans(state_tile(S, index, cv, 0, z, d, V, K, DESC, COL_D or COL_V)), input_precision=IP)
            vb = load_tile(v, row, ok, stride_v, vcolumn + cv, V - cv, z, DESC, ROWS, COL_V)
            y = tl.dot(square(solve_pairs, index, C, DESC), vb, y, input_precision=IP)
            store_tile(r, y.to(DT), row, row64, ok, H * V, h * V + cv, V - cv, z, False, ROWS, COL_V)
            bb = load_tile(back, row, ok, H * K, h * K, K, d, DESC, ROWS, COL_D)
            y = tl.dot(bb, tl.trans(state_tile(Z, index, cv, 0, z, d, V, K, DESC, COL_D or COL_V)), input_precision=IP)
            ob = load_tile(do, row, ok, stride_o, h * V + cv, V - cv, z, DESC, ROWS, COL_V)
            y = tl.dot(tl.trans(square(back_pairs, index, C, DESC)), ob, y, input_precision=IP)
            y = tl.dot(tl.trans(square(inverse, index, C, DESC)), y.to(DT), y, input_precision=IP)
            store_tile(x, y.to(DT), row, row64, ok, H * V, h * V + cv, V - cv, z, False, ROWS, COL_V)
        if PRODUCTS:
            tl.debug_barrier()  # what other threads of this program wrote, read by pointers as it was written
            at = products + index.to(tl.int64) * (C * C) + i * C + j
            step = tl.cast(NB, tl.int64) * H * (C * C)
            P = product(do, v, row, ok, stride_o, stride_v, h * V, vcolumn, V, z, NV, DESC, DESC, C, ROWS, COL_V, IP)
            tl.store(at, tl.where(i >= j, P * scale, 0.0).to(DT))
            P = product(do, r, row, ok, stride_o, H * V, h * V, h * V, V, z, NV, DESC, False, C, ROWS, COL_V, IP)
            tl.store(at + step, tl.where(i >= j, P * scale, 0.0).to(DT))
            P = product(x, v, row, ok, H * V, stride_v, h * V, vcolumn, V, z, NV, False, DESC, C, ROWS, COL_V, IP)
            tl.store(at + 2 * step, tl.where(i > j, P, 0.0).to(DT))
            P = product(x, r, row, ok, H * V, H * V, h * V, h * V, V, z, NV, False, False, C, ROWS, COL_V, IP)
            tl.store(at + 3 * step, tl.where(i > j, P, 0.0).to(DT))


@triton.jit
def pair_factors(
    gb, high, low, E, level, C: tl.constexpr, F: tl.constexpr, INSIDE: tl.constexpr, STRICT: tl.constexpr, SPLIT: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """(factor of the later tokens, factor of the earlier ones) [C, BD] of the pairs of a level, or of those inside a frame."""
    if INSIDE:
        later = tl.exp2(E - gb * LOG2E if STRICT else E)
        earlier = tl.exp2(-E)
    else:
        earlier = tl.exp2(over_time(high, low, HALF, level, C, F, SPLIT, IP) * LOG2E)
        later = earlier
        if STRICT:
            later = tl.exp2(over_time(high, low, HALF_BEFORE, level, C, F, SPLIT, IP) * LOG2E)
    return later, earlier


@triton.jit
def reader(
    x, y, S, P1, P2, k, b, gb, high, low, E, scale, C: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr,
    STRICT: tl.constexpr, SPLIT: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Gradient [C, BD] of a reader x whose result has the gradient y [C, V], and its flow, by frames and halving."""
    F: tl.constexpr = 1 << FIRST
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    G = tl.dot(y, S, input_precision=IP) * scale
    G = G * tl.exp2(over_time(high, low, BEFORE if STRICT else UPTO, 0, C, F, SPLIT, IP) * LOG2E)
    flow = G * x
    if not STRICT:  # the pairs t = s, whose flows would cancel
        G = tl.dot(tl.where(i == j, P1, tl.zeros_like(P1)), k, G, input_precision=IP)
        G = tl.dot(tl.where(i == j, P2, tl.zeros_like(P2)), b, G, input_precision=IP)
    if F > 1:
        later, earlier = pair_factors(gb, high, low, E, 0, C, F, True, STRICT, SPLIT, IP)
        m = (i // F == j // F) & (i > j)
        Y = tl.dot(tl.where(m, P1, tl.zeros_like(P1)), (k * earlier).to(DT), input_precision=IP)
        Y = tl.dot(tl.where(m, P2, tl.zeros_like(P2)), (b * earlier).to(DT), Y, input_precision=IP)
        G += Y * later
        flow += Y * (x * later).to(DT)
    for level in tl.range(FIRST, LEVELS, num_stages=1):
        later, earlier = pair_factors(gb, high, low, E, level, C, F, False, STRICT, SPLIT, IP)
        m = pair_mask(level, C, True)
        Y = tl.dot(tl.where(m, P1, tl.zeros_like(P1)), (k * earlier).to(DT), input_precision=IP)
        Y = tl.dot(tl.where(m, P2, tl.zeros_like(P2)), (b * earlier).to(DT), Y, input_precision=IP)
        G += Y * later
        flow += Y * (x * later).to(DT)
    return G, flow


@triton.jit
def writer(
    x, y, Z, Pq, Pa, q, a, gb, high, low, E, flow, C: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr,
    SPLIT: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Gradient [C, BD] of a writer x of the values y [C, V], the flow without its pairs, and its flow beyond the chunk."""
    F: tl.constexpr = 1 << FIRST
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    G = tl.dot(y, Z, input_precision=IP)
    G = G * tl.exp2(over_time(high, low, AFTER, 0, C, F, SPLIT, IP) * LOG2E)
    beyond = G * x
    G = tl.dot(tl.where(i == j, Pq, tl.zeros_like(Pq)), q, G, input_precision=IP)
    if F > 1:
        read, earlier = pair_factors(gb, high, low, E, 0, C, F, True, False, SPLIT, IP)
        erase, _ = pair_factors(gb, high, low, E, 0, C, F, True, True, SPLIT, IP)
        m = (i // F == j // F) & (i < j)
        Y = tl.dot(tl.where(m, Pq, tl.zeros_like(Pq)), (q * read).to(DT), input_precision=IP)
        Y = tl.dot(tl.where(m, Pa, tl.zeros_like(Pa)), (a * erase).to(DT), Y, input_precision=IP)
        G += Y * earlier
        flow -= Y * (x * earlier).to(DT)
    for level in tl.range(FIRST, LEVELS, num_stages=1):
        read, earlier = pair_factors(gb, high, low, E, level, C, F, False, False, SPLIT, IP)
        erase, _ = pair_factors(gb, high, low, E, level, C, F, False, True, SPLIT, IP)
        m = pair_mask(level, C, False)
        Y = tl.dot(tl.where(m, Pq, tl.zeros_like(Pq)), (q * read).to(DT), input_precision=IP)
        Y = tl.dot(tl.where(m, Pa, tl.zeros_like(Pa)), (a * erase).to(DT), Y, input_precision=IP)
        G += Y * earlier
        flow -= Y * (x * earlier).to(DT)
    return G, flow, beyond


@triton.jit
def gradients(
    q, k, a, b, v, r, do, dr, g, products, carry, S, Z, dq, dk, da, db, dg, cu,
    T, N, NB, stride_q, stride_k, stride_a, stride_b, stride_v, stride_o, stride_g, scale, floor, zero, H, Rq, Rk,
    Ra, Rb, Rv, Rg, K, V, ND,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr, DECAY: tl.constexpr,
    SCALAR: tl.constexpr, GATE: tl.constexpr, DESC: tl.constexpr, STORE: tl.constexpr, ROWS: tl.constexpr, COL_D: tl.constexpr,
    COL_V: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dq, dk, da, db, dg [BT, H, K] of one chunk and one tile of key channels.

    dg_t = W <S, Z> + what tokens before t write beyond the chunk + sums of q dq + a da - k dk - b db over the tokens from t (a:
    behind t) on, inside the chunk; rows and columns use the same rounded factors, so that what lies on one side of t cancels.
    zero is 0: added, it keeps the compiler from holding powers of two in registers until they are needed again.
    """
    pid = tl.program_id(0)
    cd = (pid % ND) * BD
    h = (pid // ND) % H
    chunk = pid // (ND * H)
    row, left = chunk_rows(cu, chunk, T, N, C, PACKED)
    if left > 0:
        F: tl.constexpr = 1 << FIRST
        WHOLE: tl.constexpr = not DECAY or F == C  # one frame: one factor for the state and the pairs
        row64 = row.to(tl.int64)
        d = tl.arange(0, BD)
        z = tl.arange(0, BV)
        ok = tl.arange(0, C) < left
        index = chunk * H + h
        count = NB * H
        OT: tl.constexpr = dq.dtype if STORE else dq.dtype.element_ty
        wide = H * K
        column = h * K + cd
        qcolumn = (h // Rq) * K + cd
        kcolumn = (h // Rk) * K + cd
        acolumn = (h // Ra) * K + cd
        bcolumn = (h // Rb) * K + cd
        gcolumn = (h // Rg) * (1 if SCALAR else K) + (0 if SCALAR else cd)
        P_qk = square(products, index, C, DESC)
        P_qb = square(products, index + count, C, DESC)
        P_ak = square(products, index + 2 * count, C, DESC)
        P_ab = square(products, index + 3 * count, C, DESC)
        Sb = state_tile(S, index, 0, cd, z, d, V, K, DESC, COL_D or COL_V)
        kb = load_tile(k, row, ok, stride_k, kcolumn, K - cd, d, DESC, ROWS, COL_D)
        bb = load_tile(b, row, ok, stride_b, bcolumn, K - cd, d, DESC, ROWS, COL_D)
        gb, high, low, E = chunk_decay(
            g, row, ok, stride_g, gcolumn, K - cd, d, floor, C, F, DECAY, SCALAR, DESC, ROWS, COL_D, SPLIT, DT, IP
        )
        x = load_tile(q, row, ok, stride_q, qcolumn, K - cd, d, DESC, ROWS, COL_D)
        y = load_tile(do, row, ok, stride_o, h * V, V, z, DESC, ROWS, COL_V)
        if WHOLE:
            if DECAY:
                kb = (kb * tl.exp2(-E)).to(DT)
                bb = (bb * tl.exp2(-E)).to(DT)
            G = tl.dot(y, Sb, input_precision=IP) * scale
            G = tl.dot(P_qk, kb, G, input_precision=IP)
            G = tl.dot(P_qb, bb, G, input_precision=IP)
            now = G * (x * tl.exp2(E)).to(DT)
            if DECAY:
                G = G * tl.exp2(E)
        else:
            G, now = reader(x, y, Sb, P_qk, P_qb, kb, bb, gb, high, low, E, scale, C, FIRST, LEVELS, False, SPLIT, DT, IP)
        store_tile(dq, G.to(OT), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        x = load_tile(a, row, ok, stride_a, acolumn, K - cd, d, DESC, ROWS, COL_D)
        y = load_tile(dr, row, ok, H * V, h * V, V, z, DESC, ROWS, COL_V)
        if WHOLE:
            G = tl.dot(y, Sb, input_precision=IP)
            G = tl.dot(P_ak, kb, G, input_precision=IP)
            G = tl.dot(P_ab, bb, G, input_precision=IP)
            near = tl.exp2(E - gb * LOG2E)
            later = G * (x * near).to(DT)
            if DECAY:
                G = G * near
        else:
            G, later = reader(x, y, Sb, P_ak, P_ab, kb, bb, gb, high, low, E, 1.0, C, FIRST, LEVELS, True, SPLIT, DT, IP)
        store_tile(da, G.to(OT), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        Zb = state_tile(Z, index, 0, cd, z, d, V, K, DESC, COL_D or COL_V)
        if GATE:
            w = tl.load(carry + index.to(tl.int64) * K + cd + d, mask=cd + d < K, other=0.0)
            passing = tl.dot(tl.trans(Zb), Sb, input_precision=IP)  # its diagonal: cheaper in registers than the tiles themselves
            passing = tl.sum(tl.where(d[:, None] == d[None, :], passing, 0.0), 0) * w
            high1, low1 = parts(later, DT)
            total = passing[None, :] + over_time(high1, low1, AFTER, 0, C, F, SPLIT, IP)
        qb = load_tile(q, row, ok, stride_q, qcolumn, K - cd, d, DESC, ROWS, COL_D)
        ab = load_tile(a, row, ok, stride_a, acolumn, K - cd, d, DESC, ROWS, COL_D)
        x = load_tile(k, row, ok, stride_k, kcolumn, K - cd, d, DESC, ROWS, COL_D)
        y = load_tile(v, row, ok, stride_v, (h // Rv) * V, V, z, DESC, ROWS, COL_V)
        if WHOLE:
            if DECAY:
                E += zero
                qb = (qb * tl.exp2(E)).to(DT)
                ab = (ab * tl.exp2(E - gb * LOG2E)).to(DT)
            whole = tl.exp2(tl.sum(gb, 0) * LOG2E)[None, :]
            G = tl.dot(tl.trans(P_qk), qb, input_precision=IP)
            G = tl.dot(tl.trans(P_ak), ab, G, input_precision=IP)
            beyond = tl.dot(y, Zb, input_precision=IP) * whole
            far = (x * tl.exp2(-E)).to(DT)
            now -= G * far
            G += beyond
            beyond = beyond * far
            if DECAY:
                G = G * tl.exp2(-E)
        else:
            G, now, beyond = writer(
                x, y, Zb, tl.trans(P_qk), tl.trans(P_ak), qb, ab, gb, high, low, E, now, C, FIRST, LEVELS, SPLIT, DT, IP
            )
        store_tile(dk, G.to(OT), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        x = load_tile(b, row, ok, stride_b, bcolumn, K - cd, d, DESC, ROWS, COL_D)
        y = load_tile(r, row, ok, H * V, h * V, V, z, DESC, ROWS, COL_V)
        if WHOLE:
            G = tl.dot(tl.trans(P_qb), qb, input_precision=IP)
            G = tl.dot(tl.trans(P_ab), ab, G, input_precision=IP)
            more = tl.dot(y, Zb, input_precision=IP) * whole
            far = (x * tl.exp2(-E)).to(DT)
            now -= G * far
            G += more
            beyond += more * far
            if DECAY:
                G = G * tl.exp2(-E)
        else:
            G, now, more = writer(
                x, y, Zb, tl.trans(P_qb), tl.trans(P_ab), qb, ab, gb, high, low, E, now, C, FIRST, LEVELS, SPLIT, DT, IP
            )
            beyond += more
        store_tile(db, G.to(OT), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        if GATE:
            high1, low1 = parts(beyond, DT)
            total += over_time(high1, low1, BEFORE, 0, C, F, SPLIT, IP)
            high1, low1 = parts(now, DT)
            total += over_time(high1, low1, SINCE, 0, C, F, SPLIT, IP)
            store_tile(dg, total, row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
