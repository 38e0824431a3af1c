"""Options of a mixer, declared once: default, meaning and check stand in the line of the field.

    @dataclass(frozen=True)
    class GLAConfig(MixerConfig, mixer="gla"):
        heads: int = size(4, "query heads")
        expand_k: float = number(0.5, "key width over d_model", above=0)
        gate: str = choice("silu", "activation of the output gate", "silu", "sigmoid")

The docstring of the config, the refusal of a bad value and `linnet info` come from these lines. None is allowed where the type says
so, and a list (JSON, YAML) becomes a tuple. What ties several options together and cannot be said in a line goes into `check`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

Check = Callable[[Any, Any], str | None]  # (value, config) -> what was expected, where the value is bad


def refuse(mixer: str, option: str, expected: str, came: object) -> NoReturn:
    raise ValueError(f"{mixer}: option '{option}' must be {expected}; got {came!r}")


def option(default: Any, doc: str, check: Check = lambda value, config: None) -> Any:
    """Anything that `check` lets pass."""
    return dataclasses.field(default=default, metadata={"doc": doc, "check": check})


def _is_number(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds or (int, float)) and not isinstance(value, bool)


def size(default: int | None, doc: str, *, least: int = 1, divides: str = "", multiple_of: str = "") -> Any:
    """A whole number >= `least`; where named, it divides another option or is a multiple of it."""

    def check(value: Any, config: Any) -> str | None:
        if not _is_number(value, int) or value < least:
            return f"an integer >= {least}"
        if divides and getattr(config, divides) % value:
            return f"a divisor of {divides} = {getattr(config, divides)}"
        if multiple_of and value % getattr(config, multiple_of):
            return f"a multiple of {multiple_of} = {getattr(config, multiple_of)}"
        return None

    return option(default, doc, check)


def number(
    default: float | None, doc: str, *, above: float | str = -math.inf, below: float = math.inf, least: float | None = None,
    most: float | None = None,
) -> Any:  # fmt: skip
    """A number in (above, below), with `least` and `most` in [least, most]; `above` may name an option."""

    def check(value: Any, config: Any) -> str | None:
        low, high = getattr(config, above) if isinstance(above, str) else above, below
        good = _is_number(value) and (value > low if least is None else value >= least)
        if good and (value < high if most is None else value <= most):
            return None
        return f"a number in {f'({low:g}' if least is None else f'[{least:g}'}, {f'{high:g})' if most is None else f'{most:g}]'}"

    return option(default, doc, check)


def share(default: float, doc: str, of: str = "d_model", parts: str = "") -> Any:
    """A number > 0 that times the option `of` is a whole number of channels, for each of `parts` heads."""

    def check(value: Any, config: Any) -> str | None:
        if not _is_number(value) or not value > 0:
            return "a number in (0, inf)"
        whole, count = getattr(config, of), getattr(config, parts) if parts else 1
        each = whole * value / count
        if each == int(each) and each >= 1:
            return None
        return f"such that {of} = {whole} times it " + (f"divides evenly by {count} heads" if parts else "is a whole number")

    return option(default, doc, check)


def choice(default: Any, doc: str, *allowed: Any) -> Any:
    """One of `allowed`."""

    def check(value: Any, config: Any) -> str | None:
        good = any(value is x or (isinstance(value, str) and value == x) for x in allowed)
        return None if good else "one of " + ", ".join(map(repr, allowed))

    return option(default, doc, check)


def flag(default: bool | None, doc: str) -> Any:
    """True or False."""
    return choice(default, doc, True, False)


def interval(default: tuple[float, float] | None, doc: str) -> Any:
    """Two numbers (low, high) with 0 <= low < high."""

    def check(value: Any, config: Any) -> str | None:
        good = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_number, value))
        return None if good and 0 <= value[0] < value[1] else "two numbers (low, high) with 0 <= low < high"

    return option(default, doc, check)


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
            none = value is None and "None" in str(field.type)
            expected = field.metadata["check"](value, self) if "check" in field.metadata and not none else None
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
