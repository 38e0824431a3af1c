"""Reference bidirectional attention: the sums token by token, then one read per token."""

from __future__ import annotations

import torch

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, expand_heads, segments


@implements("bidirectional_attention", "reference")
def bidirectional_attention(q, k, v, log_gain, normalizer, normalizer_eps, scale, cu_seqlens):
    dtype, out_dtype = accumulate_dtype(q, log_gain), v.dtype
    heads = max(x.shape[2] for x in (q, k, v, log_gain) if x is not None)
    q, k, v = (expand_heads(x, heads).to(dtype) for x in (q, k, v))
    i = q.new_zeros(q.shape[:3]) if log_gain is None else expand_heads(log_gain, heads).to(dtype)
    o = torch.zeros_like(v)
    for b, start, end in segments(cu_seqlens, q.shape[0], q.shape[1]):
        if start == end:
            continue
        m = i[b, start:end].detach().amax(0).clamp_min(torch.finfo(dtype).min)  # no token at all: any finite number
        S, z = q.new_zeros(heads, q.shape[3], v.shape[3]), q.new_zeros(heads, q.shape[3])
        for s in range(start, end):
            weighted = (i[b, s] - m).exp()[:, None] * k[b, s]
            S, z = S + weighted[:, :, None] * v[b, s][:, None], z + weighted
        for t in range(start, end):
            num, den = scale * torch.einsum("hk,hkv->hv", q[b, t], S), scale * (q[b, t] * z).sum(-1)
            gain = m.exp() if normalizer is None else 1 / (den + (normalizer_eps * (-m).exp() if normalizer_eps else 0))
            o[b, t] = num * gain[:, None]
    return o.to(out_dtype), None
