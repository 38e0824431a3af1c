"""`python -m linnet.evals list | tier0 | run | tier1 | report`: the evaluations without a command-line library."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="linnet eval", description="Tasks for sequence models: list, train and test, report.")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the tasks, what a model needs for them, and the level of chance")
    tier0 = commands.add_parser("tier0", help="exact checks, without training; exit code 1 if one fails")
    tier0.add_argument("checks", nargs="*", help="names of checks [default: all]")
    run = commands.add_parser("run", help="train mixers on one task")
    run.add_argument("task")
    run.add_argument("--mixers", default="", help="names with commas between")
    run.add_argument("--layers", action="append", default=[], help='a layer pattern, "3*gla + attention"; repeat for more')
    run.add_argument("--option", action="append", default=[], help="an option of the task, name=value in JSON: pairs=16")
    run.add_argument("--test", action="append", default=[], help="a further test, options of the task: length=512,pairs=32")
    run.add_argument("--lengths", default="", help="further tests at these lengths, commas between")
    run.add_argument("--num-layers", type=int, default=2)
    run.add_argument("--d-model", type=int, default=64)
    run.add_argument("--heads", type=int, default=2)
    run.add_argument("--mlp", default="swiglu", help="swiglu or none")
    run.add_argument("--batch-size", type=int, default=64)
    run.add_argument("--learning-rates", default="1e-3,3e-3,1e-2")
    run.add_argument("--weight-decay", type=float, default=0.1)
    run.add_argument("--target", type=float, default=0.999, help="validation score at which a run ends")
    run.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    tier1 = commands.add_parser("tier1", help="the field's small experiments, with what they must show")
    tier1.add_argument("experiments", nargs="*", help="E1, E2, ... [default: all]")
    for command in (run, tier1):
        command.add_argument("--seeds", type=int, default=3)
        command.add_argument("--steps", type=int, default=None if command is tier1 else 1000)
        command.add_argument("--out", default="runs/eval", help="folder of the results; a second call continues there")
        command.add_argument("--device", default="cpu", help="cpu, cuda, or several with commas between")
        command.add_argument("--jobs", type=int, default=1, help="runs at a time, each a process")
        command.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    report = commands.add_parser("report", help="tables, verdicts and plots of a folder of results")
    report.add_argument("folder")
    return top


def options_of(texts: Sequence[str]) -> dict[str, Any]:
    """name=value pairs; a value is JSON, or else text."""
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"an option must be written name=value; got {text!r}")
        try:
            options[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[name.strip()] = value
    return options


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return COMMANDS[args.command](args)


def list_command(args: argparse.Namespace) -> int:
    from linnet.evals.report import show
    from linnet.evals.tasks import get_task, list_tasks

    lines = []
    for name in list_tasks():
        task = get_task(name)
        size = f"{task.input_size} {'ids' if task.inputs == 'tokens' else 'channels'}"
        what = f"{task.output_size} {task.targets}"
        chance = f"{task.chance:.3f}" if task.targets == "classes" else "-"
        lines.append([name, str(task.length), size, what, chance])
    show("tasks", ("task", "length", "inputs", "targets", "chance"), lines)
    return 0


def tier0_command(args: argparse.Namespace) -> int:
    from linnet.evals.exact import run_tier0
    from linnet.evals.report import show

    rows = run_tier0(args.checks or None)
    lines = [
        [
            row["check"],
            row["what"],
            f"{row['value']:.2g}",
            f"{'>=' if row['above'] else '<='} {row['limit']:g}",
            "pass" if row["ok"] else "fail",
        ]
        for row in rows
    ]
    show("exact checks", ("check", "what", "measured", "limit", "verdict"), lines)
    return 0 if all(row["ok"] for row in rows) else 1


def run_command(args: argparse.Namespace) -> int:
    from linnet.evals.report import write_report
    from linnet.evals.runner import Run, grid, sweep
    from linnet.evals.tasks import get_task

    models = {name.strip(): name.strip() for name in args.mixers.split(",") if name.strip()} | {x: x for x in args.layers}
    if not models:
        raise ValueError("run needs at least one of --mixers and --layers; got neither")
    tests = {text: options_of(text.split(",")) for text in args.test}
    tests |= {text: {"length": int(text)} for text in args.lengths.split(",") if text}
    chosen = options_of(args.option)
    task = get_task(args.task, **chosen)
    for options in tests.values():
        task.at(**options)
    settings = ("num_layers", "d_model", "heads", "mlp", "batch_size", "weight_decay", "target", "precision", "steps")
    base = Run(args.task, "", task_options=chosen, tests=tests, **{name: getattr(args, name) for name in settings})
    rates = [float(x) for x in args.learning_rates.split(",")]
    runs = grid(base, models, rates, range(args.seeds))
    out = Path(args.out) / args.task
    sweep(runs, out, jobs=args.jobs, device=args.device, threads=args.threads)
    print(f"report: {write_report(out)}")
    return 0


def tier1_command(args: argparse.Namespace) -> int:
    from linnet.evals.report import write_report
    from linnet.evals.tiers import run_tier1

    verdicts = run_tier1(
        args.out, args.experiments or None, seeds=range(args.seeds), jobs=args.jobs, device=args.device, threads=args.threads,
        **({} if args.steps is None else {"steps": args.steps}),
    )  # fmt: skip
    print(f"report: {write_report(args.out, verdicts=verdicts)}")
    return 1 if any(v.result == "fail" for found in verdicts.values() for v in found) else 0


def report_command(args: argparse.Namespace) -> int:
    from linnet.evals.report import write_report

    print(f"report: {write_report(args.folder)}")
    return 0


COMMANDS = {
    "list": list_command,
    "tier0": tier0_command,
    "run": run_command,
    "tier1": tier1_command,
    "report": report_command,
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the processes of a sweep share the cores
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
