"""Gluon kernels for Hopper: gradients of a chunk with 128 key and value channels, bf16, sequences of whole blocks.

`gradients_hopper` is `gradients_kernel` (_kernel_gradients.py), with or without the normalizer; `delta_hopper` is
`gradients_scalar` (_kernel_delta.py) and `channel_hopper` is `gradients_near` (_kernel_delta_frame.py) for one key, read and erased
after the decay; `queries_hopper` is `queries_role`, twice, and `finish_kernel` (_kernel_channel.py). Here every tile comes and goes
by the bulk copy engine, asked for when the program starts or as soon as its buffer is free, and accumulators become operands in
registers: no barriers but those of the buffers, 113 KiB of shared memory and four warps a program, two programs a processor. What
fits into registers decides: a vector is loaded where it is used, again if need be, because a spill goes past the small cache that
is left. Eight warps a processor hide no latency: decays come with the tiles, or are loaded a turn ahead.

S is copied in a second time, by then from L2, for <S, R>: there is no room for both states.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
LEAST = gl.constexpr(2.0**-96)  # of every channel of a chunk: then no factor leaves the range of bf16


@gluon.jit
def emit(X, stage, out, row, column, FIRST: gl.constexpr):
    """Write tile X by way of the buffer `stage`; FIRST: nothing has been written from it."""
    if not FIRST:
        tma.store_wait(0)
    gl.thread_barrier()  # all warps have read what it held
    stage.store(X.to(stage.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(out, [row, column], stage)


@gluon.jit
def product(a, b, states, zero_p, ri, ci):
    """<S, R> of S, whose halves are in a and b, and R in `states`: the diagonal of S R^T, cheaper than the tiles in registers."""
    C: gl.constexpr = a.shape[0]
    P = warpgroup_mma(a, states.slice(0, C).permute((1, 0)), zero_p, use_acc=False, is_async=True)
    P = warpgroup_mma(b, states.slice(C, C).permute((1, 0)), P, is_async=True)
    P = warpgroup_mma_wait(0, deps=[P])
    return gl.sum(gl.sum(gl.where(ri[:, None] == ci[None, :], P, 0.0), 1), 0)


@gluon.jit
def gradients_hopper(
    q, k, v, do, S, S_half, R, dq, dk, dv, P_sum, G_sum, C_sum, K_sum, query, key, products, dn, s_parts, r_parts,
    BT, G_width, scale, H, Hq, Hk, Hv, Hg, HS,
    C: gl.constexpr, D: gl.constexpr, EXCL: gl.constexpr, DECAY: gl.constexpr, GATE: gl.constexpr,
    GAIN: gl.constexpr, ONES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `gradients_kernel`; query has parts [1 + num_warps, H, B*T]."""
    h = gl.program_id(0) % H
    chunk = gl.program_id(0) // H
    row = chunk * C
    at_S = chunk * HS + h // (H // HS)
    at_R = chunk * H + h
    BF: gl.constexpr = q.dtype
    LP: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, C, 16])
    LX: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    A_OP: gl.constexpr = gl.DotOperandLayout(0, LX, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LP)  # a value per row of a [C, C] tile
    COL: gl.constexpr = gl.SliceLayout(0, LP)
    ROW_X: gl.constexpr = gl.SliceLayout(1, LX)
    COL_X: gl.constexpr = gl.SliceLayout(0, LX)

    vs = gl.allocate_shared_memory(BF, [C, D], v.layout)
    us = gl.allocate_shared_memory(BF, [C, D], do.layout)
    ks = gl.allocate_shared_memory(BF, [C, D], k.layout)
    qs = gl.allocate_shared_memory(BF, [C, D], q.layout)
    states = gl.allocate_shared_memory(BF, [D, D], S.layout)  # S, then R
    stage = gl.allocate_shared_memory(BF, [C, D], dq.layout)
    bars = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.expect(bars.index(0), 2 * C * D * 2)
    tma.async_copy_global_to_shared(do, [row, h * D], bars.index(0), us)
    tma.async_copy_global_to_shared(v, [row, (h // (H // Hv)) * D], bars.index(0), vs)
    mbarrier.expect(bars.index(1), D * D * 2)
    tma.async_copy_global_to_shared(S, [at_S * D, 0], bars.index(1), states)
    mbarrier.expect(bars.index(2), 2 * C * D * 2)
    tma.async_copy_global_to_shared(q, [row, (h // (H // Hq)) * D], bars.index(2), qs)
    tma.async_copy_global_to_shared(k, [row, (h // (H // Hk)) * D], bars.index(2), ks)

    ri = gl.arange(0, C, layout=ROW)
    ci = gl.arange(0, C, layout=COL)
    rx = gl.arange(0, C, layout=ROW_X)
    dx = gl.arange(0, D, layout=COL_X)
    if DECAY:
        hg = h // (H // Hg)
        at_g = hg.to(gl.int64) * G_width + row
        GC = gl.load(C_sum + (hg * (gl.num_programs(0) // H) + chunk).to(gl.int64))
        Gq_row = gl.load(P_sum + at_g + ri)
        Gq_col = gl.load(P_sum + at_g + ci)
        Gq_x = gl.load(P_sum + at_g + rx)
        if GAIN or EXCL:
            of_key = K_sum if GAIN else G_sum
            Gk_row = gl.load(of_key + at_g + ri)
            Gk_col = gl.load(of_key + at_g + ci)
            Gk_x = gl.load(of_key + at_g + rx)
        else:
            Gk_row = Gq_row
            Gk_col = Gq_col
            Gk_x = Gq_x
        w_query = gl.exp2(Gq_x)
        w_key = gl.exp2(gl.minimum(GC - Gk_x, 0.0))
    if ONES:
        at_n = dn + h.to(gl.int64) * BT + row
        dn_row = gl.load(at_n + ri)
        dn_col = gl.load(at_n + ci)
        dn_x = gl.load(at_n + rx)
        s = gl.load(s_parts + at_S.to(gl.int64) * D + dx)
    zero_p = gl.zeros([C, C], gl.float32, LP)
    zero_x = gl.zeros([C, D], gl.float32, LX)

    # ---- queries
    mbarrier.wait(bars.index(0), 0)
    P = warpgroup_mma(us, vs.permute((1, 0)), zero_p, use_acc=False, is_async=True)  # rows: the later token
    mbarrier.wait(bars.index(1), 0)
    X = warpgroup_mma(us, states.permute((1, 0)), zero_x, use_acc=False, is_async=True)
    P = warpgroup_mma_wait(1, deps=[P])
    if ONES:
        P += dn_row[:, None]
    if DECAY:
        P = P * gl.exp2(gl.minimum(Gq_row[:, None] - Gk_col[None, :], 0.0))
    keep = ri[:, None] > ci[None, :] if EXCL else ri[:, None] >= ci[None, :]
    P16 = gl.convert_layout(gl.where(keep, P, 0.0).to(BF), A_OP)
    X = warpgroup_mma_wait(0, deps=[X])
    gl.thread_barrier()  # all warps have read S
    mbarrier.expect(bars.index(3), D * D * 2)
    tma.async_copy_global_to_shared(R, [at_R * D, 0], bars.index(3), states)
    if ONES:
        X += dn_x[:, None] * s[None, :]
    if DECAY:
        X = X * w_query[:, None]
    mbarrier.wait(bars.index(2), 0)
    if GATE:
        weight_q = gl.sum(X * qs.load(LX).to(gl.float32), 1)
    X = warpgroup_mma(P16, ks, X, is_async=True)
    # the other way round, meanwhile: rows are the earlier token
    P = warpgroup_mma(vs, us.permute((1, 0)), zero_p, use_acc=False, is_async=True)
    A = warpgroup_mma(ks, qs.permute((1, 0)), zero_p, use_acc=False, is_async=True)
    X = warpgroup_mma_wait(2, deps=[X])
    emit(X * scale, stage, dq, row, h * D, True)
    P, A = warpgroup_mma_wait(0, deps=[P, A])
    if ONES:
        P += dn_col[None, :]
    if DECAY:
        decay = gl.exp2(gl.minimum(Gq_col[None, :] - Gk_row[:, None], 0.0))
        P = P * decay
    keep = ri[:, None] < ci[None, :] if EXCL else ri[:, None] <= ci[None, :]
    P = gl.where(keep, P, 0.0)
    if GATE:
        W = A * P
        own = gl.sum(gl.where(ri[:, None] == ci[None, :], W, 0.0), 1)
        W = gl.where(ri[:, None] < ci[None, :], W, 0.0)
        by_warp = gl.sum(W.reshape([num_warps, C // num_warps, C]), 1)  # added up by gate_kernel: no exchange between warps
        pw = gl.arange(0, num_warps, layout=gl.SliceLayout(1, by_warp.type.layout))
        pc = gl.arange(0, C, layout=gl.SliceLayout(0, by_warp.type.layout))
        at_w = query + ((1 + pw)[:, None] * H + h).to(gl.int64) * BT + row + pc[None, :]
        gl.store(at_w, by_warp * scale)
        weight_k = gl.sum(W, 1)
    P16 = gl.convert_layout(P.to(BF), A_OP)
    if DECAY:
        A = A * decay
    A16 = gl.convert_layout(gl.where(keep, A, 0.0).to(BF), A_OP)
    # ---- values and keys
    mbarrier.wait(bars.index(3), 0)
    X = warpgroup_mma(ks, states, zero_x, use_acc=False, is_async=True)
    X = warpgroup_mma_wait(0, deps=[X])
    if DECAY:
        X = X * w_key[:, None]
    X = warpgroup_mma(A16, us, X, is_async=True)
    Y = warpgroup_mma(vs, states.permute((1, 0)), zero_x, use_acc=False, is_async=True)
    X = warpgroup_mma_wait(1, deps=[X])
    emit(X * scale, stage, dv, row, h * D, False)
    Y = warpgroup_mma_wait(0, deps=[Y])
    if ONES:
        Y += gl.load(r_parts + at_R.to(gl.int64) * D + dx)[None, :]
    if DECAY:
        Y = Y * w_key[:, None]
    if GATE:
        gl.thread_barrier()  # all warps have read do and v
        mbarrier.expect(bars.index(0), D * D * 2)
        tma.async_copy_global_to_shared(S_half, [at_S * D, 0], bars.index(0), us)
        tma.async_copy_global_to_shared(S_half, [at_S * D + C, 0], bars.index(0), vs)
        beyond = gl.sum(Y * ks.load(LX).to(gl.float32), 1)
    Y = warpgroup_mma(P16, qs, Y, is_async=True)
    Y = warpgroup_mma_wait(0, deps=[Y])
    emit(Y * scale, stage, dk, row, h * D, False)
    if GATE:
        at = h.to(gl.int64) * BT + row
        at_end = (H + h).to(gl.int64) * BT + row
        gl.store(query + at + rx, weight_q * scale)
        weight_k = gl.convert_layout(weight_k, ROW_X)
        gl.store(key + at + rx, weight_k * scale)
        gl.store(key + at_end + rx, beyond * scale)
        if GAIN:
            gl.store(key + (2 * H + h).to(gl.int64) * BT + row + ri, own * scale)
        mbarrier.wait(bars.index(0), 1)
        total = product(us, vs, states, zero_p, ri, ci)
        if ONES:
            s = gl.load(s_parts + at_S.to(gl.int64) * D + dx)  # again: they would have held registers all along
            total += gl.sum(s * gl.load(r_parts + at_R.to(gl.int64) * D + dx), 0)
        gl.store(products + at_R, total * gl.exp2(GC) * scale)
    tma.store_wait(0)


@gluon.jit
def delta_hopper(
    q, p, x, y, do, S, S_half, R, dq, dp, factors, carry, erase, query, key, products, derase, BT, stride_e, scale, H, Rq, Rp, Re,
    C: gl.constexpr, D: gl.constexpr, DECAY: gl.constexpr, ERASE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `gradients_scalar`, but of the gate's gradient there are query [H, BT] and key [2, H, BT], which `gate_kernel` adds up."""
    h = gl.program_id(0) % H
    chunk = gl.program_id(0) // H
    row = chunk * C
    at = chunk * H + h
    BF: gl.constexpr = q.dtype
    LP: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, C, 16])
    LX: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    A_OP: gl.constexpr = gl.DotOperandLayout(0, LX, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LP)
    COL: gl.constexpr = gl.SliceLayout(0, LP)
    ROW_X: gl.constexpr = gl.SliceLayout(1, LX)
    us = gl.allocate_shared_memory(BF, [C, D], do.layout)
    ys = gl.allocate_shared_memory(BF, [C, D], y.layout)
    xs = gl.allocate_shared_memory(BF, [C, D], x.layout)
    qs = gl.allocate_shared_memory(BF, [C, D], q.layout)
    ps = gl.allocate_shared_memory(BF, [C, D], p.layout)
    states = gl.allocate_shared_memory(BF, [D, D], S.layout)  # S, then R
    bars = gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(5):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.expect(bars.index(0), 2 * C * D * 2)
    tma.async_copy_global_to_shared(do, [row, h * D], bars.index(0), us)
    tma.async_copy_global_to_shared(x, [row, h * D], bars.index(0), xs)
    mbarrier.expect(bars.index(1), D * D * 2)
    tma.async_copy_global_to_shared(S, [at * D, 0], bars.index(1), states)
    mbarrier.expect(bars.index(2), 2 * C * D * 2)
    tma.async_copy_global_to_shared(p, [row, (h // Rp) * D], bars.index(2), ps)
    tma.async_copy_global_to_shared(q, [row, (h // Rq) * D], bars.index(2), qs)
    mbarrier.expect(bars.index(3), C * D * 2)
    tma.async_copy_global_to_shared(y, [row, h * D], bars.index(3), ys)

    ri = gl.arange(0, C, layout=ROW)
    ci = gl.arange(0, C, layout=COL)
    rx = gl.arange(0, C, layout=ROW_X)
    line = h.to(gl.int64) * BT + row
    whole = gl.num_programs(0).to(gl.int64) * C  # H * BT
    fq = gl.load(factors + line + rx)
    if ERASE:
        at_e = erase + row.to(gl.int64) * stride_e + h // Re
    if DECAY:
        G_row = gl.load(factors + 4 * whole + line + ri)
        G_col = gl.load(factors + 4 * whole + line + ci)
    zero_p = gl.zeros([C, C], gl.float32, LP)
    zero_x = gl.zeros([C, D], gl.float32, LX)

    # ---- reads
    mbarrier.wait(bars.index(0), 0)
    P = warpgroup_mma(us, xs.permute((1, 0)), zero_p, use_acc=False, is_async=True)  # rows: the later token
    T = warpgroup_mma(xs, us.permute((1, 0)), zero_p, use_acc=False, is_async=True)  # rows: the earlier token
    mbarrier.wait(bars.index(1), 0)
    X = warpgroup_mma(us, states, zero_x, use_acc=False, is_async=True)
    P = warpgroup_mma_wait(2, deps=[P])
    own = gl.convert_layout(gl.sum(gl.where(ri[:, None] == ci[None, :], P, 0.0), 1), ROW_X) * scale
    if DECAY:
        P = P * gl.exp2(gl.minimum(G_row[:, None] - G_col[None, :], 0.0))
    P16 = gl.convert_layout(gl.where(ri[:, None] > ci[None, :], P * scale, 0.0).to(BF), A_OP)
    T = warpgroup_mma_wait(1, deps=[T])
    if DECAY:
        T = T * gl.exp2(gl.minimum(G_col[None, :] - G_row[:, None], 0.0))
    T16 = gl.convert_layout(gl.where(ri[:, None] < ci[None, :], T * scale, 0.0).to(BF), A_OP)
    X = warpgroup_mma_wait(0, deps=[X])
    X = X * fq[:, None]
    mbarrier.wait(bars.index(2), 0)
    X = warpgroup_mma(P16, ps, X, is_async=True)
    X = warpgroup_mma_wait(0, deps=[X])
    if DECAY:
        weight_q = gl.sum(X * qs.load(LX).to(gl.float32), 1)
    emit(X + own[:, None] * ps.load(LX).to(gl.float32), us, dq, row, h * D, True)
    # ---- erasures
    if ERASE:
        be_col = gl.load(at_e + ci * stride_e).to(gl.float32)
    if DECAY:
        G_col = gl.load(factors + 4 * whole + line + ci)
        G_row = gl.load(factors + 4 * whole + line + ri)
    mbarrier.wait(bars.index(3), 0)
    P = warpgroup_mma(xs, ys.permute((1, 0)), zero_p, use_acc=False, is_async=True)  # rows: the earlier token
    L = warpgroup_mma(ys, xs.permute((1, 0)), zero_p, use_acc=False, is_async=True)
    X = warpgroup_mma(ys, states, zero_x, use_acc=False, is_async=True)
    P = warpgroup_mma_wait(2, deps=[P])
    if DECAY:
        P = P * gl.exp2(gl.minimum(G_col[None, :] - G_row[:, None], 0.0))
    if ERASE:
        P = P * be_col[None, :]
    E16 = gl.convert_layout(gl.where(ri[:, None] < ci[None, :], -P, 0.0).to(BF), A_OP)
    L = warpgroup_mma_wait(1, deps=[L])
    if DECAY:
        L = L * gl.exp2(gl.minimum(G_row[:, None] - G_col[None, :], 0.0))
    L16 = gl.convert_layout(gl.where(ri[:, None] > ci[None, :], -L, 0.0).to(BF), A_OP)
    X = warpgroup_mma_wait(0, deps=[X])
    if DECAY:
        tma.store_wait(0)  # dq has left its buffer
    gl.thread_barrier()  # all warps have read S and y
    mbarrier.expect(bars.index(4), D * D * 2)
    tma.async_copy_global_to_shared(R, [at * D, 0], bars.index(4), states)
    if DECAY:
        mbarrier.expect(bars.index(0), D * D * 2)
        tma.async_copy_global_to_shared(S_half, [at * D, 0], bars.index(0), us)
        tma.async_copy_global_to_shared(S_half, [at * D + C, 0], bars.index(0), ys)
    if DECAY:
        X = X * (-gl.exp2(gl.load(factors + 4 * whole + line + rx)))[:, None]
    else:
        X = -X
    X = warpgroup_mma(L16, ps, X, is_async=True)
    X = warpgroup_mma_wait(0, deps=[X])
    if ERASE or DECAY:
        erases = gl.sum(X * ps.load(LX).to(gl.float32), 1)
    if ERASE:
        gl.store(derase + line + rx, erases)
        be_x = gl.load(at_e + rx * stride_e).to(gl.float32)
        X = X * be_x[:, None]
        if DECAY:
            weight_q += erases * be_x
    elif DECAY:
        weight_q += erases
    if DECAY:
        gl.store(query + line + rx, weight_q)
    # ---- writes: what the pairs inside the chunk send
    Y = warpgroup_mma(T16, qs, zero_x, use_acc=False, is_async=True)
    Y = warpgroup_mma(E16, ps, Y, is_async=True)
    Y = warpgroup_mma_wait(0, deps=[Y])
    if DECAY:
        gl.store(key + line + rx, gl.sum(Y * ps.load(LX).to(gl.float32), 1))
    Y += X
    Y += own[:, None] * qs.load(LX).to(gl.float32)
    # ---- writes: beyond the chunk
    mbarrier.wait(bars.index(4), 0)
    X = warpgroup_mma(xs, states, zero_x, use_acc=False, is_async=True)
    X = warpgroup_mma_wait(0, deps=[X])
    if DECAY:
        X = X * gl.load(factors + 2 * whole + line + rx)[:, None]
        beyond = gl.sum(X * ps.load(LX).to(gl.float32), 1)
        gl.store(key + whole + line + rx, beyond)
    emit(X + Y, qs, dp, row, h * D, False)
    if DECAY:
        mbarrier.wait(bars.index(0), 1)
        at_c = carry + h.to(gl.int64) * (gl.num_programs(0) // H) + chunk
        gl.store(products + at, product(us, ys, states, zero_p, ri, ci) * gl.load(at_c))
    tma.store_wait(0)


@gluon.jit
def times_both(a, b, zero):
    """a b^T of [C, 2 C] tiles in halves."""
    P = warpgroup_mma(a.index(0), b.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(a.index(1), b.index(1).permute((1, 0)), P, is_async=True)


@gluon.jit
def on_state(a, first, second, zero):
    """a S of a [C, 2 C] tile and a state of 2 C rows, in halves."""
    X = warpgroup_mma(a.index(0), first, zero, use_acc=False, is_async=True)
    return warpgroup_mma(a.index(1), second, X, is_async=True)


@gluon.jit
def ask(S, R, q, p, tiles, bars, b, row, index, of_q, of_p, C: gl.constexpr, D: gl.constexpr):
    """Ask for the tiles of block b of key channels."""
    bar = bars.index(b % 2)
    at = b % 2 * 6
    mbarrier.expect(bar, 6 * C * D * 2)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(S, [(index * 2 + i) * C, b * D], bar, tiles.index(at + i))
        tma.async_copy_global_to_shared(R, [(index * 2 + i) * C, b * D], bar, tiles.index(at + 2 + i))
    tma.async_copy_global_to_shared(q, [row, of_q + b * D], bar, tiles.index(at + 4))
    tma.async_copy_global_to_shared(p, [row, of_p + b * D], bar, tiles.index(at + 5))


@gluon.jit
def split(X, high, low):
    """X in fp32 as a sum of two 16-bit tiles."""
    head = X.to(high.dtype)
    high.store(head)
    low.store((X - head.to(gl.float32)).to(high.dtype))


@gluon.jit
def channel_hopper(
    q, p, x, y, do, S, R, dq, dp, g, carry, erase, dg, derase, BT, stride_g, stride_e, scale, floor, H, Rq, Rp, Rg, Re,
    C: gl.constexpr, D: gl.constexpr, ND: gl.constexpr, GATE: gl.constexpr, ERASE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `gradients_near`: all of a chunk, D key channels after D key channels, with the next ones on their way.

    Pairs of tokens are multiplied once for all channels. dg is the sum over later tokens of Z - now and the sum of all of now, one
    product with a triangle where `gradients_near` has three. Tiles that decay too far are left to `gradients_frame`.
    """
    h = gl.program_id(0) % H
    chunk = gl.program_id(0) // H
    K: gl.constexpr = D * ND
    row = chunk * C
    index = chunk * H + h
    BF: gl.constexpr = q.dtype
    LP: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, C, 16])
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    A_OP: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    ROW_P: gl.constexpr = gl.SliceLayout(1, LP)
    COL_P: gl.constexpr = gl.SliceLayout(0, LP)
    ROW: gl.constexpr = gl.SliceLayout(1, L)
    COL: gl.constexpr = gl.SliceLayout(0, L)
    us = gl.allocate_shared_memory(BF, [2, C, C], do.layout)
    xs = gl.allocate_shared_memory(BF, [2, C, C], x.layout)
    ys = gl.allocate_shared_memory(BF, [2, C, C], y.layout)
    own_tiles = gl.allocate_shared_memory(BF, [12, C, D], q.layout)  # S in two halves, R in two halves, q, p; twice
    first = gl.allocate_shared_memory(BF, [1, C, D], q.layout)
    second = gl.allocate_shared_memory(BF, [1, C, D], q.layout)
    third = gl.allocate_shared_memory(BF, [1, C, D], q.layout)
    stage = gl.allocate_shared_memory(BF, [1, C, D], q.layout)
    bars = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.expect(bars.index(2), 6 * C * C * 2)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(do, [row, (h * 2 + i) * C], bars.index(2), us.index(i))
        tma.async_copy_global_to_shared(x, [row, (h * 2 + i) * C], bars.index(2), xs.index(i))
        tma.async_copy_global_to_shared(y, [row, (h * 2 + i) * C], bars.index(2), ys.index(i))
    ask(S, R, q, p, own_tiles, bars, 0, row, index, h // Rq * K, h // Rp * K, C, D)
    ri = gl.arange(0, C, layout=ROW_P)
    ci = gl.arange(0, C, layout=COL_P)
    r = gl.arange(0, C, layout=ROW)
    d = gl.arange(0, D, layout=COL)
    ones = gl.full([C, C], 1.0, gl.float32, LP)
    zero_p = gl.zeros([C, C], gl.float32, LP)
    zero = gl.zeros([C, D], gl.float32, L)
    if ERASE == 1:
        be = gl.load(erase + (row + r).to(gl.int64) * stride_e + h // Re).to(gl.float32)[:, None]
    # ---- pairs of tokens, the same for all key channels
    mbarrier.wait(bars.index(2), 0)
    P = times_both(us, xs, zero_p)
    T = times_both(xs, us, zero_p)
    P = warpgroup_mma_wait(2, deps=[P])
    P = P * scale
    own = gl.convert_layout(gl.sum(gl.where(ri[:, None] == ci[None, :], P, 0.0), 1), ROW)
    P16 = gl.convert_layout(gl.where(ri[:, None] > ci[None, :], P, 0.0).to(BF), A_OP)
    P = times_both(ys, xs, zero_p)
    T = warpgroup_mma_wait(2, deps=[T])
    T16 = gl.convert_layout(gl.where(ri[:, None] < ci[None, :], T * scale, 0.0).to(BF), A_OP)
    T = times_both(xs, ys, zero_p)
    P = warpgroup_mma_wait(2, deps=[P])
    L16 = gl.convert_layout(gl.where(ri[:, None] > ci[None, :], -P, 0.0).to(BF), A_OP)
    T = warpgroup_mma_wait(0, deps=[T])
    U16 = gl.convert_layout(gl.where(ri[:, None] < ci[None, :], -T, 0.0).to(BF), A_OP)

    at_kept = carry + index.to(gl.int64) * K
    kept_next = gl.load(at_kept + d)
    G_next = gl.load(g + (row + r).to(gl.int64)[:, None] * stride_g + h // Rg * K + d[None, :])
    for b in range(ND):
        kept = kept_next
        G = gl.maximum(G_next.to(gl.float32), floor)
        least = gl.min(kept, 0)
        # Zero, but the compiler does not know. What is formed with it holds no registers through all of the loop, and is not
        # constant: parts of constant operands in registers ptxas 12.8 sets too late (tests/triton/machine_code.py looks for it)
        nil = (least > 2.0).to(gl.int32)
        rows = (row + nil + r).to(gl.int64)[:, None]
        tma.store_wait(0)  # dp has left its buffer
        gl.thread_barrier()
        if b + 1 < ND:
            ask(S, R, q, p, own_tiles, bars, b + 1, row, index, h // Rq * K, h // Rp * K, C, D)
        at = b % 2 * 6
        qs = own_tiles.index(at + 4)
        ps = own_tiles.index(at + 5)
        if least >= LEAST:
            at_out = (rows * H + h) * K + d[None, :]
            if ERASE == 2:
                at_e = erase + rows * stride_e + h // Re * K + d[None, :]
            written = first.index(nil)
            read = second.index(nil)
            erased = third.index(nil)
            split(G, written, read)
            fence_async_shared()
            gl.thread_barrier()
            after = gl.convert_layout(gl.where(ri[:, None] > ci[None, :] + nil, ones, 0.0).to(BF), A_OP)
            E = warpgroup_mma(after, written, zero, use_acc=False, is_async=True)
            E = warpgroup_mma(after, read, E, is_async=True)
            mbarrier.wait(bars.index(b % 2), b // 2 % 2)
            X = on_state(us, own_tiles.index(at), own_tiles.index(at + 1), zero)
            Y = on_state(ys, own_tiles.index(at), own_tiles.index(at + 1), zero)
            E = warpgroup_mma_wait(4, deps=[E])
            E = (E + G) * LOG2E
            reader = gl.exp2(E)
            gl.thread_barrier()  # all warps have read the log-decays
            written.store((ps.load(L).to(gl.float32) * gl.exp2(0.0 - E)).to(BF))
            read.store((qs.load(L).to(gl.float32) * reader).to(BF))
            if ERASE == 2:
                be = gl.load(at_e + b * D).to(gl.float32)
            if ERASE:
                erased.store((ps.load(L).to(gl.float32) * be * reader).to(BF))
            else:
                erased.store((ps.load(L).to(gl.float32) * reader).to(BF))
            fence_async_shared()
            gl.thread_barrier()
            # ---- reads
            I = warpgroup_mma(P16, written, zero, use_acc=False, is_async=True)
            X, I = warpgroup_mma_wait(0, deps=[X, I])
            F = warpgroup_mma(L16, written, zero, use_acc=False, is_async=True)
            X = X * (reader * scale)
            if GATE:
                now = X * qs.load(L).to(gl.float32) + I * read.load(L).to(gl.float32)
            X = X + I * reader + own[:, None] * ps.load(L).to(gl.float32)
            out = stage.index(nil)
            out.store(X.to(BF))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(dq, [row, h * K + b * D], out)
            # ---- erasures
            Y, F = warpgroup_mma_wait(0, deps=[Y, F])
            I = warpgroup_mma(T16, read, zero, use_acc=False, is_async=True)
            I = warpgroup_mma(U16, erased, I, is_async=True)
            Y = Y * (0.0 - reader)
            if GATE:
                X = Y * ps.load(L).to(gl.float32)
                if ERASE:
                    X = X * be
                now += X + F * erased.load(L).to(gl.float32)
            Y = Y + F * reader
            if ERASE:
                erases = Y * ps.load(L).to(gl.float32)
                if ERASE == 1:
                    gl.store(derase + (b * H + h).to(gl.int64) * BT + row + r, gl.sum(erases, 1))
                else:
                    gl.store(derase + at_out + b * D, erases)
                Y = Y * be
            # ---- writes
            Z = on_state(xs, own_tiles.index(at + 2), own_tiles.index(at + 3), zero)
            Z, I = warpgroup_mma_wait(0, deps=[Z, I])
            writer = 1.0 / reader
            Z = Z * (writer * kept[None, :])
            Y = Y + Z + I * writer + own[:, None] * qs.load(L).to(gl.float32)
            if GATE:
                now -= I * written.load(L).to(gl.float32)
                Z = Z * ps.load(L).to(gl.float32) - now
                for i in gl.static_range(2):  # and <S, R> of every channel
                    X = own_tiles.index(at + i).load(L).to(gl.float32) * own_tiles.index(at + 2 + i).load(L).to(gl.float32)
                    now += X * kept[None, :]
                total = gl.sum(now, 0)
            gl.thread_barrier()  # all warps have read the decayed operands and q
            if GATE:
                split(Z, written, read)
            qs.store(Y.to(BF))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(dp, [row, h * K + b * D], qs)
            if GATE:
                after = gl.convert_layout(gl.where(ri[:, None] > ci[None, :] + 2 * nil, ones, 0.0).to(BF), A_OP)
                X = warpgroup_mma(after, written, zero, use_acc=False, is_async=True)
                X = warpgroup_mma(after, read, X, is_async=True)
                X = warpgroup_mma_wait(0, deps=[X])
                gl.store(dg + at_out + b * D, X + total[None, :])
        else:
            mbarrier.wait(bars.index(b % 2), b // 2 % 2)  # a copy may not be under way when its buffer is asked for again
        following = gl.minimum(b + 1, ND - 1) * D + d
        kept_next = gl.load(at_kept + following)
        G_next = gl.load(g + rows * stride_g + h // Rg * K + following[None, :])
    tma.store_wait(0)


@gluon.jit
def ask_block(
    S, R, q, k, g, states, tiles, decays, bars, b, row, index, column, column_g, C: gl.constexpr, V: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """Ask for the tiles of block b of key channels."""
    bar = bars.index(b % 2)
    at = b % 2 * 2
    mbarrier.expect(bar, 2 * (C + V) * D * 2 + C * D * 4)
    tma.async_copy_global_to_shared(g, [row, column_g + b * D], bar, decays.index(b % 2))
    tma.async_copy_global_to_shared(S, [index * V, b * D], bar, states.index(at))
    tma.async_copy_global_to_shared(q, [row, column + b * D], bar, tiles.index(at))
    tma.async_copy_global_to_shared(R, [index * V, b * D], bar, states.index(at + 1))  # a barrier is between copies into one buffer
    tma.async_copy_global_to_shared(k, [row, column + b * D], bar, tiles.index(at + 1))


@gluon.jit
def queries_hopper(
    q, k, v, do, S, R, dq, dk, dq_own, dk_own, g, dec, near, dg, scale, floor, H, Rg,
    C: gl.constexpr, V: gl.constexpr, D: gl.constexpr, ND: gl.constexpr, GATE: gl.constexpr, FAR: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """dq, dk and dg of linear attention with a decay per channel: `queries_role` twice and `finish_kernel`, D channels after D.

    q, k: q~ and k~ (or k^); S, R [chunks*H*V, K]: what meets them. In a chunk that is not near the pairs inside are left out, what
    they add stands in dq_own, dk_own (dq and dk themselves) and dg already.
    """
    h = gl.program_id(0) % H
    chunk = gl.program_id(0) // H
    K: gl.constexpr = D * ND
    row = chunk * C
    index = chunk * H + h
    BF: gl.constexpr = q.dtype
    LP: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, C, 16])
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    A_OP: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    ROW_P: gl.constexpr = gl.SliceLayout(1, LP)
    COL_P: gl.constexpr = gl.SliceLayout(0, LP)
    ROW: gl.constexpr = gl.SliceLayout(1, L)
    COL: gl.constexpr = gl.SliceLayout(0, L)
    us = gl.allocate_shared_memory(BF, [C, V], do.layout)
    vs = gl.allocate_shared_memory(BF, [C, V], v.layout)
    states = gl.allocate_shared_memory(BF, [4, V, D], S.layout)  # S, R; twice
    tiles = gl.allocate_shared_memory(BF, [4, C, D], q.layout)  # q~, k~; twice
    decays = gl.allocate_shared_memory(gl.float32, [2, C, D], g.layout)
    first = gl.allocate_shared_memory(BF, [1, C, D], q.layout)
    second = gl.allocate_shared_memory(BF, [1, C, D], q.layout)
    bars = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.expect(bars.index(2), 2 * C * V * 2)
    tma.async_copy_global_to_shared(do, [row, h * V], bars.index(2), us)
    tma.async_copy_global_to_shared(v, [row, h * V], bars.index(2), vs)
    ask_block(S, R, q, k, g, states, tiles, decays, bars, 0, row, index, h * K, h // Rg * K, C, V, D)
    ri = gl.arange(0, C, layout=ROW_P)
    ci = gl.arange(0, C, layout=COL_P)
    r = gl.arange(0, C, layout=ROW)
    d = gl.arange(0, D, layout=COL)
    ones = gl.full([C, C], 1.0, gl.float32, LP)
    zero_p = gl.zeros([C, C], gl.float32, LP)
    zero = gl.zeros([C, D], gl.float32, L)
    inside = 1.0
    if FAR:
        inside = gl.load(near + index.to(gl.int64)).to(gl.float32)
    mbarrier.wait(bars.index(2), 0)
    P = warpgroup_mma(us, vs.permute((1, 0)), zero_p, use_acc=False, is_async=True)
    T = warpgroup_mma(vs, us.permute((1, 0)), zero_p, use_acc=False, is_async=True)
    P = warpgroup_mma_wait(1, deps=[P])
    own = gl.convert_layout(gl.sum(gl.where(ri[:, None] == ci[None, :], P, 0.0), 1), ROW) * inside
    P16 = gl.convert_layout(gl.where(ri[:, None] > ci[None, :], P * inside, 0.0).to(BF), A_OP)
    T = warpgroup_mma_wait(0, deps=[T])
    T16 = gl.convert_layout(gl.where(ri[:, None] < ci[None, :], T * inside, 0.0).to(BF), A_OP)

    at_kept = dec + index.to(gl.int64) * K
    kept_next = gl.load(at_kept + d)
    for b in range(ND):
        kept = kept_next
        nil = (gl.min(kept, 0) > 2.0).to(gl.int32)  # zero: see `channel_hopper`
        high = first.index(nil)
        low = second.index(nil)
        rows = (row + nil + r).to(gl.int64)[:, None]
        tma.store_wait(0)  # dq and dk have left their buffers
        gl.thread_barrier()  # and all products have read theirs
        if b + 1 < ND:
            ask_block(S, R, q, k, g, states, tiles, decays, bars, b + 1, row, index, h * K, h // Rg * K, C, V, D)
        mbarrier.wait(bars.index(b % 2), b // 2 % 2)
        G = gl.maximum(decays.index(b % 2).load(L), floor)
        split(G, high, low)
        fence_async_shared()
        gl.thread_barrier()
        after = gl.convert_layout(gl.where(ri[:, None] > ci[None, :] + nil, ones, 0.0).to(BF), A_OP)
        E = warpgroup_mma(after, high, zero, use_acc=False, is_async=True)
        E = warpgroup_mma(after, low, E, is_async=True)
        if FAR:
            before = gl.convert_layout(gl.where(ri[:, None] < ci[None, :] - nil, ones, 0.0).to(BF), A_OP)
            F = warpgroup_mma(before, high, zero, use_acc=False, is_async=True)
            F = warpgroup_mma(before, low, F, is_async=True)
        at = b % 2 * 2
        qs = tiles.index(at)
        ks = tiles.index(at + 1)
        S_tile = states.index(at)
        R_tile = states.index(at + 1)
        X = warpgroup_mma(us, S_tile, zero, use_acc=False, is_async=True)
        X = warpgroup_mma(P16, ks, X, is_async=True)
        Y = warpgroup_mma(vs, R_tile, zero, use_acc=False, is_async=True)
        I = warpgroup_mma(T16, qs, zero, use_acc=False, is_async=True)
        if FAR:
            E, F = warpgroup_mma_wait(4, deps=[E, F])
        else:
            E = warpgroup_mma_wait(4, deps=[E])
        E = (E + G) * LOG2E
        X = warpgroup_mma_wait(2, deps=[X])
        reader = gl.exp2(E)
        out = X + own[:, None] * ks.load(L).to(gl.float32)
        if GATE:
            now = X * qs.load(L).to(gl.float32)
        out = out * (reader * scale)
        Y, I = warpgroup_mma_wait(0, deps=[Y, I])
        if GATE:
            Z = Y * ks.load(L).to(gl.float32)
            now -= I * ks.load(L).to(gl.float32)
        Y = Y + I + own[:, None] * qs.load(L).to(gl.float32)
        if FAR:
            E = gl.where(inside > 0.0, E, (0.0 - F) * LOG2E)
        Y = Y * (gl.exp2(0.0 - E) * scale)
        at_out = (rows * H + h) * K + b * D + d[None, :]
        if FAR:
            if inside == 0.0:
                out += gl.load(dq_own + at_out).to(gl.float32)
                Y += gl.load(dk_own + at_out).to(gl.float32)
        if GATE:
            Z = Z - now
            weight = gl.full([D], 1.0, gl.float32, COL)
            if FAR:
                weight = gl.where(inside > 0.0, weight, kept)
            for i in gl.static_range(V // C):
                now += (
                    S_tile.slice(i * C, C).load(L).to(gl.float32) * R_tile.slice(i * C, C).load(L).to(gl.float32) * weight[None, :]
                )
            total = gl.sum(now, 0)
        gl.thread_barrier()  # all warps have read q~, k~ and the log-decays
        if GATE:
            split(Z, high, low)
        qs.store(out.to(BF))
        ks.store(Y.to(BF))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(dq, [row, h * K + b * D], qs)
        tma.async_copy_shared_to_global(dk, [row, h * K + b * D], ks)
        if GATE:
            after = gl.convert_layout(gl.where(ri[:, None] > ci[None, :] + 2 * nil, ones, 0.0).to(BF), A_OP)
            X = warpgroup_mma(after, high, zero, use_acc=False, is_async=True)
            X = warpgroup_mma(after, low, X, is_async=True)
            X = warpgroup_mma_wait(0, deps=[X])
            X = (X + total[None, :]) * scale
            if FAR:
                if inside == 0.0:
                    X += gl.load(dg + at_out)
            gl.store(dg + at_out, X)
        kept_next = gl.load(at_kept + gl.minimum(b + 1, ND - 1) * D + d)
    tma.store_wait(0)
