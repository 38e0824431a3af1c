"""What a run leaves for its reader: the loss plot, the summary table, the size of the state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

STATE_LENGTHS = (1024, 65536)  # tokens seen, at which state sizes are stated


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def bits_per_byte_of_loss(loss: float, tokens: int, size: int) -> float:
    """A training loss (nats per token) in bits per byte of text, at the training set's tokens per byte."""
    return loss / math.log(2) * tokens / size


def plot_run(
    history: list[dict[str, Any]], path: Path, tokens_per_step: int, bits_per_nat: float, baselines: dict[str, float]
) -> None:
    """Training and held-out loss in bits per byte over training tokens, with the baselines as lines."""
    train = [(h["step"] * tokens_per_step, h["loss"] * bits_per_nat) for h in history if "loss" in h]
    held_out = [(h["step"] * tokens_per_step, h["eval_bits_per_byte"]) for h in history if "eval_bits_per_byte" in h]
    figure, axes = _figure()
    if train:
        axes.plot(*zip(*train, strict=True), linewidth=1, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", markersize=3, label="held out")
    for (name, value), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color="gray", linestyle=style, linewidth=1, label=f"{name} {value:.2f}")
    top = max([value for _, value in train + held_out] + list(baselines.values()))
    axes.set(xlabel="training tokens", ylabel="bits per byte", ylim=(0, 1.05 * top))
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_comparison(rows: list[dict[str, Any]], path: Path) -> None:
    """Three bars per architecture: held-out bits per byte, tokens per second, state bytes."""
    figure, panels = _figure(columns=3, height=1.2 + 0.4 * len(rows))
    names = [row["arm"] for row in rows]
    key = str(STATE_LENGTHS[-1])
    values = (
        ("held-out bits per byte", [row["bits_per_byte"] for row in rows], "linear"),
        ("training tokens per second", [row["tokens_per_second"] for row in rows], "linear"),
        (f"state bytes after {STATE_LENGTHS[-1]:,} tokens", [row["state_bytes"][key] for row in rows], "log"),
    )
    for index, (axes, (label, data, scale)) in enumerate(zip(panels, values, strict=True)):
        if not index:
            axes.axvline(rows[0]["unigram_bits_per_byte"], color="0.5", linestyle=":", label="byte unigram")
            axes.axvline(rows[0]["xz_bits_per_byte"], color="0.5", linestyle="--", label="xz -9")
            axes.legend(loc="lower right", fontsize="small")
        write = human_bytes if scale == "log" else "{:,.0f}".format if max(data) >= 100 else "{:.3f}".format
        axes.bar_label(axes.barh(names, data), labels=[write(x) for x in data], padding=2)
        axes.set(xlabel=label, xscale=scale)
        axes.margins(x=0.25)
        axes.invert_yaxis()
        if index:
            axes.set_yticklabels([])
    figure.savefig(path, dpi=120)


def _figure(columns: int = 1, height: float = 4.0):
    """A figure without a display and without touching the caller's matplotlib backend."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'linnet[train]'") from error
    figure = Figure(figsize=(4.5 * columns if columns > 1 else 7, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def summary_table(results: dict[str, Any]):
    """The final table of a run."""
    from rich.table import Table

    table = Table(title=f"{results['layers']}, {results['data']['origin']}", show_header=False)
    table.add_row("held-out bits per byte", f"[bold]{results['bits_per_byte']:.3f}[/]")
    table.add_row("  xz -9 on the same bytes", f"{results['xz_bits_per_byte']:.3f}")
    table.add_row("  byte unigram model", f"{results['unigram_bits_per_byte']:.3f}")
    table.add_row("held-out text", f"{results['held_out_bytes']:,} bytes, {results['held_out_documents']} documents")
    table.add_row("perplexity per token", f"{results['perplexity']:.2f}")
    table.add_row("parameters", f"{results['parameters']:,}")
    table.add_row("trained", f"{results['tokens']:,} tokens, {results['steps']:,} steps, {results['train_seconds']:.0f} s")
    table.add_row("training speed", f"{results['tokens_per_second']:,.0f} tokens/s on {results['device']}")
    for length, size in results["state_bytes"].items():
        table.add_row(f"state after {int(length):,} tokens", human_bytes(size))
    return table
