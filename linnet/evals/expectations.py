"""What a table must show, as data, and the verdict: pass, fail or inconclusive.

Runs are first reduced to the best learning rate of every model and seed (by the validation score), as papers do; an expectation
then looks at the seeds. What is missing, still improving, or differs between seeds is inconclusive, not failed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[dict[str, Any]]
STILL_IMPROVING = 0.03  # gain of the score over the last quarter of the training
SEEDS = 3


@dataclass(frozen=True)
class Verdict:
    expectation: str
    result: str  # "pass", "fail" or "inconclusive"
    evidence: str


def best_runs(rows: Rows) -> dict[str, dict[int, dict[str, Any]]]:
    """label -> seed -> the finished run with the best validation score over the learning rates."""
    best: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "done" and row.get("validation") is not None:
            seeds = best.setdefault(row["label"], {})
            if row["seed"] not in seeds or row["validation"] > seeds[row["seed"]]["validation"]:
                seeds[row["seed"]] = row
    return best


def value(row: dict[str, Any], test: str, metric: str) -> float | None:
    """One number of a run; "name@i" is entry i of a list, None what was not measured."""
    name, _, index = metric.partition("@")
    found = row["metrics"].get(test, {}).get(name)
    if isinstance(found, list):
        found = found[int(index)] if index and int(index) < len(found) else None
    return found


def everywhere(row: dict[str, Any], metric: str) -> float | None:
    """The mean over all tests: of what does not depend on them, like the loss on text beside a recall task."""
    found = [x for test in row["metrics"] if (x := value(row, test, metric)) is not None]
    return statistics.mean(found) if found else None


def values(rows: Rows, label: str, test: str, metric: str) -> list[float]:
    found = [value(row, test, metric) for row in best_runs(rows).get(label, {}).values()]
    return [x for x in found if x is not None]


def improving(row: dict[str, Any]) -> bool:
    """Whether the score was still rising when the steps ran out."""
    history = [score for _, score in row["history"]]
    early = history[: max(1, 3 * len(history) // 4)]
    return row["steps_taken"] >= row["steps"] and bool(history) and history[-1] - max(early) > STILL_IMPROVING


def _write(numbers: Iterable[float]) -> str:
    return ", ".join(f"{x:.3f}" for x in sorted(numbers, reverse=True)) or "no run"


@dataclass(frozen=True)
class Solves:
    """Every model reaches `at_least` (or, for errors, `at_most`) with its best seed."""

    models: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None
    test: str = "train"
    metric: str = "accuracy"

    def verdicts(self, rows: Rows) -> list[Verdict]:
        results = []
        for model in self.models:
            found = values(rows, model, self.test, self.metric)
            if self.at_least is not None:
                text, good = f">= {self.at_least:g}", [x >= self.at_least for x in found]
            else:
                text, good = f"<= {self.at_most:g}", [x <= self.at_most for x in found]
            runs = best_runs(rows).get(model, {}).values()
            result = "pass" if any(good) else "fail" if found and not any(map(improving, runs)) else "inconclusive"
            results.append(Verdict(f"{model}: {self.metric} on {self.test} {text} (best seed)", result, _write(found)))
        return results


@dataclass(frozen=True)
class CannotSolve:
    """No seed of any model exceeds `at_most`."""

    models: tuple[str, ...]
    at_most: float
    test: str = "train"
    metric: str = "accuracy"

    def verdicts(self, rows: Rows) -> list[Verdict]:
        results = []
        for model in self.models:
            found = values(rows, model, self.test, self.metric)
            over = sum(x > self.at_most for x in found)
            result = "inconclusive" if not found or 0 < over < len(found) else "fail" if over else "pass"
            results.append(Verdict(f"{model}: {self.metric} on {self.test} <= {self.at_most:g} (all seeds)", result, _write(found)))
        return results


@dataclass(frozen=True)
class Order:
    """The median of each model is at least `factor` times that of the next one plus `margin`."""

    models: tuple[str, ...]
    margin: float = 0.0
    test: str = "train"
    metric: str = "accuracy"
    factor: float = 1.0

    def verdicts(self, rows: Rows) -> list[Verdict]:
        results = []
        for better, worse in zip(self.models, self.models[1:], strict=False):
            a, b = (values(rows, model, self.test, self.metric) for model in (better, worse))
            text = f"{better} >= " + (f"{self.factor:g} * " if self.factor != 1 else "") + worse
            text += f" {self.margin:+g}" if self.margin else ""
            least = [self.factor * x + self.margin for x in b]
            if not a or not b:
                result = "inconclusive"
            elif statistics.median(a) >= statistics.median(least):
                result = "pass"
            else:  # failed only if no two seeds stand in this order
                result = "fail" if max(a) < min(least) and min(len(a), len(b)) >= SEEDS else "inconclusive"
            results.append(Verdict(f"{text}: {self.metric} on {self.test} (median)", result, f"{_write(a)} | {_write(b)}"))
        return results


def judge(expectations: Iterable[Solves | CannotSolve | Order], rows: Rows) -> list[Verdict]:
    """All verdicts; a pass that rests on fewer than three seeds says so."""
    verdicts = []
    seeds = {row["seed"] for row in rows}
    for expectation in expectations:
        for v in expectation.verdicts(rows):
            note = "" if len(seeds) >= SEEDS else f" ({len(seeds)} of {SEEDS} seeds)"
            verdicts.append(Verdict(v.expectation, v.result, v.evidence + note))
    return verdicts
