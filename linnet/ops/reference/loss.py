"""Reference cross-entropy: the formula."""

from __future__ import annotations

import torch

from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype
from linnet.ops.loss import IGNORE


@implements("softmax_cross_entropy", "reference")
def softmax_cross_entropy(logits_CV, target_C, return_gradient):
    logits = logits_CV.to(accumulate_dtype(logits_CV))
    valid_C = target_C != IGNORE
    onehot_CV = torch.arange(logits.shape[1], device=logits.device) == target_C[:, None]
    log_p_CV = logits.log_softmax(-1)
    loss_C = -torch.where(onehot_CV, log_p_CV, 0).sum(-1)
    gradient_CV = (log_p_CV.exp() - onehot_CV.to(logits.dtype)) * valid_C[:, None]
    return loss_C, gradient_CV.to(logits_CV.dtype) if return_gradient else None
