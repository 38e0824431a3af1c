"""Reference scan, selective scan, short convolution, token shift and running log-sum-exp: token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, segments


def _first(initial_state, row: int, zero: Tensor) -> Tensor:
    """The initial state of one row in the dtype of `zero`, its default."""
    return zero if initial_state is None else initial_state[0][row].to(zero.dtype)


def _recurrence(step, zero: Tensor, batch: int, tokens: int, initial_state, return_state: bool, cu_seqlens):
    """Run `state, y = step(state, b, t)` over every row or segment; stack the outputs [B, T, ...] and final states [N, ...]."""
    out, final = {}, []
    for row, (b, start, end) in enumerate(segments(cu_seqlens, batch, tokens)):
        state = _first(initial_state, row, zero)
        for t in range(start, end):
            state, out[b, t] = step(state, b, t)
        final.append(state)
    y = torch.stack([torch.stack([out[b, t] for t in range(tokens)]) for b in range(batch)])
    return y, (torch.stack(final),) if return_state else None


@implements("scan", "reference")
def scan(x, a, log_a, initial_state, return_state, cu_seqlens):
    dtype = accumulate_dtype(x, a, log_a, *(initial_state or ()))
    a = (a if log_a is None else log_a.to(dtype).exp()).to(dtype).expand(x.shape)

    def step(h, b, t):
        h = a[b, t] * h + x[b, t]
        return h, h

    zero = x.new_zeros(x.shape[2:], dtype=dtype)
    h, state = _recurrence(step, zero, x.shape[0], x.shape[1], initial_state, return_state, cu_seqlens)
    return h.to(dtype if dtype.is_complex else x.dtype), state


@implements("selective_scan", "reference")
def selective_scan(x_BTD, delta_BTD, A_DN, B_BTN, C_BTN, D_D, z_BTD, initial_state, return_state, cu_seqlens):
    dtype = accumulate_dtype(x_BTD, delta_BTD, A_DN)
    width = x_BTD.shape[2]
    x, delta, A = x_BTD.to(dtype), delta_BTD.to(dtype), A_DN.to(dtype)

    def per_channel(p):  # [B, T, N] or [B, T, G, N] -> [B, T, D, N]
        p = (p.unsqueeze(2) if p.ndim == 3 else p).to(dtype)
        return p.repeat_interleave(width // p.shape[2], dim=2)

    B, C = per_channel(B_BTN), per_channel(C_BTN)

    def step(h, b, t):
        h = (delta[b, t, :, None] * A).exp() * h + (delta[b, t] * x[b, t])[:, None] * B[b, t]
        return h, (C[b, t] * h).sum(-1)

    y, state = _recurrence(step, torch.zeros_like(A), x.shape[0], x.shape[1], initial_state, return_state, cu_seqlens)
    if D_D is not None:
        y = y + D_D.to(dtype) * x
    if z_BTD is not None:
        y = y * torch.nn.functional.silu(z_BTD.to(dtype))
    return y.to(x_BTD.dtype), state


@implements("short_conv", "reference")
def short_conv(x_BTD, weight_DW, bias_D, activation, initial_state, return_state, cu_seqlens):
    dtype = accumulate_dtype(x_BTD, weight_DW)
    x, weight = x_BTD.to(dtype), weight_DW.to(dtype)

    def step(past, b, t):  # past [D, W-1], oldest first
        seen = torch.cat([past, x[b, t, :, None]], dim=1)
        return seen[:, 1:], (seen * weight).sum(1)

    zero = x.new_zeros(weight.shape[0], weight.shape[1] - 1)
    y, state = _recurrence(step, zero, x.shape[0], x.shape[1], initial_state, return_state, cu_seqlens)
    if bias_D is not None:
        y = y + bias_D.to(dtype)
    if activation == "silu":
        y = torch.nn.functional.silu(y)
    return y.to(x_BTD.dtype), state


@implements("token_shift", "reference")
def token_shift(x_BTD, initial_state, return_state, cu_seqlens):
    x = x_BTD.to(accumulate_dtype(x_BTD))
    y, state = _recurrence(
        lambda last, b, t: (x[b, t], last), torch.zeros_like(x[0, 0]), *x.shape[:2], initial_state, return_state, cu_seqlens
    )
    return y.to(x_BTD.dtype), state


@implements("cumulative_logsumexp", "reference")
def cumulative_logsumexp(x, initial_state, return_state, cu_seqlens):
    dtype = accumulate_dtype(x)
    values = x.to(dtype)

    def logaddexp(p, q):
        """With gradient 0 where both are -inf (that of torch.logaddexp is NaN there)."""
        nothing = (p == -torch.inf) & (q == -torch.inf)
        return torch.logaddexp(p.masked_fill(nothing, 0), q.masked_fill(nothing, 0)).masked_fill(nothing, -torch.inf)

    def step(y, b, t):
        y = logaddexp(y, values[b, t])
        return y, y

    zero = values.new_full(x.shape[2:], -torch.inf)
    y, state = _recurrence(step, zero, x.shape[0], x.shape[1], initial_state, return_state, cu_seqlens)
    return y.to(x.dtype), state
