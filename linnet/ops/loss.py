"""Softmax cross-entropy of given logits together with its gradient: what a chunked loss needs of every chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops import _checks as check
from linnet.ops._dispatch import call

IGNORE = -100


def softmax_cross_entropy(
    logits_CV: Tensor, target_C: Tensor, *, return_gradient: bool = True, backend: str | None = None
) -> tuple[Tensor, Tensor | None]:
    r"""Cross-entropies and their gradients, without recording for autograd.

        loss_c = logsumexp(logits_c) - logits_c[target_c]        d loss_c / d logits_c = softmax(logits_c) - onehot(target_c)

    Args:
        logits_CV: [C, V], real. May be overwritten with the gradient, so that no second [C, V] exists.
        target_C: [C], class ids; -100 leaves a row out: loss and gradient 0.

    Returns:
        (loss [C] in at least fp32, gradient [C, V] in the dtype of the logits, or None unless `return_gradient`).

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    op = "softmax_cross_entropy"
    check.tensor(op, "logits_CV", logits_CV, "[C, V]", 2)
    if logits_CV.is_complex():
        check.refuse(op, "logits_CV", "real", check.describe(logits_CV))
    if not isinstance(target_C, Tensor) or target_C.is_floating_point() or target_C.shape != logits_CV.shape[:1]:
        check.refuse(op, "target_C", f"an integer tensor [{logits_CV.shape[0]}] of class ids", check.describe(target_C))
    if target_C.device != logits_CV.device:
        check.refuse(op, "target_C", f"on {logits_CV.device} like the logits", f"a tensor on {target_C.device}")
    with torch.no_grad():
        return call(op, backend, logits_CV=logits_CV, target_C=target_C, return_gradient=return_gradient)
