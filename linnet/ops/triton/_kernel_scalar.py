"""Linear attention without decay or with one decay per head and token: one kernel body in four roles.

    out_t = scale * sum_{s} Gamma(t, s) (x_t . y_s) z_s + (decayed initial state)^T x_t      state S = sum decayed y_s z_s^T
    o:  (x, y, z) = (q, k, v)      dq: (do, v, k)      forward in time, s <= t
    dk: (v, do, q)                 dv: (k, q, do)      backward in time (REV), s >= t

Grid: one program per (row of the state, split of its time, head, block of the contraction width D, tile of the width Z); it walks
its chunks of C tokens and keeps its tile of the state in fp32 registers. Device memory is read once per tile; nothing of size
T x C or T/C x K x V is stored, except in the dq role when the gate needs a gradient: one state per L = C*M tokens (16 bit), and
where `gradients_kernel`, which takes over for calls with a normalizer, wants the states at the starts of all chunks (`states`).

Gain. A token's log-gain i multiplies what it writes: its sum of decays G becomes G - i wherever it is a key.

Normalizer. n_t = scale * sum_s Gamma(t, s) q_t . k_s is one more value column, of ones: o has one more output, by which the others
are divided, |n| or at least `low` (FLOOR), or n + low. Its part of the state is a vector, s, over D.

Gate. dg_t = D_end + sum_{t' >= t, same block} (q.dq - k.dk)_{t'}, with D_end = <S, R> at the end of the block of L tokens (formed
without cancellation, see `gate_kernel`): the sum never runs over more than L tokens, both roles round the same products
in the same way, and the pairs t' = t, which would cancel, are left out of both.

Never feed a transposed 16-bit accumulator to a product here: Triton 3.4-3.7.0 miscompiles it on sm_90.
"""

import triton
import triton.language as tl

from linnet.ops.triton._kernel_common import (
    block_range,
    first_block,
    load_block,
    load_sums,
    load_tile,
    save_block,
    save_state,
    split_range,
    state_at,
    store_tile,
)

LOG2E = tl.constexpr(1.4426950408889634)
RESET = tl.constexpr(-160.0)  # 2^-160 is zero in fp32: below it a decay is a reset


@triton.jit
def scalar_role(
    x, y, z, G_sum, P_sum, C_sum, K_sum, o, other, weights, S_in, S_out, states, products, ones, low, s_in, s_out, s_states, cu,
    T, BT, G_width, chunk_count, stride_x, stride_y, stride_z, stride_other, scale, scale_in, scale_out,
    H, Hx, Hy, Hz, Hg, Ho, H_in, H_out, D, Z, in_d, in_z, ND, NZ, NS,
    BD: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr, TR: tl.constexpr,
    REV: tl.constexpr, EXCL: tl.constexpr, DECAY: tl.constexpr, OUT: tl.constexpr, DESC: tl.constexpr, ROWS: tl.constexpr,
    COL_D: tl.constexpr, COL_Z: tl.constexpr, PACKED: tl.constexpr, GATE: tl.constexpr, HAS_IN: tl.constexpr, FIRST: tl.constexpr,
    HAS_OUT: tl.constexpr, OUT_DESC: tl.constexpr, STATES: tl.constexpr, STATES_DESC: tl.constexpr, F64: tl.constexpr,
    G_DESC: tl.constexpr, STORE: tl.constexpr, GAIN: tl.constexpr, ONES: tl.constexpr, ONES_IN: tl.constexpr, FLOOR: tl.constexpr,
    TOTAL: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One role. GATE: also write sum_z other * (out without s = t).

    STATES: 1 store, 2 multiply with the states before the last chunks of all blocks, [blocks, H, D, Z]; 3 store those that meet
    any chunk, [chunks, H, D, Z], chunks counted by blocks of M.
    S_in [rows*NS, H_in, K, V] (in_d, in_z: strides of D and Z) enters times scale_in, only into the first head of a group if
    FIRST; S_out is written times scale_out. Without OUT there is only the state, with TOTAL also its total decay (`weights`).
    ONES: `ones` [H, BT] is n, written by o, or with REV dn, by which the queries are weighed; low [Hg, BT]; s_in, s_out and
    s_states like S_in, S_out and states.
    """
    pid = tl.program_id(0)
    iz = pid % NZ
    id = (pid // NZ) % ND
    h = (pid // (NZ * ND)) % H
    part = pid // (NZ * ND * H)
    sp = part % NS
    n = part // NS
    row0, length, begin = split_range(cu, n, sp, T, NS, C * M, PACKED)
    d = tl.arange(0, BD)
    zz = tl.arange(0, BZ)
    cd = id * BD
    cz = iz * BZ
    r = tl.arange(0, C)
    DT: tl.constexpr = y.dtype.element_ty if not DESC else y.dtype
    OT: tl.constexpr = o.dtype if STORE else (o.dtype.element_ty if OUT else tl.float32)
    ST: tl.constexpr = tl.bfloat16 if DT == tl.float16 else DT  # a state may leave the range of fp16
    GT: tl.constexpr = tl.float64 if F64 else tl.float32
    if TR:
        out_i = r[None, :]
        in_i = r[:, None]
        S = tl.zeros([BZ, BD], tl.float32)
    else:
        out_i = r[:, None]
        in_i = r[None, :]
        S = tl.zeros([BD, BZ], tl.float32)
    if HAS_IN:
        at, mask = state_at(S_in, part * H_in + h // (H // H_in), cd + d, cz + zz, D, Z, in_d, in_z, TR)
        if FIRST:
            mask = mask & (h % (H // H_in) == 0)
        S = tl.load(at, mask=mask, other=0.0).to(tl.float32) * scale_in
    if ONES:  # columns 0 and 1 are sums with the high and the low parts of the weights
        s = tl.zeros([BD, 16], tl.float32)
        column = tl.arange(0, 16)[None, :]
        if ONES_IN:
            mask = cd + d < D
            if FIRST:
                mask = mask & (h % (H // H_in) == 0)
            x_in = tl.load(s_in + (part * H_in + h // (H // H_in)) * D + cd + d, mask=mask, other=0.0) * scale_in
            s = tl.where(column == 0, x_in[:, None], s)
    chunks = (length + C - 1) // C
    block0 = first_block(cu, n, T, C * M, PACKED) + begin // (C * M)
    total = tl.zeros([1], GT)
    if HAS_OUT and not OUT_DESC:
        if chunks == 0:
            save_state(S_out, S * scale_out, part, h, H, H_out, cd + d, cz + zz, D, Z, in_d, in_z, TR)
    for j in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - j if REV else j
        row = row0 + c * C
        ok = c * C + r < length
        yb = load_tile(y, row, ok, stride_y, (h // (H // Hy)) * D + cd, D - cd, d, DESC, ROWS, COL_D)
        zb = load_tile(z, row, ok, stride_z, (h // (H // Hz)) * Z + cz, Z - cz, zz, DESC, ROWS, COL_Z)
        if DECAY:
            hg = h // (H // Hg)
            G = load_sums(G_sum, hg, row, r, ok, G_width, C, G_DESC)
            if EXCL:
                P = load_sums(P_sum, hg, row, r, ok, G_width, C, G_DESC)
            else:
                P = G
            if GAIN:
                G = load_sums(K_sum, hg, row, r, ok, G_width, C, G_DESC)
            GC = tl.load(C_sum + hg.to(tl.int64) * chunk_count + (block0 * M + c))
            w_query = tl.exp2(P.to(tl.float32))
            w_key = tl.exp2(tl.minimum(GC - G, 0.0).to(tl.float32))
            carry = tl.exp2(GC.to(tl.float32))
        if OUT:
            xb = load_tile(x, row, ok, stride_x, (h // (H // Hx)) * D + cd, D - cd, d, DESC, ROWS and not DESC, COL_D)
            if TR:
                A = tl.dot(yb, tl.trans(xb), input_precision=IP)
                O = tl.dot(S.to(ST), tl.trans(xb.to(ST)), input_precision=IP)
            else:
                A = tl.dot(xb, tl.trans(yb), input_precision=IP)
                O = tl.dot(xb.to(ST), S.to(ST), input_precision=IP)
            if EXCL or GATE:
                keep = out_i < in_i if REV else out_i > in_i
            else:
                keep = out_i <= in_i if REV else out_i >= in_i
            if GATE and not EXCL:
                own = tl.sum(tl.where(out_i == in_i, A, 0.0), 0 if TR else 1)
            if DECAY:
                if TR != REV:
                    e = P[None, :] - G[:, None]
                else:
                    e = P[:, None] - G[None, :]
                A = A * tl.exp2(tl.minimum(e, 0.0).to(tl.float32))
                w_out = w_key if REV else w_query
                O = O * (w_out[None, :] if TR else w_out[:, None])
            A = tl.where(keep, A, 0.0)
            if ONES:
                high = s.to(ST)
                count = tl.dot(xb.to(ST), high, input_precision=IP)
                count = tl.sum(tl.dot(xb.to(ST), (s - high.to(tl.float32)).to(ST), count, input_precision=IP), 1)
                if DECAY:
                    count = count * w_query
                count = (count + tl.sum(A, 0 if TR else 1)) * scale
            A = A.to(DT)
            if GATE:
                ub = load_tile(other, row, ok, stride_other, (h // (H // Ho)) * Z + cz, Z - cz, zz, DESC, ROWS, COL_Z).to(
                    tl.float32
                )
                if TR:
                    ub = tl.trans(ub)
                wp = weights + (id * NZ + iz).to(tl.int64) * H * BT + h.to(tl.int64) * BT + row + r
            if STATES == 2:
                inside = tl.zeros([C], tl.float32)
                ends = (c + 1) % M == 0 or c == chunks - 1
                if ends:  # what a chunk sends beyond its block may be far larger than its own pairs: weighed apart
                    SR = (
                        tl.sum(
                            tl.sum(S * load_block(states, (block0 + c // M) * H + h, cd, cz, d, zz, D, Z, STATES_DESC, TR), 1), 0
                        )
                        * carry
                    )
                    tl.store(products + ((block0 + c // M).to(tl.int64) * H + h) * (ND * NZ) + id * NZ + iz, SR * scale)
                    tl.store(wp + h.to(tl.int64) * 0 + ND * NZ * H * BT, tl.sum(ub * O, 0 if TR else 1) * scale, mask=ok)
                    if TR:
                        inside = tl.sum(ub * tl.dot(tl.trans(zb), A, input_precision=IP), 0)
                    else:
                        inside = tl.sum(ub * tl.dot(A, zb, input_precision=IP), 1)
            if TR:
                O = tl.dot(tl.trans(zb), A, O, input_precision=IP)
            else:
                O = tl.dot(A, zb, O, input_precision=IP)
            if GATE:
                weight = tl.sum(ub * O, 0 if TR else 1)
                if STATES == 2:
                    weight = tl.where(ends, inside, weight)
                tl.store(wp, weight * scale, mask=ok)
                if not EXCL:
                    if TR:
                        own = own[None, :] * tl.trans(zb).to(tl.float32)
                    else:
                        own = own[:, None] * zb.to(tl.float32)
                    O += own
            if ONES:
                if iz == 0:
                    tl.store(ones + h.to(tl.int64) * BT + row + r, count, mask=ok)
                least = tl.load(low + (h // (H // Hg)).to(tl.int64) * BT + row + r, mask=ok, other=1.0)
                if FLOOR:
                    count = tl.maximum(tl.abs(count), least)
                else:
                    count += least
                count = 1.0 / count
                O = O * (count[None, :] if TR else count[:, None])
            ob = (O * scale).to(OT)
            if TR:
                ob = tl.trans(ob)
            store_tile(o, ob, id * BT + row, id.to(tl.int64) * BT + row, ok, H * Z, h * Z + cz, Z - cz, zz, STORE, ROWS, COL_Z)
        if STATES == 1:
            if (c + 1) % M == 0 or c == chunks - 1:
                save_block(states, S, (block0 + c // M) * H + h, cd, cz, d, zz, D, Z, STATES_DESC, TR)
        if STATES == 3:
            save_block(states, S, (block0 * M + c) * H + h, cd, cz, d, zz, D, Z, STATES_DESC, TR)
            if ONES:
                if iz == 0:
                    tl.store(s_states + ((block0 * M + c).to(tl.int64) * H + h) * D + cd + d, tl.sum(s, 1), mask=cd + d < D)
        if DECAY:
            w_in = w_query if REV else w_key
            if TR:
                zt = (tl.trans(zb) * w_in[None, :]).to(DT)
            else:
                zt = (zb * w_in[:, None]).to(DT)
            S = S * carry
            if TOTAL:
                total += GC
        else:
            zt = tl.trans(zb) if TR else zb
        if ONES:
            if DECAY:
                s = s * carry
            if REV:
                w = tl.load(ones + h.to(tl.int64) * BT + row + r, mask=ok, other=0.0)
            else:
                w = tl.full([C], 1.0, tl.float32)
            if DECAY:
                w = w * w_in
            high = w.to(ST)
            rest = (w - high.to(tl.float32)).to(ST)
            w = tl.where(column == 0, high[:, None], tl.where(column == 1, rest[:, None], tl.zeros([C, 16], ST)))
            s = tl.dot(tl.trans(yb.to(ST)), w, s, input_precision=IP)
        if TR:
            S = tl.dot(zt, yb, S, input_precision=IP)
        else:
            S = tl.dot(tl.trans(yb), zt, S, input_precision=IP)
        if HAS_OUT and not OUT_DESC:  # in the loop: a store behind it would impose its layout on the state in every iteration
            if j == chunks - 1:
                save_state(S_out, S * scale_out, part, h, H, H_out, cd + d, cz + zz, D, Z, in_d, in_z, TR)
    if ONES and HAS_OUT and STATES == 0:
        if iz == 0 and h % (H // H_out) == 0:
            tl.store(s_out + (part * H_out + h // (H // H_out)) * D + cd + d, tl.sum(s, 1) * scale_out, mask=cd + d < D)
    if OUT_DESC:
        rep = H // H_out
        if h % rep == 0:
            S_out.store([(part * H_out + h // rep) * D + cd, cz], tl.trans(S * scale_out) if TR else S * scale_out)
    if TOTAL:
        if id == 0 and iz == 0:
            tl.store(weights + (part * H + h) + tl.arange(0, 1), total.to(tl.float32))


@triton.jit
def sums_kernel(
    g, gain, G_sum, P_sum, C_sum, K_sum, cu, T, BT, N, stride_g, stride_gain, chunk_count, C: tl.constexpr, M: tl.constexpr,
    EXCL: tl.constexpr, PACKED: tl.constexpr, F64: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """Base-2 sums of log-decays from the start of every chunk, through the token (G) and before it (P), and over every chunk;
    K = G - gain where there is one."""
    block = tl.program_id(0)
    h = tl.program_id(1)
    first, length, begin = block_range(cu, block, T, N, C * M, PACKED)
    if begin < length:
        r = begin + tl.arange(0, M)[:, None] * C + tl.arange(0, C)[None, :]
        ok = r < length
        rows = (first + r).to(tl.int64)
        GT: tl.constexpr = tl.float64 if F64 else tl.float32
        gv = tl.maximum(tl.load(g + rows * stride_g + h, mask=ok, other=0.0).to(GT) * LOG2E, RESET)
        G = tl.cumsum(gv, 1)
        tl.store(G_sum + h.to(tl.int64) * BT + rows, G, mask=ok)
        tl.store(C_sum + h.to(tl.int64) * chunk_count + block * M + tl.arange(0, M), tl.sum(gv, 1))
        if EXCL:
            tl.store(P_sum + h.to(tl.int64) * BT + rows, G - gv, mask=ok)
        if GAIN:
            i = tl.maximum(tl.load(gain + rows * stride_gain + h, mask=ok, other=0.0).to(GT) * LOG2E, RESET)
            tl.store(K_sum + h.to(tl.int64) * BT + rows, G - i, mask=ok)


@triton.jit
def decayed_maximum(g1, m1, g2, m2):
    return g1 + g2, tl.maximum(m1 + g2, m2)


@triton.jit
def maximum_kernel(
    g, i, m, previous, cu, T, stride_g, H, Hg, HAS_G: tl.constexpr, PACKED: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """m_t = max(m_{t-1} + g_t, i_t) and m_{t-1} [B*T, H], from -inf at the start of every row; i [B*T, H]."""
    h = tl.program_id(0) % H
    first, length, _ = split_range(cu, tl.program_id(0) // H, 0, T, 1, C, PACKED)
    r = tl.arange(0, C)
    top = float("-inf")
    for c in tl.range(0, length, C):
        ok = c + r < length
        row = (first + c + r).to(tl.int64)
        x = tl.load(i + row * H + h, mask=ok, other=float("-inf"))
        d = tl.load(g + row * stride_g + h // (H // Hg), mask=ok, other=0.0) if HAS_G else tl.zeros([C], tl.float32)
        before = tl.where(r == 0, top, float("-inf"))  # enters as a maximum of the first token
        total, best = tl.associative_scan((d, tl.maximum(x, before + d)), 0, decayed_maximum)
        tl.store(m + row * H + h, best, mask=ok)
        tl.store(previous + row * H + h, top, mask=ok & (r == 0))
        tl.store(previous + (row + 1) * H + h, best, mask=(c + r + 1 < length) & (r + 1 < C))
        top = tl.max(tl.where(r == C - 1, best, float("-inf")), 0)


@triton.jit
def gate_kernel(
    query, key, products, dg, dgain, cu, T, BT, N, H, Hg, NQ, NK, L: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    EXCL: tl.constexpr, PACKED: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """dg and, with a gain, dgain = k.dk [B*T, Hg] from partial sums query [NQ, H, B*T], key [2 or 3, NK, H, B*T].

    dg_t = <S, R> around the last chunk of C in t's block of L + sum of what tokens before t in that chunk send beyond it
           + sum_{t' >= t} (q.dq - k.dk)_{t'}, without what the last chunk sends beyond the block (that is key[1]): no
    large terms cancel. key[2], with a gain: the pairs t' = t, which dgain has and dg has not. <S, R>, with the decay in between,
    comes as products [blocks, H, NK]; blocks are counted by M.
    """
    block = tl.program_id(0)
    hg = tl.program_id(1)
    first, length, begin = block_range(cu, block // M, T, N, L * M, PACKED)
    begin += block % M * L
    if begin < length:
        r = tl.arange(0, L)
        ok = begin + r < length
        rows = (first + begin + r).to(tl.int64)
        last = (tl.minimum(length - begin, L) - 1) // C * C  # start of the block's last chunk
        later: tl.constexpr = 1 if EXCL else 0  # a read before the decay of t counts from the next token on
        if EXCL:
            ok_query = ok & (begin + r + 1 < length) & (r + 1 < L)
        else:
            ok_query = ok
        acc = tl.zeros([L], tl.float32)
        gains = tl.zeros([L], tl.float32)
        for i in range(0, H // Hg):
            h = hg * (H // Hg) + i
            wq = tl.zeros([L], tl.float32)
            wk = tl.zeros([L], tl.float32)
            for p in range(0, NQ):
                wq += tl.load(query + (p * H + h).to(tl.int64) * BT + rows + later, mask=ok_query, other=0.0)
            ws = tl.zeros([L], tl.float32)
            D = 0.0
            for p in range(0, NK):
                wk += tl.load(key + (p * H + h).to(tl.int64) * BT + rows, mask=ok, other=0.0)
                state_part = key + ((NK + p) * H + h).to(tl.int64) * BT + rows
                ws += tl.load(state_part - 1, mask=ok & (r > last), other=0.0)
                if GAIN:
                    gains += tl.load(state_part, mask=ok & (r >= last), other=0.0)
                    gains += tl.load(key + ((2 * NK + p) * H + h).to(tl.int64) * BT + rows, mask=ok, other=0.0)
                D += tl.load(products + (block.to(tl.int64) * H + h) * NK + p)
            acc += tl.cumsum(wq - wk, 0, reverse=True) + tl.cumsum(ws, 0) + D
            gains += wk
        tl.store(dg + rows * Hg + hg, acc, mask=ok)
        if GAIN:
            tl.store(dgain + rows * Hg + hg, gains, mask=ok)


@triton.jit
def undivided_kernel(
    dh, h, n, low, dn_in, do, dn, BT, stride, V, Hg, H, FLOOR: tl.constexpr, ADD: tl.constexpr, R: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Backward of h = o / d, d = max(|n|, low) or n + low: do = dh / d, dn = dn_in - sign(n) (h . dh) / d where d depends on n."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    head = tl.program_id(1)
    v = tl.arange(0, BV)
    ok = row < BT
    mask = ok[:, None] & (v < V)[None, :]
    at = row.to(tl.int64)[:, None] * (H * V) + head * V + v[None, :]
    g = tl.load(dh + row.to(tl.int64)[:, None] * stride + head * V + v[None, :], mask=mask, other=0.0).to(tl.float32)
    flow = tl.sum(g * tl.load(h + at, mask=mask, other=0.0).to(tl.float32), 1)
    count = tl.load(n + head.to(tl.int64) * BT + row, mask=ok, other=1.0)
    least = tl.load(low + (head // (H // Hg)).to(tl.int64) * BT + row, mask=ok, other=1.0)
    if FLOOR:
        d = tl.maximum(tl.abs(count), least)
        flow = tl.where(tl.abs(count) > least, tl.where(count < 0, -flow, flow), 0.0)
    else:
        d = count + least
    tl.store(do + at, (g / d[:, None]).to(do.dtype.element_ty), mask=mask)
    out = -flow / d
    if ADD:
        out += tl.load(dn_in + head.to(tl.int64) * BT + row, mask=ok, other=0.0)
    tl.store(dn + head.to(tl.int64) * BT + row, out, mask=ok)


@triton.jit
def join_kernel(
    local, decay, S_in, start, final, NS, H, Hd, H_in, K, V, in_scale, out_scale, GROUPS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, REV: tl.constexpr, DECAY: tl.constexpr, HAS_IN: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """States at the starts of NS splits from their local sums: start_{i+1} = decay_i start_i + local_i (REV: from the last split).

    local, start [rows*NS, H, K, V]; decay [rows*NS, Hd, 1 or K] in base-2 logarithms;
    S_in [rows, H_in, K, V] or none; final [rows, H, K, V].
    """
    iv = tl.program_id(0)
    h = tl.program_id(1) % H
    n = tl.program_id(1) // H
    ik = tl.program_id(2)
    k = ik * BK + tl.arange(0, BK)
    v = iv * BV + tl.arange(0, BV)
    mask = (k < K)[:, None] & (v < V)[None, :]
    at = k[:, None] * V + v[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if HAS_IN:
        rep = H // H_in
        own = mask
        if FIRST:
            own = mask & (h % rep == 0)
        S = tl.load(S_in + (n * H_in + h // rep).to(tl.int64) * K * V + at, mask=own, other=0.0).to(tl.float32) * in_scale
    for i in range(0, NS):
        sp = NS - 1 - i if REV else i
        index = ((n * NS + sp) * H + h).to(tl.int64)
        tl.store(start + index * K * V + at, S, mask=mask)
        S_local = tl.load(local + index * K * V + at, mask=mask, other=0.0)
        if DECAY:
            e = tl.load(decay + ((n * NS + sp) * Hd + h // (H // Hd)).to(tl.int64) * GROUPS + k % GROUPS, mask=k < K, other=0.0)
            S = S * tl.exp2(e)[:, None]
        S = S + S_local
    tl.store(final + (n * H + h).to(tl.int64) * K * V + at, S * out_scale, mask=mask)
