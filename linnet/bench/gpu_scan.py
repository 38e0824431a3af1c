"""Measure the Triton kernels of the operators with a vector state, of the norms and of the loss beside the torch backend.

    python -m linnet.bench.gpu_scan [--json rows.json]

Times are medians in ms; the floor is every input read once and every output written once at the measured bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import linnet.ops as ops
from linnet.bench.gpu import BANDWIDTH, median

Case = tuple[dict[str, Tensor], Callable[..., Tensor], int, int]


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def selective_scan(B: int = 8, T: int = 4096, D: int = 2048, N: int = 16) -> Case:
    x = {
        "x_BTD": _normal(B, T, D), "delta_BTD": 0.1 * _normal(B, T, D).abs(), "z_BTD": _normal(B, T, D),
        "A_DN": -torch.arange(1.0, N + 1, device="cuda").expand(D, N).contiguous(), "B_BTN": _normal(B, T, N),
        "C_BTN": _normal(B, T, N), "D_D": _normal(D, dtype=torch.float32),
    }  # fmt: skip
    return x, lambda backend, **y: ops.selective_scan(**y, backend=backend)[0], 8 * B * T * D, 14 * B * T * D


def scan(B: int = 8, T: int = 4096, D: int = 2048) -> Case:
    x = {"x": _normal(B, T, D), "log_a": -torch.rand(B, T, D, device="cuda")}
    return x, lambda backend, **y: ops.scan(**y, backend=backend)[0], 8 * B * T * D, 14 * B * T * D


def short_conv(B: int = 8, T: int = 4096, D: int = 6144, W: int = 4) -> Case:
    x = {"x_BTD": _normal(B, T, D), "weight_DW": _normal(D, W, dtype=torch.float32)}
    return x, lambda backend, **y: ops.short_conv(**y, activation="silu", backend=backend)[0], 4 * B * T * D, 6 * B * T * D


def gated_rms_norm(B: int = 8, T: int = 4096, H: int = 16, V: int = 128) -> Case:
    x = {"x": _normal(B, T, H, V), "gate": _normal(B, T, H, V), "weight": torch.ones(V, device="cuda")}
    return x, lambda backend, **y: ops.gated_rms_norm(**y, backend=backend), 6 * B * T * H * V, 10 * B * T * H * V


def l2_norm(B: int = 8, T: int = 4096, H: int = 16, K: int = 128) -> Case:
    return {"x": _normal(B, T, H, K)}, lambda backend, x: ops.l2_norm(x, backend=backend), 4 * B * T * H * K, 6 * B * T * H * K


CASES = {f.__name__: f for f in (selective_scan, scan, short_conv, gated_rms_norm, l2_norm)}


def measure(name: str, backend: str) -> dict[str, Any]:
    x, run, forward_bytes, backward_bytes = CASES[name]()
    leaves = {n: a.requires_grad_() for n, a in x.items()}
    start = time.perf_counter()
    do = torch.randn_like(run(backend, **leaves))
    both = lambda: torch.autograd.grad(run(backend, **leaves), list(leaves.values()), do)
    both()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    with torch.no_grad():
        forward = median(lambda: run(backend, **leaves))
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    total = median(both)
    return dict(
        op=name, backend=backend, forward_ms=forward, both_ms=total, forward_floor=forward_bytes / BANDWIDTH * 1e3,
        both_floor=(forward_bytes + backward_bytes) / BANDWIDTH * 1e3,
        peak_mib=(torch.cuda.max_memory_allocated() - held) / 2**20, first_call_s=first,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(CASES))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    rows = []
    for name in options.ops.split(","):
        for backend in ("triton", "torch"):
            row = measure(name, backend)
            rows.append(row)
            print(
                f"{name:15s} {backend:7s} forward {row['forward_ms']:.3f} (floor {row['forward_floor']:.3f})  forward+backward "
                f"{row['both_ms']:.3f} (floor {row['both_floor']:.3f})  peak {row['peak_mib']:.0f} MiB  "
                f"first call {row['first_call_s']:.1f} s",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
