"""Chunkwise linear attention, delta rule and DPLR as custom operators: the cores of linnet/ops/_algebra.py in PyTorch.

Single tokens (decoding) take a plain PyTorch step without the chunk machinery.
"""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

from functools import partial

import torch
from torch import Tensor

from linnet.ops import _algebra
from linnet.ops._autograd import operator, records, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops._shapes import expand_heads
from linnet.ops.torch import _delta, _dplr, _linear
from linnet.ops.torch._chunks import span_width

CHUNK = {"linear_attention": 64, "delta_rule": 64, "dplr": 64}  # measured on the CPU with `linnet bench cpu`


def fit_chunk(chunk: int, tokens: int) -> int:
    """The chunk size of a call: a power of two, not more than twice the tokens there are."""
    while chunk > 1 and chunk // 2 >= tokens:
        chunk //= 2
    return chunk


def _span_rows(cu_seqlens, batch, tokens, heads, chunk, save):
    """Rows of the saved span states, for the fake implementations; data-dependent when packed."""
    if not save:
        return 0
    if cu_seqlens is not None:
        return torch.library.get_ctx().new_dynamic_size()
    waves = -(-tokens // chunk)
    return -(-waves // span_width(batch, heads)) * batch


def _state_rows(cu_seqlens, batch):
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _without_save(options: list) -> list:
    """The non-tensor arguments of a forward operator as its backward operator takes them: `save` comes next to last."""
    return [*options[:-2], options[-1]]


def _only_first_two(ctx, output: tuple[Tensor, ...]) -> None:
    """o and S have gradients, the saved tensors have none; a gradient that is missing stays None instead of becoming zeros."""
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.output_like = (output[0].shape, output[0].dtype)


def _gradient_of_output(ctx, do: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(ctx.output_like[0], dtype=ctx.output_like[1]) if do is None else do


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(0)


# ---- linear attention ------------------------------------------------------------------------------------------------


@operator("linnet::linear_attention")
def linear_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S0: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, exclusive: bool, heads: int, chunk: int, save: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _linear.forward(q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, chunk, save, dtype)


@linear_op.register_fake
def _(q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, chunk, save, dtype):
    B, T, Hq, K = q.shape
    V = v.shape[3]
    S = q.new_empty(_state_rows(cu_seqlens, B), heads, K, V, dtype=dtype)
    saved = q.new_empty(_span_rows(cu_seqlens, B, T, heads, chunk, save), heads, K, V, dtype=dtype)
    return v.new_empty(B, T, max(Hq, heads), V), S, saved


@operator("linnet::linear_attention_backward")
def linear_backward_op(
    do: Tensor, dS: Tensor | None, saved: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, exclusive: bool, heads: int, chunk: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dg, dS0 = _linear.backward(do, dS, saved, q, k, v, g, cu_seqlens, scale, exclusive, heads, chunk, dtype)
    return dq, dk, dv, _empty(q) if dg is None else dg, dS0


@linear_backward_op.register_fake
def _(do, dS, saved, q, k, v, g, cu_seqlens, scale, exclusive, heads, chunk, dtype):
    dg = _empty(q) if g is None else torch.empty_like(g, dtype=dtype)
    S = q.new_empty(_state_rows(cu_seqlens, q.shape[0]), heads, q.shape[3], v.shape[3], dtype=dtype)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dg, S


def _linear_setup(ctx, inputs, output):
    q, k, v, g, S0, cu_seqlens, *options = inputs
    ctx.options = _without_save(options)
    ctx.save_for_backward(q, k, v, g, cu_seqlens, output[2])
    _only_first_two(ctx, output)
    ctx.state_dtype = None if S0 is None else S0.dtype


def _linear_backward(ctx, do, dS, _):
    q, k, v, g, cu_seqlens, saved = ctx.saved_tensors
    dq, dk, dv, dg, dS0 = linear_backward_op(_gradient_of_output(ctx, do, q), dS, saved, q, k, v, g, cu_seqlens, *ctx.options)
    dg = None if g is None else dg.to(g.dtype)
    dS0 = None if ctx.state_dtype is None else dS0.to(ctx.state_dtype)
    return dq, dk, dv, dg, dS0, *[None] * 7


linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)
refuse_double_backward(linear_backward_op)


# ---- delta rule ------------------------------------------------------------------------------------------------------


@operator("linnet::delta_rule")
def delta_op(
    q: Tensor, k: Tensor | None, p: Tensor, v: Tensor, erase: Tensor | None, write: Tensor | None, g: Tensor | None,
    S0: Tensor | None, cu_seqlens: Tensor | None, scale: float, before_decay: bool, exclusive: bool, heads: int, chunk: int,
    save: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _delta.forward(q, k, p, v, erase, write, g, S0, cu_seqlens, scale, before_decay, exclusive, heads, chunk, save, dtype)


@delta_op.register_fake
def _(q, k, p, v, erase, write, g, S0, cu_seqlens, scale, before_decay, exclusive, heads, chunk, save, dtype):
    B, T, Hq, K = q.shape
    V = v.shape[3]
    S = q.new_empty(_state_rows(cu_seqlens, B), heads, K, V, dtype=dtype)
    saved = q.new_empty(_span_rows(cu_seqlens, B, T, heads, chunk, save), heads, K, V, dtype=dtype)
    return v.new_empty(B, T, max(Hq, heads), V), S, v.new_empty(B if save else 0, T, heads, V, dtype=dtype), saved


@operator("linnet::delta_rule_backward")
def delta_backward_op(
    do: Tensor, dS: Tensor | None, X: Tensor, saved: Tensor, q: Tensor, k: Tensor | None, p: Tensor, v: Tensor,
    erase: Tensor | None, write: Tensor | None, g: Tensor | None, cu_seqlens: Tensor | None, scale: float, before_decay: bool,
    exclusive: bool, heads: int, chunk: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _delta.backward(
        do, dS, X, saved, q, k, p, v, erase, write, g, cu_seqlens, scale, before_decay, exclusive, heads, chunk, dtype
    )
    return tuple(_empty(q) if x is None else x for x in grads)


@delta_backward_op.register_fake
def _(do, dS, X, saved, q, k, p, v, erase, write, g, cu_seqlens, scale, before_decay, exclusive, heads, chunk, dtype):
    operands = (_empty(q) if x is None else torch.empty_like(x) for x in (q, k, p, v))
    gates = (_empty(q) if x is None else torch.empty_like(x, dtype=dtype) for x in (erase, write, g))
    S = q.new_empty(_state_rows(cu_seqlens, q.shape[0]), heads, q.shape[3], v.shape[3], dtype=dtype)
    return *operands, *gates, S


def _delta_setup(ctx, inputs, output):
    *operands, S0, cu_seqlens = inputs[:9]
    ctx.options = _without_save(inputs[9:])
    ctx.save_for_backward(*operands, cu_seqlens, output[2], output[3])
    _only_first_two(ctx, output)
    ctx.state_dtype = None if S0 is None else S0.dtype


def _delta_backward(ctx, do, dS, *_):
    *operands, cu_seqlens, X, saved = ctx.saved_tensors
    *grads, dS0 = delta_backward_op(_gradient_of_output(ctx, do, operands[0]), dS, X, saved, *operands, cu_seqlens, *ctx.options)
    grads = [None if x is None else d.to(x.dtype) for d, x in zip(grads, operands, strict=True)]
    return *grads, None if ctx.state_dtype is None else dS0.to(ctx.state_dtype), *[None] * 8


delta_op.register_autograd(_delta_backward, setup_context=_delta_setup)
refuse_double_backward(delta_backward_op)


# ---- DPLR ------------------------------------------------------------------------------------------------------------


@operator("linnet::dplr")
def dplr_op(
    q: Tensor, e: Tensor, w: Tensor, p: Tensor, u: Tensor, g: Tensor | None, S0: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, heads: int, chunk: int, save: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _dplr.forward(q, e, w, p, u, g, S0, cu_seqlens, scale, heads, chunk, save, dtype)


@dplr_op.register_fake
def _(q, e, w, p, u, g, S0, cu_seqlens, scale, heads, chunk, save, dtype):
    B, T, Hq, K = q.shape
    V = u.shape[3]
    S = q.new_empty(_state_rows(cu_seqlens, B), heads, K, V, dtype=dtype)
    saved = q.new_empty(_span_rows(cu_seqlens, B, T, heads, chunk, save), heads, K, V, dtype=dtype)
    return u.new_empty(B, T, max(Hq, heads), V), S, u.new_empty(B if save else 0, T, heads, V, dtype=dtype), saved


@operator("linnet::dplr_backward")
def dplr_backward_op(
    do: Tensor, dS: Tensor | None, R: Tensor, saved: Tensor, q: Tensor, e: Tensor, w: Tensor, p: Tensor, u: Tensor,
    g: Tensor | None, cu_seqlens: Tensor | None, scale: float, heads: int, chunk: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *grads, dg, dS0 = _dplr.backward(do, dS, R, saved, q, e, w, p, u, g, cu_seqlens, scale, heads, chunk, dtype)
    return *grads, _empty(q) if dg is None else dg, dS0


@dplr_backward_op.register_fake
def _(do, dS, R, saved, q, e, w, p, u, g, cu_seqlens, scale, heads, chunk, dtype):
    dg = _empty(q) if g is None else torch.empty_like(g, dtype=dtype)
    S = q.new_empty(_state_rows(cu_seqlens, q.shape[0]), heads, q.shape[3], u.shape[3], dtype=dtype)
    return *(torch.empty_like(x) for x in (q, e, w, p, u)), dg, S


def _dplr_setup(ctx, inputs, output):
    q, e, w, p, u, g, S0, cu_seqlens, *options = inputs
    ctx.options = _without_save(options)
    ctx.save_for_backward(q, e, w, p, u, g, cu_seqlens, output[2], output[3])
    _only_first_two(ctx, output)
    ctx.state_dtype = None if S0 is None else S0.dtype


def _dplr_backward(ctx, do, dS, *_):
    q, e, w, p, u, g, cu_seqlens, R, saved = ctx.saved_tensors
    *grads, dg, dS0 = dplr_backward_op(_gradient_of_output(ctx, do, q), dS, R, saved, q, e, w, p, u, g, cu_seqlens, *ctx.options)
    dg = None if g is None else dg.to(g.dtype)
    dS0 = None if ctx.state_dtype is None else dS0.to(ctx.state_dtype)
    return *grads, dg, dS0, *[None] * 6


dplr_op.register_autograd(_dplr_backward, setup_context=_dplr_setup)
refuse_double_backward(dplr_backward_op)


# ---- the cores -------------------------------------------------------------------------------------------------------


def _token(x: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """The only token of x [B, 1, H, D] as [B, at least heads, D]."""
    return None if x is None else expand_heads(x[:, 0], max(heads, x.shape[2]), 1).to(dtype)


def _start(S0: Tensor | None, q: Tensor, v: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    shape = (q.shape[0], heads, q.shape[3], v.shape[3])
    return torch.zeros(shape, dtype=dtype, device=q.device) if S0 is None else S0.to(dtype)


def _decayed(S: Tensor, g: Tensor | None) -> Tensor:
    return S if g is None else S * g.exp().unsqueeze(-1)


def _read(q: Tensor, S: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale S^T q for query groups: q [B, 1, H, K], S [B, Hs, K, V] -> [B, 1, H, V]."""
    q = _token(q, S.shape[1], dtype).unflatten(1, (S.shape[1], -1)) * scale
    return (q @ S).flatten(1, 2).unsqueeze(1)


def single_token(q: Tensor, cu_seqlens: Tensor | None) -> bool:
    return q.shape[1] == 1 and cu_seqlens is None


def linear_core(q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, dtype, chunk=CHUNK["linear_attention"]):
    if not single_token(q, cu_seqlens):
        size = fit_chunk(chunk, q.shape[1])
        save = records(q, k, v, g, S0)
        return linear_op(q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, size, save, dtype)[:2]
    S0 = _start(S0, q, v, heads, dtype)
    k, v_t, g = (_token(x, heads, dtype) for x in (k, v, g))
    S = _decayed(S0, g) + k.unsqueeze(-1) * v_t.unsqueeze(-2)
    return _read(q, S0 if exclusive else S, scale, dtype).to(v.dtype), S


def delta_core(
    q, k, p, v, erase, write, g, S0, cu_seqlens, scale, before_decay, exclusive, heads, dtype, chunk=CHUNK["delta_rule"]
):
    if not single_token(q, cu_seqlens):
        operands = (q, k, p, v, erase, write, g, S0)
        size, save = fit_chunk(chunk, q.shape[1]), records(*operands)
        return delta_op(*operands, cu_seqlens, scale, before_decay, exclusive, heads, size, save, dtype)[:2]
    S0 = _start(S0, q, v, heads, dtype)
    e, p, u, erase, write, g = (_token(x, heads, dtype) for x in (p if k is None else k, p, v, erase, write, g))
    e, u = e if erase is None else erase * e, u if write is None else write * u
    S = _decayed(S0, g)
    r = (e.unsqueeze(-2) @ (S0 if before_decay else S)).squeeze(-2)
    S = S + p.unsqueeze(-1) * (u - r).unsqueeze(-2)
    return _read(q, S0 if exclusive else S, scale, dtype).to(v.dtype), S


def dplr_core(q, e, b, p, u, g, S0, cu_seqlens, scale, heads, dtype, chunk=CHUNK["dplr"]):
    w = -b
    if not single_token(q, cu_seqlens):
        size = fit_chunk(chunk, q.shape[1])
        save = records(q, e, w, p, u, g, S0)
        return dplr_op(q, e, w, p, u, g, S0, cu_seqlens, scale, heads, size, save, dtype)[:2]
    S0 = _start(S0, q, u, heads, dtype)
    e, w, p, u_t, g = (_token(x, heads, dtype) for x in (e, w, p, u, g))
    S = _decayed(S0, g) - w.unsqueeze(-1) * (e.unsqueeze(-2) @ S0) + p.unsqueeze(-1) * u_t.unsqueeze(-2)
    return _read(q, S, scale, dtype).to(u.dtype), S


implements("linear_attention", "torch")(partial(_algebra.linear_attention, linear_core))
implements("delta_rule", "torch")(partial(_algebra.delta_rule, delta_core))
implements("dplr", "torch")(partial(_algebra.dplr, dplr_core))
