"""The six synthetic tasks of Poli et al., "Mechanistic Design and Scaling of Hybrid Architectures", 2024 (arXiv 2403.17844).

`mad_*` have the published baseline sizes. As published, recall is trained on the next token everywhere and tested where the
answer can be known; `train_targets="answers"` trains on those alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from linnet.evals.tasks._base import IGNORE, Batch, Task, distinct, empty_targets, register_task, stream


@dataclass(frozen=True, kw_only=True)
class _Recall(Task):
    """Keys are the lower, values the upper half of the vocabulary."""

    length: int = 128
    vocabulary: int = 16
    train_targets: str = "next"

    def check(self) -> None:
        if self.train_targets not in ("next", "answers"):
            self.refuse("train_targets", "'next' or 'answers'")
        if self.vocabulary % 2 or self.vocabulary < 4:
            self.refuse("vocabulary", "even and at least 4")

    @property
    def input_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 2 / self.vocabulary

    def finish(self, tokens: np.ndarray, answerable: np.ndarray, real: np.ndarray, split: str) -> Batch:
        """tokens [B, T+1]; answerable, real: whether token t is a known answer, a token at all."""
        asked = real if split == "train" and self.train_targets == "next" else answerable
        return Batch(tokens[:, :-1], np.where(asked[:, 1:], tokens[:, 1:], IGNORE))


@register_task("mad_in_context_recall")
@register_task("mad_noisy_recall", noise=0.2, noise_vocabulary=16)
@dataclass(frozen=True, kw_only=True)
class InContextRecall(_Recall):
    """Key value key value ..., one value per key and row; asked wherever a key comes again.

    noise: the share of pairs that are replaced with two of `noise_vocabulary` further tokens.
    """

    noise: float = 0.0
    noise_vocabulary: int = 0

    @property
    def input_size(self) -> int:
        return self.vocabulary + self.noise_vocabulary

    def generate(self, rng, size, split):
        pairs, half = self.length // 2 + 1, self.vocabulary // 2
        keys = rng.integers(0, half, (size, pairs))
        table = rng.integers(half, self.vocabulary, (size, half))
        noisy = rng.random((size, pairs)) < self.noise
        shown = np.where(noisy, half, keys)  # noise shows no key
        seen = first_seen(shown, half) < np.arange(pairs)
        tokens = np.stack((keys, np.take_along_axis(table, keys, 1)), -1)
        if self.noise:
            other = rng.integers(self.vocabulary, self.input_size, tokens.shape)
            tokens = np.where(noisy[..., None], other, tokens)
        answer = np.stack((np.zeros_like(seen), seen & ~noisy), -1)
        tokens, answer = (x.reshape(size, -1)[:, : self.length + 1] for x in (tokens, answer))
        return self.finish(tokens, answer, np.ones_like(answer), split)


def first_seen(ids: np.ndarray, skip: int) -> np.ndarray:
    """For every entry the index at which its id stands first in the row; the row's length for the id `skip`."""
    first = np.full((len(ids), skip + 1), ids.shape[1])
    for i in range(ids.shape[1] - 1, -1, -1):
        first[np.arange(len(ids)), ids[:, i]] = i
    first[:, skip] = ids.shape[1]
    return np.take_along_axis(first, ids, 1)


@register_task("mad_fuzzy_recall")
@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(_Recall):
    """In-context recall of motifs: keys and values are 1 .. `motif` distinct tokens (in tests keys have all `motif`).

    motifs: how many keys a row has to choose from, so that they come again. Rows are padded on the left with one further id.
    """

    motif: int = 3
    motifs: int = 8

    @property
    def input_size(self) -> int:
        return self.vocabulary + 1

    def generate(self, rng, size, split):
        half, M, m = self.vocabulary // 2, self.motifs, self.motif
        pairs = (self.length + 1) // (2 * m)

        def motifs(low: int, count: int, fixed: bool):
            tokens = distinct(rng, size * count, m, low, low + half).reshape(size, count, m)
            width = np.full((size, count), m) if fixed else rng.integers(1, m + 1, (size, count))
            return tokens, np.arange(m) < width[..., None]

        key, key_live = motifs(0, M, split != "train")
        value, value_live = motifs(half, M, False)
        chosen = rng.integers(0, M, (size, pairs))
        # two keys that look the same have the same value: the first of them stands for all
        code = (np.where(key_live, key + 1, 0) * (half + 1) ** np.arange(m)).sum(-1)
        chosen = np.take_along_axis((code[:, :, None] == code[:, None]).argmax(-1), chosen, 1)
        pick = lambda x: x[np.arange(size)[:, None], chosen]
        tokens = np.concatenate((pick(key), pick(value)), -1).reshape(size, -1)
        live = np.concatenate((pick(key_live), pick(value_live)), -1).reshape(size, -1)
        seen = first_seen(chosen, M) < np.arange(pairs)
        answer = np.concatenate((np.zeros_like(pick(key_live)), pick(value_live) & seen[..., None]), -1).reshape(size, -1)
        order = np.argsort(live, 1, kind="stable")  # padding first, the rest in place
        tokens, live, answer = (np.take_along_axis(x, order, 1) for x in (np.where(live, tokens, self.vocabulary), live, answer))
        room = self.length + 1 - tokens.shape[1]
        tokens = np.pad(tokens, ((0, 0), (room, 0)), constant_values=self.vocabulary)
        live, answer = (np.pad(x, ((0, 0), (room, 0))) for x in (live, answer))
        return self.finish(tokens, answer, live, split)


@register_task("selective_copy", length=64, vocabulary=16, copies=4)
@register_task("mad_selective_copy")
@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Task):
    """`copies` tokens with blanks inserted at random, a copy token, then blanks, at which the tokens are asked in order.

    Ids: `vocabulary` symbols, blank, copy.
    """

    length: int = 256
    vocabulary: int = 14
    copies: int = 16

    def check(self) -> None:
        if self.length < 2 * self.copies + 1:
            self.refuse("length", f"at least 2 copies + 1 = {2 * self.copies + 1}")

    @property
    def input_size(self) -> int:
        return self.vocabulary + 2

    @property
    def chance(self) -> float:
        return 1 / self.vocabulary

    def generate(self, rng, size, split):
        symbols = rng.integers(0, self.vocabulary, (size, self.copies))
        inputs = np.full((size, self.length), self.vocabulary)
        content = self.length - self.copies - 1
        np.put_along_axis(inputs, np.sort(distinct(rng, size, self.copies, 0, content), 1), symbols, 1)
        inputs[:, content] = self.vocabulary + 1
        targets = empty_targets(inputs.shape)
        targets[:, content + 1 :] = symbols
        return Batch(inputs, targets)


@register_task("mad_compression")
@dataclass(frozen=True, kw_only=True)
class Compression(Task):
    """Random tokens and a compression token, from whose hidden state a decoder must give back every token."""

    length: int = 32
    vocabulary: int = 16
    readout = "last"

    @property
    def input_size(self) -> int:
        return self.vocabulary + 1

    @property
    def chance(self) -> float:
        return 1 / self.vocabulary

    def generate(self, rng, size, split):
        inputs = rng.integers(0, self.vocabulary, (size, self.length))
        targets = inputs.copy()
        inputs[:, -1], targets[:, -1] = self.vocabulary, IGNORE
        return Batch(inputs, targets)


@register_task("mad_memorization")
@dataclass(frozen=True, kw_only=True)
class Memorization(Task):
    """key ? key ? ...: a map from keys to values that is the same in every row of every split (weights must store it)."""

    length: int = 32
    vocabulary: int = 256
    map_seed: int = 12345

    @property
    def input_size(self) -> int:
        return self.vocabulary + 1

    @property
    def chance(self) -> float:
        return 2 / self.vocabulary

    def generate(self, rng, size, split):
        half = self.vocabulary // 2
        table = stream("memorization", self.vocabulary, self.map_seed).integers(half, 2 * half, half)
        inputs = np.full((size, self.length), self.vocabulary)
        inputs[:, ::2] = rng.integers(0, half, (size, (self.length + 1) // 2))
        targets = empty_targets(inputs.shape)
        targets[:, 1::2] = table[inputs[:, :-1:2]]
        return Batch(inputs, targets)
