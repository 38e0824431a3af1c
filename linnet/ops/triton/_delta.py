"""The delta rule, forward and backward, as launches of its kernels (imports triton)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from linnet.ops.triton import _hopper
from linnet.ops.triton._kernel_delta import backward_sweep, forward_sweep, gradients_scalar, prepare_scalar, value_gradients
from linnet.ops.triton._kernel_delta_frame import gradients_frame, gradients_near, prepare_frame
from linnet.ops.triton._kernel_delta_vector import gradients_vector, prepare_vector
from linnet.ops.triton._kernel_scalar import gate_kernel
from linnet.ops.triton._linear import _fold
from linnet.ops.triton._plan import WIDEST, DeltaCall, cdiv, next_power_of_2, rows_of
from linnet.ops.triton._together import launch, together

INVERSE_TYPES = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32}


class Prepared(NamedTuple):
    """What every sweep and the gradients read: per chunk and head T and A, per token row factors, and decayed operands."""

    inverse: Tensor  # [NB, H, C, C]
    pairs: Tensor  # [NB, H, C, C]
    factors: Tensor  # [5, H, B*T]: of q, e, p, u (scalar decay; u alone per channel), G
    carry: Tensor  # [H, NB] or [NB, H, K]
    q: Tensor  # [B, T, H, K], decayed; empty with scalar decay
    e: Tensor
    p: Tensor


def _width(size: int, most: int) -> int:
    return max(16, min(next_power_of_2(size), most))


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(1)


def _heads(x: Tensor | None) -> int:
    return 1 if x is None else x.shape[2]


def _sharing(H: int, *operands: Tensor | None) -> tuple[int, ...]:
    """How many of the H heads share one of each operand: 1, the usual number, is a constant and costs a kernel no division."""
    return tuple(1 if x is None else H // x.shape[2] for x in operands)


def _gate_kind(x: Tensor | None) -> int:
    """0 no gate, 1 one per token, 2 one per channel."""
    return 0 if x is None else 1 if x.shape[3] == 1 else 2


def prepare(call: DeltaCall, q, k, p, g, erase, write) -> Prepared:
    t, C, H, K = call.tile("prepare"), call.C, call.H, call.K
    NB, tokens = call.chunks, call.B * call.T
    new = functools.partial(torch.empty, device=q.device)
    inverse, pairs = (new(NB, H, C, C, dtype=q.dtype) for _ in range(2))
    factors = new(5, H, tokens, dtype=torch.float32)
    BD = _width(K, t.BD)
    shared = dict(
        BD=BD, C=C, ERASE=_gate_kind(erase), WRITE=_gate_kind(write) == 1, SAME=k is None, EXCL=call.exclusive, BEFORE=call.before,
        ROWS=call.ragged, COL=K % BD != 0, PACKED=call.cu is not None, INV=INVERSE_TYPES[t.inverse], IP=call.precision,
        num_warps=t.warps, num_stages=1, maxnreg=t.registers,
    )  # fmt: skip
    operands = (q, k, p, g, erase, write)
    strides = tuple(_stride(x) for x in operands)
    sharing = _sharing(H, *operands)
    if call.kind == "vector":
        decayed = [new(call.B, call.T, H, K, dtype=q.dtype) for _ in range(3)]
        carry = new(NB, H, K, dtype=torch.float32)
        kernel, own = (prepare_frame, {}) if call.framed else (prepare_vector, call.levels)
        launch(kernel, (NB * H,))(
            *operands, inverse, pairs, *decayed, factors, carry, call.cu, call.T, tokens, call.N, *strides, call.scale, call.floor,
            H, *sharing, K, cdiv(K, BD), DT=call.triton_dtype(tl), **own, **shared,
        )  # fmt: skip
        return Prepared(inverse, pairs, factors, carry, *decayed)
    carry = new(H, NB, dtype=torch.float32)
    desc = t.descriptors and K % BD == 0 and _aligned(q, k, p)
    tiles = tuple(_wrapped(x, C, BD) if desc and x is not None else x for x in (q, k, p))
    matrices = tuple(TensorDescriptor(x, [x.numel() // C, C], [C, 1], [C, C]) if desc else x for x in (inverse, pairs))
    launch(prepare_scalar, (NB * H,))(
        *tiles, g, erase, write, *matrices, factors, carry, call.cu, call.T, tokens, call.N, NB, *strides, call.scale, H,
        *sharing, K, cdiv(K, BD), DECAY=g is not None, DESC=desc, **shared,
    )  # fmt: skip
    return Prepared(inverse, pairs, factors, carry, *(q.new_empty(0) for _ in range(3)))


def _wrapped(x: Tensor, C: int, width: int) -> Any:
    """The descriptor of an operand [B, T, H, D] as rows of H*D values."""
    return TensorDescriptor(x, [x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]], [x.stride(1), 1], [C, width])


def _aligned(*tensors: Tensor | None) -> bool:
    return all(x is None or (x.data_ptr() % 16 == 0 and x.stride(1) * x.element_size() % 16 == 0) for x in tensors)


def _operands(call: DeltaCall, prepared: Prepared, q, k, p):
    """(q, e, p) as the sweeps read them, and whether e is p."""
    if call.kind == "vector":
        return (prepared.q, prepared.e, prepared.p), False
    return (q, p if k is None else k, p), k is None


class _Launch:
    """Descriptors and sizes that both sweeps share."""

    def __init__(
        self, call: DeltaCall, part: str, prepared: Prepared, q, e, p, values: Tensor | None, V: int, gate: Tensor | None = None
    ):  # fmt: skip
        t = call.tile(part)
        C, K = call.C, call.K
        BD = _width(K, WIDEST)
        BV = _width(V, t.BV)
        desc = t.descriptors and K == BD and V % BV == 0 and _aligned(q, e, p, values, gate)
        self.store = desc and not call.ragged
        self.desc, self.BV, self.H, self.V = desc, BV, call.H, V
        self.NV = cdiv(V, BV)
        self.inputs, self.gate = [q, e, p, values], gate
        self.matrices = [prepared.inverse, prepared.pairs]
        if desc:
            self.inputs = [None if x is None else _wrapped(x, C, w) for x, w in zip(self.inputs, (BD, BD, BD, BV), strict=True)]
            self.gate = None if gate is None else _wrapped(gate, C, BV)
            self.matrices = [TensorDescriptor(x, [x.numel() // C, C], [C, 1], [C, C]) for x in self.matrices]
        self.strides = tuple(_stride(x) for x in (q, e, p, values))
        self.heads = tuple(_heads(x) for x in (q, e, p, values))
        self.shared = dict(
            BD=BD, BV=BV, C=C, STAGES=t.stages, VECTOR=call.kind == "vector", DECAY=call.kind != "none", DESC=desc,
            STORE=self.store, ROWS=call.ragged, COL_D=K != BD, COL_V=V % BV != 0, PACKED=call.cu is not None,
            IP=call.precision, num_warps=t.warps, maxnreg=t.registers,
        )  # fmt: skip

    def target(self, x: Tensor | None, C: int) -> Any:
        return _wrapped(x, C, self.BV) if self.store and x is not None else x

    def states(self, x: Tensor | None, K: int) -> Any:
        if not self.desc or x is None:
            return x
        return TensorDescriptor(x, [x.numel() // K, K], [K, 1], [self.BV, self.shared["BD"]])


def _forward(
    call: DeltaCall, prepared: Prepared, q, k, p, u, write, *, o=None, x=None, states=None, S_in=None, S_out=None, splits=1
):
    """One forward sweep; u None: the map of every split, into S_out [N*NS, H, K, K]."""
    (q, e, p), same = _operands(call, prepared, q, k, p)
    V = call.K if u is None else call.V
    gate = write if _gate_kind(write) == 2 else None
    run = _Launch(call, "forward", prepared, q, e, p, u, V, gate)
    H_in, H_out = (1 if S is None else S.shape[1] for S in (S_in, S_out))
    launch(forward_sweep, (call.N * splits * call.H * run.NV,))(
        *run.inputs, run.gate, *run.matrices, prepared.factors, prepared.carry, run.target(o, call.C), run.target(x, call.C),
        run.states(states, call.K), S_in, S_out, call.cu, call.T, call.B * call.T, call.chunks, *run.strides, _stride(gate), call.H,
        *run.heads, _heads(gate), H_in, H_out, call.K, V, run.NV, splits, SAME=same, WRITE=_gate_kind(write),
        VALUES=u is not None, OUT=o is not None,
        SAVE_X=x is not None, SAVE_S=states is not None, HAS_IN=S_in is not None, HAS_OUT=S_out is not None, **run.shared,
    )  # fmt: skip


def _backward(
    call: DeltaCall, prepared: Prepared, q, k, p, do, *, y=None, states=None, R_in=None, first=False, R_out=None, splits=1
):
    (q, e, p), same = _operands(call, prepared, q, k, p)
    run = _Launch(call, "backward", prepared, q, e, p, do, call.V)
    R_heads = 1 if R_in is None else R_in.shape[1]
    launch(backward_sweep, (call.N * splits * call.H * run.NV,))(
        *run.inputs, *run.matrices, prepared.factors, prepared.carry, run.target(y, call.C), run.states(states, call.K), R_in,
        R_out, call.cu, call.T, call.B * call.T, call.chunks, *run.strides, call.H, *run.heads[:3], R_heads,
        call.K, call.V, run.NV, splits, SAME=same, KEEP=y is not None, HAS_IN=R_in is not None, FIRST=first, **run.shared,
    )  # fmt: skip


def _join(local: Tensor, maps: Tensor, first: Tensor | None, rows: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """States at the starts (reverse: ends) of the splits [N*NS, H, K, V] and behind the last one: S_{i+1} = M_i S_i + local_i."""
    local, maps = (x.unflatten(0, (rows, -1)) for x in (local, maps))
    if reverse:
        maps = maps.transpose(-1, -2)
    start = torch.empty_like(local)
    S = torch.zeros_like(local[:, 0]) if first is None else first
    order = range(local.shape[1])
    for i in reversed(order) if reverse else order:
        start[:, i] = S
        S = (maps[:, i] @ S).add_(local[:, i])
    return start.flatten(0, 1), S


def _spread(S: Tensor | None, H: int, first: bool) -> Tensor | None:
    """A state [N, heads, K, V] for H heads; first: an adjoint, which enters one head of a group only."""
    if S is None:
        return None
    S = S.float()
    if S.shape[1] == H:
        return S
    if not first:
        return S.repeat_interleave(H // S.shape[1], 1)
    wide = S.new_zeros(S.shape[0], S.shape[1], H // S.shape[1], *S.shape[2:])
    wide[:, :, 0] = S
    return wide.flatten(1, 2)


@together
def forward(q, k, p, v, erase, write, g, S0, cu, scale: float, before: bool, exclusive: bool, heads: int, bound, save: bool):
    """o, final state; for the backward X, states, split maps and starts, and everything prepared (empty unless `save`)."""
    call = DeltaCall(q, k, p, v, g, cu, scale, before, exclusive, heads, bound)
    q, k, p, v, g, erase, write = (None if x is None else rows_of(x) for x in (q, k, p, v, g, erase, write))
    S0 = None if S0 is None else S0.contiguous()
    H, K, V, NS, dtype = call.H, call.K, call.V, call.splits, q.dtype
    new = functools.partial(torch.empty, device=q.device)
    prepared = prepare(call, q, k, p, g, erase, write)
    o = new(call.B, call.T, H, V, dtype=dtype)
    x = new(call.B, call.T, H, V, dtype=dtype) if save else None
    states = new(call.chunks, H, V, K, dtype=dtype) if save else None
    maps = q.new_empty(0)
    if NS > 1:
        local, maps = (new(call.N * NS, H, K, n, dtype=torch.float32) for n in (V, K))
        _forward(call, prepared, q, k, p, v, write, S_out=local, splits=NS)
        _forward(call, prepared, q, k, p, None, None, S_out=maps, splits=NS)
        start, S = _join(local, maps, _spread(S0, H, False), call.N, False)
        S = S[:, :: H // heads].contiguous()
        _forward(call, prepared, q, k, p, v, write, o=o, x=x, states=states, S_in=start, splits=NS)
    else:
        S = new(call.N, heads, K, V, dtype=torch.float32)
        _forward(call, prepared, q, k, p, v, write, o=o, x=x, states=states, S_in=S0, S_out=S)
    if not save:
        return o, S, *(q.new_empty(0) for _ in range(3)), [q.new_empty(0) for _ in range(7)]
    return o, S, x, states, maps, list(prepared)


@together
def backward(
    do, dS, x, states, maps, prepared, q, k, p, v, erase, write, g, cu, scale: float, before: bool, exclusive: bool, heads: int,
    bound, need_dg: bool
):  # fmt: skip
    """Gradients of q, k, p, v, erase, write, g (None where there is none) and of the initial state."""
    call = DeltaCall(q, k, p, v, g, cu, scale, before, exclusive, heads, bound)
    shapes = [None if a is None else (a.shape[2], a.dtype) for a in (q, k, p, v, erase, write, g)]
    q, k, p, v, g, erase, write = (None if a is None else rows_of(a) for a in (q, k, p, v, g, erase, write))
    do = rows_of(do.to(q.dtype))
    dS = None if dS is None else dS.contiguous()
    prepared = Prepared(*prepared)
    B, T, H, K, V, NS, NB, dtype = call.B, call.T, call.H, call.K, call.V, call.splits, call.chunks, q.dtype
    new = functools.partial(torch.empty, device=q.device)
    y = new(B, T, H, V, dtype=dtype)
    adjoints = torch.empty_like(states)
    if NS > 1:
        local = new(call.N * NS, H, K, V, dtype=torch.float32)
        _backward(call, prepared, q, k, p, do, R_out=local, splits=NS)
        start, dS0 = _join(local, maps, _spread(dS, H, True), call.N, True)
        _backward(call, prepared, q, k, p, do, y=y, states=adjoints, R_in=start, R_out=torch.empty_like(local), splits=NS)
    else:
        dS0 = new(call.N, H, K, V, dtype=torch.float32)
        _backward(call, prepared, q, k, p, do, y=y, states=adjoints, R_in=dS, first=True, R_out=dS0)
    t = call.tile("gradients")
    fast = _fits_hopper(call, q, k, p, v, do, erase)
    BD, BV = K if fast else _width(K, t.BD), _width(V, 128)
    ND, NV = cdiv(K, BD), cdiv(V, BV)
    out = lambda a: new(1, B, T, H, K, dtype=dtype if a.shape[2] == H else torch.float32)
    vector = call.kind == "vector"
    dq, dp = out(q), out(p)
    dk = None if k is None else out(k)
    part = lambda n: new(n, H, B * T, dtype=torch.float32)
    channels = lambda a: new(1, B, T, H, a.shape[3], dtype=a.dtype if a.shape[2] == H else torch.float32)
    derase = None if erase is None else part(ND) if _gate_kind(erase) == 1 else channels(erase)
    dwrite = None if write is None else part(1) if _gate_kind(write) == 1 else channels(write)
    gate = g is not None and need_dg
    dg = None if g is None or (vector and not gate) else new(1, B, T, H, K, dtype=torch.float32) if vector else part(ND)
    shared = dict(
        BD=BD, BV=BV, NV=NV, C=call.C, ERASE=_gate_kind(erase), SAME=k is None, EXCL=exclusive, BEFORE=before,
        ROWS=call.ragged, COL_D=K % BD != 0, COL_V=V % BV != 0, PACKED=cu is not None, IP=call.precision, num_warps=t.warps,
        maxnreg=t.registers,
    )  # fmt: skip
    sharing = functools.partial(_sharing, H)
    strides = tuple(_stride(a) for a in (q, k, p, do))
    inputs, kept = (q, k, p, x, y, do), (states, adjoints)
    tiles = (g, erase if _gate_kind(erase) == 2 else None) if vector else ()
    desc = t.descriptors and K % BD == 0 and V % BV == 0 and _aligned(*inputs, *tiles)
    results = (dq, dk, dp, dg, derase if _gate_kind(erase) == 2 else None) if vector else (dq, dk, dp)
    store = desc and not call.ragged and all(a is None or a.dtype == dtype for a in results[:3])
    if desc:
        wrap = lambda a, width: None if a is None else _wrapped(a, call.C, width)
        inputs = tuple(wrap(a, BD if n < 3 else BV) for n, a in enumerate(inputs))
        kept = tuple(TensorDescriptor(a, [NB * H * V, K], [K, 1], [BV, BD]) for a in kept)
    if store:
        results = tuple(None if a is None else _wrapped(a[0], call.C, BD) for a in results)
    if vector:
        g_tiles, erase_tiles = (_wrapped(a, call.C, BD) if desc and a is not None else a for a in tiles)
        erase_tiles = erase if erase_tiles is None else erase_tiles
        derase_tiles = derase if results[4] is None else results[4]
        own = {} if call.framed else call.levels
        kernels = (gradients_near, gradients_frame) if call.framed else (gradients_vector,)  # each tile is one kernel's
        if _fits_channel_hopper(call, q, k, p, v, do):
            kernels = (gradients_frame,)
            _of_channels(call, prepared, q, p, x, y, do, g, erase, states, adjoints, dq, dp, dg, derase, ND, gate)
        for kernel in kernels:
            whole = kernel is gradients_frame  # one program for all tiles of a chunk
            launch(kernel, (NB * H * (1 if whole else ND),))(
                *inputs, g_tiles, prepared.carry, erase_tiles, *kept, *results[:3], derase_tiles, results[3], cu, T, B * T, call.N,
                *strides, _stride(g), _stride(erase), scale, call.floor, H, *sharing(q, k, p, g, erase), K, V, ND,
                GATE=gate, DESC=desc, STORE=store, DT=call.triton_dtype(tl),
                **(dict(BK=next_power_of_2(K)) if whole else own), **shared,
            )  # fmt: skip
    elif fast:
        dg = _of_chunks(call, prepared, q, p, x, y, do, erase, states, adjoints, dq, dp, derase, gate)
    else:
        launch(gradients_scalar, (NB * H * ND,))(
            *inputs, prepared.factors, prepared.carry, erase, *kept, *results, derase, dg, cu, T, B * T, call.N, NB, *strides,
            _stride(erase), scale, H, *sharing(q, k, p, erase), K, V, ND, DECAY=g is not None, DESC=desc,
            STORE=store, **shared,
        )  # fmt: skip
    values = y[None]
    if write is not None:
        values = new(1, B, T, H, V, dtype=dtype if v.shape[2] == H else torch.float32)
        launch(value_gradients, (cdiv(B * T, 32) * H,))(
            v, y, write, prepared.factors, values, dwrite, B * T, _stride(v), _stride(write), H, *sharing(v, write), V,
            cdiv(V, 128), CHANNELS=_gate_kind(write) == 2, ROWS=32, BV=_width(V, 128), num_warps=4,
        )  # fmt: skip
    gates = lambda a: a if a is None or a.ndim == 5 else a.sum(0).view(H, B, T).permute(1, 2, 0)[None, ..., None]  # [1, B, T, H, 1]
    if not vector:
        dg = gates(dg)
    results = (dq, dk, dp, values, gates(derase), gates(dwrite), dg if gate else None)
    folded = [
        None if a is None else _fold(a, *(shape if a is not dg else (shape[0], torch.float32)))
        for a, shape in zip(results, shapes, strict=True)
    ]
    if H != heads:
        dS0 = dS0.unflatten(1, (heads, -1)).sum(2)
    return folded, dS0


def _fits_hopper(call: DeltaCall, q, k, p, v, do, erase) -> bool:
    """Whether `delta_hopper` has this call."""
    fits = call.kind != "vector" and call.K == 128 and _gate_kind(erase) < 2
    return fits and _hopper_has(call, q, k, p, v, do)


def _fits_channel_hopper(call: DeltaCall, q, k, p, v, do) -> bool:
    """Whether `channel_hopper` has this call, but for the tiles that need frames."""
    return call.framed and call.K % 64 == 0 and _hopper_has(call, q, k, p, v, do)


def _hopper_has(call: DeltaCall, q, k, p, v, do) -> bool:
    """What both kernels ask for: whole chunks, one key, read and erased after the decay, no shared heads."""
    simple = k is None and not (call.before or call.exclusive or call.ragged) and all(a.shape[2] == call.H for a in (q, p, v))
    return simple and call.dtype == torch.bfloat16 and call.V == 128 and call.C == 64 and call.on_hopper and _aligned(q, p, do)


def _of_channels(
    call: DeltaCall, prepared: Prepared, q, p, x, y, do, g, erase, states, adjoints, dq, dp, dg, derase, ND: int, gate: bool
):
    """Fills dq, dp, dg and derase by `channel_hopper`, but for the tiles that need frames."""
    C, H, D = call.C, call.H, call.K // ND
    tiles = [_hopper.of_tokens(a, C, D) for a in (q, p)] + [_hopper.of_tokens(a, C, C) for a in (x, y, do)]
    tiles += [_hopper.of_states(a, C, D) for a in (states, adjoints)] + [_hopper.of_tokens(a[0], C, D) for a in (dq, dp)]
    launch(_hopper.kernel("channel_hopper"), (call.chunks * H,))(
        *tiles, g, prepared.carry, erase, dg, derase, call.B * call.T, _stride(g), _stride(erase), call.scale, call.floor, H,
        *_sharing(H, q, p, g, erase), C=C, D=D, ND=ND, GATE=gate, ERASE=_gate_kind(erase), num_warps=4,
    )  # fmt: skip


def _of_chunks(call: DeltaCall, prepared: Prepared, q, p, x, y, do, erase, states, adjoints, dq, dp, derase, gate: bool):
    """dq, dp, derase by `delta_hopper`; returns dg [1, B, T, H, 1], or None."""
    B, T, H, K, C = call.B, call.T, call.H, call.K, call.C
    decay = call.kind == "scalar"
    new = functools.partial(torch.empty, device=q.device, dtype=torch.float32)
    query, key, products = (new(H, B * T), new(2, H, B * T), new(call.chunks, H)) if decay else (None, None, None)
    tiles = [_hopper.of_tokens(a, C, K) for a in (q, p, x, y, do)]
    tiles += [_hopper.of_states(a, rows, K) for a, rows in ((states, K), (states, C), (adjoints, K))]
    tiles += [_hopper.of_tokens(a[0], C, K) for a in (dq, dp)]
    launch(_hopper.kernel("delta_hopper"), (call.chunks * H,))(
        *tiles, prepared.factors, prepared.carry, erase, query, key, products, derase, B * T, _stride(erase), call.scale, H,
        *_sharing(H, q, p, erase), C=C, D=K, DECAY=decay, ERASE=erase is not None, num_warps=4,
    )  # fmt: skip
    if not gate:
        return None
    dg = new(1, B, T, H, 1)
    launch(gate_kernel, (call.chunks, H))(
        query, key, products, dg, None, None, T, B * T, call.N, H, H, 1, 1, C, 1, C, False, False, False
    )
    return dg
