"""Chunkwise DPLR (diagonal plus low rank), forward and backward: S' = Diag(e^g) S - w r^T + p u^T, r = e^T S undecayed.

Per chunk with start state S, decayed operands q~ (inclusive prefix), e~ (exclusive prefix), p^, w^ (suffix), total decay W,
A = pair(q, p), A_w = pair(q, w), L = pair(e, w), B = pair(e, p):
    (I + L) R = e~ S + B u             the reads
    o = q~ S + A u - A_w R             S' = W S + p^T u - w^T R
    dR = -A_w^T do - w^ dS', dB = (I + L)^{-T} dR
    du = A^T do + p^ dS' + B^T dB, de~ = dB S^T, dL = -stril(dB R^T), d(B) = stril(dB u^T), dA = tril(do u^T),
    dA_w = -tril(do R^T), dp^ = u dS'^T, dw^ = -R dS'^T, dS = W dS' + q~^T do + e~^T dB
The forward stores R and the states at span starts; the backward recomputes everything else, one span at a time.
"""

from __future__ import annotations

import torch

from linnet.ops.torch._chunks import Chunks
from linnet.ops.torch._decay import add_product_, column_sums, expand, fold, minus_product, rows_times, transposed_times
from linnet.ops.torch._inverse import unit_lower_inverse
from linnet.ops.torch._linear import Decays, group, initial, keep, run_states, ungroup

READ = {"exclusive": False, "strict": False}  # the query reads after the step
ERASE = {"exclusive": True, "strict": True}  # the erased read comes before decay and write


def forward(q, e, w, p, u, g, S0, cu_seqlens, scale: float, heads: int, chunk: int, save: bool, dtype):
    """q [B,T,Hq,K], e, w, p [B,T,*,K], u [B,T,*,V], g None | [B,T,*,1 or K] -> o, final state, R [B,T,heads,V], span starts.

    R and the states at span starts are for the backward, empty unless `save`.
    """
    B, T, Hq, K = q.shape
    V = u.shape[3]
    grid = Chunks(cu_seqlens, B, T, chunk, heads)
    S = initial(grid, S0, (grid.rows, heads, K, V), dtype, q.device)
    o = torch.empty(B, T, max(Hq, heads), V, dtype=u.dtype, device=u.device)
    R_all = torch.empty(B if save else 0, T, heads, V, dtype=dtype, device=u.device)
    saved, row, decays = grid.span_states(save, (heads, K, V), q, dtype), 0, Decays(grid, g, heads, True, dtype)
    for span in grid.spans():
        row = keep(saved, row, S[: grid.counts[span[0]]])
        qs, es, ws, ps, us = grid.takes(span, dtype, q=q, e=e, w=w, p=p, u=u)
        qs, es, us = group(qs.mul_(scale), heads), es[:, :, None], expand(us, heads)
        decay = decays.at(span)
        inverse = unit_lower_inverse(decay.pair(es, ws, **ERASE)[:, :, 0])
        reads = decay.pair(es, ps, **ERASE)[:, :, 0] @ us
        e_tilde, w_hat = decay.prefix(es, True)[:, :, 0], decay.suffix(ws).transpose(-1, -2)
        writes = decay.suffix(ps).transpose(-1, -2) @ us
        starts, R = grid.buffer("starts", tuple(writes.shape), u, dtype), grid.buffer("R", tuple(us.shape), u, dtype)
        for a, b, n in grid.waves(span):
            starts[a:b] = S[:n]
            torch.matmul(inverse[a:b], add_product_(reads[a:b], e_tilde[a:b], S[:n]), out=R[a:b])
            decay.carry_(S[:n], slice(a, b))
            S[:n] += add_product_(writes[a:b], w_hat[a:b], R[a:b], -1)
        out = decay.pair(qs, ps, **READ).flatten(2, 3) @ us
        add_product_(out, decay.pair(qs, ws, **READ).flatten(2, 3), R, -1)
        add_product_(out, decay.prefix(qs, False).flatten(2, 3), starts)
        grid.put(o, out.unflatten(2, (-1, grid.C)).flatten(1, 2), span)
        if save:
            grid.put(R_all, R, span)
    return o, grid.unsort(S), R_all, saved


def backward(do, dS, R_all, saved, q, e, w, p, u, g, cu_seqlens, scale: float, heads: int, chunk: int, dtype):
    """Gradients of q, e, w, p, u, g (None without decay) and of the initial state."""
    B, T, Hq, K = q.shape
    grid = Chunks(cu_seqlens, B, T, chunk, heads)
    dS = initial(grid, dS, (grid.rows, heads, K, u.shape[3]), dtype, q.device)
    dq, de, dw, dp, du = (torch.empty_like(x) for x in (q, e, w, p, u))
    dg = None if g is None else torch.empty(g.shape, dtype=dtype, device=g.device)
    end, decays = saved.shape[0], Decays(grid, g, heads, True, dtype, backward=True)
    for span in reversed(grid.spans()):
        qs, es, ws, ps, us, R, dos = grid.takes(span, dtype, q=q, e=e, w=w, p=p, u=u, R=R_all, do=do)
        qs, es, us, dos = group(qs.mul_(scale), heads), es[:, :, None], expand(us, heads), group(dos, heads)
        decay = decays.at(span)
        begin = end - grid.counts[span[0]]
        S, end = saved[begin:end].clone(), begin
        A, A_w = decay.pair(qs, ps, **READ), decay.pair(qs, ws, **READ)
        L, M = decay.pair(es, ws, **ERASE), decay.pair(es, ps, **ERASE)
        inverse = unit_lower_inverse(L[:, :, 0]).transpose(-1, -2)
        q_tilde, e_tilde = decay.prefix(qs, False), decay.prefix(es, True)[:, :, 0].transpose(-1, -2)
        p_hat, w_hat = decay.suffix(ps), decay.suffix(ws)
        starts = run_states(grid, span, S, decay, p_hat.transpose(-1, -2) @ us - w_hat.transpose(-1, -2) @ R)
        dR, local = column_sums(A_w, dos).neg_(), transposed_times(q_tilde, dos)
        dB, dZ = grid.buffer("dB", tuple(dR.shape), u, dtype), grid.buffer("dZ", tuple(starts.shape), u, dtype)
        for a, b, n in reversed(grid.waves(span)):
            dZ[a:b] = dS[:n]
            torch.matmul(inverse[a:b], add_product_(dR[a:b], w_hat[a:b], dS[:n], -1), out=dB[a:b])
            decay.carry_(dS[:n], slice(a, b))
            dS[:n] += add_product_(local[a:b], e_tilde[a:b], dB[a:b])
        decay.carry_backward(starts, dZ)
        dus = column_sums(A, dos)
        add_product_(dus, p_hat, dZ)
        add_product_(dus, M[:, :, 0].transpose(-1, -2), dB)
        u_rows, R_rows = us.transpose(-1, -2), R.transpose(-1, -2)
        dq1, dp1 = decay.pair_backward(rows_times(dos, u_rows), A, qs, ps, **READ)
        dq2, dw1 = decay.pair_backward(rows_times(dos, R_rows).neg_(), A_w, qs, ws, **READ)
        de1, dw2 = decay.pair_backward(minus_product(dB, R_rows)[:, :, None], L, es, ws, **ERASE)
        de2, dp2 = decay.pair_backward((dB @ u_rows)[:, :, None], M, es, ps, **ERASE)
        starts, dZ_rows = starts.transpose(-1, -2), dZ.transpose(-1, -2)
        dq3 = decay.prefix_backward(rows_times(dos, starts), qs, False)
        de3 = decay.prefix_backward((dB @ starts)[:, :, None], es, True)
        dp3 = decay.suffix_backward(us @ dZ_rows, ps)
        dw3 = decay.suffix_backward(minus_product(R, dZ_rows), ws)
        grid.put(dq, (ungroup(dq1 + dq2, Hq) + ungroup(dq3, Hq)).mul_(scale), span)
        grid.put(de, ungroup(de1 + de2, e.shape[2]) + ungroup(de3, e.shape[2]), span)
        grid.put(dw, dw1 + dw2 + fold(dw3, w.shape[2]), span)
        grid.put(dp, dp1 + dp2 + fold(dp3, p.shape[2]), span)
        grid.put(du, fold(dus, u.shape[2]), span)
        decays.put_gradient(dg, span, decay)
    return dq, de, dw, dp, du, dg, grid.unsort(dS)
