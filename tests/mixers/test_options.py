"""Options of a mixer, declared once: what passes, what is refused, and what the config says of itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from linnet.mixers._options import MixerConfig, choice, describe, flag, interval, number, option, share, size


@dataclass(frozen=True)
class Example(MixerConfig, mixer="example"):
    heads: int = size(4, "heads")
    kv_heads: int | None = size(None, "a divisor of heads", divides="heads")
    value_heads: int | None = size(None, "a multiple of heads", multiple_of="heads")
    taps: int | None = size(4, "None is allowed where the type says so")
    rank: int = size(0, "zero is a rank", least=0)
    low: float = number(0.1, "open", above=0)
    high: float = number(0.5, "above another option, closed at 1", above="low", most=1)
    eps: float = number(0.0, "closed at 0", least=0)
    expand: float = share(2, "whole channels")
    expand_k: float = share(1.0, "whole channels of every head", parts="heads")
    gate: str | None = choice("silu", "one of", "silu", "sigmoid", None)
    bias: bool = flag(False, "yes or no")
    span: tuple[float, float] = interval((1.0, 16.0), "two numbers")
    decays: str | tuple[float, ...] = option("none", "anything")


GOOD = [
    {"kv_heads": 2}, {"value_heads": 8}, {"taps": None}, {"rank": 0}, {"high": 1}, {"eps": 0}, {"expand": 1.5}, {"expand_k": 0.25},
    {"gate": None}, {"span": [0, 1]}, {"decays": [-1.0, -2.0]},
]  # fmt: skip
BAD = [
    ("heads", 0), ("heads", 2.0), ("heads", True), ("heads", None), ("kv_heads", 3), ("value_heads", 6), ("taps", 0), ("rank", -1),
    ("rank", None), ("low", 0), ("low", float("nan")), ("high", 0.1), ("high", 1.01), ("eps", -1e-9), ("expand", 0),
    ("expand", 1.03), ("expand", None), ("expand_k", 0.3), ("gate", "relu"), ("gate", 1), ("bias", 1), ("bias", None),
    ("span", (1, 1)), ("span", (-1, 1)), ("span", ("a", "b")), ("span", None),
]  # fmt: skip


@pytest.mark.parametrize("options", GOOD)
def test_good_values_pass_and_lists_become_tuples(options):
    for name, value in options.items():
        assert getattr(Example(16, **options), name) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("name,value", BAD)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"example: option '{name}' must be .*; got "):
        Example(16, **{name: value})


def test_the_docstring_of_a_config_is_made_of_its_options():
    describe(Example)
    assert "    rank = 0: zero is a rank" in Example.__doc__ and "d_model" not in Example.__doc__
