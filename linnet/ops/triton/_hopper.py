"""Launching the Gluon kernels of `_kernel_hopper.py`."""

from __future__ import annotations

from torch import Tensor

VERSIONS = ("3.6.",)  # of Triton: Gluon is an experimental part of it, and these kernels were run with no other


def supported(on_gpu: bool, architecture: str) -> bool:
    """Whether they run here: not under the interpreter, and only on the architecture that they are written for."""
    import triton

    return on_gpu and architecture == "sm90" and triton.__version__.startswith(VERSIONS)


def kernel(name: str):
    from linnet.ops.triton import _kernel_hopper  # imported where it runs: other versions of Triton may not have what it imports

    return getattr(_kernel_hopper, name)


def of_tokens(a: Tensor, rows: int, columns: int):
    """The descriptor of a [B, T, H, D], bf16, as rows_of leaves it: tiles of `rows` tokens and `columns` of the H*D columns."""
    return _tiles(a, a.shape[2] * a.shape[3], a.stride(1), rows, columns)


def of_states(a: Tensor, rows: int, columns: int):
    """The descriptor of a [..., D, E], bf16: tiles of the rows of all of them, one under another."""
    return _tiles(a, a.shape[-1], a.shape[-1], rows, columns)


def _tiles(a: Tensor, width: int, stride: int, rows: int, columns: int):
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout.get_default_for([rows, columns], bfloat16)
    return TensorDescriptor(a, [a.numel() // width, width], [stride, 1], [rows, columns], layout)
