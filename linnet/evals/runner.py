"""One trainer for every task: small models, many settings, several processes on one device, one line of JSON per finished run.

A `Run` is data. Its key is a hash of what it says, so that a sweep that was interrupted skips what its results file holds. A run
that diverges is a row like any other; a run that breaks is a row too, and is tried again next time.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from linnet.evals.steps import Step, stream
from linnet.evals.tasks._base import IGNORE, Batch, Task, add, divide, get_task
from linnet.models import LinnetConfig, LinnetForCausalLM, parameter_groups
from linnet.models.loss import linear_cross_entropy

VERSION = 2  # of what a run means: part of its key
TEST_ROWS, TEST_BATCHES = 256, 4
LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Run:
    """One model on one task.

    layers: a pattern of `LinnetConfig`; label: what tables call it. tests: name -> options that replace those of the task.
    target: training ends once the validation score reaches it. precision: "fp32", or "bf16" for autocast.
    warmup: share of the steps; then the learning rate follows a cosine to zero.
    """

    task: str
    layers: str
    label: str = ""
    task_options: dict[str, Any] = field(default_factory=dict)
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_layers: int | None = None
    d_model: int = 64
    heads: int = 2
    mlp: str = "swiglu"
    tie_embeddings: bool = False
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    precision: str = "fp32"
    target: float | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "d_model", "heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"run: {name} must be an integer >= 1; got {getattr(self, name)!r}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"run: precision must be 'fp32' or 'bf16'; got {self.precision!r}")

    @property
    def name(self) -> str:
        return self.label or self.layers

    @property
    def key(self) -> str:
        """Hash of everything that has an influence on the result."""
        settings = {k: v for k, v in asdict(self).items() if k != "label"}
        return hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True).encode()).hexdigest()[:16]


Models = dict[str, str | dict[str, Any]]


def grid(base: Run, models: Models, learning_rates: Iterable[float], seeds: Iterable[int]) -> list[Run]:
    """One run per model (label -> layers, or -> fields of `Run`), learning rate and seed; whole seeds one after the other."""
    seeds, rates = list(seeds), list(learning_rates)
    return [
        replace(base, label=label, learning_rate=rate, seed=seed, **({"layers": model} if isinstance(model, str) else model))
        for seed in seeds
        for label, model in models.items()
        for rate in rates
    ]


class TaskModel(nn.Module):
    """A `LinnetForCausalLM` with what a task needs around it: a linear map for vectors, values in place of logits, or a decoder
    that reads every target from the last hidden state."""

    def __init__(self, task: Task, run: Run):
        super().__init__()
        self.task = task
        vectors = task.inputs == "vectors"
        self.lm = LinnetForCausalLM(
            LinnetConfig(
                vocab_size=task.output_size if vectors else max(task.input_size, task.output_size),
                d_model=run.d_model, heads=run.heads, layers=run.layers, num_layers=run.num_layers, mlp=run.mlp,
                tie_embeddings=run.tie_embeddings and not vectors, use_cache=False,
            )
        )  # fmt: skip
        if vectors:
            self.embed = nn.Linear(task.input_size, run.d_model)
            if not self.lm.config.tie_embeddings:
                self.lm.model.embed_tokens.requires_grad_(False)
        if task.readout == "last":
            self.position = nn.Parameter(0.02 * torch.randn(task.length, run.d_model))
            self.decoder = nn.Sequential(
                nn.Linear(run.d_model, 2 * run.d_model), nn.GELU(), nn.Linear(2 * run.d_model, run.d_model)
            )

    def given(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"inputs_embeds": self.embed(inputs)} if self.task.inputs == "vectors" else {"input_ids": inputs}

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, T, classes] or values [B, T, O]."""
        if self.task.readout == "last":
            last_BD = self.lm.model(**self.given(inputs), use_cache=False).last_hidden_state[:, -1]
            return self.lm.lm_head(self.decoder(last_BD[:, None] + self.position))
        return self.lm(**self.given(inputs), use_cache=False).logits

    def loss(self, inputs: Tensor, targets: Tensor, *parts: Tensor) -> Tensor:
        """parts: with classes asked at positions, the flat indices of the positions of each part of the batch. `targets` [N] are
        those of all parts then, and the loss is the mean over parts of the mean over what each asks."""
        if parts:
            output, weight_VD = self.lm.model(**self.given(inputs), use_cache=False), self.lm.lm_head.weight
            x_ND = output.last_hidden_state.flatten(0, 1)
            chunk = max(1, LOGITS_AT_ONCE // len(weight_VD))  # one chunk: a launch costs more than its logits
            wanted = zip(parts, targets.split([len(part) for part in parts]), strict=True)
            loss = sum(linear_cross_entropy(x_ND[part], weight_VD, y, chunk_tokens=chunk) for part, y in wanted) / len(parts)
            return loss if output.aux_loss is None else loss + output.aux_loss.to(loss)
        output = self(inputs).float()
        if self.task.targets == "classes":
            return F.cross_entropy(output.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        asked = ~targets.isnan()  # masked, not chosen: how many are asked would have to come back from the device
        error = (output[..., : targets.shape[-1]] - targets.nan_to_num()).square()
        if output.shape[-1] > targets.shape[-1]:  # mean and log variance
            log_variance = output[..., targets.shape[-1] :]
            error = 0.5 * (log_variance + error * (-log_variance).exp())
        return error.where(asked, 0.0).sum() / asked.sum()

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def row_of(run: Run, device: str) -> dict[str, Any]:
    """What every row of results begins with."""
    return {"key": run.key, "label": run.name, **asdict(run), "device": _device_name(device), "status": "done", "metrics": {}}


def check_time(until: float | None) -> None:
    """Raise `TimeoutError` after `until`, a value of `time.time()`."""
    if until is not None and time.time() > until:
        raise TimeoutError("the time of the sweep is over")


def train(run: Run, device: str = "cpu", until: float | None = None) -> dict[str, Any]:
    """Train and test one model; the row of results. `TimeoutError` if it is not trained at `until`."""
    with stream(device):
        return _train(run, device, until)


def _train(run: Run, device: str, until: float | None) -> dict[str, Any]:
    started, task = time.perf_counter(), get_task(run.task, **run.task_options)
    tests = {"train": task} | {name: task.at(**options) for name, options in run.tests.items()}
    torch.manual_seed(run.seed)
    model = TaskModel(task, run).to(device)
    optimization = {name: getattr(run, name) for name in ("learning_rate", "betas", "clip", "precision")}
    take_step = Step(model.loss, parameter_groups(model, run.weight_decay), device, **optimization)
    schedule = get_cosine_schedule_with_warmup(take_step.optimizer, max(1, int(run.warmup * run.steps)), run.steps)
    row = row_of(run, device) | {"parameters": model.parameter_count(), "state_bytes": model.lm.state_bytes(task.length)}
    history: list[tuple[int, float]] = []
    every, step = max(10, math.ceil(run.steps / 20)), 0
    for step, batch in enumerate(_training_batches(task, run, device), 1):
        check_time(until)
        loss = take_step(batch)
        schedule.step()
        if step % every and step < run.steps:
            continue
        if not math.isfinite(float(loss)):
            row["status"] = "diverged"
            break
        with take_step.autocast():
            history.append((step, round(task.score(evaluate(model, task, "validation", device, batches=1)), 5)))
        if run.target is not None and history[-1][1] >= run.target:
            break
    row |= {"steps_taken": step, "train_seconds": time.perf_counter() - started, "history": history}
    row["validation"] = history[-1][1] if history and row["status"] == "done" else None
    if row["status"] == "done":
        with take_step.autocast():
            row["metrics"] = {name: evaluate(model, test, "test", device) for name, test in tests.items()}
    return row | {"seconds": time.perf_counter() - started, "replays": take_step.replays, "torch": torch.__version__}


def _training_batches(task: Task, run: Run, device: str) -> Iterator[tuple[Tensor, ...]]:
    """Arguments of `TaskModel.loss`, pinned for a GPU; the next ones are made while the model works on these."""

    def make(index: int) -> tuple[Tensor, ...]:
        inputs, targets, info = task.batch("train", index, run.batch_size, seed=run.seed)
        arrays = [inputs, targets]
        if task.targets == "classes" and task.readout == "position":  # found here: on a GPU it would wait for the device
            part, asked = info.get("part", np.zeros(len(inputs), np.int64))[:, None], targets != IGNORE
            places = [np.flatnonzero(asked & (part == i)) for i in range(int(part.max()) + 1)]
            arrays = [inputs, targets.reshape(-1)[np.concatenate(places)], *places]
        batch = tuple(torch.from_numpy(x) for x in arrays)
        return tuple(x.pin_memory() for x in batch) if device.startswith("cuda") else batch

    if device == "cpu":
        yield from map(make, range(run.steps))
        return
    with ThreadPoolExecutor(1) as maker:
        waiting = maker.submit(make, 0)
        for index in range(run.steps):
            ready = waiting.result()
            if index + 1 < run.steps:
                waiting = maker.submit(make, index + 1)
            yield ready


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Tensor], task: Task, split: str, device: str, *, batches: int = TEST_BATCHES
) -> dict[str, Any]:
    """Measures of a model (ids or vectors -> logits or values) on the first batches of a split."""
    if isinstance(model, nn.Module):
        model.eval()
    total: dict[str, tuple[Any, Any]] = {}
    for index in range(batches):
        batch = task.batch(split, index, TEST_ROWS // TEST_BATCHES)
        rows = max(1, LOGITS_AT_ONCE // (batch.targets.shape[1] * max(task.output_size, 64)))
        for start in range(0, len(batch.inputs), rows):
            part = slice(start, start + rows)
            piece = Batch(batch.inputs[part], batch.targets[part], {k: v[part] for k, v in batch.info.items()})
            output = model(torch.from_numpy(piece.inputs).to(device))
            if task.targets == "classes" and not task.needs_logits:
                output = output.argmax(-1)  # on the device: the logits are what takes time to move
            total = add(total, task.metrics((output.float() if output.is_floating_point() else output).cpu().numpy(), piece))
    if isinstance(model, nn.Module):
        model.train()
    metrics = divide(total)
    if "accuracy" in metrics:
        metrics["scaled_accuracy"] = (metrics["accuracy"] - task.chance) / (1 - task.chance)
    return metrics


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


# ---- many runs -----------------------------------------------------------------------------------------------------------


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a results file (or folder), the last one of every key. A torn last line is left out."""
    path = Path(path)
    path = path / "results.jsonl" if path.is_dir() else path
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["key"]] = row
    return list(rows.values())


def append_result(path: Path, row: dict[str, Any]) -> None:
    """Add one line; after a torn line it starts a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
            file.write(b"\n" if torn else b"")
        file.write(json.dumps(_finite(row)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Job(NamedTuple):
    """A run, the folder of its results, and "module:function" that is called in place of `train`."""

    run: Run
    out: Path
    trainer: str | None = None


def sweep(runs: Iterable[Run], out: str | Path, **options: Any) -> list[dict[str, Any]]:
    """Train every run that `out`/results.jsonl does not hold yet; the rows of all of them. options: of `work`."""
    runs = list(runs)
    work([Job(run, Path(out)) for run in runs], **options)
    keys = {run.key for run in runs}
    return [row for row in read_results(out) if row["key"] in keys]


def work(
    jobs_to_do: Iterable[Job],
    *,
    jobs: int = 1,
    device: str = "cpu",
    threads: int = 1,
    until: float | None = None,
    progress: Callable[[str], None] | None = print,
) -> None:
    """Train what the results files do not hold yet, in the given order; every finished run is a row at once.

    jobs: runs at a time; with more than one, each is in a process of its own ("spawn": CUDA contexts are not inherited).
    device: "cpu", "cuda", or several with commas between, which take turns. threads: CPU threads of each process.
    until: a value of `time.time()` after which nothing is begun and what runs is dropped, to be done by the next call.
    """
    if jobs < 1 or threads < 1:
        raise ValueError(f"jobs and threads must be >= 1; got {jobs} and {threads}")
    unique = {(job.out, job.run.key): job for job in jobs_to_do}
    finished = {(out, row["key"]) for out in {out for out, _ in unique} for row in read_results(out) if row["status"] != "failed"}
    waiting = [job for key, job in unique.items() if key not in finished]
    devices = device.split(",")
    say = progress or (lambda text: None)
    folders = ", ".join(dict.fromkeys(str(job.out) for job in waiting))
    say(
        f"{len(waiting)} of {len(unique)} runs to do, {jobs} at a time on {device}" + (f"; results in {folders}" if folders else "")
    )
    began = time.perf_counter()

    def note(index: int, job: Job, row: dict[str, Any] | None) -> None:
        if row is None:
            return
        append_result(job.out / "results.jsonl", row)
        score = "" if row.get("validation") is None else f" score {row['validation']:.3f}"
        error = row.get("error", "").partition("\n")[0]
        say(
            f"[{index}/{len(waiting)}, {time.perf_counter() - began:.0f} s] {job.out.name} {row['task']} {row['label']} "
            f"lr {row['learning_rate']:g} seed {row['seed']}: {row['status']}{score} {error}".rstrip()
        )

    if jobs == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for index, job in enumerate(waiting):
                note(index + 1, job, _attempt(job, devices[index % len(devices)], until))
        finally:
            torch.set_num_threads(before)
    elif waiting:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(waiting)), context, torch.set_num_threads, (threads,)) as pool:
            futures: dict[Future, Job] = {
                pool.submit(_attempt, job, devices[i % len(devices)], until): job for i, job in enumerate(waiting)
            }
            for index, future in enumerate(as_completed(futures), 1):
                error, job = future.exception(), futures[future]  # a process that was killed takes its neighbours' runs with it
                note(index, job, future.result() if error is None else _failure(job.run, error))


def _attempt(job: Job, device: str, until: float | None) -> dict[str, Any] | None:
    """The row of a run; None if the time was over first."""
    try:
        check_time(until)
        if job.trainer is None:
            return train(job.run, device, until)
        module, function = job.trainer.split(":")
        return getattr(importlib.import_module(module), function)(job.run, device, until)
    except TimeoutError:
        return None
    except Exception as error:  # one setting must not cost the others their results
        return _failure(job.run, error) | {"traceback": traceback.format_exc()}


def _failure(run: Run, error: BaseException) -> dict[str, Any]:
    return row_of(run, "-") | {"status": "failed", "error": f"{type(error).__name__}: {error}"}
