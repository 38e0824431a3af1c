"""Torch short convolution and token shift: plain PyTorch, differentiable by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype
from linnet.ops.torch import scan, selective_scan  # noqa: F401  (each registers its implementations)
from linnet.ops.torch.scan import last_of_segment, segment_of_token


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
