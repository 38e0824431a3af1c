"""SelectivBench, 2026 (arXiv 2601.12598): sequences of an artificial grammar whose hidden state must be followed.

Letters are shown as one-hot vectors, the hidden state of the grammar is asked at every step, also in the blank gap after an
element. Where the published code and a sound test differ: the test sequences are not among the training sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from linnet.evals.tasks._base import IGNORE, Batch, Task, register_task, stream

STARTS = 4
DENSITY = 0.4
LONGEST = 200  # symbols of a string, its end symbol included


@dataclass(frozen=True)
class Grammar:
    """successor [S, V]: the state that letter l leads to, -1 where l is not allowed; letter [S] of every state; state 0 is the end.

    ends [n, S]: the probability that a walk from a state ends within n steps. start [4].
    """

    successor: np.ndarray
    letter: np.ndarray
    start: np.ndarray
    ends: np.ndarray


@lru_cache(maxsize=8)
def grammar(ambiguous: int, depth: int, alphabet: int, seed: int) -> Grammar:
    """A grammar of `alphabet` letters (the end symbol included), of which `ambiguous` have `depth` states each, the rest one.

    For every state and letter one candidate state of that letter is drawn; the edge exists with probability 0.4 for ambiguous
    letters and 0.4 / depth for the others. So letters determine the path. All states must reach the end.
    """
    rng = stream("selectivbench", ambiguous, depth, alphabet, seed)
    states_of = np.where(np.arange(alphabet) == 0, 1, np.where(np.arange(alphabet) <= ambiguous, depth, 1))
    first, letter = np.cumsum(states_of) - states_of, np.repeat(np.arange(alphabet), states_of)
    S = len(letter)
    for _ in range(100_000):
        target = first + rng.integers(0, states_of, (S, alphabet))
        successor = np.where(rng.random((S, alphabet)) < states_of * DENSITY / depth, target, -1)
        successor[0] = -1
        reached, before = np.arange(S) == 0, 0
        while before < reached.sum():
            before = reached.sum()
            reached |= (reached[successor] & (successor >= 0)).any(1)
        start = rng.permutation(S)[:STARTS]
        if reached.all() and 0 not in start:
            break
    else:
        raise ValueError(f"no grammar with {ambiguous} ambiguous letters of {depth} states among {alphabet} letters was found")
    step = np.where(successor >= 0, 1.0, 0.0)
    step /= step.sum(1, keepdims=True).clip(1)
    ends = np.zeros((LONGEST + 1, S))
    ends[:, 0] = 1
    for n in range(1, LONGEST + 1):
        ends[n] = (step * ends[n - 1][successor]).sum(1)
        ends[n, 0] = 1
    return Grammar(successor, letter, start, ends)


def walk(rng: np.random.Generator, g: Grammar, rows: int, length: int) -> np.ndarray:
    """States [rows, length] of strings laid end to end: each a walk from a start state to the end, given that it has at most 200
    symbols (a transition weighs as much as the share of its continuations that end in time, which is what rejection gives)."""
    states = np.empty((rows, length), np.int64)
    state, left = np.zeros(rows, np.int64), np.zeros(rows, np.int64)

    def draw(weight: np.ndarray) -> np.ndarray:
        total = weight.cumsum(1)
        return (total > rng.random((rows, 1)) * total[:, -1:]).argmax(1)

    for i in range(length):
        begin = state == 0
        after = g.successor[state]
        weight = np.where(after >= 0, g.ends[(left - 1).clip(0)[:, None], after], 0)
        fresh = np.broadcast_to(g.ends[LONGEST - 1][g.start], (rows, STARTS))
        letter, origin = draw(np.where(begin[:, None], 1.0, weight)), draw(fresh)
        state = np.where(begin, g.start[origin], after[np.arange(rows), letter])
        left = np.where(begin, LONGEST - 1, left - 1)
        states[:, i] = state
    return states


@register_task("selectivbench_memorization")
@register_task("selectivbench_gaps", min_gap=1, max_gap=10)
@register_task("selectivbench_noise", min_gap=1, max_gap=10, noise=0.2)
@register_task("selectivbench_distractors", distractors=0.1)
@dataclass(frozen=True, kw_only=True)
class SelectivBench(Task):
    """`length` elements, each followed by min_gap .. max_gap blank (zero) vectors; the score is taken per element, from the sum of
    the probabilities over the element and its gap.

    ambiguous, depth, alphabet: the grammar (alphabet None: ambiguous + 1, the end symbol). noise: U(0, noise) is added to
    every input. distractors: after `quiet` elements, the probability that a letter follows which the grammar does not allow there;
    it changes no state. Published: 40 / 40, 200 elements, tests with gaps of 10, 20, 50, 100.
    """

    length: int = 200
    ambiguous: int = 40
    depth: int = 40
    alphabet: int | None = None
    min_gap: int = 1
    max_gap: int = 1
    noise: float = 0.0
    distractors: float = 0.0
    quiet: int = 50
    grammar_seed: int = 0
    inputs = "vectors"
    needs_logits = True

    def check(self) -> None:
        if not 0 <= self.min_gap <= self.max_gap:
            self.refuse("min_gap", f"between 0 and max_gap = {self.max_gap}")
        if self.ambiguous < 1 or self.depth < 1 or self.input_size < self.ambiguous + 1:
            self.refuse("alphabet", f"at least ambiguous + 1 = {self.ambiguous + 1}")

    @property
    def input_size(self) -> int:
        return self.alphabet or self.ambiguous + 1

    @property
    def output_size(self) -> int:
        return 1 + self.ambiguous * self.depth + self.input_size - self.ambiguous - 1

    def generate(self, rng, size, split):
        g = grammar(self.ambiguous, self.depth, self.input_size, self.grammar_seed)
        state = walk(rng, g, size, self.length)
        shown, gap = g.letter[state], rng.integers(self.min_gap, self.max_gap + 1, state.shape)
        wrong = np.full(state.shape, -1)
        if self.distractors:
            forbidden = rng.random((*state.shape, self.input_size))
            forbidden = np.where(g.successor[state] >= 0, -1, forbidden).argmax(-1)
            inserted = (rng.random(state.shape) < self.distractors) & (np.arange(self.length) >= self.quiet)
            wrong = np.where(inserted, forbidden, -1)
        width = 1 + gap + np.where(wrong >= 0, 1 + gap, 0)
        begin = width.cumsum(1) - width
        T = int(width.sum(1).max())  # rows of one batch end with padding that nothing asks for
        element = _spread(width, T)
        live = np.arange(T) < width.sum(1)[:, None]
        inputs, row = np.zeros((size, T, self.input_size), np.float32), np.arange(size)[:, None]
        inputs[row, begin, shown] = 1
        r, i = np.nonzero(wrong >= 0)
        inputs[r, (begin + 1 + gap)[r, i], wrong[r, i]] = 1
        if self.noise:
            inputs += (self.noise * rng.random(inputs.shape)).astype(np.float32)
        targets = np.where(live, np.take_along_axis(state, element, 1), IGNORE)
        return Batch(inputs, targets, {"element": np.where(live, element, -1)})

    def metrics(self, output, batch):
        element = batch.info["element"]
        p = np.exp(output - output.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        begin = np.diff(element, axis=1, prepend=-2) != 0
        total = np.add.reduceat(p.reshape(-1, p.shape[-1]), np.flatnonzero(begin))
        wanted = batch.targets[begin]
        right, asked = total.argmax(-1) == wanted, wanted != IGNORE
        return {"accuracy": (int((right & asked).sum()), int(asked.sum()))}


def _spread(width: np.ndarray, T: int) -> np.ndarray:
    """Index of the element that every step of a row belongs to."""
    padded = np.concatenate((width, T - width.sum(1, keepdims=True)), 1)
    index = np.tile(np.arange(padded.shape[1]), len(width))
    return np.repeat(index, padded.reshape(-1)).reshape(len(width), T).clip(max=width.shape[1] - 1)
