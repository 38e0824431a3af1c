"""Tables and plots of results: what was measured, what papers report beside it, what the expectations say."""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from linnet.evals.expectations import Rows, Verdict, best_runs, everywhere, judge, value
from linnet.evals.runner import read_results
from linnet.evals.tasks import regression as R
from linnet.evals.tasks._base import get_task

HEADLINES = ("accuracy", "sequence_accuracy", "accuracy_updated", "mse", "r2", "risk_ratio", "D_stsp")
LOWER_IS_BETTER = ("mse", "risk_ratio", "D_stsp", "bits_per_byte")
# tables over several experiments: {experiment: rows} -> (title, header, lines) of each
TABLES = {"hybrid": "linnet.evals.hybrid:hybrid_tables", "minimal": "linnet.evals.tier2:minimal_tables"}


def experiments(folder: str | Path) -> dict[str, Rows]:
    """Every results file below a folder: name -> rows."""
    folder = Path(folder)
    files = sorted(folder.rglob("results.jsonl"))
    if not files:
        raise ValueError(f"{str(folder)!r} must hold a results.jsonl; it holds none")
    return {str(file.parent.relative_to(folder)) if file.parent != folder else folder.name: read_results(file) for file in files}


def tests_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(test for row in rows for test in row.get("metrics", {})))


def headline(rows: Rows) -> str:
    found = {name for row in rows for metrics in row.get("metrics", {}).values() for name in metrics}
    return next((name for name in HEADLINES if name in found), next(iter(sorted(found)), ""))


def cell(numbers: Sequence[float], lower: bool) -> str:
    """Median over seeds, with the range."""
    if not numbers:
        return "-"
    if len(numbers) == 1:
        return f"{numbers[0]:.3f}"
    return f"{statistics.median(numbers):.3f} ({min(numbers):.3f} - {max(numbers):.3f})"


def summary(rows: Rows, metric: str | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and lines, best model first: per test the median (min - max) over seeds of the best learning rate."""
    metric = metric or headline(rows)
    tests, best, lower = tests_of(rows), best_runs(rows), metric in LOWER_IS_BETTER
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows):
        runs, tried = list(best.get(label, {}).values()), [row for row in rows if row["label"] == label]
        at = [[x for run in runs if (x := value(run, test, metric)) is not None] for test in tests]
        bad = ", ".join(f"{n} {s}" for s in ("diverged", "failed") if (n := sum(row["status"] == s for row in tried)))
        rates = " ".join(sorted({f"{run['learning_rate']:g}" for run in runs}))
        first = statistics.median(at[-1]) if at and at[-1] else math.inf if lower else -math.inf
        facts = [f"{runs[0][key]:,}" if runs and key in runs[0] else "-" for key in ("parameters", "state_bytes")]
        lines.append((first, [label, *(cell(x, lower) for x in at), *facts, rates or "-", str(len(runs)), bad or "-"]))
    lines.sort(key=lambda line: line[0] if lower else -line[0])
    header = ["model", *(f"{metric}, {test}" for test in tests), "parameters", "state bytes", "learning rate", "seeds", "lost runs"]
    return header, [line for _, line in lines]


def published(task: str) -> list[dict[str, str]]:
    """What papers report for a task: rows of published.csv."""
    with open(Path(__file__).with_name("published.csv"), newline="") as file:
        return [row for row in csv.DictReader(file) if row["task"] == task]


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)) + "\n"


def show(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table, with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        print(f"{title}\n{markdown(header, lines)}")
        return
    table = Table(title=escape(title))
    for index, name in enumerate(header):
        table.add_column(escape(name), justify="right" if index else "left")
    colours = {"pass": "[green]pass[/]", "fail": "[bold red]fail[/]", "inconclusive": "[yellow]inconclusive[/]"}
    for line in lines:
        table.add_row(*(colours.get(x, escape(x)) for x in line))
    Console().print(table)


def verdict_lines(verdicts: Iterable[Verdict]) -> list[list[str]]:
    return [[v.expectation, v.result, v.evidence] for v in verdicts]


def write_report(
    folder: str | Path,
    *,
    verdicts: dict[str, list[Verdict]] | None = None,
    further: dict[str, Sequence[str]] | None = None,
    quiet: bool = False,
) -> Path:
    """Write report.md, results.csv and plots into a folder of results, and print the tables; the path of the report.

    further: names of TABLES by experiment, for experiments that are in no tier.
    """
    from linnet.evals.tiers import all_experiments

    folder, known = Path(folder), all_experiments()
    found = experiments(folder)
    if verdicts is None:
        verdicts = {name: judge(known[name].expectations, rows) for name, rows in found.items() if name in known}
    parts, tables = ["# Results\n"], {}

    def add(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], mark: str = "## ") -> None:
        parts.extend((f"{mark}{title}\n", markdown(header, lines)))
        if not quiet:
            show(title, header, lines)

    for name, rows in found.items():
        tasks = " and ".join(dict.fromkeys(row["task"] for row in rows))
        add(f"{name}: {tasks}", *summary(rows))
        if name in verdicts:
            add(f"{name}: expectations", ("expected", "verdict", "measured"), verdict_lines(verdicts[name]), mark="")
        for table in known[name].tables if name in known else (further or {}).get(name, ()):
            tables.setdefault(table, {})[name] = rows
        theirs = published(rows[0]["task"]) if rows else []
        if theirs:
            keys = ("model", "setting", "metric", "value", "source", "confidence")
            parts += ["Published, in other settings:\n", markdown(keys, [[row[key] for key in keys] for row in theirs])]
        parts += [f"![{path.stem}]({path.relative_to(folder).as_posix()})\n" for path in plots(name, rows, folder)]
    for table, rows in tables.items():
        module, function = TABLES[table].split(":")
        for title, header, lines in getattr(importlib.import_module(module), function)(rows):
            add(title, header, lines)
    _write_csv(folder)
    (folder / "report.md").write_text("\n".join(parts))
    return folder / "report.md"


def _write_csv(folder: Path) -> None:
    """Every number of every run in long form."""
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("experiment", "task", "model", "learning_rate", "seed", "status", "test", "metric", "value"))
        for name, rows in experiments(folder).items():
            for row in rows:
                head = (name, row["task"], row["label"], row["learning_rate"], row["seed"], row["status"])
                pairs = [(test, key, x) for test, found in row.get("metrics", {}).items() for key, x in found.items()]
                writer.writerows((*head, test, key, json.dumps(x)) for test, key, x in pairs or [("", "", None)])


# ---- plots ---------------------------------------------------------------------------------------------------------------


def plots(name: str, rows: Rows, folder: Path) -> list[Path]:
    """The plots that the rows have something to show in: by length, by state bytes, by hybrid ratio, by number of examples."""
    best = {label: list(seeds.values()) for label, seeds in best_runs(rows).items()}
    written = []
    kinds = {"length": _by_length, "state": _by_state, "ratio": _by_ratio, "examples": _by_examples, "ratio_loss": _by_ratio}
    for kind, draw in kinds.items():
        curves, (x_label, y_label), scale = draw(best, "bits_per_byte" if kind == "ratio_loss" else headline(rows))
        if curves:
            path = folder / f"{re.sub(r'[^A-Za-z0-9-]+', '_', name)}_by_{kind}.png"
            _plot(curves, x_label, y_label, scale, name, path)
            written.append(path)
    return written


def _curve(points: Iterable[tuple[float, Sequence[float]]]) -> list[tuple[float, float, float, float]]:
    """(x, median, lowest, highest), by x."""
    return sorted((x, statistics.median(y), min(y), max(y)) for x, y in points if y)


def _by_length(best, metric):
    curves = {}
    for label, runs in best.items():
        points: dict[float, list[float]] = {}
        for run in (run for run in runs if run.get("tests")):
            base = run.get("task_options", {}).get("length") or get_task(run["task"]).length
            for test, options in {"train": {}, **run.get("tests", {})}.items():
                if not set(options) - {"length"} and (x := value(run, test, metric)) is not None:
                    points.setdefault(options.get("length", base), []).append(x)
        if len(points) > 1:
            curves[label] = _curve(points.items())
    return curves, ("length", metric), "log"


def _by_state(best, metric):
    """A curve per model, over the labels "name, d=WIDTH" of one name."""
    points: dict[str, list[tuple[float, list[float]]]] = {}
    for label, runs in best.items():
        test = tests_of(runs)[-1] if runs else ""
        found = [x for run in runs if (x := value(run, test, metric)) is not None]
        if found and "state_bytes" in runs[0]:
            points.setdefault(re.sub(r", d=\d+$", "", label), []).append((max(runs[0]["state_bytes"], 1), found))
    several = len({x for curve in points.values() for x, _ in curve}) > 1
    return {name: _curve(x) for name, x in points.items()} if several else {}, ("state bytes of one sequence", metric), "log"


def _by_ratio(best, metric):
    """Share of attention layers; a curve per kind of linear layer, the labels "name r:1" and "name pure" of one name. The recall is
    that of the last test, the loss on text that of all."""
    from linnet.models import parse_layers

    points: dict[str, list[tuple[float, list[float]]]] = {}
    for label, runs in best.items():
        try:  # the filter in front of recall is no layer of either kind
            kinds = [spec.mixer for spec in parse_layers(runs[0]["layers"]) if spec.mixer != "fsmn"]
        except ValueError:
            continue
        test = tests_of(runs)[-1]
        of = lambda run, test=test: everywhere(run, metric) if metric == "bits_per_byte" else value(run, test, metric)
        name = re.sub(r" (pure|\d+:\d+)$", "", label) if set(kinds) - {"attention"} else ""
        found = [x for run in runs if (x := of(run)) is not None]
        points.setdefault(name, []).append((kinds.count("attention") / max(1, len(kinds)), found))
    full = points.pop("", [])
    curves = {name: _curve([*part, *full]) for name, part in points.items() if any(0 < x < 1 for x, _ in part)}
    return {k: v for k, v in curves.items() if v}, ("share of softmax-attention layers", metric), "linear"


def _by_examples(best, _):
    curves, task = {}, None
    for label, runs in best.items():
        found = np.array([x for run in runs if (x := run["metrics"].get("train", {}).get("error_by_examples"))])
        if found.size and found.shape[1] > 1:
            task = task or get_task(runs[0]["task"], **runs[0]["task_options"])
            curves[label] = _curve((k, column.tolist()) for k, column in enumerate(found.T))
    if task is not None:
        x, y = task.examples(np.random.default_rng(0), 2000)
        ridge = max(task.noise / task.task_scale, 0) ** 2
        fits = {"least squares": R.least_squares, "one step of gradient descent": lambda x, y: R.gradient_descent(
            x, y, rate=x.shape[1] / (x.shape[1] + x.shape[2] + 1 + ridge))}  # fmt: skip
        if ridge:
            fits["ridge (Bayes)"] = lambda x, y: R.least_squares(x, y, ridge)
        for label, fit in fits.items():
            curves[label] = [(k, e, e, e) for k, e in enumerate(R.curve(fit, x, y))]
    return curves, ("examples in context", "squared error / dimension"), "linear"


def _plot(curves: dict[str, list], x_label: str, y_label: str, scale: str, title: str, path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'linnet[eval]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (label, points) in enumerate(curves.items()):
        x, middle, low, high = (list(column) for column in zip(*points, strict=True))
        style = "os^v"[i // 10 % 4] + ("-", "--", ":", "-.")[i // 10 % 4]  # there are ten colours
        (line,) = axes.plot(x, middle, style, markersize=4, label=label)
        if len(x) > 1:
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        else:
            axes.vlines(x, low, high, color=line.get_color())
    if "error" in y_label:
        axes.set_ylim(0, 1.5)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.set_xscale("log", base=2) if scale == "log" else None
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
