"""Backend `triton` of dplr: custom operators around the GPU kernels. Triton itself is imported at the first call."""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

import importlib
from functools import partial

import torch
from torch import Tensor

from linnet.ops import _algebra
from linnet.ops._autograd import operator, records, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops.triton._plan import DplrCall
from linnet.ops.triton._step import single_token, token_op
from linnet.ops.triton.recurrent import supports as linear_supports

WIDEST = 128  # key and value channels per head


def _kernels():
    return importlib.import_module("linnet.ops.triton._dplr")


def supports(arguments: dict) -> str | None:
    """Reason why a call cannot run on these kernels, None if it can."""
    for name, size in (("key", arguments["q"].shape[-1]), ("value", arguments["v"].shape[-1])):
        if size > WIDEST:
            return f"{name} channels per head must be at most {WIDEST}, got {size}"
    return linear_supports(arguments)


@operator("linnet::triton_dplr")
def dplr_op(
    q: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor, g: Tensor | None, S0: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, heads: int, bound: float | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return _kernels().forward(q, k, a, b, v, g, S0, cu_seqlens, scale, heads, bound, save)


@dplr_op.register_fake
def _(q, k, a, b, v, g, S0, cu_seqlens, scale, heads, bound, save):
    call = DplrCall(q, k, v, g, cu_seqlens, scale, heads, bound)
    B, T, H, K, V, NB, C = call.B, call.T, call.H, call.K, call.V, call.chunks, call.C
    fp32 = lambda *shape: q.new_empty(shape, dtype=torch.float32)
    o, S = q.new_empty(B, T, H, V), fp32(call.N, heads, K, V)
    if not save:
        return o, S, q.new_empty(0), q.new_empty(0), [q.new_empty(0) for _ in range(10)]
    maps = fp32(call.N * call.splits, H, K, K) if call.splits > 1 else q.new_empty(0)
    rows, square = (B, T, H, K), (NB, H, C, C)
    prepared = [q.new_empty(shape) for shape in (rows, rows, (NB, H, K, K), square, rows, rows, square, square, square)]
    return o, S, q.new_empty(NB, H, V, K), maps, [*prepared, fp32(NB, H, K)]


@operator("linnet::triton_dplr_backward")
def dplr_backward_op(
    do: Tensor, dS: Tensor | None, states: Tensor, maps: Tensor, prepared: list[Tensor], q: Tensor, k: Tensor, a: Tensor,
    b: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, scale: float, heads: int, bound: float | None, need_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads, dS0 = _kernels().backward(do, dS, states, maps, prepared, q, k, a, b, v, g, cu_seqlens, scale, heads, bound, need_dg)
    return *(q.new_empty(0) if x is None else x for x in grads), dS0


@dplr_backward_op.register_fake
def _(do, dS, states, maps, prepared, q, k, a, b, v, g, cu_seqlens, scale, heads, bound, need_dg):
    dg = q.new_empty(0) if g is None or not need_dg else torch.empty(g.shape, dtype=torch.float32, device=g.device)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    S = q.new_empty(N, heads, q.shape[3], v.shape[3], dtype=torch.float32)
    return *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, a, b, v)), dg, S


def _setup(ctx, inputs, output):
    *operands, S0, cu_seqlens = inputs[:8]
    ctx.options = inputs[8:11]
    ctx.state_dtype = None if S0 is None else S0.dtype
    ctx.save_for_backward(*operands, cu_seqlens, *output[2:4], *output[4])
    ctx.set_materialize_grads(False)  # what is only saved would get zeros of its size


def _backward(ctx, do, dS, *_):
    *operands, cu_seqlens, states, maps = ctx.saved_tensors[:9]
    prepared, (q, v, g) = list(ctx.saved_tensors[9:]), (operands[0], operands[4], operands[5])
    need_dg = g is not None and ctx.needs_input_grad[5]
    do = v.new_zeros(*q.shape[:2], states.shape[1], v.shape[3]) if do is None else do
    *grads, dg, dS0 = dplr_backward_op(do, dS, states, maps, prepared, *operands, cu_seqlens, *ctx.options, need_dg)
    dS0 = None if ctx.state_dtype is None else dS0.to(ctx.state_dtype)
    return *grads, dg.to(g.dtype) if need_dg else None, dS0, *[None] * 5


dplr_op.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(dplr_backward_op)


def dplr_core(q, a, b, k, v, g, S0, cu_seqlens, scale, heads, dtype, bound=None):
    """A dplr core of linnet/ops/_algebra.py; `dtype` is fp32 here. 16-bit operands are multiplied as bf16."""
    save = records(q, a, b, k, v, g, S0)
    if single_token(q, cu_seqlens, a, b, k, v, g, S0):
        return token_op("dplr", q, a, k, v, b, None, None, g, S0, scale, True, False, heads)
    kind = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    q, k, a, b, v = (x.to(kind) for x in (q, k, a, b, v))
    return dplr_op(q, k, a, b, v, g, S0, cu_seqlens, scale, heads, bound, save)[:2]


@implements("dplr", "triton", supports)
def dplr(**arguments):
    return _algebra.dplr(partial(dplr_core, bound=arguments["log_decay_min"]), **arguments)
