"""Reference linear attention, delta rule and DPLR: the recurrences of linnet/ops/recurrent.py, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops._algebra import gate
from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, decay_per_token, expand_heads, segments


def _operands(dtype, heads, *tensors):
    """Per-head operands in the accumulation dtype; None stays None."""
    return [None if x is None else expand_heads(x, heads).to(dtype) for x in tensors]


def _channels(g: Tensor | None) -> Tensor | None:
    """A scalar decay [B, T, H] as [B, T, H, 1]."""
    return g.unsqueeze(-1) if g is not None and g.ndim == 3 else g


def _rows_of(initial: Tensor | None, row: int, heads: int, default: Tensor) -> Tensor:
    return default if initial is None else expand_heads(initial[row], heads, axis=0).to(default.dtype)


def _state(rows: list[Tensor], state_heads: int) -> Tensor:
    """Stack the rows' final states; heads that only the queries have are copies and are dropped."""
    x = torch.stack(rows)
    return x[:, :: x.shape[1] // state_heads]


@implements("linear_attention", "reference")
def linear_attention(
    q, k, v, log_decay, log_gain, bonus, read, normalizer, normalizer_eps, return_normalizer, steps_per_token, scale, log_decay_min,
    initial_state, return_state, cu_seqlens,
):  # fmt: skip
    batch, tokens, _, key_size = q.shape
    n, dtype, out_dtype = steps_per_token, accumulate_dtype(q, log_decay, log_gain), v.dtype
    g = _channels(decay_per_token(log_decay, batch, tokens))
    others = [x.shape[2] for x in (k, v, g, log_gain) if x is not None] + ([bonus.shape[0]] if bonus is not None else [])
    state_heads = max(others)
    heads = max(q.shape[2], state_heads)
    q, k, v, g, i = _operands(dtype, heads, q, k, v, g, log_gain)
    u = torch.zeros(heads, key_size, dtype=dtype, device=q.device) if bonus is None else expand_heads(bonus, heads, 0).to(dtype)
    S0, z0, m0 = (*(initial_state or ()), None, None, None)[:3]
    if normalizer is None:
        z0, m0 = None, z0
    out, dens, maxima, final = {}, {}, {}, ([], [], [])
    for row, (b, start, end) in enumerate(segments(cu_seqlens, batch, tokens)):
        S = _rows_of(S0, row, heads, q.new_zeros(heads, key_size, v.shape[3]))
        z = _rows_of(z0, row, heads, q.new_zeros(heads, key_size))
        m = _rows_of(m0, row, heads, q.new_full((heads,), -torch.inf if i is not None else 0.0))
        for t in range(start, end):

            def decayed(S, z, m, g_t, i_t):
                """Decay by g_t, prepare a write with gain i_t: the state is kept relative to e^m, m not differentiated."""
                if i_t is None:
                    return S * g_t.exp()[..., None], z * g_t.exp(), m, torch.ones_like(m)
                top = torch.maximum(m + g_t.amax(-1), i_t).detach()
                safe = top.masked_fill(top == -torch.inf, 0.0)  # nothing was written yet
                f = (g_t + (m - safe)[:, None]).exp()
                return S * f[..., None], z * f, top, (i_t - safe).exp()

            steps = range(t * n, t * n + n)
            if read == "before":  # relative to e^top; the bonus term sees every write of this token
                top = m if i is None else torch.stack([m, *(i[b, s] for s in steps)]).amax(0).detach()
                safe = top.masked_fill(top == -torch.inf, 0.0)
                f = (m - safe).exp() if i is not None else torch.ones_like(m)
                num = torch.einsum("hk,hkv->hv", q[b, t], S) * f[:, None]
                den = torch.einsum("hk,hk->h", q[b, t], z) * f
                for s in steps:
                    gain = (i[b, s] - safe).exp() if i is not None else torch.ones_like(m)
                    weight = (q[b, t] * u * k[b, s]).sum(-1) * gain
                    num, den = num + weight[:, None] * v[b, s], den + weight
            for j, s in enumerate(steps):
                g_t = g[b, t] if g is not None and j == 0 else q.new_zeros(heads, 1)
                S, z, m, gain = decayed(S, z, m, g_t, None if i is None else i[b, s])
                S = S + (gain[:, None] * k[b, s])[:, :, None] * v[b, s][:, None, :]
                z = z + gain[:, None] * k[b, s]
            if read == "after":
                top = m
                num = torch.einsum("hk,hkv->hv", q[b, t], S)
                den = torch.einsum("hk,hk->h", q[b, t], z)
            num, den = scale * num, scale * den
            if normalizer == "sum" and normalizer_eps:
                den = den + normalizer_eps * (-top).exp()
            if normalizer == "floor":
                den = torch.maximum(den.abs(), (-top).exp())
            out[b, t] = num / den[:, None] if normalizer is not None else num * top.exp()[:, None] if i is not None else num
            dens[b, t], maxima[b, t] = den, top
        for x, values in zip((S, z, m), final, strict=True):
            values.append(x)

    def grid(values: dict) -> Tensor:
        return torch.stack([torch.stack([values[b, t] for t in range(tokens)]) for b in range(batch)])

    o = grid(out).to(out_dtype)
    state = None
    if return_state:
        kept = [True, normalizer is not None, log_gain is not None]
        state = tuple(_state(values, state_heads) for values, keep in zip(final, kept, strict=True) if keep)
    return (o, state, (grid(dens), grid(maxima))) if return_normalizer else (o, state)


def _delta(q, e, p, w, u, g, before_decay: bool, read: str, n: int, scale, S0, return_state, cu_seqlens, state_heads, out_dtype):
    """S_t = Diag(e^g) S_{t-1} - w_t r_t^T + p_t u_t^T with r_t = (e^{rho g} * e_t)^T S_{t-1}; w = p is the delta rule."""
    batch, tokens, heads, key_size = q.shape
    out, final = {}, []
    for row, (b, start, end) in enumerate(segments(cu_seqlens, batch, tokens)):
        S = _rows_of(S0, row, heads, q.new_zeros(heads, key_size, u.shape[3]))
        for t in range(start, end):
            if read == "before":
                out[b, t] = scale * torch.einsum("hk,hkv->hv", q[b, t], S)
            for j, s in enumerate(range(t * n, t * n + n)):
                decayed = S * g[b, t].exp()[..., None] if g is not None and j == 0 else S
                r = torch.einsum("hk,hkv->hv", e[b, s], S if before_decay else decayed)
                S = decayed - w[b, s][:, :, None] * r[:, None, :] + p[b, s][:, :, None] * u[b, s][:, None, :]
            if read == "after":
                out[b, t] = scale * torch.einsum("hk,hkv->hv", q[b, t], S)
        final.append(S)
    o = torch.stack([torch.stack([out[b, t] for t in range(tokens)]) for b in range(batch)]).to(out_dtype)
    return o, (_state(final, state_heads),) if return_state else None


@implements("delta_rule", "reference")
def delta_rule(
    q, k, v, erase, write, write_key, log_decay, erase_read, read, steps_per_token, scale, log_decay_min, initial_state,
    return_state, cu_seqlens,
):  # fmt: skip
    dtype, out_dtype = accumulate_dtype(q, log_decay, erase, write), v.dtype
    g = _channels(decay_per_token(log_decay, q.shape[0], q.shape[1]))
    e = gate(erase.to(dtype), k.to(dtype))
    p = (k if write_key is None else write_key).to(dtype)
    u = gate((erase if write is None else write).to(dtype), v.to(dtype))
    state_heads = max(x.shape[2] for x in (e, p, u, g) if x is not None)
    heads = max(q.shape[2], state_heads)
    q, e, p, u, g = _operands(dtype, heads, q, e, p, u, g)
    S0 = initial_state[0] if initial_state is not None else None
    before = erase_read == "before_decay"
    return _delta(q, e, p, p, u, g, before, read, steps_per_token, scale, S0, return_state, cu_seqlens, state_heads, out_dtype)


@implements("dplr", "reference")
def dplr(q, k, v, a, b, log_decay, scale, log_decay_min, initial_state, return_state, cu_seqlens):
    dtype, out_dtype = accumulate_dtype(q, log_decay, a, b), v.dtype
    g = _channels(decay_per_token(log_decay, q.shape[0], q.shape[1]))
    state_heads = max(x.shape[2] for x in (k, v, a, b, g) if x is not None)
    heads = max(q.shape[2], state_heads)
    q, k, v, a, b, g = _operands(dtype, heads, q, k, v, a, b, g)
    S0 = initial_state[0] if initial_state is not None else None
    return _delta(q, a, k, -b, v, g, True, "after", 1, scale, S0, return_state, cu_seqlens, state_heads, out_dtype)
