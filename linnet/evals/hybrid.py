"""How many attention layers does a linear model need? Mixer x linear-to-full ratio x seed, as data, and what is read off.

"A Systematic Analysis of Hybrid Linear Attention", 2025 (arXiv 2507.06457), at a size that fits a laptop or minutes of one GPU:
r:1 is a block of r linear layers and one softmax-attention layer, repeated. The paper trains 340M and 1.3B parameters on 20B and
100B tokens with ratios from 24:1; here ratios are those that the number of layers has, and one model is trained on bytes of
text and on recall of tokens at once (`text_recall`), behind one causal filter of four taps that is the same for all.

The recommended ratio of a mixer is that of the fewest attention layers whose mean recall, on the hardest test, is within
max(0.02, the standard deviation over seeds of the best one) of the best mean recall of its ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from linnet.evals.expectations import Order, Rows, best_runs, everywhere, value
from linnet.evals.runner import Run
from linnet.evals.tasks.text import corpus
from linnet.evals.tiers import FILTER, Experiment

TOLERANCE, LEARNED = 0.02, 0.2
PUBLISHED = ("deltanet", "gated_deltanet", "gla", "hgrn", "hgrn2", "retnet")
# attention: how many of the layers are attention
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "mixers": ("gated_deltanet", "gla"), "layers": 4, "attention": (0, 1, 2, 4), "d_model": 32, "heads": 2, "length": 32,
        "pairs": (2, 4, 8), "symbols": 32, "steps": 800, "batch_size": 64, "max_bytes": 2_000_000,
    },
    "small": {
        "mixers": (*PUBLISHED, "kda", "mamba2"), "layers": 12, "attention": (0, 1, 2, 3, 6, 12), "d_model": 64, "heads": 4,
        "length": 256, "pairs": (16, 32, 64), "steps": 1500, "batch_size": 128, "max_bytes": None,
    },
}  # fmt: skip


def hybrid(
    name: str = "G7",
    *,
    mixers: Sequence[str],
    layers: int,
    attention: Sequence[int],
    d_model: int,
    heads: int,
    length: int,
    pairs: Sequence[int],
    steps: int,
    batch_size: int,
    symbols: int = 256,
    max_bytes: int | None = None,
    path: str = "stdlib",
    learning_rates: Sequence[float] = (3e-3,),
) -> Experiment:
    """The experiment. attention: numbers of attention layers, 0 or divisors of `layers`."""
    for count in attention:
        if not 0 <= count <= layers or (count and layers % count):
            raise ValueError(f"attention must hold 0 or divisors of the {layers} layers; got {count}")
    models = {
        f"{mixer} {ratio(layers, count)}": f"{FILTER} + " + pattern(mixer, layers, count)
        for mixer in mixers
        for count in attention
        if count < layers
    }
    if layers in attention:
        models["attention"] = f"{FILTER} + {layers}*attention"
    tests = {f"{n} pairs": {"pairs": n} for n in pairs}
    options = {"path": path, "max_bytes": max_bytes, "length": length, "pairs": tuple(pairs), "symbols": symbols}
    base = Run(
        "text_recall", "", task_options=options, tests=tests, d_model=d_model, heads=heads, steps=steps, batch_size=batch_size
    )
    hardest = f"{max(pairs)} pairs"
    wanted = tuple(
        Order((f"{mixer} {ratio(layers, count)}", f"{mixer} pure"), 0.0, hardest)
        for mixer in mixers
        for count in attention
        if 0 < count < layers and layers // count == 4 and 0 in attention
    )
    title = f"hybrid ratio: text and recall in {layers} layers of width {d_model} (arXiv 2507.06457)"
    return Experiment(name, title, base, models, wanted, tuple(learning_rates), tables=("hybrid",))


def ratio(layers: int, attention: int) -> str:
    return f"{layers // attention - 1}:1" if attention else "pure"


def pattern(mixer: str, layers: int, attention: int) -> str:
    """r linear layers and one of attention, repeated."""
    return f"{attention}*({layers // attention - 1}*{mixer} + attention)" if attention else f"{layers}*{mixer}"


def with_digest(experiment: Experiment) -> Experiment:
    """The experiment on the text as it is now: rows of another text are other rows."""
    options = experiment.base.task_options
    options = options | {"digest": corpus(options["path"], options["max_bytes"])[1]}
    return replace(experiment, base=replace(experiment.base, task_options=options))


# ---- what is read off ----------------------------------------------------------------------------------------------------


def spread(numbers: Sequence[float]) -> str:
    """Mean +- standard deviation over seeds."""
    sd = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.3f}{sd}" if numbers else "-"


def measured(rows: Rows) -> dict[str, dict[str, dict[str, list[float]]]]:
    """mixer -> ratio -> measure -> values over seeds, fewest attention layers first; attention alone belongs to every mixer."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for label, seeds in best_runs(rows).items():
        mixer, _, of = label.rpartition(" ")
        runs = list(seeds.values())
        tests = list(runs[0]["tests"])
        numbers = {test: [value(run, test, "accuracy") for run in runs] for test in tests}
        numbers |= {"bits per byte": [everywhere(run, "bits_per_byte") for run in runs]}
        found.setdefault(mixer or "attention", {})[of if mixer else "0:1"] = numbers
    full = found.pop("attention", {})
    order = lambda of: 1e9 if of == "pure" else int(of.split(":")[0])
    return {mixer: dict(sorted((ratios | full).items(), key=lambda x: -order(x[0]))) for mixer, ratios in found.items()}


def recommended(ratios: dict[str, dict[str, list[float]]], test: str) -> str:
    """The ratio of the fewest attention layers among those whose recall is as good as the best; see the head of this file.

    "-" if no recall was learned (best mean below LEARNED): then nothing can be read off.
    """
    means = {of: statistics.mean(numbers[test]) for of, numbers in ratios.items() if numbers[test]}
    best = max(means, key=means.get)
    if means[best] < LEARNED:
        return "-"
    seeds = ratios[best][test]
    tolerance = max(TOLERANCE, statistics.stdev(seeds) if len(seeds) > 1 else 0.0)
    return next(of for of in means if means[of] >= means[best] - tolerance)


def hybrid_tables(found: dict[str, Rows]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, lines): every ratio, and the recommended one of every mixer."""
    tables = []
    for name, rows in found.items():
        tests, lines, advice = list(rows[0]["tests"]), [], []
        lost = {row["label"]: f"{row['status']}, seed {row['seed']}" for row in rows if row["status"] != "done"}
        for mixer, ratios in measured(rows).items():
            for of, numbers in ratios.items():
                label = "attention" if of == "0:1" else f"{mixer} {of}"
                cells = [spread(numbers[key]) for key in ("bits per byte", *tests)]
                lines.append([mixer, of, *cells, lost.get(label, "-")])
            hardest = {of: numbers[tests[-1]] for of, numbers in ratios.items()}
            losses = [statistics.mean(numbers["bits per byte"]) for numbers in ratios.values()]
            chosen, best = recommended(ratios, tests[-1]), max(map(statistics.mean, hardest.values()))
            loss = f"{100 * (max(losses) / min(losses) - 1):.1f} %"
            advice.append([mixer, chosen, spread(hardest.get(chosen, [])), f"{best:.3f}", loss])
        header = ["mixer", "linear : attention", "bits per byte", *(f"recall, {test}" for test in tests), "lost runs"]
        tables.append((f"{name}: every ratio (mean ± standard deviation over seeds)", header, lines))
        header = ["mixer", "recommended ratio", f"recall, {tests[-1]}", "best recall", "spread of the loss over ratios"]
        tables.append((f"{name}: recommended ratio", header, advice))
    return tables
