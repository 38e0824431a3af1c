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


def tiles(a: Tensor, rows: int):
    """The descriptor of a, bf16: tiles of `rows` tokens of [B, T, H, D] as rows_of leaves them; rows = D: states [..., D, D]."""
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    D = a.shape[-1]
    width, stride = (D, D) if rows == D else (a.shape[-2] * D, a.stride(-3))
    layout = NVMMASharedLayout.get_default_for([rows, D], bfloat16)
    return TensorDescriptor(a, [a.numel() // width, width], [stride, 1], [rows, D], layout)
