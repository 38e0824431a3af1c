"""Chunkwise delta rule, forward and backward.

e = erase * k (k: the key that is read, the write key p if None), u = write * v, both gates per head and optional here.
Per chunk with start state S, decayed operands q~, e~ (prefix) and p^ (suffix), total decay W, A = pair(q, p), L = pair(e, p):
    (I + L) X = u - e~ S               the new values x_t = u_t - r_t
    o = q~ S + A X                     S' = W S + p^T X
    dX = A^T do + p^ dS', dB = (I + L)^{-T} dX
    du = dB, de~ = -dB S^T, dL = -stril(dB X^T), dA = tril(do X^T), dq~ = do S^T, dp^ = X dS'^T, dS = W dS' + q~^T do - e~^T dB
The forward stores X and the states at span starts; the backward recomputes everything else, one span at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops.torch._chunks import Chunks
from linnet.ops.torch._decay import add_product_, column_sums, expand, fold, minus_product, rows_times, transposed_times
from linnet.ops.torch._inverse import unit_lower_inverse
from linnet.ops.torch._linear import Decays, group, initial, keep, run_states, ungroup


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    """gate [c, H', C, 1] times x [c, H'', C, *], at the larger head count."""
    if gate is None:
        return x
    heads = max(x.shape[1], gate.shape[1])
    return expand(x, heads) * expand(gate, heads)


def gated_backward(d: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the gate from the gradient d of `gated(x, gate)` at any larger head count."""
    heads = max(x.shape[1], gate.shape[1])
    d = fold(d, heads)
    dgate = (d * expand(x, heads)).sum(-1, keepdim=True)
    return fold(d * expand(gate, heads), x.shape[1]), fold(dgate, gate.shape[1])


def forward(
    q, k, p, v, erase, write, g, S0, cu_seqlens, scale: float, before_decay: bool, exclusive: bool, heads: int, chunk: int,
    save: bool, dtype,
):  # fmt: skip
    """q [B,T,Hq,K], k None | [B,T,*,K], p [B,T,*,K], v [B,T,*,V], erase, write None | [B,T,*,1], g None | [B,T,*,1 or K].

    before_decay: e reads before the decay; exclusive: q reads before the step.
    Returns o [B,T,H,V], final state, and for the backward (empty unless `save`) X [B,T,heads,V] and states at span starts.
    """
    B, T, Hq, K = q.shape
    V = v.shape[3]
    grid = Chunks(cu_seqlens, B, T, chunk, heads)
    S = initial(grid, S0, (grid.rows, heads, K, V), dtype, q.device)
    o = torch.empty(B, T, max(Hq, heads), V, dtype=v.dtype, device=v.device)
    X_all = torch.empty(B if save else 0, T, heads, V, dtype=dtype, device=v.device)
    saved, row = grid.span_states(save, (heads, K, V), q, dtype), 0
    decays = Decays(grid, g, heads, before_decay or exclusive, dtype)
    for span in grid.spans():
        row = keep(saved, row, S[: grid.counts[span[0]]])
        qs, ks, ps, us, bs, ws = grid.takes(span, dtype, q=q, k=k, p=p, v=v, erase=erase, write=write)
        qs, es = group(qs.mul_(scale), heads), gated(ps if ks is None else ks, bs)[:, :, None]
        us, decay = expand(gated(us, ws), heads), decays.at(span)
        inverse = unit_lower_inverse(decay.pair(es, ps, exclusive=before_decay, strict=True)[:, :, 0])
        e_tilde, p_hat = decay.prefix(es, before_decay)[:, :, 0], decay.suffix(ps).transpose(-1, -2)
        starts = grid.buffer("starts", (us.shape[0], heads, K, V), v, dtype)
        X = grid.buffer("X", tuple(us.shape), v, dtype)
        for a, b, n in grid.waves(span):
            starts[a:b] = S[:n]
            torch.matmul(inverse[a:b], add_product_(us[a:b], e_tilde[a:b], S[:n], -1), out=X[a:b])
            decay.carry_(S[:n], slice(a, b))
            add_product_(S[:n], p_hat[a:b], X[a:b])
        A = decay.pair(qs, ps, exclusive=exclusive, strict=exclusive)
        out = add_product_(A.flatten(2, 3) @ X, decay.prefix(qs, exclusive).flatten(2, 3), starts)
        grid.put(o, out.unflatten(2, (-1, grid.C)).flatten(1, 2), span)
        if save:
            grid.put(X_all, X, span)
    return o, grid.unsort(S), X_all, saved


def backward(
    do, dS, X_all, saved, q, k, p, v, erase, write, g, cu_seqlens, scale: float, before_decay: bool, exclusive: bool, heads: int,
    chunk: int, dtype,
):  # fmt: skip
    """Gradients of q, k, p, v, erase, write, g (None where there was none) and of the initial state."""
    B, T, Hq, K = q.shape
    grid = Chunks(cu_seqlens, B, T, chunk, heads)
    dS = initial(grid, dS, (grid.rows, heads, K, v.shape[3]), dtype, q.device)
    dq, dk, dp, dv = (None if x is None else torch.empty_like(x) for x in (q, k, p, v))
    derase, dwrite, dg = (None if x is None else torch.empty(x.shape, dtype=dtype, device=x.device) for x in (erase, write, g))
    end, decays = saved.shape[0], Decays(grid, g, heads, before_decay or exclusive, dtype, backward=True)
    for span in reversed(grid.spans()):
        qs, ks, ps, X, bs, ws, dos = grid.takes(span, dtype, q=q, k=k, p=p, X=X_all, erase=erase, write=write, do=do)
        keys = ps if ks is None else ks
        qs, es, dos = group(qs.mul_(scale), heads), gated(keys, bs)[:, :, None], group(dos, heads)
        decay = decays.at(span)
        begin = end - grid.counts[span[0]]
        S, end = saved[begin:end].clone(), begin
        L = decay.pair(es, ps, exclusive=before_decay, strict=True)
        A = decay.pair(qs, ps, exclusive=exclusive, strict=exclusive)
        inverse = unit_lower_inverse(L[:, :, 0]).transpose(-1, -2)
        q_tilde, e_tilde = decay.prefix(qs, exclusive), decay.prefix(es, before_decay)[:, :, 0].transpose(-1, -2)
        p_hat = decay.suffix(ps)
        starts = run_states(grid, span, S, decay, p_hat.transpose(-1, -2) @ X)
        dX, local = column_sums(A, dos), transposed_times(q_tilde, dos)
        dB, dZ = grid.buffer("dB", tuple(dX.shape), v, dtype), grid.buffer("dZ", tuple(starts.shape), v, dtype)
        for a, b, n in reversed(grid.waves(span)):
            dZ[a:b] = dS[:n]
            torch.matmul(inverse[a:b], add_product_(dX[a:b], p_hat[a:b], dS[:n]), out=dB[a:b])
            decay.carry_(dS[:n], slice(a, b))
            dS[:n] += add_product_(local[a:b], e_tilde[a:b], dB[a:b], -1)
        decay.carry_backward(starts, dZ)
        X_rows = X.transpose(-1, -2)
        dqs, dps = decay.pair_backward(rows_times(dos, X_rows), A, qs, ps, exclusive=exclusive, strict=exclusive)
        des, dps_erase = decay.pair_backward(minus_product(dB, X_rows)[:, :, None], L, es, ps, exclusive=before_decay, strict=True)
        starts = starts.transpose(-1, -2)
        dq_tilde = decay.prefix_backward(rows_times(dos, starts), qs, exclusive)
        de_tilde = decay.prefix_backward(minus_product(dB, starts)[:, :, None], es, before_decay)
        dps = dps.add_(dps_erase).add_(fold(decay.suffix_backward(X @ dZ.transpose(-1, -2), ps), ps.shape[1]))
        des = ungroup(des, es.shape[1]) + ungroup(de_tilde, es.shape[1])
        if bs is not None:
            des, dbs = gated_backward(des, keys, bs)
            grid.put(derase, dbs, span)
        if ks is None:
            dps += des
        else:
            grid.put(dk, des, span)
        if ws is None:
            grid.put(dv, fold(dB, v.shape[2]), span)
        else:
            dvs, dws = gated_backward(dB, grid.take("v", v, span, dtype), ws)
            grid.put(dv, dvs, span)
            grid.put(dwrite, dws, span)
        grid.put(dq, (ungroup(dqs, Hq) + ungroup(dq_tilde, Hq)).mul_(scale), span)
        grid.put(dp, dps, span)
        decays.put_gradient(dg, span, decay)
    return dq, dk, dp, dv, derase, dwrite, dg, grid.unsort(dS)
