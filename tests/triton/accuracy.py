"""The error that the laws of the kernels are about."""

from __future__ import annotations

import torch


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative root-mean-square error; infinite where a value is not finite."""
    assert got.shape == want.shape
    got, want = got.detach().double(), want.detach().double()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - want).norm() / want.norm().clamp_min(1e-30))
