"""Backend `triton` of the norms: custom operators around the GPU kernels. Triton itself is imported at the first call."""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

import importlib

from torch import Tensor

from linnet.ops._autograd import operator, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops.triton._support import refusal

WIDEST = 16384


def _kernels():
    return importlib.import_module("linnet.ops.triton._kernel_norm")


def supports(arguments: dict) -> str | None:
    """Reason why a call cannot run on these kernels, None if it can."""
    x = arguments["x"]
    if x.shape[-1] // arguments.get("groups", 1) > WIDEST:
        return f"rows of more than {WIDEST} values do not fit the registers"
    return refusal(x, arguments.get("gate"), arguments.get("weight"))


@operator("linnet::triton_norm")
def norm_op(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, silu: bool, first: bool, groups: int, mean: bool
) -> Tensor:
    """The gated RMSNorm; without `mean` the L2 norm. `first`: the norm comes before the gate."""
    return _kernels().forward(x, gate, weight, eps, silu, first, groups, mean)


@norm_op.register_fake
def _(x, gate, weight, eps, silu, first, groups, mean):
    return x.new_empty(x.shape)


@operator("linnet::triton_norm_backward")
def norm_backward_op(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, silu: bool, first: bool, groups: int, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _kernels().backward(dy, x, gate, weight, eps, silu, first, groups, mean)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@norm_backward_op.register_fake
def _(dy, x, gate, weight, eps, silu, first, groups, mean):
    new = lambda p: x.new_empty(0) if p is None else p.new_empty(p.shape)
    return new(x), new(gate), new(weight)


def _setup(ctx, inputs, output):
    x, gate, weight, *ctx.options = inputs
    ctx.save_for_backward(x, gate, weight)


def _backward(ctx, dy):
    tensors = ctx.saved_tensors
    grads = norm_backward_op(dy, *tensors, *ctx.options)
    return *(None if p is None else g for p, g in zip(tensors, grads, strict=True)), None, None, None, None, None


norm_op.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(norm_backward_op)


@implements("gated_rms_norm", "triton", supports)
def gated_rms_norm(x, gate, weight, eps, activation, norm_before_gate, groups):
    return norm_op(x, gate, weight, eps, activation == "silu", norm_before_gate, groups, True)


@implements("l2_norm", "triton", supports)
def l2_norm(x, eps):
    return norm_op(x, None, None, eps, False, True, 1, False)
