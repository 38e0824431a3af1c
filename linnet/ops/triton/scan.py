"""Backend `triton` of scan: custom operators around the GPU kernels. Triton itself is imported at the first call."""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

import importlib

import torch
from torch import Tensor

from linnet.ops._autograd import operator, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops.triton._support import refusal


def _kernels():
    return importlib.import_module("linnet.ops.triton._kernel_scan")


def supports(arguments: dict) -> str | None:
    """Reason why a call cannot run on these kernels, None if it can."""
    return refusal(arguments["x"], arguments["a"], arguments["log_a"], *(arguments["initial_state"] or ()))


@operator("linnet::triton_scan")
def scan_op(x: Tensor, a: Tensor, log: bool, h0: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """h [B, T, F] and the final state [N, F]; a [B|1, T|1, F] is the factor, or its logarithm if `log`."""
    return _kernels().forward(x, a, log, h0, cu_seqlens)


@scan_op.register_fake
def _(x, a, log, h0, cu_seqlens):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(rows, x.shape[2], dtype=torch.float32)


@operator("linnet::triton_scan_backward")
def scan_backward_op(
    dh: Tensor, dfinal: Tensor | None, h: Tensor, a: Tensor, log: bool, h0: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dx, da, dh0 = _kernels().backward(dh, dfinal, h, a, log, h0, cu_seqlens)
    return dx, da, dx.new_empty(0, dtype=torch.float32) if dh0 is None else dh0


@scan_backward_op.register_fake
def _(dh, dfinal, h, a, log, h0, cu_seqlens):
    return torch.empty_like(h), a.new_empty(a.shape), h.new_empty(0 if h0 is None else h0.shape, dtype=torch.float32)


def _setup(ctx, inputs, output):
    _, a, ctx.log, h0, cu_seqlens = inputs
    ctx.save_for_backward(output[0], a, h0, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, dfinal):
    h, a, h0, cu_seqlens = ctx.saved_tensors
    dh = torch.zeros_like(h) if dh is None else dh
    dx, da, dh0 = scan_backward_op(dh, dfinal, h, a, ctx.log, h0, cu_seqlens)
    return dx, da, None, None if h0 is None else dh0.to(h0.dtype), None


scan_op.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(scan_backward_op)


@implements("scan", "triton", supports)
def scan(x, a, log_a, initial_state, return_state, cu_seqlens):
    log, a = (False, a) if log_a is None else (True, log_a)
    if a.shape[2:] != x.shape[2:]:
        a = a.expand(*a.shape[:2], *x.shape[2:])
    flat = lambda p: p.reshape(p.shape[0], p.shape[1], -1)
    h0 = None if initial_state is None else initial_state[0].flatten(1)
    h, final = scan_op(flat(x), flat(a), log, h0 if h0 is None else h0.contiguous(), cu_seqlens)
    return h.view(x.shape), (final.view(-1, *x.shape[2:]),) if return_state else None
