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
    T, BT, N, stride_q, stride_k, stride_p, stride_g, stride_e, stride_w, scale, floor, H, Rq, Rk, Rp, Rg, Re, Rw, K, ND,
    BD: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, FRAME: tl.constexpr, ERASE: tl.constexpr, WRITE: tl.constexpr,
    SAME: tl.constexpr,
    EXCL: tl.constexpr, BEFORE: tl.constexpr, ROWS: tl.constexpr, COL: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr,
    DT: tl.constexpr, INV: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """T - I and A [NB, H, C, C], the decayed operands [BT, H, K], carry [NB, H, K]; factors[3] are the write gates.

    ERASE: 0 no gate, 1 one per token, 2 one per key channel.
    """
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
        be = gate_column(erase, rows, stride_e, h // Re, ok, ERASE == 1)
        for block in range(0, ND):
            cd = block * BD
            pb = load_tile(p, row, ok, stride_p, (h // Rp) * K + cd, K - cd, d, False, ROWS, COL)
            qb = load_tile(q, row, ok, stride_q, (h // Rq) * K + cd, K - cd, d, False, ROWS, COL)
            if SAME:
                kb = pb
            else:
                kb = load_tile(k, row, ok, stride_k, (h // Rk) * K + cd, K - cd, d, False, ROWS, COL)
            if ERASE == 2:
                kb = kb.to(tl.float32) * load_tile(erase, row, ok, stride_e, (h // Re) * K + cd, K - cd, d, False, ROWS, COL)
            gb = load_tile(g, row, ok, stride_g, (h // Rg) * K + cd, K - cd, d, False, ROWS, COL)
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
            bw = gate_column(write, rows, stride_w, h // Rw, ok, WRITE)
            tl.store(factors + (3 * H + h).to(tl.int64) * BT + rows, bw, mask=ok)


@triton.jit
def transposed_factor(gt, high, low, which: tl.constexpr, level, C: tl.constexpr, SPLIT: tl.constexpr, IP: tl.constexpr):
    """Log-decays [BD, C], base 2: over s <= t (0), s < t (1), s > t (2), s <= t of the frame (3), to a block's middle (4, 5)."""
    i = tl.arange(0, C)[:, None]  # s
    j = tl.arange(0, C)[None, :]  # t
    if which == 0:
        m = i <= j
    elif which == 1:
        m = i < j
    elif which == 2:
        m = i > j
    elif which == 3:
        m = (i // FRAME_ROWS == j // FRAME_ROWS) & (i <= j)
    else:
        middle = ((j >> (level + 1)) << (level + 1)) + (1 << level)
        last = (i <= j) if which == 4 else (i < j)
        m = ((j >= middle) & (i >= middle) & last) | ((j < middle) & (i < middle) & (i > j))
    x = tl.dot(high, m.to(high.dtype), input_precision=IP)
    if SPLIT:
        x = tl.dot(low, m.to(high.dtype), x, input_precision=IP)
    return x * LOG2E


@triton.jit
def pair_mask(C: tl.constexpr, level, FRAME: tl.constexpr, LATER_FIRST: tl.constexpr):
    """The pairs of a level, rows the later token (LATER_FIRST) or the earlier one. Level 3 with FRAME: those inside a frame."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if LATER_FIRST:
        later, earlier = i, j
    else:
        later, earlier = j, i
    m = ((later >> (level + 1)) == (earlier >> (level + 1))) & ((later >> level) > (earlier >> level))
    if FRAME:
        inside = (later // FRAME_ROWS == earlier // FRAME_ROWS) & (later > earlier)
        m = ((level == 3) & inside) | ((level > 3) & m)
    return m


@triton.jit
def level_factors(
    gt, high, low, E, E_strict, level, C: tl.constexpr, FRAME: tl.constexpr, STRICT: tl.constexpr,
    SPLIT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """(factor of the tokens that read, factor of the tokens that wrote) [BD, C] of a level."""
    if FRAME:
        f = tl.arange(0, C) // FRAME_ROWS
        far = tl.zeros_like(E)
        for n in tl.static_range(0, C // FRAME_ROWS):
            middle = ((n >> (level - 3)) << (level - 3)) + (1 << tl.maximum(level - 4, 0))
            # log-decays between the frame's start and the middle of its block; none inside a frame
            between = (f >= tl.minimum(n, middle)) & (f < tl.maximum(n, middle)) & (level > 3)
            x = tl.sum(tl.where(between[None, :], gt, 0.0), 1) * LOG2E
            far = tl.where((f == n)[None, :], x[:, None], far)
        shift = tl.exp2(far)
        reader = tl.exp2(E_strict if STRICT else E) * shift
        writer = tl.exp2(-E) * shift
    else:
        reader = tl.exp2(transposed_factor(gt, high, low, 5 if STRICT else 4, level, C, SPLIT, IP))
        writer = reader
    return reader, writer


@triton.jit
def over_time(x, m, DT: tl.constexpr, SPLIT: tl.constexpr, IP: tl.constexpr):
    """x [BD, C] in fp32 times a 0/1 matrix m [C, C], as high and low parts."""
    high = x.to(DT)
    y = tl.dot(high, m.to(DT), input_precision=IP)
    if SPLIT:
        y = tl.dot((x - high.to(tl.float32)).to(DT), m.to(DT), y, input_precision=IP)
    return y


@triton.jit
def gradients_vector(
    q, k, p, x, y, do, g, carry, erase, S, R, dq, dk, dp, derase, dg, cu,
    T, BT, N, stride_q, stride_k, stride_p, stride_o, stride_g, stride_e, scale, floor, H, Rq, Rk, Rp, Rg, Re, K, V, ND,
    BD: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, FRAME: tl.constexpr,
    ERASE: tl.constexpr, SAME: tl.constexpr, EXCL: tl.constexpr, BEFORE: tl.constexpr, GATE: tl.constexpr,
    DESC: tl.constexpr, STORE: tl.constexpr, ROWS: tl.constexpr, COL_D: tl.constexpr, COL_V: tl.constexpr, PACKED: tl.constexpr,
    SPLIT: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Gradients inside one chunk, for one tile of key channels. Outputs [BT, H, *]; derase [BT, H, K] for a gate per key
    channel (ERASE 2), a part of a sum over the tiles for one per token (ERASE 1).

    Everything is transposed, [BD, C]: scaled operands are register operands, and the pair matrices are formed in both orders, so
    that no transposed accumulator becomes an operand. One of q, e, p at a time.
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
        LOWEST: tl.constexpr = 3 if FRAME else 0
        be = gate_column(erase, row64 + r, stride_e, h // Re, ok, ERASE == 1)
        gt = tl.trans(load_tile(g, row, ok, stride_g, (h // Rg) * K + cd, K - cd, d, DESC, ROWS, COL_D))
        gt = tl.maximum(gt.to(tl.float32), floor)
        high = gt.to(DT)
        low = (gt - high.to(tl.float32)).to(DT)
        if FRAME:
            E = transposed_factor(gt, high, low, 3, 0, C, SPLIT, IP)
        else:
            E = tl.zeros_like(gt)
        E_strict = E - gt * LOG2E
        pt = tl.trans(load_tile(p, row, ok, stride_p, (h // Rp) * K + cd, K - cd, d, DESC, ROWS, COL_D))
        now = tl.zeros([BD, C], tl.float32)
        later = tl.zeros([BD, C], tl.float32)
        # ---- reads: q
        xb = load_tile(x, row, ok, H * V, h * V, V, v, DESC, ROWS, COL_V)
        ob = load_tile(do, row, ok, stride_o, h * V, V, v, DESC, ROWS, COL_V)
        Sb = state_tile(S, index, 0, cd, v, d, V, K, DESC, COL_D or COL_V)
        pair = tl.dot(xb, tl.trans(ob), input_precision=IP)  # [s, t]
        G = tl.dot(tl.trans(Sb), tl.trans(ob), input_precision=IP)
        for n in tl.static_range(1, NV):
            cv = n * BV
            x2 = load_tile(x, row, ok, H * V, h * V + cv, V - cv, v, DESC, ROWS, COL_V)
            o2 = tl.trans(load_tile(do, row, ok, stride_o, h * V + cv, V - cv, v, DESC, ROWS, COL_V))
            pair = tl.dot(x2, o2, pair, input_precision=IP)
            G = tl.dot(tl.trans(state_tile(S, index, cv, cd, v, d, V, K, DESC, COL_D or COL_V)), o2, G, input_precision=IP)
        own = tl.sum(tl.where(i == j, pair, 0.0), 0) * scale
        pair = (pair * scale).to(DT)
        G = G * (tl.exp2(transposed_factor(gt, high, low, 1 if EXCL else 0, 0, C, SPLIT, IP)) * scale)
        qt = tl.trans(load_tile(q, row, ok, stride_q, (h // Rq) * K + cd, K - cd, d, DESC, ROWS, COL_D))
        flow = G * qt
        for level in tl.range(LOWEST, LEVELS, num_stages=1):
            reader, writer = level_factors(gt, high, low, E, E_strict, level, C, FRAME, EXCL, SPLIT, IP)
            pf = (pt * writer).to(DT)
            Y = tl.dot(pf, tl.where(pair_mask(C, level, FRAME, False), pair, tl.zeros_like(pair)), input_precision=IP)
            G += Y * reader
            flow += Y * (qt * reader).to(DT)
        if EXCL:
            later += flow
        else:
            now += flow
            G += own[None, :] * pt.to(tl.float32)
        store_tile(dq, tl.trans(G.to(OT)), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        # ---- erasures: e
        yb = load_tile(y, row, ok, H * V, h * V, V, v, DESC, ROWS, COL_V)
        pair = tl.dot(xb, tl.trans(yb), input_precision=IP)
        G = tl.dot(tl.trans(Sb), tl.trans(yb), input_precision=IP)
        for n in tl.static_range(1, NV):
            cv = n * BV
            x2 = load_tile(x, row, ok, H * V, h * V + cv, V - cv, v, DESC, ROWS, COL_V)
            y2 = tl.trans(load_tile(y, row, ok, H * V, h * V + cv, V - cv, v, DESC, ROWS, COL_V))
            pair = tl.dot(x2, y2, pair, input_precision=IP)
            G = tl.dot(tl.trans(state_tile(S, index, cv, cd, v, d, V, K, DESC, COL_D or COL_V)), y2, G, input_precision=IP)
        pair = (-pair).to(DT)
        G = -G * tl.exp2(transposed_factor(gt, high, low, 1 if BEFORE else 0, 0, C, SPLIT, IP))
        if SAME:
            kt = pt
        else:
            kt = tl.trans(load_tile(k, row, ok, stride_k, (h // Rk) * K + cd, K - cd, d, DESC, ROWS, COL_D))
        if ERASE == 2:
            bt = tl.trans(load_tile(erase, row, ok, stride_e, (h // Re) * K + cd, K - cd, d, DESC, ROWS, COL_D))
            et = kt.to(tl.float32) * bt
        else:
            et = kt
        flow = G * (et * be[None, :])
        for level in tl.range(LOWEST, LEVELS, num_stages=1):
            reader, writer = level_factors(gt, high, low, E, E_strict, level, C, FRAME, BEFORE, SPLIT, IP)
            pf = (pt * writer).to(DT)
            Y = tl.dot(pf, tl.where(pair_mask(C, level, FRAME, False), pair, tl.zeros_like(pair)), input_precision=IP)
            G += Y * reader
            flow += Y * (et * (reader * be[None, :])).to(DT)
        if BEFORE:
            later += flow
        else:
            now += flow
        if ERASE == 1:
            tl.store(derase + (id * H + h).to(tl.int64) * BT + row64 + r, tl.sum(G * kt, 0), mask=ok)
        Ge = G * be[None, :]
        if ERASE == 2:
            GT: tl.constexpr = derase.dtype if STORE else derase.dtype.element_ty
            store_tile(derase, tl.trans((G * kt).to(GT)), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
            Ge = G * bt
        if not SAME:
            store_tile(dk, tl.trans(Ge.to(OT)), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        # ---- writes: p
        Rb = state_tile(R, index, 0, cd, v, d, V, K, DESC, COL_D or COL_V)
        G = tl.dot(tl.trans(Rb), tl.trans(xb), input_precision=IP)
        for n in tl.static_range(1, NV):
            cv = n * BV
            x2 = tl.trans(load_tile(x, row, ok, H * V, h * V + cv, V - cv, v, DESC, ROWS, COL_V))
            G = tl.dot(tl.trans(state_tile(R, index, cv, cd, v, d, V, K, DESC, COL_D or COL_V)), x2, G, input_precision=IP)
        G = G * tl.exp2(transposed_factor(gt, high, low, 2, 0, C, SPLIT, IP))
        if GATE:
            wc = tl.load(carry + index.to(tl.int64) * K + cd + d, mask=cd + d < K, other=0.0)
            passing = tl.dot(tl.trans(Rb), Sb, input_precision=IP)
            for n in tl.static_range(1, NV):
                R2 = tl.trans(state_tile(R, index, n * BV, cd, v, d, V, K, DESC, COL_D or COL_V))
                S2 = state_tile(S, index, n * BV, cd, v, d, V, K, DESC, COL_D or COL_V)
                passing = tl.dot(R2, S2, passing, input_precision=IP)
            passing = tl.sum(tl.where(d[:, None] == d[None, :], passing, 0.0), 1) * wc
            total = over_time(G * pt, i < j, DT, SPLIT, IP) + passing[:, None]
        pair = tl.dot(ob, tl.trans(xb), input_precision=IP)  # [t, s]
        erased = tl.dot(yb, tl.trans(xb), input_precision=IP)
        for n in tl.static_range(1, NV):
            cv = n * BV
            x2 = tl.trans(load_tile(x, row, ok, H * V, h * V + cv, V - cv, v, DESC, ROWS, COL_V))
            o2 = load_tile(do, row, ok, stride_o, h * V + cv, V - cv, v, DESC, ROWS, COL_V)
            pair = tl.dot(o2, x2, pair, input_precision=IP)
            y2 = load_tile(y, row, ok, H * V, h * V + cv, V - cv, v, DESC, ROWS, COL_V)
            erased = tl.dot(y2, x2, erased, input_precision=IP)
        pair = (pair * scale).to(DT)
        erased = (-erased).to(DT)
        for level in tl.range(LOWEST, LEVELS, num_stages=1):
            m = pair_mask(C, level, FRAME, True)
            reader, writer = level_factors(gt, high, low, E, E_strict, level, C, FRAME, EXCL, SPLIT, IP)
            Y = tl.dot((qt * reader).to(DT), tl.where(m, pair, tl.zeros_like(pair)), input_precision=IP)
            if EXCL != BEFORE:
                reader, _ = level_factors(gt, high, low, E, E_strict, level, C, FRAME, BEFORE, SPLIT, IP)
            Y = tl.dot((et * (reader * be[None, :])).to(DT), tl.where(m, erased, tl.zeros_like(erased)), Y, input_precision=IP)
            G += Y * writer
            now -= Y * (pt * writer).to(DT)
        if not EXCL:
            G += own[None, :] * qt.to(tl.float32)
        if SAME:
            G += Ge
        store_tile(dp, tl.trans(G.to(OT)), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
        if GATE:
            total += over_time(now, i >= j, DT, SPLIT, IP)
            if EXCL or BEFORE:
                total += over_time(later, i > j, DT, SPLIT, IP)
            store_tile(dg, tl.trans(total), row, row64, ok, wide, column, K - cd, d, STORE, ROWS, COL_D)
