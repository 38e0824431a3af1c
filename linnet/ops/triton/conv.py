"""Backend `triton` of short_conv: custom operators around the GPU kernels. Triton itself is imported at the first call."""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

import importlib

import torch
from torch import Tensor

from linnet.ops._autograd import operator, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops.triton._support import refusal

MAX_TAPS = 8


def _kernels():
    return importlib.import_module("linnet.ops.triton._kernel_conv")


def supports(arguments: dict) -> str | None:
    """Reason why a call cannot run on these kernels, None if it can."""
    if arguments["weight_DW"].shape[1] > MAX_TAPS:
        return f"more than {MAX_TAPS} taps do not fit the registers"
    if arguments["x_BTD"].shape[1] == 1:
        return "a single token is no work for this kernel"
    return refusal(arguments["x_BTD"], arguments["weight_DW"], arguments["bias_D"], *(arguments["initial_state"] or ()))


@operator("linnet::triton_short_conv")
def conv_op(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool) -> Tensor:
    """x [B, T, D], weight [D, W], past [N, W-1, D], oldest first."""
    return _kernels().forward(x, weight, bias, past, cu_seqlens, silu)


@conv_op.register_fake
def _(x, weight, bias, past, cu_seqlens, silu):
    return x.new_empty(x.shape)


@operator("linnet::triton_short_conv_backward")
def conv_backward_op(
    dz: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _kernels().backward(dz, x, weight, bias, past, cu_seqlens, silu)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@conv_backward_op.register_fake
def _(dz, x, weight, bias, past, cu_seqlens, silu):
    new = lambda p: x.new_empty(0) if p is None else p.new_empty(p.shape)
    return new(x), new(weight), new(bias), new(past)


def _setup(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dz):
    x, weight, bias, past, cu_seqlens = ctx.saved_tensors
    grads = conv_backward_op(dz, x, weight, bias, past, cu_seqlens, ctx.silu)
    return *(None if p is None else g for p, g in zip((x, weight, bias, past), grads, strict=True)), None, None


conv_op.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(conv_backward_op)


def _last_inputs(x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, count: int) -> Tensor:
    """The last `count` inputs of every row, oldest first [N, count, D] in fp32; before its first token its state, or zeros."""
    T = x.shape[1]
    if cu_seqlens is None:
        own = x[:, max(T - count, 0) :].float()
        if T >= count:
            return own
        before = x.new_zeros(x.shape[0], count, x.shape[2], dtype=own.dtype) if past is None else past
        return torch.cat([before, own], 1)[:, T:]
    cu = cu_seqlens.long()
    back = torch.arange(count, 0, -1, device=x.device)  # tokens before the end
    index = cu[1:, None] - back
    inside = (index >= cu[:-1, None])[..., None]
    values = torch.where(inside, x[0][index.clamp(0, T - 1)].float(), 0)
    if past is None or count == 0:
        return values
    slot = (count - back + cu.diff()[:, None]).clamp_max(count - 1)  # what remains of the old state moves towards the past
    return torch.where(inside, values, past.gather(1, slot[..., None].expand_as(past)))


@implements("short_conv", "triton", supports)
def short_conv(x_BTD, weight_DW, bias_D, activation, initial_state, return_state, cu_seqlens):
    W = weight_DW.shape[1]
    past = initial_state[0].float().mT.contiguous() if initial_state is not None and W > 1 else None
    y = conv_op(x_BTD, weight_DW.contiguous(), bias_D, past, cu_seqlens, activation == "silu")
    state = (_last_inputs(x_BTD, past, cu_seqlens, W - 1).mT.contiguous(),) if return_state else None
    return y, state
