"""Reference almost-linear RNN and sLSTM: the cells as they are written, row by row and token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, segments


def _run(step, zeros: tuple[Tensor, ...], batch: int, tokens: int, initial_state, return_state: bool, cu_seqlens):
    """Run `state = step(state, b, t)` over every row; the output is the first tensor of the state."""
    out, final = {}, []
    for row, (b, start, end) in enumerate(segments(cu_seqlens, batch, tokens)):
        state = zeros if initial_state is None else tuple(x[row].to(zeros[0].dtype) for x in initial_state)
        for t in range(start, end):
            state = step(state, b, t)
            out[b, t] = state[0]
        final.append(state)
    y = torch.stack([torch.stack([out[b, t] for t in range(tokens)]) for b in range(batch)])
    return y, tuple(map(torch.stack, zip(*final, strict=True))) if return_state else None


@implements("almost_linear_rnn", "reference")
def almost_linear_rnn(
    x_BTM, decay_M, weight_MM, relu_units, target_BTM, strength_BTM, initial_state, return_state, cu_seqlens
):  # fmt: skip
    dtype = accumulate_dtype(x_BTM, decay_M, weight_MM)
    x, decay, W = x_BTM.to(dtype), decay_M.to(dtype), weight_MM.to(dtype)
    target, strength = (None if p is None else p.to(dtype) for p in (target_BTM, strength_BTM))
    linear = x.shape[2] - relu_units

    def step(state, b, t):
        p = state[0]
        if target is not None:
            p = p + strength[b, t] * (target[b, t] - p)
        phi = torch.cat([p[:linear], p[linear:].relu()])
        return (decay * p + W @ phi + x[b, t],)

    z, state = _run(step, (torch.zeros_like(x[0, 0]),), *x.shape[:2], initial_state, return_state, cu_seqlens)
    return z.to(x_BTM.dtype), state


@implements("slstm", "reference")
def slstm(x_BTHGK, weight_HKGK, initial_state, return_state, cu_seqlens):
    dtype = accumulate_dtype(x_BTHGK, weight_HKGK)
    x, R = x_BTHGK.to(dtype), weight_HKGK.to(dtype)

    def step(state, b, t):
        h, C, n, m = state
        i, f, z, o = (x[b, t] + torch.einsum("hk,hkgl->hgl", h, R)).unbind(1)
        kept = torch.nn.functional.logsigmoid(f) + m
        m = torch.where(n == 0, i, torch.maximum(kept, i))
        enter, keep = (i - m).exp(), (kept - m).clamp_max(0).exp()  # the clamp acts only where n = 0
        C, n = keep * C + enter * z.tanh(), keep * n + enter
        return o.sigmoid() * C / n, C, n, m

    zero = torch.zeros_like(x[0, 0, :, 0])
    h, state = _run(step, (zero,) * 4, *x.shape[:2], initial_state, return_state, cu_seqlens)
    return h.to(x_BTHGK.dtype), state
