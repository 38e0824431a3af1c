"""What the custom operators of every backend share."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_double_backward(backward_op) -> None:
    """Make differentiating a backward operator a clear error instead of a silent zero."""
    name = backward_op._qualname.replace("::", ".").removesuffix("_backward")

    def refuse(ctx, *grads):
        raise RuntimeError(f"{name}: double backward is not implemented; use backend='reference' for second derivatives")

    backward_op.register_autograd(refuse)


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
