"""Linear attention, forward and backward, as launches of the role kernels (imports triton)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from linnet.ops.triton import _channel, _hopper, _table
from linnet.ops.triton._kernel_gradients import gradients_kernel
from linnet.ops.triton._kernel_scalar import (
    gate_kernel,
    join_kernel,
    maximum_kernel,
    scalar_role,
    sums_kernel,
    undivided_kernel,
)
from linnet.ops.triton._kernel_vector import pairs_kernel, vector_role
from linnet.ops.triton._plan import Call, cdiv, next_power_of_2, rows_of
from linnet.ops.triton._together import launch, together


def _role(
    call: Call, role: str, x, y, z, *, heads=None, out=None, splits=1, S_in=None, first=False, scale_in=1.0, S_out=None,
    scale_out=1.0, other=None, weights=None, inter=None, dg=None, blocks=None, states=None, products=None, total=None,
    normalizer=None, kept=None,
):  # fmt: skip
    """Launch one role. x None: only the state, before every chunk (`states`) or with its total decay.

    normalizer: the operands ones, low, s_in, s_out, s_states of `scalar_role`, and floor.
    """
    H = call.H if heads is None else heads
    if call.in_channels:
        _channel.keys(
            call, call.ready, role, z, heads=H, out=out, splits=splits, S_in=S_in, first=first, scale_in=scale_in, S_out=S_out,
            scale_out=scale_out, total=total, kept=kept,
        )  # fmt: skip
        return
    t = call.tile("normalized" if normalizer and x is not None else role)
    D, Z = y.shape[3], z.shape[3]
    BD = max(16, min(next_power_of_2(D), t.BD))
    BZ = max(16, min(next_power_of_2(Z), t.BZ))
    ND, NZ = cdiv(D, BD), cdiv(Z, BZ)
    vector, key_side, reverse = call.kind == "vector", role in ("o", "dv"), role in ("dk", "dv")
    C = call.chunk(role)
    M = call.block // C
    rows = call.cu is not None or call.T % C != 0
    operands = [None if a is None else rows_of(a) for a in (x, y, z)]
    gate = call.g if vector else None
    widths = [BD, BD, BZ, BD if key_side else BZ]
    desc = t.descriptors and D % BD == 0 and Z % BZ == 0
    other = None if other is None else rows_of(other)
    stride_other, Ho = (other.stride(1), other.shape[2]) if other is not None else (0, 1)
    for a in (*operands, gate, other):
        desc = desc and (a is None or (a.data_ptr() % 16 == 0 and a.stride(1) > 0 and a.stride(1) * a.element_size() % 16 == 0))
    strides = [0 if a is None else a.stride(1) for a in operands]
    counts = [1 if a is None else a.shape[2] for a in operands]
    g = call.g
    stride_g, Hg = (g.stride(1), g.shape[2]) if g is not None else (0, 1)
    if desc:
        tokens = call.B * call.T
        wrap = lambda a, w: a if a is None else TensorDescriptor(a, [tokens, a.shape[2] * a.shape[3]], [a.stride(1), 1], [C, w])
        operands = [wrap(a, w) for a, w in zip(operands, widths, strict=False)]
        g = wrap(g, widths[3]) if vector else g
        other = wrap(other, BZ)
        if role == "dk" and inter is not None:
            inter = TensorDescriptor(inter, [inter.shape[0] * tokens, H * Z], [H * Z, 1], [C, BZ])
    store = desc and t.store and out is not None and not rows and out.dtype != torch.float32
    target = TensorDescriptor(out, [out.shape[0] * call.B * call.T, H * Z], [H * Z, 1], [C, BZ]) if store else out
    flat = lambda a: TensorDescriptor(a, [a.numel() // Z, Z], [Z, 1], [BD, BZ])  # states of a role as rows of Z columns
    out_desc = desc and S_out is not None
    H_out = H if S_out is None else S_out.shape[1]
    S_target = flat(S_out) if out_desc else S_out
    kept = 3 if states is not None else 0 if blocks is None else 2 if role == "dk" else 1
    kept_desc = desc and kept > 0 and (vector or role != "dq")  # the scalar dq role has no shared memory to spare
    blocks = states if kept == 3 else blocks
    blocks = flat(blocks) if kept_desc else blocks
    in_d, in_z = (Z, 1) if key_side else (1, D)
    H_in = 1 if S_in is None else S_in.shape[1]
    shared = dict(
        BD=BD, BZ=BZ, C=C, M=M, STAGES=t.stages, REV=reverse, EXCL=call.exclusive, OUT=x is not None, DESC=desc, ROWS=rows,
        COL_D=D % BD != 0, COL_Z=Z % BZ != 0, PACKED=call.cu is not None, HAS_IN=S_in is not None, FIRST=first,
        HAS_OUT=S_out is not None, OUT_DESC=out_desc, num_warps=t.warps,
    )  # fmt: skip
    sizes = (call.T, call.B * call.T, *strides)
    scales = (stride_other, call.scale, scale_in, scale_out)
    counts = (H, *counts, Hg, Ho, H_in, H_out, D, Z, in_d, in_z, ND, NZ, splits)
    fp32 = call.dtype == torch.float32
    precision = "tf32x3" if fp32 else "tf32"
    grid = (call.N * splits * H * ND * NZ,)
    if vector:
        pairs = _pairs(call, *((x, y) if role == "o" else (y, x))) if key_side and x is not None and not call.frame else None
        launch(vector_role, grid)(
            *operands, g, pairs, target, other, inter, dg, S_in, S_target, blocks, total, call.cu, *sizes, stride_g,
            *scales, call.floor, *counts,
            FRAME=call.frame > 0, SIDE_KEY=key_side, GATE=0 if inter is None else 2 if role == "dk" else 1,
            BLOCKS=kept, BLOCKS_DESC=kept_desc, STORE=store, IP=precision, **shared,
        )  # fmt: skip
    else:
        G, P, C_sum, K_sum = _sums(call) if call.kind == "scalar" else (None,) * 4
        *column, floor = normalizer or (None,) * 6
        # a box may only start at a multiple of 16 bytes: not at any row of a packed or oddly long sequence
        G_desc = desc and t.sums and G is not None and not fp32 and call.cu is None and call.T % 4 == 0
        G_width = 0 if G is None else G.shape[1]
        if G_desc:
            sums = (G, P, K_sum)
            G, P, K_sum = (None if a is None else TensorDescriptor(a, list(a.shape), [a.shape[1], 1], [1, C]) for a in sums)
        launch(scalar_role, grid)(
            *operands, G, P, C_sum, K_sum, target, other, total if x is None else weights, S_in, S_target, blocks, products,
            *column, call.cu, call.T, call.B * call.T, G_width, call.block_count() * M, *strides, *scales, *counts,
            TR=t.transposed and (x is None or not normalizer),  # the sums over keys are rows then: no change of layout
            DECAY=call.kind == "scalar", GATE=weights is not None, STATES=kept, STATES_DESC=kept_desc, F64=fp32, G_DESC=G_desc,
            STORE=store, GAIN=call.gain is not None, ONES=normalizer is not None, ONES_IN=column[2] is not None,
            FLOOR=bool(floor), TOTAL=total is not None, IP=precision, **shared,
        )  # fmt: skip


def _sums(call: Call) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Sums of a scalar log-decay inside the chunks [Hg, B*T], without and with gain, computed once for all roles of a call."""
    if call.sums is None:
        fp32 = call.dtype == torch.float32
        C, Hg, tokens = call.chunk("o"), call.g.shape[2], call.B * call.T
        width = cdiv(tokens, 4) * 4
        new = lambda: torch.empty(Hg, width, dtype=torch.float64 if fp32 else torch.float32, device=call.g.device)
        chunks = call.block_count() * (call.block // C)
        total = torch.empty(Hg, chunks, dtype=torch.float64 if fp32 else torch.float32, device=call.g.device)
        call.sums = (new(), new() if call.exclusive else None, total, None if call.gain is None else new())
        stride_gain = 0 if call.gain is None else call.gain.stride(1)
        launch(sums_kernel, (call.block_count(), Hg))(
            call.g, call.gain, *call.sums, call.cu, call.T, width, call.N, call.g.stride(1), stride_gain, chunks, C,
            call.block // C, call.exclusive, call.cu is not None, fp32, call.gain is not None,
        )  # fmt: skip
    return call.sums


def _pairs(call: Call, q: Tensor, k: Tensor) -> Tensor:
    """The decayed products q_t . k_s inside every chunk, for any decay [chunks, H, C, C], once for the roles of a call."""
    if call.pairs is None:
        t = call.tile("o")
        chunks = call.T // t.C + call.N if call.cu is not None else call.N * cdiv(call.T, t.C)
        BD = max(16, min(next_power_of_2(call.K), t.BD))
        call.pairs = torch.empty(chunks, call.H, t.C, t.C, dtype=torch.float32, device=q.device)
        q, k, g = rows_of(q), rows_of(k), call.g
        launch(pairs_kernel, (chunks * call.H,))(
            q, k, g, call.pairs, call.cu, call.T, call.N, q.stride(1), k.stride(1), g.stride(1), call.H, q.shape[2], k.shape[2],
            g.shape[2], call.K, cdiv(call.K, BD), BD=BD, C=t.C, EXCL=call.exclusive,
            ROWS=call.cu is not None or call.T % t.C != 0, COL_D=call.K % BD != 0, PACKED=call.cu is not None,
            IP="tf32x3", num_warps=_table.PAIR_WARPS,
        )  # fmt: skip
    return call.pairs


def _partials(call: Call, role: str, like: Tensor, D: int) -> Tensor:
    """Output of a role for operand `like`: in its dtype where one program owns a value, else fp32 parts to be added."""
    ND = -(-D // max(16, min(next_power_of_2(D), call.tile(role).BD)))
    shape = (ND, call.B, call.T, call.H, like.shape[3])
    exact = ND > 1 or like.shape[2] != call.H
    return torch.empty(shape, dtype=torch.float32 if exact else like.dtype, device=like.device)


def _fold(parts: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Add the parts and the heads that share an operand head: [P, B, T, H, D] -> [B, T, heads, D]."""
    x = parts[-1]
    if parts.shape[0] > 1:
        rest = parts[0] if parts.shape[0] == 2 else parts[:-1].sum(0)
        wanted = dtype if x.shape[2] == heads else x.dtype  # converted by the sum itself: wide heads spend their time here
        x = torch.add(rest, x, out=torch.empty_like(x, dtype=wanted))
    if x.shape[2] != heads:
        x = x.unflatten(2, (heads, -1)).sum(3)
    return x.to(dtype)


def _split_states(
    call: Call, role: str, y: Tensor, z: Tensor, heads: int, S_in, first: bool, scale_in: float, scale_out: float, ones=None
):
    """States at the starts of all splits [N*NS, heads, K, V], the final ones [N, heads, K, V], and both of a normalizer's column.

    ones: with a normalizer, the weights of its column (or None) and its own S_in; without one the third result is None.
    """
    NS, K, V = call.splits, call.K, call.V
    new = functools.partial(torch.empty, dtype=torch.float32, device=y.device)
    local, start, final = new(call.N * NS, heads, K, V), new(call.N * NS, heads, K, V), new(call.N, heads, K, V)
    groups = K if call.kind == "vector" else 1
    total = new(call.N * NS, heads, groups) if call.kind != "none" else None
    weights, column_in = ones or (None, None)
    column = [new(rows, heads, K) for rows in (call.N * NS, call.N * NS, call.N)] if ones else None  # as local, start and final
    own = dict(normalizer=(weights, None, None, column[0], None, False)) if ones else {}
    _role(call, role, None, y, z, heads=heads, splits=NS, S_out=local, total=total, **own)

    def join(local: Tensor, S_in: Tensor | None, start: Tensor, final: Tensor, V: int):
        BK, BV = 16, 64 if V > 1 else 1
        launch(join_kernel, (cdiv(V, BV), call.N * heads, cdiv(K, BK)))(
            local, total, S_in, start, final, NS, heads, heads, 1 if S_in is None else S_in.shape[1], K, V, scale_in, scale_out,
            groups, BK, BV, REV=role == "dv", DECAY=call.kind != "none", HAS_IN=S_in is not None, FIRST=first,
        )  # fmt: skip

    join(local, S_in, start, final, V)
    if ones is None:
        return start, final, None
    join(column[0], column_in, *column[1:], 1)
    return start, final, column[1:]


@together
def forward(q, k, v, g, S0, cu, scale: float, exclusive: bool, heads: int, bound: float | None):
    """o [B, T, H, V], final state [N, heads, K, V] and the states at the starts of the splits (empty without splits)."""
    call = Call(q, v, g, cu, scale, exclusive, heads, bound)
    S0 = None if S0 is None else S0.contiguous()
    parts = _partials(call, "o", v.new_empty(1, 1, call.H, call.V), call.K)
    if call.in_channels:
        call.ready = _channel.prepared(call, q, k)
    if call.splits > 1:
        start, S, _ = _split_states(call, "o", k, v, heads, S0, False, 1.0, 1.0)
        _role(call, "o", q, k, v, out=parts, splits=call.splits, S_in=start)
    else:
        S = torch.empty(call.N, heads, call.K, call.V, dtype=torch.float32, device=q.device)
        start = S.new_empty(0)
        _role(call, "o", q, k, v, out=parts, S_in=S0, S_out=S)
    return _fold(parts, call.H, v.dtype), S, start


@together
def backward(
    do, dS, start, q, k, v, g, S0, cu, scale: float, exclusive: bool, heads: int, bound: float | None, need_dg: bool, gain=None,
    divided=None,
):  # fmt: skip
    """Gradients of q, k, v, g (None without decay or need), of the initial state, and of the gain (None without one).

    divided: h, n, low, z_start, dn, dz, floor of a call with a normalizer, for which `do` is the gradient of h; z_start: as start.
    """
    call = Call(q, v, g, cu, scale, exclusive, heads, bound, gain)
    H, K, V, NS, NB = call.H, call.K, call.V, call.splits, call.block_count()
    new = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    gate = g is not None and (need_dg or gain is not None)
    ones = None
    if divided is not None:
        *output, z_start, dn, dz, floor = divided
        do, dn = _undivided(call, do, *output, dn, floor)
        ones = dn, dz, z_start
    q, k, v, do = rows_of(q), rows_of(k), rows_of(v), do.contiguous()
    dS = None if dS is None else dS.contiguous()
    S0 = start if NS > 1 else None if S0 is None else S0.contiguous()
    extra_q, extra_k = {}, {}
    if call.in_channels:
        call.ready = _channel.prepared(call, q, k)
    if NS > 1:
        R_in, dS0, column = _split_states(call, "dv", q, do, H, dS, True, 1 / scale, scale, ones and ones[:2])
        ones = ones and (dn, column[0], z_start)
        into = dict(splits=NS, S_in=R_in)
    else:
        dS0 = new(call.N, H, K, V)
        into = dict(S_in=dS, first=True, scale_in=1 / scale)
    if divided is not None or (gate and call.kind == "scalar" and _fits_hopper(call, do, q, k, v)):
        final = {} if NS > 1 else dict(S_out=dS0, scale_out=scale)
        *grads, dg, dgain = _of_chunks(call, do, q, k, v, dict(heads=heads, splits=NS, S_in=S0), into | final, ones, gate)
        if H != heads:
            dS0 = dS0.unflatten(1, (heads, -1)).sum(2)
        return *(_fold(x, y.shape[2], y.dtype) for x, y in zip(grads, (q, k, v), strict=True)), dg, dS0, dgain
    dv = _partials(call, "dv", v, K)
    of_values = into | (dict(S_out=dS0, scale_out=scale) if NS == 1 else {})
    if call.in_channels and _channel.fits_hopper(call, do, q, k, v):
        of_values |= dict(kept=new(NB * (call.block // call.chunk("o")), H, V, K, dtype=q.dtype))
        _role(call, "dv", k, q, do, out=dv, **of_values)
        dq, dk, dg = _channel.of_chunks(call, call.ready, do, q, k, v, S0, NS, of_values["kept"], gate)
    elif call.in_channels:
        dq, dk, dg = _channel.gradients(call, call.ready, do, q, k, v, S0, into, gate)
    else:
        dq, dk = _partials(call, "dq", q, V), _partials(call, "dk", k, V)
        blocks = new(NB, H, V, K).to(q.dtype if q.dtype != torch.float16 else torch.bfloat16) if gate else None
        extra_q |= dict(blocks=blocks)
        extra_k |= dict(blocks=blocks)
        ND = dq.shape[0]
        if gate and call.kind == "vector":
            inter = torch.empty(ND, call.B, call.T, H, K, dtype=blocks.dtype, device=q.device)
            dg = new(ND, call.B, call.T, H, K)
            extra_q |= dict(inter=inter)
            extra_k |= dict(inter=inter, other=k, dg=dg)
        elif gate:
            NQ, NK = (ND * -(-K // max(16, min(next_power_of_2(K), call.tile(r).BZ))) for r in ("dq", "dk"))
            query, products = new(NQ, H, call.B * call.T), new(NB, H, NK)
            key = new(2, NK, H, call.B * call.T)
            extra_q |= dict(weights=query, other=q)
            extra_k |= dict(weights=key, other=k, products=products)
        _role(call, "dq", do, v, k, out=dq, splits=NS, S_in=S0, **extra_q)
        _role(call, "dk", v, do, q, out=dk, **into, **extra_k)
    if "kept" not in of_values:
        _role(call, "dv", k, q, do, out=dv, **of_values)
    if gate and call.kind == "vector":
        dg = _fold(dg, g.shape[2], torch.float32)
    elif gate:
        dg, _ = _gates(call, query, key, products, call.block)
    if H != heads:
        dS0 = dS0.unflatten(1, (heads, -1)).sum(2)
    grads = (_fold(x, y.shape[2], y.dtype) for x, y in ((dq, q), (dk, k), (dv, v)))
    return *grads, dg if gate else None, dS0, None


def _gates(call: Call, query: Tensor, key: Tensor, products: Tensor, length: int):
    """dg and dgain (None without a gain) [B, T, Hg, 1] from the parts [n, H, B*T] and [blocks, H, n]; length: tokens of a block."""
    g, gained, M = call.g, call.gain is not None, call.block // length
    dg = torch.empty(call.B, call.T, g.shape[2], 1, dtype=torch.float32, device=query.device)
    dgain = torch.empty_like(dg) if gained else None
    launch(gate_kernel, (call.block_count() * M, g.shape[2]))(
        query, key, products, dg, dgain, call.cu, call.T, call.B * call.T, call.N, call.H, g.shape[2], query.shape[0], key.shape[1],
        length, M, call.chunk("dk"), call.exclusive, call.cu is not None, gained,
    )  # fmt: skip
    return dg, dgain


def _fits_hopper(call: Call, *operands: Tensor) -> bool:
    """Whether `gradients_hopper` has this call."""
    whole = call.cu is None and call.T % call.block == 0 and call.chunk("o") == 64
    fits = call.dtype == torch.bfloat16 and call.K == call.V == 128 and all(a.shape[2] == call.H for a in operands)
    return whole and fits and call.on_hopper and _channel.copyable(*operands)


def _of_chunks(call: Call, do: Tensor, q: Tensor, k: Tensor, v: Tensor, of_keys: dict, of_queries: dict, ones, gate: bool):
    """dq, dk, dv [1, B, T, H, K or V], dg and dgain [B, T, Hg, 1] (None if not needed), all of a chunk in one program.

    of_keys, of_queries: options of the two passes that keep the states, forward in time, and their adjoints, backward.
    ones: with a normalizer, of its column the gradients dn [H, B*T] and dz of the state that comes in at the end, and what `start`
    is for S.
    """
    B, T, H, K, V, C, heads = call.B, call.T, call.H, call.K, call.V, call.chunk("o"), of_keys["heads"]
    M = call.block // C
    chunks = call.block_count() * M
    new = functools.partial(torch.empty, device=q.device, dtype=torch.float32)
    kept = torch.bfloat16 if call.dtype == torch.float16 else call.dtype
    S, R = new(chunks, heads, K, V, dtype=kept), new(chunks, H, K, V, dtype=kept)
    dn = s = r = None
    if ones is not None:
        s, r, (dn, dz, z_start) = new(chunks, heads, K), new(chunks, H, K), ones
        of_keys |= dict(normalizer=(None, None, z_start if call.splits > 1 else None, None, s, False))
        of_queries |= dict(normalizer=(dn, None, dz, None, r, False))
    _role(call, "o", None, k, v, states=S, **of_keys)
    _role(call, "dv", None, q, do, states=R, **of_queries)
    dq, dk, dv = (new(1, B, T, H, a.shape[3], dtype=a.dtype if a.shape[2] == H else torch.float32) for a in (q, k, v))
    G, P, C_sum, K_sum = _sums(call) if call.kind == "scalar" else (None,) * 4
    t, fast = call.tile("gradients"), _fits_hopper(call, do, q, k, v)
    query = new(1 + t.warps if fast else 1, H, B * T) if gate else None
    key, products = (new(2 if call.gain is None else 3, 1, H, B * T), new(chunks, H)) if gate else (None, None)
    counts = (H, q.shape[2], k.shape[2], v.shape[2], 1 if call.g is None else call.g.shape[2], heads)
    G_width = 0 if G is None else G.shape[1]
    shared = dict(C=C, DECAY=call.kind == "scalar", GATE=gate, GAIN=call.gain is not None)
    if fast:
        tiles = [_hopper.of_tokens(a, C, K) for a in (q, k, v, do)]
        tiles += [_hopper.of_states(a, rows, V) for a, rows in ((S, K), (S, C), (R, K))]
        launch(_hopper.kernel("gradients_hopper"), (chunks * H,))(
            *tiles, *(_hopper.of_tokens(a[0], C, K) for a in (dq, dk, dv)), P if call.exclusive else G, G, C_sum, K_sum, query, key,
            products, dn, s, r, B * T, G_width, call.scale, *counts, D=K, EXCL=call.exclusive, ONES=dn is not None,
            num_warps=t.warps, **shared,
        )  # fmt: skip
    else:
        BK, BV = (max(16, next_power_of_2(n)) for n in (K, V))
        launch(gradients_kernel, (chunks * H,))(
            q, k, v, do, G, C_sum, K_sum, S, R, dq, dk, dv, query, key, products, dn, s, r, call.cu, T, B * T, G_width, call.N,
            q.stride(1), k.stride(1), v.stride(1), do.stride(1), call.scale, *counts, K, V, BK=BK, BV=BV,
            M=M, ROWS=call.cu is not None or T % C != 0, COLUMNS=K != BK or V != BV, PACKED=call.cu is not None,
            IP="tf32x3" if call.dtype == torch.float32 else "tf32", num_warps=t.warps, **shared,
        )  # fmt: skip
    dg, dgain = _gates(call, query, key, products, C) if gate else (None, None)
    return dq, dk, dv, dg, dgain


def _undivided(call: Call, dh: Tensor, h: Tensor, n: Tensor, low: Tensor, dn: Tensor | None, floor: bool):
    """do [B, T, H, V] and the whole dn [H, B*T] of h = o / max(|n|, low), or o / (n + low)."""
    dh = rows_of(dh)
    do, out = torch.empty_like(h), torch.empty_like(n)
    tokens, BV, R = call.B * call.T, next_power_of_2(call.V), 16
    launch(undivided_kernel, (cdiv(tokens, R), call.H))(
        dh, h, n, low, dn, do, out, tokens, dh.stride(1), call.V, low.shape[0], call.H, floor, dn is not None, R, BV
    )
    return do, out


def running_maximum(g: Tensor | None, i: Tensor, cu: Tensor | None) -> tuple[Tensor, Tensor]:
    """m_t = max(m_{t-1} + g_t, i_t) from -inf, and m_{t-1}; i [B, T, H], g [B, T, Hg] or None."""
    B, T, H = i.shape
    i = i.contiguous()
    g = None if g is None else rows_of(g.unsqueeze(3))
    m, previous = torch.empty_like(i), torch.empty_like(i)
    stride, Hg = (0, 1) if g is None else (g.stride(1), g.shape[2])
    rows = B if cu is None else cu.shape[0] - 1
    C, warps = (2048, 8) if T > 2048 else (512, 4)
    launch(maximum_kernel, (rows * H,))(g, i, m, previous, cu, T, stride, H, Hg, g is not None, cu is not None, C, num_warps=warps)
    return m, previous


@together
def normalized(q, k, v, g, gain, low, cu, scale: float, heads: int, floor: bool):
    """h = o / max(|n|, low) or o / (n + low), n [H, B*T], the final state S, z, and both at the starts of the splits, if any."""
    call = Call(q, v, g, cu, scale, False, heads, None, gain)
    new = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    parts = _partials(call, "o", v.new_empty(1, 1, call.H, call.V), call.K)
    n = new(call.H, call.B * call.T)
    if call.splits > 1:
        start, S, (z_start, z) = _split_states(call, "o", k, v, heads, None, False, 1.0, 1.0, (None, None))
        _role(call, "o", q, k, v, out=parts, splits=call.splits, S_in=start, normalizer=(n, low, z_start, None, None, floor))
    else:
        S, z = new(call.N, heads, call.K, call.V), new(call.N, heads, call.K)
        start, z_start = new(0), new(0)
        _role(call, "o", q, k, v, out=parts, S_out=S, normalizer=(n, low, None, z, None, floor))
    return _fold(parts, call.H, v.dtype), n, S, z, start, z_start
