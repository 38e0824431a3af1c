"""The delta rule with one decay per key channel and a declared bound, log_decay >= -5: preparation and gradients, 16-bit operands.

A chunk of 64 tokens is two frames of 32. Inside a frame a pair (t, s) decays by 2^{E_t - A} 2^{A - E_s}, with E the base-2 sums of
log-decays from the frame's start and A an integer near the sum at its middle, per channel: |E - A| <= 116 stays in range. The
middle lies in the future of the frame's first tokens, but it only shifts exponents: mantissas are formed apart, and no bit of a
product depends on A. Between the two frames both factors are <= 1,
anchored at the boundary.

Pair matrices are formed in both orders: nothing is transposed but loaded tiles and the scaled operands of `prepare_frame`.
"""

import triton
import triton.language as tl

from linnet.ops.triton._kernel_common import block_range, load_tile, shifted_exp2, store_tile
from linnet.ops.triton._kernel_delta import chunk_rows, gate_column, state_tile, unit_lower_inverse

LOG2E = tl.constexpr(1.4426950408889634)
F = tl.constexpr(32)


@triton.jit
def running(m, x, DT: tl.constexpr):
    """Sums over time of x [n, BD] in fp32 by a 0/1 matrix m [n, n]: products of 16-bit high and low parts."""
    high = x.to(DT)
    low = (x - high.to(tl.float32)).to(DT)
    return tl.dot(m.to(DT), low, tl.dot(m.to(DT), high))


@triton.jit
def frame_sums(gb, DT: tl.constexpr):
    """For log-decays gb [F, BD]: E [F, BD], the anchor and the frame's sum [1, BD], in base 2."""
    r = tl.arange(0, F)
    E = running(r[:, None] >= r[None, :], gb, DT) * LOG2E
    anchor = tl.ceil(tl.sum(tl.where((r < F // 2)[:, None], gb, 0.0), 0) * LOG2E)
    return E, anchor[None, :], (tl.sum(gb, 0) * LOG2E)[None, :]


@triton.jit
def reader_of(E, gb, anchor, STRICT: tl.constexpr):
    """2^{E_t - A}; STRICT: without the log-decay of t itself."""
    return shifted_exp2(E - gb * LOG2E if STRICT else E, -anchor)


@triton.jit
def stacked(a, b):
    """[2 F, n] from two blocks of rows [F, n]."""
    return tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), (2 * F, a.shape[1]))


@triton.jit
def assembled(first, corner, second):
    """[2 F, 2 F] lower block matrix."""
    x = tl.join(stacked(first, corner), stacked(tl.zeros_like(first), second))
    return tl.reshape(tl.permute(x, (0, 2, 1)), (2 * F, 2 * F))


@triton.jit
def prepare_frame(
    q, k, p, g, erase, write, inverse, pairs, q_decayed, e_decayed, p_decayed, factors, carry, cu,
    T, BT, N, stride_q, stride_k, stride_p, stride_g, stride_e, stride_w, scale, floor, H, Rq, Rk, Rp, Rg, Re, Rw, K, ND,
    BD: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, WRITE: tl.constexpr, SAME: tl.constexpr, EXCL: tl.constexpr,
    BEFORE: tl.constexpr, ROWS: tl.constexpr, COL: tl.constexpr, PACKED: tl.constexpr, DT: tl.constexpr, INV: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """T - I and A [NB, H, C, C], the decayed operands [BT, H, K], carry [NB, H, K]; factors[3] are the write gates.

    ERASE: 0 no gate, 1 one per token, 2 one per key channel.
    """
    h = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    start, length, begin = block_range(cu, chunk, T, N, C, PACKED)
    if begin < length:
        row = start + begin
        r = tl.arange(0, F)
        ok1 = begin + r < length
        ok2 = begin + F + r < length
        row1 = row.to(tl.int64)
        row2 = row1 + F
        d = tl.arange(0, BD)
        A1 = tl.zeros([F, F], tl.float32)
        A2 = tl.zeros([F, F], tl.float32)
        AX = tl.zeros([F, F], tl.float32)
        L1 = tl.zeros([F, F], tl.float32)
        L2 = tl.zeros([F, F], tl.float32)
        LX = tl.zeros([F, F], tl.float32)
        be1 = gate_column(erase, row1 + r, stride_e, h // Re, ok1, ERASE == 1)[:, None]
        be2 = gate_column(erase, row2 + r, stride_e, h // Re, ok2, ERASE == 1)[:, None]
        wide = H * K
        OT: tl.constexpr = q_decayed.dtype.element_ty
        for block in range(0, ND):
            cd = block * BD
            column = h * K + cd
            at_g = (h // Rg) * K + cd
            at_p = (h // Rp) * K + cd
            at_q = (h // Rq) * K + cd
            at_k = (h // Rk) * K + cd
            g1 = load_tile(g, row, ok1, stride_g, at_g, K - cd, d, False, ROWS, COL)
            g2 = load_tile(g, row + F, ok2, stride_g, at_g, K - cd, d, False, ROWS, COL)
            p1 = load_tile(p, row, ok1, stride_p, at_p, K - cd, d, False, ROWS, COL)
            q1 = load_tile(q, row, ok1, stride_q, at_q, K - cd, d, False, ROWS, COL)
            p2 = load_tile(p, row + F, ok2, stride_p, at_p, K - cd, d, False, ROWS, COL)
            q2 = load_tile(q, row + F, ok2, stride_q, at_q, K - cd, d, False, ROWS, COL)
            if SAME:
                k1 = p1
                k2 = p2
            else:
                k1 = load_tile(k, row, ok1, stride_k, at_k, K - cd, d, False, ROWS, COL)
                k2 = load_tile(k, row + F, ok2, stride_k, at_k, K - cd, d, False, ROWS, COL)
            if ERASE == 2:
                at_e = (h // Re) * K + cd
                k1 = k1.to(tl.float32) * load_tile(erase, row, ok1, stride_e, at_e, K - cd, d, False, ROWS, COL)
                k2 = k2.to(tl.float32) * load_tile(erase, row + F, ok2, stride_e, at_e, K - cd, d, False, ROWS, COL)
            # ---- the first frame
            g1 = tl.maximum(g1.to(tl.float32), floor)
            g2 = tl.maximum(g2.to(tl.float32), floor)
            E, anchor, total1 = frame_sums(g1, DT)
            total2 = (tl.sum(g2, 0) * LOG2E)[None, :]
            begins = tl.exp2(anchor)
            pf = p1 * shifted_exp2(-E, anchor)
            written = tl.trans(pf.to(DT))
            pf *= tl.exp2(total1 - anchor)
            written_on = tl.trans(pf.to(DT))
            store_tile(p_decayed, (pf * tl.exp2(total2)).to(OT), row, row1, ok1, wide, column, K - cd, d, False, ROWS, COL)
            reader = reader_of(E, g1, anchor, EXCL)
            qf = q1 * reader
            A1 = tl.dot(qf.to(DT), written, A1, input_precision=IP)
            store_tile(q_decayed, (qf * (begins * scale)).to(OT), row, row1, ok1, wide, column, K - cd, d, False, ROWS, COL)
            if EXCL != BEFORE:
                reader = reader_of(E, g1, anchor, BEFORE)
            ef = k1 * reader
            L1 = tl.dot(ef.to(DT), written, L1, input_precision=IP)
            store_tile(e_decayed, (ef * begins * be1).to(OT), row, row1, ok1, wide, column, K - cd, d, False, ROWS, COL)
            # ---- the second one
            E, anchor, _ = frame_sums(g2, DT)
            begins = tl.exp2(anchor)
            far = tl.exp2(total1)
            pf = p2 * shifted_exp2(-E, anchor)
            written = tl.trans(pf.to(DT))
            store_tile(p_decayed, (pf * tl.exp2(total2 - anchor)).to(OT), row, row2, ok2, wide, column, K - cd, d, False, ROWS, COL)
            reader = reader_of(E, g2, anchor, EXCL)
            qf = q2 * reader
            A2 = tl.dot(qf.to(DT), written, A2, input_precision=IP)
            qf *= begins
            AX = tl.dot(qf.to(DT), written_on, AX, input_precision=IP)
            store_tile(q_decayed, (qf * (far * scale)).to(OT), row, row2, ok2, wide, column, K - cd, d, False, ROWS, COL)
            if EXCL != BEFORE:
                reader = reader_of(E, g2, anchor, BEFORE)
            ef = k2 * reader
            L2 = tl.dot(ef.to(DT), written, L2, input_precision=IP)
            ef *= begins
            LX = tl.dot(ef.to(DT), written_on, LX, input_precision=IP)
            store_tile(e_decayed, (ef * far * be2).to(OT), row, row2, ok2, wide, column, K - cd, d, False, ROWS, COL)
            kept = carry + (chunk.to(tl.int64) * H + h) * K + cd + d
            tl.store(kept[None, :], tl.exp2(total1 + total2), mask=(cd + d < K)[None, :])
        c = tl.arange(0, C)
        i = c[:, None]
        j = c[None, :]
        at = (chunk.to(tl.int64) * H + h) * (C * C) + i * C + j
        A = tl.where((i > j) if EXCL else (i >= j), assembled(A1, AX, A2) * scale, 0.0)
        tl.store(pairs + at, A.to(pairs.dtype.element_ty))
        L = tl.where(i > j, assembled(L1 * be1, LX * be2, L2 * be2), 0.0)
        X = unit_lower_inverse(L, C, INV, IP)
        tl.store(inverse + at, tl.where(i > j, X, 0.0).to(inverse.dtype.element_ty))
        if WRITE:
            ok = begin + c < length
            bw = gate_column(write, row1 + c, stride_w, h // Rw, ok, WRITE)
            tl.store(factors + (3 * H + h).to(tl.int64) * BT + row1 + c, bw, mask=ok)


@triton.jit
def per_frame(a, b, C: tl.constexpr):
    """[C, BD] with the rows a in the first frame, b in the second."""
    return tl.where((tl.arange(0, C) < F)[:, None], a[None, :], b[None, :])


@triton.jit
def masked(pair, WITHIN: tl.constexpr, LATER_FIRST: tl.constexpr, C: tl.constexpr, DT: tl.constexpr):
    """The pairs inside the frames (WITHIN) or across them, the later token in rows (LATER_FIRST) or in columns."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if WITHIN:
        m = (i // F == j // F) & ((i > j) if LATER_FIRST else (i < j))
    else:
        m = (i // F > j // F) if LATER_FIRST else (i // F < j // F)
    return tl.where(m, pair, tl.zeros_like(pair)).to(DT)


@triton.jit
def gradients_frame(
    q, k, p, x, y, do, g, carry, erase, S, R, dq, dk, dp, derase, dg, cu,
    T, BT, N, stride_q, stride_k, stride_p, stride_o, stride_g, stride_e, scale, floor, H, Rq, Rk, Rp, Rg, Re, K, V, ND,
    BD: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, C: tl.constexpr,
    ERASE: tl.constexpr, SAME: tl.constexpr, EXCL: tl.constexpr, BEFORE: tl.constexpr, GATE: tl.constexpr,
    DESC: tl.constexpr, STORE: tl.constexpr, ROWS: tl.constexpr, COL_D: tl.constexpr, COL_V: tl.constexpr, PACKED: tl.constexpr,
    DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Gradients inside one chunk, for one tile of key channels and all of the value channels (NV is 1). Outputs [BT, H, *].

    derase [BT, H, K] for a gate per key channel (ERASE 2), a part of a sum over the tiles for one per token (ERASE 1).
    dg of the chunk, per channel: the pairs t = s are left out, both sides of a pair use the same rounded factors.
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
        ok = r < left
        d = tl.arange(0, BD)
        v = tl.arange(0, BV)
        cd = id * BD
        index = chunk * H + h
        OT: tl.constexpr = dq.dtype if STORE else dq.dtype.element_ty
        wide = H * K
        column = h * K + cd
        tl.static_assert(NV == 1)
        be = gate_column(erase, row64 + r, stride_e, h // Re, ok, ERASE == 1)[:, None]
        gb = load_tile(g, row, ok, stride_g, (h // Rg) * K + cd, K - cd, d, DESC, ROWS, COL_D)
        gb = tl.maximum(gb.to(tl.float32), floor)
        pb = load_tile(p, row, ok, stride_p, (h // Rp) * K + cd, K - cd, d, DESC, ROWS, COL_D)
        xb = load_tile(x, row, ok, H * V, h * V, V, v, DESC, ROWS, COL_V)
        E = running((i // F == j // F) & (i >= j), gb, DT) * LOG2E
        half = (i % F) < F // 2
        total1 = tl.sum(tl.where(i < F, gb, 0.0), 0) * LOG2E
        total2 = tl.sum(tl.where(i >= F, gb, 0.0), 0) * LOG2E
        anchor1 = tl.ceil(tl.sum(tl.where((i < F) & half, gb, 0.0), 0) * LOG2E)
        anchor2 = tl.ceil(tl.sum(tl.where((i >= F) & half, gb, 0.0), 0) * LOG2E)
        one = tl.full([BD], 1.0, tl.float32)
        anchor = per_frame(anchor1, anchor2, C)
        begins = per_frame(tl.exp2(anchor1), tl.exp2(anchor2), C)  # from the anchor to the frame's start
        ends = per_frame(tl.exp2(total1 - anchor1), tl.exp2(total2 - anchor2), C)
        writer = shifted_exp2(-E, anchor)
        written = (pb * writer).to(DT)
        written_on = (pb * (writer * ends)).to(DT)
        reader = reader_of(E, gb, anchor, EXCL)
        # ---- reads: q
        ob = load_tile(do, row, ok, stride_o, h * V, V, v, DESC, ROWS, COL_V)
        qb = load_tile(q, row, ok, stride_q, (h // Rq) * K + cd, K - cd, d, DESC, ROWS, COL_D)
        Sb = state_tile(S, index, 0, cd, v, d, V, K, DESC, COL_D or COL_V)
        far = per_frame(one, tl.exp2(total1), C)
        pair = tl.dot(ob, tl.trans(xb), input_precision=IP) * scale  # [t, s]
        own = tl.sum(tl.where(i == j, pair, 0.0), 1)[:, None]
        read = (qb * reader).to(DT)
        read_on = (qb * (reader * begins)).to(DT)
        G = tl.dot(ob, Sb, input_precision=IP) * (reader * begins * far * scale)
        now = G * qb
        Y = tl.dot(masked(pair, True, True, C, DT), written, input_precision=IP)
        G += Y * reader
        now += Y * read
        Y = tl.dot(masked(pair, False, True, C, DT), written_on, input_precision=IP)
        G += Y * (reader * begins)
        now += Y * read_on
        if EXCL:
            later = now
            now = tl.zeros([C, BD], tl.float32)
        else:
            later = tl.zeros([C, BD], tl.float32)
            G += own * pb.to(tl.float32)
        store_tile(dq, G.to(OT), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        # ---- erasures: e
        yb = load_tile(y, row, ok, H * V, h * V, V, v, DESC, ROWS, COL_V)
        if SAME:
            kb = pb
        else:
            kb = load_tile(k, row, ok, stride_k, (h // Rk) * K + cd, K - cd, d, DESC, ROWS, COL_D)
        if EXCL != BEFORE:
            reader = reader_of(E, gb, anchor, BEFORE)
        pair = -tl.dot(yb, tl.trans(xb), input_precision=IP)
        if ERASE == 2:
            be = load_tile(erase, row, ok, stride_e, (h // Re) * K + cd, K - cd, d, DESC, ROWS, COL_D).to(tl.float32)
        ke = kb * be
        erased = (ke * reader).to(DT)
        erased_on = (ke * (reader * begins)).to(DT)
        G = tl.dot(yb, Sb, input_precision=IP) * (reader * begins * (0.0 - far))
        flow = G * ke
        Y = tl.dot(masked(pair, True, True, C, DT), written, input_precision=IP)
        G += Y * reader
        flow += Y * erased
        Y = tl.dot(masked(pair, False, True, C, DT), written_on, input_precision=IP)
        G += Y * (reader * begins)
        flow += Y * erased_on
        if BEFORE:
            later += flow
        else:
            now += flow
        if ERASE == 2:
            GT: tl.constexpr = derase.dtype if STORE else derase.dtype.element_ty
            store_tile(derase, (G * kb).to(GT), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        elif ERASE == 1:
            tl.store(derase + (id * H + h).to(tl.int64) * BT + row64 + r, tl.sum(G * kb, 1), mask=ok)
        Ge = G * be
        if not SAME:
            store_tile(dk, Ge.to(OT), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        # ---- writes: p
        Rb = state_tile(R, index, 0, cd, v, d, V, K, DESC, COL_D or COL_V)
        G = tl.dot(xb, Rb, input_precision=IP) * (writer * ends * per_frame(tl.exp2(total2), one, C))
        if GATE:
            whole = tl.sum(Rb.to(tl.float32) * Sb.to(tl.float32), 0) * tl.exp2(total1 + total2)
            sums = running(i > j, G * pb, DT) + whole[None, :]
        pair = tl.dot(xb, tl.trans(ob), input_precision=IP) * scale  # [s, t]
        gone = -tl.dot(xb, tl.trans(yb), input_precision=IP)
        Y = tl.dot(masked(pair, True, False, C, DT), read, input_precision=IP)
        Y = tl.dot(masked(gone, True, False, C, DT), erased, Y, input_precision=IP)
        G += Y * writer
        now -= Y * written
        Y = tl.dot(masked(pair, False, False, C, DT), read_on, input_precision=IP)
        Y = tl.dot(masked(gone, False, False, C, DT), erased_on, Y, input_precision=IP)
        G += Y * (writer * ends)
        now -= Y * written_on
        if not EXCL:
            G += own * qb.to(tl.float32)
        if SAME:
            G += Ge
        store_tile(dp, G.to(OT), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        if GATE:
            sums += running(i <= j, now, DT)
            if EXCL or BEFORE:
                sums += running(i < j, later, DT)
            store_tile(dg, sums, row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
