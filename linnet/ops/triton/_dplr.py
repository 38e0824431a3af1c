"""DPLR, forward and backward, as launches of its kernels (imports triton)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from linnet.ops.triton import _hopper
from linnet.ops.triton._delta import INVERSE_TYPES, _aligned, _join, _sharing, _spread, _stride, _width, _wrapped
from linnet.ops.triton._kernel_dplr import fold, gradients, prepare, solved, sweep
from linnet.ops.triton._linear import _fold
from linnet.ops.triton._plan import WIDEST, DplrCall, cdiv, rows_of
from linnet.ops.triton._together import launch, together


class Prepared(NamedTuple):
    """What the sweeps read, then what only the gradients need, and the decay over a chunk."""

    read: Tensor  # q' [B, T, H, K]
    write: Tensor  # k' [B, T, H, K]
    transfer: Tensor  # N [NB, H, K, K]
    pairs: Tensor  # P [NB, H, C, C]
    solve: Tensor  # E = T a~ [B, T, H, K]
    back: Tensor  # b^ [B, T, H, K]
    solve_pairs: Tensor  # M = T A_ak [NB, H, C, C]
    back_pairs: Tensor  # A_qb [NB, H, C, C]
    inverse: Tensor  # T - I [NB, H, C, C]
    carry: Tensor  # W [NB, H, K]


def prepared(call: DplrCall, q, k, a, b, g) -> Prepared:
    C, H, K, NB = call.C, call.H, call.K, call.chunks
    new = functools.partial(torch.empty, device=q.device, dtype=q.dtype)
    rows, square = (call.B, call.T, H, K), (NB, H, C, C)
    ready = Prepared(
        *(new(shape) for shape in (rows, rows, (NB, H, K, K), square, rows, rows, square, square, square)),
        new(NB, H, K, dtype=torch.float32),
    )
    operands = (q, k, a, b, g)
    numbers = (
        call.cu, call.T, call.N, *(_stride(x) for x in operands), call.scale, call.floor, H, *_sharing(H, *operands), K
    )  # fmt: skip
    matrices, BN = (ready.solve_pairs, ready.back_pairs, ready.inverse), _width(K, 64)

    def run(kernel, part: str, tensors, **options):
        t = call.tile(part)
        BD = _width(K, t.BD)
        launch(kernel, (NB * H,))(
            *operands, *tensors, *numbers, cdiv(K, BD), BD=BD, ROWS=call.ragged, COL=K % max(BD, BN) != 0, num_stages=1,
            num_warps=t.warps, maxnreg=t.registers, **_decays(call), **options,
        )  # fmt: skip

    run(prepare, "prepare", (ready.pairs, *matrices, ready.carry), INV=INVERSE_TYPES[call.tile("prepare").inverse])
    run(fold, "fold", (*matrices, ready.read, ready.write, ready.transfer, ready.solve, ready.back), BN=BN)
    return ready


def _decays(call: DplrCall) -> dict[str, Any]:
    """What the preparation and the gradients know about decay and arithmetic."""
    return dict(
        C=call.C, FIRST=call.frame.bit_length() - 1, LEVELS=call.C.bit_length() - 1, DECAY=call.kind != "none",
        SCALAR=call.kind == "scalar", PACKED=call.cu is not None, SPLIT=call.dtype != torch.float32, DT=call.triton_dtype(tl),
        IP=call.precision,
    )  # fmt: skip


def _matrices(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The descriptor of packed matrices [..., columns], `rows` rows at a time."""
    return TensorDescriptor(x, [x.numel() // columns, columns], [columns, 1], [rows, columns])


def swept(
    call: DplrCall, ready: Prepared, values: Tensor | None, *, reverse=False, out=None, states=None, S_in=None, first=False, S_out,
    splits=1
):  # fmt: skip
    """One sweep in either direction; values None: the map of every split, into S_out [N*NS, H, K, K]."""
    t, C, H, K = call.tile("backward" if reverse else "forward"), call.C, call.H, call.K
    V = K if values is None else call.V
    BD, BV = _width(K, WIDEST), _width(V, t.BV)
    read, write, transfer, pairs = (ready.write, ready.read, *ready[2:4]) if reverse else ready[:4]
    desc = t.descriptors and K == BD and V % BV == 0 and _aligned(read, write, values)
    store = desc and not call.ragged and states is None  # bulk stores of the states and of `out` exceed the shared memory
    NV, (heads,), stride = cdiv(V, BV), _sharing(H, values), _stride(values)
    if desc:
        read, write = _wrapped(read, C, BD), _wrapped(write, C, BD)
        values = None if values is None else _wrapped(values, C, BV)
        transfer, pairs = _matrices(transfer, K, K), _matrices(pairs, C, C)
        states = None if states is None else _matrices(states, BV, K)
    if store and out is not None:
        out = _wrapped(out, C, BV)
    launch(sweep, (call.N * splits * H * NV,))(
        read, write, values, transfer, pairs, ready.carry, out, states, S_in, S_out, call.cu, call.T, stride, H, heads,
        1 if S_in is None else S_in.shape[1], S_out.shape[1], K, V, NV, splits, BD=BD, BV=BV, C=C, STAGES=t.stages, REV=reverse,
        VALUES=values is not None, KEEP=states is not None, OUT=out is not None, DESC=desc, STORE=store, ROWS=call.ragged,
        COL_D=K != BD, COL_V=V % BV != 0, PACKED=call.cu is not None, HAS_IN=S_in is not None, FIRST=first, IP=call.precision,
        num_warps=t.warps, maxnreg=t.registers,
    )  # fmt: skip


def solutions(call: DplrCall, ready: Prepared, v, do, states, adjoints, multiply: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """R and X [B, T, H, V]; with `multiply` the products of values that the gradients use [4, NB, H, C, C]."""
    t, C, H, K, V = call.tile("solved"), call.C, call.H, call.K, call.V
    BD, BV = _width(K, WIDEST), _width(V, t.BV)
    r, x = (torch.empty(call.B, call.T, H, V, dtype=v.dtype, device=v.device) for _ in range(2))
    products = torch.empty(4, call.chunks, H, C, C, dtype=v.dtype, device=v.device) if multiply else None
    strides, (heads,) = (_stride(v), _stride(do)), _sharing(H, v)
    rows, matrices = ready[4:6], ready[6:9]
    desc = t.descriptors and K == BD and V % BV == 0 and _aligned(v, do)
    if desc:
        v, do, *rows = _wrapped(v, C, BV), _wrapped(do, C, BV), *(_wrapped(y, C, BD) for y in rows)
        matrices = [_matrices(y, C, C) for y in matrices]
        states, adjoints = _matrices(states, BV, K), _matrices(adjoints, BV, K)
    launch(solved, (call.chunks * H,))(
        v, do, *rows, *matrices, states, adjoints, r, x, products, call.cu, call.T, call.N, call.chunks, *strides, call.scale, H,
        heads, K, V, cdiv(V, BV), BD=BD, BV=BV, C=C, DESC=desc, ROWS=call.ragged, COL_D=K != BD, COL_V=V % BV != 0,
        PACKED=call.cu is not None, PRODUCTS=multiply, IP=call.precision, num_warps=t.warps, num_stages=t.stages,
        maxnreg=t.registers,
    )  # fmt: skip
    return r, x, products


@together
def forward(q, k, a, b, v, g, S0, cu, scale: float, heads: int, bound, save: bool):
    """o, final state; for the backward the states at chunk starts, the maps of splits, what was prepared (empty unless `save`)."""
    call = DplrCall(q, k, v, g, cu, scale, heads, bound)
    q, k, a, b, v, g = (None if x is None else rows_of(x) for x in (q, k, a, b, v, g))
    S0 = None if S0 is None else S0.contiguous()
    H, K, V, NS, dtype = call.H, call.K, call.V, call.splits, q.dtype
    new = functools.partial(torch.empty, device=q.device)
    ready = prepared(call, q, k, a, b, g)
    o = new(call.B, call.T, H, V, dtype=dtype)
    states = new(call.chunks, H, V, K, dtype=dtype) if save else None
    maps = q.new_empty(0)
    if NS > 1:
        local, maps = (new(call.N * NS, H, K, n, dtype=torch.float32) for n in (V, K))
        swept(call, ready, v, S_out=local, splits=NS)
        swept(call, ready, None, S_out=maps, splits=NS)
        start, S = _join(local, maps, _spread(S0, H, False), call.N, False)
        swept(call, ready, v, out=o, states=states, S_in=start, S_out=local, splits=NS)
        S = S[:, :: H // heads].contiguous()
    else:
        S = new(call.N, heads, K, V, dtype=torch.float32)
        swept(call, ready, v, out=o, states=states, S_in=S0, S_out=S)
    if not save:
        return o, S, q.new_empty(0), q.new_empty(0), [q.new_empty(0) for _ in ready]
    return o, S, states, maps, list(ready)


@together
def backward(do, dS, states, maps, ready, q, k, a, b, v, g, cu, scale: float, heads: int, bound, need_dg: bool):
    """Gradients of q, k, a, b, v, g (None where there is none) and of the initial state."""
    call = DplrCall(q, k, v, g, cu, scale, heads, bound)
    shapes = [None if x is None else (x.shape[2], x.dtype) for x in (q, k, a, b, v, g)]
    q, k, a, b, v, g = (None if x is None else rows_of(x) for x in (q, k, a, b, v, g))
    do = rows_of(do.to(q.dtype))
    dS = None if dS is None else dS.contiguous()
    ready = Prepared(*ready)
    B, T, H, K, V, NS, dtype = call.B, call.T, call.H, call.K, call.V, call.splits, q.dtype
    new = functools.partial(torch.empty, device=q.device)
    dv, adjoints = new(B, T, H, V, dtype=dtype), torch.empty_like(states)
    if NS > 1:
        local = new(call.N * NS, H, K, V, dtype=torch.float32)
        swept(call, ready, do, reverse=True, S_out=local, splits=NS)
        start, dS0 = _join(local, maps, _spread(dS, H, True), call.N, True)
        swept(call, ready, do, reverse=True, S_in=start, S_out=local, splits=NS, out=dv, states=adjoints)
    else:
        dS0 = new(call.N, H, K, V, dtype=torch.float32)
        swept(call, ready, do, reverse=True, S_in=dS, first=True, S_out=dS0, out=dv, states=adjoints)
    fast = _fits_hopper(call, q, k, a, b, v, do, g)
    r, x, products = solutions(call, ready, v, do, states, adjoints, not fast)
    out = lambda n: new(1, B, T, H, K, dtype=dtype if n == H else torch.float32)
    grads = [out(y.shape[2]) for y in (q, k, a, b)]
    dg = new(1, B, T, H, K, dtype=torch.float32) if g is not None and need_dg else None
    if fast:
        _of_chunks(call, q, k, a, b, v, r, do, x, g, ready.carry, states, adjoints, grads, dg)
    else:
        _gradients(call, q, k, a, b, v, r, do, x, g, products, ready.carry, states, adjoints, [*grads, dg])
    if dg is not None and call.kind == "scalar":
        dg = dg.sum(-1, keepdim=True)
    folded = [
        None if y is None else _fold(y, heads_of, torch.float32 if n == 5 else kind)
        for n, (y, (heads_of, kind)) in enumerate(zip((*grads, dv[None], dg), [s or (1, None) for s in shapes], strict=True))
    ]
    return folded, dS0 if H == heads else dS0.unflatten(1, (heads, -1)).sum(2)


def _fits_hopper(call: DplrCall, q, k, a, b, v, do, g) -> bool:
    """Whether `dplr_hopper` has this call: whole chunks of one frame, a decay per channel, no shared heads."""
    if not call.on_hopper or call.kind != "vector" or call.ragged or not call.frame == call.C == 64:
        return False
    alone = all(y.shape[2] == call.H for y in (q, k, a, b, v, g))
    sizes = call.V in (64, 128) and call.K % 64 == 0 and call.dtype == torch.bfloat16 and g.dtype == torch.float32
    return alone and sizes and _aligned(q, k, a, b, v, do, g)


def _of_chunks(call: DplrCall, q, k, a, b, v, r, do, x, g, carry, states, adjoints, grads: list, dg: Tensor | None):
    """Fills grads = dq, dk, da, db, and dg by `dplr_hopper`."""
    C, H, V, D, count = call.C, call.H, call.V, 32, call.chunks * call.H
    dq, dk, da, db = grads
    tiles = [_hopper.of_tokens(y, C, C) for y in (do, x, v, r)] + [_hopper.of_tokens(y, C, D) for y in (q, a, k, b)]
    tiles += [_hopper.of_tokens(g, C, D, 4)] + [_hopper.of_states(y, V, D) for y in (states, adjoints)]
    tiles += [_hopper.of_tokens(y[0], C, D) for y in (dq, da, dk, db)]
    launch(_hopper.kernel("dplr_hopper"), (min(count, call.processors),))(
        *tiles, dg, carry, call.scale, call.floor, count, H, C=C, V=V, D=D, ND=call.K // D, GATE=dg is not None, num_warps=8,
    )  # fmt: skip


def _gradients(call: DplrCall, q, k, a, b, v, r, do, x, g, products, carry, states, adjoints, results: list):
    t, C, H, K, V = call.tile("gradients"), call.C, call.H, call.K, call.V
    BD, BV = _width(K, t.BD), _width(V, WIDEST)
    ND = cdiv(K, BD)
    keys, values, gate = (q, k, a, b), (v, r, do, x), results[4] is not None
    strides = tuple(_stride(y) for y in (*keys, v, do, g))
    heads = (H, *_sharing(H, *keys, v, g))
    channels = g if call.kind == "vector" else None
    desc = t.descriptors and K % BD == 0 and V == BV and _aligned(*keys, *values, channels)
    store = desc and not call.ragged and all(y.dtype == call.dtype for y in results[:4])
    kept = (states, adjoints)
    if desc:
        keys, values = (tuple(_wrapped(y, C, n) for y in group) for group, n in ((keys, BD), (values, BV)))
        kept = tuple(TensorDescriptor(y, [y.numel() // K, K], [K, 1], [BV, BD]) for y in kept)
        g = g if channels is None else _wrapped(g, C, BD)
        products = _matrices(products, C, C)
    if store:
        results = [None if y is None else _wrapped(y[0], C, BD) for y in results]
    launch(gradients, (call.chunks * H * ND,))(
        *keys, *values, g, products, carry, *kept, *results, call.cu, call.T, call.N, call.chunks, *strides, call.scale,
        call.floor, 0.0, *heads, K, V, ND, BD=BD, BV=BV, GATE=gate, DESC=desc, STORE=store, ROWS=call.ragged, COL_D=K % BD != 0,
        COL_V=V != BV, num_warps=t.warps, num_stages=t.stages, maxnreg=t.registers, **_decays(call),
    )  # fmt: skip
