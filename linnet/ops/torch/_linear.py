"""Chunkwise linear attention, forward and backward.

Per chunk with start state S, decayed operands q~ = prefix(q), k^ = suffix(k), total decay W and scores A = pair(q, k):
    o = q~ S + A v                     S' = W S + k^T v
    dA = do v^T, dv = A^T do + k^ dS', dq~ = do S^T, dk^ = v dS'^T, dS = W dS' + q~^T do
The forward stores the states at span starts; the backward recomputes everything else, one span at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops.torch._chunks import Chunks
from linnet.ops.torch._decay import Decay, NoDecay, add_product_, column_sums, expand, fold, rows_times, transposed_times


def group(x: Tensor, heads: int) -> Tensor:
    """Query-like operand [c, H', C, K] as [c, H, R, C, K]: R groups share a state head, or R = 1 and H' divides H."""
    return x.unflatten(1, (heads, -1)) if x.shape[1] > heads else x[:, :, None]


def ungroup(x: Tensor, heads: int) -> Tensor:
    """The transpose of `group` (and of expanding the heads): [c, H, R, C, K] -> [c, heads, C, K]."""
    return x.flatten(1, 2) if x.shape[1] * x.shape[2] == heads else fold(x, heads)[:, :, 0]


class Decays:
    """The decay of every span of a call. g None | [B, T, H', 1 or K].

    A scalar decay is small: its tree is built once for all chunks, and its gradient once at the end; a decay per channel is built
    span by span.
    """

    def __init__(self, grid: Chunks, g: Tensor | None, heads: int, exclusive: bool, dtype: torch.dtype, backward: bool = False):
        self.grid, self.g, self.heads, self.dtype, self.options = grid, g, heads, dtype, (exclusive, backward)
        self.whole = NoDecay(heads) if g is None else self._build((0, len(grid.counts))) if g.shape[3] == 1 else None

    def _build(self, span: tuple[int, int]) -> Decay:
        return Decay(self.grid.take("g", self.g, span, self.dtype), self.heads, *self.options)

    def at(self, span: tuple[int, int]) -> Decay | NoDecay:
        if isinstance(self.whole, Decay):
            return self.whole.at(slice(self.grid.first[span[0]], self.grid.first[span[1]]))
        return self.whole or self._build(span)

    def put_gradient(self, dg: Tensor | None, span: tuple[int, int], decay: Decay | NoDecay) -> None:
        """After the backward of a span, and of the first span last: write what is known of dg."""
        if self.whole is None:
            self.grid.put(dg, decay.gradient(), span)
        elif isinstance(self.whole, Decay) and span[0] == 0:
            self.grid.put(dg, self.whole.gradient(), (0, len(self.grid.counts)))


def initial(grid: Chunks, S0: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A working copy of the initial states in wave order."""
    return torch.zeros(shape, dtype=dtype, device=device) if S0 is None else grid.sort(S0).to(dtype, copy=True)


def keep(saved: Tensor, row: int, S: Tensor) -> int:
    """Write the states S of one span start into `saved` at `row`, where there is room; the row after them."""
    if saved.shape[0]:
        saved[row : row + S.shape[0]] = S
    return row + S.shape[0]


def run_states(grid: Chunks, span: tuple[int, int], S: Tensor, decay: Decay | NoDecay, Z: Tensor) -> Tensor:
    """Advance S (in place) over the waves of a span by S <- W S + Z; return the states at the chunk starts."""
    starts = grid.buffer("starts", tuple(Z.shape), Z, Z.dtype)
    for a, b, n in grid.waves(span):
        starts[a:b] = S[:n]
        decay.carry_(S[:n], slice(a, b))
        S[:n] += Z[a:b]
    return starts


def forward(q, k, v, g, S0, cu_seqlens, scale: float, exclusive: bool, heads: int, chunk: int, save: bool, dtype):
    """q [B,T,Hq,K], k [B,T,Hk,K], v [B,T,Hv,V], g None | [B,T,Hg,1 or K] -> o [B,T,H,V], final state, states at span starts."""
    B, T, Hq, K = q.shape
    V = v.shape[3]
    grid = Chunks(cu_seqlens, B, T, chunk, heads)
    S = initial(grid, S0, (grid.rows, heads, K, V), dtype, q.device)
    o = torch.empty(B, T, max(Hq, heads), V, dtype=v.dtype, device=v.device)
    saved, row, decays = grid.span_states(save, (heads, K, V), q, dtype), 0, Decays(grid, g, heads, exclusive, dtype)
    for span in grid.spans():
        row = keep(saved, row, S[: grid.counts[span[0]]])
        qs, ks, vs = grid.takes(span, dtype, q=q, k=k, v=v)
        qs, vs, decay = group(qs.mul_(scale), heads), expand(vs, heads), decays.at(span)
        A = decay.pair(qs, ks, exclusive=exclusive, strict=exclusive)
        starts = run_states(grid, span, S, decay, decay.suffix(ks).transpose(-1, -2) @ vs)
        out = add_product_(A.flatten(2, 3) @ vs, decay.prefix(qs, exclusive).flatten(2, 3), starts)
        grid.put(o, out.unflatten(2, (-1, grid.C)).flatten(1, 2), span)
    return o, grid.unsort(S), saved


def backward(do, dS, saved, q, k, v, g, cu_seqlens, scale: float, exclusive: bool, heads: int, chunk: int, dtype):
    """Gradients of q, k, v, g (None without decay) and of the initial state."""
    B, T, Hq, K = q.shape
    grid = Chunks(cu_seqlens, B, T, chunk, heads)
    dS = initial(grid, dS, (grid.rows, heads, K, v.shape[3]), dtype, q.device)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dg = None if g is None else torch.empty(g.shape, dtype=dtype, device=g.device)
    end, decays = saved.shape[0], Decays(grid, g, heads, exclusive, dtype, backward=True)
    for span in reversed(grid.spans()):
        qs, ks, vs, dos = grid.takes(span, dtype, q=q, k=k, v=v, do=do)
        qs, vs, dos = group(qs.mul_(scale), heads), expand(vs, heads), group(dos, heads)
        decay = decays.at(span)
        begin = end - grid.counts[span[0]]
        S, end = saved[begin:end].clone(), begin
        k_hat, q_tilde = decay.suffix(ks), decay.prefix(qs, exclusive)
        starts = run_states(grid, span, S, decay, k_hat.transpose(-1, -2) @ vs)
        dZ, local = grid.buffer("dZ", tuple(starts.shape), v, dtype), transposed_times(q_tilde, dos)
        for a, b, n in reversed(grid.waves(span)):
            dZ[a:b] = dS[:n]
            decay.carry_(dS[:n], slice(a, b))
            dS[:n] += local[a:b]
        decay.carry_backward(starts, dZ)
        A = decay.pair(qs, ks, exclusive=exclusive, strict=exclusive)
        dvs = add_product_(column_sums(A, dos), k_hat, dZ)
        dA = rows_times(dos, vs.transpose(-1, -2))
        dqs, dks = decay.pair_backward(dA, A, qs, ks, exclusive=exclusive, strict=exclusive)
        dq_tilde = decay.prefix_backward(rows_times(dos, starts.transpose(-1, -2)), qs, exclusive)
        dk_hat = decay.suffix_backward(vs @ dZ.transpose(-1, -2), ks)
        grid.put(dq, (ungroup(dqs, Hq) + ungroup(dq_tilde, Hq)).mul_(scale), span)
        grid.put(dk, dks + fold(dk_hat, ks.shape[1]), span)
        grid.put(dv, fold(dvs, v.shape[2]), span)
        decays.put_gradient(dg, span, decay)
    return dq, dk, dv, dg, grid.unsort(dS)
