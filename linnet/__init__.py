"""Linnet: linear-time sequence models in PyTorch.

One recurrence, one model, every published mixer. Importing this package loads nothing but this file: every public name is
resolved on first use, so that a broken or missing optional dependency (Triton, datasets, ...) never breaks the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS = {
    "LinnetConfig": "linnet.models",
    "LinnetForCausalLM": "linnet.models",
    "build_mixer": "linnet.mixers",
    "list_mixers": "linnet.mixers",
    "register_mixer": "linnet.mixers",
    "Mixer": "linnet.mixers",
    "Context": "linnet.mixers",
    "StateSpec": "linnet.mixers",
    "debug": "linnet.ops",
    "list_recipes": "linnet.training",
    "list_tasks": "linnet.evals",
    "info": "linnet._info",
}
_SUBMODULES = ("ops", "mixers", "models", "training", "evals", "bench")

__all__ = [*_EXPORTS, *_SUBMODULES, "__version__"]

if TYPE_CHECKING:
    from linnet._info import info as info
    from linnet.evals import list_tasks as list_tasks
    from linnet.mixers import Context as Context
    from linnet.mixers import Mixer as Mixer
    from linnet.mixers import StateSpec as StateSpec
    from linnet.mixers import build_mixer as build_mixer
    from linnet.mixers import list_mixers as list_mixers
    from linnet.mixers import register_mixer as register_mixer
    from linnet.models import LinnetConfig as LinnetConfig
    from linnet.models import LinnetForCausalLM as LinnetForCausalLM
    from linnet.ops import debug as debug
    from linnet.training import list_recipes as list_recipes


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"linnet.{name}")
    else:
        raise AttributeError(f"module 'linnet' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
