"""What a task is: options, and a pure function (split, index, size, seed) -> batch.

The generator of a batch is seeded with a hash of all of these, so that a batch is the same on every machine, in every process and
after every restart, and training, validation and test are different streams. Nothing is ever materialised.

Targets stand at the position that has to produce them (already shifted): class ids [B, T] with -100, or values [B, T, O] with
NaN, where nothing is asked.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
import pkgutil
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

IGNORE = -100
SPLITS = ("train", "validation", "test")
Sums = dict[str, tuple[Any, Any]]  # metric -> (sum, count): batches are added before they are divided


class Batch(NamedTuple):
    """inputs: ids [B, T] int64 or vectors [B, T, C] float32. targets: see above. info: what the metrics of the task need, and
    where there is "part" [B], the rows of each part 0, 1, .. count alike in the loss."""

    inputs: np.ndarray
    targets: np.ndarray
    info: dict[str, np.ndarray] = {}  # noqa: RUF012 (never written to)

    def digest(self) -> str:
        """Hash of the content; values count to three decimals, below which processors may round differently."""
        total = hashlib.sha256()
        for x in (self.inputs, self.targets, *(self.info[key] for key in sorted(self.info))):
            if x.dtype.kind == "f":
                x = np.where(np.isnan(x), -(2**31), np.round(np.nan_to_num(x) * 1000)).astype(np.int64)
            total.update(f"{x.shape}".encode() + x.astype("<i8").tobytes())
        return total.hexdigest()


def stream(*parts: Any) -> np.random.Generator:
    """The random stream that belongs to `parts` (whatever JSON can write)."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task. `length` counts what the family says it counts, tokens where nothing is said; further fields are its options."""

    name: str = field(default="", repr=False)
    length: int = 64

    inputs: ClassVar[str] = "tokens"  # or "vectors"
    targets: ClassVar[str] = "classes"  # or "values"
    readout: ClassVar[str] = "position"  # or "last": every target is read from the last hidden state (compression)
    needs_logits: ClassVar[bool] = False  # whether `metrics` reads more of the logits than the largest one

    def __post_init__(self):
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"task {self.name!r}: length must be an integer >= 1; got {self.length!r}")
        self.check()

    def check(self) -> None:
        """Refuse options that do not fit together."""

    def refuse(self, option: str, expected: str) -> None:
        raise ValueError(f"task {self.name!r}: {option} must be {expected}; got {getattr(self, option)!r}")

    @property
    def input_size(self) -> int:
        """Vocabulary of the ids, or channels of the vectors."""
        raise NotImplementedError

    @property
    def output_size(self) -> int:
        """Classes, or channels of the values."""
        return self.input_size

    @property
    def chance(self) -> float:
        """Accuracy of the best guess without looking (0 for values, where the score is R^2)."""
        return 1 / self.output_size if self.targets == "classes" else 0.0

    def options(self) -> dict[str, Any]:
        """The options that differ from the defaults of the class, but for where the data lie."""
        given = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self) if f.name not in ("name", "path")}
        return {name: value for name, (value, default) in given.items() if value != default}

    def at(self, **options: Any) -> Task:
        """The same task with other options, as a test of a model trained on this one."""
        _known(type(self), self.name, options)
        return dataclasses.replace(self, **options)

    def batch(self, split: str, index: int, size: int, *, seed: int = 0) -> Batch:
        """Batch number `index` of `size` rows."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        if index < 0 or size < 1:
            raise ValueError(f"index must be >= 0 and size >= 1; got {index} and {size}")
        rng = stream(type(self).__name__, self.options(), split, seed, index, size)
        return self.generate(rng, size, split)

    def generate(self, rng: np.random.Generator, size: int, split: str) -> Batch:
        raise NotImplementedError

    def metrics(self, output: np.ndarray, batch: Batch) -> Sums:
        """Sums of the measures of one batch; output: logits [B, T, classes], classes [B, T], or values [B, T, O]."""
        if self.targets == "values":
            return value_metrics(output, batch.targets)
        return class_metrics(choices(output) == batch.targets, batch.targets != IGNORE)

    def score(self, metrics: dict[str, Any]) -> float:
        """The one number that says how good a model is, higher is better: accuracy, or R^2."""
        return metrics["accuracy"] if self.targets == "classes" else metrics["r2"]


def choices(output: np.ndarray) -> np.ndarray:
    """The most likely classes [B, T], from these or from logits."""
    return output.argmax(-1) if output.ndim == 3 else output


def class_metrics(right: np.ndarray, asked: np.ndarray) -> Sums:
    """Accuracy over all targets, and the share of rows without a mistake."""
    rows = asked.any(1)
    return {
        "accuracy": (int((right & asked).sum()), int(asked.sum())),
        "sequence_accuracy": (int(((right | ~asked).all(1) & rows).sum()), int(rows.sum())),
    }


def value_metrics(output: np.ndarray, targets: np.ndarray) -> Sums:
    """Mean squared error, and the mean square of the targets about their mean in the batch, position by position."""
    asked = ~np.isnan(targets)
    wanted = np.where(asked, targets, 0).astype(np.float64)
    count = asked.sum(0, keepdims=True).clip(1)
    error = np.where(asked, output - wanted, 0) ** 2
    variance = np.where(asked, wanted - wanted.sum(0, keepdims=True) / count, 0) ** 2
    return {"mse": (float(error.sum()), int(asked.sum())), "variance": (float(variance.sum()), int(asked.sum()))}


def add(total: Sums, new: Sums) -> Sums:
    return {k: (total[k][0] + v[0], total[k][1] + v[1]) if k in total else v for k, v in new.items()}


def divide(total: Sums) -> dict[str, Any]:
    """Means; where there are values, also r2 = 1 - mse / variance."""
    mean = {k: (np.asarray(s) / np.maximum(np.asarray(n), 1)).tolist() for k, (s, n) in total.items()}
    if "variance" in mean:
        mean["r2"] = 1 - mean["mse"] / max(mean["variance"], 1e-12)
    return mean


# ---- registry ------------------------------------------------------------------------------------------------------------

_registry: dict[str, tuple[type[Task], dict[str, Any]]] = {}


def register_task(name: str, **preset: Any):
    """Class decorator: `@register_task("parity")` on a frozen, keyword-only dataclass that is a `Task`; may be repeated."""

    def register(cls: type[Task]) -> type[Task]:
        known = _registry.get(name)
        if known is not None and known[0].__qualname__ != cls.__qualname__:
            raise ValueError(f"register_task: name {name!r} must be new; it already names {known[0].__qualname__}")
        _known(cls, name, preset)
        _registry[name] = (cls, preset)
        return cls

    return register


def _known(cls: type[Task], name: str, options: dict[str, Any]) -> None:
    known = {f.name for f in dataclasses.fields(cls)} - {"name"}
    for option in options:
        if option not in known:
            raise ValueError(f"task {name!r}: option must be one of {', '.join(sorted(known))}; got {option!r}")


def _load() -> None:
    import linnet.evals.tasks as package

    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package.__name__}.{module.name}")


def list_tasks() -> list[str]:
    """All registered task names, built in and the user's own."""
    _load()
    return sorted(_registry)


def get_task(name: str, **options: Any) -> Task:
    """The task of this name: `get_task("mqar", length=256, pairs=16)`."""
    if name not in _registry:
        _load()
    if name not in _registry:
        close = difflib.get_close_matches(name, _registry, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"task must be one of {', '.join(sorted(_registry))}; got {name!r}{hint}")
    cls, preset = _registry[name]
    _known(cls, name, options)
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return cls(name=name, **{**preset, **options})


# ---- pieces of generators ------------------------------------------------------------------------------------------------


def distinct(rng: np.random.Generator, rows: int, count: int, low: int, high: int) -> np.ndarray:
    """[rows, count] ids from [low, high), distinct within a row, every such tuple equally likely."""
    span = high - low
    if count > span:
        raise ValueError(f"{count} distinct ids cannot be drawn from {span}")
    if count * count > 2 * span:  # too many rows would be drawn again
        return low + rng.random((rows, span)).argsort(1)[:, :count]
    drawn, again = np.empty((rows, count), np.int64), np.arange(rows)
    while len(again):
        drawn[again] = rng.integers(low, high, (len(again), count))
        again = again[(np.diff(np.sort(drawn[again], 1), axis=1) == 0).any(1)]
    return drawn


def power_law_slots(rng: np.random.Generator, rows: int, count: int, space: int, exponent: float) -> np.ndarray:
    """[rows, count] distinct slots of `space`, drawn one after the other with probability ~ (j + 1)^(exponent - 1)."""
    weight = (exponent - 1) * np.log(np.arange(1, space + 1))
    return (weight + rng.gumbel(size=(rows, space))).argsort(1)[:, ::-1][:, :count]


def empty_targets(shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, IGNORE, np.int64)
