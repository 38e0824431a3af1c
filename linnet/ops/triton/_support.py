"""What the operators with a vector state ask of their operands before the kernels run. Imports no triton."""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops.triton.recurrent import INTERPRETED, unavailable

DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def refusal(operand: Tensor, *tensors: Tensor | None) -> str | None:
    """Why the kernels cannot run on these tensors, None if they can."""
    if operand.device.type != "cuda" and not (operand.device.type == "cpu" and INTERPRETED):
        return "the kernels need a CUDA device (or Triton's interpreter)"
    if not {x.dtype for x in (operand, *tensors) if x is not None} <= DTYPES:
        return "operands must be float32, bfloat16 or float16"
    if operand.numel() == 0:
        return "an operand is empty"
    return unavailable(operand.device.type, operand.device.index or 0)


def rows_of(x: Tensor) -> Tensor:
    """x [B, T, D] itself if its tokens are equally spaced rows of packed values, a packed copy otherwise."""
    B, T, D = x.shape
    packed = (D == 1 or x.stride(2) == 1) and (B == 1 or T == 1 or x.stride(0) == T * x.stride(1)) and (x.stride(1) >= D or T == 1)
    return x if packed and (B == 1 or T > 1) else x.contiguous()
