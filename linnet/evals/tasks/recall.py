"""Associative recall and memories: multi-query associative recall (MQAR) and its variants, palindrome, copy, stacks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from linnet.evals.tasks._base import (
    IGNORE,
    Batch,
    Task,
    choices,
    class_metrics,
    distinct,
    empty_targets,
    power_law_slots,
    register_task,
)


@register_task("mqar")
@register_task("mqar_forgetting", pairs=8, updates=4)
@register_task("mqar_long", vocabulary=8192, length=256, pairs=32, spread=0.1, filler="random")
@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023 (arXiv 2312.04927).

    k1 v1 ... kD vD, then each key once more at a slot drawn from a power law; at that position its value is asked (and not
    shown). Keys are distinct ids of the lower half of the vocabulary, values of the upper half; id 0 is the filler.

    pairs: D, or several, one of which is drawn per training batch; validation and test have the largest. spread: exponent a of
    p(slot j) ~ (j + 1)^(a - 1). filler: "zero" or "random" ids, which may collide with keys. passes: how often the pairs are
    shown. updates: so many keys get a new value after the pairs; the last one counts (a memory that adds gives the sum).
    `mqar_long`: the setting of the length test of Kaczmarz Linear Attention (2605.08587), 256 tokens, tested on longer rows; keys
    and slots are distinct here, so that it can be solved.
    """

    vocabulary: int = 128
    pairs: int | tuple[int, ...] = (4, 8, 16)
    spread: float = 0.01
    filler: str = "zero"
    passes: int = 1
    updates: int = 0

    def check(self) -> None:
        counts = self.pairs if isinstance(self.pairs, tuple) else (self.pairs,)
        if self.filler not in ("zero", "random"):
            self.refuse("filler", "'zero' or 'random'")
        if min(counts) < max(1, self.updates) or max(counts) > self.vocabulary // 2 - 1:
            self.refuse("pairs", f"between max(1, updates) and vocabulary / 2 - 1 = {self.vocabulary // 2 - 1}")
        need = 2 * (self.passes + 1) * max(counts) + 2 * self.updates
        if self.length < need or self.length % 2:
            self.refuse("length", f"even and at least {need}, twice the pairs, updates and queries")

    @property
    def input_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - self.vocabulary // 2)

    def generate(self, rng, size, split):
        several = (self.pairs,) if isinstance(self.pairs, int) else self.pairs
        D = several[rng.integers(len(several))] if split == "train" and len(several) > 1 else max(several)
        half = self.vocabulary // 2
        keys, values = distinct(rng, size, D, 1, half), distinct(rng, size, D, half, self.vocabulary)
        context = np.tile(np.stack((keys, values), -1).reshape(size, -1), self.passes)
        changed = np.zeros((size, D), bool)
        if self.updates:
            who = distinct(rng, size, self.updates, 0, D)
            new = rng.integers(half, self.vocabulary, who.shape)
            context = np.concatenate((context, np.stack((np.take_along_axis(keys, who, 1), new), -1).reshape(size, -1)), 1)
            np.put_along_axis(values, who, new, 1)
            np.put_along_axis(changed, who, True, 1)
        begin = context.shape[1]
        inputs = np.zeros((size, self.length), np.int64)
        if self.filler == "random":
            inputs = rng.integers(0, self.vocabulary, (size, self.length))
        inputs[:, :begin] = context
        place = begin + 2 * power_law_slots(rng, size, D, (self.length - begin) // 2, self.spread)
        targets, updated = empty_targets(inputs.shape), np.zeros(inputs.shape, bool)
        for array, content in ((inputs, keys), (targets, values), (updated, changed)):
            np.put_along_axis(array, place, content, 1)
        return Batch(inputs, targets, {"updated": updated} if self.updates else {})

    def metrics(self, output, batch):
        sums = super().metrics(output, batch)
        if self.updates:
            asked, right = batch.targets != IGNORE, choices(output) == batch.targets
            updated = batch.info["updated"]
            sums["accuracy_updated"] = class_metrics(right, asked & updated)["accuracy"]
            sums["accuracy_kept"] = class_metrics(right, asked & ~updated)["accuracy"]
        return sums


@register_task("mqar_compositional")
@dataclass(frozen=True, kw_only=True)
class CompositionalMQAR(Task):
    """MQAR whose keys are pairs (a, b) of a grid x grid table: neither part alone tells the value. Ids: thirds for a, b, value."""

    length: int = 128
    vocabulary: int = 96
    grid: int = 3
    spread: float = 0.01

    def check(self) -> None:
        if not 2 <= self.grid or self.grid**2 > self.vocabulary // 3 - 1:
            self.refuse("grid", f"at least 2, with grid^2 values at most vocabulary / 3 - 1 = {self.vocabulary // 3 - 1}")
        if self.length < 6 * self.grid**2:
            self.refuse("length", f"at least 6 grid^2 = {6 * self.grid**2}")

    @property
    def input_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary // 3)

    def generate(self, rng, size, split):
        third, g, D = self.vocabulary // 3, self.grid, self.grid**2
        a, b = distinct(rng, size, g, 1, third), distinct(rng, size, g, third, 2 * third)
        order = rng.random((size, D)).argsort(1)
        a, b = np.take_along_axis(a, order // g, 1), np.take_along_axis(b, order % g, 1)
        value = distinct(rng, size, D, 2 * third, 3 * third)
        inputs = np.zeros((size, self.length), np.int64)
        inputs[:, : 3 * D] = np.stack((a, b, value), -1).reshape(size, -1)
        place = 3 * D + 3 * power_law_slots(rng, size, D, (self.length - 3 * D) // 3, self.spread)
        targets = empty_targets(inputs.shape)
        for array, offset, content in ((inputs, 0, a), (inputs, 1, b), (targets, 1, value)):
            np.put_along_axis(array, place + offset, content, 1)
        return Batch(inputs, targets)


@register_task("palindrome")
@register_task("copy", order="forward")
@dataclass(frozen=True, kw_only=True)
class Palindrome(Task):
    """n = length / 2 random symbols, a separator, and the same backward ("copy": forward), asked from the separator on."""

    vocabulary: int = 128
    order: str = "backward"

    def check(self) -> None:
        if self.order not in ("backward", "forward"):
            self.refuse("order", "'backward' or 'forward'")
        if self.length % 2:
            self.refuse("length", "even")

    @property
    def input_size(self) -> int:
        return self.vocabulary + 1

    @property
    def chance(self) -> float:
        return 1 / self.vocabulary

    def generate(self, rng, size, split):
        source = rng.integers(0, self.vocabulary, (size, self.length // 2))
        again = source[:, ::-1] if self.order == "backward" else source
        separator = np.full((size, 1), self.vocabulary)
        targets = np.concatenate((empty_targets(source.shape), again), 1)
        return Batch(np.concatenate((source, separator, again[:, :-1]), 1), targets)


@register_task("stack")
@dataclass(frozen=True, kw_only=True)
class Stack(Task):
    """Steps of three tokens: "push s v", or "pop s v" with v the last value of stack s; asked at the s of a pop.

    Ids: push, pop, stacks, values. A pop takes a stack that is not empty. Synthetic task of Kimi Linear (arXiv 2510.26692).
    """

    length: int = 255
    stacks: int = 64
    values: int = 26
    push: float = 0.6

    @property
    def input_size(self) -> int:
        return 2 + self.stacks + self.values

    @property
    def chance(self) -> float:
        return 1 / self.values

    def generate(self, rng, size, split):
        steps, row = -(-self.length // 3), np.arange(size)
        memory, height = np.zeros((size, self.stacks, steps), np.int64), np.zeros((size, self.stacks), np.int64)
        pushes, which = rng.random((size, steps)) < self.push, rng.random((size, steps, self.stacks))
        new = rng.integers(0, self.values, (size, steps))
        tokens, targets = np.zeros((size, steps, 3), np.int64), empty_targets((size, steps, 3))
        for i in range(steps):
            push = pushes[:, i] | (height.max(1) == 0)
            s = np.where(push[:, None] | (height > 0), which[:, i], -1).argmax(1)
            value = np.where(push, new[:, i], memory[row, s, height[row, s] - 1])
            memory[row[push], s[push], height[row, s][push]] = value[push]
            height[row, s] += np.where(push, 1, -1)
            tokens[:, i] = np.stack((np.where(push, 0, 1), 2 + s, 2 + self.stacks + value), 1)
            targets[:, i, 1] = np.where(push, IGNORE, 2 + self.stacks + value)
        return Batch(*(x.reshape(size, -1)[:, : self.length] for x in (tokens, targets)))
