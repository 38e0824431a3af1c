"""Custom operators of a few tokens: in place for `linnet.ops.decode`; as a function for one token of a training operator.

Triton itself is imported at the first call.
"""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

import importlib

import torch
from torch import Tensor

from linnet.ops._autograd import operator, records


def _kernels():
    return importlib.import_module("linnet.ops.triton._kernel_step")


def _vector_kernels():
    return importlib.import_module("linnet.ops.triton._kernel_step_vector")


@torch.library.custom_op("linnet::triton_decode", mutates_args=("state",))
def decode_op(
    kind: str, q: Tensor, k: Tensor | None, p: Tensor, v: Tensor, b: Tensor | None, erase: Tensor | None, write: Tensor | None,
    g: Tensor | None, state: Tensor, slots: Tensor | None, counts: Tensor | None, scale: float, before: bool, exclusive: bool,
    steps: int, update: bool, output: bool,
) -> Tensor:  # fmt: skip
    """kind: linear | delta | dplr. Operands [B, T, heads, channels], k None for p; state [P, H, K, V]; o, empty without output."""
    return _kernels().step(
        kind, q, k, p, v, b, erase, write, g, state, state, slots, counts, scale, before, exclusive, steps, update, output
    )


@decode_op.register_fake
def _(kind, q, k, p, v, b, erase, write, g, state, slots, counts, scale, before, exclusive, steps, update, output):
    return v.new_empty((*q.shape[:2], max(q.shape[2], state.shape[1]), v.shape[3]) if output else (0,))


@torch.library.custom_op("linnet::triton_decode_conv", mutates_args=("state",))
def conv_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor | None, counts: Tensor | None, silu: bool,
    update: bool, output: bool,
) -> Tensor:  # fmt: skip
    """x [B, T, D], weight [D, W], state [P, D, W-1]."""
    return _vector_kernels().conv(x, weight, bias, state, slots, counts, silu, update, output)


@conv_op.register_fake
def _(x, weight, bias, state, slots, counts, silu, update, output):
    return x.new_empty(x.shape if output else (0,))


@torch.library.custom_op("linnet::triton_decode_selective_scan", mutates_args=("state",))
def selective_op(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor | None, z: Tensor | None, state: Tensor,
    slots: Tensor | None, counts: Tensor | None, update: bool, output: bool,
) -> Tensor:  # fmt: skip
    """x, delta, z [B, T, D], A [D, N], B, C [B, T, G, N], state [P, D, N]."""
    return _vector_kernels().selective(x, delta, A, B, C, skip, z, state, slots, counts, update, output)


@selective_op.register_fake
def _(x, delta, A, B, C, skip, z, state, slots, counts, update, output):
    return x.new_empty(x.shape if output else (0,))


@operator("linnet::triton_token")
def token_op(
    kind: str, q: Tensor, k: Tensor | None, p: Tensor, v: Tensor, b: Tensor | None, erase: Tensor | None, write: Tensor | None,
    g: Tensor | None, S0: Tensor | None, scale: float, before: bool, exclusive: bool, heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of a core of linnet/ops/_algebra.py: o [B, 1, H, V] and the new state [B, heads, K, V] in fp32."""
    S = torch.empty(q.shape[0], heads, q.shape[3], v.shape[3], dtype=torch.float32, device=q.device)
    S0 = None if S0 is None else S0.contiguous()
    return _kernels().step(kind, q, k, p, v, b, erase, write, g, S0, S, None, None, scale, before, exclusive, 1, True, True), S


@token_op.register_fake
def _(kind, q, k, p, v, b, erase, write, g, S0, scale, before, exclusive, heads):
    S = q.new_empty(q.shape[0], heads, q.shape[3], v.shape[3], dtype=torch.float32)
    return v.new_empty(q.shape[0], 1, max(q.shape[2], heads), v.shape[3]), S


def single_token(q: Tensor, cu_seqlens: Tensor | None, *others: Tensor | None) -> bool:
    """Whether a call of a core is one token that autograd does not record."""
    return q.shape[1] == 1 and cu_seqlens is None and not records(q, *others)
