"""Launching the Gluon kernels of `_kernel_hopper.py` and `_kernel_hopper_dplr.py`."""

from __future__ import annotations

import functools
import importlib

from torch import Tensor

VERSIONS = ("3.6.",)  # of Triton: Gluon is an experimental part of it, and these kernels were run with no other


def supported(on_gpu: bool, architecture: str) -> bool:
    """Whether they run here: not under the interpreter, and only on the architecture that they are written for."""
    import triton

    return on_gpu and architecture == "sm90" and triton.__version__.startswith(VERSIONS)


def kernel(name: str):
    # imported where it runs: other versions of Triton may not have what it imports
    module = "_kernel_hopper_dplr" if name == "dplr_hopper" else "_kernel_hopper"
    return getattr(importlib.import_module(f"linnet.ops.triton.{module}"), name)


def of_tokens(a: Tensor, rows: int, columns: int, size: int = 2):
    """The descriptor of a [B, T, H, D] as rows_of leaves it: tiles of `rows` tokens and `columns` of the H*D columns.

    size: bytes of a number, bf16 or fp32.
    """
    return _tiles(a, a.shape[2] * a.shape[3], a.stride(1), rows, columns, size)


def of_states(a: Tensor, rows: int, columns: int):
    """The descriptor of a [..., D, E]: tiles of the rows of all of them, one under another."""
    return _tiles(a, a.shape[-1], a.shape[-1], rows, columns)


def _tiles(a: Tensor, width: int, stride: int, rows: int, columns: int, size: int = 2):
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(a, [a.numel() // width, width], [stride, 1], [rows, columns], _layout(rows, columns, size))


@functools.lru_cache(None)
def _layout(rows: int, columns: int, size: int):
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float32

    return NVMMASharedLayout.get_default_for([rows, columns], {2: bfloat16, 4: float32}[size])
