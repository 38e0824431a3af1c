"""Gradients of linear attention with a normalizer, all of a chunk in one program.

With S the state before the chunk and R the adjoint of the state after it, both kept by passes of `scalar_role`, P_ts = do_t . v_s
and A_ts = q_t . k_s, decayed by Gamma_ts = e^{G_t - G_s} for s <= t:
    dq_t = scale (e^{G_t} do_t S^T       + sum_s Gamma_ts P_ts k_s)
    dk_s = scale (e^{G_C - G_s} v_s R^T  + sum_t Gamma_ts P_ts q_t)
    dv_s = scale (e^{G_C - G_s} k_s R    + sum_t Gamma_ts A_ts do_t)
The normalizer is one more value column, of ones, whose do is dn: P_ts becomes P_ts + dn_t, and its parts of the states are vectors
over K. Gain: G_s becomes G_s - i_s; its gradient is what the token sends.

Gate. W = Gamma A P is in registers, and a pair t > s counts for all gates in between, by its row and by its column (`gate_kernel`):
nothing cancels inside a chunk.
"""

import triton
import triton.language as tl

from linnet.ops.triton._kernel_common import block_range, load_sums, load_tile, state_at, store_tile


@triton.jit
def gradients_kernel(
    q, k, v, do, G_sum, C_sum, K_sum, S, R, dq, dk, dv, query, key, products, dn, s_parts, r_parts, cu,
    T, BT, G_width, N, stride_q, stride_k, stride_v, stride_do, scale, H, Hq, Hk, Hv, Hg, HS, K, V,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, M: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr,
    GAIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv [B*T, H, K or V]; with GATE, query [H, B*T], key [2, or 3 with a gain, H, B*T] and products [chunks, H].

    S [chunks, HS, K, V], R [chunks, H, K, V], dn [H, B*T], s_parts [chunks, HS, K], r_parts [chunks, H, K]; chunks are counted by
    blocks of M. Operands are loaded again where that is cheaper than keeping them.
    """
    h = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    first, length, begin = block_range(cu, chunk // M, T, N, C * M, PACKED)
    begin += chunk % M * C
    if begin < length:
        row = first + begin
        r = tl.arange(0, C)
        ok = begin + r < length
        ri = r[:, None]
        ci = r[None, :]
        d = tl.arange(0, BK)
        z = tl.arange(0, BV)
        cq = (h // (H // Hq)) * K
        ck = (h // (H // Hk)) * K
        cv = (h // (H // Hv)) * V
        at_S = chunk * HS + h // (H // HS)
        at_R = chunk * H + h
        DT: tl.constexpr = q.dtype.element_ty
        ST: tl.constexpr = S.dtype.element_ty  # a state may leave the range of fp16
        dn_t = tl.load(dn + h.to(tl.int64) * BT + row + r, mask=ok, other=0.0)
        if DECAY:
            hg = h // (H // Hg)
            Gq = load_sums(G_sum, hg, row, r, ok, G_width, C, False)
            Gk = load_sums(K_sum, hg, row, r, ok, G_width, C, False) if GAIN else Gq
            GC = tl.load(C_sum + (hg * (tl.num_programs(0) // H) + chunk).to(tl.int64))
            w_query = tl.exp2(Gq.to(tl.float32))
            w_key = tl.exp2(tl.minimum(GC - Gk, 0.0).to(tl.float32))
        vb = load_tile(v, row, ok, stride_v, cv, V, z, False, ROWS, COLUMNS)
        ub = load_tile(do, row, ok, stride_do, h * V, V, z, False, ROWS, COLUMNS)
        kb = load_tile(k, row, ok, stride_k, ck, K, d, False, ROWS, COLUMNS)

        P = tl.dot(ub, tl.trans(vb), input_precision=IP) + dn_t[:, None]  # rows: the later token t; columns: the earlier one s
        if DECAY:
            P = P * tl.exp2(tl.minimum(Gq[:, None] - Gk[None, :], 0.0).to(tl.float32))
        P = tl.where(ri >= ci, P, 0.0).to(DT)
        X = tl.dot(ub.to(ST), tl.trans(kept_state(S, at_S, d, z, K, V, COLUMNS)), input_precision=IP)
        X += dn_t[:, None] * tl.load(s_parts + at_S.to(tl.int64) * K + d, mask=d < K, other=0.0)[None, :]
        if DECAY:
            X = X * w_query[:, None]
        if GATE:
            qb = load_tile(q, row, ok, stride_q, cq, K, d, False, ROWS, COLUMNS)
            weight_q = tl.sum(X * qb.to(tl.float32), 1)
        write_gradient(dq, X, P, kb, scale, row, ok, h, H, K, d, ROWS, COLUMNS, IP)

        qb = load_tile(q, row, ok, stride_q, cq, K, d, False, ROWS, COLUMNS)
        Rb = kept_state(R, at_R, d, z, K, V, COLUMNS)
        P = tl.dot(vb, tl.trans(ub), input_precision=IP) + dn_t[None, :]  # from here on the other way round
        A = tl.dot(kb, tl.trans(qb), input_precision=IP)
        if DECAY:
            decay = tl.exp2(tl.minimum(Gq[None, :] - Gk[:, None], 0.0).to(tl.float32))
            P = P * decay
        P = tl.where(ri <= ci, P, 0.0)
        if GATE:
            W = A * P
            own = tl.sum(tl.where(ri == ci, W, 0.0), 1)
            W = tl.where(ri < ci, W, 0.0)
            weight_q += tl.sum(W, 0)
            weight_k = tl.sum(W, 1)
        P = P.to(DT)
        if DECAY:
            A = A * decay
        A = tl.where(ri <= ci, A, 0.0).to(DT)
        X = tl.dot(kb.to(ST), Rb, input_precision=IP)
        if DECAY:
            X = X * w_key[:, None]
        write_gradient(dv, X, A, ub, scale, row, ok, h, H, V, z, ROWS, COLUMNS, IP)
        X = tl.dot(vb.to(ST), tl.trans(Rb), input_precision=IP)
        X += tl.load(r_parts + at_R.to(tl.int64) * K + d, mask=d < K, other=0.0)[None, :]
        if DECAY:
            X = X * w_key[:, None]
        if GATE:
            kb = load_tile(k, row, ok, stride_k, ck, K, d, False, ROWS, COLUMNS)
            beyond = tl.sum(X * kb.to(tl.float32), 1)
        write_gradient(dk, X, P, qb, scale, row, ok, h, H, K, d, ROWS, COLUMNS, IP)

        if GATE:
            at = h.to(tl.int64) * BT + row + r
            at_end = (H + h).to(tl.int64) * BT + row + r
            tl.store(query + at, weight_q * scale, mask=ok)
            tl.store(key + at, weight_k * scale, mask=ok)
            tl.store(key + at_end, beyond * scale, mask=ok)
            if GAIN:
                tl.store(key + (2 * H + h).to(tl.int64) * BT + row + r, own * scale, mask=ok)
            few: tl.constexpr = min(BK, 16)  # rows at a time: whole states would fill the registers
            D = tl.zeros([few], tl.float32)
            for e in range(0, K, few):
                at_d = e + tl.arange(0, few)
                ones = tl.load(s_parts + at_S.to(tl.int64) * K + at_d, mask=at_d < K, other=0.0)
                ones *= tl.load(r_parts + at_R.to(tl.int64) * K + at_d, mask=at_d < K, other=0.0)
                pair = kept_state(S, at_S, at_d, z, K, V, COLUMNS).to(tl.float32)
                pair *= kept_state(R, at_R, at_d, z, K, V, COLUMNS).to(tl.float32)
                D += ones + tl.sum(pair, 1)
            tl.store(products + at_R, tl.sum(D, 0) * tl.exp2(GC.to(tl.float32)) * scale)


@triton.jit
def kept_state(p, index, d, z, K, V, COLUMNS: tl.constexpr):
    at, mask = state_at(p, index, d, z, K, V, V, 1, False)
    if COLUMNS:
        x = tl.load(at, mask=mask, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def write_gradient(
    p, X, pairs, x, scale, row, ok, h, H, D, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IP: tl.constexpr
):  # fmt: skip
    """scale (X + pairs x), of head h, to p [B*T, H, D]."""
    X = (tl.dot(pairs, x, X, input_precision=IP) * scale).to(p.dtype.element_ty)
    store_tile(p, X, row, row.to(tl.int64), ok, H * D, h * D, D, d, False, ROWS, COLUMNS)
