"""Backend `triton` of delta_rule: custom operators around the GPU kernels. Triton itself is imported at the first call."""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

import importlib
from functools import partial

import torch
from torch import Tensor

from linnet.ops import _algebra
from linnet.ops._autograd import operator, records, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops.triton._plan import WIDEST, DeltaCall
from linnet.ops.triton._step import single_token, token_op
from linnet.ops.triton.recurrent import supports as linear_supports


def _kernels():
    return importlib.import_module("linnet.ops.triton._delta")


def supports(arguments: dict) -> str | None:
    """Reason why a call cannot run on these kernels, None if it can."""
    for name, size in (("key", arguments["q"].shape[-1]), ("value", arguments["v"].shape[-1])):
        if size > WIDEST:
            return f"{name} channels per head must be at most {WIDEST}, got {size}"
    return linear_supports(arguments)


@operator("linnet::triton_delta_rule")
def delta_op(
    q: Tensor, k: Tensor | None, p: Tensor, v: Tensor, erase: Tensor | None, write: Tensor | None, g: Tensor | None,
    S0: Tensor | None, cu_seqlens: Tensor | None, scale: float, before: bool, exclusive: bool, heads: int, bound: float | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return _kernels().forward(q, k, p, v, erase, write, g, S0, cu_seqlens, scale, before, exclusive, heads, bound, save)


@delta_op.register_fake
def _(q, k, p, v, erase, write, g, S0, cu_seqlens, scale, before, exclusive, heads, bound, save):
    call = DeltaCall(q, k, p, v, g, cu_seqlens, scale, before, exclusive, heads, bound)
    B, T, H, K, V, NB, C = call.B, call.T, call.H, call.K, call.V, call.chunks, call.C
    fp32 = lambda *shape: q.new_empty(shape, dtype=torch.float32)
    o, S = q.new_empty(B, T, H, V), fp32(call.N, heads, K, V)
    if not save:
        return o, S, *(q.new_empty(0) for _ in range(3)), [q.new_empty(0) for _ in range(7)]
    vector = call.kind == "vector"
    maps = fp32(call.N * call.splits, H, K, K) if call.splits > 1 else q.new_empty(0)
    decayed = [q.new_empty((B, T, H, K) if vector else (0,)) for _ in range(3)]
    carry = fp32(NB, H, K) if vector else fp32(H, NB)
    prepared = [q.new_empty(NB, H, C, C), q.new_empty(NB, H, C, C), fp32(5, H, B * T), carry, *decayed]
    return o, S, q.new_empty(B, T, H, V), q.new_empty(NB, H, V, K), maps, prepared


@operator("linnet::triton_delta_rule_backward")
def delta_backward_op(
    do: Tensor, dS: Tensor | None, x: Tensor, states: Tensor, maps: Tensor, prepared: list[Tensor], q: Tensor, k: Tensor | None,
    p: Tensor, v: Tensor, erase: Tensor | None, write: Tensor | None, g: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    before: bool, exclusive: bool, heads: int, bound: float | None, need_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads, dS0 = _kernels().backward(
        do, dS, x, states, maps, prepared, q, k, p, v, erase, write, g, cu_seqlens, scale, before, exclusive, heads, bound, need_dg
    )
    return *(q.new_empty(0) if a is None else a for a in grads), dS0


@delta_backward_op.register_fake
def _(do, dS, x, states, maps, prepared, q, k, p, v, erase, write, g, cu_seqlens, scale, before, exclusive, heads, bound, need_dg):
    new = lambda a: q.new_empty(0) if a is None else torch.empty(a.shape, dtype=a.dtype, device=a.device)
    dg = q.new_empty(0) if g is None or not need_dg else torch.empty(g.shape, dtype=torch.float32, device=g.device)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    S = q.new_empty(N, heads, q.shape[3], v.shape[3], dtype=torch.float32)
    return *(new(a) for a in (q, k, p, v, erase, write)), dg, S


def _setup(ctx, inputs, output):
    *operands, S0, cu_seqlens = inputs[:9]
    ctx.options = inputs[9:14]
    ctx.state_dtype = None if S0 is None else S0.dtype
    ctx.save_for_backward(*operands, cu_seqlens, *output[2:5], *output[5])
    ctx.set_materialize_grads(False)  # what is only saved would get zeros of its size


def _backward(ctx, do, dS, *_):
    *operands, cu_seqlens, x, states, maps = ctx.saved_tensors[:11]
    prepared = list(ctx.saved_tensors[11:])
    need_dg = operands[6] is not None and ctx.needs_input_grad[6]
    do = torch.zeros_like(x) if do is None else do
    *grads, dS0 = delta_backward_op(do, dS, x, states, maps, prepared, *operands, cu_seqlens, *ctx.options, need_dg)
    grads = [
        None if a is None or (i == 6 and not need_dg) else d.to(a.dtype)
        for i, (d, a) in enumerate(zip(grads, operands, strict=True))
    ]
    return *grads, None if ctx.state_dtype is None else dS0.to(ctx.state_dtype), *[None] * 7


delta_op.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(delta_backward_op)


def delta_core(q, k, p, v, erase, write, g, S0, cu_seqlens, scale, before_decay, exclusive, heads, dtype, bound=None):
    """A delta core of linnet/ops/_algebra.py; `dtype` is fp32 here. 16-bit operands are multiplied as bf16."""
    save = records(q, k, p, v, erase, write, g, S0)
    if single_token(q, cu_seqlens, k, p, v, erase, write, g, S0):
        return token_op("delta", q, k, p, v, None, erase, write, g, S0, scale, before_decay, exclusive, heads)
    if g is None or g.shape[3] == 1:  # the sweeps read the keys as they are
        k, _, erase, _ = _algebra.fold_gates(k, p, v, erase, None)
    kind = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    q, k, p, v = (None if x is None else x.to(kind) for x in (q, k, p, v))
    if write is not None and write.shape[3] > 1:
        write = write.to(kind)
    return delta_op(q, k, p, v, erase, write, g, S0, cu_seqlens, scale, before_decay, exclusive, heads, bound, save)[:2]


@implements("delta_rule", "triton", supports)
def delta_rule(**arguments):
    return _algebra.delta_rule(partial(delta_core, bound=arguments["log_decay_min"]), **arguments, channel_gates=True)
