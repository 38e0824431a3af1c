"""Linear attention with one decay per key channel on 16-bit operands: launches of the kernels in _kernel_channel.py."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from linnet.ops.triton import _hopper, _table
from linnet.ops.triton._kernel_channel import far_kernel, finish_kernel, keys_role, prepare_kernel, queries_role
from linnet.ops.triton._plan import Call, cdiv, next_power_of_2, rows_of
from linnet.ops.triton._together import launch

SCAN = 64  # tiles whose flags a program of `far_kernel` reads at once


@dataclass
class Ready:
    """q~, k~ [B, T, H, K], the chunks' decays [chunks, H, K] and, unless a bound excludes others, which are near, and pairs."""

    qs: Tensor
    ks: Tensor
    dec: Tensor
    near: Tensor | None
    pairs: Tensor | None


def width(D: int, most: int = 128) -> int:
    return max(16, min(next_power_of_2(D), most))


def warps(D: int) -> int:
    """Of all kernels with tiles of D channels."""
    return 8 if D > 64 else 4


def stride(a: Tensor | None) -> int:
    return 0 if a is None else a.stride(1)


def heads(a: Tensor | None) -> int:
    return 1 if a is None else a.shape[2]


def prepared(call: Call, q: Tensor, k: Tensor) -> Ready:
    """Everything that does not depend on values, for all chunks at once."""
    C, K, H, g = call.tile("o").C, call.K, call.H, call.g
    BK = width(K)
    NK, packed = cdiv(K, BK), call.cu is not None
    chunks = call.T // C + call.N if packed else call.N * cdiv(call.T, C)
    dtype = torch.bfloat16 if call.dtype == torch.float16 else call.dtype  # the factors may leave the range of fp16
    new = functools.partial(torch.empty, device=q.device)
    q, k = rows_of(q), rows_of(k)
    qs, ks = new(call.B, call.T, H, K, dtype=dtype), new(call.B, call.T, H, K, dtype=dtype)
    dec = new(chunks, H, K, dtype=torch.float32)
    # chunks that no row owns stay near
    near = torch.ones(chunks, H, NK, dtype=torch.int32, device=q.device) if call.far else None
    pairs = new(chunks, H, NK, C, C, dtype=dtype) if call.far else None
    launch(prepare_kernel, (chunks * H * NK,))(
        q, k, g, qs, ks, dec, near, call.cu, call.T, call.N, stride(q), stride(k), stride(g), call.floor, H, heads(q), heads(k),
        heads(g), K, NK, BK=BK, C=C, EXCL=call.exclusive, FAR=call.far, ROWS=ragged(call), COL=K % BK != 0, PACKED=packed,
        maxnreg=_table.CHANNEL_REGISTERS["prepare"], num_warps=warps(BK),
    )  # fmt: skip
    ready = Ready(qs, ks, dec, near, pairs)
    far(call, ready, q, k)
    return ready


def far(call: Call, ready: Ready, q: Tensor, k: Tensor, v: Tensor | None = None, do: Tensor | None = None, own=(None,) * 3):
    """Pairs of the chunks that are not near; or, with v and do, what these pairs add to dq, dk and (unless None) dg."""
    if not call.far:
        return
    g, K, V, C = call.g, call.K, call.V, call.tile("o").C
    NF = ready.near.shape[2]
    BK, BV = width(K, 128 if do is None else 64), width(V, 64)
    NK = NF * (width(K) // BK)
    q, k = rows_of(q), rows_of(k)
    v, do = (None if a is None else rows_of(a) for a in (v, do))
    count = ready.near.numel() // NF * NK
    each = min(SCAN, max(1, cdiv(count, 4 * call.processors)))
    launch(far_kernel, (cdiv(count, each),))(
        q, k, v, do, g, ready.near, ready.pairs, *own, call.cu, call.T, call.B * call.T, call.N, stride(q), stride(k), stride(v),
        stride(do), stride(g), call.floor, call.scale, call.H, heads(q), heads(k), heads(v), heads(g), K, V, NK,
        cdiv(V, BV), NF, count, each, BK=BK, BV=BV, C=C, EXCL=call.exclusive, GRAD=do is not None,
        GATE=own[2] is not None, ROWS=ragged(call), COL=NK * BK != K, PACKED=call.cu is not None, SCAN=SCAN, IP=precision(call),
        num_warps=warps(width(K)),
    )  # fmt: skip


def ragged(call: Call) -> bool:
    return call.cu is not None or call.T % call.tile("o").C != 0


def precision(call: Call) -> str:
    return "tf32x3" if call.dtype == torch.float32 else "tf32"


def copyable(*operands: Tensor | None) -> bool:
    """Whether the bulk copy engine can fetch tiles of these rows."""
    aligned = lambda a: a.data_ptr() % 16 == 0 and a.stride(1) > 0 and a.stride(1) * a.element_size() % 16 == 0
    return all(a is None or aligned(a) for a in operands)


def in_rows(a: Tensor, C: int, D: int) -> TensorDescriptor:
    """Tiles of C tokens and D columns."""
    return TensorDescriptor(a, [a.shape[0] * a.shape[1], a.shape[2] * a.shape[3]], [a.stride(1), 1], [C, D])


def states(a: Tensor, Z: int, *tile: int) -> TensorDescriptor:
    """States as rows of Z columns."""
    return TensorDescriptor(a, [a.numel() // Z, Z], [Z, 1], list(tile))


def keys(
    call: Call, ready: Ready, name: str, z: Tensor, *, heads: int, out: Tensor | None = None, splits: int = 1,
    S_in: Tensor | None = None, first: bool = False, scale_in: float = 1.0, S_out: Tensor | None = None, scale_out: float = 1.0,
    total: Tensor | None = None, kept: Tensor | None = None,
) -> None:  # fmt: skip
    """o (z = v) or dv (z = do) to `out` [ND, B, T, H, V]; without it only the states of `heads` heads from zero and their decay.

    kept [chunks, H, V, K]: where to keep the states that meet the chunks.
    """
    t, H, D, Z = call.tile(name), heads, call.K, z.shape[3]
    C, BD, BZ = t.C, width(D), width(Z)
    ND, NZ = cdiv(D, BD), cdiv(Z, BZ)
    rows = ragged(call)
    z = rows_of(z)
    desc = t.descriptors and D % BD == 0 and Z % BZ == 0 and copyable(ready.qs, ready.ks, z)
    wrap = lambda a, w: in_rows(a, C, w) if desc else a
    store = desc and t.store and out is not None and not rows and out.dtype != torch.float32
    target = TensorDescriptor(out, [out.shape[0] * call.B * call.T, H * Z], [H * Z, 1], [C, BZ]) if store else out
    state = desc and S_out is not None
    fewer = rows or (kept is not None and out is not None)  # the states that are kept are one more tile
    launch(keys_role, (call.N * splits * H * ND * NZ,))(
        wrap(ready.qs, BD), wrap(ready.ks, BD), wrap(z, BZ), ready.dec, ready.near, ready.pairs, target, S_in,
        states(S_out, Z, BD, BZ) if state else S_out, None if kept is None else states(kept, D, BZ, BD), total, call.cu, call.T,
        call.B * call.T, stride(z), call.scale, scale_in, scale_out, H, call.H, z.shape[2],
        1 if S_in is None else S_in.shape[1], H if S_out is None else S_out.shape[1], D, Z, ND, NZ, splits, BD=BD, BZ=BZ, C=C,
        M=call.block // C, STAGES=max(1, t.stages - fewer), REV=name == "dv", EXCL=call.exclusive, OUT=out is not None,
        FAR=call.far, DESC=desc, ROWS=rows, COL_D=D % BD != 0, COL_Z=Z % BZ != 0, PACKED=call.cu is not None,
        HAS_IN=S_in is not None, FIRST=first, HAS_OUT=S_out is not None, OUT_DESC=state, STORE=store, STATES=kept is not None,
        IP=precision(call), num_warps=warps(BD),
    )  # fmt: skip


def queries(
    call: Call, ready: Ready, name: str, x: Tensor, y: Tensor, out: Tensor, *, splits: int = 1, S_in: Tensor | None = None,
    first: bool = False, scale_in: float = 1.0, blocks: Tensor | None = None, ends: Tensor | None = None,
) -> None:  # fmt: skip
    """dq~ (x, y = do, v) or dk~ (v, do) to `out` [ND, B, T, H, K] in fp32."""
    t, H, D, Z = call.tile(name), call.H, x.shape[3], call.K
    C, BD, BZ = t.C, width(D), width(Z)
    ND, NZ = cdiv(D, BD), cdiv(Z, BZ)
    rows = ragged(call)
    x, y, zs = rows_of(x), rows_of(y), ready.ks if name == "dq" else ready.qs
    desc = t.descriptors and D % BD == 0 and Z % BZ == 0 and copyable(x, y, zs)
    wrap = lambda a, w: in_rows(a, C, w) if desc else a
    store = desc and t.store and not rows
    target = TensorDescriptor(out, [out.shape[0] * call.B * call.T, H * Z], [H * Z, 1], [C, BZ]) if store else out
    kept = desc and blocks is not None
    fewer = rows or call.block == C  # a state for every chunk is one more tile to fetch ahead
    launch(queries_role, (call.N * splits * H * ND * NZ,))(
        wrap(x, BD), wrap(y, BD), wrap(zs, BZ), wrap(ready.ks, BZ), ready.dec, ready.near, target, ends, S_in,
        states(blocks, D, BZ, BD) if kept else blocks, call.cu, call.T, call.B * call.T, stride(x), stride(y), call.scale, scale_in,
        H, heads(x), heads(y), 1 if S_in is None else S_in.shape[1], D, Z, ND, NZ, splits, BD=BD, BZ=BZ, C=C, M=call.block // C,
        STAGES=max(1, t.stages - fewer), REV=name == "dk", EXCL=call.exclusive, FAR=call.far, DESC=desc,
        ROWS=rows, COL_D=D % BD != 0, COL_Z=Z % BZ != 0, PACKED=call.cu is not None, HAS_IN=S_in is not None, FIRST=first,
        GATE=blocks is not None, BLOCKS_DESC=kept, STORE=store, IP=precision(call), num_warps=warps(BZ),
    )  # fmt: skip


def fits_hopper(call: Call, *operands: Tensor) -> bool:
    """Whether `queries_hopper` has this call."""
    simple = call.cu is None and not call.exclusive and call.T % call.block == 0 and all(a.shape[2] == call.H for a in operands)
    kind = call.dtype == torch.bfloat16 and call.g.dtype == torch.float32
    return simple and kind and call.K == call.V == 128 and call.on_hopper and copyable(*operands, call.g)


def of_chunks(
    call: Call, ready: Ready, do: Tensor, q: Tensor, k: Tensor, v: Tensor, S_in, splits: int, adjoints: Tensor, gate: bool
):
    """As `gradients`, all of a chunk in one program; adjoints [chunks, H, V, K]: kept by the pass for dv."""
    B, T, H, K, V, C = call.B, call.T, call.H, call.K, call.V, call.tile("o").C
    kept = torch.empty_like(adjoints)
    keys(call, ready, "o", v, heads=H, splits=splits, S_in=S_in, kept=kept)
    dq, dk = (torch.empty(B, T, H, K, dtype=a.dtype, device=a.device) for a in (q, k))
    dg = torch.empty(B, T, H, K, dtype=torch.float32, device=q.device) if gate else None
    far(call, ready, q, k, v, do, (dq, dk, dg))
    D = 32
    tiles = [_hopper.of_tokens(a, C, D) for a in (ready.qs, ready.ks)] + [_hopper.of_tokens(a, C, V) for a in (v, do)]
    tiles += [_hopper.of_states(a, V, D) for a in (kept, adjoints)] + [_hopper.of_tokens(a, C, D) for a in (dq, dk)]
    launch(_hopper.kernel("queries_hopper"), (adjoints.shape[0] * H,))(
        *tiles, dq, dk, _hopper.of_tokens(call.g, C, D, 4), ready.dec, ready.near, dg, call.scale, call.floor, H,
        H // heads(call.g), C=C, V=V, D=D, ND=K // D, GATE=gate, FAR=call.far, num_warps=4,
    )  # fmt: skip
    return dq[None], dk[None], None if dg is None else dg[None]


def gradients(call: Call, ready: Ready, do: Tensor, q: Tensor, k: Tensor, v: Tensor, S_in: Tensor | None, into: dict, gate: bool):
    """dq, dk [1, B, T, H, K] and dg (None without `gate`); `into`: where the adjoint state comes from."""
    B, T, H, K, BK, C = call.B, call.T, call.H, call.K, width(call.K), call.tile("o").C
    ND, NK, NB = cdiv(call.V, width(call.V)), cdiv(K, BK), call.block_count()
    new = functools.partial(torch.empty, device=q.device)
    part = functools.partial(new, B, T, H, K)
    dq, dk = (part(dtype=a.dtype if a.shape[2] == H else torch.float32) for a in (q, k))
    dg = part(dtype=torch.float32) if gate else None
    X, Y = (new(ND, B, T, H, K, dtype=torch.float32) for _ in range(2))
    blocks = new(NB, H, K, call.V, dtype=ready.qs.dtype) if gate else None
    ends = new(NB, H, ND, K, dtype=torch.float32) if gate else None
    far(call, ready, q, k, v, do, (dq, dk, dg))
    splits = into.get("splits", 1)
    queries(call, ready, "dq", do, v, X, splits=splits, S_in=S_in, blocks=blocks)
    queries(call, ready, "dk", v, do, Y, **into, blocks=blocks, ends=ends)
    for of_far in (False, True)[: 1 + call.far]:  # each takes the blocks that it is for
        launch(finish_kernel, (NB * H * NK,))(
            ready.qs, ready.ks, call.g, ready.near, X, Y, ends, dq, dk, dg, call.cu, T, B * T, call.N, stride(call.g), call.floor,
            H, heads(call.g), K, NK, ND, BK=BK, C=C, M=call.block // C, EXCL=call.exclusive, FAR=of_far, CHOOSE=call.far, GATE=gate,
            ROWS=ragged(call), COL=K % BK != 0, PACKED=call.cu is not None, maxnreg=_table.CHANNEL_REGISTERS["finish"],
            num_warps=warps(BK),
        )  # fmt: skip
    return dq[None], dk[None], None if dg is None else dg[None]
