"""Atomic operations on sequences of numbers: Gupta et al., "Simplifying and Understanding State Space Models with Diagonal
Linear RNNs", 2022 (arXiv 2212.00768); `listops_subtrees` and `pathfinder_segmentation`, the rest of its thirteen, are in lra.py.

`length` is that of the input x ~ N(0, 1), scaled to a maximum of 1; some tasks append blank steps for their output. All inputs
carry two further channels, cos and sin of 2 pi i / T. The score is R^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from linnet.evals.tasks._base import Batch, Task, distinct, register_task, stream, value_metrics


def series(rng: np.random.Generator, size: int, length: int) -> np.ndarray:
    x = rng.standard_normal((size, length))
    return x / np.abs(x).max(1, keepdims=True)


@dataclass(frozen=True, kw_only=True)
class Atomic(Task):
    """channels: of the input, the two of the position left out."""

    length: int = 512
    inputs, targets = "vectors", "values"
    channels = 1

    @property
    def input_size(self) -> int:
        return self.channels + 2

    @property
    def output_size(self) -> int:
        return 1

    def finish(self, inputs: np.ndarray, targets: np.ndarray) -> Batch:
        """Append the position channels, and blank input where the targets [B, T, O] are longer."""
        size, T = targets.shape[:2]
        inputs = np.pad(inputs, ((0, 0), (0, T - inputs.shape[1]), (0, 0)))
        angle = np.broadcast_to((2 * np.pi * np.arange(T) / T)[:, None], (size, T, 1))
        return Batch(*(x.astype(np.float32) for x in (np.concatenate((inputs, np.cos(angle), np.sin(angle)), -1), targets)))

    def metrics(self, output, batch):
        return value_metrics(output, batch.targets)


def later(values: np.ndarray, before: int) -> np.ndarray:
    """Targets [B, before + n, 1]: nothing is asked at first, then the values [B, n]."""
    return np.concatenate((np.full((len(values), before), np.nan), values), 1)[..., None]


@register_task("shift")
@dataclass(frozen=True, kw_only=True)
class Shift(Atomic):
    """x delayed by `outputs` different times, evenly from 0 to L - L / outputs."""

    outputs: int = 8

    @property
    def output_size(self) -> int:
        return self.outputs

    def generate(self, rng, size, split):
        x, L = series(rng, size, self.length), self.length
        delays = np.linspace(0, L - L / self.outputs, self.outputs).astype(int)
        return self.finish(x[..., None], np.stack([np.pad(x, ((0, 0), (d, 0)))[:, :L] for d in delays], -1))


@register_task("cumsum", operation="sum")
@register_task("cummax", operation="max")
@register_task("reverse", operation="reverse")
@register_task("sort", operation="sort")
@dataclass(frozen=True, kw_only=True)
class Whole(Atomic):
    """sum: sum of x_j over j <= i, over sqrt i. max: the same of the maximum. reverse; sort by |x_i - x_0|: after L blank steps."""

    operation: str = "sum"

    def check(self) -> None:
        if self.operation not in ("sum", "max", "reverse", "sort"):
            self.refuse("operation", "'sum', 'max', 'reverse' or 'sort'")

    def generate(self, rng, size, split):
        x, L = series(rng, size, self.length), self.length
        if self.operation == "sum":
            y = later(x.cumsum(1) / np.sqrt(np.arange(1, L + 1)), 0)
        elif self.operation == "max":
            y = later(np.maximum.accumulate(x, 1), 0)
        elif self.operation == "reverse":
            y = later(x[:, ::-1], L)
        else:
            y = later(np.take_along_axis(x, np.abs(x - x[:, :1]).argsort(1, kind="stable"), 1), L)
        return self.finish(x[..., None], y)


@register_task("select")
@register_task("select_fixed", fixed=True)
@dataclass(frozen=True, kw_only=True)
class Select(Atomic):
    """`marked` of L positions have a mark; after the input they are asked in order. fixed: always the same positions."""

    marked: int = 32
    fixed: bool = False
    channels = 2

    def check(self) -> None:
        if not 1 <= self.marked <= self.length:
            self.refuse("marked", f"between 1 and length = {self.length}")

    def generate(self, rng, size, split):
        x, L, M = series(rng, size, self.length), self.length, self.marked
        where = np.sort(distinct(stream("select", L, M) if self.fixed else rng, 1 if self.fixed else size, M, 0, L), 1)
        where = np.broadcast_to(where, (size, M))
        mark = np.zeros_like(x)
        np.put_along_axis(mark, where, 1, 1)
        return self.finish(np.stack((x, mark), -1), later(np.take_along_axis(x, where, 1), L))


@register_task("solve")
@register_task("solve_fixed", fixed=True)
@dataclass(frozen=True, kw_only=True)
class Solve(Atomic):
    """The rows of [A | b], A orthogonal, one number a step, then X with A X = b is asked. fixed: always the same A.

    N is the largest number with N^2 + 2 N <= length.
    """

    fixed: bool = False

    @property
    def unknowns(self) -> int:
        return max(1, int(np.sqrt(self.length + 1)) - 1)

    def generate(self, rng, size, split):
        N = self.unknowns
        source = stream("solve", N) if self.fixed else rng
        A = np.linalg.qr(source.standard_normal((1 if self.fixed else size, N, N)))[0]
        X = rng.standard_normal((size, N))
        X /= np.linalg.norm(X, axis=1, keepdims=True)
        A = np.broadcast_to(A, (size, N, N))
        rows = np.concatenate((A, A @ X[..., None]), -1).reshape(size, -1)
        return self.finish(rows[..., None], later(np.sqrt(N) * X, N * N + N))


@register_task("context_shift")
@dataclass(frozen=True, kw_only=True)
class ContextShift(Atomic):
    """The first two numbers are the cosine and sine of 2 pi s / L; the rest is asked with a delay of s."""

    def generate(self, rng, size, split):
        x, L = series(rng, size, self.length), self.length
        s = rng.integers(0, L - 2, size)
        x[:, 0], x[:, 1] = np.cos(2 * np.pi * s / L), np.sin(2 * np.pi * s / L)
        origin = np.arange(L) - s[:, None]
        return self.finish(x[..., None], np.where(origin >= 2, np.take_along_axis(x, origin.clip(0), 1), 0)[..., None])


@register_task("mips")
@dataclass(frozen=True, kw_only=True)
class MIPS(Atomic):
    """Unit vectors q, k, v of `dimension`: at i the v_j, j <= i, whose k_j has the largest product with q_i is asked."""

    dimension: int = 4

    @property
    def channels(self) -> int:
        return 3 * self.dimension

    @property
    def output_size(self) -> int:
        return self.dimension

    def generate(self, rng, size, split):
        L = self.length
        qkv = rng.standard_normal((3, size, L, self.dimension))
        q, k, v = qkv / np.linalg.norm(qkv, axis=-1, keepdims=True)
        best, found = np.full((size, L), -np.inf), np.zeros((size, L), np.int64)
        for j in range(0, L, 64):  # blocks of keys: the products of all pairs need not exist at once
            product = q[:, j:] @ k[:, j : j + 64].transpose(0, 2, 1)
            product[:, :64][:, ~np.tri(*product[:, :64].shape[1:], dtype=bool)] = -np.inf
            top = product.argmax(-1)
            value = np.take_along_axis(product, top[..., None], 2)[..., 0]
            better = value > best[:, j:]
            best[:, j:], found[:, j:] = np.where(better, value, best[:, j:]), np.where(better, j + top, found[:, j:])
        return self.finish(np.concatenate((q, k, v), -1), np.take_along_axis(v, found[..., None], 1))
