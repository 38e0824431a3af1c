"""Chunkwise delta rule, forward and backward.

Per chunk with start state S, decayed operands q~, e~ (prefix) and p^ (suffix), total decay W, A = pair(q, p), L = pair(e, p):
    (I + L) X = u - e~ S               the new values x_t = u_t - r_t
    o = q~ S + A X                     S' = W S + p^T X
    dX = A^T do + p^ dS', dB = (I + L)^{-T} dX
    du = dB, de~ = -dB S^T, dL = -stril(dB X^T), dA = tril(do X^T), dq~ = do S^T, dp^ = X dS'^T, dS = W dS' + q~^T do - e~^T dB
The forward stores X and the states at span starts; the backward recomputes everything else, one span at a time.
"""

from __future__ import annotations

import torch

from linnet.ops.torch._chunks import Chunks
from linnet.ops.torch._decay import column_sums, expand, fold, rows_times, transposed_times
from linnet.ops.torch._inverse import unit_lower_inverse
from linnet.ops.torch._linear import group, initial, make_decay, run_states, ungroup


def forward(q, e, p, u, g, S0, cu_seqlens, scale: float, before_decay: bool, exclusive: bool, heads: int, chunk: int, dtype):
    """q [B,T,Hq,K], e, p [B,T,*,K], u [B,T,*,V], g None | [B,T,*,1 or K].

    before_decay: e reads before the decay; exclusive: q reads before the step.
    Returns o [B,T,H,V], final state, X [B,T,heads,V], states at span starts.
    """
    B, T, Hq, K = q.shape
    V = u.shape[3]
    grid = Chunks(cu_seqlens, B, T, chunk, heads)
    S = initial(grid, S0, (grid.rows, heads, K, V), dtype, q.device)
    o = torch.empty(B, T, max(Hq, heads), V, dtype=u.dtype, device=u.device)
    X_all = torch.empty(B, T, heads, V, dtype=dtype, device=u.device)
    saved = []
    for span in grid.spans():
        saved.append(S[: grid.counts[span[0]]].clone())
        qs, es, ps, us, gs = (grid.take(x, span, dtype) for x in (q, e, p, u, g))
        qs, es, us = group(qs.mul_(scale), heads), es[:, :, None], expand(us, heads)
        decay = make_decay(gs, heads, before_decay or exclusive)
        inverse = unit_lower_inverse(decay.pair(es, ps, exclusive=before_decay, strict=True)[:, :, 0])
        e_tilde, p_hat = decay.prefix(es, before_decay)[:, :, 0], decay.suffix(ps).transpose(-1, -2)
        starts = torch.empty(us.shape[0], heads, K, V, dtype=dtype, device=u.device)
        X = torch.empty_like(us)
        for a, b, n in grid.waves(span):
            starts[a:b] = S[:n]
            torch.matmul(inverse[a:b], us[a:b] - e_tilde[a:b] @ S[:n], out=X[a:b])
            decay.carry_(S[:n], slice(a, b))
            S[:n] += p_hat[a:b] @ X[a:b]
        out = rows_times(decay.pair(qs, ps, exclusive=exclusive, strict=exclusive), X)
        out += rows_times(decay.prefix(qs, exclusive), starts)
        grid.put(o, out.flatten(1, 2), span)
        grid.put(X_all, X, span)
    return o, grid.unsort(S), X_all, torch.cat(saved) if saved else S.new_empty(0, heads, K, V)


def backward(do, dS, X_all, saved, q, e, p, u, g, cu_seqlens, scale, before_decay, exclusive, heads: int, chunk: int, dtype):
    """Gradients of q, e, p, u, g (None without decay) and of the initial state."""
    B, T, Hq, K = q.shape
    grid = Chunks(cu_seqlens, B, T, chunk, heads)
    dS = initial(grid, dS, (grid.rows, heads, K, u.shape[3]), dtype, q.device)
    dq, de, dp, du = (torch.empty_like(x) for x in (q, e, p, u))
    dg = None if g is None else torch.empty(g.shape, dtype=dtype, device=g.device)
    end = saved.shape[0]
    for span in reversed(grid.spans()):
        qs, es, ps, X, gs, dos = (grid.take(x, span, dtype) for x in (q, e, p, X_all, g, do))
        qs, es, dos = group(qs.mul_(scale), heads), es[:, :, None], group(dos, heads)
        decay = make_decay(gs, heads, before_decay or exclusive)
        begin = end - grid.counts[span[0]]
        S, end = saved[begin:end].clone(), begin
        L = decay.pair(es, ps, exclusive=before_decay, strict=True)
        A = decay.pair(qs, ps, exclusive=exclusive, strict=exclusive)
        inverse = unit_lower_inverse(L[:, :, 0]).transpose(-1, -2)
        q_tilde, e_tilde = decay.prefix(qs, exclusive), decay.prefix(es, before_decay)[:, :, 0].transpose(-1, -2)
        p_hat = decay.suffix(ps)
        starts = run_states(grid, span, S, decay, p_hat.transpose(-1, -2) @ X, dtype)
        dX, local = column_sums(A, dos), transposed_times(q_tilde, dos)
        dB, dZ = torch.empty_like(dX), torch.empty_like(starts)
        for a, b, n in reversed(grid.waves(span)):
            dZ[a:b] = dS[:n]
            torch.matmul(inverse[a:b], dX[a:b] + p_hat[a:b] @ dS[:n], out=dB[a:b])
            decay.carry_(dS[:n], slice(a, b))
            dS[:n] += local[a:b]
            dS[:n] -= e_tilde[a:b] @ dB[a:b]
        decay.carry_backward(starts, dZ)
        X_rows = X.transpose(-1, -2)
        dqs, dps = decay.pair_backward(rows_times(dos, X_rows), A, qs, ps, exclusive=exclusive, strict=exclusive)
        des, dps_erase = decay.pair_backward((dB @ X_rows).neg_()[:, :, None], L, es, ps, exclusive=before_decay, strict=True)
        starts = starts.transpose(-1, -2)
        dq_tilde = decay.prefix_backward(rows_times(dos, starts), qs, exclusive)
        de_tilde = decay.prefix_backward((dB @ starts).neg_()[:, :, None], es, before_decay)
        dp_hat = decay.suffix_backward(X @ dZ.transpose(-1, -2), ps)
        grid.put(dq, (ungroup(dqs, Hq) + ungroup(dq_tilde, Hq)).mul_(scale), span)
        grid.put(de, ungroup(des, e.shape[2]) + ungroup(de_tilde, e.shape[2]), span)
        grid.put(dp, dps + dps_erase + fold(dp_hat, ps.shape[1]), span)
        grid.put(du, fold(dB, u.shape[2]), span)
        if g is not None:
            grid.put(dg, decay.gradient(), span)
    return dq, de, dp, du, dg, grid.unsort(dS)
