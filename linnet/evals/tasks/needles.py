"""Needles in a haystack of tokens, for models without a tokenizer: what the RULER tasks ask, at the size of a toy.

A needle is [NEEDLE] key value_1 .. value_m, at a random depth of the filler; at the end [QUERY] key, after which the value
is asked token by token (teacher-forced). With several needles or queries all of their values are asked in the order of insertion.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from linnet.evals.tasks._base import Batch, Task, distinct, empty_targets, register_task, stream

NEEDLE, QUERY = 0, 1
CYCLE = 24  # tokens of the constant filler
BRANCHES = 16  # successors of a filler token


@lru_cache(maxsize=4)
def _successors(low: int, high: int) -> np.ndarray:
    return stream("needles", low, high).integers(low, high, (high - low, BRANCHES))


@register_task("niah_single_1", filler="cycle", value_tokens=1)
@register_task("niah_single_2", value_tokens=7)
@register_task("niah_single_3", value_tokens=32)
@register_task("niah_multikey_1", keys=4)
@register_task("niah_multikey_2", keys=16)
@register_task("niah_multikey_3", length=1024, keys=16, value_tokens=32)
@register_task("niah_multivalue", values=4)
@register_task("niah_multiquery", keys=4, queries=4)
@dataclass(frozen=True, kw_only=True)
class Needles(Task):
    """filler: "markov" (a fixed chain, Zipf-distributed branches) or "cycle" (24 tokens again and again, from a random one on).

    keys: needles with different keys. queries: how many of them are asked for. values: needles per key. value_tokens: m.
    Ids: NEEDLE, QUERY, then a quarter each for keys and values, the rest filler.
    """

    length: int = 256
    vocabulary: int = 512
    filler: str = "markov"
    keys: int = 1
    queries: int = 1
    values: int = 1
    value_tokens: int = 7

    def check(self) -> None:
        if self.filler not in ("markov", "cycle"):
            self.refuse("filler", "'markov' or 'cycle'")
        if not 1 <= self.queries <= self.keys:
            self.refuse("queries", f"between 1 and keys = {self.keys}")
        if not 1 <= self.keys <= self.quarter or self.vocabulary < 4 * CYCLE:
            self.refuse("keys", f"between 1 and {self.quarter}, a quarter of a vocabulary of at least {4 * CYCLE}")
        if self.length < self.needed:
            self.refuse("length", f"at least {self.needed}, the needles, queries and answers")

    @property
    def quarter(self) -> int:
        return (self.vocabulary - 2) // 4

    @property
    def needed(self) -> int:
        needle = self.keys * self.values * (2 + self.value_tokens)
        return needle + self.queries * (1 + self.values * self.value_tokens + 1) - 1

    @property
    def input_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / self.quarter

    def generate(self, rng, size, split):
        m, copies, count = self.value_tokens, self.values, self.keys * self.values
        key = distinct(rng, size, self.keys, 2, 2 + self.quarter)
        value = rng.integers(2 + self.quarter, 2 + 2 * self.quarter, (size, self.keys, copies, m))
        needle = np.empty((size, count, 2 + m), np.int64)
        needle[..., 0], needle[..., 1] = NEEDLE, np.repeat(key, copies, 1)
        needle[..., 2:] = value.reshape(size, count, m)
        order = rng.random((size, count)).argsort(1)
        needle = np.take_along_axis(needle, order[..., None], 1)

        tail = np.empty((size, self.queries, 2 + copies * m), np.int64)  # QUERY key answers
        asked = distinct(rng, size, self.queries, 0, self.keys)
        tail[..., 0], tail[..., 1] = QUERY, np.take_along_axis(key, asked, 1)
        rank = order.argsort(1).reshape(size, self.keys, copies).argsort(2)  # values in the order they were inserted
        value = np.take_along_axis(value, rank[..., None], 2)
        tail[..., 2:] = np.take_along_axis(value, asked[:, :, None, None], 1).reshape(size, self.queries, -1)
        wanted = empty_targets(tail.shape)
        wanted[..., 1:-1] = tail[..., 2:]
        tail, wanted = tail.reshape(size, -1)[:, :-1], wanted.reshape(size, -1)[:, :-1]

        body = self.length - tail.shape[1]
        hay = self.haystack(rng, size, body - count * (2 + m))
        cut = np.sort(rng.integers(0, hay.shape[1] + 1, (size, count)), 1)  # how much hay stands before each needle
        place = cut[..., None] + np.arange(count)[:, None] * (2 + m) + np.arange(2 + m)
        inputs, free = np.empty((size, self.length), np.int64), np.ones((size, body), bool)
        np.put_along_axis(inputs, place.reshape(size, -1), needle.reshape(size, -1), 1)
        np.put_along_axis(free, place.reshape(size, -1), False, 1)
        inputs[:, :body][free] = hay.reshape(-1)
        inputs[:, body:] = tail
        targets = empty_targets(inputs.shape)
        targets[:, body:] = wanted
        return Batch(inputs, targets)

    def haystack(self, rng, size, length):
        low = 2 + 2 * self.quarter
        if self.filler == "cycle":
            return low + (rng.integers(0, CYCLE, (size, 1)) + np.arange(length)) % CYCLE
        weight = 1 / np.arange(1.0, BRANCHES + 1)
        branch = np.searchsorted(weight.cumsum() / weight.sum(), rng.random((length, size)))
        after, hay = _successors(low, self.vocabulary), np.empty((length, size), np.int64)
        token = rng.integers(low, self.vocabulary, size)
        for i in range(length):
            hay[i] = token = after[token - low, branch[i]]
        return hay.T
