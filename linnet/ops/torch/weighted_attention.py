"""Torch backend of the attention operators with other weights, in blocks of queries.

A block holds about BLOCK_ELEMENTS numbers of its largest tensor; where gradients are wanted and there are several blocks, each is
computed again in the backward pass, so that training memory stays linear in T too. Dense rows (relative, softplus) see all slots up
to the block's end; selected keys (cells, spans) are gathered. Sums in at least fp32. Causal bit for bit on the CPU: a key that is
masked adds an exact zero, and what is selected depends on the past alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, segments
from linnet.ops.torch.attention import _append, _even, _padded
from linnet.ops.weighted_attention import cell_bounds, reach, stripe_distance, stripe_distances

BLOCK_ELEMENTS = 2**22


def _batch(block, per_query, queries, stores, state):
    """Rows of a batch. block(position [N or 1, Q], even, *queries [N, Q, ...], *stores [N, S, Hk, ...]) -> o [N, Q, H, V]; slot s
    is position s of its row, and with `even` the last query is the last slot. per_query(S): numbers that one query needs.
    """
    (batch, tokens), dtype, device = queries[0].shape[:2], accumulate_dtype(queries[0]), queries[0].device
    length, past, even = torch.zeros(batch, dtype=torch.int64, device=device), 0, True
    if state is not None:
        *caches, length = state
        past = caches[0].shape[1]
        even = _even(length, past)
        join = (lambda old, new: torch.cat([old.to(new.dtype), new], 1)) if even else lambda o, n: _append(o, n, length)
        stores = [join(old, new) for old, new in zip(caches, stores, strict=True)]
    full = [x.to(dtype) for x in stores]
    size = max(1, min(tokens, BLOCK_ELEMENTS // max(1, batch * per_query(past + tokens))))
    parts = []
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        position = (past if even else length[:, None]) + torch.arange(start, end, device=device)
        seen = [x[:, : past + end] for x in full] if even else full
        operands = (position if position.ndim == 2 else position[None], even, *(x[:, start:end].to(dtype) for x in queries), *seen)
        again = size < tokens and torch.is_grad_enabled() and any(x.requires_grad for x in operands[2:])
        parts.append(checkpoint(block, *operands, use_reentrant=False, preserve_rng_state=False) if again else block(*operands))
    return torch.cat(parts, 1).to(stores[1].dtype), (*stores, length + tokens)


def _rows(block, per_query, queries, stores, initial_state, return_state, cu_seqlens):
    """The batch, or one packed segment after another."""
    if cu_seqlens is None:
        o, state = _batch(block, per_query, queries, stores, initial_state)
        return o, state if return_state else None
    outputs, states = [], []
    for row, (_, start, end) in enumerate(segments(cu_seqlens, 1, stores[0].shape[1])):
        own = None
        if initial_state is not None:
            used = int(initial_state[-1][row])
            own = (*(x[row : row + 1, :used] for x in initial_state[:-1]), initial_state[-1][row : row + 1])
        new = [x[:, start:end] for x in stores]
        if start == end:
            states.append(own or (*new, torch.zeros(1, dtype=torch.int64, device=stores[0].device)))
            continue
        o, own = _batch(block, per_query, [x[:, start:end] for x in queries], new, own)
        outputs.append(o)
        states.append(own)
    if not return_state:
        return torch.cat(outputs, 1), None
    *kept, lengths = zip(*states, strict=True)
    return torch.cat(outputs, 1), (*map(_padded, kept), torch.cat(lengths))


def _by_key_head(x_NQHE: Tensor, key_heads: int) -> Tensor:
    """[N, Q, H, E] -> [N, Q, Hk, G, E]."""
    return x_NQHE.unflatten(2, (key_heads, x_NQHE.shape[2] // key_heads))


def _scores(q_NQHK: Tensor, k_NSHK: Tensor) -> Tensor:
    """q.k [N, H, Q, S]."""
    return torch.einsum("nqhgk,nshk->nhgqs", _by_key_head(q_NQHK, k_NSHK.shape[2]), k_NSHK).flatten(1, 2)


def _read(w_NHQS: Tensor, v_NSHV: Tensor) -> Tensor:
    """sum_s w v [N, Q, H, V]."""
    w = w_NHQS.unflatten(1, (v_NSHV.shape[2], -1))
    return torch.einsum("nhgqs,nshv->nqhgv", w, v_NSHV).flatten(2, 3)


def _visible(position: Tensor, slots: int) -> Tensor:
    """[N or 1, 1, Q, S]."""
    return (torch.arange(slots, device=position.device) <= position.unsqueeze(-1)).unsqueeze(1)


def skew(x_HQS: Tensor) -> Tensor:
    """[..., Q, S] by distance, the furthest (S - 1) first -> [..., Q, S] by slot, where row i is position S - Q + i.

    One column of padding and a change of strides move row i to the left by Q - 1 - i; entries of the future are left undefined.
    """
    Q, S = x_HQS.shape[-2:]
    return F.pad(x_HQS, (1, 0)).flatten(-2)[..., Q:].unflatten(-1, (Q, S))


@implements("relative_attention", "torch")
def relative_attention(
    q_BTHK, k_BTHK, v_BTHV, distance_RHK, beyond, scale, initial_state, return_state, cu_seqlens
):  # fmt: skip
    heads, furthest = q_BTHK.shape[2], distance_RHK.shape[0] - 1
    e_RHK = distance_RHK.to(accumulate_dtype(q_BTHK)).expand(-1, heads, -1)
    if beyond == "zero":
        e_RHK, furthest = F.pad(e_RHK, (0, 0, 0, 0, 0, 1)), furthest + 1

    def block(position, even, q, k, v):
        slots = k.shape[1]
        if even:
            order = torch.arange(slots - 1, -1, -1, device=q.device).clamp_max(furthest)
            by_slot = skew(torch.einsum("nqhk,shk->nhqs", q, e_RHK[order]))
        else:
            distance = position.unsqueeze(-1) - torch.arange(slots, device=q.device)
            by_distance = torch.einsum("nqhk,rhk->nhqr", q, e_RHK)
            by_slot = by_distance.gather(3, distance.clamp(0, furthest).unsqueeze(1).expand(-1, heads, -1, -1))
        logits = scale * (_scores(q, k) + by_slot)
        return _read(logits.masked_fill(~_visible(position, slots), -torch.inf).softmax(-1), v)

    return _rows(block, lambda slots: heads * slots, (q_BTHK,), (k_BTHK, v_BTHV), initial_state, return_state, cu_seqlens)


@implements("softplus_attention", "torch")
def softplus_attention(
    q_BTHK, k_BTHK, v_BTHV, power, offset, scale, initial_state, return_state, cu_seqlens
):  # fmt: skip
    def block(position, even, q, k, v):
        n, visible = (position + 1).to(q.dtype)[:, None, :, None], _visible(position, k.shape[1])
        w = F.softplus(scale * n.log() * _scores(q, k)) * visible
        w = w / w.sum(-1, keepdim=True)
        if power is not None:
            r = (n * w - torch.where(n >= 3, offset, 0.0)).clamp_min(0) * visible
            top = r.detach().amax(-1, keepdim=True)  # any constant per row: it cancels
            flat = top <= 1e-6
            r = (r / top.masked_fill(flat, 1)) ** power
            w = torch.where(flat, w, r / r.sum(-1, keepdim=True).masked_fill(flat, 1))
        return _read(w, v)

    per_query = lambda slots: q_BTHK.shape[2] * slots  # noqa: E731
    return _rows(block, per_query, (q_BTHK,), (k_BTHK, v_BTHV), initial_state, return_state, cu_seqlens)


def _at(x_NSHE: Tensor, index: Tensor, heads: int) -> Tensor:
    """Slots `index` [N, Q, H, ...] of the key head of each query head: [N, Q, H, ..., E]."""
    tail = (1,) * (index.ndim - 3)
    row = torch.arange(x_NSHE.shape[0], device=index.device).view(-1, 1, 1, *tail)
    head = (torch.arange(heads, device=index.device) // (heads // x_NSHE.shape[2])).view(1, 1, -1, *tail)
    return x_NSHE[row, index, head]


@implements("cell_attention", "torch")
def cell_attention(
    q_BTHK, k_BTHK, v_BTHV, estimate_BTHC, top_keys, prior, scale, initial_state, return_state, cu_seqlens
):  # fmt: skip
    heads, cells = estimate_BTHC.shape[2:]

    def block(position, even, q, estimate, k, v):
        slots, n = k.shape[1], position[:, :, None] + 1
        fewest = slots - q.shape[1] + 1 if even else 1  # the smallest n of the block
        count = min(cells, -(-top_keys * min(cells, fewest) // fewest)) if fewest > cells else min(cells, top_keys)
        cell, width = torch.arange(cells, device=q.device), torch.arange(-(-slots // cells), device=q.device)
        first, end = cell_bounds(cell, n, cells)
        log_p = estimate.masked_fill((end <= first).unsqueeze(2), -torch.inf).log_softmax(-1)
        best = log_p.topk(count, -1).indices
        rank = torch.arange(count, device=q.device)
        log_best = log_p.gather(-1, best)
        good = (rank * n < top_keys * n.clamp_max(cells)).unsqueeze(2) & (log_best > -torch.inf)  # rank < ceil(top min(C, n) / n)
        first, end = cell_bounds(best, n.unsqueeze(2), cells)
        index = first.unsqueeze(-1) + width
        good = (good.unsqueeze(-1) & (index < end.unsqueeze(-1))).flatten(3)
        index = index.clamp(max=slots - 1).flatten(3)
        logits = scale * torch.einsum("nqhk,nqhsk->nqhs", q, _at(k, index, heads))
        if prior:
            logits = logits + log_best.masked_fill(log_best == -torch.inf, 0).repeat_interleave(width.numel(), -1)
        w = logits.masked_fill(~good, -torch.inf).softmax(-1)
        return torch.einsum("nqhs,nqhsv->nqhv", w, _at(v, index, heads))

    channels = max(q_BTHK.shape[3], v_BTHV.shape[3])
    per_query = lambda slots: heads * channels * (top_keys + -(-slots // cells))  # noqa: E731
    return _rows(block, per_query, (q_BTHK, estimate_BTHC), (k_BTHK, v_BTHV), initial_state, return_state, cu_seqlens)


@implements("span_attention", "torch")
def span_attention(
    q_BTHK, k_BTHK, v_BTHV, search_q_BTHA, search_k_BTHA, spans, window_stripes, backward, forward, search_power, span_power,
    scale, search_scale, initial_state, return_state, cu_seqlens,
):  # fmt: skip
    heads, key_heads, window = q_BTHK.shape[2], k_BTHK.shape[2], stripe_distance(window_stripes + 1, search_power) - 1

    def block(position, even, q, search_q, k, v, search_k):
        slots, n = k.shape[1], position + 1
        row = torch.arange(k.shape[0], device=q.device)[:, None, None]
        near = position.unsqueeze(-1) - torch.arange(min(window, slots), device=q.device)  # [N, Q, W]
        k_near, v_near = (x[row, near.clamp_min(0)] for x in (k, v))
        q_heads = _by_key_head(q, key_heads)
        logits = scale * torch.einsum("nqhgk,nqwhk->nqhgw", q_heads, k_near).flatten(2, 3)
        logits = logits.masked_fill((near < 0).unsqueeze(2), -torch.inf)
        distances = stripe_distances(slots, window_stripes + 1, search_power)
        if not distances:
            w = _by_key_head(logits.softmax(-1), key_heads)
            return torch.einsum("nqhgw,nqwhv->nqhgv", w, v_near).flatten(2, 3)
        anchor = n.unsqueeze(-1) - torch.tensor(distances, device=q.device)  # [N, Q, J]
        found = torch.einsum("nqhgk,nqjhk->nqhgj", _by_key_head(search_q, key_heads), search_k[row, anchor.clamp_min(0)])
        found = (search_scale * found.flatten(2, 3)).masked_fill((anchor < 0).unsqueeze(2), -torch.inf)
        best, chosen = found.topk(min(spans, len(distances)), -1)  # [N, Q, H, M]
        valid = best > -torch.inf
        gate = torch.where(valid.any(-1, keepdim=True), best, 0.0).softmax(-1)
        anchor = anchor.unsqueeze(2).expand(*chosen.shape[:3], -1).gather(-1, chosen)
        start_of_window = (n - window).clamp_min(0)[:, :, None, None]
        back, ahead = (reach(n, factor, span_power)[:, :, None, None] for factor in (backward, forward))
        low, high = (anchor - back).clamp_min(0), torch.minimum(anchor + ahead, start_of_window - 1)
        longest = 1 + reach(slots, backward, span_power) + reach(slots, forward, span_power)
        index = low.unsqueeze(-1) + torch.arange(longest, device=q.device)  # [N, Q, H, M, L]
        far = scale * torch.einsum("nqhk,nqhmlk->nqhml", q, _at(k, index.clamp(max=slots - 1), heads))
        far = far.masked_fill(~(valid.unsqueeze(-1) & (index <= high.unsqueeze(-1))), -torch.inf)
        w = torch.cat((far, logits.unsqueeze(3).expand(-1, -1, -1, far.shape[3], -1)), -1).softmax(-1) * gate.unsqueeze(-1)
        w_far, w_near = w.split((longest, logits.shape[-1]), -1)
        o = torch.einsum("nqhml,nqhmlv->nqhv", w_far, _at(v, index.clamp(max=slots - 1), heads))
        return o + torch.einsum("nqhgw,nqwhv->nqhgv", _by_key_head(w_near.sum(3), key_heads), v_near).flatten(2, 3)

    channels = max(q_BTHK.shape[3], v_BTHV.shape[3])

    def per_query(slots):
        length = 1 + reach(slots, backward, span_power) + reach(slots, forward, span_power)
        stripes = len(stripe_distances(slots, window_stripes + 1, search_power))
        return heads * spans * length * channels + key_heads * (stripes * search_k_BTHA.shape[3] + window * channels)

    stores = (k_BTHK, v_BTHV, search_k_BTHA)
    return _rows(block, per_query, (q_BTHK, search_q_BTHA), stores, initial_state, return_state, cu_seqlens)
