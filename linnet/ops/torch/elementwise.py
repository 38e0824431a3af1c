"""Torch short convolution and token shift: plain PyTorch, differentiable by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype
from linnet.ops.torch import scan, selective_scan  # noqa: F401  (each registers its implementations)
from linnet.ops.torch.scan import last_of_segment, segment_of_token


def _packed_past(x_BTD: Tensor, past_NDW: Tensor | None, cu: Tensor, taps: int) -> list[Tensor]:
    """x_{t-s} for s = taps-1 ... 0 inside each segment, taken from `past` (or zero) before its first token; [1, T, D] each."""
    tokens = x_BTD.shape[1]
    segment, _ = segment_of_token(cu, tokens)
    position = torch.arange(tokens, device=x_BTD.device) - cu[:-1].long()[segment]
    shifted = []
    for s in range(taps - 1, -1, -1):
        x = F.pad(x_BTD, (0, 0, s, 0))[:, :tokens]
        outside = position < s
        # slot taps - 1 - s + position of the state holds x_{t-s}; any slot where the token itself is in the segment
        slot = (taps - 1 - s + position).clamp(max=max(taps - 2, 0))
        before = 0 if past_NDW is None or s == 0 else past_NDW[segment, :, slot][None]
        shifted.append(torch.where(outside[None, :, None], before, x))
    return shifted


def _packed_state(x_BTD: Tensor, past_NDW: Tensor | None, cu: Tensor, taps: int) -> Tensor:
    """The last taps-1 inputs of every segment [N, D, taps-1]."""
    start, end = cu[:-1].long(), cu[1:].long()
    source = end[:, None] - (taps - 1) + torch.arange(taps - 1, device=cu.device)  # [N, W-1]
    inside = source >= start[:, None]
    new = x_BTD[0][source.clamp(min=0)].mT
    if past_NDW is None:
        return torch.where(inside[:, None], new, 0)
    slot = (source - start[:, None] + taps - 1).clamp(max=max(taps - 2, 0))
    old = past_NDW.gather(2, slot[:, None].expand_as(new))
    return torch.where(inside[:, None], new, old)


@implements("short_conv", "torch")
def short_conv(x_BTD, weight_DW, bias_D, activation, initial_state, return_state, cu_seqlens):
    dtype = accumulate_dtype(x_BTD, weight_DW)
    x, weight = x_BTD.to(dtype), weight_DW.to(dtype)
    tokens, taps = x.shape[1], weight.shape[1]
    past = initial_state[0].to(dtype) if initial_state is not None else None
    # a sum of shifted products: faster than conv1d, whose depthwise form wants [B, D, T], and causal to the bit
    if cu_seqlens is None:
        seen = F.pad(x, (0, 0, taps - 1, 0)) if past is None else torch.cat([past.mT, x], 1)
        shifted = [seen[:, w : w + tokens] for w in range(taps)]
    else:
        shifted = _packed_past(x, past, cu_seqlens, taps)
    tap = weight.T.contiguous()  # strided weights would keep the products out of the vector units
    y = shifted[-1] * tap[-1] if bias_D is None else torch.addcmul(bias_D.to(dtype), shifted[-1], tap[-1])
    for w in range(taps - 2, -1, -1):
        y.addcmul_(shifted[w], tap[w])
    if activation == "silu":
        y = F.silu(y)
    state = None
    if return_state:
        last = seen[:, tokens:].mT if cu_seqlens is None else _packed_state(x, past, cu_seqlens, taps)
        state = (last.contiguous(),)
    return y.to(x_BTD.dtype), state


@implements("token_shift", "torch")
def token_shift(x_BTD, initial_state, return_state, cu_seqlens):
    x0 = None if initial_state is None else initial_state[0]
    if cu_seqlens is None:
        first = torch.zeros_like(x_BTD[:, :1]) if x0 is None else x0.to(x_BTD.dtype).unsqueeze(1)
        y = torch.cat([first, x_BTD[:, :-1]], 1)
    else:
        segment, first = segment_of_token(cu_seqlens, x_BTD.shape[1])
        entering = 0 if x0 is None else x0.to(x_BTD.dtype)[segment][None]
        y = torch.where(first[None, :, None], entering, F.pad(x_BTD, (0, 0, 1, 0))[:, :-1])
    if not return_state:
        return y, None
    x = x_BTD.to(accumulate_dtype(x_BTD))
    return y, (last_of_segment(x, cu_seqlens, x0),)
