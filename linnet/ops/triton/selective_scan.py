"""Backend `triton` of selective_scan: custom operators around the GPU kernels. Triton itself is imported at the first call."""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

import importlib
import math

import torch
from torch import Tensor

from linnet.ops._autograd import operator, records, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops.triton import _scan_table
from linnet.ops.triton._support import refusal

MAX_STATE = 128


def _kernels():
    return importlib.import_module("linnet.ops.triton._kernel_selective_scan")


def supports(arguments: dict) -> str | None:
    """Reason why a call cannot run on these kernels, None if it can."""
    if arguments["A_DN"].shape[1] > MAX_STATE:
        return f"more than {MAX_STATE} state channels do not fit the registers"
    tensors = [arguments[n] for n in ("delta_BTD", "A_DN", "B_BTN", "C_BTN", "D_D", "z_BTD")]
    return refusal(arguments["x_BTD"], *tensors, *(arguments["initial_state"] or ()))


@operator("linnet::triton_selective_scan")
def selective_scan_op(
    delta: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor | None, z: Tensor | None, h0: Tensor | None,
    cu_seqlens: Tensor | None, groups: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y [B, T, D], the final state [rows, N, D], the states before every few tokens (empty unless `keep`); A [N, D]."""
    return _kernels().forward(delta, x, A, B, C, skip, z, h0, cu_seqlens, groups, keep)


@selective_scan_op.register_fake
def _(delta, x, A, B, C, skip, z, h0, cu_seqlens, groups, keep):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    L = _scan_table.choose("selective_scan", x).U
    chunks = x.shape[1] // L + rows if cu_seqlens is not None else rows * -(-x.shape[1] // L)
    dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    final = x.new_empty(rows, *A.shape, dtype=torch.float32)
    return x.new_empty(x.shape), final, x.new_empty((chunks, *A.shape) if keep else 0, dtype=dtype)


@operator("linnet::triton_selective_scan_backward")
def selective_scan_backward_op(
    dy: Tensor, dfinal: Tensor | None, kept: Tensor, delta: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor,
    skip: Tensor | None, z: Tensor | None, h0: Tensor | None, cu_seqlens: Tensor | None, groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _kernels().backward(dy, dfinal, kept, delta, x, A, B, C, skip, z, h0, cu_seqlens, groups)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@selective_scan_backward_op.register_fake
def _(dy, dfinal, kept, delta, x, A, B, C, skip, z, h0, cu_seqlens, groups):
    new = lambda p: x.new_empty(0) if p is None else p.new_empty(p.shape)
    return tuple(new(p) for p in (delta, x, A, B, C, skip, z, h0))


def _setup(ctx, inputs, output):
    *tensors, ctx.groups, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal, _):
    kept, *tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[1]) if dy is None else dy
    if dfinal is not None:
        dfinal = dfinal.contiguous()
    grads = selective_scan_backward_op(dy, dfinal, kept, *tensors, ctx.groups)
    return *(None if p is None else g for p, g in zip(tensors, grads, strict=False)), None, None, None


selective_scan_op.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(selective_scan_backward_op)


@implements("selective_scan", "triton", supports)
def selective_scan(x_BTD, delta_BTD, A_DN, B_BTN, C_BTN, D_D, z_BTD, initial_state, return_state, cu_seqlens):
    B, C = (p.unsqueeze(2) if p.ndim == 3 else p for p in (B_BTN, C_BTN))
    h0 = None if initial_state is None else initial_state[0].float().mT.contiguous()
    keep = records(x_BTD, delta_BTD, A_DN, B, C, D_D, z_BTD, h0)
    y, final, _ = selective_scan_op(
        delta_BTD, x_BTD, A_DN.float().mT.contiguous(), B, C, D_D, z_BTD, h0, cu_seqlens, math.lcm(B.shape[2], C.shape[2]), keep
    )
    return y, (final.mT.contiguous(),) if return_state else None
