"""Compile the kernels that calls on an H100 or H200 would launch, on any machine: prints one line of JSON per kernel.

Triton's compiler needs no GPU, only a target. Every launch compiles and stops there; what the operators return means nothing.
"""

from __future__ import annotations

import json
import sys

import torch
from machine_code import lost_addresses, machine_code, overwritten_operands
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from linnet import ops
from linnet.ops import _dispatch
from linnet.ops.triton import _hopper, _plan, _ptxas

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
            code = machine_code(kernel.asm["cubin"])
            if lost := lost_addresses(code):
                raise SystemExit(f"{row['kernel']} is compiled wrongly, an address of shared memory is lost in {lost}")
            if early := overwritten_operands(code):
                raise SystemExit(f"{row['kernel']} is compiled wrongly, a product's operand is overwritten by {early}")
        return kernel

    return launch


def tensors(*shapes, dtype=BF):
    return [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def delta_rule(H: int, T: int, K: int, decay: str | None, V: int | None = None, channels: bool = False, **options):
    q, k, v = tensors((1, T, H, K), (1, T, H, K), (1, T, H, V or K))
    erase, write = tensors(k.shape, v.shape) if channels else tensors(*[(1, T, H)] * 2)
    g = {None: None, "scalar": (1, T, H), "channel": (1, T, H, K)}[decay]
    g = None if g is None else tensors(g, dtype=torch.float32)[0]
    o, _ = ops.delta_rule(q, k, v, erase=erase, write=write, log_decay=g, backend="triton", **options)
    o.sum().backward()


def linear(H: int, T: int, decay: str, K: int = 128, **options):
    """As many heads as fill the GPU: time is not split, and the normalizer is in the kernels."""
    q, k, v = tensors(*[(1, T, H, K)] * 3)
    g, gain = tensors((1, T, H) if decay == "scalar" else (1, T, H, K), (1, T, H), dtype=torch.float32)
    if "normalizer" in options:
        options["log_gain"] = gain
    o, _ = ops.linear_attention(q, k, v, g, backend="triton", **options)
    o.sum().backward()


def one_head():
    """What is compiled for the number 1 in the place of any other."""
    linear(1, 256, "channel")
    linear(1, 256, "scalar")
    for decay in (None, "scalar", "channel"):
        delta_rule(1, 256, 128, decay, log_decay_min=None if decay is None else -5.0)


def dplr(H: int, T: int, K: int, decay: str | None, **options):
    q, k, v, a, b = tensors(*[(1, T, H, K)] * 5)
    g = {None: None, "scalar": (1, T, H), "channel": (1, T, H, K)}[decay]
    g = None if g is None else tensors(g, dtype=torch.float32)[0]
    o, _ = ops.dplr(q, k, v, a, b, g, backend="triton", **options)
    o.sum().backward()


def decode(B: int, T: int, K: int):
    """The steps in place of B rows and T tokens, with slots and counts."""
    H, V, D, N = 16, 128, 2048, 16
    x = lambda *shape, dtype=BF: torch.zeros(shape, dtype=dtype)
    full = lambda *shape: x(*shape, dtype=torch.float32)
    q, v, gate, rows = x(B, T, H, K), x(B, T, H, V), x(B, T, H), torch.zeros(B, dtype=torch.int32)
    where = {"slots": rows, "counts": rows, "backend": "triton"}
    step, S = ops.decode, full(B, H, K, V)
    step.linear_attention(q, q, v, full(B, T, H), state=S, **where)
    step.delta_rule(q, q, v, erase=gate, log_decay=full(B, T, H), state=S, **where)
    step.delta_rule(q, q, v, erase=q, write=v, write_key=q, log_decay=full(B, T, H, K), read="before", state=S, **where)
    step.dplr(q, q, v, q, q, full(B, T, H, K), state=S, **where)
    step.short_conv(x(B, T, D), full(D, 4), full(D), "silu", state=full(B, D, 3), **where)
    y, n = x(B, T, D), x(B, T, N)
    step.selective_scan(y, y, full(D, N), n, n, full(D), y, state=full(B, D, N), **where)


CALLS = {
    "decode": lambda: decode(1, 1, 128),
    "decode, wide tiles and several tokens": lambda: decode(64, 4, 256),
    "linear attention, gain and normalizer": lambda: linear(264, 64, "scalar", normalizer="floor"),
    "linear attention, decay per head": lambda: linear(2, 2048, "scalar"),
    "linear attention, decay per head, wide odd sizes": lambda: linear(1, 250, "scalar", K=192, read="before"),
    "linear attention, per channel": lambda: linear(2, 2048, "channel"),
    "linear attention, per channel, bound that leaves all chunks near": lambda: linear(2, 256, "channel", log_decay_min=-1.0),
    "linear attention, per channel, rest of a chunk": lambda: linear(2, 250, "channel", K=64, read="before"),
    "linear attention, per channel, wide": lambda: linear(1, 192, "channel", K=256),
    "delta rule": lambda: delta_rule(2, 256, 128, "scalar"),
    "delta rule, one head and token": lambda: delta_rule(1, 1, 16, None),
    "delta rule, odd sizes": lambda: delta_rule(1, 37, 24, "scalar"),
    "delta rule, wide": lambda: delta_rule(2, 256, 256, "scalar"),
    "delta rule, wide odd sizes": lambda: delta_rule(1, 256, 192, "channel", V=48, log_decay_min=-5.0),
    "delta rule, gates per channel": lambda: delta_rule(2, 256, 128, "channel", channels=True, log_decay_min=-5.0),
    "delta rule, per channel": lambda: delta_rule(2, 256, 128, "channel", log_decay_min=-5.0),
    "delta rule, per channel, rest of a chunk": lambda: delta_rule(4, 250, 64, "channel", log_decay_min=-5.0),
    "dplr": lambda: dplr(2, 256, 128, "channel", log_decay_min=-0.61),
    "gradients of one head": one_head,
    "dplr, narrow": lambda: dplr(1, 256, 64, "channel", log_decay_min=-0.61),
    "dplr, no bound": lambda: dplr(2, 256, 128, "channel"),
    "dplr, odd sizes": lambda: dplr(1, 37, 24, None),
}


if __name__ == "__main__":
    names = sys.argv[1:]
    driver.set_active(Target())
    jit.JITFunction.run = compile_only(jit.JITFunction.run)
    _dispatch._supports.clear()  # the tensors lie on the CPU
    _plan.facts = lambda x: ("sm90", 132)
    _hopper.supported = lambda *_: True
    if names[:1] == ["--as-triton-does"]:
        _ptxas.with_descriptors_in_halves = lambda ptx: ptx
        names = names[1:]
    for name in names or CALLS:
        CALLS[name]()
