"""Layer patterns: `"3*gated_deltanet + attention(window=256)"` -> one `LayerSpec` per layer. Data, never evaluated as code.

pattern := term ("+" term)*
term    := [COUNT "*"] term | NAME ["(" options ")"] | "(" pattern ")"
options := [NAME "=" value ("," NAME "=" value)*]
value   := number | true | false | none | "text" | word | "[" [value ("," value)*] "]"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

MAX_LAYERS = 10_000  # a typing error such as 33333*gla must not fill the memory

_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<text>"[^"]*"|'[^']*')
      | (?P<mark>[-+*(),=\[\]])""",
    re.VERBOSE,
)
_WORDS = {"true": True, "false": False, "none": None}


class LayerSpec(NamedTuple):
    """One layer: the registered name of its mixer and the mixer's options."""

    mixer: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return self.mixer + (f"({', '.join(f'{k}={v!r}' for k, v in self.options.items())})" if self.options else "")


class _Parser:
    def __init__(self, text: str, argument: str):
        self.text, self.argument, self.index = text, argument, 0
        self.tokens: list[tuple[str, str, int]] = []  # kind, text, position
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                self.fail("a name, a number or one of + * ( ) , = [ ]", repr(text[position]), position)
            if match.lastgroup != "space":
                self.tokens.append((match.lastgroup, match.group(), position))
            position = match.end()
        self.tokens.append(("end", "the end", len(text)))

    def fail(self, expected: str, came: str, position: int) -> NoReturn:
        raise ValueError(f"{self.argument}: expected {expected} at position {position} of {self.text!r}; got {came}")

    def peek(self) -> tuple[str, str]:
        kind, text, _ = self.tokens[self.index]
        return kind, text

    def unexpected(self, expected: str) -> NoReturn:
        kind, text, position = self.tokens[self.index]
        self.fail(expected, text if kind == "end" else repr(text), position)

    def take(self, kind: str, expected: str, mark: str | None = None) -> str:
        found, text = self.peek()
        if found != kind or (mark is not None and text != mark):
            self.unexpected(expected)
        self.index += 1
        return text

    def accept(self, mark: str) -> bool:
        if self.peek() == ("mark", mark):
            self.index += 1
            return True
        return False

    def whole(self) -> list[LayerSpec]:
        specs = self.pattern()
        if self.peek()[0] != "end":
            self.unexpected("'+' or the end")
        return specs

    def pattern(self) -> list[LayerSpec]:
        specs = self.term()
        while self.accept("+"):
            specs = specs + self.term()
        return specs

    def term(self) -> list[LayerSpec]:
        kind, text = self.peek()
        position = self.tokens[self.index][2]
        if kind == "number":
            if not text.isdecimal() or int(text) < 1:
                self.unexpected("a whole number of layers >= 1")
            self.index += 1
            self.take("mark", f"'*' after the count {text}", "*")
            specs = self.term()
            if int(text) * len(specs) > MAX_LAYERS:
                self.fail(f"at most {MAX_LAYERS} layers", f"{int(text) * len(specs)}", position)
            return int(text) * specs
        if self.accept("("):
            specs = self.pattern()
            self.take("mark", "')'", ")")
            return specs
        name = self.take("name", "a mixer name, a count or '('")
        return [LayerSpec(name, self.options() if self.accept("(") else {})]

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        while not self.accept(")"):
            if options:
                self.take("mark", "',' or ')'", ",")
            position = self.tokens[self.index][2]
            name = self.take("name", "an option name")
            if name in options:
                self.fail("every option once", repr(name), position)
            self.take("mark", f"'=' after the option {name!r}", "=")
            options[name] = self.value()
        return options

    def value(self) -> Any:
        if self.accept("["):
            values: list[Any] = []
            while not self.accept("]"):
                if values:
                    self.take("mark", "',' or ']'", ",")
                values.append(self.value())
            return values
        kind, text = self.peek()
        if kind not in ("number", "name", "text"):
            self.unexpected("a number, true, false, none, a word, a quoted text or a list")
        self.index += 1
        if kind == "number":
            return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
        return text[1:-1] if kind == "text" else _WORDS.get(text.lower(), text)


def parse_layers(layers: str | Sequence[str | dict[str, Any]], argument: str = "layers") -> list[LayerSpec]:
    """The layers that a pattern describes.

    Args:
        layers: a pattern, or a list whose entries are patterns or dictionaries `{"mixer": name, option: value, ...}`.
        argument: what the error messages call the input.

    Raises:
        ValueError: with the position in the pattern (or the index in the list), what was expected and what came.
    """
    if isinstance(layers, str):
        return _Parser(layers, argument).whole()
    if not isinstance(layers, Sequence) or not layers:
        raise ValueError(f"{argument} must be a pattern such as '3*gla + attention' or a non-empty list; got {layers!r}")
    specs: list[LayerSpec] = []
    for index, entry in enumerate(layers):
        if isinstance(entry, str):
            specs += parse_layers(entry, f"{argument}[{index}]")
        elif isinstance(entry, dict) and isinstance(entry.get("mixer"), str):
            specs.append(LayerSpec(entry["mixer"], {k: v for k, v in entry.items() if k != "mixer"}))
        else:
            raise ValueError(f"{argument}[{index}] must be a pattern or a dictionary with the key 'mixer'; got {entry!r}")
    if len(specs) > MAX_LAYERS:
        raise ValueError(f"{argument} must describe at most {MAX_LAYERS} layers; got {len(specs)}")
    return specs
