"""Reference norms: the formulas."""

from __future__ import annotations

import torch

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype


@implements("gated_rms_norm", "reference")
def gated_rms_norm(x, gate, weight, eps, activation, norm_before_gate, groups):
    dtype = accumulate_dtype(x, gate, weight)
    y, factor = x.to(dtype), 1.0
    if gate is not None:
        z = gate.to(dtype)
        factor = torch.sigmoid(z) * (z if activation == "silu" else 1.0)
    if not norm_before_gate:
        y = y * factor
    blocks = y.unflatten(-1, (groups, -1))
    y = (blocks / (blocks.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
    if weight is not None:
        y = y * weight.to(dtype)
    return (y * factor if norm_before_gate else y).to(x.dtype)


@implements("gated_linear_unit", "reference")
def gated_linear_unit(x, gate, activation):
    dtype = accumulate_dtype(x, gate)
    z = gate.to(dtype)
    return (x.to(dtype) * torch.sigmoid(z) * (z if activation == "silu" else 1.0)).to(x.dtype)


@implements("l2_norm", "reference")
def l2_norm(x, eps):
    y = x.to(accumulate_dtype(x))
    return (y / (y.square().sum(-1, keepdim=True) + eps).sqrt()).to(x.dtype)
