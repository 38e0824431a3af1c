r"""Torch diagonal scan h_t = a_t h_{t-1} + x_t and running log-sum-exp, in two levels and recursively, without storing products.

Tokens are n blocks of L = 16. Sweep 1 advances all blocks side by side from zero and multiplies up their decays; the same
scan over the n blocks gives their true starts; sweep 2 advances all blocks again and stores h. Only products of factors
a_t occur, never their inverses, so any decay, down to 0, is exact. Work per element: 5 multiply-adds; memory: h and 2/L of it.

The backward is the same scan in reverse, G_t = dh_t + conj(a_{t+1}) G_{t+1}, with dx = G, da_t = G_t conj(h_{t-1}).

Packed segments: the factor of a segment's first token becomes 0 after a_t h_0 was added to its input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops._autograd import operator, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype

BLOCK = 16


def _sequential(a: Tensor, x: Tensor, h: Tensor | None, out: Tensor, reverse: bool) -> None:
    """out_t = a_t out_{t-1} + x_t along axis 1, at most a few dozen steps."""
    steps = range(x.shape[1])
    for t in reversed(steps) if reverse else steps:
        if h is None:
            out[:, t] = x[:, t]
        else:
            torch.addcmul(x[:, t], a[:, t], h, out=out[:, t])
        h = out[:, t]


def linear_scan(a: Tensor, x: Tensor, h0: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """h_t = a_t h_{t-1} + x_t (reverse: a_t h_{t+1} + x_t), h [B, T, F]; a, x [B, T, F] (any strides), h0 [B, F] or None."""
    tokens = x.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens <= 2 * BLOCK:
        _sequential(a, x, h0, out, reverse)
        return out
    blocks = tokens // BLOCK
    rest = tokens - blocks * BLOCK  # the tokens that fill no block come last in the order of the scan
    body = slice(rest, tokens) if reverse else slice(0, tokens - rest)
    tail = slice(0, rest) if reverse else slice(tokens - rest, tokens)
    a_, x_, out_ = (p[:, body].unflatten(1, (blocks, BLOCK)) for p in (a, x, out))
    order = range(BLOCK - 1, -1, -1) if reverse else range(BLOCK)
    first = order[0]
    local, product = x_[:, :, first].clone(), a_[:, :, first].clone()
    for j in order[1:]:
        torch.addcmul(x_[:, :, j], a_[:, :, j], local, out=local)
        product.mul_(a_[:, :, j])
    ends = linear_scan(product, local, h0, reverse=reverse)
    start = torch.zeros_like(local[:, :1]) if h0 is None else h0.unsqueeze(1)
    h = torch.cat([ends[:, 1:], start] if reverse else [start, ends[:, :-1]], dim=1)
    for j in order:
        h = torch.addcmul(x_[:, :, j], a_[:, :, j], h, out=out_[:, :, j])
    _sequential(a[:, tail], x[:, tail], ends[:, 0 if reverse else -1], out[:, tail], reverse)
    return out


def segment_of_token(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """For every token its segment and whether it is the first of it, [T] each. No host synchronisation."""
    t = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True)
    return segment, cu_seqlens[:-1][segment] == t


def last_of_segment(x: Tensor, cu_seqlens: Tensor | None, initial: Tensor | None, fill: float = 0.0) -> Tensor:
    """The last token of x [B, T, ...] of every row or segment [N, ...]; `initial` or `fill` where a segment is empty."""
    if cu_seqlens is None:
        return x[:, -1].clone()  # a view would keep the whole sequence in memory
    last = x[0][(cu_seqlens[1:].long() - 1).clamp(min=0)]
    empty = (cu_seqlens.diff() == 0).view(-1, *[1] * (x.ndim - 2))
    return torch.where(empty, torch.full_like(last, fill) if initial is None else initial.to(last.dtype), last)


def _prepared(x: Tensor, a: Tensor, h0: Tensor | None, cu: Tensor | None):
    """Factors, inputs and carry with the segment starts worked in, flattened to [B, T, F]."""
    shape = x.shape
    a = a.expand(shape)
    if cu is not None:
        segment, first = segment_of_token(cu, shape[1])
        first = first.view(1, -1, *[1] * (len(shape) - 2))
        if h0 is not None:
            x = torch.where(first, x + a * h0[segment][None], x)
        a, h0 = a.masked_fill(first, 0), None
    flat = lambda p: p.reshape(shape[0], shape[1], -1)  # noqa: E731
    return flat(a), flat(x), None if h0 is None else h0.reshape(shape[0], -1)


@operator("linnet::scan")
def scan_op(x: Tensor, a: Tensor, log: bool, h0: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """h [B, T, ...] in `dtype`; a [B|1, T|1, ...] is the factor, or its logarithm if `log`."""
    a = a.to(dtype).exp() if log else a.to(dtype)
    h0 = None if h0 is None else h0.to(dtype)
    return linear_scan(*_prepared(x.to(dtype), a, h0, cu_seqlens)).view(x.shape)


@scan_op.register_fake
def _(x, a, log, h0, cu_seqlens, dtype):
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@operator("linnet::scan_backward")
def scan_backward_op(
    dh: Tensor, h: Tensor, a: Tensor, log: bool, h0: Tensor | None, cu_seqlens: Tensor | None, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a (summed over the axes along which it is constant) and h0 (empty without h0)."""
    dtype, shape = h.dtype, h.shape
    factor = (a.to(dtype).exp() if log else a.to(dtype)).conj().resolve_conj().expand(shape)
    start = None if h0 is None else h0.to(dtype)
    following = torch.cat([factor[:, 1:], torch.zeros_like(factor[:, :1])], dim=1)
    if cu_seqlens is not None:
        segment, first = segment_of_token(cu_seqlens, shape[1])
        first = first.view(1, -1, *[1] * (len(shape) - 2))
        following[:, :-1].masked_fill_(first[:, 1:], 0)
    G = linear_scan(following.reshape(*shape[:2], -1), dh.reshape(*shape[:2], -1), reverse=True).view(shape)
    entry = torch.zeros_like(h[:, :1]) if start is None or cu_seqlens is not None else start.unsqueeze(1)
    previous, dh0 = torch.cat([entry, h[:, :-1]], 1), h.new_empty(0)
    if cu_seqlens is not None:
        previous = torch.where(first, 0 if start is None else start[segment][None], previous)
        if start is not None:
            entering = torch.where(first, factor * G, 0)[0]
            dh0 = torch.zeros_like(start).index_add_(0, segment, entering)
    elif start is not None:
        dh0 = factor[:, 0] * G[:, 0]
    da = G * previous.conj()
    if log:
        da = da * factor
    if not a.is_complex():
        da = da.real if da.is_complex() else da
    dx = G if x_dtype.is_complex or not G.is_complex() else G.real
    if h0 is not None and dh0.is_complex() and not h0.is_complex():
        dh0 = dh0.real
    return (
        dx.to(x_dtype, copy=True), da.sum_to_size(a.shape).to(a.dtype, copy=True),
        dh0.to(h0.dtype, copy=True) if h0 is not None else dh0,
    )  # fmt: skip


@scan_backward_op.register_fake
def _(dh, h, a, log, h0, cu_seqlens, x_dtype):
    dx = torch.empty(h.shape, dtype=x_dtype, device=h.device)
    return dx, a.new_empty(a.shape), h.new_empty(0) if h0 is None else h0.new_empty(h0.shape)


def _setup(ctx, inputs, output):
    x, a, ctx.log, h0, cu_seqlens, _ = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(output, a, h0, cu_seqlens)


def _backward(ctx, dh):
    h, a, h0, cu_seqlens = ctx.saved_tensors
    dx, da, dh0 = torch.ops.linnet.scan_backward(dh, h, a, ctx.log, h0, cu_seqlens, ctx.x_dtype)
    return dx, da, None, dh0 if h0 is not None else None, None, None


scan_op.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(scan_backward_op)


@implements("scan", "torch")
def scan(x, a, log_a, initial_state, return_state, cu_seqlens):
    dtype = accumulate_dtype(x, a, log_a, *(initial_state or ()))
    h0 = None if initial_state is None else initial_state[0]
    h = scan_op(x, a if log_a is None else log_a, log_a is not None, h0, cu_seqlens, dtype)
    state = (last_of_segment(h, cu_seqlens, h0),) if return_state else None
    return h.to(dtype if dtype.is_complex else x.dtype), state


# ---- running log-sum-exp ---------------------------------------------------------------------------------------------


@operator("linnet::cumulative_logsumexp")
def logsumexp_op(x: Tensor, y0: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y [B, T, ...] in `dtype`.  With M_t the running maximum, y = M + log s, s_t = e^{M_{t-1} - M_t} s_{t-1} + e^{x_t - M_t}."""
    x = x.to(dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    offsets = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    for i, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if start == end:
            continue
        part = x[:, start:end]
        y = None if y0 is None else (y0 if cu_seqlens is None else y0[i : i + 1]).to(dtype)
        seen = part if y is None else torch.cat([y.unsqueeze(1), part], 1)
        top = seen.cummax(1).values
        top.masked_fill_(top == -torch.inf, 0)  # nothing seen yet
        factor = (top[:, :-1] - top[:, 1:]).clamp_(max=0).exp_()
        weight = (seen - top).exp_()
        flat = lambda p: p.reshape(p.shape[0], p.shape[1], -1)  # noqa: E731
        s = linear_scan(flat(factor), flat(weight[:, 1:]), flat(weight[:, :1])[:, 0]) if seen.shape[1] > 1 else None
        whole = weight if s is None else torch.cat([weight[:, :1], s.view(weight[:, 1:].shape)], 1)
        y = whole.log_().add_(top)
        out[:, start:end] = y[:, y.shape[1] - (end - start) :]
    return out


@logsumexp_op.register_fake
def _(x, y0, cu_seqlens, dtype):
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _weight(x: Tensor, y: Tensor) -> Tensor:
    """e^{x - y} for x <= y, 0 where x = -inf."""
    return (x - y).masked_fill(x == -torch.inf, -torch.inf).exp()


@operator("linnet::cumulative_logsumexp_backward")
def logsumexp_backward_op(dy: Tensor, y: Tensor, x: Tensor, y0: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x and y0: c_t = dy_t + e^{y_t - y_{t+1}} c_{t+1}, dx_t = e^{x_t - y_t} c_t, dy_0 = e^{y_0 - y_1} c_1."""
    dtype, shape = y.dtype, y.shape
    factor = torch.cat([_weight(y[:, :-1], y[:, 1:]), torch.zeros_like(y[:, :1])], 1)
    if cu_seqlens is not None:
        segment, first = segment_of_token(cu_seqlens, shape[1])
        first = first.view(1, -1, *[1] * (len(shape) - 2))
        factor[:, :-1].masked_fill_(first[:, 1:], 0)
    flat = lambda p: p.reshape(shape[0], shape[1], -1)  # noqa: E731
    c = linear_scan(flat(factor), flat(dy), reverse=True).view(shape)
    dx = (_weight(x.to(dtype), y) * c).to(x.dtype)
    if y0 is None:
        return dx, y.new_empty(0)
    start = y0.to(dtype)
    if cu_seqlens is None:
        dy0 = _weight(start, y[:, 0]) * c[:, 0]
    else:
        entering = torch.where(first, _weight(start[segment][None], y) * c, 0)[0]
        dy0 = torch.zeros_like(start).index_add_(0, segment, entering)
    return dx, dy0.to(y0.dtype)


@logsumexp_backward_op.register_fake
def _(dy, y, x, y0, cu_seqlens):
    return x.new_empty(x.shape), y.new_empty(0) if y0 is None else y0.new_empty(y0.shape)


def _logsumexp_setup(ctx, inputs, output):
    x, y0, cu_seqlens, _ = inputs
    ctx.save_for_backward(output, x, y0, cu_seqlens)


def _logsumexp_backward(ctx, dy):
    y, x, y0, cu_seqlens = ctx.saved_tensors
    dx, dy0 = torch.ops.linnet.cumulative_logsumexp_backward(dy, y, x, y0, cu_seqlens)
    return dx, dy0 if y0 is not None else None, None, None


logsumexp_op.register_autograd(_logsumexp_backward, setup_context=_logsumexp_setup)
refuse_double_backward(logsumexp_backward_op)


@implements("cumulative_logsumexp", "torch")
def cumulative_logsumexp(x, initial_state, return_state, cu_seqlens):
    y0 = None if initial_state is None else initial_state[0]
    y = logsumexp_op(x, y0, cu_seqlens, accumulate_dtype(x))
    state = (last_of_segment(y, cu_seqlens, y0, -torch.inf),) if return_state else None
    return y.to(x.dtype), state
