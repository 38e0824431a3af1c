"""Tables and plots of `linnet bench gpu` from its records; needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from linnet.bench._gpu_rows import IMPLEMENTATION, ROWS, parse_shape, shape_name, shape_sets

Record = dict[str, Any]
TOKENS = 32768


class Records:
    """DIR/gpu.jsonl: one line per result, written as soon as it is known; of several with one key the last counts."""

    def __init__(self, *folders: Path):
        self.path = folders[0] / "gpu.jsonl"
        self.found: dict[str, Record] = {}
        for folder in folders:
            path = folder / "gpu.jsonl"
            for line in path.read_text().splitlines() if path.exists() else ():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the last line of a run that was killed
                    continue
                self.found[key(record)] = record

    def add(self, record: Record) -> None:
        self.found[key(record)] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.exists() else ""
        with open(self.path, "a") as file:
            file.write("\n" * (text != "" and not text.endswith("\n")) + json.dumps(record) + "\n")

    def of(self, kind: str) -> list[Record]:
        return [r for r in self.found.values() if r["kind"] == kind]


def key(record: Record) -> str:
    return "|".join(record[n] for n in ("kind", "row", "implementation", "shape"))


def milliseconds(record: Record, part: str) -> float | None:
    """Replayed from a CUDA graph where it could be captured, else launched by Python."""
    return record.get(f"{part}_ms", record.get(f"{part}_eager_ms"))


def floor_ms(record: Record, part: str) -> float:
    return record[f"{part}_bytes"] / record["bandwidth"] * 1e3


def worst(errors: dict[str, float]) -> tuple[str, float]:
    """Name and value of the largest error; NaN is the largest."""
    return max(errors.items(), key=lambda e: float("inf") if e[1] != e[1] else e[1])


def _title(record: Record) -> str:
    return ROWS[record["row"]].title if record["row"] in ROWS else record["row"]


def _number(x: float | None, form: str = ".3f") -> str:
    return "" if x is None else f"{x:{form}}"


def _sorted(records: Iterable[Record]) -> list[Record]:
    order = list(ROWS)
    rank = lambda r: order.index(r["row"]) if r["row"] in ROWS else len(order)
    return sorted(records, key=lambda r: (rank(r), r["implementation"] != IMPLEMENTATION, r["implementation"]))


def _table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows), ""]


def _shape_table(records: list[Record]) -> list[str]:
    def cells(r: Record) -> list[str]:
        if "failed" in r:
            return [_title(r), r["implementation"], *[""] * 8, f"failed: {r['failed']}"]
        times, rates = [], []
        for part in ("forward", "both"):
            ms = milliseconds(r, part)
            times.append("" if ms is None else f"{ms:.3f} ({ms / floor_ms(r, part):.1f}x)")
            rates.append("" if ms is None else f"{r[f'{part}_bytes'] / ms / 1e6:.0f}")
        eager = [_number(r.get(f"{part}_eager_ms")) for part in ("forward", "both")]
        notes = [f"backend {r['backend']}"] if r["implementation"] == IMPLEMENTATION else []
        notes += ["eager only, not captured" for _ in [0] if "graph_failed" in r]
        notes += [r["note"] for _ in [0] if "note" in r]
        failures = ("backward_failed", "check_failed", "profile_failed")
        notes += [f"{name.replace('_', ' ')}: {r[name]}" for name in failures if name in r]
        error = "{} {:.1e}".format(*worst(r["errors"])) if r.get("errors") else ""
        return [
            _title(r), r["implementation"], *times, *eager, *rates, _number(r.get("peak_mib"), ".0f"), error, "; ".join(notes),
        ]  # fmt: skip

    header = [
        "operator", "by", "forward ms (x floor)", "forward + backward ms (x floor)", "forward, eager", "forward + backward, eager",
        "GB/s forward", "GB/s both", "peak MiB", "largest error", "notes",
    ]  # fmt: skip
    return _table(header, map(cells, _sorted(records)))


def _kernel_table(records: list[Record]) -> list[str]:
    """What a call of ours spends its time on."""
    write = lambda times: ", ".join(f"{name} {ms:.3f}" for name, ms in times.items())
    lines = [
        [_title(r), {"both": "forward + backward"}.get(part, part), f"{sum(times.values()):.3f}", write(times)]
        for r in _sorted(records)
        for part, times in r.get("kernels", {}).items()
    ]
    return _table(["operator", "call", "all, ms", "by kernel, ms (profiler)"], lines) if lines else []


def _decode_table(records: list[Record]) -> list[str]:
    batches = sorted({parse_shape(r["shape"])["B"] for r in records})
    rows: dict[tuple[str, str], dict[int, Record]] = {}
    for r in _sorted(records):
        rows.setdefault((_title(r), r["implementation"]), {})[parse_shape(r["shape"])["B"]] = r

    def cell(r: Record | None) -> str:
        if r is None or "failed" in r:
            return "" if r is None else "failed"
        ms = milliseconds(r, "forward")
        slow = f" (backend {r['backend']})" if r["backend"] == "torch" else ""
        slow += " (eager)" if "forward_ms" not in r else ""
        return f"{ms * 1e3:.1f} us{slow}, {r['forward_bytes'] / ms / 1e6:.0f} GB/s ({floor_ms(r, 'forward') / ms:.0%})"

    header = ["one token", "by", *(f"batch {B}" for B in batches)]
    return _table(header, ([*names, *(cell(of.get(B)) for B in batches)] for names, of in rows.items()))


def _cold_table(records: list[Record]) -> list[str]:
    def cells(r: Record) -> list[str]:
        if "failed" in r:
            return [_title(r), r["implementation"], "", "", "", r["failed"]]
        return [_title(r), r["implementation"], *(f"{r[n]:.1f}" for n in ("first_s", "import_s", "process_s")), ""]

    header = ["operator", "by", "first forward + backward s", "of it importing s", "whole process s", "notes"]
    return _table(header, map(cells, _sorted(records)))


def markdown(records: Records) -> str:
    times, lines = records.of("time"), []
    for machine in sorted({json.dumps(r["machine"], sort_keys=True) for r in records.found.values()}):
        lines.append(", ".join(f"{name} {value}" for name, value in json.loads(machine).items()))
    if times:
        rate = times[0]["bandwidth"] / 1e12
        lines += ["", "bf16, fp32 gates, medians, replayed from a CUDA graph; the floor is every input read once and every output"]
        lines[-1] += f" written once at {rate:.2f} TB/s."
    known = [shape_name(s) for shapes in shape_sets().values() for s in shapes]
    shapes = sorted({r["shape"] for r in times}, key=lambda s: (known.index(s) if s in known else len(known), s))
    for shape in shapes:
        if parse_shape(shape)["T"] > 1:
            lines += ["", f"## {shape}", "", *_shape_table([r for r in times if r["shape"] == shape])]
            lines += _kernel_table([r for r in times if r["shape"] == shape])
    decode = [r for r in times if parse_shape(r["shape"])["T"] == 1]
    if decode:
        lines += ["", "## One token", "", *_decode_table(decode)]
    if records.of("cold"):
        lines += ["", "## First call in a cold process", "", *_cold_table(records.of("cold"))]
    return "\n".join(lines) + "\n"


def _figure(columns: int, width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return plt, figure, axes[0]


def _save(plt: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _colours(implementations: Iterable[str]) -> dict[str, Any]:
    others = sorted(set(implementations) - {IMPLEMENTATION})
    return {IMPLEMENTATION: "C0", **{name: f"C{1 + i}" for i, name in enumerate(others)}}


def plot_bars(records: list[Record], path: Path) -> Path:
    """Forward and forward + backward of every row, implementations side by side, the floor as a tick."""
    records = _sorted(r for r in records if "failed" not in r)[::-1]
    plt, figure, axes = _figure(2, 13, 1.5 + 0.26 * len(records))
    colours = _colours(r["implementation"] for r in records)
    for ax, part, title in zip(axes, ("forward", "both"), ("forward", "forward + backward"), strict=True):
        longest = max((milliseconds(r, part) or 0 for r in records), default=1)
        for y, r in enumerate(records):
            ms = milliseconds(r, part)
            if ms is None:
                continue
            ax.barh(y, ms, color=colours[r["implementation"]], alpha=1 if f"{part}_ms" in r else 0.5)
            ax.plot([floor_ms(r, part)] * 2, [y - 0.4, y + 0.4], color="black", linewidth=1.5)
            ax.text(ms + 0.01 * longest, y, f"{ms:.2f}", va="center", fontsize=7)
        ax.set(xlabel="ms (pale: launched by Python; black: memory floor)", title=f"{title}, {records[0]['shape']}")
        ax.set_yticks(range(len(records)), [f"{_title(r)} | {r['implementation']}" for r in records], fontsize=7)
        ax.set_xlim(0, 1.1 * longest)
        ax.grid(axis="x", alpha=0.3)
    axes[1].set_yticklabels([])
    return _save(plt, figure, path)


def plot_length(records: list[Record], path: Path) -> Path:
    """Time per 32768 tokens over T: flat where an operator is linear in T and fills the GPU with few sequences."""
    plt, figure, axes = _figure(2, 13, 5)
    lines: dict[tuple[str, str], list[Record]] = {}
    for r in _sorted(r for r in records if "failed" not in r):
        lines.setdefault((_title(r), r["implementation"]), []).append(r)
    for ax, part, title in zip(axes, ("forward", "both"), ("forward", "forward + backward"), strict=True):
        for (name, by), of in lines.items():
            shapes = [(parse_shape(r["shape"]), milliseconds(r, part)) for r in of]
            points = sorted((s["T"], ms * TOKENS / (s["B"] * s["T"])) for s, ms in shapes if ms is not None)
            softmax = {"color": "black"} if of[0]["row"] == "softmax" else {}
            style = "-" if by == IMPLEMENTATION else "--"
            if len(points) > 1:
                ax.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=f"{name} | {by}", **softmax)
        ax.set(xscale="log", yscale="log", xlabel="tokens T", title=title)
        ticks = sorted({parse_shape(r["shape"])["T"] for r in records})
        ax.set_xticks(ticks, [f"{T // 1024}k" if T >= 1024 else str(T) for T in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(f"ms per {TOKENS} tokens")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return _save(plt, figure, path)


def plot_cold(records: list[Record], path: Path) -> Path:
    records = _sorted(r for r in records if "failed" not in r)[::-1]
    plt, figure, (ax,) = _figure(1, 8, 1.5 + 0.26 * len(records))
    colours = _colours(r["implementation"] for r in records)
    for y, r in enumerate(records):
        ax.barh(y, r["first_s"], color=colours[r["implementation"]])
        ax.text(r["first_s"], y, f" {r['first_s']:.1f}", va="center", fontsize=7)
    ax.set_yticks(range(len(records)), [f"{_title(r)} | {r['implementation']}" for r in records], fontsize=7)
    ax.set(xlabel="seconds", title="first forward + backward in a cold process, compilation and tuning included")
    ax.grid(axis="x", alpha=0.3)
    return _save(plt, figure, path)


def write(records: Records, out: Path) -> list[Path]:
    """gpu.json, gpu.md and the plots that have data."""
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "gpu.json", out / "gpu.md"]
    written[0].write_text(json.dumps(list(records.found.values()), indent=1))
    written[1].write_text(markdown(records))
    try:
        return written + _plots(records, out)
    except ImportError as problem:
        print(f"no plots: {problem}")
        return written


def _plots(records: Records, out: Path) -> list[Path]:
    written, good = [], [r for r in records.of("time") if "failed" not in r]
    sets = {name: {shape_name(s) for s in shapes} for name, shapes in shape_sets().items()}
    main = [r for r in good if r["shape"] in sets["main"]]
    shapes = {r["shape"] for r in good if parse_shape(r["shape"])["T"] > 1}
    if not main and len(shapes) == 1:
        main = [r for r in good if r["shape"] in shapes]
    if main:
        written.append(plot_bars(main, out / "gpu_bars.png"))
    length = [r for r in good if r["shape"] in sets["length"]]
    if len({r["shape"] for r in length}) > 1:
        written.append(plot_length(length, out / "gpu_length.png"))
    if any("failed" not in r for r in records.of("cold")):
        written.append(plot_cold(records.of("cold"), out / "gpu_cold.png"))
    return written
