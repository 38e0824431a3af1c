"""Tier 1: the field's small experiments as data. Each is a table of models, learning rates and seeds, and what it must show.

Budgets are those of a laptop: about a minute per run and core. `linnet.evals.tier2` holds the questions that need a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linnet.evals.expectations import CannotSolve, Order, Solves, Verdict, judge
from linnet.evals.runner import Job, Models, Run, grid, read_results, work

RATES = (1e-3, 3e-3, 1e-2)

PLAIN = "conv_size=none"
DELTA, DELTA_NEG = f"deltanet({PLAIN})", f"deltanet({PLAIN}, allow_neg_eigval=true)"
GLA, GLA_NEG = "gla(temperature=1)", "gla(temperature=1, allow_neg_eigval=true)"
PRODUCT = "deltaproduct(conv_size=none, householder_steps=2, allow_neg_eigval=%s)"
CONV_GLA = "gla(conv_size=4, expand_k=1)"
# recall needs neighbours brought together first: every model has the same causal filter of four taps before its memory, and the
# mixers that are published with a short convolution keep it (without, the delta rule stays at a quarter of 4 pairs for 1,000 steps)
FILTER = "fsmn(lookback=3)"
NOPE = 'attention(position="none")'


@dataclass(frozen=True)
class Experiment:
    """models: label -> layers, or -> fields of `Run`. trainer: "module:function" in place of the runner's `train`.
    tables: names of further tables of its report (`linnet.evals.report.TABLES`)."""

    name: str
    title: str
    base: Run
    models: Models
    expectations: tuple[Solves | CannotSolve | Order, ...]
    learning_rates: tuple[float, ...] = RATES
    trainer: str | None = None
    tables: tuple[str, ...] = ()

    def jobs(self, out: str | Path, seeds: Iterable[int], steps: int | None = None) -> list[Job]:
        """Its runs; their rows go into `out`/<name>."""
        base = self.base if steps is None else replace(self.base, steps=steps)
        return [Job(run, Path(out) / self.name, self.trainer) for run in grid(base, self.models, self.learning_rates, seeds)]


def _mqar(d_model: int) -> Run:
    tests = {f"{pairs} pairs": {"pairs": pairs} for pairs in (4, 8, 16)}
    return Run("mqar", "", tests=tests, d_model=d_model, heads=1, mlp="none", steps=3000, target=0.995)


MEMORIES = {
    "attention": "attention",
    "deltanet": "deltanet",
    "gated_deltanet": "gated_deltanet",
    "gla": CONV_GLA,
    "linear_transformer": "linear_transformer",
}
MQAR_MODELS = {name: f"{FILTER} + {layer}" for name, layer in MEMORIES.items()}
GAPS = {f"{gap} blanks": {"min_gap": gap, "max_gap": gap} for gap in (1, 10)}
LONGER = lambda *lengths: {str(length): {"length": length} for length in lengths}

TIER1: tuple[Experiment, ...] = (
    Experiment(
        "E1", "parity at every token: eigenvalues in [-1, 1] or not (arXiv 2411.12537)",
        Run("word_problem_z2", "", tests=LONGER(64, 128), d_model=32, heads=2, steps=400, target=0.9995),
        {
            "deltanet [-1,1]": DELTA_NEG, "gla [-1,1]": GLA_NEG, "deltanet [0,1]": DELTA, "gla [0,1]": GLA,
            "linear_transformer": "linear_transformer", "attention x 2": '2*attention(position="none")',
        },
        (
            Solves(("deltanet [-1,1]", "gla [-1,1]"), 0.99),
            CannotSolve(("deltanet [0,1]", "gla [0,1]", "linear_transformer"), 0.75),
            CannotSolve(("deltanet [0,1]", "gla [0,1]", "linear_transformer"), 0.65, "64"),
            CannotSolve(("attention x 2",), 0.80),
        ),
    ),
    Experiment(
        "E2", "prefix products of S3 in one layer: two reflections per token (arXiv 2502.10297)",
        Run("word_problem_s3", "", tests=LONGER(64, 128), d_model=48, heads=3, steps=2000, target=0.9995),
        {
            "deltaproduct 2 [-1,1]": PRODUCT % "true", "deltaproduct 2 [0,1]": PRODUCT % "false", "deltanet [-1,1]": DELTA_NEG,
            "gla [-1,1]": GLA_NEG,
        },
        (
            Solves(("deltaproduct 2 [-1,1]",), 0.95),
            # gla with signs is not asked: it adds signed steps without the modulus, which is enough at short lengths
            CannotSolve(("deltaproduct 2 [0,1]", "deltanet [-1,1]"), 0.6),
        ),
    ),
    Experiment(
        "E3", "counting modulo 3: complex eigenvalues by two reflections, per token or in two layers",
        Run("word_problem_z3", "", tests=LONGER(64, 128), d_model=48, heads=3, steps=1500, target=0.9995),
        {
            "deltaproduct 2 [-1,1]": PRODUCT % "true", "deltanet [-1,1] x 2": f"2*{DELTA_NEG}", "deltanet [-1,1]": DELTA_NEG,
            "gla [-1,1]": GLA_NEG,
        },
        (Solves(("deltaproduct 2 [-1,1]", "deltanet [-1,1] x 2"), 0.95), CannotSolve(("deltanet [-1,1]", "gla [-1,1]"), 0.8)),
    ),
    Experiment(
        "E4", "recall with a state that is too small for it: 16 pairs, width 16 (arXiv 2312.04927)", _mqar(16), MQAR_MODELS,
        (
            Solves(("attention",), 0.97, test="16 pairs"),
            Order(("attention", "deltanet"), 0.2, "16 pairs"),
            Order(("deltanet", "linear_transformer"), 0.1, "16 pairs"),
        ),
    ),
    Experiment(
        "E4-wide", "recall with a state that suffices: 16 pairs, width 32", _mqar(32), MQAR_MODELS,
        (Solves(tuple(MQAR_MODELS), 0.95, test="16 pairs"),),
    ),
    Experiment(
        "E5", "keys that are written again: the delta rule overwrites, an additive memory sums",
        Run("mqar_forgetting", "", d_model=32, heads=1, mlp="none", steps=2000, target=0.995),
        MQAR_MODELS,
        tuple(Order((x, "linear_transformer"), 0.15, metric="accuracy_updated") for x in ("deltanet", "gated_deltanet")),
    ),
    Experiment(
        "E6", "recall by hybrid ratio, with linear layers too narrow for the pairs (arXiv 2507.06457)",
        replace(_mqar(16), steps=4000),
        {
            f"{name} {ratio}": f"{FILTER} + {layers.format(MEMORIES[name], NOPE)}"
            for name in ("gated_deltanet", "linear_transformer")
            for ratio, layers in (("1:0", "2*{}"), ("3:1", "3*{} + {}"), ("1:1", "{} + {}"))
        }
        | {"attention": f"{FILTER} + 2*{NOPE}"},
        tuple(
            expectation
            for x in ("gated_deltanet", "linear_transformer")
            for expectation in (
                Order((f"{x} 1:1", f"{x} 1:0"), 0.15, "16 pairs"),
                Order((f"{x} 1:1", "attention"), -0.05, "16 pairs"),
            )
        ),
    ),
    Experiment(
        "E7", "selective copying: gates that depend on the token (arXiv 2312.00752)",
        Run(
            "mad_selective_copy", "", task_options={"length": 128}, num_layers=2, d_model=32, heads=2, steps=2000, target=0.995,
        ),
        {
            "mamba2": "mamba2", "gla": CONV_GLA, "gated_deltanet": "gated_deltanet", "attention": "attention", "retnet": "retnet",
            "linear_transformer": f"{FILTER} + linear_transformer",
        },
        tuple(
            Order((x, y), margin)
            for x in ("mamba2", "gla", "gated_deltanet")
            for y, margin in (("retnet", 0.03), ("linear_transformer", 0.1))
        ),
    ),
    Experiment(
        "E8", "linear self-attention, trained on regression, becomes one preconditioned step of gradient descent",
        Run("in_context_regression", "", task_options={"length": 21, "layout": "joint"}, steps=3000, batch_size=512),
        {
            "isotropic": "isotropic, 1 layers", "anisotropic": "anisotropic, 1 layers",
            "isotropic, 4 layers": "isotropic, 4 layers",
        },
        (
            Solves(("isotropic", "anisotropic"), at_most=1.03, metric="risk_ratio"),
            Solves(("isotropic", "anisotropic"), 0.98, metric="cosine"),
            Solves(("isotropic",), at_most=0.05, metric="step_error"),
            Solves(("isotropic, 4 layers",), at_most=0.9, metric="risk_ratio"),
        ),
        learning_rates=(1e-2,),
        trainer="linnet.evals.lsa:train_run",
    ),
    Experiment(
        "E9", "linear regression in context, 5 dimensions (arXiv 2208.01066)",
        Run("in_context_regression", "", num_layers=3, d_model=64, heads=4, steps=5000, batch_size=64, weight_decay=0.0),
        {
            "attention": "attention", "gated_deltanet": "gated_deltanet", "mesa": "mesa",
            "linear_transformer": "linear_transformer(normalizer=none, output_norm=true)",
        },
        (
            Solves(("attention", "mesa"), at_most=0.1, metric="error_by_examples@10"),
            Order(("linear_transformer", "gated_deltanet"), metric="error_by_examples@10"),
        ),
        learning_rates=(1e-3, 3e-3),
    ),
    Experiment(
        "E10", "following a grammar through gaps longer than in training (arXiv 2601.12598)",
        Run(
            "selectivbench_memorization", "", task_options={"length": 64, "ambiguous": 6, "depth": 6}, tests=GAPS, num_layers=2,
            d_model=48, heads=3, mlp="none", steps=1500,
        ),
        {"attention": "attention", "gated_deltanet": "gated_deltanet", "gla": CONV_GLA, "deltanet": "deltanet", "mamba2": "mamba2"},
        (
            Order(("gated_deltanet", "attention"), -0.2, "1 blanks"),
            Order(("gated_deltanet", "gla"), 0.03, "10 blanks"),
            Order(("deltanet", "gla"), 0.03, "10 blanks"),
        ),
    ),
    Experiment(
        "E11", "Lorenz-63 by the almost-linear RNN: rectified units make the attractor (arXiv 2410.14240)",
        Run("lorenz", "", d_model=3, steps=10_000, batch_size=32),
        {
            f"M = {units}, P = {rectified}": f"al_rnn(units={units}, relu_units={rectified})"
            for units, rectified in ((20, 0), (20, 2), (30, 10))
        },
        (
            *(
                Order(("M = 20, P = 0", x), metric="D_stsp", factor=2.0) for x in ("M = 20, P = 2", "M = 30, P = 10")
            ),
            CannotSolve(("M = 20, P = 0",), 0.0, metric="lyapunov"),
            Solves(("M = 20, P = 2", "M = 30, P = 10"), 0.005, metric="lyapunov"),
        ),
        learning_rates=(1e-2,),
        trainer="linnet.evals.dynamics:train_run",
    ),
    Experiment(
        "E12", "forecasting: the linear family beats repeating the last value (arXiv 2205.13504)",
        Run("forecasting", "", d_model=32, heads=2, num_layers=2, steps=800, batch_size=32),
        {"attention": "attention", "gated_deltanet": "gated_deltanet", "s4d": "s4d"},
        (
            Solves(("attention", "gated_deltanet", "s4d"), at_most=1.0, metric="mse_over_repeat"),
            Solves(("attention", "gated_deltanet", "s4d"), at_most=1.1, metric="mse_over_linear"),
        ),
        learning_rates=(1e-3, 3e-3),
    ),
    *(
        Experiment(
            f"E13-{n}", f"needle in a haystack of tokens, filler {filler}: trained at 128, tested to 1024",
            Run(
                f"niah_single_{n}", "", task_options={"length": 128, "value_tokens": 1 if n == 1 else 4},
                tests=LONGER(256, 512, 1024), num_layers=2, d_model=64, heads=2, steps=2000, target=0.999,
            ),
            {
                "deltanet": "deltanet", "gated_deltanet": "gated_deltanet", "mamba2": "mamba2",
                "attention, NoPE": 'attention(position="none")', "attention, RoPE": "attention",
            },
            expectations,
        )
        for n, filler, expectations in (
            (1, "repeating", (Solves(("deltanet",), 0.9, test="1024"), Order(("deltanet", "mamba2"), test="1024"))),
            (2, "random", (Order(("gated_deltanet", "deltanet"), test="1024"),)),
        )
    ),
    Experiment(
        "E14", "ListOps of 32 to 96 tokens (arXiv 2011.04006)",
        Run("listops_small", "", num_layers=2, d_model=48, heads=3, steps=2000),
        {"attention": "attention", "gated_deltanet": "gated_deltanet", "s4d": "s4d"},
        (Solves(("attention", "gated_deltanet", "s4d"), 0.35),),
    ),
)  # fmt: skip

SMOKE = Experiment(
    "smoke", "parity by a delta rule with and without negative eigenvalues",
    Run("word_problem_z2", "", task_options={"length": 16}, d_model=16, heads=1, steps=150, target=0.999),
    {"deltanet [-1,1]": DELTA_NEG, "deltanet [0,1]": DELTA},
    (Solves(("deltanet [-1,1]",), 0.99), CannotSolve(("deltanet [0,1]",), 0.85)),
    learning_rates=(1e-2,),
)  # fmt: skip


def all_experiments() -> dict[str, Experiment]:
    """Tier 1, its smoke test and tier 2, by name."""
    from linnet.evals.tier2 import TIER2

    return {x.name: x for x in (*TIER1, SMOKE, *TIER2)}


def get_experiments(names: Iterable[str] | None = None) -> list[Experiment]:
    """Experiments by name, all of tier 1 if none is given; "E13" stands for E13-1 and E13-2."""
    if not names:
        return list(TIER1)
    known, chosen = all_experiments(), {}
    for name in names:
        found = {key: x for key, x in known.items() if key == name or key.startswith(f"{name}-")}
        if not found:
            raise ValueError(f"experiment must be one of {', '.join(known)}; got {name!r}")
        chosen |= found
    return list(chosen.values())


def run_experiments(
    out: str | Path,
    names: Iterable[str] | None | Sequence[Experiment] = None,
    *,
    seeds: Iterable[int] = range(3),
    steps: int | None = None,
    **options: Any,
) -> dict[str, list[Verdict]]:
    """Run experiments (names, or these themselves) in their order, all runs in one queue; verdicts by experiment. A second call
    continues. options: of `linnet.evals.runner.work`."""
    names, seeds = list(names or ()), list(seeds)
    chosen = names if names and isinstance(names[0], Experiment) else get_experiments(names)
    planned = {experiment.name: experiment.jobs(out, seeds, steps) for experiment in chosen}
    work([job for jobs in planned.values() for job in jobs], **options)
    verdicts = {}
    for experiment in chosen:
        keys = {job.run.key for job in planned[experiment.name]}
        rows = [row for row in read_results(Path(out) / experiment.name) if row["key"] in keys]
        verdicts[experiment.name] = judge(experiment.expectations, rows)
    return verdicts
