"""`linnet bench gpu`: Linnet's GPU operators and whichever peers are installed, side by side in one process.

    linnet bench gpu --out DIR                          the main shape, B=8 T=4096 H=16 K=V=128, bf16, with peers
    linnet bench gpu --out DIR --resume --shapes all    every shape; what DIR holds already is not measured again
    linnet bench gpu --out DIR --resume --cold          time to the first gradients in new processes with empty caches
    linnet bench gpu --report DIR [DIR ...]             table and plots from the records of one or several runs, without a GPU
    linnet bench gpu --check                            values and gradients of Linnet's kernels against fp64, at many small shapes
    linnet bench gpu --tune KIND                        times of every role of linear attention over candidate tiles

Per operator and shape: forward and forward + backward (medians; replayed from a CUDA graph and launched by Python), the times of
our kernels in them, peak memory beyond the inputs, bytes over the floor, and the error of the output and every gradient on a few
heads against fp64. Each result is appended to DIR/gpu.jsonl as soon as it is known. `python -m linnet.bench.gpu` is the same
command without typer.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from linnet.bench import _gpu_measure as measuring
from linnet.bench._gpu_report import Records, key, milliseconds, worst, write
from linnet.bench._gpu_rows import IMPLEMENTATION, ROWS, Row, Sizes, parse_shape, shape_name, shape_sets

SHORTEST_COLD = 20  # seconds of the budget that must be left for another cold process
SHARES = 6  # tasks into which the kernels that a peer tunes itself are divided when the cache is filled


@dataclass(frozen=True)
class Task:
    kind: str  # "time" or "cold"
    row: Row
    implementation: str
    shape: Sizes

    @property
    def names(self) -> dict[str, str]:
        return {"kind": self.kind, "row": self.row.name, "implementation": self.implementation, "shape": shape_name(self.shape)}


def chosen_rows(patterns: list[str]) -> list[Row]:
    for pattern in patterns:
        if not fnmatch.filter(ROWS, pattern):
            raise ValueError(f"bench gpu: argument 'rows' must be of {', '.join(ROWS)} (or patterns of them); got {pattern!r}")
    return [row for name, row in ROWS.items() if not patterns or any(fnmatch.fnmatch(name, p) for p in patterns)]


def chosen_shapes(names: list[str]) -> list[tuple[str, Sizes]]:
    """(set, shape) in order of importance; a shape named by its sizes belongs to every row."""
    sets = shape_sets()
    pairs = []
    for name in sets if "all" in names else names:
        pairs += [(name, s) for s in sets[name]] if name in sets else [("any", parse_shape(name))]
    return pairs


def plan(rows: list[Row], shapes: list[tuple[str, Sizes]], peers: bool = True, kind: str = "time") -> list[Task]:
    """What to measure, the most important first, nothing twice."""
    tasks: dict[str, Task] = {}
    for name, shape in shapes:
        for row in rows:
            decodes = shape["T"] == 1
            if name not in (*row.sets, "any") or (decodes and (kind == "cold" or not row.state)):
                continue
            able = [p for p, peer in row.peers.items() if (peer.step if decodes else peer.load) is not None]
            able = [p for p in able if peers or row.peers[p].package == "linnet"]
            for implementation in [IMPLEMENTATION] * (row.run is not None) + able:
                task = Task(kind, row, implementation, shape)
                tasks.setdefault(key(task.names), task)
    ordered = list(tasks.values())
    return sorted(ordered, key=lambda t: t.implementation != IMPLEMENTATION) if kind == "cold" else ordered


def installed(tasks: list[Task]) -> list[Task]:
    """The tasks whose packages are there; says once what is not."""
    peer = lambda t: t.row.peers.get(t.implementation)
    missing = {peer(t).package for t in tasks if peer(t) is not None and peer(t).missing()}
    for package in sorted(missing):
        print(f"{package}: not installed, its rows are left out")
    return [t for t in tasks if peer(t) is None or peer(t).package not in missing]


def machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__}
    for package in ("triton", "fla-core", "mlstm_kernels"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return facts


def line(record: dict[str, Any]) -> str:
    """One result, for the terminal."""
    head = f"{record['kind']} {record['row']:15s} {record['implementation']:13s} {record['shape']:26s}"
    if "failed" in record:
        return f"{head} FAILED {record['failed']}"
    if record["kind"] == "cold":
        return f"{head} first {record['first_s']:.1f} s, of it importing {record['import_s']:.1f} s"
    parts = [f"{part} {milliseconds(record, part):.3f}" for part in ("forward", "both") if milliseconds(record, part) is not None]
    eager = [record[name] for name in ("forward_eager_ms", "both_eager_ms") if name in record]
    parts.append("eager " + " | ".join(f"{ms:.3f}" for ms in eager))
    if record.get("peak_mib") is not None:
        parts.append(f"peak {record['peak_mib']:.0f} MiB")
    if record.get("errors"):
        parts.append("error {} {:.1e}".format(*worst(record["errors"])))
    remarks = ("note", "backward_failed", "graph_failed", "check_failed", "profile_failed")
    parts += [f"{name}: {record[name]}" for name in remarks if name in record]
    return f"{head} {record['backend']}: {', '.join(parts)}"


def run(tasks: list[Task], records: Records, device: str, budget: float, check: bool) -> int:
    """Measure until the budget is spent; returns how many tasks are left. A task that fails is a record, too."""
    start, rate, facts = time.monotonic(), measuring.bandwidth(device), machine(device)
    with measuring.quick_tuning(device):
        for i, task in enumerate(tasks):
            left = budget - (time.monotonic() - start)
            if left <= (SHORTEST_COLD if task.kind == "cold" else 0):
                return len(tasks) - i
            record = {**task.names, "bandwidth": rate, "machine": facts}
            began = time.monotonic()
            try:
                if task.kind == "cold":
                    record |= measuring.cold(task.row, task.implementation, task.shape, device, min(left, 900))
                else:
                    record |= measuring.measure(task.row, task.implementation, task.shape, device, check)
            except Exception as problem:  # noqa: BLE001 - one row must not stop the others
                record["failed"] = measuring.words(problem)
            record["took_s"] = round(time.monotonic() - began, 2)
            records.add(record)
            print(line(record), flush=True)
            try:
                measuring.free(device)
                measuring.synchronize(device)
            except RuntimeError as problem:  # the device's context is lost: only a new process can go on
                raise SystemExit(f"the device failed after {key(record)}: {problem}\ngo on with --resume") from None
    return 0


def warm(tasks: list[Task], workers: int, seconds: float, device: str) -> list[Task]:
    """Fill Triton's cache; returns the tasks with those in front whose kernels are compiled now."""
    jobs, open_jobs = [], {}
    for task in tasks:
        tunes = task.implementation != IMPLEMENTATION and task.row.peers[task.implementation].package == "fla"
        shares = SHARES if tunes else 1
        jobs += [
            (key(task.names), task.row.name, task.implementation, task.shape, share, shares, device) for share in range(shares)
        ]
        open_jobs[key(task.names)] = shares
    began = time.monotonic()
    for name, problem in measuring.warm(jobs, workers, seconds, device):
        open_jobs[name] -= 1
        if problem:
            print(f"warm: {name} {problem}", flush=True)
    left = sum(open_jobs.values())
    print(f"warm: {len(jobs) - left} of {len(jobs)} first calls, {workers} processes, {time.monotonic() - began:.0f} s", flush=True)
    return sorted(tasks, key=lambda t: open_jobs[key(t.names)] > 0)


def options_of(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="linnet bench gpu", description=__doc__, formatter_class=raw)
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help=f"rows or patterns, default all: {', '.join(ROWS)}")
    shapes = f"{', '.join([*shape_sets(), 'all'])}, or sizes like B8T4096H16K128V128"
    parser.add_argument("--shapes", nargs="+", default=["main"], metavar="SHAPE", help=f"default main; {shapes}")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure installed peers, too")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="errors beside the times")
    parser.add_argument("--cold", action="store_true", help="instead of times, first calls in new processes with empty caches")
    parser.add_argument("--out", type=Path, default=None, help="folder for gpu.jsonl, gpu.json, gpu.md and the plots")
    parser.add_argument("--resume", action="store_true", help="add to the records in --out; what they hold is not measured again")
    parser.add_argument("--retry", action="store_true", help="with --resume: measure again what failed")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="start no row after this long")
    parser.add_argument("--warm", type=int, default=0, metavar="N", help="first compile in N processes, for --warm-seconds at most")
    parser.add_argument("--warm-seconds", type=float, default=600, metavar="SECONDS")
    parser.add_argument(
        "--report", type=Path, nargs="+", default=None, metavar="DIR", help="merge records, write into --out or DIR"
    )
    parser.add_argument("--check", action="store_true", help="check the kernels of the rows at small shapes")
    parser.add_argument("--tune", choices=("none", "scalar", "channel"), default=None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal of everything but the kernels")
    parser.add_argument("--cold-case", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.retry and not options.resume:
        raise ValueError("bench gpu: argument 'retry' must come with --resume")
    return options


def main(argv: list[str] | None = None) -> None:
    options = options_of(argv)
    if options.report:
        records = Records(*options.report)
        if not records.found:
            folders = ", ".join(map(str, options.report))
            raise ValueError(f"bench gpu: argument 'report' must name folders with gpu.jsonl; got {folders}")
        print("written:", ", ".join(map(str, write(records, options.out or options.report[0]))))
        return
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench gpu: argument 'device' must be cpu where there is no CUDA device (a rehearsal); got cuda")
    if options.cold_case:
        name, implementation, shape = options.cold_case
        print(json.dumps(measuring.first_call(ROWS[name], implementation, parse_shape(shape), device)))
        return
    rows = chosen_rows(options.rows)
    if options.check or options.tune:
        from linnet.bench import _gpu_kernels

        if options.check and not _gpu_kernels.check(rows, device):
            raise SystemExit("a check failed")
        if options.tune:
            _gpu_kernels.tune(options.tune)
        return
    if options.out is None:
        raise ValueError("bench gpu: argument 'out' must be a folder for the records; got none")
    if (options.out / "gpu.jsonl").exists() and not options.resume:
        raise ValueError(f"bench gpu: argument 'out' must be a folder without gpu.jsonl, or --resume given; got {options.out}")
    records = Records(options.out)
    known = {k for k, r in records.found.items() if not (options.retry and "failed" in r)}
    kind = "cold" if options.cold else "time"
    tasks = installed(plan(rows, chosen_shapes(options.shapes), options.peers, kind))
    tasks = [t for t in tasks if key(t.names) not in known]
    print(json.dumps(machine(device)), f"{len(tasks)} measurements", flush=True)
    if options.warm and not options.cold:
        tasks = warm(tasks, options.warm, options.warm_seconds, device)
    left = run(tasks, records, device, options.budget, options.verify)
    if left:
        print(f"the budget is spent: {left} measurements left; go on with --resume")
    if records.found:
        print("written:", ", ".join(map(str, write(records, options.out))))


if __name__ == "__main__":
    main()
