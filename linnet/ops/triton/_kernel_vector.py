"""Linear attention with one decay per key channel on fp32 operands (16 bit: _kernel_channel.py), in four roles (_kernel_scalar.py).

    out_t = scale * sum_s sum_c x_tc y_sc z_s e^{G_t - G_s}    the decay belongs to the contracted channels c (o, dv: SIDE_KEY)
                                                            or to the columns of z and of the output (dq, dk: not SIDE_KEY)
Everything is transposed, S is [Z, D], so that the state is the register operand of its product and a chunk may be 16 rows.
Exponents are exact sums of log-decays, products with a 0/1 matrix: no cumulative sums, no differences, and no anchor lies in the
future, so a later token changes no earlier result, bit for bit.

FRAME: inside a chunk of 16 rows e^{E_t - E_s} is split at the chunk's start, which the caller allowed by declaring a bound.
Not FRAME: any decay. Halving: the pairs (t, s) whose smallest common aligned block has 2h rows decay by e^{sum from the middle to
    t} e^{sum from s to the middle}, both <= 1: one masked product for every h = C/2 ... 1. On the key side these products do not
    depend on the state: `pairs_kernel` forms them for all chunks at once, o and dv read the same [C, C] tiles.

Gate (dk role, GATE): dg_t = D_end + sum_{t' >= t} (q.dq - k.dk)_{t'} per channel. Inside a chunk both products are formed here from
the same rounded factors, so that pairs which should cancel do; q.dq through the state comes from the dq role (`inter`); D_end is
replaced by the exact <S, R> at the end of every block of C*M tokens.
"""

import triton
import triton.language as tl

from linnet.ops.triton._kernel_common import (
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


@triton.jit
def sums(g, mask, IP: tl.constexpr):
    """[channels, C] sums of log-decays selected by the 0/1 matrix [C, C], base 2."""
    return tl.dot(g, mask.to(tl.float32), input_precision=IP) * LOG2E


@triton.jit
def selected(w, mask, start, IP: tl.constexpr):
    """start + w mask."""
    return tl.dot(w, mask.to(tl.float32), input_precision=IP) + start[:, None]


@triton.jit
def vector_role(
    x, y, z, g, pairs, o, other, inter, dg, S_in, S_out, blocks, total, cu,
    T, BT, stride_x, stride_y, stride_z, stride_g, stride_other, scale, scale_in, scale_out, floor,
    H, Hx, Hy, Hz, Hg, Ho, H_in, H_out, D, Z, in_d, in_z, ND, NZ, NS,
    BD: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr,
    SIDE_KEY: tl.constexpr, FRAME: tl.constexpr, REV: tl.constexpr, EXCL: tl.constexpr, OUT: tl.constexpr,
    DESC: tl.constexpr, ROWS: tl.constexpr,
    COL_D: tl.constexpr, COL_Z: tl.constexpr, PACKED: tl.constexpr, GATE: tl.constexpr, HAS_IN: tl.constexpr, FIRST: tl.constexpr,
    HAS_OUT: tl.constexpr, OUT_DESC: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_DESC: tl.constexpr,
    STORE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One role; arguments as in `scalar_role`. GATE: 1 write `inter` (dq role), 2 read it and write dg (dk role)."""
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
    ri = r[:, None]
    ci = r[None, :]
    OT: tl.constexpr = o.dtype if STORE else (o.dtype.element_ty if OUT else tl.float32)
    S = tl.zeros([BZ, BD], tl.float32)
    if HAS_IN:
        at, mask = state_at(S_in, part * H_in + h // (H // H_in), cd + d, cz + zz, D, Z, in_d, in_z, True)
        if FIRST:
            mask = mask & (h % (H // H_in) == 0)
        S = tl.load(at, mask=mask, other=0.0).to(tl.float32) * scale_in
    chunks = (length + C - 1) // C
    block0 = first_block(cu, n, T, C * M, PACKED) + begin // (C * M)
    chunk0 = first_block(cu, n, T, C, PACKED) + begin // C
    if SIDE_KEY:
        gd = d
        cg = cd
        WG = D
        whole = tl.zeros([BD], tl.float32)
    else:
        gd = zz
        cg = cz
        WG = Z
        whole = tl.zeros([BZ], tl.float32)
    running = tl.zeros([BZ], tl.float32)
    COL_G: tl.constexpr = COL_D if SIDE_KEY else COL_Z
    if HAS_OUT and not OUT_DESC:
        if chunks == 0:
            save_state(S_out, S * scale_out, part, h, H, H_out, cd + d, cz + zz, D, Z, in_d, in_z, True)
    for j in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - j if REV else j
        row = row0 + c * C
        ok = c * C + r < length
        yb = load_tile(y, row, ok, stride_y, (h // (H // Hy)) * D + cd, D - cd, d, DESC, ROWS, COL_D)
        zb = load_tile(z, row, ok, stride_z, (h // (H // Hz)) * Z + cz, Z - cz, zz, DESC, ROWS, COL_Z)
        gb = load_tile(g, row, ok, stride_g, (h // (H // Hg)) * WG + cg, WG - cg, gd, DESC, ROWS, COL_G)
        if OUT:
            xb = load_tile(x, row, ok, stride_x, (h // (H // Hx)) * D + cd, D - cd, d, DESC, ROWS and not DESC, COL_D)
        gb = tl.trans(tl.maximum(gb, floor))
        gb = gb.to(tl.float32)
        if not OUT:
            whole += tl.sum(gb, 1)
        # ---- factors: fq, fk inside a frame; sq, sk between the chunk's state and its tokens; dec over the chunk
        if FRAME:
            E = sums(gb, (ri <= ci), IP)
            E_read = sums(gb, (ri < ci), IP) if EXCL else E
            whole_sum = tl.sum(tl.where(ci == C - 1, E, 0.0), 1)[:, None]
            dec = tl.exp2(whole_sum)
            fq = tl.exp2(E_read)
            fk = tl.exp2(-E)
            sq = fq
            sk = fk * dec
        else:
            sq = tl.exp2(sums(gb, (ri < ci if EXCL else ri <= ci), IP))
            sk = tl.exp2(sums(gb, (ri > ci), IP))
            dec = tl.exp2(tl.sum(gb, 1) * LOG2E)[:, None]
        if REV:  # rows: the token that is summed over (in); columns: the token that is computed (out)
            keep = (ci < ri) if (EXCL or not SIDE_KEY) else (ci <= ri)
        else:
            keep = (ci > ri) if (EXCL or not SIDE_KEY) else (ci >= ri)
        zt = tl.trans(zb)
        at_z = ((id.to(tl.int64) * BT + row) * (H * Z) + h * Z + cz) + (r[None, :] * (H * Z) + zz[:, None])
        if SIDE_KEY:
            yt = tl.trans(yb)
            if OUT:
                xt = tl.trans(xb)
                if FRAME:
                    if REV:
                        xf = xt * fk
                        yf = yt * fq
                    else:
                        xf = xt * fq
                        yf = yt * fk
                    A = tl.dot(tl.trans(yf), xf, input_precision=IP)
                    A = tl.where(keep, A, 0.0)
                else:
                    at_pair = pairs + ((chunk0 + c).to(tl.int64) * H + h) * (C * C)
                    if REV:  # stored as [earlier token, later token]
                        A = tl.load(at_pair + (ci * C + ri))
                    else:
                        A = tl.load(at_pair + (ri * C + ci))
                    A = tl.where(id == 0, A, tl.zeros_like(A))
                if REV:
                    xs = xt * sk
                else:
                    xs = xt * sq
                O = tl.dot(S, xs, input_precision=IP)
            if REV:
                ys = yt * sq
            else:
                ys = yt * sk
            if OUT:
                O = tl.dot(zt, A, O, input_precision=IP)
            S = tl.dot(zt, tl.trans(ys), S * tl.trans(dec), input_precision=IP)
        else:
            P = tl.dot(yb, tl.trans(xb), input_precision=IP)
            if REV:
                fo = sk
                zs = zt * sq
            else:
                fo = sq
                zs = zt * sk
            if not EXCL:
                own = tl.sum(tl.where(ri == ci, P, 0.0), 0)
            P = tl.where(keep, P, 0.0)
            O = tl.dot(S, tl.trans(xb), input_precision=IP) * fo
            inside = (cz + zz < Z)[:, None] & ok[None, :]
            if GATE == 1:
                tl.store(inter + at_z, (O * scale).to(inter.dtype.element_ty), mask=inside)
            if GATE == 2:
                kt = tl.trans(load_tile(other, row, ok, stride_other, (h // (H // Ho)) * Z + cz, Z - cz, zz, DESC, ROWS, COL_Z))
                through = tl.trans(load_tile(inter, id * BT + row, ok, H * Z, h * Z + cz, Z - cz, zz, DESC, ROWS, COL_Z)).to(
                    tl.float32
                )
                through = zt * through
                own_k = kt * O * scale
                Q = tl.where((ci > ri), tl.dot(xb, tl.trans(yb), input_precision=IP), 0.0)  # the same products, [out, in]
                wq = tl.zeros([BZ, C], tl.float32)
                wk = tl.zeros([BZ, C], tl.float32)
            if FRAME:
                if REV:
                    fi = fk
                    zf = zt * fq
                else:
                    fi = fq
                    zf = zt * fk
                Y = tl.dot(zf, P, input_precision=IP)
                O += Y * fi
                if GATE == 2:
                    kf = kt * fk
                    wk = kf * Y
                    wq = zf * tl.dot(kf, Q, input_precision=IP)
            else:
                for i in tl.static_range(0, 6):
                    hh = C >> (i + 1)
                    if hh >= 1:
                        middle = (ci // (2 * hh)) * (2 * hh) + hh
                        after = (ri >= middle) & (ri < ci if EXCL else ri <= ci) & (ci >= middle)
                        before = (ri > ci) & (ri < middle) & (ci < middle)
                        fl = tl.exp2(sums(gb, (after | before), IP))
                        level = (ri // (2 * hh) == ci // (2 * hh)) & (ri // hh != ci // hh)
                        zl = zt * fl
                        Y = tl.dot(zl, tl.where(level, P, 0.0), input_precision=IP)
                        O += Y * fl
                        if GATE == 2:
                            kl = kt * fl
                            wk += kl * Y
                            wq += zl * tl.dot(kl, tl.where(level, Q, 0.0), input_precision=IP)
            if not EXCL:
                O += own[None, :] * zt
            if BLOCKS == 1:
                if (c + 1) % M == 0 or c == chunks - 1:
                    save_block(blocks, S, (block0 + c // M) * H + h, cd, cz, d, zz, D, Z, BLOCKS_DESC, True)
            if GATE == 2:
                tail = ri >= ci
                if EXCL:
                    through += wq * scale
                    w = wk * -scale
                else:
                    w = through + (wq - wk) * scale
                if (c + 1) % M == 0 or c == chunks - 1:  # what a chunk sends beyond its block counts from the tokens before t
                    running = (
                        tl.sum(S * load_block(blocks, (block0 + c // M) * H + h, cd, cz, d, zz, D, Z, BLOCKS_DESC, True), 1)
                        * scale
                        * tl.sum(dec, 1)
                    )
                    R = selected(own_k, (ri < ci), running, IP)
                else:
                    w = w - own_k
                    R = tl.zeros([BZ, C], tl.float32) + running[:, None]
                running += tl.sum(w, 1)
                R += selected(w, tail, tl.zeros_like(running), IP)
                if EXCL:
                    R += selected(through, (ri > ci), tl.zeros_like(running), IP)
                    running += tl.sum(through, 1)
                tl.store(dg + at_z, R.to(dg.dtype.element_ty), mask=inside)
            S = tl.dot(zs, yb, S * dec, input_precision=IP)
        if OUT:
            ob = tl.trans((O * scale).to(OT))
            store_tile(o, ob, id * BT + row, id.to(tl.int64) * BT + row, ok, H * Z, h * Z + cz, Z - cz, zz, STORE, ROWS, COL_Z)
        if HAS_OUT and not OUT_DESC:  # in the loop: a store behind it would impose its layout on the state in every iteration
            if j == chunks - 1:
                save_state(S_out, S * scale_out, part, h, H, H_out, cd + d, cz + zz, D, Z, in_d, in_z, True)
    if OUT_DESC:
        rep = H // H_out
        if h % rep == 0:
            S_out.store([(part * H_out + h // rep) * D + cd, cz], tl.trans(S * scale_out))
    if HAS_OUT:
        if not OUT and SIDE_KEY:
            if iz == 0:
                tl.store(total + (part * H + h).to(tl.int64) * D + cd + d, whole * LOG2E, mask=cd + d < D)


@triton.jit
def pairs_kernel(
    q, k, g, pairs, cu, T, N, stride_q, stride_k, stride_g, H, Hq, Hk, Hg, D, ND,
    BD: tl.constexpr, C: tl.constexpr, EXCL: tl.constexpr, ROWS: tl.constexpr, COL_D: tl.constexpr, PACKED: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """pairs[chunk, h, s, t] = sum_c q_tc k_sc e^{sum of g over s+1..t} for any decay; a program per chunk of C tokens and head."""
    h = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    first, length, begin = block_range(cu, chunk, T, N, C, PACKED)
    d = tl.arange(0, BD)
    r = tl.arange(0, C)
    ri = r[:, None]
    ci = r[None, :]
    if begin < length:
        row = first + begin
        ok = begin + r < length
        A = tl.zeros([C, C], tl.float32)
        for id in range(0, ND):
            cd = id * BD
            qt = tl.trans(load_tile(q, row, ok, stride_q, (h // (H // Hq)) * D + cd, D - cd, d, False, ROWS, COL_D))
            kt = tl.trans(load_tile(k, row, ok, stride_k, (h // (H // Hk)) * D + cd, D - cd, d, False, ROWS, COL_D))
            gb = load_tile(g, row, ok, stride_g, (h // (H // Hg)) * D + cd, D - cd, d, False, ROWS, COL_D)
            gb = tl.trans(tl.maximum(gb, -200.0))
            gb = gb.to(tl.float32)
            part = tl.zeros([C, C], tl.float32)
            for i in tl.static_range(0, 6):
                hh = C >> (i + 1)
                if hh >= 1:
                    middle = (ci // (2 * hh)) * (2 * hh) + hh
                    after = (ri >= middle) & (ri < ci if EXCL else ri <= ci) & (ci >= middle)
                    before = (ri > ci) & (ri < middle) & (ci < middle)
                    fl = tl.exp2(sums(gb, (after | before), IP))
                    Al = tl.dot(tl.trans(kt * fl), qt * fl, input_precision=IP)
                    part = tl.where((ri < ci) & (ri // (2 * hh) == ci // (2 * hh)) & (ri // hh != ci // hh), Al, part)
            if not EXCL:
                own = tl.sum(qt * kt, 0)
                part = tl.where(ri == ci, own[None, :], part)
            A += part
        at = pairs + (chunk.to(tl.int64) * H + h) * (C * C) + ri * C + ci
        tl.store(at, A)
