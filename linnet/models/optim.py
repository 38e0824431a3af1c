"""Which parameters weight decay must leave alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from linnet.mixers import Mixer


def no_weight_decay_parameters(model: nn.Module, *, decay_embeddings: bool = True) -> set[str]:
    """Names of the parameters without weight decay.

    These are all parameters with at most one axis (norms, biases, decays), what the mixers declare (`Mixer.no_weight_decay`),
    and with `decay_embeddings=False` the embeddings (and an output matrix tied to them).
    """
    names = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Mixer):
            own = {name for name, _ in module.named_parameters()}
            for name in module.no_weight_decay:
                # a name may be that of a submodule: all of its parameters are meant
                found = {x for x in own if x == name or x.startswith(f"{name}.")}
                if not found and not hasattr(module, name.split(".")[0]):
                    raise ValueError(f"mixer {module.name!r}: no_weight_decay names {name!r}, which it has no parameter for")
                names |= {prefix + x for x in found}
        elif isinstance(module, nn.Embedding) and not decay_embeddings:
            names.add(f"{prefix}weight")
    return names


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_embeddings: bool = True) -> list[dict[str, Any]]:
    """Two parameter groups for a torch optimiser, with and without weight decay; frozen parameters are left out."""
    excluded = no_weight_decay_parameters(model, decay_embeddings=decay_embeddings)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in named if name not in excluded], "weight_decay": float(weight_decay)},
        {"params": [p for name, p in named if name in excluded], "weight_decay": 0.0},
    ]
