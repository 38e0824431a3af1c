"""Backend `triton` of softmax_cross_entropy. Triton itself is imported at the first call."""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

import importlib

import torch
from torch import Tensor

from linnet.ops._dispatch import implements
from linnet.ops.loss import IGNORE
from linnet.ops.triton._support import refusal


def supports(arguments: dict) -> str | None:
    """Reason why a call cannot run on this kernel, None if it can."""
    return refusal(arguments["logits_CV"])


@torch.library.custom_op("linnet::triton_cross_entropy_", mutates_args=("logits",))
def cross_entropy_op(logits: Tensor, target: Tensor, gradient: bool) -> Tensor:
    """Losses [C]; with `gradient` the logits become their gradient."""
    return importlib.import_module("linnet.ops.triton._kernel_loss").cross_entropy_(logits, target, IGNORE, gradient)


@cross_entropy_op.register_fake
def _(logits, target, gradient):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@implements("softmax_cross_entropy", "triton", supports)
def softmax_cross_entropy(logits_CV, target_C, return_gradient):
    logits_CV = logits_CV if logits_CV.stride(1) == 1 else logits_CV.contiguous()
    loss_C = cross_entropy_op(logits_CV, target_C.contiguous(), return_gradient)
    return loss_C, logits_CV if return_gradient else None
