"""Names of mixers. A module of this package is imported when one of its mixers is first asked for by name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from typing import Any

from linnet.mixers._base import Mixer
from linnet.mixers._options import describe

_registry: dict[str, type[Mixer]] = {}


def register_mixer(name: str):
    """Class decorator: `@register_mixer("gated_deltanet")` on a `Mixer` with a frozen dataclass `Config`."""

    def register(cls: type[Mixer]) -> type[Mixer]:
        known = _registry.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"register_mixer: name {name!r} must be new; it already names {known.__module__}.{known.__qualname__}")
        params = getattr(getattr(cls, "Config", None), "__dataclass_params__", None)
        if params is None or not params.frozen:
            raise ValueError(
                f"register_mixer: {cls.__name__}.Config must be a frozen dataclass; got {getattr(cls, 'Config', None)!r}"
            )
        cls.name = name
        describe(cls.Config)
        _registry[name] = cls
        return cls

    return register


def _builtin() -> list[str]:
    import linnet.mixers as package

    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def list_mixers() -> list[str]:
    """All registered mixer names, built in and the user's own."""
    for module in _builtin():
        importlib.import_module(f"linnet.mixers.{module}")
    return sorted(_registry)


def get_mixer(name: str) -> type[Mixer]:
    """The class registered under `name`."""
    if name not in _registry and name in _builtin():
        importlib.import_module(f"linnet.mixers.{name}")
    if name not in _registry:
        names = list_mixers()  # a module may register several names
        if name not in _registry:
            close = difflib.get_close_matches(name, names, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"mixer name must be one of {', '.join(names)}; got {name!r}{hint}")
    return _registry[name]


def mixer_config(name: str, d_model: int, heads: int | None = None, **options: Any):
    """The config of mixer `name`; unknown options are refused with the list of the known ones."""
    cls = get_mixer(name)
    known = {f.name for f in dataclasses.fields(cls.Config)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"mixer {name!r}: option must be one of {', '.join(sorted(known - {'d_model', 'heads'}))}; got {unknown[0]!r}"
        )
    if heads is not None and "heads" in known:
        options["heads"] = heads
    return cls.Config(d_model=d_model, **options)


def build_mixer(
    name: str, d_model: int, heads: int | None = None, *, layer_index: int = 0, num_layers: int = 1, **options: Any
) -> Mixer:
    """Make a mixer by name: `build_mixer("kda", 512, 4, expand_v=2)`. `heads` is ignored where it has no meaning."""
    config = mixer_config(name, d_model, heads, **options)
    return get_mixer(name)(config, layer_index=layer_index, num_layers=num_layers)
