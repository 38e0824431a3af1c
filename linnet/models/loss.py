"""Cross-entropy of a linear output layer, a few tokens at a time: the logits of a long sequence never exist at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from linnet.ops._dispatch import product_dtype
from linnet.ops.loss import IGNORE, softmax_cross_entropy


def next_token_targets(labels_BT: Tensor, cu_seqlens: Tensor | None = None, mask_BT: Tensor | None = None) -> Tensor:
    """What every position must predict: the label of the next one, -100 where there is none.

    Args:
        labels_BT: label of every position, -100 where it is no target.
        cu_seqlens: [N+1] offsets of packed documents: the last token of one predicts nothing of the next.
        mask_BT: nonzero for real tokens: padding neither predicts nor is predicted.
    """
    if mask_BT is not None:
        labels_BT = labels_BT.masked_fill(mask_BT == 0, IGNORE)
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE)
    if mask_BT is not None:
        targets_BT = targets_BT.masked_fill(mask_BT == 0, IGNORE)
    if cu_seqlens is not None:
        last = (cu_seqlens[1:] - 1).long() % labels_BT.shape[
            1
        ]  # a leading empty document wraps to the last token, which predicts nothing
        targets_BT = targets_BT.index_fill(1, last, IGNORE)
    return targets_BT


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies. The gradients are computed with the loss, chunk by chunk, and only scaled in backward."""

    @staticmethod
    def forward(ctx, x_ND, weight_VD, targets_N, chunk, need_x, need_weight, backend):
        sums = torch.promote_types(x_ND.dtype, torch.float32)
        loss = x_ND.new_zeros((), dtype=sums)
        dx_ND = torch.empty_like(x_ND) if need_x else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=sums) if need_weight else None
        for start in range(0, x_ND.shape[0], chunk):
            x_CD, target_C = x_ND[start : start + chunk], targets_N[start : start + chunk]
            loss_C, dlogits_CV = softmax_cross_entropy(
                x_CD @ weight_VD.T, target_C, return_gradient=need_x or need_weight, backend=backend
            )
            loss += loss_C.sum()
            if dx_ND is not None:
                dx_ND[start : start + chunk] = dlogits_CV @ weight_VD
            if dweight_VD is not None:
                dweight_VD += dlogits_CV.T @ x_CD
        ctx.save_for_backward(dx_ND, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx_ND, dweight_VD = ctx.saved_tensors
        dx_ND = None if dx_ND is None else dx_ND * grad.to(dx_ND.dtype)
        dweight_VD = None if dweight_VD is None else (dweight_VD * grad).to(ctx.weight_dtype)
        return dx_ND, dweight_VD, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    num_items: Tensor | int | None = None,
    chunk_tokens: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean cross-entropy of `softmax(x @ weight.T)` against `targets`, in nats.

    Args:
        x: [..., D]. weight: [V, D]. targets: [...], class ids, -100 to leave a position out.
        num_items: what the sum is divided by; None means the number of positions that are not left out.
        chunk_tokens: positions per chunk; None means that the logits of a chunk take about the memory of x.
        backend: of `linnet.ops.softmax_cross_entropy`; None chooses.

    Returns:
        A scalar in fp32 (fp64 for fp64 operands); zero if every position is left out.

    At most [chunk_tokens, V] logits exist at a time. What is kept for backward is the gradient of x (like x) and, in fp32,
    that of the weight. Products are formed in the dtype of x (of autocast, if it is on), sums in fp32.
    """
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: targets must have the shape {tuple(x.shape[:-1])} of x[..., 0]; got {tuple(targets.shape)}"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"linear_cross_entropy: chunk_tokens must be >= 1 or None; got {chunk_tokens}")
    x_ND, targets_N = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    dtype = product_dtype(x)
    chunk = chunk_tokens or max(256, x_ND.numel() // weight.shape[0])
    grad = torch.is_grad_enabled()
    with torch.autocast(x.device.type, enabled=False):
        total = _LinearCrossEntropy.apply(
            x_ND.to(dtype), weight.to(dtype), targets_N, chunk, grad and x.requires_grad, grad and weight.requires_grad, backend
        )
    if num_items is None:
        num_items = (targets_N != IGNORE).sum().clamp(min=1)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)
