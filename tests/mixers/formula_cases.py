"""What the formula tests share: a mixer away from its initialisation, an input, heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linnet.mixers import build_mixer


def perturbed(name: str, d_model: int, heads: int, *, layer_index: int = 0, num_layers: int = 1, noise: float = 0.3, **options):
    """A mixer in fp64 with noise on every parameter, so that no part of it is silent."""
    torch.manual_seed(0)
    mixer = build_mixer(name, d_model, heads, layer_index=layer_index, num_layers=num_layers, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return mixer


def input_fixture(tokens: int, d_model: int):
    """A fixture: one sequence [T, D]."""

    @pytest.fixture
    def x() -> Tensor:
        return torch.randn(tokens, d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    return x


def heads_first(y: Tensor, count: int) -> Tensor:
    """[T, heads * channels] -> [heads, T, channels]"""
    return y.unflatten(-1, (count, -1)).transpose(0, 1)


def merged(o: Tensor) -> Tensor:
    """[H, T, V] -> [T, H*V]"""
    return o.transpose(0, 1).flatten(1)


def rms(y: Tensor, weight: Tensor | float = 1.0, eps: float = 1e-5) -> Tensor:
    return weight * y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
