"""Long-horizon forecasting: the protocol of Zeng et al., "Are Transformers Effective for Time Series Forecasting?", 2022
(arXiv 2205.13504), on a table of one's own or a synthetic one.

Each channel is a series of its own (the model is shared), standardised with the training part. The model sees `length`
values, then `horizon` blank steps, at which the future is asked. The score is R^2; the measures also compare with repeating the
last value, and with the linear map from the past to the future, fitted to the training part.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from linnet.evals.tasks._base import Batch, Task, register_task, stream, value_metrics

SHARES = (0.7, 0.1, 0.2)  # training, validation, test, in the order of time


def synthetic(steps: int = 12_000, channels: int = 7) -> np.ndarray:
    """Sums of sinusoids of daily, weekly and other periods, a slow trend and noise of an AR(2) process, [steps, channels]."""
    rng, t = stream("forecasting"), np.arange(steps)[:, None]
    period = np.array([24.0, 168.0, 12.0, 61.3])[:, None, None] * np.ones((1, 1, channels))
    wave = (rng.uniform(0.3, 1, (4, 1, channels)) * np.sin(2 * np.pi * (t / period + rng.random((4, 1, channels))))).sum(0)
    noise = 0.3 * rng.standard_normal((steps, channels))
    for i in range(2, steps):
        noise[i] += 1.2 * noise[i - 1] - 0.4 * noise[i - 2]
    return wave + noise + rng.uniform(-1, 1, channels) * t / steps


def load_csv(path: str) -> np.ndarray:
    """The numeric columns of a CSV file with a header [steps, channels]; a first column of dates is left out."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))[1:]
    if not rows:
        raise ValueError(f"{path!r} must hold a header and rows of numbers; it holds none")
    keep = []
    for column in zip(*rows, strict=True):
        try:
            keep.append([float(x) for x in column])
        except ValueError:
            continue
    if not keep:
        raise ValueError(f"{path!r} must hold columns of numbers; got {rows[0]}")
    return np.array(keep).T


@lru_cache(maxsize=4)
def table(path: str | None) -> tuple[np.ndarray, tuple[int, int]]:
    """(the standardised series, the ends of the training and the validation part)."""
    x = synthetic() if path is None else load_csv(path)
    first, second = int(SHARES[0] * len(x)), int((SHARES[0] + SHARES[1]) * len(x))
    mean, scale = x[:first].mean(0), x[:first].std(0).clip(1e-8)
    return (x - mean) / scale, (first, second)


@register_task("forecasting")
@dataclass(frozen=True, kw_only=True)
class Forecasting(Task):
    """`length` values of the past, `horizon` of the future. path: a CSV file (None: the synthetic table)."""

    length: int = 96
    horizon: int = 24
    path: str | None = None
    inputs, targets = "vectors", "values"

    def check(self) -> None:
        if not isinstance(self.horizon, int) or self.horizon < 1:
            self.refuse("horizon", "an integer >= 1")

    @property
    def input_size(self) -> int:
        return 2  # the value, and whether it is known

    @property
    def output_size(self) -> int:
        return 1

    def windows(self, split: str) -> tuple[np.ndarray, int, int]:
        """The table and the range of the starts of windows; the past of a window may lie in the part before."""
        x, (first, second) = table(self.path)
        n, need = self.length, self.length + self.horizon
        low, high = {"train": (0, first), "validation": (first - n, second), "test": (second - n, len(x))}[split]
        if high - low < need:
            raise ValueError(
                f"task {self.name!r}: the {split} part must hold at least length + horizon = {need} steps; got {high - low}"
            )
        return x, max(low, 0), high - need + 1

    def generate(self, rng, size, split):
        x, low, high = self.windows(split)
        start, channel = rng.integers(low, high, size), rng.integers(0, x.shape[1], size)
        window = x[start[:, None] + np.arange(self.length + self.horizon), channel[:, None]]
        known = np.arange(window.shape[1]) < self.length
        inputs = np.stack((np.where(known, window, 0), np.broadcast_to(known, window.shape)), -1)
        targets = np.where(known, np.nan, window)[..., None]
        return Batch(inputs.astype(np.float32), targets.astype(np.float32))

    def linear(self, reduce: str = "none", smooth: int = 25) -> np.ndarray:
        """The weights [length + 1, horizon] of the linear forecast, by least squares over the training part.

        reduce: "none" (Linear), "last" (NLinear: the last value is taken off first and put back on). DLinear, the sum of two linear
        maps of a moving average and of the rest, is the same family of functions as Linear.
        """
        x, low, high = self.windows("train")
        starts = np.arange(low, high, max(1, (high - low) // 2000))
        window = (
            x[starts[:, None] + np.arange(self.length + self.horizon)].transpose(0, 2, 1).reshape(-1, self.length + self.horizon)
        )
        if reduce == "last":
            window = window - window[:, self.length - 1 : self.length]
        past = np.concatenate((window[:, : self.length], np.ones((len(window), 1))), 1)
        gram = past.T @ past + 1e-3 * len(past) * np.eye(self.length + 1)
        return np.linalg.solve(gram, past.T @ window[:, self.length :])

    def metrics(self, output, batch):
        n = self.length
        past, future = batch.inputs[:, :n, 0].astype(np.float64), batch.targets[:, n:, 0].astype(np.float64)
        last = past[:, -1:]
        one, shifted = np.ones((len(past), 1)), past - last
        forecasts = {
            "repeat": np.broadcast_to(last, future.shape),
            "linear": np.concatenate((past, one), 1) @ _linear(self, "none"),
            "nlinear": last + np.concatenate((shifted, one), 1) @ _linear(self, "last"),
        }
        error = np.square(output[:, n:, 0] - future).sum()
        sums = value_metrics(output, batch.targets)
        sums["mae"] = (float(np.abs(output[:, n:, 0] - future).sum()), future.size)
        for name, forecast in forecasts.items():
            other = float(np.square(forecast - future).sum())
            sums[f"mse_{name}"], sums[f"mse_over_{name}"] = (other, future.size), (float(error), other)
        return sums


@lru_cache(maxsize=8)
def _linear(task: Forecasting, reduce: str) -> np.ndarray:
    return task.linear(reduce)
