"""Accuracy and cost of the ways to invert the unit lower triangular matrix of a chunk of the delta rule.

For key matrices from random to all equal and erase strengths up to 2, the relative Frobenius error of every algorithm against
the fp64 triangular solve of the same rounded matrix, with the operands of every product in fp64, fp32 or bf16 (bf16: rounded
operands, fp32 sums), and milliseconds for a batch of matrices in fp32.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.bench._measure import machine, milliseconds
from linnet.ops.torch._inverse import INVERSES, newton_schulz, solve


def from_identity(more: int):
    """Newton-Schulz from the identity, `more` iterations beyond those that are exact without rounding."""
    return lambda L, matmul=torch.matmul: newton_schulz(L, matmul, 1.0, (L.shape[-1] - 1).bit_length() + more)


# name -> algorithm(L, matmul); the registered ones, then variants of Newton-Schulz that show why it starts small
ALGORITHMS = {name.replace("_", " "): f for name, f in INVERSES.items()} | {
    "newton schulz, X0 = I": from_identity(0),
    "newton schulz, X0 = I, 2 more": from_identity(2),
}
PRECISIONS = ("fp64", "fp32", "bf16")


def matrices(rows: int = 64, channels: int = 128) -> dict[str, Tensor]:
    """L = stril(diag(beta) K K^T) in fp64 for keys and strengths from harmless to the worst."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    unit = lambda x: F.normalize(x, dim=-1)
    plain, silu = unit(noise(rows, channels)), unit(F.silu(noise(rows, channels)))
    close = unit(unit(noise(1, channels)) + 0.33 * unit(noise(rows, channels)))
    beta = torch.sigmoid(noise(rows, 1))
    return {
        "random keys": (beta * plain @ plain.T).tril(-1),
        "SiLU keys": (beta * silu @ silu.T).tril(-1),
        "cos 0.9": (beta * close @ close.T).tril(-1),
        "cos 0.9, beta 1": (close @ close.T).tril(-1),
        "cos 0.9, beta 2": (2 * close @ close.T).tril(-1),
        "equal keys, beta 1": torch.ones(rows, rows, dtype=torch.float64).tril(-1),
    }


def rounded(L: Tensor, precision: str) -> Tensor:
    """L as the precision holds it, in the dtype that its algorithm runs in."""
    if precision == "fp64":
        return L.double()
    return L.bfloat16().float() if precision == "bf16" else L.float()


def product(precision: str):
    """The matrix product of an algorithm: bf16 rounds both operands and sums in fp32."""
    if precision == "bf16":
        return lambda a, b: a.bfloat16().float() @ b.bfloat16().float()
    return torch.matmul


def error(algorithm, L: Tensor, precision: str) -> float:
    """Relative Frobenius error against the fp64 solve of the same rounded matrix."""
    given = rounded(L, precision)
    exact = solve(given.double())
    found = algorithm(given, product(precision)).double()
    distance = float((found - exact).norm() / exact.norm())
    return distance if math.isfinite(distance) else math.inf


def measure(rows: int = 64, channels: int = 128, batch: int = 256, budget: float = 0.5) -> dict:
    cases = matrices(rows, channels)
    report = {
        "rows": rows,
        "batch": batch,
        "largest": {
            "T": {case: float(solve(L).abs().max()) for case, L in cases.items()},
            "L^(C/2)": {case: float(torch.linalg.matrix_power(L, rows // 2).abs().max()) for case, L in cases.items()},
        },
        "error": {
            name: {precision: {case: error(f, L, precision) for case, L in cases.items()} for precision in PRECISIONS}
            for name, f in ALGORITHMS.items()
        },
    }
    L = cases["SiLU keys"].float().expand(batch, -1, -1).contiguous()
    report["milliseconds"] = {name: milliseconds(lambda f=f: f(L), budget=budget) for name, f in ALGORITHMS.items()}
    return report


def markdown(report: dict) -> str:
    """The report as one Markdown table per precision, the cost in the first."""
    cases, lines = list(report["largest"]["T"]), []

    def number(x: float) -> str:
        return f"{x:g}" if x in (0, math.inf) else f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e+")

    for precision in PRECISIONS:
        head = [precision, *cases, "ms"]
        lines += [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        if precision == "fp64":
            for name, row in report["largest"].items():
                lines.append(f"| largest entry of {name} | " + " | ".join(f"{row[c]:.2g}" for c in cases) + " | |")
        for name, row in report["error"].items():
            cost = f"{report['milliseconds'][name]:.1f}" if precision == "fp32" else ""
            lines.append(f"| {name} | " + " | ".join(number(row[precision][c]) for c in cases) + f" | {cost} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="linnet bench inverse", description=__doc__, formatter_class=raw)
    parser.add_argument("--rows", type=int, default=64, help="C, tokens of a chunk: a power of two")
    parser.add_argument("--batch", type=int, default=256, help="matrices inverted at once for the cost")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
    parser.add_argument("--out", type=Path, default=None, help="folder for inverse.json (must not hold one)")
    options = parser.parse_args(argv)
    if options.rows < 2 or options.rows & (options.rows - 1):
        raise ValueError(f"bench inverse: argument 'rows' must be a power of two >= 2; got {options.rows}")
    if options.batch < 1:
        raise ValueError(f"bench inverse: argument 'batch' must be at least 1; got {options.batch}")
    if options.out is not None and (options.out / "inverse.json").exists():
        raise ValueError(f"bench inverse: argument 'out' must be a folder without inverse.json; got {options.out}")
    if options.threads:
        torch.set_num_threads(options.threads)
    report = {"machine": machine()} | measure(options.rows, batch=options.batch)
    print(f"relative error of (I + L)^-1, C = {options.rows}; ms: {options.batch} matrices in fp32 on {report['machine']['cpu']}\n")
    print(markdown(report))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "inverse.json").write_text(json.dumps(report, indent=1))
        print(f"written: {options.out}/inverse.json")


if __name__ == "__main__":
    main()
