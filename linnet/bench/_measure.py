"""Timing and memory of a callable, the way every benchmark here does it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def milliseconds(f: Callable[[], Any], *, budget: float = 2.0, most: int = 20) -> float:
    """Median wall-clock milliseconds of f() after one warm-up call; stops after `budget` seconds or `most` calls."""
    f()
    times, begin = [], time.perf_counter()
    while len(times) < 3 or (len(times) < most and time.perf_counter() - begin < budget):
        start = time.perf_counter()
        f()
        times.append((time.perf_counter() - start) * 1e3)
        if time.perf_counter() - begin > 4 * budget:
            break
    return statistics.median(times)


def forward_and_backward(f: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> tuple[Callable, Callable]:
    """Two thunks over f(*inputs) -> output: the forward alone without gradients, and forward plus backward to every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        do = torch.randn_like(f(*inputs))

    def forward():
        with torch.no_grad():
            return f(*inputs)

    def both():
        return torch.autograd.grad(f(*leaves), leaves, do)

    return forward, both


def peak_mib(module: str, case: str, *, threads: int) -> float:
    """Growth of the peak resident memory, in MiB, while `python -m module --memory-case case` runs its case."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    command = [sys.executable, "-m", module, "--memory-case", case, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"memory case {case!r} failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.strip().splitlines()[-1])


def _memory_line(name: str) -> float:
    """A line of /proc/self/status in MiB. (ru_maxrss would start at the parent's peak.)"""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def resident_peak_growth(f: Callable[[], Any]) -> float:
    """MiB by which the peak resident memory during f() exceeds the resident memory before it (Linux)."""
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts again at what is resident now
    before = _memory_line("VmRSS")
    f()
    return _memory_line("VmHWM") - before


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = "unknown"
    try:
        with open("/proc/cpuinfo") as lines:
            model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model)
    except OSError:
        pass
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
