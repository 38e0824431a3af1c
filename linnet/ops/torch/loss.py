"""Torch cross-entropy: the logits are widened to at least fp32 and turned into the gradient in place."""

from __future__ import annotations

import torch

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype
from linnet.ops.loss import IGNORE


@implements("softmax_cross_entropy", "torch")
def softmax_cross_entropy(logits_CV, target_C, return_gradient):
    y_CV = logits_CV.to(accumulate_dtype(logits_CV))
    valid_C = target_C != IGNORE
    index_C1 = target_C.masked_fill(~valid_C, 0).long()[:, None]
    lse_C = y_CV.logsumexp(-1)
    loss_C = (lse_C - y_CV.gather(1, index_C1)[:, 0]) * valid_C
    if not return_gradient:
        return loss_C, None
    p_CV = y_CV.sub_(lse_C[:, None]).exp_()
    p_CV.scatter_add_(1, index_C1, torch.full_like(lse_C, -1.0)[:, None])
    return loss_C, p_CV.mul_(valid_C[:, None]).to(logits_CV.dtype)
