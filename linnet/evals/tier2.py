"""Tier 2: the published questions that need a GPU, as data: each protocol cut to minutes of one GPU with 16 CPU cores.

The runs are small, so that a GPU is bound by launches: many go side by side, as processes (`--jobs`).
What was cut, against the papers:

- G1: vocabulary 8192 -> 512; one length of 256 with 8 to 64 pairs instead of five lengths; 22,500 steps of 256 rows -> 2,500
  of 64; one causal filter and one mixer instead of two of each; widths 64 and 128; two learning rates instead of four.
- G3: two layers of width 64 instead of two or three of 128; 256 rows for 2,000 (parity) and 3,000 (arithmetic) steps instead of
  20,000 and 100,000; two learning rates instead of four.
- G4: trained on 32 elements and tested on 128 instead of 128 and 512; 512 rows instead of 2,048, at most 3,000 steps.
- G7: `linnet.evals.hybrid`, size "small".
"""

from __future__ import annotations

from linnet.evals.expectations import CannotSolve, Order, Solves
from linnet.evals.hybrid import SIZES, hybrid
from linnet.evals.runner import Run
from linnet.evals.tiers import FILTER, GLA, GLA_NEG, LONGER, MEMORIES, Experiment

WIDTHS = (64, 128)
RECALL = MEMORIES | {
    "kda": "kda",
    "kaczmarz": "kaczmarz",
    "mamba2": "mamba2",
    "retnet": "retnet",
    "hgrn2": "hgrn2",
    "based": "based",
}
TRACKING = {
    "deltanet [-1,1]": "deltanet(allow_neg_eigval=true)",
    "gated_deltanet [-1,1]": "gated_deltanet(allow_neg_eigval=true)",
    "kda [-1,1]": "kda(allow_neg_eigval=true)",
    "deltaproduct 2 [-1,1]": "deltaproduct(householder_steps=2)",
    "gla [-1,1]": GLA_NEG,
    "mamba3": "mamba3",
    "deltanet [0,1]": "deltanet",
    "gated_deltanet [0,1]": "gated_deltanet",
    "gla [0,1]": GLA,
    "mamba2": "mamba2",
    "attention": "attention",
}
# group -> reflections per token that one layer needs, as the DeltaProduct paper measured (theory: 2, 3, 4, 4)
GROUPS = {"s3": 2, "s4": 2, "a5": 2, "s5": 4}
GROUP_STEPS = {"s3": 1500, "s4": 2500, "a5": 2500, "s5": 3000}
PRODUCT = "deltaproduct(conv_size=none, householder_steps={}, allow_neg_eigval={})"
PRODUCTS = {f"n_h {n} [-1,1]": PRODUCT.format(n, "true") for n in (1, 2, 3, 4)} | {"n_h 4 [0,1]": PRODUCT.format(4, "false")}


def _tracking(name: str, title: str, task: str, steps: int, leave_out: tuple[str, ...], solved: tuple[str, ...]) -> Experiment:
    # no target: what solves the trained lengths first is seldom exact enough for longer ones
    base = Run(task, "", tests={"40-256": {"length": 256}}, num_layers=2, d_model=64, heads=2, steps=steps, batch_size=256)
    unsolved = tuple(x for x in ("deltanet [0,1]", "gated_deltanet [0,1]", "gla [0,1]", "attention") if x not in leave_out)
    expected = (
        Solves(solved, 0.9, test="40-256", metric="scaled_accuracy"),
        CannotSolve(unsolved, 0.5, test="40-256", metric="scaled_accuracy"),
    )
    models = {label: layers for label, layers in TRACKING.items() if label not in leave_out}
    return Experiment(name, title, base, models, expected, learning_rates=(1e-3, 3e-3))


TIER2: tuple[Experiment, ...] = (
    Experiment(
        "G1", "recall by state bytes: 8 to 64 pairs in 256 tokens (arXiv 2312.04927, 2402.18668)",
        Run(
            "mqar", "", task_options={"length": 256, "vocabulary": 512, "pairs": (8, 16, 32, 64)},
            tests={f"{n} pairs": {"pairs": n} for n in (8, 16, 32, 64)}, heads=1, mlp="none", steps=2500, batch_size=64,
            target=0.995,
        ),
        {f"{name}, d={d}": {"layers": f"{FILTER} + {layer}", "d_model": d} for name, layer in RECALL.items() for d in WIDTHS},
        (
            Solves(tuple(f"attention, d={d}" for d in WIDTHS), 0.97, test="64 pairs"),
            *(Order((f"{x}, d=64", "linear_transformer, d=64"), 0.1, "64 pairs") for x in ("deltanet", "gated_deltanet", "kda")),
            *(Order((f"{x}, d=128", f"{x}, d=64"), -0.02, "64 pairs") for x in RECALL),
        ),
        learning_rates=(3e-3, 1e-2),
    ),
    *(
        Experiment(
            f"G4-{group}", f"prefix products of {group.upper()} in one layer: how many reflections per token (arXiv 2502.10297)",
            Run(
                f"word_problem_{group}", "", tests=LONGER(64, 128), d_model=128, heads=4, mlp="none", steps=GROUP_STEPS[group],
                batch_size=512, weight_decay=1e-6, target=0.9995,
            ),
            PRODUCTS,
            (
                Solves((f"n_h {needed} [-1,1]",), 0.95),
                Solves((f"n_h {needed} [-1,1]",), 0.9, test="128"),
                CannotSolve((*(f"n_h {n} [-1,1]" for n in range(1, needed)), "n_h 4 [0,1]"), 0.9),
            ),
            learning_rates=(1e-3, 3e-3),
            tables=("minimal",),
        )
        for group, needed in GROUPS.items()
    ),
    _tracking(
        "G3-parity", "parity at the last token, trained on 3 to 40 tokens (arXiv 2411.12537)", "parity", 2000, (),
        ("deltanet [-1,1]", "gated_deltanet [-1,1]", "mamba3"),
    ),
    _tracking(
        "G3-arithmetic", "modular arithmetic without brackets, trained on 3 to 40 tokens (arXiv 2411.12537)", "modular_arithmetic",
        3000, ("gla [-1,1]", "gla [0,1]", "kda [-1,1]"), ("deltanet [-1,1]", "gated_deltanet [-1,1]"),
    ),
    hybrid("G7", **SIZES["small"]),
)  # fmt: skip

MINIMAL = 0.95


def minimal_tables(found: dict[str, list[dict]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The fewest reflections per token with which a seed reaches MINIMAL: at the trained length, and at the longest one."""
    from linnet.evals.expectations import values

    lines = []
    for name, rows in found.items():
        group, cells = name.split("-")[-1], []
        for test in ("train", "128"):
            best = {n: max(values(rows, f"n_h {n} [-1,1]", test, "accuracy"), default=None) for n in (1, 2, 3, 4)}
            solved = [n for n, x in best.items() if x is not None and x >= MINIMAL]
            cells.append(str(solved[0]) if solved else "none" if None not in best.values() else "-")
        other = max(values(rows, "n_h 4 [0,1]", "train", "accuracy"), default=None)
        lines.append([group.upper(), *cells, str(GROUPS[group]), "-" if other is None else f"{other:.3f}"])
    header = ["group", "n_h, trained length", "n_h, four times as long", "published", "best with n_h 4 in [0, 1]"]
    return [(f"fewest reflections per token (best seed >= {MINIMAL:g})", header, lines)]
