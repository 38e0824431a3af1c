"""Several architectures, one budget, one parameter count: a table, a plot, one line of JSON per arm.

The text, its tokenizer and split, the batches and their order are the same for all arms; the width of the MLP (and
where that is not enough, of the model) is adjusted so that total parameters agree.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import re
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linnet.models import LinnetConfig, LinnetForCausalLM
from linnet.training import report
from linnet.training.checkpoints import write_text
from linnet.training.config import RunConfig
from linnet.training.trainer import Text, load_text, model_config, train

TOLERANCE = 0.02  # of the parameter count


@dataclass(frozen=True)
class Arm:
    """One architecture of a comparison: its name (and folder) and its layer pattern."""

    name: str
    layers: str


def arms_of(layers: Sequence[str] = (), mixers: Sequence[str] = (), num_layers: int = 4) -> list[Arm]:
    """Arms from layer patterns and from mixer names, `num_layers` layers of each.

    `all` stands for every registered mixer, `all-diagonal` and `all-delta` for those of one family.
    """
    from linnet.mixers import get_mixer, list_mixers
    from linnet.mixers._base import FAMILIES

    groups = {"all": FAMILIES} | {f"all-{family}": (family,) for family in FAMILIES}
    names: list[str] = []
    for name in mixers:
        if name in groups:
            names += [n for n in list_mixers() if get_mixer(n).family in groups[name]]
        elif name.startswith("all-"):
            raise ValueError(f"mixers must be names or one of {', '.join(groups)}; got {name!r}")
        else:
            names.append(get_mixer(name).name)  # refuses unknown names with the nearest known one
    arms = [Arm(re.sub(r"[^A-Za-z0-9.=]+", "_", pattern.replace("*", "x")).strip("_"), pattern) for pattern in layers]
    arms += [Arm(name, f"{num_layers}*{name}") for name in names]
    if not arms:
        raise ValueError("compare needs at least one of layers (patterns) and mixers (names, or 'all'); got neither")
    repeated = {arm.name for arm in arms if [a.name for a in arms].count(arm.name) > 1}
    if repeated:
        raise ValueError(f"architectures must differ; got {sorted(repeated)[0]!r} more than once")
    return arms


def count_parameters(config: LinnetConfig) -> int:
    """Parameters of a model, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in LinnetForCausalLM(config).parameters())


def match_parameters(config: RunConfig, tokenizer: Any, target: int, tolerance: float = TOLERANCE) -> tuple[dict[str, Any], int]:
    """Changes of d_ff (a multiple of 8) and if need be d_model that bring a model to `target` parameters.

    The width of the model stays unless the MLP would become narrower than half of it. Returns (changes, parameters);
    ValueError if no width comes within `tolerance`.
    """
    base = model_config(config, tokenizer)
    step = 8 * base.heads
    widths = [base.d_model + sign * i * step for i in range(base.d_model // step + 1) for sign in ((1, -1) if i else (1,))]
    nearest: tuple[float, dict[str, Any], int] | None = None
    for d_model in (w for w in widths if w >= step):
        count = lambda d_ff, d_model=d_model: count_parameters(model_config(config, tokenizer, d_model=d_model, d_ff=d_ff))
        try:
            at_8, at_16 = count(8), count(16)
        except ValueError:
            continue  # a mixer does not take this width
        changes: dict[str, Any] = {"d_model": d_model}
        if at_16 > at_8:
            changes["d_ff"] = 8 * round(1 + (target - at_8) / (at_16 - at_8))
            if changes["d_ff"] < d_model // 2:
                continue
        total = count(changes.get("d_ff", 8))
        error = abs(total / target - 1)
        if error <= tolerance:
            return changes, total
        if nearest is None or error < nearest[0]:
            nearest = (error, changes, total)
    closest = f"{nearest[2]:,} with {nearest[1]}" if nearest else "none"
    raise ValueError(f"layers {base.layers!r}: no width gives {target:,} parameters within {tolerance:.0%}; nearest: {closest}")


def compare(
    config: RunConfig,
    out: str | Path,
    arms: Sequence[Arm],
    *,
    seeds: Sequence[int] = (0,),
    parameters: int | None = None,
    resume: bool = False,
    jobs: int = 1,
    console: Any = None,
    text: Text | None = None,
) -> list[dict[str, Any]]:
    """Train every arm under `config` (its budget is that of each arm) and return one row per arm and seed.

    Args:
        out: folder of the comparison: one run per arm and seed, results.jsonl, comparison.png, table.md.
        parameters: what all arms are matched to; None means what the first arm has with `config` as it is.
        resume: skip finished arms, continue unfinished ones.
        jobs: runs at a time, each in a process of its own with its share of the threads (1: in this process).

    An arm that fails is reported in its row (`error`) and does not stop the others.
    """
    from rich.console import Console

    console = console or Console()
    config.validate()
    out = Path(out)
    if out.exists() and any(out.iterdir()) and not resume:
        raise ValueError(f"out folder {str(out)!r} is not empty; give another folder, or resume it")
    text = text or load_text(config)
    configs = []
    for arm in arms:
        configs.append(copy.deepcopy(config))
        configs[-1].model["layers"] = arm.layers
    target = parameters or count_parameters(model_config(configs[0], text.tokenizer))
    for arm, arm_config in zip(arms, configs, strict=True):
        changes, total = match_parameters(arm_config, text.tokenizer, target)
        arm_config.model.update(changes)
        widths = ", ".join(f"{key} {value}" for key, value in changes.items())
        console.print(f"{arm.name}: {total:,} parameters ({total / target - 1:+.2%}), {widths}")
    runs = []
    for seed in seeds:
        for arm, arm_config in zip(arms, configs, strict=True):
            run_config = copy.deepcopy(arm_config)
            run_config.training["seed"] = seed
            runs.append((arm, seed, run_config, out / f"{arm.name}-seed{seed}"))
    rows: list[dict[str, Any]] = []
    for arm, seed, row in _results(runs, resume, jobs, text, console):
        if "error" in row:  # one architecture must not cost the others their results
            row["layers"] = arm.layers
            console.print(f"[red]{arm.name} failed:[/] {row['error']}", markup=True, highlight=False)
        else:
            console.print(f"{arm.name}, seed {seed}: held-out bits per byte {row['bits_per_byte']:.3f}")
        rows.append({"arm": arm.name, "seed": seed} | row)
        write_text(out / "results.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    averaged = average_seeds(rows)
    if averaged:
        report.plot_comparison(averaged, out / "comparison.png")
        write_text(out / "table.md", markdown(averaged))
    console.print(table(averaged, [r for r in rows if "error" in r], text))
    return rows


def _train(config: RunConfig, folder: Path, resume: bool, text: Text | None, console: Any) -> dict[str, Any]:
    try:
        return train(config, folder, resume=resume, text=text, console=console, report_run=False)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


_texts: dict[str, Text] = {}  # of a process of `_train_alone`: read and tokenized once


def _train_alone(config: RunConfig, folder: Path, resume: bool, threads: int) -> dict[str, Any]:
    """`_train` in a process of its own, which prints nothing and reads the text itself."""
    from rich.console import Console

    torch.set_num_threads(threads)
    key = json.dumps(dataclasses.asdict(config.data), sort_keys=True)
    if key not in _texts:
        _texts[key] = load_text(config)
    return _train(config, folder, resume, _texts[key], Console(quiet=True))


def _results(runs: Sequence[tuple], resume: bool, jobs: int, text: Text, console: Any):
    """(arm, seed, row) of every run: in order with one job, as they end with several."""
    if jobs == 1:
        for arm, seed, config, folder in runs:
            console.rule(f"{arm.name}, seed {seed}")
            yield arm, seed, _train(config, folder, resume, text, console)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_train_alone, config, folder, resume, threads): (arm, seed) for arm, seed, config, folder in runs}
        for done in as_completed(waiting):
            yield *waiting[done], done.result()


def average_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm, best first: means over its seeds, and the standard deviation of bits per byte."""
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            by_arm.setdefault(row["arm"], []).append(row)
    result = []
    for group in by_arm.values():
        scores = [row["bits_per_byte"] for row in group]
        means = {key: statistics.fmean(row[key] for row in group) for key in ("bits_per_byte", "tokens_per_second", "tokens")}
        result.append({**group[0], **means, "seeds": len(group), "spread": statistics.stdev(scores) if len(scores) > 1 else None})
    return sorted(result, key=lambda row: row["bits_per_byte"])


def markdown(averaged: Sequence[dict[str, Any]]) -> str:
    """The table of a comparison for a page, best arm first."""
    lengths = report.STATE_LENGTHS
    head = ("architecture", "bits/byte", "tokens/s", "parameters", *(f"state at {n // 1024}k" for n in lengths))
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in averaged:
        spread = f" ± {row['spread']:.3f}" if row["spread"] is not None else ""
        sizes = (report.human_bytes(row["state_bytes"][str(n)]) for n in lengths)
        counts = (f"{row['bits_per_byte']:.3f}{spread}", f"{row['tokens_per_second']:,.0f}", f"{row['parameters']:,}")
        lines.append(f"| {' | '.join((row['arm'], *counts, *sizes))} |")
    return "\n".join(lines) + "\n"


def table(averaged: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]], text: Text):
    """The table of a comparison, best arm first."""
    from rich.table import Table

    result = Table(title=f"{text.corpus.origin}: held-out bits per byte, lower is better")
    lengths = report.STATE_LENGTHS
    for column in (
        "architecture",
        "bits/byte",
        "tokens/s",
        "tokens",
        "parameters",
        *(f"state at {n // 1024}k" for n in lengths),
    ):
        result.add_column(column, justify="left" if column == "architecture" else "right")
    for row in averaged:
        spread = f" ± {row['spread']:.3f}" if row["spread"] is not None else ""
        sizes = [report.human_bytes(row["state_bytes"][str(n)]) for n in lengths]
        counts = (f"{row['tokens_per_second']:,.0f}", f"{row['tokens']:,.0f}", f"{row['parameters']:,}")
        result.add_row(row["arm"], f"{row['bits_per_byte']:.3f}{spread}", *counts, *sizes)
    for row in failed:
        result.add_row(row["arm"], f"failed (seed {row['seed']})", *[""] * (3 + len(lengths)))
    if averaged:
        best = averaged[0]
        result.caption = f"xz -9: {best['xz_bits_per_byte']:.3f}, byte unigram: {best['unigram_bits_per_byte']:.3f} bits per byte"
    return result
