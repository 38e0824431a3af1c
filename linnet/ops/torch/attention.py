"""Torch softmax attention: `scaled_dot_product_attention` wherever it can run.

Full sequences use its causal fast path. Sliding windows are cut into blocks of queries that each see their own block of keys
and the few before it: one batched call, memory O(T window) and linear gradients. Packed segments are attended one by one. A
cache puts its tokens before the new ones; rows of unequal length are aligned by slot and masked. The log-sum-exp, which that
function does not return, takes an explicit score matrix, in blocks of queries.

All of it is causal bit for bit on the CPU: a masked key adds an exact zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, expand_heads, segments

QUERY_BLOCK = 512  # queries per call where a mask is needed
MIN_BAND = 128  # smallest query block of a sliding window


def _attend(q_BHTK, k_BHSK, v_BHSV, mask, causal: bool, scale: float, want_lse: bool):
    """One call. mask: bool, True where visible, broadcastable to [B, H, T, S], or None; `causal` is for T = S without mask."""
    if want_lse:
        return _explicit(q_BHTK, k_BHSK, v_BHSV, mask, causal, scale)
    heads, key_size, value_size = q_BHTK.shape[1], q_BHTK.shape[3], v_BHSV.shape[3]
    grouped = k_BHSK.shape[1] != heads or v_BHSV.shape[1] != heads
    if k_BHSK.shape[1] != v_BHSV.shape[1]:
        k_BHSK, v_BHSV = expand_heads(k_BHSK, heads, 1), expand_heads(v_BHSV, heads, 1)
    if value_size < key_size:  # the fast kernels want one size
        v_BHSV = F.pad(v_BHSV, (0, key_size - value_size))
    elif value_size > key_size:
        q_BHTK, k_BHSK = (F.pad(x, (0, value_size - key_size)) for x in (q_BHTK, k_BHSK))
    o = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSV, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return o[..., :value_size], None


def _explicit(q_BHTK, k_BHSK, v_BHSV, mask, causal, scale):
    """Scores in memory: output and log-sum-exp [B, H, T]."""
    heads, tokens = q_BHTK.shape[1:3]
    k_BHSK, v_BHSV = expand_heads(k_BHSK, heads, 1), expand_heads(v_BHSV, heads, 1)
    if causal and mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=q_BHTK.device).tril()
    scores = torch.matmul(q_BHTK * scale, k_BHSK.mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.matmul((scores - lse.unsqueeze(-1)).exp(), v_BHSV), lse


def _joined(parts):
    """Blocks of queries put together along time."""
    outputs, lses = zip(*parts, strict=True)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(outputs, 2), None if lses[0] is None else torch.cat(lses, 2)


def _banded(q, k, v, past: int, window: int, scale: float, want_lse: bool):
    """Sliding window: query block i of Q tokens sees key blocks i-r ... i, the window lying inside r+1 blocks."""
    batch, _, tokens, _ = q.shape
    size = max(MIN_BAND, -(-(window - 1) // 4))
    reach = -(-(window - 1) // size) * size  # r Q, the tokens before a block that it may see
    blocks = -(-tokens // size)
    skip = max(past - reach, 0)
    missing = max(reach - past, 0)

    def keys(x):  # [B, H, S, *] -> [B * n, H, rQ + Q, *]
        x = F.pad(x[:, :, skip:], (0, 0, missing, blocks * size - tokens))
        return x.unfold(2, reach + size, size).permute(0, 2, 1, 4, 3).flatten(0, 1)

    def queries(x):
        return F.pad(x, (0, 0, 0, blocks * size - tokens)).unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)

    device = q.device
    slot = torch.arange(reach + size, device=device)
    age = reach + torch.arange(size, device=device)[:, None] - slot
    exists = slot + size * torch.arange(blocks, device=device)[:, None] >= missing
    mask = ((age >= 0) & (age < window)) & exists[:, None]  # [n, Q, rQ + Q]
    mask = mask[None, :, None].expand(batch, -1, -1, -1, -1).flatten(0, 1)
    o, lse = _attend(queries(q), keys(k), keys(v), mask, False, scale, want_lse)
    join = lambda x: x.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]  # noqa: E731
    return join(o), None if lse is None else join(lse)


def _uniform(q, k, v, past: int, causal: bool, window: int | None, scale: float, want_lse: bool):
    """All rows have `past` keys before the first query. q [B, H, T, K]; k, v [B, H, past + T, *]."""
    tokens = q.shape[2]
    if window is not None and window >= past + tokens:
        window = None
    if not causal or (tokens == 1 and window is None):
        return _attend(q, k, v, None, False, scale, want_lse)
    if tokens == 1:
        return _attend(q, k[:, :, -window:], v[:, :, -window:], None, False, scale, want_lse)
    if window is not None and tokens > MIN_BAND:
        return _banded(q, k, v, past, window, scale, want_lse)
    if past == 0 and window is None and not (want_lse and tokens > QUERY_BLOCK):
        return _attend(q, k, v, None, True, scale, want_lse)
    parts = []
    for start in range(0, tokens, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, tokens)
        age = past + torch.arange(start, end, device=q.device)[:, None] - torch.arange(past + end, device=q.device)
        mask = age >= 0 if window is None else (age >= 0) & (age < window)
        seen = slice(0, past + end)
        parts.append(_attend(q[:, :, start:end], k[:, :, seen], v[:, :, seen], mask, False, scale, want_lse))
    return _joined(parts)


def _ragged(q, k, v, length: Tensor, causal: bool, window: int | None, scale: float, want_lse: bool):
    """Row n has length[n] keys before its first query; slot s of k and v [B, H, S + T, *] is position s."""
    tokens, slots = q.shape[2], torch.arange(k.shape[2], device=q.device)
    parts = []
    for start in range(0, tokens, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, tokens)
        position = length[:, None] + torch.arange(start, end, device=q.device)  # [N, T]
        last = position if causal else (length[:, None] + tokens - 1).expand_as(position)
        mask = slots <= last.unsqueeze(-1)
        if window is not None:
            mask = mask & (slots > position.unsqueeze(-1) - window)
        parts.append(_attend(q[:, :, start:end], k, v, mask.unsqueeze(1), False, scale, want_lse))
    return _joined(parts)


def _even(length: Tensor, slots: int) -> bool:
    """Whether every row of a cache is full; reads values, so it is only asked where that is free."""
    if length.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool((length == slots).all())


def _append(cache: Tensor, new: Tensor, length: Tensor) -> Tensor:
    """New tokens [N, T, ...] behind the valid ones of each row of a cache [N, S, ...]."""
    slot = length[:, None] + torch.arange(new.shape[1], device=new.device)
    index = slot[..., None, None].expand_as(new)
    return torch.cat([cache.to(new.dtype), torch.zeros_like(new)], 1).scatter(1, index, new)


def _kept(x: Tensor, length: Tensor, even: bool, window: int | None) -> Tensor:
    """What the next call can see of keys or values [N, S, ...] with `length` valid ones per row."""
    if window is None or x.shape[1] <= window - 1 and even:
        return x
    slots = min(window - 1, x.shape[1])
    if even:
        return x[:, x.shape[1] - slots :].clone()
    source = (length - (window - 1)).clamp(min=0)[:, None] + torch.arange(slots, device=x.device)
    return x.gather(1, source.clamp(max=max(x.shape[1] - 1, 0))[..., None, None].expand(-1, -1, *x.shape[2:]))


def _rows(q, k, v, causal, window, want_lse, scale, cache):
    """Attention over a batch of rows; returns o [B, T, H, V], lse [B, T, H] or None, and keys, values, length to keep."""
    compute = accumulate_dtype(q) if q.device.type == "cpu" else q.dtype
    batch, tokens = q.shape[:2]
    past, even = 0, True
    length = torch.zeros(batch, dtype=torch.int64, device=q.device)
    if cache is not None:
        length, past = cache[2], cache[0].shape[1]
        even = _even(length, past)
        join = (lambda old, new: torch.cat([old.to(new.dtype), new], 1)) if even else lambda o, n: _append(o, n, length)
        k, v = join(cache[0], k), join(cache[1], v)
    q_, k_, v_ = (x.to(compute).transpose(1, 2) for x in (q, k, v))
    if even:
        o, lse = _uniform(q_, k_, v_, past, causal, window, scale, want_lse)
    else:
        o, lse = _ragged(q_, k_, v_, length, causal, window, scale, want_lse)
    length = length + tokens
    kept = [_kept(x, length, even, window) for x in (k, v)]
    if window is not None:
        length = length.clamp(max=window - 1)
    lse = None if lse is None else lse.transpose(1, 2).to(accumulate_dtype(q))
    return o.transpose(1, 2).to(v.dtype), lse, (*kept, length)


def _unchanged(k: Tensor, v: Tensor, window: int | None, cache):
    """Keys, values, length to keep of a segment without new tokens."""
    if cache is None:
        return k, v, torch.zeros(1, dtype=torch.int64, device=k.device)
    length = cache[2] if window is None else cache[2].clamp(max=window - 1)
    return *(_kept(old.to(new.dtype), cache[2], True, window) for old, new in zip(cache, (k, v), strict=False)), length


def _padded(rows: list[Tensor]) -> Tensor:
    """Rows [1, S_n, ...] as [N, max S, ...], zeros behind."""
    return torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)


@implements("softmax_attention", "torch")
def softmax_attention(
    q_BTHK, k_BTHK, v_BTHV, causal, window, return_lse, scale, initial_state, return_state, cu_seqlens
):  # fmt: skip
    if cu_seqlens is None:
        o, lse, state = _rows(q_BTHK, k_BTHK, v_BTHV, causal, window, return_lse, scale, initial_state)
    else:
        outputs, lses, keys, values, lengths = [], [], [], [], []
        for n, (_, start, end) in enumerate(segments(cu_seqlens, 1, q_BTHK.shape[1])):
            cache = None
            if initial_state is not None:
                used = int(initial_state[2][n])
                cache = initial_state[0][n : n + 1, :used], initial_state[1][n : n + 1, :used], initial_state[2][n : n + 1]
            q, k, v = (x[:, start:end] for x in (q_BTHK, k_BTHK, v_BTHV))
            if start == end:
                kept = _unchanged(k, v, window, cache)
            else:
                o, lse, kept = _rows(q, k, v, causal, window, return_lse, scale, cache)
                outputs.append(o)
                lses.append(lse)
            for values_, x in zip((keys, values, lengths), kept, strict=True):
                values_.append(x)
        o = torch.cat(outputs, 1)
        lse = torch.cat(lses, 1) if return_lse else None
        state = (_padded(keys), _padded(values), torch.cat(lengths)) if return_state else None
    state = state if return_state else None
    return (o, state, lse) if return_lse else (o, state)
