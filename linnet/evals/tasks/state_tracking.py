"""State tracking: parity, modular arithmetic, cycle navigation (last-token answers) and word problems of finite groups.

Parity, modular arithmetic: the "Chomsky hierarchy" tasks as in Grazzi et al. 2024 (arXiv 2411.12537); a row has between
`min_length` and `length` tokens, the last of which is the padding token and must produce the answer.
Word problems: Merrill et al. 2024 (2404.08819); the product of all elements so far is asked at every position, after a
begin token, without which a zero state stays zero under Householder products.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from linnet.evals.tasks._base import Batch, Task, empty_targets, register_task

PAD = 0


@dataclass(frozen=True, kw_only=True)
class LastAnswer(Task):
    """A row of `min_length` .. `length` tokens; the answer is asked at the last one. Ids: 0 padding, then symbols."""

    length: int = 40
    min_length: int = 3

    def check(self) -> None:
        if not 3 <= self.min_length <= self.length:
            self.refuse("min_length", f"between 3 and length = {self.length}")

    def at(self, **options) -> Task:
        """A longer test has rows from the trained length on, as published, unless min_length is given."""
        if options.get("length", 0) > self.length:
            options.setdefault("min_length", self.length)
        return super().at(**options)

    def rows(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return rng.integers(self.min_length, self.length + 1, size)

    def finish(self, tokens: np.ndarray, lengths: np.ndarray, answer: np.ndarray) -> Batch:
        """Cut every row to its length - 1 symbols and ask for the answer at the padding token that follows."""
        inputs = np.where(np.arange(self.length) < lengths[:, None] - 1, tokens, PAD)
        targets = empty_targets(inputs.shape)
        targets[np.arange(len(inputs)), lengths - 1] = answer
        return Batch(inputs, targets)


@register_task("parity")
@register_task("cycle_navigation", states=5, moves=(0, 1, -1))
@dataclass(frozen=True, kw_only=True)
class ModularSum(LastAnswer):
    """Symbol j moves the state by moves[j] modulo `states`; parity: bits, modulo 2. The answer is the state itself."""

    states: int = 2
    moves: tuple[int, ...] = (0, 1)

    @property
    def input_size(self) -> int:
        return max(len(self.moves) + 1, self.states + 1)

    @property
    def chance(self) -> float:
        return 1 / self.states

    def generate(self, rng, size, split):
        lengths, symbols = self.rows(rng, size), rng.integers(0, len(self.moves), (size, self.length))
        steps = np.where(np.arange(self.length) < lengths[:, None] - 1, np.array(self.moves)[symbols], 0)
        return self.finish(symbols + 1, lengths, steps.sum(1) % self.states + 1)


@register_task("modular_arithmetic")
@dataclass(frozen=True, kw_only=True)
class ModularArithmetic(LastAnswer):
    """num (op num)* = ? modulo `modulus`, products first. Ids: 0 padding, + - * =, then the numbers."""

    modulus: int = 5
    operators: str = "+-*"

    @property
    def input_size(self) -> int:
        return 5 + self.modulus

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def generate(self, rng, size, split):
        m, lengths = self.modulus, self.rows(rng, size)
        lengths -= 1 - lengths % 2  # n numbers, n - 1 operators, "=", answer: 2n + 1 tokens
        slots = self.length // 2 + 1
        number = rng.integers(0, m, (size, slots))
        operator = np.array(["+-*".index(c) for c in self.operators])[rng.integers(0, len(self.operators), (size, slots))]
        tokens = np.stack((number + 5, operator + 1), -1).reshape(size, -1)[:, : self.length]
        tokens[np.arange(size), lengths - 2] = 4
        total, term = np.zeros(size, np.int64), number[:, 0].copy()
        for i in range(1, slots):
            live, op = i < lengths // 2, operator[:, i - 1]
            product, signed = term * number[:, i], np.where(op == 1, -number[:, i], number[:, i])
            total = np.where(live & (op != 2), (total + term) % m, total)
            term = np.where(live, np.where(op == 2, product, signed) % m, term)
        return self.finish(tokens, lengths, 5 + (total + term) % m)


@register_task("modular_arithmetic_brackets")
@dataclass(frozen=True, kw_only=True)
class BracketArithmetic(LastAnswer):
    """A random nested expression of exactly so many symbols, then = and the answer. Ids: 0 padding, + - * ( ) =, numbers.

    An expression of L < 5 symbols is t, -t, (t) or (-t); a longer one is (left op right) with a uniform length of left.
    """

    modulus: int = 5
    operators: str = "+-"

    @property
    def input_size(self) -> int:
        return 7 + self.modulus

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def generate(self, rng, size, split):
        m, lengths = self.modulus, self.rows(rng, size)
        choices = np.array(["+-*".index(c) for c in self.operators])
        tokens = np.zeros((size, self.length), np.int64)
        tokens[np.arange(size), lengths - 2] = 6
        row, start, width = np.arange(size), np.zeros(size, np.int64), lengths - 2
        waves = []  # all sub-expressions of one depth at a time; the children of the inner ones follow, left before right
        while len(row):
            inner = width >= 5
            value = rng.integers(0, m, len(row))
            negative, bracket = ~inner & (width % 2 == 0), ~inner & (width >= 3)
            tokens[row[~inner], (start + bracket + negative)[~inner]] = 7 + value[~inner]
            tokens[row[negative], (start + bracket)[negative]] = 2
            wrapped = inner | bracket
            tokens[row[wrapped], start[wrapped]] = 4
            tokens[row[wrapped], (start + width - 1)[wrapped]] = 5
            left = 1 + (rng.random(len(row)) * (width - 4)).astype(np.int64)
            operator = choices[rng.integers(0, len(choices), len(row))]
            tokens[row[inner], (start + 1 + left)[inner]] = 1 + operator[inner]
            waves.append((inner, operator[inner], np.where(negative, -value, value) % m))
            row = np.repeat(row[inner], 2)
            start = np.stack((start + 1, start + 2 + left), 1)[inner].reshape(-1)
            width = np.stack((left, width - 3 - left), 1)[inner].reshape(-1)
        below = np.zeros((0, 2), np.int64)
        for inner, operator, value in reversed(waves):
            a, b = below[:, 0], below[:, 1]
            value[inner] = np.choose(operator, (a + b, a - b, a * b)) % m
            below = value.reshape(-1, 2) if inner is not waves[0][0] else value
        return self.finish(tokens, lengths, 7 + below)


# ---- word problems -------------------------------------------------------------------------------------------------------


@lru_cache
def group(name: str) -> tuple[np.ndarray, tuple]:
    """(multiplication table [n, n], elements) of z<m>, s<n>, a<n> or a product such as a4xz5; element 0 is the identity."""
    if "x" in name:
        (left, a), (right, b) = (group(part) for part in name.split("x"))
        i, j = (x.reshape(-1) for x in np.meshgrid(range(len(a)), range(len(b)), indexing="ij"))
        table = left[i[:, None], i] * len(b) + right[j[:, None], j]
        return table, tuple(itertools.product(a, b))
    kind, size = name[:1], name[1:]
    if kind not in ("z", "s", "a") or not size.isdigit() or int(size) < 2 or (kind != "z" and int(size) > 6):
        raise ValueError(f"group must be z<m>, s<n>, a<n> with 2 <= n <= 6, or a product such as 'a4xz5'; got {name!r}")
    n = int(size)
    if kind == "z":
        return (np.arange(n)[:, None] + np.arange(n)) % n, tuple(range(n))
    elements = [p for p in itertools.permutations(range(n)) if kind == "s" or _even(p)]
    lookup = {p: i for i, p in enumerate(elements)}
    array = np.array(elements)
    table = np.array([[lookup[tuple(x)] for x in a[array]] for a in array])
    return table, tuple(elements)


def _even(p: tuple[int, ...]) -> bool:
    return sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p))) % 2 == 0


@register_task("word_problem")
@register_task("word_problem_z2", group="z2")
@register_task("word_problem_z3", group="z3")
@register_task("word_problem_z5", group="z5")
@register_task("word_problem_z60", group="z60")
@register_task("word_problem_s3", group="s3")
@register_task("word_problem_s4", group="s4")
@register_task("word_problem_s5", group="s5")
@register_task("word_problem_a4", group="a4")
@register_task("word_problem_a5", group="a5")
@register_task("word_problem_a4xz5", group="a4xz5")
@dataclass(frozen=True, kw_only=True)
class WordProblem(Task):
    """Begin token, then `length` group elements; asked at element i: x_1 . x_2 ... x_i, with (a . b)[j] = a[b[j]].

    generators: "all" elements, or of S_n only "swaps" (and the identity) or "swaps+3cycles". spacing: tokens per element; the
    answer is asked at the last of them, filler (the identity) stands in between.
    """

    length: int = 32
    group: str = "s3"
    generators: str = "all"
    spacing: int = 1

    def check(self) -> None:
        group(self.group)
        if self.generators not in ("all", "swaps", "swaps+3cycles"):
            self.refuse("generators", "'all', 'swaps' or 'swaps+3cycles'")
        if self.generators != "all" and not (self.group[0] == "s" and "x" not in self.group):
            self.refuse("generators", f"'all' for group {self.group!r}")
        if self.spacing < 1:
            self.refuse("spacing", "an integer >= 1")

    @property
    def order(self) -> int:
        return len(group(self.group)[1])

    @property
    def input_size(self) -> int:
        return self.order + 1

    @property
    def chance(self) -> float:
        return 1 / self.order

    def generate(self, rng, size, split):
        table, elements = group(self.group)
        allowed = np.arange(len(elements))
        if self.generators != "all":
            moved = np.array([sum(i != x for i, x in enumerate(p)) for p in elements])
            allowed = np.flatnonzero(moved <= (2 if self.generators == "swaps" else 3))
        x = allowed[rng.integers(0, len(allowed), (size, self.length))]
        y = x.copy()
        for i in range(1, self.length):
            y[:, i] = table[y[:, i - 1], x[:, i]]
        inputs = np.zeros((size, 1 + self.spacing * self.length), np.int64)
        inputs[:, 0], inputs[:, 1 :: self.spacing] = self.order, x
        targets = empty_targets(inputs.shape)
        targets[:, self.spacing :: self.spacing] = y
        return Batch(inputs, targets)
