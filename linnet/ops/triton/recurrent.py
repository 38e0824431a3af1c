"""Backend `triton` of linear_attention: custom operators around the GPU kernels. Triton itself is imported at the first call."""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

import importlib
import importlib.util
import os
from functools import partial

import torch
from torch import Tensor

from linnet.ops import _algebra
from linnet.ops._autograd import operator, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops.triton._plan import Call
from linnet.ops.triton._step import single_token, token_op

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")  # Triton's own switch, read at import


def _kernels():
    return importlib.import_module("linnet.ops.triton._linear")


def unavailable(device: str, index: int) -> str | None:
    """Why Triton kernels cannot run on a device here; None if they can. Imports triton, so only asked when it is needed."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        if device == "cuda" and torch.cuda.get_device_capability(index) < (8, 0):
            return "the GPU is older than compute capability 8.0"
        _kernels()
    except Exception as error:  # a broken installation must not break the other backends
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, seconds that only compiled models need.
unavailable._dynamo_marked_constant = True


def supports(arguments: dict) -> str | None:
    """Reason why a call cannot run on these kernels, None if it can."""
    q = arguments["q"]
    if q.device.type != "cuda" and not (q.device.type == "cpu" and INTERPRETED):
        return "the kernels need a CUDA device (or Triton's interpreter)"
    dtypes = {x.dtype for x in arguments.values() if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())}
    if not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return "operands must be float32, bfloat16 or float16"
    if q.device.type == "cpu" and q.dtype != torch.float32:
        return "Triton's interpreter multiplies 16-bit matrices wrongly"
    if arguments["scale"] == 0:
        return "scale must not be zero"
    return unavailable(q.device.type, q.device.index or 0)


@operator("linnet::triton_linear_attention")
def linear_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S0: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, exclusive: bool, heads: int, bound: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _kernels().forward(q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, bound)


def _rows(q: Tensor, cu_seqlens: Tensor | None):
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@linear_op.register_fake
def _(q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, bound):
    B, T, Hq, K = q.shape
    V = v.shape[3]
    o = v.new_empty(B, T, max(Hq, heads), V)
    S = q.new_empty(_rows(q, cu_seqlens), heads, K, V, dtype=torch.float32)
    plan = Call(q, v, g, cu_seqlens, scale, exclusive, heads, bound)
    shape = (plan.N * plan.splits, heads, K, V) if plan.splits > 1 else (0,)
    return o, S, q.new_empty(shape, dtype=torch.float32)


@operator("linnet::triton_linear_attention_backward")
def linear_backward_op(
    do: Tensor, dS: Tensor | None, start: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S0: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, exclusive: bool, heads: int, bound: float | None, need_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = (scale, exclusive, heads, bound, need_dg)
    dq, dk, dv, dg, dS0, _ = _kernels().backward(do, dS, start, q, k, v, g, S0, cu_seqlens, *options)
    return dq, dk, dv, q.new_empty(0) if dg is None else dg, dS0


@linear_backward_op.register_fake
def _(do, dS, start, q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, bound, need_dg):
    new = lambda x, dtype: torch.empty(x.shape, dtype=dtype, device=x.device)
    dg = new(g, torch.float32) if g is not None and need_dg else q.new_empty(0)
    S = q.new_empty(_rows(q, cu_seqlens), heads, q.shape[3], v.shape[3], dtype=torch.float32)
    return new(q, q.dtype), new(k, k.dtype), new(v, v.dtype), dg, S


def _setup(ctx, inputs, output):
    q, k, v, g, S0, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, g, S0, cu_seqlens, output[2])
    ctx.set_materialize_grads(False)
    ctx.output_shape = output[0].shape


def _backward(ctx, do, dS, _):
    q, k, v, g, S0, cu_seqlens, start = ctx.saved_tensors
    do = v.new_zeros(ctx.output_shape) if do is None else do
    need_dg = g is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dg, dS0 = linear_backward_op(do, dS, start, q, k, v, g, S0, cu_seqlens, *ctx.options, need_dg)
    dg = dg.to(g.dtype) if need_dg else None
    dS0 = None if S0 is None else dS0.to(S0.dtype)
    return dq, dk, dv, dg, dS0, None, None, None, None, None


linear_op.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(linear_backward_op)


@operator("linnet::triton_normalized_attention")
def normalized_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gain: Tensor | None, low: Tensor, cu_seqlens: Tensor | None,
    scale: float, heads: int, floor: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h = o / max(|n|, low), or o / (n + low) without `floor`; n [H, B*T]; the final state S, z; both where time is split.

    low is not differentiated.
    """
    return _kernels().normalized(q, k, v, g, gain, low, cu_seqlens, scale, heads, floor)


@normalized_op.register_fake
def _(q, k, v, g, gain, low, cu_seqlens, scale, heads, floor):
    B, T, Hq, K = q.shape
    new = lambda *shape: q.new_empty(shape, dtype=torch.float32)
    rows, V, H = _rows(q, cu_seqlens), v.shape[3], max(Hq, heads)
    splits = Call(q, v, g, cu_seqlens, scale, False, heads, None).splits
    starts = (new(rows * splits, heads, K, V), new(rows * splits, heads, K)) if splits > 1 else (new(0), new(0))
    return v.new_empty(B, T, H, V), new(H, B * T), new(rows, heads, K, V), new(rows, heads, K), *starts


@operator("linnet::triton_normalized_attention_backward")
def normalized_backward_op(
    dh: Tensor, dn: Tensor | None, dS: Tensor | None, dz: Tensor | None, h: Tensor, n: Tensor, start: Tensor, z_start: Tensor,
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gain: Tensor | None, low: Tensor, cu_seqlens: Tensor | None, scale: float,
    heads: int, floor: bool, need_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    contiguous = lambda x: None if x is None else x.contiguous()
    divided = (h, n, low, z_start, contiguous(dn), contiguous(dz), floor)
    dq, dk, dv, dg, _, dgain = _kernels().backward(
        dh, dS, start, q, k, v, g, None, cu_seqlens, scale, False, heads, None, need_dg, gain, divided
    )
    none = q.new_empty(0, dtype=torch.float32)
    return dq, dk, dv, none if dg is None else dg, torch.empty_like(none) if dgain is None else dgain


@normalized_backward_op.register_fake
def _(dh, dn, dS, dz, h, n, start, z_start, q, k, v, g, gain, low, cu_seqlens, scale, heads, floor, need_dg):
    new = lambda x, dtype: torch.empty(x.shape, dtype=dtype, device=x.device)
    gate = lambda x, needed: new(x, torch.float32) if x is not None and needed else q.new_empty(0, dtype=torch.float32)
    return new(q, q.dtype), new(k, k.dtype), new(v, v.dtype), gate(g, need_dg or gain is not None), gate(gain, True)


def _normalized_setup(ctx, inputs, output):
    q, k, v, g, gain, low, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(*output[:2], *output[4:], q, k, v, g, gain, low, cu_seqlens)
    ctx.set_materialize_grads(False)


def _normalized_backward(ctx, dh, dn, dS, dz, *_):
    *saved, q, k, v, g, gain, low, cu_seqlens = ctx.saved_tensors
    need_dg = g is not None and ctx.needs_input_grad[3]
    dh = torch.zeros_like(saved[0]) if dh is None else dh
    operands = (*saved, q, k, v, g, gain, low, cu_seqlens)
    dq, dk, dv, dg, dgain = normalized_backward_op(dh, dn, dS, dz, *operands, *ctx.options, need_dg)
    return dq, dk, dv, dg.to(g.dtype) if need_dg else None, None if gain is None else dgain.to(gain.dtype), *[None] * 5


normalized_op.register_autograd(_normalized_backward, setup_context=_normalized_setup)
refuse_double_backward(normalized_backward_op)


@operator("linnet::triton_running_maximum")
def maximum_op(g: Tensor | None, i: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return _kernels().running_maximum(g, i, cu_seqlens)


@maximum_op.register_fake
def _(g, i, cu_seqlens):
    return torch.empty_like(i), torch.empty_like(i)


def running_maximum(g, i, m0, cu_seqlens):
    """That of linnet/ops/_algebra.py, in one kernel where no initial maximum wants a gradient."""
    if m0 is not None or i.dtype != torch.float32:
        return _algebra.running_maximum(g, i, m0, cu_seqlens)
    return maximum_op(None if g is None else g.detach(), i.detach(), cu_seqlens)


def normalized_core(q, k, v, g, gain, least, cu_seqlens, scale, heads, floor):
    """The fused normalizer of linnet/ops/_algebra.py; None where these kernels do not have it."""
    if (g is not None and g.shape[3] > 1) or max(q.shape[3], v.shape[3]) > 128 or single_token(q, cu_seqlens, k, v, g, None):
        return None
    if not q.dtype == k.dtype == v.dtype:
        return None
    B, T, H = q.shape[0], q.shape[1], max(q.shape[2], heads)
    low = least.expand(B, T, 1 if g is None else g.shape[2]).permute(2, 0, 1).flatten(1).contiguous()
    h, n, S, z, *_ = normalized_op(q, k, v, g, gain, low, cu_seqlens, scale, heads, floor)
    return h, n.view(H, B, T).permute(1, 2, 0), S, z


def linear_core(q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, dtype, bound=None):
    """A linear core of linnet/ops/_algebra.py; `dtype` is fp32 here."""
    if single_token(q, cu_seqlens, k, v, g, S0):
        return token_op("linear", q, None, k, v, None, None, None, g, S0, scale, False, exclusive, heads)
    return linear_op(q, k, v, g, S0, cu_seqlens, scale, exclusive, heads, bound)[:2]


@implements("linear_attention", "triton", supports)
def linear_attention(**arguments):
    bound = arguments["log_decay_min"] if arguments["log_gain"] is None else None  # a log-gain changes the decay
    kernels = dict(tiles=True, normalized=normalized_core, maximum=running_maximum)
    return _algebra.linear_attention(partial(linear_core, bound=bound), **arguments, **kernels)
