"""Torch norms: plain PyTorch, differentiable by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype

_ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


@implements("gated_rms_norm", "torch")
def gated_rms_norm(x, gate, weight, eps, activation, norm_before_gate, groups):
    y = x.to(accumulate_dtype(x))
    factor = None if gate is None else _ACTIVATIONS[activation](gate.to(accumulate_dtype(gate)))
    if factor is not None and not norm_before_gate:
        y = y * factor
    y = y.unflatten(-1, (groups, -1))
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        y = y * weight
    if factor is not None and norm_before_gate:
        y = y * factor
    return y.to(x.dtype)


@implements("gated_linear_unit", "torch")
def gated_linear_unit(x, gate, activation):
    dtype = accumulate_dtype(x, gate)
    return (x.to(dtype) * _ACTIVATIONS[activation](gate.to(dtype))).to(x.dtype)


@implements("l2_norm", "torch")
def l2_norm(x, eps):
    y = x.to(accumulate_dtype(x))
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
