"""Causal depthwise convolution over a few taps, as a custom operator.

    y_t = bias + sum_j tap_j x_{t-j},  j = 0 .. W-1, over the tokens of t's own row or segment (the initial state before them)
    dx_t = sum_j tap_j dy_{t+j},   dtap_j = sum_t dy_t x_{t-j},   and z = silu(y) on top where asked for

A sum of shifted products over blocks of time that stay in the cache: faster on the CPU than conv1d, whose depthwise form wants
the time axis last, and causal to the bit. The shifts run over segment boundaries; the W - 1 tokens beside each boundary are then
computed again from their own segment alone, so that nothing of a neighbour remains, not even a NaN.
"""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops._autograd import operator, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype

BLOCK = 1 << 18  # elements of one block of time


def _blocks(tokens: int, width: int):
    step = max(64, BLOCK // max(width, 1))
    return [(t, min(t + step, tokens)) for t in range(0, tokens, step)]


def _shifted_sum(x: Tensor, taps: Tensor, bias: Tensor | None, later: bool) -> Tensor:
    """y_t = bias + sum_j taps[j] x_{t-j} (x_{t+j} if `later`) with zeros outside [0, T); x [B, T, D], taps [W, D]."""
    T = x.shape[1]
    y = torch.empty_like(x)
    for a, b in _blocks(T, x.shape[0] * x.shape[2]):
        if bias is None:
            torch.mul(x[:, a:b], taps[0], out=y[:, a:b])
        else:
            torch.addcmul(bias, x[:, a:b], taps[0], out=y[:, a:b])
        for j in range(1, min(taps.shape[0], T)):
            if later:
                end = min(b, T - j)
                if end > a:
                    y[:, a:end].addcmul_(x[:, a + j : end + j], taps[j])
            else:
                start = max(a, j)
                if b > start:
                    y[:, start:b].addcmul_(x[:, start - j : b - j], taps[j])
    return y


def _beside_boundaries(cu_seqlens: Tensor | None, batch: int, tokens: int, W: int, after: bool, device) -> tuple[Tensor, ...]:
    """The tokens at distance < W-1 after the start (or before the end) of their segment: batch row, token, segment, distance."""
    if cu_seqlens is None:
        edges = torch.zeros(batch, dtype=torch.long, device=device) + (0 if after else tokens)
        rows = torch.arange(batch, device=device)
        lengths = torch.full_like(edges, tokens)
    else:
        cu = cu_seqlens.long()
        edges, lengths = (cu[:-1] if after else cu[1:]), cu.diff()
        rows = torch.zeros_like(edges)
    distance = torch.arange(W - 1, device=device)
    inside = distance < lengths[:, None]
    segment, d = inside.nonzero(as_tuple=True)
    token = edges[segment] + d if after else edges[segment] - 1 - d
    return rows[segment], token, segment, d


def _start_rows(x: Tensor, past: Tensor | None, taps: Tensor, bias: Tensor | None, where: tuple[Tensor, ...]) -> Tensor:
    """y at the first tokens of the segments, from their own tokens and state; past [N, W-1, D]."""
    row, token, segment, d = where
    y = x[row, token] * taps[0]
    if bias is not None:
        y = y + bias
    for j in range(1, taps.shape[0]):
        own = (d >= j)[:, None]
        value = torch.where(own, x[row, (token - j).clamp_min(0)], 0)
        if past is not None:
            value = torch.where(own, value, past[segment, (past.shape[1] + d - j).clamp(0, past.shape[1] - 1)])
        y = y.addcmul(value, taps[j])
    return y


def _needs_edges(past: Tensor | None, cu_seqlens: Tensor | None, W: int) -> bool:
    return W > 1 and (past is not None or cu_seqlens is not None)


def _convolve(x: Tensor, taps: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    y = _shifted_sum(x, taps, bias, later=False)
    if _needs_edges(past, cu_seqlens, taps.shape[0]):
        where = _beside_boundaries(cu_seqlens, x.shape[0], x.shape[1], taps.shape[0], True, x.device)
        y[where[0], where[1]] = _start_rows(x, past, taps, bias, where)
    return y


@operator("linnet::short_conv")
def conv_op(x: Tensor, taps: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool) -> Tensor:
    """x [B, T, D], taps [W, D] (tap j multiplies x_{t-j}), past [N, W-1, D], oldest first."""
    y = _convolve(x, taps, bias, past, cu_seqlens)
    return F.silu(y, inplace=True) if silu else y


@conv_op.register_fake
def _(x, taps, bias, past, cu_seqlens, silu):
    return torch.empty_like(x)


@operator("linnet::short_conv_backward")
def conv_backward_op(
    dz: Tensor, x: Tensor, taps: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W, T = taps.shape[0], x.shape[1]
    dy = torch.ops.aten.silu_backward(dz, _convolve(x, taps, bias, past, cu_seqlens)) if silu else dz.contiguous()
    dx = _shifted_sum(dy, taps, None, later=True)
    dtaps = torch.zeros_like(taps)
    for j in range(min(W, T)):
        for a, b in _blocks(T - j, x.shape[0] * x.shape[2]):
            dtaps[j] += (dy[:, a + j : b + j] * x[:, a:b]).sum((0, 1))
    dpast = torch.zeros_like(past) if past is not None else taps.new_empty(0)
    if _needs_edges(past, cu_seqlens, W):
        row, token, segment, d = _beside_boundaries(cu_seqlens, x.shape[0], T, W, False, x.device)
        ends = dy[row, token] * taps[0]
        for j in range(1, W):  # d tokens of the segment follow
            later = torch.where((d >= j)[:, None], dy[row, (token + j).clamp_max(T - 1)], 0)
            ends = ends.addcmul(later, taps[j])
        dx[row, token] = ends
        row, token, segment, d = _beside_boundaries(cu_seqlens, x.shape[0], T, W, True, x.device)
        at_start = dy[row, token]
        for j in range(1, W):
            foreign = (d < j)[:, None]
            if cu_seqlens is not None:
                wrong = torch.where(foreign & (token >= j)[:, None], x[row, (token - j).clamp_min(0)], 0)
                dtaps[j] -= (at_start * wrong).sum(0)
            if past is not None:
                slot = past.shape[1] + d - j
                own = torch.where(foreign, past[segment, slot.clamp(0, W - 2)], 0)
                dtaps[j] += (at_start * own).sum(0)
                chosen = foreign[:, 0]
                dpast.index_put_((segment[chosen], slot[chosen]), at_start[chosen] * taps[j], accumulate=True)
    dbias = dy.sum((0, 1)) if bias is not None else taps.new_empty(0)
    return dx, dtaps, dbias, dpast


@conv_backward_op.register_fake
def _(dz, x, taps, bias, past, cu_seqlens, silu):
    like = lambda y: taps.new_empty(0) if y is None else torch.empty_like(y)
    return torch.empty_like(x), torch.empty_like(taps), like(bias), like(past)


def _setup(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dz):
    x, taps, bias, past, cu_seqlens = ctx.saved_tensors
    dx, dtaps, dbias, dpast = conv_backward_op(dz, x, taps, bias, past, cu_seqlens, ctx.silu)
    return dx, dtaps, None if bias is None else dbias, None if past is None else dpast, None, None


conv_op.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(conv_backward_op)


def _state(x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, W: int) -> Tensor:
    """The last W-1 inputs of every row, oldest first [N, W-1, D]; before a row's first token comes its state, or zeros."""
    back = torch.arange(W - 1, 0, -1, device=x.device)  # tokens before the end
    if cu_seqlens is None:
        if past is None:
            past = x.new_zeros(x.shape[0], W - 1, x.shape[2])
        return torch.cat([past, x], 1)[:, x.shape[1] :]
    cu = cu_seqlens.long()
    index = cu[1:, None] - back
    own = (index >= cu[:-1, None])[..., None]
    values = torch.where(own, x[0][index.clamp(0, x.shape[1] - 1)], 0)
    if past is None:
        return values
    slot = (W - 1 - back + cu.diff()[:, None]).clamp_max(W - 2)  # what remains of the old state moves towards the past
    return torch.where(own, values, past.gather(1, slot[..., None].expand_as(past)))


@implements("short_conv", "torch")
def short_conv(x_BTD, weight_DW, bias_D, activation, initial_state, return_state, cu_seqlens):
    dtype = accumulate_dtype(x_BTD, weight_DW)
    x, W = x_BTD.to(dtype), weight_DW.shape[1]
    taps = weight_DW.to(dtype).flip(1).mT.contiguous()
    past = initial_state[0].to(dtype).mT.contiguous() if initial_state is not None and W > 1 else None
    bias = None if bias_D is None else bias_D.to(dtype)
    if x.shape[1] == 1 and cu_seqlens is None:  # one decoded token
        seen = _state(x, past, None, W + 1) if past is None else torch.cat([past, x], 1)
        y = (seen.flip(1) * taps).sum(1, keepdim=True)
        y = y if bias is None else y + bias
        y = F.silu(y) if activation == "silu" else y
    else:
        y = conv_op(x, taps, bias, past, cu_seqlens, activation == "silu")
    state = (_state(x, past, cu_seqlens, W).mT.contiguous(),) if return_state else None
    return y.to(x_BTD.dtype), state
