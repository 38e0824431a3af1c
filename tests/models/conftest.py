"""Tiny models for the tests of this folder."""

from __future__ import annotations

import pytest
import torch

from linnet.models import LinnetConfig, LinnetForCausalLM

VOCAB = 61


@pytest.fixture
def make_model():
    """`make_model("gla + attention", dtype=torch.float64, tie_embeddings=False)` -> a model in eval mode, seeded."""

    def make(layers: str = "gla + attention", dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> LinnetForCausalLM:
        options = {"vocab_size": VOCAB, "d_model": 16, "heads": 2, "d_ff": 24, "initializer_range": 0.2, **options}
        torch.manual_seed(seed)
        model = LinnetForCausalLM(LinnetConfig(layers=layers, **options))
        with torch.no_grad():  # mixers start with small outputs; a test must notice what they say
            for layer in model.model.layers:
                for part in layer.mixer.modules():
                    if isinstance(part, torch.nn.Linear):
                        part.weight.mul_(6)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def tokens():
    """`tokens(B, T)` -> random token ids [B, T]."""

    def draw(*shape: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))

    return draw
