"""The algebra that reduces the public matrix-state operators to three cores, shared by every backend but `reference`.

A core knows q, k, v, a per-token decay and an initial state:
    linear(q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, dtype, **tuning) -> o, S
    delta(q, k, p, v, erase, write, g, S0, cu_seqlens, scale, before_decay, exclusive, heads, dtype, **tuning) -> o, S
    dplr(q, a, b, k, v, g, S0, cu_seqlens, scale, heads, dtype, **tuning) -> o, S
with g None | [B, T, H_g, 1 or K] in `dtype`, S0 None | [N, heads, K, V], o [B, T, H, V], S [N, heads, K, V] in `dtype`;
exclusive: the query reads before the step; before_decay: e reads the undecayed state. In delta, e = erase * k and u = write * v
with erase and write None (one) or [B, T, H, 1] in `dtype`, and k None for k = p; a core that is called with channel_gates also
takes erase [B, T, H, K] and write [B, T, H, V], in the caller's dtype. Everything else is elementwise and
differentiated by PyTorch: several steps per token become a finer time grid (decay on the first step, query on the last), a
normaliser becomes one more value column of ones (on tiles, a call of its own), a log-gain becomes a decay and a factor of k
relative to its running maximum, a bonus is (q . bonus k) v.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops._shapes import accumulate_dtype, decay_per_token, expand_heads


def gate(x: Tensor, operand: Tensor) -> Tensor:
    """A gate [B, T, H] or [B, T, H, *] times an operand [B, T, H, *], for any head counts that divide one another."""
    heads = max(x.shape[2], operand.shape[2])
    x = expand_heads(x, heads)
    return (x.unsqueeze(-1) if x.ndim == 3 else x) * expand_heads(operand, heads)


def fold_gates(k: Tensor | None, p: Tensor, v: Tensor, erase: Tensor | None, write: Tensor | None):
    """(k, v, erase, write) of a delta core with the gates [B, T, H, K or V] multiplied into what they scale."""
    if erase is not None and erase.shape[3] > 1:
        k, erase = gate(erase, p if k is None else k), None
    if write is not None and write.shape[3] > 1:
        v, write = gate(write, v), None
    return k, v, erase, write


def finer_grid(q: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, n: int, first: bool):
    """Tokens to steps: the query on a token's last (or first) step, the decay on its first, zeros elsewhere."""
    if n == 1:
        return q, g, cu_seqlens
    pad = (0, 0, 0, 0, 0, n - 1) if first else (0, 0, 0, 0, n - 1, 0)
    q = F.pad(q.unsqueeze(2), pad).flatten(1, 2)
    g = None if g is None else F.pad(g.unsqueeze(2), (0, 0, 0, 0, 0, n - 1)).flatten(1, 2)
    return q, g, None if cu_seqlens is None else cu_seqlens * n


def last_steps(x: Tensor, n: int, first: bool) -> Tensor:
    """The steps at which `finer_grid` put the queries."""
    return x if n == 1 else x[:, 0 if first else n - 1 :: n]


def per_token_decay(log_decay: Tensor | None, batch: int, tokens: int, dtype: torch.dtype) -> Tensor | None:
    """[B, T, H, 1 or K] in the accumulation dtype, or None."""
    if log_decay is None:
        return None
    g = decay_per_token(log_decay, batch, tokens).to(dtype)
    return g if g.ndim == 4 else g.unsqueeze(-1)


def running_maximum(g: Tensor | None, i: Tensor, m0: Tensor | None, cu_seqlens: Tensor | None):
    """m_t = max(m_{t-1} + g_t, i_t) per row by doubling. i [B, T, H] -> m, m_{t-1} (same shape).

    The maximum is not differentiated (it changes no result); m0, which scales the initial state, is.
    """
    B, T, H = i.shape
    time = torch.arange(T, device=i.device)
    if cu_seqlens is None:
        row = torch.arange(B, device=i.device)[:, None].expand(B, T)
        fresh = (time == 0).expand(B, T)
    else:
        row = (torch.searchsorted(cu_seqlens.to(time.dtype), time, right=True) - 1)[None]
        fresh = F.pad(row[:, 1:] != row[:, :-1], (1, 0), value=True)
    i = i.detach()
    g = torch.zeros_like(i) if g is None else g.detach().expand_as(i)
    before = torch.full_like(i, -torch.inf) if m0 is None else m0.to(i.dtype)[row]
    m = torch.where(fresh[..., None], torch.maximum(before.detach() + g, i), i)
    flow = g.masked_fill(fresh[..., None], -torch.inf)
    step = 1
    while step < T:
        m = torch.cat([m[:, :step], torch.maximum(m[:, :-step] + flow[:, step:], m[:, step:])], 1)
        flow = torch.cat([flow[:, :step], flow[:, :-step] + flow[:, step:]], 1)
        step *= 2
    previous = torch.where(fresh[..., None], before, F.pad(m[:, :-1], (0, 0, 1, 0)))
    return m, previous


def last_of_rows(x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x [B, T, H] at the last token of every row; `initial` (default -inf) where a segment is empty."""
    if cu_seqlens is None:
        return x[:, -1]
    last = x[0].index_select(0, (cu_seqlens[1:] - 1).clamp_min(0))
    initial = torch.full_like(last, -torch.inf) if initial is None else initial.to(last.dtype)
    return torch.where((cu_seqlens.diff() > 0)[:, None], last, initial)


def linear_attention(
    core: Callable, q, k, v, log_decay, log_gain, bonus, read, normalizer, normalizer_eps, return_normalizer, steps_per_token,
    scale, log_decay_min, initial_state, return_state, cu_seqlens, tiles: bool = False, normalized: Callable | None = None,
    maximum: Callable = running_maximum, **tuning,
):  # fmt: skip
    """tiles: the core multiplies tiles of the operands' own dtype: gated keys keep it, and the normalizer is a call of its own
    (one more value channel would be one more tile).
    normalized(q, k, v, g, gain, least, cu_seqlens, scale, heads, floor) -> None, or o / max(|n|, least) (floor) or o / (n + least),
    n [B, T, H], S, z: a core with gain (relative to the running maximum) and normalizer, from no state, read after the step.
    maximum: `running_maximum` or what computes the same."""
    B, T = q.shape[:2]
    n, before, out_dtype = steps_per_token, read == "before", v.dtype
    dtype = accumulate_dtype(q, log_decay, log_gain)
    g = per_token_decay(log_decay, B, T, dtype)
    counts = [x.shape[2] for x in (k, v, g, log_gain) if x is not None] + ([bonus.shape[0]] if bonus is not None else [])
    heads = max(counts)
    S0, z0, m0 = (*(initial_state or ()), None, None, None)[:3]
    if normalizer is None:
        z0, m0 = None, z0
    q_tokens, m_read, factor = q, None, None
    q, g, cu_steps = finer_grid(q, g, cu_seqlens, n, first=before)
    k_hat = k
    if log_gain is not None:
        i = expand_heads(log_gain.to(dtype), heads)
        g_top = None if g is None else expand_heads(g.detach().amax(-1), heads)
        m, previous = maximum(g_top, i, m0, cu_steps)
        safe = m.masked_fill(m == -torch.inf, 0.0)
        change = (previous - safe).unsqueeze(-1)
        g = change if g is None else expand_heads(g, heads) + change
        m_read = last_steps(m, n, first=False)
        if before:  # relative to the maximum of the state before the token and the token's own gains
            m_state = last_steps(previous, n, first=True)
            m_read = torch.maximum(m_state.detach(), i.detach().unflatten(1, (T, n)).amax(2))
            safe_read = m_read.masked_fill(m_read == -torch.inf, 0.0)
            factor, own_gain = (m_state - safe_read).exp(), (i.unflatten(1, (T, n)) - safe_read.unsqueeze(2)).exp().flatten(1, 2)
    H = max(q.shape[2], heads)
    least = None
    if normalizer is not None:
        least = _least_divisor(normalizer, normalizer_eps, q.new_zeros(1, 1, 1, dtype=dtype) if m_read is None else m_read)
    if normalized is not None and least is not None and n == 1 and not before and bonus is None and not initial_state:
        gain = None if log_gain is None else (i - safe).unsqueeze(-1)
        done = normalized(q, k, v, g, gain, least, cu_seqlens, scale, heads, normalizer == "floor")
        if done is not None:
            o, total, S, z = done
            state = None if not return_state else (S, z) if log_gain is None else (S, z, last_of_rows(m, m0, cu_seqlens))
            if not return_normalizer:
                return o, state
            denominator = _divisor(normalizer, total, expand_heads(least, H))
            return o, state, (denominator, _top(m_read, denominator))
    if log_gain is not None:
        k_hat = gate((i - safe).exp(), k.to(dtype))
        if tiles:
            k_hat = k_hat.to(k.dtype)
    value = v
    if normalizer is not None and not tiles:
        value = F.pad(v.to(k_hat.dtype), (0, 1), value=1.0)
        S0 = None if S0 is None else torch.cat([S0.to(dtype), z0.to(dtype).unsqueeze(-1)], -1)
    if q.dtype != k_hat.dtype:
        q, value = q.to(k_hat.dtype), value.to(k_hat.dtype)
    o, S = core(q, k_hat, value, g, S0, cu_steps, scale, before, heads, dtype, **tuning)
    if normalizer is not None and tiles:
        z0 = None if z0 is None else z0.unsqueeze(-1)
        total, z = core(q, k_hat, v.new_ones(*k_hat.shape[:2], 1, 1), g, z0, cu_steps, scale, before, heads, dtype, **tuning)
        o, S = (torch.cat([a.to(dtype), b.to(dtype)], -1) for a, b in ((o, total), (S, z)))
    o = last_steps(o, n, first=before)
    if not (log_gain is None and bonus is None and normalizer is None):  # arithmetic follows
        o = o.to(dtype)
    if factor is not None:
        o = o * expand_heads(factor, H).unsqueeze(-1)
    if bonus is not None:
        u = expand_heads(bonus.to(dtype), H, 0)
        weight = (expand_heads(q_tokens, H).unsqueeze(2) * (expand_heads(k, H).unflatten(1, (T, n)) * u)).sum(-1) * scale
        if log_gain is not None:
            weight = weight * expand_heads(own_gain, H).unflatten(1, (T, n))
        own = F.pad(v.to(dtype), (0, 1), value=1.0) if normalizer is not None else v.to(dtype)
        o = o + (weight.unsqueeze(-1) * expand_heads(own, H).unflatten(1, (T, n))).sum(2)
    denominator = None
    if normalizer is not None:
        o, denominator = o[..., :-1], _divisor(normalizer, o[..., -1], expand_heads(least, H))
        o = o / denominator.unsqueeze(-1)
    elif m_read is not None:
        o = o * expand_heads(m_read, H).exp().unsqueeze(-1)
    state = None
    if return_state:
        state = (S,) if normalizer is None else (S[..., :-1], S[..., -1])
        if log_gain is not None:
            state = (*state, last_of_rows(m, m0, cu_steps))
    o = o.to(out_dtype)
    return (o, state, (denominator, _top(m_read, denominator))) if return_normalizer else (o, state)


def _least_divisor(normalizer: str, eps: float, m: Tensor) -> Tensor:
    """What a divisor is at least ("floor"), or contains beside the sum, relative to the running maximum m."""
    if normalizer == "floor":
        return (-m).exp()
    return eps * (-m).exp() if eps else torch.zeros_like(m)  # 0 * e^{-m} would be NaN once e^{-m} overflows


def _divisor(normalizer: str, total: Tensor, least: Tensor) -> Tensor:
    return torch.maximum(total.abs(), least) if normalizer == "floor" else total + least


def _top(m: Tensor | None, like: Tensor) -> Tensor:
    """The running maximum, per head of `like`."""
    return torch.zeros_like(like) if m is None else expand_heads(m, like.shape[2])


def delta_rule(
    core: Callable, q, k, v, erase, write, write_key, log_decay, erase_read, read, steps_per_token, scale, log_decay_min,
    initial_state, return_state, cu_seqlens, channel_gates: bool = False, **tuning,
):  # fmt: skip
    n, exclusive, before_decay, out_dtype = steps_per_token, read == "before", erase_read == "before_decay", v.dtype
    dtype = accumulate_dtype(q, log_decay, erase, write)
    g = per_token_decay(log_decay, *q.shape[:2], dtype)
    q, g, cu_steps = finer_grid(q, g, cu_seqlens, n, first=exclusive)
    write = erase if write is None else write
    p = k if write_key is None else write_key
    k = None if write_key is None else k
    erase, write = (x.to(dtype).unsqueeze(-1) if x.ndim == 3 else x for x in (erase, write))
    if not channel_gates:
        erase, write = erase.to(dtype), write.to(dtype)
        k, v, erase, write = fold_gates(k, p, v, erase, write)
    heads = max(x.shape[2] for x in (k, p, v, erase, write, g) if x is not None)
    S0 = None if initial_state is None else initial_state[0]
    o, S = core(q, k, p, v, erase, write, g, S0, cu_steps, scale, before_decay, exclusive, heads, dtype, **tuning)
    return last_steps(o, n, first=exclusive).to(out_dtype), (S,) if return_state else None


def dplr(core: Callable, q, k, v, a, b, log_decay, scale, log_decay_min, initial_state, return_state, cu_seqlens, **tuning):
    """Arguments of the public operator, checked -> its results, computed by a dplr core."""
    dtype, out_dtype = accumulate_dtype(q, log_decay, a, b), v.dtype
    g = per_token_decay(log_decay, *q.shape[:2], dtype)
    heads = max(x.shape[2] for x in (k, v, a, b, g) if x is not None)
    S0 = None if initial_state is None else initial_state[0]
    o, S = core(q, a, b, k, v, g, S0, cu_seqlens, scale, heads, dtype, **tuning)
    return o.to(out_dtype), (S,) if return_state else None
