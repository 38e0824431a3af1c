"""Chunkwise linear attention, delta rule and DPLR as custom operators, and the algebra that reduces the public operators to them.

The custom operators know q, k, v, a per-token decay and an initial state. Everything else is elementwise and differentiated by
PyTorch: several steps per token become a finer time grid (decay on the first step, query on the last), a normaliser becomes
one more value column of ones, a log-gain becomes a decay and a factor of k relative to its running maximum, a bonus is
(q . bonus k) v. Single tokens (decoding) take a plain PyTorch step without the chunk machinery.
"""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, decay_per_token, expand_heads
from linnet.ops.torch import _delta, _dplr, _linear

CHUNK = {"linear_attention": 64, "delta_rule": 64, "dplr": 64}  # measured on the CPU with `linnet bench cpu`


def fit_chunk(chunk: int, tokens: int) -> int:
    """The chunk size of a call: a power of two, not more than twice the tokens there are."""
    while chunk > 1 and chunk // 2 >= tokens:
        chunk //= 2
    return chunk


def _span_rows(cu_seqlens, batch, tokens, heads, chunk):
    """Rows of the saved span states, for the fake implementations; data-dependent when packed."""
    if cu_seqlens is not None:
        return torch.library.get_ctx().new_dynamic_size()
    waves = -(-tokens // chunk)
    width = max(1, min(16, 64 // max(1, heads * batch)))
    return -(-waves // width) * batch


def _state_rows(cu_seqlens, batch):
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(0)


# ---- linear attention ------------------------------------------------------------------------------------------------


@torch.library.custom_op("linnet::linear_attention", mutates_args=())
def linear_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S0: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, exclusive: bool, heads: int, chunk: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _linear.forward(q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, chunk, dtype)


@linear_op.register_fake
def _(q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, chunk, dtype):
    B, T, Hq, K = q.shape
    V = v.shape[3]
    S = q.new_empty(_state_rows(cu_seqlens, B), heads, K, V, dtype=dtype)
    saved = q.new_empty(_span_rows(cu_seqlens, B, T, heads, chunk), heads, K, V, dtype=dtype)
    return v.new_empty(B, T, max(Hq, heads), V), S, saved


@torch.library.custom_op("linnet::linear_attention_backward", mutates_args=())
def linear_backward_op(
    do: Tensor, dS: Tensor | None, saved: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, exclusive: bool, heads: int, chunk: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dg, dS0 = _linear.backward(do, dS, saved, q, k, v, g, cu_seqlens, scale, exclusive, heads, chunk, dtype)
    return dq, dk, dv, _empty(q) if dg is None else dg, dS0


@linear_backward_op.register_fake
def _(do, dS, saved, q, k, v, g, cu_seqlens, scale, exclusive, heads, chunk, dtype):
    dg = _empty(q) if g is None else torch.empty_like(g, dtype=dtype)
    S = q.new_empty(_state_rows(cu_seqlens, q.shape[0]), heads, q.shape[3], v.shape[3], dtype=dtype)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dg, S


def _linear_setup(ctx, inputs, output):
    q, k, v, g, S0, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, g, cu_seqlens, output[2])
    ctx.state_dtype = None if S0 is None else S0.dtype


def _linear_backward(ctx, do, dS, _):
    q, k, v, g, cu_seqlens, saved = ctx.saved_tensors
    dq, dk, dv, dg, dS0 = linear_backward_op(do, dS, saved, q, k, v, g, cu_seqlens, *ctx.options)
    dg = None if g is None else dg.to(g.dtype)
    dS0 = None if ctx.state_dtype is None else dS0.to(ctx.state_dtype)
    return dq, dk, dv, dg, dS0, None, None, None, None, None, None


linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


# ---- delta rule ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("linnet::delta_rule", mutates_args=())
def delta_op(
    q: Tensor, e: Tensor, p: Tensor, u: Tensor, g: Tensor | None, S0: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, before_decay: bool, exclusive: bool, heads: int, chunk: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _delta.forward(q, e, p, u, g, S0, cu_seqlens, scale, before_decay, exclusive, heads, chunk, dtype)


@delta_op.register_fake
def _(q, e, p, u, g, S0, cu_seqlens, scale, before_decay, exclusive, heads, chunk, dtype):
    B, T, Hq, K = q.shape
    V = u.shape[3]
    S = q.new_empty(_state_rows(cu_seqlens, B), heads, K, V, dtype=dtype)
    saved = q.new_empty(_span_rows(cu_seqlens, B, T, heads, chunk), heads, K, V, dtype=dtype)
    return u.new_empty(B, T, max(Hq, heads), V), S, u.new_empty(B, T, heads, V, dtype=dtype), saved


@torch.library.custom_op("linnet::delta_rule_backward", mutates_args=())
def delta_backward_op(
    do: Tensor, dS: Tensor | None, X: Tensor, saved: Tensor, q: Tensor, e: Tensor, p: Tensor, u: Tensor, g: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, before_decay: bool, exclusive: bool, heads: int, chunk: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *grads, dg, dS0 = _delta.backward(
        do, dS, X, saved, q, e, p, u, g, cu_seqlens, scale, before_decay, exclusive, heads, chunk, dtype
    )
    return *grads, _empty(q) if dg is None else dg, dS0


@delta_backward_op.register_fake
def _(do, dS, X, saved, q, e, p, u, g, cu_seqlens, scale, before_decay, exclusive, heads, chunk, dtype):
    dg = _empty(q) if g is None else torch.empty_like(g, dtype=dtype)
    S = q.new_empty(_state_rows(cu_seqlens, q.shape[0]), heads, q.shape[3], u.shape[3], dtype=dtype)
    return torch.empty_like(q), torch.empty_like(e), torch.empty_like(p), torch.empty_like(u), dg, S


def _delta_setup(ctx, inputs, output):
    q, e, p, u, g, S0, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, e, p, u, g, cu_seqlens, output[2], output[3])
    ctx.state_dtype = None if S0 is None else S0.dtype


def _delta_backward(ctx, do, dS, *_):
    q, e, p, u, g, cu_seqlens, X, saved = ctx.saved_tensors
    dq, de, dp, du, dg, dS0 = delta_backward_op(do, dS, X, saved, q, e, p, u, g, cu_seqlens, *ctx.options)
    dg = None if g is None else dg.to(g.dtype)
    dS0 = None if ctx.state_dtype is None else dS0.to(ctx.state_dtype)
    return dq, de, dp, du, dg, dS0, None, None, None, None, None, None, None


delta_op.register_autograd(_delta_backward, setup_context=_delta_setup)


# ---- DPLR ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("linnet::dplr", mutates_args=())
def dplr_op(
    q: Tensor, e: Tensor, w: Tensor, p: Tensor, u: Tensor, g: Tensor | None, S0: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, heads: int, chunk: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _dplr.forward(q, e, w, p, u, g, S0, cu_seqlens, scale, heads, chunk, dtype)


@dplr_op.register_fake
def _(q, e, w, p, u, g, S0, cu_seqlens, scale, heads, chunk, dtype):
    B, T, Hq, K = q.shape
    V = u.shape[3]
    S = q.new_empty(_state_rows(cu_seqlens, B), heads, K, V, dtype=dtype)
    saved = q.new_empty(_span_rows(cu_seqlens, B, T, heads, chunk), heads, K, V, dtype=dtype)
    return u.new_empty(B, T, max(Hq, heads), V), S, u.new_empty(B, T, heads, V, dtype=dtype), saved


@torch.library.custom_op("linnet::dplr_backward", mutates_args=())
def dplr_backward_op(
    do: Tensor, dS: Tensor | None, R: Tensor, saved: Tensor, q: Tensor, e: Tensor, w: Tensor, p: Tensor, u: Tensor, g: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, heads: int, chunk: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *grads, dg, dS0 = _dplr.backward(do, dS, R, saved, q, e, w, p, u, g, cu_seqlens, scale, heads, chunk, dtype)
    return *grads, _empty(q) if dg is None else dg, dS0


@dplr_backward_op.register_fake
def _(do, dS, R, saved, q, e, w, p, u, g, cu_seqlens, scale, heads, chunk, dtype):
    dg = _empty(q) if g is None else torch.empty_like(g, dtype=dtype)
    S = q.new_empty(_state_rows(cu_seqlens, q.shape[0]), heads, q.shape[3], u.shape[3], dtype=dtype)
    return *(torch.empty_like(x) for x in (q, e, w, p, u)), dg, S


def _dplr_setup(ctx, inputs, output):
    q, e, w, p, u, g, S0, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, e, w, p, u, g, cu_seqlens, output[2], output[3])
    ctx.state_dtype = None if S0 is None else S0.dtype


def _dplr_backward(ctx, do, dS, *_):
    q, e, w, p, u, g, cu_seqlens, R, saved = ctx.saved_tensors
    *grads, dg, dS0 = dplr_backward_op(do, dS, R, saved, q, e, w, p, u, g, cu_seqlens, *ctx.options)
    dg = None if g is None else dg.to(g.dtype)
    dS0 = None if ctx.state_dtype is None else dS0.to(ctx.state_dtype)
    return *grads, dg, dS0, None, None, None, None, None


dplr_op.register_autograd(_dplr_backward, setup_context=_dplr_setup)


# ---- from the public operators to the custom ones --------------------------------------------------------------------


def gate(x: Tensor, operand: Tensor) -> Tensor:
    """A gate [B, T, H] or [B, T, H, *] times an operand [B, T, H, *], for any head counts that divide one another."""
    heads = max(x.shape[2], operand.shape[2])
    x = expand_heads(x, heads)
    return (x.unsqueeze(-1) if x.ndim == 3 else x) * expand_heads(operand, heads)


def _finer_grid(q: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, n: int, first: bool):
    """Tokens to steps: the query on a token's last (or first) step, the decay on its first, zeros elsewhere."""
    if n == 1:
        return q, g, cu_seqlens
    pad = (0, 0, 0, 0, 0, n - 1) if first else (0, 0, 0, 0, n - 1, 0)
    q = F.pad(q.unsqueeze(2), pad).flatten(1, 2)
    g = None if g is None else F.pad(g.unsqueeze(2), (0, 0, 0, 0, 0, n - 1)).flatten(1, 2)
    return q, g, None if cu_seqlens is None else cu_seqlens * n


def _last_steps(x: Tensor, n: int, first: bool) -> Tensor:
    """The steps at which `_finer_grid` put the queries."""
    return x if n == 1 else x[:, 0 if first else n - 1 :: n]


def _decay(log_decay: Tensor | None, batch: int, tokens: int, dtype: torch.dtype) -> Tensor | None:
    """[B, T, H, 1 or K] in the accumulation dtype, or None."""
    if log_decay is None:
        return None
    g = decay_per_token(log_decay, batch, tokens).to(dtype)
    return g if g.ndim == 4 else g.unsqueeze(-1)


def linear_core(q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, dtype, chunk=None):
    """o, S of plain linear attention; g [B, T, Hg, 1 or K] or None."""
    if q.shape[1] == 1 and cu_seqlens is None:
        return _linear_step(q, k, v, g, S0, scale, exclusive, heads, dtype)
    chunk = fit_chunk(CHUNK["linear_attention"] if chunk is None else chunk, q.shape[1])
    o, S, _ = linear_op(q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, chunk, dtype)
    return o, S


def _token(x: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """The only token of x [B, 1, H, D] as [B, heads, D]."""
    return None if x is None else expand_heads(x[:, 0], max(heads, x.shape[2]), 1).to(dtype)


def _start(S0, batch, heads, K, V, like, dtype):
    return torch.zeros(batch, heads, K, V, dtype=dtype, device=like.device) if S0 is None else S0.to(dtype)


def _read(q: Tensor, S: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale S^T q for query groups: q [B, 1, H, K], S [B, Hs, K, V] -> [B, 1, H, V]."""
    q = _token(q, S.shape[1], dtype).unflatten(1, (S.shape[1], -1)) * scale
    return (q @ S).flatten(1, 2).unsqueeze(1)


def _linear_step(q, k, v, g, S0, scale, exclusive, heads, dtype):
    k, v_t, g = (_token(x, heads, dtype) for x in (k, v, g))
    S0 = _start(S0, q.shape[0], heads, q.shape[3], v.shape[3], q, dtype)
    S = S0 if g is None else S0 * g.exp().unsqueeze(-1)
    S = S + k.unsqueeze(-1) * v_t.unsqueeze(-2)
    return _read(q, S0 if exclusive else S, scale, dtype).to(v.dtype), S


def _running_maximum(g: Tensor | None, i: Tensor, m0: Tensor | None, cu_seqlens: Tensor | None):
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


def _last_of_rows(x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x [B, T, H] at the last token of every row; `initial` (default -inf) where a segment is empty."""
    if cu_seqlens is None:
        return x[:, -1]
    last = x[0].index_select(0, (cu_seqlens[1:] - 1).clamp_min(0))
    initial = torch.full_like(last, -torch.inf) if initial is None else initial.to(last.dtype)
    return torch.where((cu_seqlens.diff() > 0)[:, None], last, initial)


@implements("linear_attention", "torch")
def linear_attention(
    q, k, v, log_decay, log_gain, bonus, read, normalizer, normalizer_eps, return_normalizer, steps_per_token, scale, log_decay_min,
    initial_state, return_state, cu_seqlens, chunk=None,
):  # fmt: skip
    B, T = q.shape[:2]
    n, before, out_dtype = steps_per_token, read == "before", v.dtype
    dtype = accumulate_dtype(q, log_decay, log_gain)
    g = _decay(log_decay, B, T, dtype)
    counts = [x.shape[2] for x in (k, v, g, log_gain) if x is not None] + ([bonus.shape[0]] if bonus is not None else [])
    heads = max(counts)
    S0, z0, m0 = (*(initial_state or ()), None, None, None)[:3]
    if normalizer is None:
        z0, m0 = None, z0
    q_tokens, m_read, factor = q, None, None
    q, g, cu_steps = _finer_grid(q, g, cu_seqlens, n, first=before)
    k_hat = k
    if log_gain is not None:
        i = expand_heads(log_gain.to(dtype), heads)
        g_top = None if g is None else expand_heads(g.detach().amax(-1), heads)
        m, previous = _running_maximum(g_top, i, m0, cu_steps)
        safe = m.masked_fill(m == -torch.inf, 0.0)
        change = (previous - safe).unsqueeze(-1)
        g = change if g is None else expand_heads(g, heads) + change
        k_hat = gate((i - safe).exp(), k.to(dtype))
        m_read = _last_steps(m, n, first=False)
        if before:  # relative to the maximum of the state before the token and the token's own gains
            m_state = _last_steps(previous, n, first=True)
            m_read = torch.maximum(m_state.detach(), i.detach().unflatten(1, (T, n)).amax(2))
            safe_read = m_read.masked_fill(m_read == -torch.inf, 0.0)
            factor, own_gain = (m_state - safe_read).exp(), (i.unflatten(1, (T, n)) - safe_read.unsqueeze(2)).exp().flatten(1, 2)
    value = v
    if normalizer is not None:
        value = F.pad(v.to(k_hat.dtype), (0, 1), value=1.0)
        S0 = None if S0 is None else torch.cat([S0.to(dtype), z0.to(dtype).unsqueeze(-1)], -1)
    if q.dtype != k_hat.dtype:
        q, value = q.to(k_hat.dtype), value.to(k_hat.dtype)
    o, S = linear_core(q, k_hat, value, g, S0, cu_steps, scale, before, heads, dtype, chunk)
    o = _last_steps(o, n, first=before).to(dtype)
    H = max(q.shape[2], heads)
    if factor is not None:
        o = o * expand_heads(factor, H).unsqueeze(-1)
    if bonus is not None:
        u = expand_heads(bonus.to(dtype), H, 0)
        weight = (expand_heads(q_tokens, H).unsqueeze(2) * (expand_heads(k, H).unflatten(1, (T, n)) * u)).sum(-1) * scale
        if log_gain is not None:
            weight = weight * expand_heads(own_gain, H).unflatten(1, (T, n))
        own = F.pad(v.to(dtype), (0, 1), value=1.0) if normalizer is not None else v.to(dtype)
        o = o + (weight.unsqueeze(-1) * expand_heads(own, H).unflatten(1, (T, n))).sum(2)
    top = torch.zeros(1, dtype=dtype, device=q.device) if m_read is None else expand_heads(m_read, H)
    denominator = None
    if normalizer is not None:
        o, denominator = o[..., :-1], o[..., -1]
        if normalizer == "sum":
            denominator = denominator + normalizer_eps * (-top).exp()
        else:
            denominator = torch.maximum(denominator.abs(), (-top).exp())
        o = o / denominator.unsqueeze(-1)
    elif m_read is not None:
        o = o * top.exp().unsqueeze(-1)
    state = None
    if return_state:
        state = (S,) if normalizer is None else (S[..., :-1], S[..., -1])
        if log_gain is not None:
            state = (*state, _last_of_rows(m, m0, cu_steps))
    o = o.to(out_dtype)
    return (o, state, (denominator, top.expand_as(denominator))) if return_normalizer else (o, state)


def _delta_step(q, e, p, u, g, S0, scale, before_decay, exclusive, heads, dtype):
    """One token: r = e^T S (decayed or not), S' = Diag(e^g) S + p (u - r)^T."""
    e, p, u_t, g = (_token(x, heads, dtype) for x in (e, p, u, g))
    S0 = _start(S0, q.shape[0], heads, q.shape[3], u.shape[3], q, dtype)
    S = S0 if g is None else S0 * g.exp().unsqueeze(-1)
    r = (e.unsqueeze(-2) @ (S0 if before_decay else S)).squeeze(-2)
    S = S + p.unsqueeze(-1) * (u_t - r).unsqueeze(-2)
    return _read(q, S0 if exclusive else S, scale, dtype).to(u.dtype), S


@implements("delta_rule", "torch")
def delta_rule(
    q, k, v, erase, write, write_key, log_decay, erase_read, read, steps_per_token, scale, log_decay_min, initial_state, return_state,
    cu_seqlens, chunk=None,
):  # fmt: skip
    n, exclusive, before_decay, out_dtype = steps_per_token, read == "before", erase_read == "before_decay", v.dtype
    dtype = accumulate_dtype(q, log_decay, erase, write)
    g = _decay(log_decay, *q.shape[:2], dtype)
    q, g, cu_steps = _finer_grid(q, g, cu_seqlens, n, first=exclusive)
    e, p = gate(erase.to(dtype), k), k if write_key is None else write_key
    u = gate((erase if write is None else write).to(dtype), v)
    q, p = q.to(e.dtype), p.to(e.dtype)
    heads = max(x.shape[2] for x in (e, p, u, g) if x is not None)
    S0 = None if initial_state is None else initial_state[0]
    if q.shape[1] == 1 and cu_steps is None:
        o, S = _delta_step(q, e, p, u, g, S0, scale, before_decay, exclusive, heads, dtype)
    else:
        size = fit_chunk(CHUNK["delta_rule"] if chunk is None else chunk, q.shape[1])
        o, S, *_ = delta_op(q, e, p, u, g, S0, cu_steps, scale, before_decay, exclusive, heads, size, dtype)
    return _last_steps(o, n, first=exclusive).to(out_dtype), (S,) if return_state else None


@implements("dplr", "torch")
def dplr(q, k, v, a, b, log_decay, scale, log_decay_min, initial_state, return_state, cu_seqlens, chunk=None):
    dtype, out_dtype = accumulate_dtype(q, log_decay, a, b), v.dtype
    g = _decay(log_decay, *q.shape[:2], dtype)
    heads = max(x.shape[2] for x in (k, v, a, b, g) if x is not None)
    S0 = None if initial_state is None else initial_state[0]
    if q.shape[1] == 1 and cu_seqlens is None:
        k_t, v_t, a_t, b_t, g_t = (_token(x, heads, dtype) for x in (k, v, a, b, g))
        S0 = _start(S0, q.shape[0], heads, q.shape[3], v.shape[3], q, dtype)
        S = S0 if g is None else S0 * g_t.exp().unsqueeze(-1)
        S = S + b_t.unsqueeze(-1) * (a_t.unsqueeze(-2) @ S0) + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        o = _read(q, S, scale, dtype)
    else:
        size = fit_chunk(CHUNK["dplr"] if chunk is None else chunk, q.shape[1])
        o, S, *_ = dplr_op(q, a, -b, k, v, g, S0, cu_seqlens, scale, heads, size, dtype)
    return o.to(out_dtype), (S,) if return_state else None
