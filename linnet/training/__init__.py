"""Text, tokenizers, and training runs.

Everything is loaded on first use: reading a configuration or a text needs no model, training brings transformers'
Trainer.
"""

from __future__ import annotations

import importlib

_EXPORTS = {
    "Corpus": "data",
    "PackedBatches": "data",
    "RunConfig": "config",
    "build_tokenizer": "tokenization",
    "compare": "comparison",
    "list_recipes": "config",
    "load_config": "config",
    "load_corpus": "data",
    "load_text": "trainer",
    "train": "trainer",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'linnet.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"linnet.training.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
