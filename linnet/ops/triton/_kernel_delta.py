"""The delta rule on chunks of C tokens: a preparation, a sweep in each direction, one gradient kernel.

With decayed operands q~, e~ (from the chunk's start) and p^ (to its end), total decay W, A = pair(q, p), L = pair(e, p):
    prepare      T = (I + L)^-1, A, row factors                                        one program per chunk and head
    forward      X = T (u - e~ S),  o = q~ S + A X,  S' = W S + p^T X                  one program per row, split, head, V tile
    backward     Y = T^T (A^T do + p^ R),  R' = W R + q~^T do - e~^T Y                 the same, backward in time
    gradients    everything else from X, Y, do, S at the chunk's start, R at its end   one program per chunk, head, K tile

The sweeps keep the state transposed, [V, K], in fp32 registers: every product has the state or the values as its register operand,
so nothing goes through shared memory between the three products of the critical chain (read, solve, write). T^T and A^T are
transposes of loaded tiles; a transposed 16-bit accumulator never enters a product (Triton 3.4-3.7.0 miscompiles it on sm_90).

Scalar decay: the row factors multiply the register operands, so q, k and p are read as they are. Per-channel decay (VECTOR): the
preparation writes q~, e~ and p^ (16 bit) and the sweeps know no decay but W.
"""

import triton
import triton.language as tl

from linnet.ops.triton._kernel_common import block_range, first_block, load_tile, save_state, split_range, state_at, store_tile

LOG2E = tl.constexpr(1.4426950408889634)
RESET = tl.constexpr(-160.0)  # 2^-160 is zero in fp32: below it a decay is a reset


@triton.jit
def unit_lower_inverse(L, C: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr):
    """(I + L)^-1 of the part of L [C, C] below the diagonal, in fp32, by doubling: X <- X - X L_b X, L_b the blocks of b rows.

    Products of inverses of diagonal blocks, never powers of L: stable for correlated keys. X L_b are the blocks of X L, X being
    block diagonal: L is an operand as it is, and nothing but X has to be written anew for the products of a level.
    """
    r = tl.arange(0, C)
    i = r[:, None]
    j = r[None, :]
    X = tl.where(i == j, 1.0, tl.where((i // 2 == j // 2) & (i > j), -L, 0.0))
    M = (-L).to(DT)
    for level in tl.static_range(1, 6):
        b = 1 << level
        if b < C:
            odd = tl.where((r >> level) % 2 == 1, r >> level, -1)  # so that one comparison per element chooses the blocks
            Xh = X.to(DT)
            Y = tl.where(odd[:, None] == ((r >> level) + 1)[None, :], tl.dot(Xh, M, input_precision=IP), 0.0)
            X = tl.dot(Y.to(DT), Xh, X, input_precision=IP)
    return X


@triton.jit
def gate_column(p, rows, stride, h, ok, HAS: tl.constexpr):
    """One value a token of head h; 1 where there is no gate."""
    if HAS:
        x = tl.load(p + rows * stride + h, mask=ok, other=0.0).to(tl.float32)
    else:
        x = tl.where(ok, 1.0, 0.0)
    return x


@triton.jit
def keep_square(p, x, index, C: tl.constexpr, DESC: tl.constexpr):
    """Write matrix number `index` of [*, C, C]."""
    if DESC:
        p.store([index * C, 0], x.to(p.dtype))
    else:
        r = tl.arange(0, C)
        tl.store(p + index.to(tl.int64) * (C * C) + r[:, None] * C + r[None, :], x.to(p.dtype.element_ty))


@triton.jit
def prepare_chunk_scalar(
    q, k, p, g, erase, write, inverse, pairs, factors, carry, chunk, h, row, left,
    BT, NB, stride_q, stride_k, stride_p, stride_g, stride_e, stride_w, scale, H, Rq, Rk, Rp, Rg, Re, Rw, K, ND,
    BD: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr, WRITE: tl.constexpr, SAME: tl.constexpr,
    EXCL: tl.constexpr, BEFORE: tl.constexpr, DESC: tl.constexpr, ROWS: tl.constexpr, COL: tl.constexpr, INV: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """One chunk of `prepare_scalar`, its tokens being the rows [row, row + left)."""
    r = tl.arange(0, C)
    i = r[:, None]
    j = r[None, :]
    ok = r < left
    rows = (row + r).to(tl.int64)
    d = tl.arange(0, BD)
    A = tl.zeros([C, C], tl.float32)
    L = tl.zeros([C, C], tl.float32)
    for block in range(0, ND):
        cd = block * BD
        pb = load_tile(p, row, ok, stride_p, (h // Rp) * K + cd, K - cd, d, DESC, ROWS, COL)
        qb = load_tile(q, row, ok, stride_q, (h // Rq) * K + cd, K - cd, d, DESC, ROWS, COL)
        if SAME:
            kb = pb
        else:
            kb = load_tile(k, row, ok, stride_k, (h // Rk) * K + cd, K - cd, d, DESC, ROWS, COL)
        A = tl.dot(qb, tl.trans(pb), A, input_precision=IP)
        L = tl.dot(kb, tl.trans(pb), L, input_precision=IP)
    be = gate_column(erase, rows, stride_e, h // Re, ok, ERASE)
    fq = tl.where(ok, scale, 0.0)
    fe = be
    lower = (i > j) if EXCL else (i >= j)
    if DECAY:
        gv = tl.maximum(tl.load(g + rows * stride_g + h // Rg, mask=ok, other=0.0).to(tl.float32) * LOG2E, RESET)
        G = tl.cumsum(gv, 0)
        GC = tl.sum(gv, 0)
        Gq = G - gv if EXCL else G
        Ge = G - gv if BEFORE else G
        A = A * tl.exp2(tl.where(lower, (Gq[:, None] - G[None, :]), float("-inf"))) * scale
        L = L * tl.exp2(tl.where(i > j if EXCL or BEFORE else lower, (Ge[:, None] - G[None, :]), float("-inf")))
        fq = fq * tl.exp2(Gq)
        fe = fe * tl.exp2(Ge)
        fp = tl.where(ok, tl.exp2(GC - G), 1.0)
        tl.store(factors + (2 * H + h).to(tl.int64) * BT + rows, fp, mask=ok)
        tl.store(factors + (4 * H + h).to(tl.int64) * BT + rows, G, mask=ok)
        tl.store(carry + h.to(tl.int64) * NB + chunk, tl.exp2(GC))
    else:
        A = tl.where(lower, A * scale, 0.0)
    index = chunk * H + h
    keep_square(pairs, A, index, C, DESC)
    X = unit_lower_inverse(L * be[:, None], C, INV, IP)
    keep_square(inverse, tl.where(i > j, X, 0.0), index, C, DESC)
    tl.store(factors + h.to(tl.int64) * BT + rows, fq, mask=ok)
    tl.store(factors + (H + h).to(tl.int64) * BT + rows, fe, mask=ok)
    if WRITE:
        tl.store(factors + (3 * H + h).to(tl.int64) * BT + rows, gate_column(write, rows, stride_w, h // Rw, ok, True), mask=ok)


@triton.jit
def prepare_scalar(
    q, k, p, g, erase, write, inverse, pairs, factors, carry, cu,
    T, BT, N, NB, stride_q, stride_k, stride_p, stride_g, stride_e, stride_w, scale, H, Rq, Rk, Rp, Rg, Re, Rw, K, ND,
    BD: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr,
    WRITE: tl.constexpr, SAME: tl.constexpr, EXCL: tl.constexpr, BEFORE: tl.constexpr, DESC: tl.constexpr, ROWS: tl.constexpr,
    COL: tl.constexpr, PACKED: tl.constexpr, INV: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """T - I and A [NB, H, C, C]; factors [5, H, BT]: of q, of e, of p, of u, and G; carry [H, NB], the decay over a chunk.

    SAME: k is p. EXCL: q reads before the step. BEFORE: e reads before the decay. R*: heads that share one of an operand.
    """
    h = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    first, length, begin = block_range(cu, chunk, T, N, C, PACKED)
    if PACKED:
        if begin < length:
            prepare_chunk_scalar(
                q, k, p, g, erase, write, inverse, pairs, factors, carry, chunk, h, first + begin, length - begin,
                BT, NB, stride_q, stride_k, stride_p, stride_g, stride_e, stride_w, scale, H, Rq, Rk, Rp, Rg, Re, Rw, K, ND,
                BD, C, DECAY, ERASE, WRITE, SAME, EXCL, BEFORE, DESC, ROWS, COL, INV, IP,
            )  # fmt: skip
    else:
        prepare_chunk_scalar(
            q, k, p, g, erase, write, inverse, pairs, factors, carry, chunk, h, first + begin, length - begin,
            BT, NB, stride_q, stride_k, stride_p, stride_g, stride_e, stride_w, scale, H, Rq, Rk, Rp, Rg, Re, Rw, K, ND,
            BD, C, DECAY, ERASE, WRITE, SAME, EXCL, BEFORE, DESC, ROWS, COL, INV, IP,
        )  # fmt: skip


@triton.jit
def square(p, index, C: tl.constexpr, DESC: tl.constexpr):
    """Matrix number `index` of [*, C, C]."""
    if DESC:
        x = p.load([index * C, 0])
    else:
        r = tl.arange(0, C)
        x = tl.load(p + index.to(tl.int64) * (C * C) + r[:, None] * C + r[None, :])
    return x


@triton.jit
def keep_state(p, S, index, cv, v, d, V, K, DESC: tl.constexpr):
    """Write tile S [V, K] of state number `index` in 16 bit; states are kept transposed."""
    if DESC:
        p.store([index * V + cv, 0], S.to(p.dtype))
    else:
        at = p + index.to(tl.int64) * V * K + (cv + v)[:, None] * K + d[None, :]
        tl.store(at, S.to(p.dtype.element_ty), mask=(cv + v < V)[:, None] & (d < K)[None, :])


@triton.jit
def row_factor(factors, which, h, H, BT, row, r, ok):
    return tl.load(factors + (which * H + h).to(tl.int64) * BT + row + r, mask=ok, other=0.0)


@triton.jit
def forward_sweep(
    q, e, p, u, write, inverse, pairs, factors, carry, o, x, states, S_in, S_out, cu,
    T, BT, NB, stride_q, stride_e, stride_p, stride_u, stride_w, H, Hq, He, Hp, Hu, Hw, H_in, H_out, K, V, NV, NS,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr, VECTOR: tl.constexpr, DECAY: tl.constexpr,
    SAME: tl.constexpr, WRITE: tl.constexpr, VALUES: tl.constexpr, OUT: tl.constexpr, SAVE_X: tl.constexpr,
    SAVE_S: tl.constexpr, DESC: tl.constexpr, STORE: tl.constexpr, ROWS: tl.constexpr, COL_D: tl.constexpr,
    COL_V: tl.constexpr, PACKED: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """X, o and the final state. VALUES False: the map of a split from its start to its end, u = 0 from the identity.

    WRITE: 0 no gate, 1 one per token (a row factor), 2 one per value channel, multiplied as the values arrive.
    """
    pid = tl.program_id(0)
    iv = pid % NV
    h = (pid // NV) % H
    part = pid // (NV * H)
    sp = part % NS
    n = part // NS
    row0, length, begin = split_range(cu, n, sp, T, NS, C, PACKED)
    d = tl.arange(0, BD)
    v = tl.arange(0, BV)
    cv = iv * BV
    r = tl.arange(0, C)
    DT: tl.constexpr = p.dtype if DESC else p.dtype.element_ty
    S = tl.zeros([BV, BD], tl.float32)
    if HAS_IN:
        at, mask = state_at(S_in, part * H_in + h // (H // H_in), d, cv + v, K, V, V, 1, True)
        S = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if not VALUES:
        S = tl.where((cv + v)[:, None] == d[None, :], 1.0, 0.0)
    chunks = (length + C - 1) // C
    chunk0 = first_block(cu, n, T, C, PACKED) + begin // C
    if HAS_OUT:
        if chunks == 0:
            save_state(S_out, S, part, h, H, H_out, d, cv + v, K, V, V, 1, True)
    for j in tl.range(0, chunks, num_stages=STAGES):
        row = row0 + j * C
        ok = j * C + r < length
        index = (chunk0 + j) * H + h
        pb = load_tile(p, row, ok, stride_p, (h // (H // Hp)) * K, K, d, DESC, ROWS, COL_D)
        if SAME:
            eb = pb
        else:
            eb = load_tile(e, row, ok, stride_e, (h // (H // He)) * K, K, d, DESC, ROWS, COL_D)
        Tb = square(inverse, index, C, DESC)
        if SAVE_S:
            keep_state(states, S, index, cv, v, d, V, K, DESC)
        Sh = S.to(DT)
        E = tl.dot(Sh, tl.trans(eb), input_precision=IP)
        if not VECTOR:
            E = E * row_factor(factors, 1, h, H, BT, row, r, ok)[None, :]
        if VALUES:
            ub = tl.trans(load_tile(u, row, ok, stride_u, (h // (H // Hu)) * V + cv, V - cv, v, DESC, ROWS, COL_V))
            if WRITE == 2:
                wb = load_tile(write, row, ok, stride_w, (h // (H // Hw)) * V + cv, V - cv, v, DESC, ROWS, COL_V)
                E = ub.to(tl.float32) * tl.trans(wb) - E
            elif WRITE == 1:
                E = ub * row_factor(factors, 3, h, H, BT, row, r, ok)[None, :] - E
            else:
                E = ub.to(tl.float32) - E
        else:
            E = -E
        X = tl.dot(E.to(DT), tl.trans(Tb), E, input_precision=IP)  # the unit diagonal of T stays exact
        Xh = X.to(DT)
        if OUT:
            qb = load_tile(q, row, ok, stride_q, (h // (H // Hq)) * K, K, d, DESC, ROWS, COL_D)
            O = tl.dot(Sh, tl.trans(qb), input_precision=IP)
            if not VECTOR:
                O = O * row_factor(factors, 0, h, H, BT, row, r, ok)[None, :]
            O = tl.dot(Xh, tl.trans(square(pairs, index, C, DESC)), O, input_precision=IP)
        if VECTOR:
            w = tl.load(carry + index.to(tl.int64) * K + d, mask=d < K, other=0.0)
            S = tl.dot(Xh, pb, S * w[None, :], input_precision=IP)
        elif DECAY:
            w = tl.load(carry + h.to(tl.int64) * NB + chunk0 + j)
            Xp = (X * row_factor(factors, 2, h, H, BT, row, r, ok)[None, :]).to(DT)
            S = tl.dot(Xp, pb, S * w, input_precision=IP)
        else:
            S = tl.dot(Xh, pb, S, input_precision=IP)
        if SAVE_X:
            store_tile(x, tl.trans(Xh), row, row.to(tl.int64), ok, H * V, h * V + cv, V - cv, v, STORE, ROWS, COL_V)
        if OUT:
            ob = tl.trans(O.to(o.dtype if STORE else o.dtype.element_ty))
            store_tile(o, ob, row, row.to(tl.int64), ok, H * V, h * V + cv, V - cv, v, STORE, ROWS, COL_V)
        if HAS_OUT:  # in the loop: a store behind it would impose its layout on the state in every iteration
            if j == chunks - 1:
                save_state(S_out, S, part, h, H, H_out, d, cv + v, K, V, V, 1, True)


@triton.jit
def backward_sweep(
    q, e, p, do, inverse, pairs, factors, carry, y, states, R_in, R_out, cu,
    T, BT, NB, stride_q, stride_e, stride_p, stride_o, H, Hq, He, Hp, H_in, K, V, NV, NS,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr, VECTOR: tl.constexpr, DECAY: tl.constexpr,
    SAME: tl.constexpr, KEEP: tl.constexpr, DESC: tl.constexpr, STORE: tl.constexpr,
    ROWS: tl.constexpr, COL_D: tl.constexpr, COL_V: tl.constexpr, PACKED: tl.constexpr, HAS_IN: tl.constexpr,
    FIRST: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Y and R. R_in enters at the end of a split (FIRST: only into the first head of a group); KEEP: store Y, R at chunk ends."""
    pid = tl.program_id(0)
    iv = pid % NV
    h = (pid // NV) % H
    part = pid // (NV * H)
    sp = part % NS
    n = part // NS
    row0, length, begin = split_range(cu, n, sp, T, NS, C, PACKED)
    d = tl.arange(0, BD)
    v = tl.arange(0, BV)
    cv = iv * BV
    r = tl.arange(0, C)
    DT: tl.constexpr = p.dtype if DESC else p.dtype.element_ty
    R = tl.zeros([BV, BD], tl.float32)
    if HAS_IN:
        at, mask = state_at(R_in, part * H_in + h // (H // H_in), d, cv + v, K, V, V, 1, True)
        if FIRST:
            mask = mask & (h % (H // H_in) == 0)
        R = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    chunks = (length + C - 1) // C
    chunk0 = first_block(cu, n, T, C, PACKED) + begin // C
    if chunks == 0:
        save_state(R_out, R, part, h, H, H, d, cv + v, K, V, V, 1, True)
    for i in tl.range(0, chunks, num_stages=STAGES):
        j = chunks - 1 - i
        row = row0 + j * C
        ok = j * C + r < length
        index = (chunk0 + j) * H + h
        pb = load_tile(p, row, ok, stride_p, (h // (H // Hp)) * K, K, d, DESC, ROWS, COL_D)
        if SAME:
            eb = pb
        else:
            eb = load_tile(e, row, ok, stride_e, (h // (H // He)) * K, K, d, DESC, ROWS, COL_D)
        qb = load_tile(q, row, ok, stride_q, (h // (H // Hq)) * K, K, d, DESC, ROWS, COL_D)
        dt = tl.trans(load_tile(do, row, ok, stride_o, h * V + cv, V - cv, v, DESC, ROWS, COL_V))
        if KEEP:
            keep_state(states, R, index, cv, v, d, V, K, DESC)
        Y = tl.dot(R.to(DT), tl.trans(pb), input_precision=IP)
        if DECAY and not VECTOR:
            Y = Y * row_factor(factors, 2, h, H, BT, row, r, ok)[None, :]
        Y = tl.dot(dt, square(pairs, index, C, DESC), Y, input_precision=IP)
        Y = tl.dot(Y.to(DT), square(inverse, index, C, DESC), Y, input_precision=IP)
        Yh = Y.to(DT)
        if VECTOR:
            w = tl.load(carry + index.to(tl.int64) * K + d, mask=d < K, other=0.0)
            R = tl.dot(dt, qb, R * w[None, :], input_precision=IP)
            R = tl.dot((-Y).to(DT), eb, R, input_precision=IP)
        else:
            if DECAY:
                R = R * tl.load(carry + h.to(tl.int64) * NB + chunk0 + j)
            R = tl.dot((dt * row_factor(factors, 0, h, H, BT, row, r, ok)[None, :]).to(DT), qb, R, input_precision=IP)
            R = tl.dot((Y * -row_factor(factors, 1, h, H, BT, row, r, ok)[None, :]).to(DT), eb, R, input_precision=IP)
        if KEEP:
            store_tile(y, tl.trans(Yh), row, row.to(tl.int64), ok, H * V, h * V + cv, V - cv, v, STORE, ROWS, COL_V)
        if i == chunks - 1:
            save_state(R_out, R, part, h, H, H, d, cv + v, K, V, V, 1, True)


@triton.jit
def state_tile(p, index, cv, cd, v, d, V, K, DESC: tl.constexpr, COL: tl.constexpr):
    """Tile [V, K] of kept state number `index`."""
    if DESC:
        x = p.load([index * V + cv, cd])
    else:
        at = p + index.to(tl.int64) * V * K + (cv + v)[:, None] * K + (cd + d)[None, :]
        if COL:
            x = tl.load(at, mask=(cv + v < V)[:, None] & (cd + d < K)[None, :], other=0.0)
        else:
            x = tl.load(at)
    return x


@triton.jit
def value_gradients(
    u, y, write, factors, du, dwrite, BT, stride_u, stride_w, H, Ru, Rw, V, NV, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """du = write * y [BT, H, V]; dwrite = <u, y> [H, BT], CHANNELS: u * y [BT, H, V]. A program per ROWS tokens of one head."""
    h = tl.program_id(0) % H
    t = (tl.program_id(0) // H).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    v = tl.arange(0, BV)
    ok = t < BT
    if not CHANNELS:
        gate = tl.load(factors + (3 * H + h).to(tl.int64) * BT + t, mask=ok, other=0.0)[:, None]
    dw = tl.zeros([ROWS], tl.float32)
    for block in range(0, NV):
        c = block * BV + v
        mask = ok[:, None] & (c < V)[None, :]
        yb = tl.load(y + t[:, None] * (H * V) + h * V + c[None, :], mask=mask, other=0.0).to(tl.float32)
        ub = tl.load(u + t[:, None] * stride_u + h // Ru * V + c[None, :], mask=mask, other=0.0).to(tl.float32)
        at = t[:, None] * (H * V) + h * V + c[None, :]
        if CHANNELS:
            gate = tl.load(write + t[:, None] * stride_w + h // Rw * V + c[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(dwrite + at, (ub * yb).to(dwrite.dtype.element_ty), mask=mask)
        else:
            dw += tl.sum(ub * yb, 1)
        tl.store(du + at, (yb * gate).to(du.dtype.element_ty), mask=mask)
    if not CHANNELS:
        tl.store(dwrite + h.to(tl.int64) * BT + t, dw, mask=ok)


@triton.jit
def chunk_rows(cu, chunk, T, N, C: tl.constexpr, PACKED: tl.constexpr):
    """First token and number of tokens (possibly none) of chunk number `chunk`."""
    first, length, begin = block_range(cu, chunk, T, N, C, PACKED)
    return first + begin, length - begin


@triton.jit
def gradients_scalar(
    q, k, p, x, y, do, factors, carry, erase, S, R, dq, dk, dp, derase, dg, cu,
    T, BT, N, NB, stride_q, stride_k, stride_p, stride_o, stride_e, scale, H, Rq, Rk, Rp, Re, K, V, ND,
    BD: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, ERASE: tl.constexpr,
    SAME: tl.constexpr, EXCL: tl.constexpr, BEFORE: tl.constexpr, DESC: tl.constexpr, STORE: tl.constexpr, ROWS: tl.constexpr,
    COL_D: tl.constexpr, COL_V: tl.constexpr, PACKED: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, p and the gates inside one chunk. Outputs [BT, H, *]; derase and dg are parts of a sum over K tiles.

    Gate: dg_t = W <S, R> + what tokens before t write beyond the chunk + sum_{t' >= t} (q.dq + e.de - p.dp)_{t'} inside the chunk,
    with the pairs t = s, which would cancel, left out of all three. Few operands live at a time: occupancy hides the latencies.
    """
    pid = tl.program_id(0)
    id = pid % ND
    h = (pid // ND) % H
    chunk = pid // (ND * H)
    row, left = chunk_rows(cu, chunk, T, N, C, PACKED)
    if left > 0:
        row64 = row.to(tl.int64)
        r = tl.arange(0, C)
        i = r[:, None]
        j = r[None, :]
        d = tl.arange(0, BD)
        v = tl.arange(0, BV)
        ok = r < left
        cd = id * BD
        index = chunk * H + h
        DT: tl.constexpr = p.dtype if DESC else p.dtype.element_ty
        OT: tl.constexpr = dq.dtype if STORE else dq.dtype.element_ty
        wide = H * K
        column = h * K + cd
        be = gate_column(erase, row64 + r, stride_e, h // Re, ok, ERASE)
        if DECAY:
            G = row_factor(factors, 4, h, H, BT, row, r, ok)
            before = tl.load(factors + (4 * H + h).to(tl.int64) * BT + row + r - 1, mask=(r > 0) & ok, other=0.0)
            Gq = before if EXCL else G
            Ge = before if BEFORE else G
            lower = (i > j) & ok[:, None] if ROWS else i > j  # a missing row has no sum: its difference could be any number
        xb = load_tile(x, row, ok, H * V, h * V, V, v, DESC, ROWS, COL_V)
        ob = load_tile(do, row, ok, stride_o, h * V, V, v, DESC, ROWS, COL_V)
        Sb = state_tile(S, index, 0, cd, v, d, V, K, DESC, COL_D or COL_V)
        dA = tl.dot(ob, tl.trans(xb), input_precision=IP)
        gq = tl.dot(ob, Sb, input_precision=IP)
        for n in tl.static_range(1, NV):
            cv = n * BV
            x2 = load_tile(x, row, ok, H * V, h * V + cv, V - cv, v, DESC, ROWS, COL_V)
            o2 = load_tile(do, row, ok, stride_o, h * V + cv, V - cv, v, DESC, ROWS, COL_V)
            dA = tl.dot(o2, tl.trans(x2), dA, input_precision=IP)
            gq = tl.dot(o2, state_tile(S, index, cv, cd, v, d, V, K, DESC, COL_D or COL_V), gq, input_precision=IP)
        own = tl.sum(tl.where(i == j, dA, 0.0), 1) * scale
        if DECAY:
            dA = (dA * tl.exp2(tl.where(lower, Gq[:, None] - G[None, :], float("-inf"))) * scale).to(DT)
        else:
            dA = tl.where(i > j, dA * scale, 0.0).to(DT)
        gq = gq * row_factor(factors, 0, h, H, BT, row, r, ok)[:, None]
        pb = load_tile(p, row, ok, stride_p, (h // Rp) * K + cd, K - cd, d, DESC, ROWS, COL_D)
        gq = tl.dot(dA, pb, gq, input_precision=IP)
        qb = load_tile(q, row, ok, stride_q, (h // Rq) * K + cd, K - cd, d, DESC, ROWS, COL_D)
        if DECAY:
            reads = tl.sum(gq * qb, 1)
        if not EXCL:
            gq += own[:, None] * pb.to(tl.float32)
        store_tile(dq, gq.to(OT), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        yb = load_tile(y, row, ok, H * V, h * V, V, v, DESC, ROWS, COL_V)
        dL = tl.dot(yb, tl.trans(xb), input_precision=IP)
        ge = tl.dot(yb, Sb, input_precision=IP)
        for n in tl.static_range(1, NV):
            cv = n * BV
            x2 = load_tile(x, row, ok, H * V, h * V + cv, V - cv, v, DESC, ROWS, COL_V)
            y2 = load_tile(y, row, ok, H * V, h * V + cv, V - cv, v, DESC, ROWS, COL_V)
            dL = tl.dot(y2, tl.trans(x2), dL, input_precision=IP)
            ge = tl.dot(y2, state_tile(S, index, cv, cd, v, d, V, K, DESC, COL_D or COL_V), ge, input_precision=IP)
        if DECAY:
            dL = (-dL * tl.exp2(tl.where(lower, Ge[:, None] - G[None, :], float("-inf")))).to(DT)
            ge = ge * tl.where(ok, -tl.exp2(Ge), 0.0)[:, None]
        else:
            dL = tl.where(i > j, -dL, 0.0).to(DT)
            ge = -ge
        ge = tl.dot(dL, pb, ge, input_precision=IP)
        if SAME:
            kb = pb
        else:
            kb = load_tile(k, row, ok, stride_k, (h // Rk) * K + cd, K - cd, d, DESC, ROWS, COL_D)
        if ERASE or DECAY:
            erases = tl.sum(ge * kb, 1)
        if ERASE:
            tl.store(derase + (id * H + h).to(tl.int64) * BT + row64 + r, erases, mask=ok)
            ge = ge * be[:, None]
        if not SAME:
            store_tile(dk, ge.to(OT), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        # dA^T q + dL^T e, formed transposed: a transposed accumulator must not become an operand
        gp = tl.dot(tl.trans(qb), dA, input_precision=IP)
        gp = tl.trans(tl.dot(tl.trans(kb), (dL * be[:, None]).to(DT), gp, input_precision=IP))
        if DECAY:
            flow = -tl.sum(gp * pb, 1)
        if SAME:
            gp += ge
        if not EXCL:
            gp += own[:, None] * qb.to(tl.float32)
        Rb = state_tile(R, index, 0, cd, v, d, V, K, DESC, COL_D or COL_V)
        out = tl.dot(xb, Rb, input_precision=IP)
        if DECAY:
            passing = tl.dot(tl.trans(Sb), Rb, input_precision=IP)  # its diagonal: cheaper in registers than the tiles themselves
        for n in tl.static_range(1, NV):
            cv = n * BV
            x2 = load_tile(x, row, ok, H * V, h * V + cv, V - cv, v, DESC, ROWS, COL_V)
            R2 = state_tile(R, index, cv, cd, v, d, V, K, DESC, COL_D or COL_V)
            out = tl.dot(x2, R2, out, input_precision=IP)
            if DECAY:
                S2 = state_tile(S, index, cv, cd, v, d, V, K, DESC, COL_D or COL_V)
                passing = tl.dot(tl.trans(S2), R2, passing, input_precision=IP)
        if DECAY:
            out = out * row_factor(factors, 2, h, H, BT, row, r, ok)[:, None]
            writes = tl.sum(out * pb, 1)
            passing = tl.sum(tl.sum(tl.where(d[:, None] == d[None, :], passing, 0.0), 1), 0)
            later = tl.zeros([C], tl.float32)
            if EXCL:
                later += reads
            else:
                flow += reads
            if BEFORE:
                later += erases * be
            else:
                flow += erases * be
            total = tl.cumsum(flow + later, 0, reverse=True) - later + tl.cumsum(writes, 0) - writes
            total += passing * tl.load(carry + h.to(tl.int64) * NB + chunk)
            tl.store(dg + (id * H + h).to(tl.int64) * BT + row64 + r, total, mask=ok)
        gp += out
        store_tile(dp, gp.to(OT), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
