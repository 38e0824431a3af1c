"""Torch bidirectional attention: two matrix products per row, K x V numbers between them.

Packed segments are cut into chunks of about K tokens, each of one segment. The states of the chunks, as many numbers as v has, are
summed per segment and read by the chunks of that segment: a few batched products, however many segments there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, expand_heads
from linnet.ops.torch._chunks import power_of_two

MIN_CHUNK = 64  # tokens of a chunk of a packed segment


def _chunked(cu_seqlens: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks of `size` tokens that lie in one segment: token [n, C], whether it is there [n, C], segment [n]."""
    start, length = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    count = (length + size - 1) // size
    segment = torch.repeat_interleave(count)  # reads the counts on the host
    first = count.cumsum(0) - count
    inside = (torch.arange(segment.numel(), device=start.device) - first[segment])[:, None] * size
    inside = inside + torch.arange(size, device=start.device)
    valid = inside < length[segment, None]
    return torch.where(valid, start[segment, None] + inside, 0), valid, segment


def _over_segments(x: Tensor, segment: Tensor | None, rows: int) -> Tensor:
    """The sum of x [n, ...] over the chunks of its segment, for every chunk."""
    return x if segment is None else x.new_zeros(rows, *x.shape[1:]).index_add(0, segment, x)[segment]


@implements("bidirectional_attention", "torch")
def bidirectional_attention(q, k, v, log_gain, normalizer, normalizer_eps, scale, cu_seqlens):
    dtype, out_dtype = accumulate_dtype(q, log_gain), v.dtype
    heads = max(x.shape[2] for x in (k, v, log_gain) if x is not None)  # of the state
    q = expand_heads(q, max(heads, q.shape[2])).to(dtype).unflatten(2, (heads, -1))  # [B, T, H, queries of a head, K]
    k, v = (expand_heads(x, heads).to(dtype) for x in (k, v))
    batch, tokens, groups = q.shape[0], q.shape[1], q.shape[3]
    valid = segment = None
    rows = batch
    if cu_seqlens is not None:  # chunks take the place of rows
        index, valid, segment = _chunked(cu_seqlens, max(MIN_CHUNK, power_of_two(q.shape[-1])))
        rows = cu_seqlens.numel() - 1
        q, k, v = (torch.where(valid.view(*valid.shape, *(1,) * (x.ndim - 2)), x[0][index], 0) for x in (q, k, v))
    top = None
    if log_gain is not None:
        i = expand_heads(log_gain, heads).to(dtype)
        i = i if valid is None else torch.where(valid[..., None], i[0][index], -torch.inf)
        top = i.detach().amax(1)
        if valid is not None:
            top = top.new_full((rows, heads), -torch.inf).scatter_reduce(0, segment[:, None].expand_as(top), top, "amax")[segment]
        top = top.clamp_min(torch.finfo(dtype).min)[:, None]  # [B, 1, H]
        k = k * (i - top).exp()[..., None]
    S = _over_segments(torch.einsum("bthk,bthv->bhkv", k, v), segment, rows)
    o = scale * torch.matmul(q.transpose(1, 2).flatten(2, 3), S).unflatten(2, (-1, groups)).transpose(1, 2)  # [B, T, H, G, V]
    if normalizer == "sum":
        z = _over_segments(k.sum(1), segment, rows)
        den = scale * torch.einsum("bthgk,bhk->bthg", q, z)
        if normalizer_eps:
            den = den + (normalizer_eps if top is None else normalizer_eps * (-top).exp()[..., None])
        if valid is not None:  # tokens that are not there divide 0 by 1
            den = torch.where(valid[:, :, None, None], den, 1)
        o = o / den[..., None]
    elif top is not None:
        o = o * top.exp()[..., None, None]
    o = o.flatten(2, 3)
    if valid is not None:
        o = o.new_zeros(tokens, *o.shape[2:]).index_copy(0, index[valid], o[valid])[None]
    return o.to(out_dtype), None
