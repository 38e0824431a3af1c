"""The delta rule with one decay per key channel and a declared bound, log_decay >= -5: preparation and gradients, 16-bit operands.

A pair (t, s) of a chunk of 64 tokens decays by 2^{E_t - A} 2^{A - E_s}, with E the base-2 sums of log-decays from the chunk's start
and A an integer. Nearly always a chunk keeps 2^-96 of every channel, and A = 0 holds both factors in range. Otherwise the chunk is
two frames of 32 tokens: A is near the sum at the middle of a frame for the pairs inside, at the boundary for those across.

Which of the two it is depends on tokens to come, but an integer only shifts exponents: mantissas are formed apart, and no bit of an
output depends on A. (What underflows across the boundary would have done so before any later token.)
"""

import triton
import triton.language as tl

from linnet.ops.triton._kernel_common import block_range, load_tile, shifted_exp2, store_tile
from linnet.ops.triton._kernel_delta import chunk_rows, gate_column, state_tile, unit_lower_inverse

LOG2E = tl.constexpr(1.4426950408889634)
F = tl.constexpr(32)
LEAST = tl.constexpr(2.0**-96)
NEAR = tl.constexpr(-96.0)  # what a chunk keeps of a channel, in base 2, for its start to be the anchor of all its pairs


@triton.jit
def running(m, x, DT: tl.constexpr):
    """Sums over time of x [n, BD] in fp32 by a 0/1 matrix m [n, n]: products of 16-bit high and low parts."""
    high = x.to(DT)
    low = (x - high.to(tl.float32)).to(DT)
    return tl.dot(m.to(DT), low, tl.dot(m.to(DT), high))


@triton.jit
def reader_of(E, gb, anchor, STRICT: tl.constexpr):
    """2^{E_t - A}; STRICT: without the log-decay of t itself."""
    return shifted_exp2(E - gb * LOG2E if STRICT else E, -anchor)


@triton.jit
def in_range_exp2(x, n):
    """`shifted_exp2`, with x + n brought into its range."""
    return shifted_exp2(tl.minimum(tl.maximum(x, -126.0 - n), 126.0 - n), n)


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
        row64 = row.to(tl.int64)
        r = tl.arange(0, C)
        i = r[:, None]
        j = r[None, :]
        ok = begin + r < length
        d = tl.arange(0, BD)
        here = tl.zeros([1, 1], tl.float32)
        A = tl.zeros([C, C], tl.float32)
        L = tl.zeros([C, C], tl.float32)
        be = gate_column(erase, row64 + r, stride_e, h // Re, ok, ERASE == 1)[:, None]
        wide = H * K
        OT: tl.constexpr = q_decayed.dtype.element_ty
        for block in tl.range(0, ND, num_stages=1):
            cd = block * BD
            column = h * K + cd
            gb = load_tile(g, row, ok, stride_g, (h // Rg) * K + cd, K - cd, d, False, ROWS, COL)
            pb = load_tile(p, row, ok, stride_p, (h // Rp) * K + cd, K - cd, d, False, ROWS, COL)
            qb = load_tile(q, row, ok, stride_q, (h // Rq) * K + cd, K - cd, d, False, ROWS, COL)
            if SAME:
                kb = pb
            else:
                kb = load_tile(k, row, ok, stride_k, (h // Rk) * K + cd, K - cd, d, False, ROWS, COL)
            if ERASE == 2:
                eb = load_tile(erase, row, ok, stride_e, (h // Re) * K + cd, K - cd, d, False, ROWS, COL)
            gb = tl.maximum(gb.to(tl.float32), floor)
            E = running(i >= j, gb, DT) * LOG2E
            total = tl.sum(gb, 0) * LOG2E
            tl.store(carry + (chunk.to(tl.int64) * H + h) * K + cd + d, tl.exp2(total), mask=cd + d < K)
            qb = qb.to(tl.float32) * scale
            kb = kb * be
            if ERASE == 2:
                kb = kb * eb
            Eq = E - gb * LOG2E if EXCL else E
            Ek = E - gb * LOG2E if BEFORE else E
            read = (qb * shifted_exp2(tl.maximum(Eq, -126.0), here)).to(OT)
            store_tile(q_decayed, read, row, row64, ok, wide, column, K - cd, d, False, ROWS, COL)
            erased = (kb * shifted_exp2(tl.maximum(Ek, -126.0), here)).to(OT)
            store_tile(e_decayed, erased, row, row64, ok, wide, column, K - cd, d, False, ROWS, COL)
            if tl.min(total, 0) >= NEAR:
                x = pb * shifted_exp2(-E, here)
                written = tl.trans(x.to(DT))
                A = tl.dot(read.to(DT), written, A, input_precision=IP)
                L = tl.dot(erased.to(DT), written, L, input_precision=IP)
                x *= tl.exp2(total)[None, :]
            else:
                first = tl.sum(tl.where(i < F, gb, 0.0), 0) * LOG2E
                middle1 = tl.sum(tl.where(i < F // 2, gb, 0.0), 0) * LOG2E
                middle2 = tl.sum(tl.where(i < F + F // 2, gb, 0.0), 0) * LOG2E
                for part in tl.range(0, 3, num_stages=1):
                    anchor = tl.ceil(tl.where(part == 0, middle1, tl.where(part == 1, middle2, first)))[None, :]
                    inside = (i // F == (1 if part > 0 else 0)) & (j // F == (1 if part == 1 else 0))
                    written = tl.trans((pb * in_range_exp2(-E, anchor)).to(DT))
                    y = (qb * in_range_exp2(Eq, -anchor)).to(DT)
                    A = tl.where(inside, tl.dot(y, written, A, input_precision=IP), A)  # added up in the same order as above
                    y = (kb * in_range_exp2(Ek, -anchor)).to(DT)
                    L = tl.where(inside, tl.dot(y, written, L, input_precision=IP), L)
                x = pb * tl.exp2(total[None, :] - E)
            store_tile(p_decayed, x.to(OT), row, row64, ok, wide, column, K - cd, d, False, ROWS, COL)
        at = (chunk.to(tl.int64) * H + h) * (C * C) + i * C + j
        A = tl.where((i > j) if EXCL else (i >= j), A, 0.0)
        tl.store(pairs + at, A.to(pairs.dtype.element_ty))
        X = unit_lower_inverse(tl.where(i > j, L, 0.0), C, INV, IP)
        tl.store(inverse + at, tl.where(i > j, X, 0.0).to(inverse.dtype.element_ty))
        if WRITE:
            bw = gate_column(write, row64 + r, stride_w, h // Rw, ok, WRITE)
            tl.store(factors + (3 * H + h).to(tl.int64) * BT + row64 + r, bw, mask=ok)


@triton.jit
def least_kept(carry, index, d, K):
    """What a chunk keeps of that one of its key channels d of which it keeps least."""
    return tl.min(tl.load(carry + index.to(tl.int64) * K + d, mask=d < K, other=1.0), 0)


@triton.jit
def keep_erasures(
    G, kb, be, derase, dk, part, row, row64, r, ok, wide, column, width, d, ERASE: tl.constexpr, SAME: tl.constexpr,
    STORE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the gate and, unless k is p, of k, from G, the gradient of the erased keys be * k; returns k's."""
    if ERASE == 2:
        GT: tl.constexpr = derase.dtype if STORE else derase.dtype.element_ty
        store_tile(derase, (G * kb).to(GT), row, row64, ok, wide, column, width, d, STORE, ROWS, COLUMNS)
    elif ERASE == 1:
        tl.store(derase + part + row64 + r, tl.sum(G * kb, 1), mask=ok)
    Ge = G * be
    if not SAME:
        OT: tl.constexpr = dk.dtype if STORE else dk.dtype.element_ty
        store_tile(dk, Ge.to(OT), row, row64, ok, wide, column, width, d, STORE, ROWS, COLUMNS)
    return Ge


@triton.jit
def gradients_near(
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
    index = chunk * H + h
    cd = id * BD
    d = tl.arange(0, BD)
    if least_kept(carry, index, cd + d, K) < LEAST:  # left to `gradients_frame`
        left = 0
    if left > 0:
        row64 = row.to(tl.int64)
        r = tl.arange(0, C)
        i = r[:, None]
        j = r[None, :]
        ok = r < left
        v = tl.arange(0, BV)
        OT: tl.constexpr = dq.dtype if STORE else dq.dtype.element_ty
        wide = H * K
        column = h * K + cd
        tl.static_assert(NV == 1)
        # Loaded by pointers, everything is under way at once; by descriptors, one tile would be waited for after another.
        gb = load_tile(g, row, ok, stride_g, (h // Rg) * K + cd, K - cd, d, DESC, ROWS, COL_D)
        pb = load_tile(p, row, ok, stride_p, (h // Rp) * K + cd, K - cd, d, DESC, ROWS, COL_D)
        xb = load_tile(x, row, ok, H * V, h * V, V, v, DESC, ROWS, COL_V)
        ob = load_tile(do, row, ok, stride_o, h * V, V, v, DESC, ROWS, COL_V)
        qb = load_tile(q, row, ok, stride_q, (h // Rq) * K + cd, K - cd, d, DESC, ROWS, COL_D)
        Sb = state_tile(S, index, 0, cd, v, d, V, K, DESC, COL_D or COL_V)
        yb = load_tile(y, row, ok, H * V, h * V, V, v, DESC, ROWS, COL_V)
        Rb = state_tile(R, index, 0, cd, v, d, V, K, DESC, COL_D or COL_V)
        be = gate_column(erase, row64 + r, stride_e, h // Re, ok, ERASE == 1)[:, None]
        gb = tl.maximum(gb.to(tl.float32), floor)
        E = running(i >= j, gb, DT) * LOG2E
        writer = tl.exp2(-E)
        written = (pb * writer).to(DT)
        reader = tl.exp2(E - gb * LOG2E if EXCL else E)
        # ---- reads: q
        pair = tl.dot(ob, tl.trans(xb), input_precision=IP) * scale  # [t, s]
        own = tl.sum(tl.where(i == j, pair, 0.0), 1)[:, None]
        Y = tl.dot(tl.where(i > j, pair, 0.0).to(DT), written, input_precision=IP)
        read = (qb * reader).to(DT)
        G = tl.dot(ob, Sb, input_precision=IP) * (reader * scale)
        now = G * qb + Y * read
        G += Y * reader
        if EXCL:
            later = now
            now = tl.zeros([C, BD], tl.float32)
        else:
            later = tl.zeros([C, BD], tl.float32)
            G += own * pb.to(tl.float32)
        store_tile(dq, G.to(OT), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        # ---- erasures: e
        if SAME:
            kb = pb
        else:
            kb = load_tile(k, row, ok, stride_k, (h // Rk) * K + cd, K - cd, d, DESC, ROWS, COL_D)
        if EXCL != BEFORE:
            reader = tl.exp2(E - gb * LOG2E if BEFORE else E)
        if ERASE == 2:
            be = load_tile(erase, row, ok, stride_e, (h // Re) * K + cd, K - cd, d, DESC, ROWS, COL_D).to(tl.float32)
        pair = tl.dot(yb, tl.trans(xb), input_precision=IP)
        Y = tl.dot(tl.where(i > j, -pair, 0.0).to(DT), written, input_precision=IP)
        ke = kb * be
        erased = (ke * reader).to(DT)
        G = tl.dot(yb, Sb, input_precision=IP) * (0.0 - reader)
        flow = G * ke + Y * erased
        G += Y * reader
        if BEFORE:
            later += flow
        else:
            now += flow
        Ge = keep_erasures(
            G, kb, be, derase, dk, (id * H + h).to(tl.int64) * BT, row, row64, r, ok, wide, column, K - cd, d, ERASE, SAME, STORE,
            ROWS, COL_D,
        )  # fmt: skip
        # ---- writes: p
        carried = tl.load(carry + index.to(tl.int64) * K + cd + d, mask=cd + d < K, other=1.0)
        G = tl.dot(xb, Rb, input_precision=IP) * (writer * carried[None, :])
        if GATE:
            whole = tl.sum(Rb.to(tl.float32) * Sb.to(tl.float32), 0) * carried
            sums = running(i > j, G * pb, DT) + whole[None, :]
        pair = tl.dot(xb, tl.trans(ob), input_precision=IP) * scale  # [s, t]
        Y = tl.dot(tl.where(i < j, pair, 0.0).to(DT), read, input_precision=IP)
        pair = tl.dot(xb, tl.trans(yb), input_precision=IP)
        Y = tl.dot(tl.where(i < j, -pair, 0.0).to(DT), erased, Y, input_precision=IP)
        G += Y * writer
        now -= Y * written
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
    BK: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """`gradients_near` for tiles with a channel of which the chunk keeps less than 2^-96: two frames, and the pairs across them.

    A program per chunk and head, which most often has no such tile: to see that takes as long as to fetch one number.
    """
    h = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    row, left = chunk_rows(cu, chunk, T, N, C, PACKED)
    if least_kept(carry, chunk * H + h, tl.arange(0, BK), K) >= LEAST:  # left to `gradients_near`
        left = 0
    if left > 0:
        for id in tl.range(0, ND, num_stages=1, disable_licm=True):
            if least_kept(carry, chunk * H + h, id * BD + tl.arange(0, BD), K) < LEAST:
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
                Ge = keep_erasures(
                    G, kb, be, derase, dk, (id * H + h).to(tl.int64) * BT, row, row64, r, ok, wide, column, K - cd, d, ERASE, SAME,
                    STORE, ROWS, COL_D,
                )  # fmt: skip
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
