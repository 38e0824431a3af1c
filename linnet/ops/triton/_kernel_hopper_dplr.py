"""The Gluon kernel for Hopper of DPLR's gradients: whole chunks of 64 tokens, bf16, one frame, a decay per channel.

`dplr_hopper` is `gradients` (_kernel_dplr.py) with readers and writers of a chunk one under another: q over a, k over b. With
Q = [q; a], K = [k; b], Y = [do; x] and U = [v; r] of 128 rows each, decayed as they meet inside the chunk (Q~, K~), the pairs are
one product P = mask(Y U^T) and the gradients those of linear attention,
    dQ = (Y S + P K~) decayed,      dK = (U Z w + P^T Q~) decayed.
One program a processor goes from chunk to chunk, 32 key channels at a time; the next tiles are always on their way.
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

from linnet.ops.triton._kernel_hopper import LOG2E, split


@gluon.jit
def ask_values(do, x, v, r, us, vs, bar, row, column, C: gl.constexpr, V: gl.constexpr):
    """Ask for what is read and written at the tokens of a chunk, all of it, C columns a tile.

    Buffers take turns, here and below: between two copies into one the compiler places a barrier.
    """
    mbarrier.expect(bar, 4 * C * V * 2)
    for i in gl.static_range(V // C):
        tma.async_copy_global_to_shared(do, [row, column + i * C], bar, us.index(i).slice(0, C))
        tma.async_copy_global_to_shared(v, [row, column + i * C], bar, vs.index(i).slice(0, C))
        tma.async_copy_global_to_shared(x, [row, column + i * C], bar, us.index(i).slice(C, C))
        tma.async_copy_global_to_shared(r, [row, column + i * C], bar, vs.index(i).slice(C, C))


@gluon.jit
def ask_channels(
    q, a, k, b, g, S, Z, readers, writers, decays, states, bars, n, row, column, index, at,
    C: gl.constexpr, V: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Ask for the n-th tiles of key channels of this program: columns `column` on of the tokens, `at` on of the states."""
    slot = n % 2
    bar = bars.index(slot)
    mbarrier.expect(bar, (4 * C + 2 * V) * D * 2 + C * D * 4)
    tma.async_copy_global_to_shared(g, [row, column], bar, decays.index(slot))
    tma.async_copy_global_to_shared(q, [row, column], bar, readers.index(slot).slice(0, C))
    tma.async_copy_global_to_shared(k, [row, column], bar, writers.index(slot).slice(0, C))
    tma.async_copy_global_to_shared(S, [index * V, at], bar, states.index(slot * 2))
    tma.async_copy_global_to_shared(a, [row, column], bar, readers.index(slot).slice(C, C))
    tma.async_copy_global_to_shared(b, [row, column], bar, writers.index(slot).slice(C, C))
    tma.async_copy_global_to_shared(Z, [index * V, at], bar, states.index(slot * 2 + 1))


@gluon.jit
def on_states(values, nil, S, zero, C: gl.constexpr, V: gl.constexpr):
    """values [2C, V], C columns a tile from tile nil = 0 on, times S [V, D]."""
    X = warpgroup_mma(values.index(nil), S.slice(0, C), zero, use_acc=False, is_async=True)
    for i in gl.static_range(1, V // C):
        X = warpgroup_mma(values.index(nil + i), S.slice(i * C, C), X, is_async=True)
    return X


@gluon.jit(do_not_specialize=["count", "H"])
def dplr_hopper(
    do, x, v, r, q, a, k, b, g, S, Z, dq, da, dk, db, dg, carry, scale, floor, count, H,
    C: gl.constexpr, V: gl.constexpr, D: gl.constexpr, ND: gl.constexpr, GATE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dq, da, dk, db, dg of all `count` chunks of heads.

    dg_t = w <S, Z> + the sum of what K writes beyond the chunk + sums over the tokens from t (a: behind t) on of Q~ dQ~ - K~ dK~,
    where K~ dK~ holds what goes beyond the chunk, too.
    """
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    K: gl.constexpr = D * ND
    BF: gl.constexpr = q.dtype
    LP: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 2 * C, 16])
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    LG: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps // 2, 2], [16, D // 2, 16])  # of C rows
    A_X: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    A_G: gl.constexpr = gl.DotOperandLayout(0, LG, 2)
    us = gl.allocate_shared_memory(BF, [V // C, 2 * C, C], do.layout)
    vs = gl.allocate_shared_memory(BF, [V // C, 2 * C, C], v.layout)
    pairs = gl.allocate_shared_memory(BF, [1, 2 * C, 2 * C], do.layout)
    readers = gl.allocate_shared_memory(BF, [2, 2 * C, D], q.layout)
    writers = gl.allocate_shared_memory(BF, [2, 2 * C, D], k.layout)
    decays = gl.allocate_shared_memory(gl.float32, [2, C, D], g.layout)
    states = gl.allocate_shared_memory(BF, [4, V, D], S.layout)  # S, Z; twice
    tiles = gl.allocate_shared_memory(BF, [2, 2 * C, D], q.layout)
    parts = gl.allocate_shared_memory(BF, [2, C, D], q.layout)
    flows = gl.allocate_shared_memory(gl.float32, [1, 2 * C, D], g.layout)
    bars = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    row = first // H * C
    ask_values(do, x, v, r, us, vs, bars.index(2), row, first % H * V, C, V)
    ask_channels(
        q, a, k, b, g, S, Z, readers, writers, decays, states, bars, 0, row, first % H * K, first, 0, C, V, D
    )  # fmt: skip
    rows_p = gl.arange(0, 2 * C, layout=gl.SliceLayout(1, LP))[:, None]
    columns_p = gl.arange(0, 2 * C, layout=gl.SliceLayout(0, LP))[None, :]
    rows_t = gl.arange(0, 2 * C, layout=gl.SliceLayout(1, A_X))[:, None]
    columns_t = gl.arange(0, C, layout=gl.SliceLayout(0, A_X))[None, :]
    rows_s = gl.arange(0, C, layout=gl.SliceLayout(1, A_G))[:, None]
    columns_s = gl.arange(0, 2 * C, layout=gl.SliceLayout(0, A_G))[None, :]
    d = gl.arange(0, D, layout=gl.SliceLayout(0, L))
    zero_p = gl.zeros([2 * C, 2 * C], gl.float32, LP)
    zero = gl.zeros([2 * C, D], gl.float32, L)
    zero_g = gl.zeros([C, D], gl.float32, LG)
    scales = gl.where(gl.arange(0, 2 * C, layout=gl.SliceLayout(1, L)) < C, scale, 1.0)[:, None]
    kept_next = gl.load(carry + first.to(gl.int64) * K + d)

    for index in range(first, count, programs):
        turn = (index - first) // programs
        h = index % H
        row = index // H * C
        following = gl.minimum(index + programs, count - 1)
        # ---- pairs: q reads k and b up to its token, a those before it
        mbarrier.wait(bars.index(2), turn % 2)
        P = warpgroup_mma(us.index(0), vs.index(0).permute((1, 0)), zero_p, use_acc=False, is_async=True)
        for i in gl.static_range(1, V // C):
            P = warpgroup_mma(us.index(i), vs.index(i).permute((1, 0)), P, is_async=True)
        P = warpgroup_mma_wait(0, deps=[P])
        pairs.index(0).store(gl.where(columns_p % C < rows_p % C + (rows_p < C).to(gl.int32), P, 0.0).to(BF))

        for block in range(ND):
            n = turn * ND + block
            slot = n % 2
            kept = kept_next
            # False and zero, but the compiler does not know: see channel_hopper
            never = gl.min(kept, 0) > 2.0
            nil = never.to(gl.int32)
            P16 = pairs.index(nil)
            Q = tiles.index(nil)  # Q~, K~
            W = tiles.index(nil + 1)
            high = parts.index(nil)
            low = parts.index(nil + 1)
            tma.store_wait(0)  # the gradients have left their buffers
            gl.thread_barrier()  # and all products have read theirs
            if block + 1 < ND:
                ask_channels(
                    q, a, k, b, g, S, Z, readers, writers, decays, states, bars, n + 1, row, h * K + (block + 1) * D, index,
                    (block + 1) * D, C, V, D,
                )  # fmt: skip
            elif index + programs < count:
                ask_channels(
                    q, a, k, b, g, S, Z, readers, writers, decays, states, bars, n + 1, following // H * C, following % H * K,
                    following, 0, C, V, D,
                )  # fmt: skip
            mbarrier.wait(bars.index(slot), n // 2 % 2)
            split(gl.maximum(decays.index(slot).load(LG), floor), high, low)
            fence_async_shared()
            gl.thread_barrier()
            one = gl.full([2 * C, C], 1.0, BF, A_X)
            none = gl.zeros([2 * C, C], BF, A_X)
            read = gl.where((columns_t < rows_t % C + (rows_t < C).to(gl.int32)) ^ never, one, none)
            E = warpgroup_mma(read, high, zero, use_acc=False, is_async=True)
            E = warpgroup_mma(read, low, E, is_async=True)
            written = gl.where((columns_t <= rows_t % C) ^ never, one, none)
            F = warpgroup_mma(written, high, zero, use_acc=False, is_async=True)
            F = warpgroup_mma(written, low, F, is_async=True)
            S_tile = states.index(slot * 2)
            Z_tile = states.index(slot * 2 + 1)
            X = on_states(us, nil, S_tile, zero, C, V)
            Y = on_states(vs, nil, Z_tile, zero, C, V)
            E, F = warpgroup_mma_wait(2 * (V // C), deps=[E, F])
            reader = gl.exp2(E * LOG2E) * scales
            writer = gl.exp2(0.0 - F * LOG2E)
            Q.store((readers.index(slot).load(L).to(gl.float32) * reader).to(BF))
            W.store((writers.index(slot).load(L).to(gl.float32) * writer).to(BF))
            fence_async_shared()
            gl.thread_barrier()
            X = warpgroup_mma(P16, W, X, is_async=True)
            Y = warpgroup_mma_wait(1, deps=[Y])
            Y = Y * kept[None, :]
            if GATE:
                now = Y * W.load(L).to(gl.float32)
            Y = warpgroup_mma(P16.permute((1, 0)), Q, Y, is_async=True)
            X = warpgroup_mma_wait(1, deps=[X])
            if GATE:
                flow = X * Q.load(L).to(gl.float32)
            readers.index(slot).store((X * reader).to(BF))
            Y = warpgroup_mma_wait(0, deps=[Y])
            if GATE:
                back = Y * W.load(L).to(gl.float32)
            writers.index(slot).store((Y * writer).to(BF))
            fence_async_shared()
            gl.thread_barrier()
            column = h * K + block * D
            tma.async_copy_shared_to_global(dq, [row, column], readers.index(slot).slice(0, C))
            tma.async_copy_shared_to_global(da, [row, column], readers.index(slot).slice(C, C))
            tma.async_copy_shared_to_global(dk, [row, column], writers.index(slot).slice(0, C))
            tma.async_copy_shared_to_global(db, [row, column], writers.index(slot).slice(C, C))
            if (block + 1 == ND) & (index + programs < count):
                ask_values(do, x, v, r, us, vs, bars.index(2), following // H * C, following % H * V, C, V)
            if GATE:
                split(flow - back, Q, W)
                flows.index(0).store(flow)
                passing = S_tile.load(L).to(gl.float32) * Z_tile.load(L).to(gl.float32)
                total = gl.sum(now, 0) + gl.sum(passing * kept[None, :], 0)
                total = gl.convert_layout(total, gl.SliceLayout(0, LG))
                fence_async_shared()
                gl.thread_barrier()
                one = gl.full([C, 2 * C], 1.0, BF, A_G)
                none = gl.zeros([C, 2 * C], BF, A_G)
                since = gl.where((columns_s % C >= rows_s) ^ never, one, none)
                X = warpgroup_mma(since, Q, zero_g, use_acc=False, is_async=True)
                X = warpgroup_mma(since, W, X, is_async=True)
                own = flows.index(0).slice(C, C).load(LG)  # a reads without its own token's decay
                X = warpgroup_mma_wait(0, deps=[X]) - own
                rows = row + gl.arange(0, C, layout=gl.SliceLayout(1, LG))
                columns = column + gl.arange(0, D, layout=gl.SliceLayout(0, LG))
                gl.store(dg + rows.to(gl.int64)[:, None] * (H * K) + columns[None, :], X + total[None, :])
            at = index.to(gl.int64) * K + (block + 1) * D
            if block + 1 == ND:
                at = following.to(gl.int64) * K
            kept_next = gl.load(carry + at + d)
    tma.store_wait(0)
