"""Reference long convolution: one token at a time, from the inputs that its kernel covers."""

from __future__ import annotations

import torch

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, segments


@implements("long_conv", "reference")
def long_conv(u_BTD, kernel_DL, skip_D, lookahead, method, initial_state, return_state, cu_seqlens):
    dtype = accumulate_dtype(u_BTD, kernel_DL)
    (batch, tokens, width), lags = u_BTD.shape, kernel_DL.shape[1]
    u = u_BTD.to(dtype)
    kernel = kernel_DL.to(dtype).repeat_interleave(width // kernel_DL.shape[0], 0).mT.flip(0)  # [L, D], the oldest input first
    y, final = {}, []
    for row, (b, start, end) in enumerate(segments(cu_seqlens, batch, tokens)):
        past = u.new_zeros(lags - 1, width) if initial_state is None else initial_state[0][row].to(dtype).mT
        seen = torch.cat([past, u[b, start:end], u.new_zeros(lookahead, width)])
        for t in range(end - start):
            y[b, start + t] = (seen[t + lookahead : t + lookahead + lags] * kernel).sum(0)
        final.append(seen[end - start : end - start + lags - 1].mT)
    y = torch.stack([torch.stack([y[b, t] for t in range(tokens)]) for b in range(batch)])
    if skip_D is not None:
        y = y + skip_D.to(dtype) * u
    return y.to(u_BTD.dtype), (torch.stack(final),) if return_state else None
