"""Compile the kernels that calls on an H100 or H200 would launch, on any machine: prints one line of JSON per kernel.

Triton's compiler needs no GPU, only a target. Every launch compiles and stops there; what the operators return means nothing.
"""

from __future__ import annotations

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from linnet import ops
from linnet.ops import _dispatch
from linnet.ops.triton import _plan

SHARED = 232448  # bytes of shared memory that a program may have on sm_90
BF = torch.bfloat16


class Target:
    """The part of Triton's driver that compiling asks for."""

    @staticmethod
    def get_current_target():
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def get_current_device():
        return 0

    @staticmethod
    def get_current_stream(device=None):
        return 0


def compile_only(run):
    seen = set()

    def launch(self, *args, grid, warmup=False, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            row = {"kernel": self.fn.__name__, "warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
            print(json.dumps(row), flush=True)
            if row["shared"] > SHARED:
                raise SystemExit(f"{row['kernel']} wants {row['shared']} bytes of shared memory, sm_90 has {SHARED}")
        return kernel

    return launch


def tensors(*shapes, dtype=BF):
    return [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def delta_rule(H: int, T: int, K: int, decay: str | None, **options):
    q, k, v = tensors(*[(1, T, H, K)] * 3)
    (erase,) = tensors((1, T, H))
    g = {None: None, "scalar": (1, T, H), "channel": (1, T, H, K)}[decay]
    g = None if g is None else tensors(g, dtype=torch.float32)[0]
    o, _ = ops.delta_rule(q, k, v, erase=erase, log_decay=g, backend="triton", **options)
    o.sum().backward()


CALLS = {
    "delta rule": lambda: delta_rule(2, 256, 128, "scalar"),
    "delta rule, one head and token": lambda: delta_rule(1, 1, 16, None),
    "delta rule, odd sizes": lambda: delta_rule(1, 37, 24, "scalar"),
    "delta rule, per channel": lambda: delta_rule(2, 256, 128, "channel", log_decay_min=-5.0),
}


if __name__ == "__main__":
    driver.set_active(Target())
    jit.JITFunction.run = compile_only(jit.JITFunction.run)
    _dispatch._supports.clear()  # the tensors lie on the CPU
    _plan.facts = lambda x: ("sm90", 132)
    for name in sys.argv[1:] or CALLS:
        CALLS[name]()
