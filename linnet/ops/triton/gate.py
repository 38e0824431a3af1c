"""Backend `triton` of the gated linear unit: custom operators around GPU kernels. Triton itself is imported at the first call."""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

import importlib

from torch import Tensor

from linnet.ops._autograd import operator, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops.triton._support import refusal


def _kernels():
    return importlib.import_module("linnet.ops.triton._kernel_gate")


def supports(arguments: dict) -> str | None:
    """Reason why a call cannot run on these kernels, None if it can."""
    return refusal(arguments["x"], arguments["gate"])


@operator("linnet::triton_gated_linear_unit")
def gate_op(x: Tensor, gate: Tensor, silu: bool) -> Tensor:
    return _kernels().forward(x, gate, silu)


@gate_op.register_fake
def _(x, gate, silu):
    return x.new_empty(x.shape)


@operator("linnet::triton_gated_linear_unit_backward")
def gate_backward_op(dy: Tensor, x: Tensor, gate: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    return _kernels().backward(dy, x, gate, silu)


@gate_backward_op.register_fake
def _(dy, x, gate, silu):
    return x.new_empty(x.shape), gate.new_empty(gate.shape)


def _setup(ctx, inputs, output):
    x, gate, ctx.silu = inputs
    ctx.save_for_backward(x, gate)


def _backward(ctx, dy):
    return *gate_backward_op(dy, *ctx.saved_tensors, ctx.silu), None


gate_op.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(gate_backward_op)


@implements("gated_linear_unit", "triton", supports)
def gated_linear_unit(x, gate, activation):
    return gate_op(x, gate, activation == "silu")
