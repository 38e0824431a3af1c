"""Reference softmax attention: the whole score matrix of each row or segment, in the dtype of the operands (at least fp32)."""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, expand_heads, segments


def _padded(rows: list[Tensor], like: Tensor) -> Tensor:
    """Rows [S_n, H, *] as one tensor [N, max S, H, *] with zeros behind."""
    slots = max(row.shape[0] for row in rows)
    return torch.stack([torch.cat([row, like.new_zeros(slots - row.shape[0], *like.shape[2:])]) for row in rows])


@implements("softmax_attention", "reference")
def softmax_attention(
    q_BTHK, k_BTHK, v_BTHV, causal, window, return_lse, scale, initial_state, return_state, cu_seqlens
):  # fmt: skip
    batch, tokens, heads, _ = q_BTHK.shape
    dtype = accumulate_dtype(q_BTHK)
    out, lses, keys, values = [], [], [], []
    for row, (b, start, end) in enumerate(segments(cu_seqlens, batch, tokens)):
        k, v = k_BTHK[b, start:end], v_BTHV[b, start:end]
        past = 0
        if initial_state is not None:
            past = int(initial_state[2][row])
            k = torch.cat([initial_state[0][row, :past].to(k.dtype), k])
            v = torch.cat([initial_state[1][row, :past].to(v.dtype), v])
        q_ThK = q_BTHK[b, start:end].to(dtype)
        k_ShK, v_ShV = (expand_heads(x, heads, axis=1).to(dtype) for x in (k, v))
        scores_hTS = scale * torch.einsum("thk,shk->hts", q_ThK, k_ShK)
        age = past + torch.arange(end - start, device=k.device)[:, None] - torch.arange(past + end - start, device=k.device)
        if causal:
            scores_hTS = scores_hTS.masked_fill(age < 0, -torch.inf)
        if window is not None:
            scores_hTS = scores_hTS.masked_fill(age >= window, -torch.inf)
        lses.append(scores_hTS.logsumexp(-1).T)
        out.append(torch.einsum("hts,shv->thv", scores_hTS.softmax(-1), v_ShV))
        kept = k.shape[0] if window is None else min(k.shape[0], window - 1)
        keys.append(k[k.shape[0] - kept :])
        values.append(v[v.shape[0] - kept :])

    def grid(rows):
        return torch.cat(rows)[None] if cu_seqlens is not None else torch.stack(rows)

    state = None
    if return_state:
        length = torch.tensor([x.shape[0] for x in keys], dtype=torch.int64, device=q_BTHK.device)
        state = (_padded(keys, k_BTHK), _padded(values, v_BTHV), length)
    o = grid(out).to(v_BTHV.dtype)
    return (o, state, grid(lses)) if return_lse else (o, state)
