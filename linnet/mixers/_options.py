"""Options of a mixer, declared once: default, meaning and check stand in the line of the field.

    @dataclass(frozen=True)
    class GLAConfig(MixerConfig, mixer="gla"):
        heads: int = size(4, "query heads")
        expand_k: float = number(0.5, "key width over d_model", above=0)
        gate: str = choice("silu", "activation of the output gate", "silu", "sigmoid")

The docstring of the config, the refusal of a bad value and `linnet info` come from these lines. What ties several options together
goes into `check`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

Check = Callable[[Any], str | None]  # what was expected, where the value is bad


def refuse(mixer: str, option: str, expected: str, came: object) -> NoReturn:
    raise ValueError(f"{mixer}: option '{option}' must be {expected}; got {came!r}")


def _option(default: Any, doc: str, check: Check) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc, "check": check})


def size(default: int | None, doc: str, *, least: int = 1) -> Any:
    """A whole number >= `least`; None is allowed where it is the default."""

    def check(value: Any) -> str | None:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return None if good or (value is None and default is None) else f"an integer >= {least}"

    return _option(default, doc, check)


def number(default: float | None, doc: str, *, above: float = -math.inf, below: float = math.inf) -> Any:
    """A number strictly between `above` and `below`; None is allowed where it is the default."""

    def check(value: Any) -> str | None:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and above < value < below
        return None if good or (value is None and default is None) else f"a number in ({above:g}, {below:g})"

    return _option(default, doc, check)


def choice(default: Any, doc: str, *allowed: Any) -> Any:
    """One of `allowed`."""

    def check(value: Any) -> str | None:
        good = any(value is x or (isinstance(value, str) and value == x) for x in allowed)
        return None if good else "one of " + ", ".join(map(repr, allowed))

    return _option(default, doc, check)


def flag(default: bool, doc: str) -> Any:
    """True or False."""
    return choice(default, doc, True, False)


def interval(default: tuple[float, float], doc: str) -> Any:
    """Two numbers (low, high) with 0 <= low < high; a list (JSON, YAML) becomes a tuple."""

    def check(value: Any) -> str | None:
        good = isinstance(value, (tuple, list)) and len(value) == 2 and 0 <= value[0] < value[1]
        return None if good else "two numbers (low, high) with 0 <= low < high"

    return _option(default, doc, check)


@dataclass(frozen=True)
class MixerConfig:
    """Base of the options of every mixer."""

    mixer: ClassVar[str] = ""

    d_model: int = dataclasses.field(metadata={"doc": "width of the hidden states", "check": size(1, "").metadata["check"]})

    def __init_subclass__(cls, mixer: str | None = None, **options: Any):
        super().__init_subclass__(**options)
        if mixer is not None:
            cls.mixer = mixer

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            expected = field.metadata["check"](value) if "check" in field.metadata else None
            if expected is not None:
                refuse(self.mixer, field.name, expected, value)
            if isinstance(value, list):  # configs read from JSON or YAML
                object.__setattr__(self, field.name, tuple(value))
        self.check()

    def check(self) -> None:
        """Conditions between options; raises through `refuse`."""

    def refuse(self, option: str, expected: str) -> NoReturn:
        refuse(self.mixer, option, expected, getattr(self, option))

    def divide(self, option: str, width: float, parts: int) -> int:
        """width / parts channels; a ValueError naming `option` unless the result is an integer >= 1."""
        each = width / parts
        if each != int(each) or each < 1:
            expected = f"such that {width:g} channels divide evenly by {parts} heads"
            refuse(self.mixer, option, expected, f"{each:g} channels per head")
        return int(each)

    @classmethod
    def options(cls) -> Iterable[tuple[str, Any, str]]:
        """(name, default, meaning) of every option but d_model."""
        for field in dataclasses.fields(cls):
            if field.name != "d_model":
                yield field.name, field.default, field.metadata.get("doc", "")


def describe(config: type) -> None:
    """Write the options into the docstring of a config class."""
    if issubclass(config, MixerConfig):
        lines = (f"    {name} = {default!r}: {doc}" for name, default, doc in config.options())
        config.__doc__ = "\n".join((f"Options of `{config.mixer}`.", "", *lines))
