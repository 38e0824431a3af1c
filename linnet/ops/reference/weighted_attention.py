"""Reference of the attention operators with other weights: one row, one token and one head at a time, from the formulas."""

from __future__ import annotations

import math

import torch

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, segments
from linnet.ops.weighted_attention import reach, stripe_distance, stripe_distances


def _rows(weigh, queries, stores, initial_state, return_state, cu_seqlens):
    """`weigh(t, h, *queries of t and h, *stores [n, channels] of its key head)` -> o [V], over rows, tokens and heads."""
    batch, tokens, heads, _ = queries[0].shape
    dtype, outputs, kept = accumulate_dtype(queries[0]), [], []
    for row, (b, start, end) in enumerate(segments(cu_seqlens, batch, tokens)):
        seen, past = [x[b, start:end] for x in stores], 0
        if initial_state is not None:
            past = int(initial_state[-1][row])
            seen = [torch.cat([old[row, :past].to(x.dtype), x]) for old, x in zip(initial_state, seen, strict=False)]
        kept.append(seen)
        for i in range(end - start):
            n = past + i + 1
            for h in range(heads):
                keys = [x[:n, h * x.shape[1] // heads].to(dtype) for x in seen]
                outputs.append(weigh(n, h, *(x[b, start + i, h].to(dtype) for x in queries), *keys))
    o = torch.stack(outputs).view(batch, tokens, heads, -1).to(stores[1].dtype)
    if not return_state:
        return o, None
    padded = [torch.nn.utils.rnn.pad_sequence([row[i] for row in kept], batch_first=True) for i in range(len(stores))]
    return o, (*padded, torch.tensor([row[0].shape[0] for row in kept], dtype=torch.int64, device=o.device))


@implements("relative_attention", "reference")
def relative_attention(
    q_BTHK, k_BTHK, v_BTHV, distance_RHK, beyond, scale, initial_state, return_state, cu_seqlens
):  # fmt: skip
    furthest = distance_RHK.shape[0] - 1

    def weigh(n, h, q, k, v):
        logits = []
        for s in range(n):
            distance = n - 1 - s
            e = distance_RHK[min(distance, furthest), h if distance_RHK.shape[1] > 1 else 0].to(q.dtype)
            logits.append(q @ k[s] + (0 if beyond == "zero" and distance > furthest else q @ e))
        return (scale * torch.stack(logits)).softmax(0) @ v

    return _rows(weigh, (q_BTHK,), (k_BTHK, v_BTHV), initial_state, return_state, cu_seqlens)


@implements("softplus_attention", "reference")
def softplus_attention(
    q_BTHK, k_BTHK, v_BTHV, power, offset, scale, initial_state, return_state, cu_seqlens
):  # fmt: skip
    def weigh(n, h, q, k, v):
        w = torch.nn.functional.softplus(scale * math.log(n) * (k @ q))
        w = w / w.sum()
        if power is not None:
            r = (n * w - (offset if n >= 3 else 0.0)).clamp_min(0)
            if float(r.detach().max()) > 1e-6:
                r = (r / r.detach().max()) ** power
                w = r / r.sum()
        return w @ v

    return _rows(weigh, (q_BTHK,), (k_BTHK, v_BTHV), initial_state, return_state, cu_seqlens)


@implements("cell_attention", "reference")
def cell_attention(
    q_BTHK, k_BTHK, v_BTHV, estimate_BTHC, top_keys, prior, scale, initial_state, return_state, cu_seqlens
):  # fmt: skip
    cells = estimate_BTHC.shape[3]

    def weigh(n, h, q, estimate, k, v):
        cell = torch.arange(n, device=q.device) * cells // n
        log_p = torch.full_like(estimate, -torch.inf)
        used = cell.unique()
        log_p[used] = estimate[used].log_softmax(0)
        best = log_p.topk(-(-top_keys * min(cells, n) // n) if top_keys < n else used.numel()).indices
        chosen = torch.isin(cell, best)
        logits = scale * (k @ q) + (log_p[cell] if prior else 0)
        return logits.masked_fill(~chosen, -torch.inf).softmax(0) @ v

    return _rows(weigh, (q_BTHK, estimate_BTHC), (k_BTHK, v_BTHV), initial_state, return_state, cu_seqlens)


@implements("span_attention", "reference")
def span_attention(
    q_BTHK, k_BTHK, v_BTHV, search_q_BTHA, search_k_BTHA, spans, window_stripes, backward, forward, search_power, span_power,
    scale, search_scale, initial_state, return_state, cu_seqlens,
):  # fmt: skip
    def weigh(n, h, q, search_q, k, v, search_k):
        window = max(0, n - stripe_distance(window_stripes + 1, search_power) + 1)
        anchors = [n - d for d in stripe_distances(n, window_stripes + 1, search_power)]
        if not anchors:
            return (scale * (k[window:] @ q)).softmax(0) @ v[window:]
        gates, chosen = (search_scale * (search_k[anchors] @ search_q)).topk(min(spans, len(anchors)))
        outputs = []
        for a in (anchors[i] for i in chosen.tolist()):
            low, high = max(0, a - reach(n, backward, span_power)), min(a + reach(n, forward, span_power), window - 1)
            keys = [*range(low, high + 1), *range(window, n)]
            outputs.append((scale * (k[keys] @ q)).softmax(0) @ v[keys])
        return gates.softmax(0) @ torch.stack(outputs)

    stores = (k_BTHK, v_BTHV, search_k_BTHA)
    return _rows(weigh, (q_BTHK, search_q_BTHA), stores, initial_state, return_state, cu_seqlens)
