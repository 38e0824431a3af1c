"""`python -m linnet.evals list | tier0 | run | tier1 | tier2 | hybrid-sweep | report`: without a command-line library."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="linnet eval", description="Tasks for sequence models: list, train and test, report.")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the tasks, what a model needs for them, and the level of chance")
    tier0 = commands.add_parser("tier0", help="exact checks, without training; exit code 1 if one fails")
    tier0.add_argument("checks", nargs="*", help="names of checks [default: all]")
    run = commands.add_parser("run", help="train mixers on one task, or let a saved model answer text tasks (--tasks)")
    run.add_argument("task", help="name of a task; with --tasks a checkpoint: folder of a run or checkpoint, or hf:NAME")
    run.add_argument("--tasks", default="", help="text tasks with commas between (niah_single_1, ...) for the checkpoint to answer")
    run.add_argument("--samples", type=int, default=100, help="prompts per task and length")
    run.add_argument("--max-tokens", type=int, default=128, help="tokens of an answer at most")
    run.add_argument("--mixers", default="", help="names with commas between")
    run.add_argument("--layers", action="append", default=[], help='a layer pattern, "3*gla + attention"; repeat for more')
    run.add_argument("--option", action="append", default=[], help="an option of the task, name=value in JSON: pairs=16")
    run.add_argument("--test", action="append", default=[], help="a further test, options of the task: length=512,pairs=32")
    run.add_argument(
        "--lengths", default="", help="further tests at these lengths (tokens of a prompt with --tasks), commas between"
    )
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
    tier2 = commands.add_parser("tier2", help="the published questions that need a GPU, cut to minutes")
    for command, names in ((tier1, "E1, E2"), (tier2, "G1, G4-s3")):
        command.add_argument("experiments", nargs="*", help=f"{names}, ... [default: all]")
        command.add_argument("--only", default="", help="the same with commas between")
        command.add_argument("--plan", action="store_true", help="print the number of runs and steps, and stop")
    sweep = commands.add_parser("hybrid-sweep", help="loss and recall by mixer and ratio of linear to attention layers")
    sweep.add_argument("--size", default="tiny", help="tiny (minutes on a CPU) or small (a GPU)")
    sweep.add_argument("--mixers", default="", help="names with commas between [default: those of the size]")
    sweep.add_argument("--num-layers", type=int, help="layers [default: those of the size]")
    sweep.add_argument("--attention", default="", help="numbers of attention layers: 0 or divisors of the layers, commas between")
    sweep.add_argument("--data", default="stdlib", help="stdlib, a text file or a folder")
    sweep.add_argument("--learning-rates", default="3e-3")
    for command in (run, tier1, tier2, sweep):
        command.add_argument("--seeds", type=int, default=3)
        command.add_argument("--steps", type=int, default=1000 if command is run else None)
        command.add_argument("--minutes", type=float, help="begin nothing after so long and drop what runs; a second call goes on")
        command.add_argument("--out", default="runs/eval", help="folder of the results; a second call continues there")
        command.add_argument(
            "--device", help="cpu, cuda, or several with commas between [cpu; with --tasks the GPU, if there is one]"
        )
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
    from linnet.evals.runner import Run, grid, sweep
    from linnet.evals.tasks import get_task

    if args.tasks:
        return answer_command(args)
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
    sweep(runs, out, **work_options(args))
    finish(str(out))
    return 0


def finish(out: str, **options: Any) -> None:
    """The report, if there is anything to report."""
    from linnet.evals.report import write_report

    print(f"report: {write_report(out, **options)}" if any(Path(out).rglob("results.jsonl")) else "no run has finished")


def work_options(args: argparse.Namespace) -> dict[str, Any]:
    until = None if args.minutes is None else time.time() + 60 * args.minutes
    return {"jobs": args.jobs, "device": args.device or "cpu", "threads": args.threads, "until": until}


def answer_command(args: argparse.Namespace) -> int:
    from linnet.evals.answers import answer

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    lengths = [int(x) for x in args.lengths.split(",") if x] or [1024]
    answer(args.task, names, lengths, args.out, samples=args.samples, max_tokens=args.max_tokens, device=args.device)
    return 0


def tier_command(args: argparse.Namespace) -> int:
    from linnet.evals.tier2 import TIER2
    from linnet.evals.tiers import get_experiments, run_experiments

    names = [*args.experiments, *(name.strip() for name in args.only.split(",") if name.strip())]
    chosen = get_experiments(names or ([x.name for x in TIER2] if args.command == "tier2" else None))
    if args.plan:
        return plan(chosen, args)
    verdicts = run_experiments(args.out, chosen, seeds=range(args.seeds), steps=args.steps, **work_options(args))
    finish(args.out, verdicts=verdicts)
    return 1 if any(v.result == "fail" for found in verdicts.values() for v in found) else 0


def plan(chosen: Sequence[Any], args: argparse.Namespace) -> int:
    from linnet.evals.report import show

    jobs = [(x, x.jobs(args.out, range(args.seeds), args.steps)) for x in chosen]
    lines = [[x.name, x.title, str(len(found)), f"{sum(job.run.steps for job in found):,}"] for x, found in jobs]
    show("plan", ("experiment", "question", "runs", "steps at most"), lines)
    return 0


def hybrid_command(args: argparse.Namespace) -> int:
    from linnet.evals.hybrid import SIZES, hybrid, with_digest
    from linnet.evals.tiers import run_experiments

    if args.size not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}; got {args.size!r}")
    settings = dict(SIZES[args.size])
    given = {
        "mixers": [name.strip() for name in args.mixers.split(",") if name.strip()],
        "layers": args.num_layers,
        "attention": [int(x) for x in args.attention.split(",") if x],
        "steps": args.steps,
    }
    settings |= {name: value for name, value in given.items() if value}
    rates = [float(x) for x in args.learning_rates.split(",")]
    experiment = with_digest(hybrid(f"hybrid-{args.size}", path=args.data, learning_rates=rates, **settings))
    verdicts = run_experiments(args.out, [experiment], seeds=range(args.seeds), **work_options(args))
    finish(args.out, verdicts=verdicts, further={experiment.name: experiment.tables})
    return 0


def report_command(args: argparse.Namespace) -> int:
    from linnet.evals.report import write_report

    print(f"report: {write_report(args.folder)}")
    return 0


COMMANDS = {
    "list": list_command,
    "tier0": tier0_command,
    "run": run_command,
    "tier1": tier_command,
    "tier2": tier_command,
    "hybrid-sweep": hybrid_command,
    "report": report_command,
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the processes of a sweep share the cores
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
