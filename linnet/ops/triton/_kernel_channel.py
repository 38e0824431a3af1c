"""Linear attention with one decay per key channel on 16-bit operands: chunks of 64 tokens.

    out_t = scale * sum_s sum_c x_tc y_sc z_s e^{G_t - G_s}    the decay belongs to the contracted channels c (o, dv: `keys_role`)
                                                            or to the columns of z and of the output (dq, dk: `queries_role`)
A chunk is near if no channel changes by more than a factor of 2^96 in it. Then e^{E_t - E_s} is split at the chunk's start, E the
sums of log-decays from there on, and with q~ = q e^E, k~ = k e^-E a sweep is that without decay but for the state:
    o = q~ S + (q~ k~^T) v,    S' = e^{E_C} (S + k~^T v)        and the same backward in time
`prepare_kernel` scales q and k and finds out which chunks are near, `finish_kernel` scales dq and dk and adds up dg; both work on
all chunks at once. In a chunk that is not near, k^ = k e^{E_C - E} takes the place of k~, S' = e^{E_C} S + k^^T v, and its pairs
come from `far_kernel`, for any decay: (t, s) whose smallest common aligned block has 2h rows decay by e^{E_t - a} e^{a - E_s},
both <= 1, with the anchor a at the block's middle; a product per h = 32 ... 1, and one for t = s. An anchor is an integer power of
two, so every product has the bits that it would have in a near chunk: a later token, which may decide what a chunk is, changes no
bit of an earlier output.

Sums over tokens are formed in registers: a tile is [8 tokens of an octet, 8 octets, channels], and one thread has all tokens of an
octet. Gate: dg_t = D_end + sum_{t' >= t} (q.dq - k.dk)_{t'}, both formed from the same rounded factors; D_end is replaced by the
exact <S, R> (state times adjoint state) at the end of every block of a few chunks.
"""

import triton
import triton.language as tl

from linnet.ops.triton._kernel_common import (
    block_owner,
    block_range,
    first_block,
    load_block,
    load_tile,
    save_block,
    save_state,
    split_range,
    state_at,
    store_tile,
)

LOG2E = tl.constexpr(1.4426950408889634)
OCTETS = tl.constexpr(8)
NEAR = tl.constexpr(96.0)  # 2^96 and 2^-96 times an operand are in the range of fp32 and bf16


@triton.jit
def in_order(x):
    """[tokens of an octet, octets, channels] -> [tokens, channels]."""
    return tl.reshape(tl.permute(x, 1, 0, 2), [x.shape[0] * x.shape[1], x.shape[2]])


@triton.jit
def by_octet(x):
    """[tokens, channels] -> [tokens of an octet, octets, channels]."""
    return tl.permute(tl.reshape(x, [OCTETS, x.shape[0] // OCTETS, x.shape[1]]), 1, 0, 2)


@triton.jit
def octets_at(row, stride, column, left, width, I: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets and mask of a tile [octets, tokens of an octet, channels] of `left` rows from `row` on and `width` columns."""
    t = tl.arange(0, OCTETS)[:, None, None] * I + tl.arange(0, I)[None, :, None]
    d = tl.max_contiguous(tl.arange(0, D), 4)[None, None, :]  # four channels a thread: with eight, threads would share an octet
    mask = (t < left) & (d < width) if ROWS or COLUMNS else (t < OCTETS * I) & (d < D)
    return row.to(tl.int64) * stride + column + (t * stride + d), mask


@triton.jit
def load_octets(
    p, row, stride, column, left, width, I: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Tile [tokens of an octet, octets, channels]; zero where masked."""
    at, mask = octets_at(row, stride, column, left, width, I, D, ROWS, COLUMNS)
    if ROWS or COLUMNS:
        x = tl.load(p + at, mask=mask, other=0.0)
    else:
        x = tl.load(p + at)
    return tl.permute(x, 1, 0, 2)


@triton.jit
def store_octets(
    p, x, row, stride, column, left, width, I: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    at, mask = octets_at(row, stride, column, left, width, I, D, ROWS, COLUMNS)
    x = tl.permute(x, 1, 0, 2).to(p.dtype.element_ty)
    if ROWS or COLUMNS:
        tl.store(p + at, x, mask=mask)
    else:
        tl.store(p + at, x)


@triton.jit
def octets_before(x):
    """Sums [octets, channels] over the octets before every octet. Not a difference, which later tokens would round."""
    w = tl.arange(0, OCTETS)
    return tl.sum(tl.where(w[:, None, None] < w[None, :, None], x[:, None, :], 0.0), 0)


@triton.jit
def exponents(gb):
    """Sums of log-decays from the chunk's start through every token, before every octet, and over all.

    In natural units: nothing but additions, which no compiler fuses with a product, so that all kernels get the same bits.
    """
    octet = tl.sum(gb, 0)
    before = octets_before(octet)
    return tl.cumsum(gb, 0) + before[None, :, :], before, tl.sum(octet, 0)


@triton.jit
def earlier(x):
    """Sums over the tokens before every token, and over all: no later token is added and taken away again."""
    token = tl.arange(0, x.shape[0])[:, None, None]
    octet = tl.sum(x, 0)
    before = octets_before(octet)
    out = tl.zeros_like(x)
    for i in tl.static_range(0, x.shape[0]):
        out = tl.where(token == i, before[None, :, :], out)
        before += tl.sum(tl.where(token == i, x, 0.0), 0)
    return out, tl.sum(octet, 0)


@triton.jit
def later(x):
    """Sums over every token and those after it, and over all."""
    octet = tl.sum(x, 0)
    total = tl.sum(octet, 0)
    return (x - tl.cumsum(x, 0)) + (octet - tl.cumsum(octet, 0) + total[None, :])[None, :, :], total


@triton.jit
def log_decays(
    g, row, stride, column, left, width, floor, I: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    return tl.maximum(load_octets(g, row, stride, column, left, width, I, D, ROWS, COLUMNS).to(tl.float32), floor)


@triton.jit
def prepare_kernel(
    q, k, g, qs, ks, dec, near, cu, T, N, stride_q, stride_k, stride_g, floor, H, Hq, Hk, Hg, K, NK,
    BK: tl.constexpr, C: tl.constexpr, EXCL: tl.constexpr, FAR: tl.constexpr, ROWS: tl.constexpr, COL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """qs, ks [B*T, H, K]: q~ and k~, or k^ in a chunk that is not near; dec [chunks, H, K]: e^{E_C}; near [chunks, H, NK]."""
    ik = tl.program_id(0) % NK
    h = tl.program_id(0) // NK % H
    chunk = tl.program_id(0) // (NK * H)
    first, length, begin = block_range(cu, chunk, T, N, C, PACKED)
    if begin < length:
        I: tl.constexpr = C // OCTETS
        BF: tl.constexpr = qs.dtype.element_ty
        row = first + begin
        left = length - begin
        ck = ik * BK
        qb = load_octets(q, row, stride_q, (h // (H // Hq)) * K + ck, left, K - ck, I, BK, ROWS, COL)
        kb = load_octets(k, row, stride_k, (h // (H // Hk)) * K + ck, left, K - ck, I, BK, ROWS, COL)
        gb = log_decays(g, row, stride_g, (h // (H // Hg)) * K + ck, left, K - ck, floor, I, BK, ROWS, COL)
        E, before, whole = exponents(gb)
        base = tl.zeros([BK], tl.float32)
        if FAR:
            is_near = tl.max(tl.abs(E)) * LOG2E < NEAR
            tl.store(near + (chunk.to(tl.int64) * H + h) * NK + ik, is_near.to(tl.int32))
            base = tl.where(is_near, 0.0, whole)
        x = (qb * tl.exp2((E - gb if EXCL else E) * LOG2E)).to(BF)
        store_octets(qs, x, row, H * K, h * K + ck, left, K - ck, I, BK, ROWS, COL)
        x = (kb * tl.exp2((base[None, None, :] - E) * LOG2E)).to(BF)
        store_octets(ks, x, row, H * K, h * K + ck, left, K - ck, I, BK, ROWS, COL)
        d = ck + tl.arange(0, BK)
        tl.store(dec + (chunk.to(tl.int64) * H + h) * K + d, tl.exp2(whole * LOG2E), mask=d < K)


@triton.jit
def near_products(qs, ks, REV: tl.constexpr, EXCL: tl.constexpr, IP: tl.constexpr):
    """Masked q~ . k~ of a chunk: [earlier, later], or with REV [later, earlier]."""
    r = tl.arange(0, qs.shape[0])
    ri = r[:, None]
    ci = r[None, :]
    if REV:
        A = tl.dot(qs, tl.trans(ks), input_precision=IP)
        A = tl.where(ri > ci if EXCL else ri >= ci, A, 0.0)
    else:
        A = tl.dot(ks, tl.trans(qs), input_precision=IP)
        A = tl.where(ri < ci if EXCL else ri <= ci, A, 0.0)
    return A.to(qs.dtype)


@triton.jit
def keys_role(
    qs, ks, z, dec, near, pairs, o, S_in, S_out, states, total, cu, T, BT, stride_z, scale, scale_in, scale_out,
    H, HP, Hz, H_in, H_out, D, Z, ND, NZ, NS,
    BD: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr,
    REV: tl.constexpr, EXCL: tl.constexpr, OUT: tl.constexpr, FAR: tl.constexpr, DESC: tl.constexpr, ROWS: tl.constexpr,
    COL_D: tl.constexpr, COL_Z: tl.constexpr, PACKED: tl.constexpr, HAS_IN: tl.constexpr, FIRST: tl.constexpr,
    HAS_OUT: tl.constexpr, OUT_DESC: tl.constexpr, STORE: tl.constexpr, STATES: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """o (z = v), or with REV dv (z = do); S is the state or its adjoint, transposed [Z, D].

    S_in [rows*NS, H_in, D, Z] enters times scale_in, only into the first head of a group if FIRST; S_out is written times
    scale_out. Without OUT only the state (from zero) and its `total` decay are written, of H of the HP heads.
    pairs [chunks, HP, ND, C, C]: the decayed products [s, t] of chunks that are not near.
    STATES: keep what meets the queries, or the keys, of every chunk: states [chunks*HP*Z, D], a descriptor.
    """
    pid = tl.program_id(0)
    iz = pid % NZ
    id = (pid // NZ) % ND
    h = (pid // (NZ * ND)) % H
    part = pid // (NZ * ND * H)
    n = part // NS
    hp = h * (HP // H)
    row0, length, begin = split_range(cu, n, part % NS, T, NS, C * M, PACKED)
    d = tl.arange(0, BD)
    zz = tl.arange(0, BZ)
    cd = id * BD
    cz = iz * BZ
    r = tl.arange(0, C)
    ri = r[:, None]
    ci = r[None, :]
    BF: tl.constexpr = qs.dtype if DESC else qs.dtype.element_ty
    OT: tl.constexpr = o.dtype if STORE else (o.dtype.element_ty if OUT else tl.float32)
    S = tl.zeros([BZ, BD], tl.float32)
    if HAS_IN:
        at, mask = state_at(S_in, part * H_in + h // (H // H_in), cd + d, cz + zz, D, Z, Z, 1, True)
        if FIRST:
            mask = mask & (h % (H // H_in) == 0)
        S = tl.load(at, mask=mask, other=0.0).to(tl.float32) * scale_in
    chunks = (length + C - 1) // C
    chunk0 = first_block(cu, n, T, C, PACKED) + begin // C
    passed = tl.full([BD], 1.0, tl.float32)
    pending = tl.full([BD], 1.0, tl.float32)  # a decay that the state has yet to undergo
    for j in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - j if REV else j
        row = row0 + c * C
        ok = c * C + r < length
        at_chunk = (chunk0 + c).to(tl.int64) * HP + hp
        zb = load_tile(z, row, ok, stride_z, (h // (H // Hz)) * Z + cz, Z - cz, zz, DESC, ROWS, COL_Z)
        if OUT or REV:
            qb = load_tile(qs, row, ok, HP * D, hp * D + cd, D - cd, d, DESC, ROWS, COL_D)
        if OUT or not REV:
            kb = load_tile(ks, row, ok, HP * D, hp * D + cd, D - cd, d, DESC, ROWS, COL_D)
        decay = tl.load(dec + at_chunk * D + cd + d, mask=cd + d < D, other=1.0)
        is_near = True
        if FAR:
            is_near = tl.load(near + at_chunk * ND + id) != 0
        if REV:
            if is_near:
                S = S * decay[None, :]
        else:
            S = S * pending[None, :]
        if STATES:
            states.store([(at_chunk * Z + cz).to(tl.int32), cd], S.to(BF))
        if OUT:
            if FAR:
                if is_near:
                    A = near_products(qb, kb, REV, EXCL, IP)
                else:
                    A = tl.load(pairs + (at_chunk * ND + id) * (C * C) + (ci * C + ri if REV else ri * C + ci))
            else:
                A = near_products(qb, kb, REV, EXCL, IP)
            O = tl.dot(S.to(BF), tl.trans(kb if REV else qb), input_precision=IP)
            O = tl.dot(tl.trans(zb).to(BF), A, O, input_precision=IP)
            ob = tl.trans((O * scale).to(OT))
            store_tile(o, ob, id * BT + row, id.to(tl.int64) * BT + row, ok, H * Z, h * Z + cz, Z - cz, zz, STORE, ROWS, COL_Z)
        else:
            passed = passed * decay
        if FAR:
            if not is_near:
                S = S * decay[None, :]
        if not REV:
            pending = tl.where(is_near, decay, 1.0)
        S = tl.dot(tl.trans(zb).to(BF), qb if REV else kb, S, input_precision=IP)
    if not REV:
        S = S * pending[None, :]
    if HAS_OUT:
        if OUT_DESC:
            rep = H // H_out
            if h % rep == 0:
                S_out.store([(part * H_out + h // rep) * D + cd, cz], tl.trans(S * scale_out))
        else:
            save_state(S_out, S * scale_out, part, h, H, H_out, cd + d, cz + zz, D, Z, Z, 1, True)
    if not (OUT or STATES):
        if iz == 0:
            tl.store(total + (part * H + h).to(tl.int64) * D + cd + d, tl.log2(passed), mask=cd + d < D)


@triton.jit
def queries_role(
    x, y, zs, ks, dec, near, o, ends, S_in, blocks, cu, T, BT, stride_x, stride_y, scale, scale_in,
    H, Hx, Hy, H_in, D, Z, ND, NZ, NS,
    BD: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr,
    REV: tl.constexpr, EXCL: tl.constexpr, FAR: tl.constexpr, DESC: tl.constexpr, ROWS: tl.constexpr,
    COL_D: tl.constexpr, COL_Z: tl.constexpr, PACKED: tl.constexpr, HAS_IN: tl.constexpr, FIRST: tl.constexpr,
    GATE: tl.constexpr, BLOCKS_DESC: tl.constexpr, STORE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dq~ = e^-E dq (x, y, zs = do, v, k~), or with REV dk~ (v, do, q~), to o [ND, B*T, H, Z] in fp32; S [Z, D] = [K, V].

    Of a chunk that is not near without the pairs inside. GATE: dq keeps the state before the last chunk of every block, dk writes
    to `ends` [blocks, H, ND, Z] the sum over the pairs across its end, without those from inside that chunk if it is not near.
    """
    pid = tl.program_id(0)
    iz = pid % NZ
    id = (pid // NZ) % ND
    h = (pid // (NZ * ND)) % H
    part = pid // (NZ * ND * H)
    n = part // NS
    row0, length, begin = split_range(cu, n, part % NS, T, NS, C * M, PACKED)
    d = tl.arange(0, BD)
    zz = tl.arange(0, BZ)
    cd = id * BD
    cz = iz * BZ
    r = tl.arange(0, C)
    ri = r[:, None]
    ci = r[None, :]
    BF: tl.constexpr = zs.dtype if DESC else zs.dtype.element_ty
    S = tl.zeros([BZ, BD], tl.float32)
    if HAS_IN:
        at, mask = state_at(S_in, part * H_in + h // (H // H_in), cz + zz, cd + d, Z, D, D, 1, False)
        if FIRST:
            mask = mask & (h % (H // H_in) == 0)
        S = tl.load(at, mask=mask, other=0.0).to(tl.float32) * scale_in
    chunks = (length + C - 1) // C
    chunk0 = first_block(cu, n, T, C, PACKED) + begin // C
    block0 = first_block(cu, n, T, C * M, PACKED) + begin // (C * M)
    pending = tl.full([BZ], 1.0, tl.float32)
    for j in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - j if REV else j
        row = row0 + c * C
        ok = c * C + r < length
        at_chunk = (chunk0 + c).to(tl.int64) * H + h
        xb = load_tile(x, row, ok, stride_x, (h // (H // Hx)) * D + cd, D - cd, d, DESC, ROWS, COL_D)
        yb = load_tile(y, row, ok, stride_y, (h // (H // Hy)) * D + cd, D - cd, d, DESC, ROWS, COL_D)
        zb = load_tile(zs, row, ok, H * Z, h * Z + cz, Z - cz, zz, DESC, ROWS, COL_Z)
        decay = tl.load(dec + at_chunk * Z + cz + zz, mask=cz + zz < Z, other=1.0)
        is_near = True
        if FAR:
            is_near = tl.load(near + at_chunk * NZ + iz) != 0
        if REV:
            if is_near:
                S = S * decay[:, None]
        else:
            S = S * pending[:, None]
        X = tl.dot(S.to(BF), tl.trans(xb).to(BF), input_precision=IP)
        if GATE:
            if (c + 1) % M == 0 or c == chunks - 1:
                if REV:  # pairs across the block's end: from before this chunk and, unless `finish_kernel` adds them, from inside
                    W = tl.sum(S * load_block(blocks, (block0 + c // M) * H + h, cz, cd, zz, d, Z, D, BLOCKS_DESC, False), 1)
                    if is_near:
                        kb = load_tile(ks, row, ok, H * Z, h * Z + cz, Z - cz, zz, DESC, ROWS, COL_Z)
                        W += tl.sum(X * tl.trans(kb).to(tl.float32), 1)
                    else:
                        W = W * decay
                    at_end = ends + (((block0 + c // M).to(tl.int64) * H + h) * ND + id) * Z + cz + zz
                    tl.store(at_end, W * scale, mask=cz + zz < Z)
                else:
                    save_block(blocks, S, (block0 + c // M) * H + h, cz, cd, zz, d, Z, D, BLOCKS_DESC, False)
        zt = tl.trans(zb)
        if is_near:
            P = tl.dot(yb, tl.trans(xb), input_precision=IP)  # rows: the token that is summed over; columns: the one computed
            if REV:
                P = tl.where(ri > ci if EXCL else ri >= ci, P, 0.0).to(BF)
            else:
                P = tl.where(ri < ci if EXCL else ri <= ci, P, 0.0).to(BF)
            X = tl.dot(zt, P, X, input_precision=IP)
        X = tl.trans(X * scale)
        store_tile(o, X, id * BT + row, id.to(tl.int64) * BT + row, ok, H * Z, h * Z + cz, Z - cz, zz, STORE, ROWS, COL_Z)
        if FAR:
            if not is_near:
                S = S * decay[:, None]
        if not REV:
            pending = tl.where(is_near, decay, 1.0)
        S = tl.dot(zt, yb.to(BF), S, input_precision=IP)


@triton.jit
def finish_kernel(
    qs, ks, g, near, X, Y, ends, dq, dk, dg, cu, T, BT, N, stride_g, floor, H, Hg, K, NK, ND,
    BK: tl.constexpr, C: tl.constexpr, M: tl.constexpr, EXCL: tl.constexpr, FAR: tl.constexpr, CHOOSE: tl.constexpr,
    GATE: tl.constexpr, ROWS: tl.constexpr, COL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dq = e^E dq~, dk = e^-E dk~ and dg from X, Y [ND, B*T, H, K] of the sweeps; in far chunks added to what stands there.

    CHOOSE: with FAR only the blocks that contain a chunk that is not near, without it only the others.
    """
    ik = tl.program_id(0) % NK
    h = tl.program_id(0) // NK % H
    block = tl.program_id(0) // (NK * H)
    n, first, length, begin = block_owner(cu, block, T, N, C * M, PACKED)
    chunks = (tl.minimum(length - begin, C * M) + C - 1) // C
    chunk0 = first_block(cu, n, T, C, PACKED) + begin // C
    mine = begin < length
    if CHOOSE:
        i = tl.arange(0, M)
        flags = tl.load(near + ((chunk0 + i).to(tl.int64) * H + h) * NK + ik, mask=i < chunks, other=1)
        mine = mine & ((tl.min(flags) == 0) == FAR)
    if mine:
        I: tl.constexpr = C // OCTETS
        ck = ik * BK
        d = ck + tl.arange(0, BK)
        column = h * K + ck
        running = tl.zeros([BK], tl.float32)
        if GATE:
            for id in range(0, ND):
                running += tl.load(ends + ((block.to(tl.int64) * H + h) * ND + id) * K + d, mask=d < K, other=0.0)
        for j in range(0, chunks):
            c = chunks - 1 - j
            start = begin + c * C
            row = first + start
            left = length - start
            gb = log_decays(g, row, stride_g, (h // (H // Hg)) * K + ck, left, K - ck, floor, I, BK, ROWS, COL)
            E, before, whole = exponents(gb)
            is_near = True
            base = tl.zeros([BK], tl.float32)
            if FAR:
                is_near = tl.load(near + ((chunk0 + c).to(tl.int64) * H + h) * NK + ik) != 0
                base = tl.where(is_near, 0.0, whole)
            x = tl.zeros([I, OCTETS, BK], tl.float32)
            for id in range(0, ND):
                x += load_octets(X, id * BT + row, H * K, column, left, K - ck, I, BK, ROWS, COL)
            out = x * tl.exp2((E - gb if EXCL else E) * LOG2E)
            if FAR:
                if not is_near:
                    out += load_octets(dq, row, H * K, column, left, K - ck, I, BK, ROWS, COL)
            store_octets(dq, out, row, H * K, column, left, K - ck, I, BK, ROWS, COL)
            y = tl.zeros([I, OCTETS, BK], tl.float32)
            for id in range(0, ND):
                y += load_octets(Y, id * BT + row, H * K, column, left, K - ck, I, BK, ROWS, COL)
            out = y * tl.exp2((base[None, None, :] - E) * LOG2E)
            if FAR:
                if not is_near:
                    out += load_octets(dk, row, H * K, column, left, K - ck, I, BK, ROWS, COL)
            store_octets(dk, out, row, H * K, column, left, K - ck, I, BK, ROWS, COL)
            if GATE:
                wq = x * load_octets(qs, row, H * K, column, left, K - ck, I, BK, ROWS, COL).to(tl.float32)
                wk = y * load_octets(ks, row, H * K, column, left, K - ck, I, BK, ROWS, COL).to(tl.float32)
                if FAR:
                    if is_near:
                        G, total = later(wq - wk)
                        G += running[None, None, :]
                    else:  # what it sends beyond its block may be far larger than its own pairs: none of it is taken away again
                        G, total = later(wq)
                        sent, sent_total = earlier(wk)
                        running -= tl.where(j > 0, sent_total, 0.0)
                        G += sent + running[None, None, :]
                        G += load_octets(dg, row, H * K, column, left, K - ck, I, BK, ROWS, COL)
                else:
                    G, total = later(wq - wk)
                    G += running[None, None, :]
                running += total
                if EXCL:
                    G -= wq
                store_octets(dg, G, row, H * K, column, left, K - ck, I, BK, ROWS, COL)


@triton.jit
def halves(E, Eq, octets, HALF: tl.constexpr):
    """Which tokens are in the later halves of blocks of 2 HALF tokens; their factors e^{Eq - a}, the others' e^{a - E}.

    E, Eq in base 2. A sum above -96 keeps the bits of its power in a near chunk: only an integer power of two is added.
    """
    I: tl.constexpr = E.shape[0]
    octet = tl.arange(0, OCTETS)[None, :, None]
    token = tl.arange(0, I)[:, None, None]
    middle = tl.zeros_like(E)
    if HALF >= I:
        HO: tl.constexpr = HALF // I
        for b in tl.static_range(0, OCTETS // (2 * HO)):
            x = tl.sum(tl.where(tl.arange(0, OCTETS)[:, None] == b * 2 * HO + HO, octets, 0.0), 0)
            middle = tl.where(octet // (2 * HO) == b, x[None, None, :], middle)
        after = octet // HO % 2 == 1
    else:
        for b in tl.static_range(0, I // (2 * HALF)):
            x = tl.sum(tl.where(token == b * 2 * HALF + HALF - 1, E, 0.0), 0)
            middle = tl.where(token // (2 * HALF) == b, x[None, :, :], middle)
        after = token // HALF % 2 == 1
    a = tl.ceil(middle)
    return after, shifted(tl.where(after, Eq, -E), tl.where(after, -a, a))


@triton.jit
def shifted(e, n):
    """2^(e + n), n an integer: where |e| <= 96 with the bits of 2^e, and at most 2^96."""
    return tl.where(tl.abs(e) <= NEAR, tl.exp2(e) * tl.exp2(n), tl.exp2(tl.minimum(e + n, NEAR)))


@triton.jit
def far_kernel(
    q, k, v, do, g, near, pairs, dq, dk, dg, cu, T, BT, N, stride_q, stride_k, stride_v, stride_do, stride_g, floor,
    scale, H, Hq, Hk, Hv, Hg, K, V, NK, NV, NF, count, each,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, EXCL: tl.constexpr, GRAD: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, COL: tl.constexpr, PACKED: tl.constexpr, SCAN: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Of the chunks that are not near: pairs [chunks, H, NK, C, C], or with GRAD what they add to dq, dk and dg.

    near [chunks, H, NF]: a flag serves NK / NF tiles. A program has `each` <= SCAN of the `count` = chunks * H * NK tiles; nearly
    always none of them is far.
    """
    I: tl.constexpr = C // OCTETS
    BF: tl.constexpr = pairs.dtype.element_ty
    first_tile = tl.program_id(0) * each
    i = first_tile + tl.arange(0, SCAN)
    flags = tl.load(near + i // NK * NF + i % NK * NF // NK, mask=(i < first_tile + each) & (i < count), other=1)
    if tl.min(flags) == 0:
        r = tl.arange(0, C)
        ri = r[:, None]
        ci = r[None, :]
        vv = tl.arange(0, BV)
        for t in range(0, tl.minimum(each, count - first_tile)):
            tile = first_tile + t
            chunk = tile // (NK * H)
            h = (tile // NK) % H
            ck = tile % NK * BK
            first, length, begin = block_range(cu, chunk, T, N, C, PACKED)
            if begin < length:
                if tl.load(near + tile // NK * NF + tile % NK * NF // NK) == 0:
                    row = first + begin
                    left = length - begin
                    ok = r < left
                    qb = load_octets(q, row, stride_q, (h // (H // Hq)) * K + ck, left, K - ck, I, BK, ROWS, COL)
                    kb = load_octets(k, row, stride_k, (h // (H // Hk)) * K + ck, left, K - ck, I, BK, ROWS, COL)
                    gb = log_decays(g, row, stride_g, (h // (H // Hg)) * K + ck, left, K - ck, floor, I, BK, ROWS, COL)
                    E, before, whole = exponents(gb)
                    Eq = (E - gb if EXCL else E) * LOG2E
                    before = before * LOG2E
                    E = E * LOG2E
                    if GRAD:
                        P = tl.zeros([C, C], tl.float32)  # [later, earlier] and the other way
                        R = tl.zeros([C, C], tl.float32)
                        for iv in range(0, NV):
                            cv = iv * BV
                            vb = load_tile(v, row, ok, stride_v, (h // (H // Hv)) * V + cv, V - cv, vv, False, True, True)
                            ub = load_tile(do, row, ok, stride_do, h * V + cv, V - cv, vv, False, True, True)
                            P = tl.dot(ub, tl.trans(vb), P, input_precision=IP)
                            R = tl.dot(vb, tl.trans(ub), R, input_precision=IP)
                        dq_own = tl.zeros([I, OCTETS, BK], tl.float32)
                        dk_own = tl.zeros([I, OCTETS, BK], tl.float32)
                        wq = tl.zeros([I, OCTETS, BK], tl.float32)
                        wk = tl.zeros([I, OCTETS, BK], tl.float32)
                        if not EXCL:
                            own = tl.sum(tl.where(ri == ci, P, 0.0), 1) * scale
                            own = tl.permute(tl.reshape(own, [OCTETS, I]), 1, 0)[:, :, None]
                            dq_own += own * kb.to(tl.float32)
                            dk_own += own * qb.to(tl.float32)
                    elif not EXCL:
                        a = tl.ceil(E)
                        qs = in_order((qb * shifted(E, -a)).to(BF))
                        ks = in_order((kb * shifted(-E, a)).to(BF))
                        A = tl.where(ri == ci, tl.dot(ks, tl.trans(qs), input_precision=IP), 0.0)
                    else:
                        A = tl.zeros([C, C], tl.float32)
                    for level in tl.static_range(0, 6):
                        half = C >> (level + 1)
                        after, f = halves(E, Eq, before, C >> (level + 1))
                        x = (tl.where(after, qb, kb) * f).to(BF)
                        xs = in_order(x)
                        pair = (ri // (2 * half) == ci // (2 * half)) & (ri // half < ci // half)
                        if GRAD:
                            turned = (ri // (2 * half) == ci // (2 * half)) & (ri // half > ci // half)
                            W = tl.where(turned, P, tl.where(pair, R, 0.0)).to(BF)
                            Y = by_octet(tl.dot(W, xs, input_precision=IP)) * scale
                            dq_own += tl.where(after, Y * f, 0.0)
                            dk_own += tl.where(after, 0.0, Y * f)
                            if GATE:
                                w = Y * x.to(tl.float32)
                                wq += tl.where(after, w, 0.0)
                                wk += tl.where(after, 0.0, w)
                        else:
                            A = tl.where(pair, tl.dot(xs, tl.trans(xs), input_precision=IP), A)
                    if GRAD:
                        store_octets(dq, dq_own, row, H * K, h * K + ck, left, K - ck, I, BK, ROWS, COL)
                        store_octets(dk, dk_own, row, H * K, h * K + ck, left, K - ck, I, BK, ROWS, COL)
                        if GATE:
                            G, total = later(wq - wk)
                            if EXCL:
                                G -= wq
                            store_octets(dg, G, row, H * K, h * K + ck, left, K - ck, I, BK, ROWS, COL)
                    else:
                        tl.store(pairs + tile.to(tl.int64) * (C * C) + ri * C + ci, A.to(BF))
