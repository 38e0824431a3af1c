"""Reference neural memory: one token at a time, its gradient by automatic differentiation of the loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, expand_heads, segments
from linnet.ops.memory import flat_weights

ACTIVATIONS = {"gelu": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "relu2": lambda x: F.relu(x).square()}


@implements("neural_memory", "reference")
def neural_memory(
    q, k, v, weights, biases, rate, log_decay, log_momentum, read_scale, norm_weight, norm_bias, norm_eps, residual, activation,
    mini_batch, initial_state, return_state, cu_seqlens,
):  # fmt: skip
    dtype, out_dtype = accumulate_dtype(q, rate, log_decay, log_momentum, read_scale, *weights), v.dtype
    heads = max(x.shape[2] for x in (q, k, v, rate, log_decay, log_momentum, read_scale) if x is not None)
    heads = max(heads, weights[0].shape[0])
    q, k, v, rate, log_decay, log_momentum, read_scale = (
        None if x is None else expand_heads(x, heads).to(dtype) for x in (q, k, v, rate, log_decay, log_momentum, read_scale)
    )
    sizes = [weights[0].shape[1], *(w.shape[2] for w in weights)]
    start_HP = expand_heads(flat_weights(weights, biases), heads, 0).to(dtype)
    act = ACTIVATIONS[activation]

    def network(x_HK: Tensor, W_HP: Tensor) -> Tensor:
        z, at = x_HK, 0
        for layer, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False)):
            z = torch.einsum("ha,hab->hb", z if layer == 0 else act(z), W_HP[:, at : at + a * b].unflatten(1, (a, b)))
            at += a * b
            if biases is not None:
                z, at = z + W_HP[:, at : at + b], at + b
        if norm_weight is not None:
            z = F.layer_norm(z, z.shape[-1:], eps=norm_eps) * norm_weight.to(dtype) + norm_bias.to(dtype)
        return x_HK + z if residual else z

    def loss(W_HP: Tensor, k_HK: Tensor, v_HV: Tensor) -> Tensor:
        return 0.5 * (network(k_HK, W_HP) - v_HV).square().sum()

    gradient = torch.func.grad(loss)
    out, final = {}, []
    for row, (b, begin, end) in enumerate(segments(cu_seqlens, q.shape[0], q.shape[1])):
        count, W, A, S = 0, start_HP, start_HP, torch.zeros_like(start_HP)
        if initial_state is not None:
            count, W, *more = (x[row] for x in initial_state)
            count, W = int(count), W.to(dtype)
            A = more.pop(0).to(dtype) if mini_batch > 1 else W
            S = more.pop(0).to(dtype) if more else S
        for t in range(begin, end):
            g = gradient(A, k[b, t], v[b, t])
            S = -rate[b, t][:, None] * g + (0 if log_momentum is None else log_momentum[b, t].exp()[:, None] * S)
            W = S + (W if log_decay is None else log_decay[b, t].exp()[:, None] * W)
            R = W if read_scale is None else A + read_scale[b, t][:, None] * (W - A)
            out[b, t] = network(q[b, t], R)
            count += 1
            if count % mini_batch == 0:
                A = W = R
        kept = [W, *([A] if mini_batch > 1 else []), *([S] if log_momentum is not None else [])]
        final.append((torch.tensor(count, device=q.device), *kept))
    o = torch.stack([torch.stack([out[b, t] for t in range(q.shape[1])]) for b in range(q.shape[0])]).to(out_dtype)
    return o, tuple(torch.stack(x) for x in zip(*final, strict=True)) if return_state else None
