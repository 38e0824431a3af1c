"""The delta rule with one decay per key channel: preparation and gradients (see _kernel_delta.py for the sweeps between them).

Inside a chunk a pair (t, s) decays by e^{sum of g over s+1..t}, per channel. FRAME: the caller declared log_decay >= -5; inside a
frame of 16 tokens the factors e^{E_t} and e^{-E_s} are anchored at the frame's start, between frames at the middle of the smallest
common aligned block of 2 h rows (h = 16, 32), where both factors are <= 1. Not FRAME: any decay, h = 1, 2, ..., C/2. All anchors
lie before the token that they serve. Sums of log-decays are products with 0/1 matrices (16-bit high and low parts).

gradients_vector writes dg of the chunk per channel: the pairs t = s are left out, rows and columns use the same rounded factors.
"""

import triton
import triton.language as tl

from linnet.ops.triton._kernel_common import block_range, load_tile, store_tile
from linnet.ops.triton._kernel_delta import chunk_rows, gate_column, state_tile, unit_lower_inverse

LOG2E = tl.constexpr(1.4426950408889634)
FRAME_ROWS = tl.constexpr(16)


@triton.jit
def chosen_sums(m, high, low, SPLIT: tl.constexpr, IP: tl.constexpr):
    """[C, channels] sums of log-decays chosen by the 0/1 matrix m [C, C], base 2."""
    x = tl.dot(m, high, input_precision=IP)
    if SPLIT:
        x = tl.dot(m, low, x, input_precision=IP)
    return x * LOG2E


@triton.jit
def choose(m, x, DT: tl.constexpr, SPLIT: tl.constexpr, IP: tl.constexpr):
    """m x for a 0/1 matrix m [C, C] and x [C, channels] in fp32, as high and low parts."""
    high = x.to(DT)
    y = tl.dot(m, high, input_precision=IP)
    if SPLIT:
        y = tl.dot(m, (x - high.to(tl.float32)).to(DT), y, input_precision=IP)
    return y


@triton.jit
def before_frame(gb, n, C: tl.constexpr):
    """Base-2 sum of the log-decays gb [C, BD] before frame n [BD]."""
    return tl.sum(tl.where((tl.arange(0, C) < n * FRAME_ROWS)[:, None], gb, 0.0), 0) * LOG2E


@triton.jit
def frame_factors(gb, C: tl.constexpr, BD: tl.constexpr):
    """The decay from the chunk's start to every row's frame, from there to the chunk's end [C, BD], and of the chunk [BD]."""
    f = tl.arange(0, C) // FRAME_ROWS
    total = before_frame(gb, C // FRAME_ROWS, C)
    start = tl.full([C, BD], 1.0, tl.float32)
    end = start * tl.exp2(total)[None, :]
    for n in tl.static_range(1, C // FRAME_ROWS):
        x = before_frame(gb, n, C)
        start = tl.where((f == n)[:, None], tl.exp2(x)[None, :], start)
        end = tl.where((f == n)[:, None], tl.exp2(total - x)[None, :], end)
    return start, end, tl.exp2(total)


@triton.jit
def frame_shift(gb, level: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """The decay between every row's frame and the middle of its block of 2 h rows, h = 2^level >= 16; 1 below [C, BD]."""
    f = tl.arange(0, C) // FRAME_ROWS
    shift = tl.full([C, BD], 1.0, tl.float32)
    if level > 3:
        for n in tl.static_range(0, C // FRAME_ROWS):
            middle = ((n >> (level - 3)) << (level - 3)) + (1 << (level - 4))
            if n != middle:
                x = tl.exp2(-tl.abs(before_frame(gb, n, C) - before_frame(gb, middle, C)))
                shift = tl.where((f == n)[:, None], x[None, :], shift)
    return shift


@triton.jit
def block_mask(C: tl.constexpr, level):
    """Pairs (t, s) with s before and t at or after the middle of the same aligned block of 2 h rows, h = 2^level."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return ((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) > (j >> level))


@triton.jit
def frame_mask(C: tl.constexpr, level: tl.constexpr):
    """`block_mask` for level >= 4; the pairs inside a frame for level 3."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if level == 3:
        m = (i // FRAME_ROWS == j // FRAME_ROWS) & (i >= j)
    else:
        m = block_mask(C, level)
    return m


@triton.jit
def halving_matrix(C: tl.constexpr, level, EXCL: tl.constexpr):
    """0/1 [C, C]: row t chooses the tokens between t and the middle of its block of 2 h rows (t itself only behind the middle)."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    middle = ((i >> (level + 1)) << (level + 1)) + (1 << level)
    last = (j < i) if EXCL else (j <= i)
    after = (i >= middle) & (j >= middle) & last
    before = (i < middle) & (j < middle) & (j > i)
    return after | before


@triton.jit
def prepare_vector(
    q, k, p, g, erase, write, inverse, pairs, q_decayed, e_decayed, p_decayed, factors, carry, cu,
    T, BT, N, stride_q, stride_k, stride_p, stride_g, stride_e, stride_w, scale, floor, H, Hq, Hk, Hp, Hg, He, Hw, K, ND,
    BD: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, FRAME: tl.constexpr, ERASE: tl.constexpr, WRITE: tl.constexpr,
    SAME: tl.constexpr,
    EXCL: tl.constexpr, BEFORE: tl.constexpr, ROWS: tl.constexpr, COL: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr,
    DT: tl.constexpr, INV: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """T - I and A [NB, H, C, C], the decayed operands [BT, H, K], carry [NB, H, K]; factors[3] are the write gates."""
    h = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    first, length, begin = block_range(cu, chunk, T, N, C, PACKED)
    if begin < length:
        row = first + begin
        r = tl.arange(0, C)
        i = r[:, None]
        j = r[None, :]
        ok = begin + r < length
        rows = (row + r).to(tl.int64)
        d = tl.arange(0, BD)
        A = tl.zeros([C, C], tl.float32)
        L = tl.zeros([C, C], tl.float32)
        be = gate_column(erase, rows, stride_e, h // (H // He), ok, ERASE)
        for block in range(0, ND):
            cd = block * BD
            pb = load_tile(p, row, ok, stride_p, (h // (H // Hp)) * K + cd, K - cd, d, False, ROWS, COL)
            qb = load_tile(q, row, ok, stride_q, (h // (H // Hq)) * K + cd, K - cd, d, False, ROWS, COL)
            if SAME:
                kb = pb
            else:
                kb = load_tile(k, row, ok, stride_k, (h // (H // Hk)) * K + cd, K - cd, d, False, ROWS, COL)
            gb = load_tile(g, row, ok, stride_g, (h // (H // Hg)) * K + cd, K - cd, d, False, ROWS, COL)
            gb = tl.maximum(gb.to(tl.float32), floor)
            high = gb.to(DT)
            low = (gb - high.to(tl.float32)).to(DT)
            if FRAME:
                E = chosen_sums(((i // FRAME_ROWS == j // FRAME_ROWS) & (i >= j)).to(DT), high, low, SPLIT, IP)
                fk = tl.exp2(-E)
                fq = tl.exp2(E - gb * LOG2E) if EXCL else tl.exp2(E)
                fe = tl.exp2(E - gb * LOG2E) if BEFORE else tl.exp2(E)
                qf = qb * fq
                ef = kb * fe
                pf = pb * fk
                for level in tl.static_range(3, LEVELS):  # level 3 stands for the pairs inside the frames
                    shift = frame_shift(gb, level, C, BD)
                    m = frame_mask(C, level)
                    ph = tl.trans((pf * shift).to(DT))
                    A += tl.where(m, tl.dot((qf * shift).to(DT), ph, input_precision=IP), 0.0)
                    L += tl.where(m, tl.dot((ef * shift).to(DT), ph, input_precision=IP), 0.0)
                start, end, GC = frame_factors(gb, C, BD)
                qf = qf * start
                ef = ef * start
                pf = pf * end
            else:
                GC = tl.exp2(tl.sum(gb, 0) * LOG2E)
                if not EXCL:
                    A += tl.where(i == j, tl.sum(qb.to(tl.float32) * pb.to(tl.float32), 1)[:, None], 0.0)
                for level in tl.range(0, LEVELS, num_stages=1):
                    flq = tl.exp2(chosen_sums(halving_matrix(C, level, EXCL).to(DT), high, low, SPLIT, IP))
                    fle = flq
                    if EXCL != BEFORE:
                        fle = tl.exp2(chosen_sums(halving_matrix(C, level, BEFORE).to(DT), high, low, SPLIT, IP))
                    ph = tl.trans((pb * flq).to(DT))
                    m = block_mask(C, level)
                    A += tl.where(m, tl.dot((qb * flq).to(DT), ph, input_precision=IP), 0.0)
                    L += tl.where(m, tl.dot((kb * fle).to(DT), ph, input_precision=IP), 0.0)
                qf = qb * tl.exp2(chosen_sums((i > j if EXCL else i >= j).to(DT), high, low, SPLIT, IP))
                ef = kb * tl.exp2(chosen_sums((i > j if BEFORE else i >= j).to(DT), high, low, SPLIT, IP))
                pf = pb * tl.exp2(chosen_sums((i < j).to(DT), high, low, SPLIT, IP))
            column = h * K + cd
            wide = H * K
            OT: tl.constexpr = q_decayed.dtype.element_ty
            row64 = row.to(tl.int64)
            store_tile(q_decayed, (qf * scale).to(OT), row, row64, ok, wide, column, K - cd, d, False, ROWS, COL)
            store_tile(e_decayed, (ef * be[:, None]).to(OT), row, row64, ok, wide, column, K - cd, d, False, ROWS, COL)
            store_tile(p_decayed, pf.to(OT), row, row64, ok, wide, column, K - cd, d, False, ROWS, COL)
            tl.store(carry + (chunk.to(tl.int64) * H + h) * K + cd + d, GC, mask=cd + d < K)
        A = tl.where((i > j) if EXCL else (i >= j), A * scale, 0.0)
        L = tl.where(i > j, L * be[:, None], 0.0)
        at = (chunk.to(tl.int64) * H + h) * (C * C) + i * C + j
        tl.store(pairs + at, A.to(pairs.dtype.element_ty))
        X = unit_lower_inverse(L, C, INV, IP)
        tl.store(inverse + at, tl.where(i > j, X, 0.0).to(inverse.dtype.element_ty))
        if WRITE:
            bw = gate_column(write, rows, stride_w, h // (H // Hw), ok, WRITE)
            tl.store(factors + (3 * H + h).to(tl.int64) * BT + rows, bw, mask=ok)


@triton.jit
def pair_gradients(qb, kb, pb, be, fq, fe, fp, m, dA, dL, DT: tl.constexpr, IP: tl.constexpr):
    """Gradients of q, e, p from the pairs in mask m with factors fq, fe, fp, and their flow through the decays."""
    pf = (pb * fp).to(DT)
    qf = (qb * fq).to(DT)
    ef = (kb * (fe * be[:, None])).to(DT)
    dA = tl.where(m, dA, tl.zeros_like(dA))
    dL = tl.where(m, dL, tl.zeros_like(dL))
    Yq = tl.dot(dA, pf, input_precision=IP)
    Ye = tl.dot(dL, pf, input_precision=IP)
    Yp = tl.dot(tl.trans(qf), dA, input_precision=IP)
    Yp = tl.trans(tl.dot(tl.trans(ef), dL, Yp, input_precision=IP))
    return Yq * fq, Ye * fe, Yp * fp, Yq * qf, Ye * ef, Yp * pf


@triton.jit
def gradients_vector(
    q, k, p, x, y, do, g, carry, erase, S, R, dq, dk, dp, derase, dg, cu,
    T, BT, N, stride_q, stride_k, stride_p, stride_o, stride_g, stride_e, scale, floor, H, Hq, Hk, Hp, Hg, He, K, V, ND,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, FRAME: tl.constexpr,
    ERASE: tl.constexpr, SAME: tl.constexpr, EXCL: tl.constexpr, BEFORE: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, COL_D: tl.constexpr, COL_V: tl.constexpr, PACKED: tl.constexpr,
    SPLIT: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Gradients inside one chunk, for one tile of key channels. Outputs [BT, H, *]; derase is a part of a sum over the tiles."""
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
        ok = r < left
        d = tl.arange(0, BD)
        v = tl.arange(0, BV)
        cd = id * BD
        index = chunk * H + h
        OT: tl.constexpr = dq.dtype.element_ty
        wide = H * K
        column = h * K + cd
        xb = load_tile(x, row, ok, H * V, h * V, V, v, False, ROWS, COL_V)
        ob = load_tile(do, row, ok, stride_o, h * V, V, v, False, ROWS, COL_V)
        dA = tl.dot(ob, tl.trans(xb), input_precision=IP)
        own = tl.sum(tl.where(i == j, dA, 0.0), 1) * scale
        dA = tl.where(i > j, dA * scale, 0.0).to(DT)
        Sb = state_tile(S, index, 0, cd, v, d, V, K, False, COL_D or COL_V)
        gq = tl.dot(ob, Sb, input_precision=IP)
        yb = load_tile(y, row, ok, H * V, h * V, V, v, False, ROWS, COL_V)
        dL = tl.dot(yb, tl.trans(xb), input_precision=IP)
        dL = tl.where(i > j, -dL, 0.0).to(DT)
        ge = tl.dot(yb, Sb, input_precision=IP)
        Rb = state_tile(R, index, 0, cd, v, d, V, K, False, COL_D or COL_V)
        through = tl.sum(Sb.to(tl.float32) * Rb.to(tl.float32), 0)
        gp = tl.dot(xb, Rb, input_precision=IP)
        be = gate_column(erase, row64 + r, stride_e, h // (H // He), ok, ERASE)
        gb = load_tile(g, row, ok, stride_g, (h // (H // Hg)) * K + cd, K - cd, d, False, ROWS, COL_D)
        gb = tl.maximum(gb.to(tl.float32), floor)
        high = gb.to(DT)
        low = (gb - high.to(tl.float32)).to(DT)
        if FRAME:
            start, end, _ = frame_factors(gb, C, BD)
            E = chosen_sums(((i // FRAME_ROWS == j // FRAME_ROWS) & (i >= j)).to(DT), high, low, SPLIT, IP)
            fk = tl.exp2(-E)
            fq = tl.exp2(E - gb * LOG2E) if EXCL else tl.exp2(E)
            fe = tl.exp2(E - gb * LOG2E) if BEFORE else tl.exp2(E)
            gq = gq * (fq * start * scale)
            ge = ge * (fe * -start)
            gp = gp * (fk * end)
        else:
            gq = gq * (tl.exp2(chosen_sums((i > j if EXCL else i >= j).to(DT), high, low, SPLIT, IP)) * scale)
            ge = ge * -tl.exp2(chosen_sums((i > j if BEFORE else i >= j).to(DT), high, low, SPLIT, IP))
            gp = gp * tl.exp2(chosen_sums((i < j).to(DT), high, low, SPLIT, IP))
        qb = load_tile(q, row, ok, stride_q, (h // (H // Hq)) * K + cd, K - cd, d, False, ROWS, COL_D)
        pb = load_tile(p, row, ok, stride_p, (h // (H // Hp)) * K + cd, K - cd, d, False, ROWS, COL_D)
        if SAME:
            kb = pb
        else:
            kb = load_tile(k, row, ok, stride_k, (h // (H // Hk)) * K + cd, K - cd, d, False, ROWS, COL_D)
        # flow through the decays: counted from the token that reads (now, or the next one for reads before the decay) back to the
        # one that wrote; `writes` go beyond the chunk
        now = tl.zeros([C, BD], tl.float32)
        later = tl.zeros([C, BD], tl.float32)
        if GATE:
            wc = tl.load(carry + index.to(tl.int64) * K + cd + d, mask=cd + d < K, other=0.0)
            total = choose((i > j).to(DT), gp * pb, DT, SPLIT, IP) + (through * wc)[None, :]
            if EXCL:
                later += gq * qb
            else:
                now += gq * qb
            if BEFORE:
                later += ge * kb * be[:, None]
            else:
                now += ge * kb * be[:, None]
        if FRAME:  # level 3 stands for the pairs inside the frames, anchored at the frame's start
            for level in tl.static_range(3, LEVELS):
                shift = frame_shift(gb, level, C, BD)
                m = frame_mask(C, level)
                Yq, Ye, Yp, wq, we, wp = pair_gradients(qb, kb, pb, be, fq * shift, fe * shift, fk * shift, m, dA, dL, DT, IP)
                gq += Yq
                ge += Ye
                gp += Yp
                if GATE:
                    now -= wp
                    if EXCL:
                        later += wq
                    else:
                        now += wq
                    if BEFORE:
                        later += we
                    else:
                        now += we
        else:
            for level in tl.range(0, LEVELS, num_stages=1):
                flq = tl.exp2(chosen_sums(halving_matrix(C, level, EXCL).to(DT), high, low, SPLIT, IP))
                fle = flq
                if EXCL != BEFORE:
                    fle = tl.exp2(chosen_sums(halving_matrix(C, level, BEFORE).to(DT), high, low, SPLIT, IP))
                m = block_mask(C, level)
                Yq, Ye, Yp, wq, we, wp = pair_gradients(qb, kb, pb, be, flq, fle, flq, m, dA, dL, DT, IP)
                gq += Yq
                ge += Ye
                gp += Yp
                if GATE:
                    now -= wp
                    if EXCL:
                        later += wq
                    else:
                        now += wq
                    if BEFORE:
                        later += we
                    else:
                        now += we
        if GATE:
            total += choose((i <= j).to(DT), now, DT, SPLIT, IP)
            if EXCL or BEFORE:
                total += choose((i < j).to(DT), later, DT, SPLIT, IP)
            store_tile(dg, total.to(dg.dtype.element_ty), row, row64, ok, wide, column, K - cd, d, False, ROWS, COL_D)
        if not EXCL:
            gq += own[:, None] * pb.to(tl.float32)
            gp += own[:, None] * qb.to(tl.float32)
        store_tile(dq, gq.to(OT), row, row64, ok, wide, column, K - cd, d, False, ROWS, COL_D)
        if ERASE:
            tl.store(derase + (id * H + h).to(tl.int64) * BT + row64 + r, tl.sum(ge * kb, 1), mask=ok)
            ge = ge * be[:, None]
        if SAME:
            gp += ge
        else:
            store_tile(dk, ge.to(OT), row, row64, ok, wide, column, K - cd, d, False, ROWS, COL_D)
        store_tile(dp, gp.to(OT), row, row64, ok, wide, column, K - cd, d, False, ROWS, COL_D)
