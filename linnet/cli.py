"""The command line: `linnet train | generate | eval | lm-eval | compare | bench | info`.

Commands import what they need when they run, so that `linnet --help` is fast. A refusal is one line and exit code 2;
`--debug`, anywhere on the line, shows the traceback instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

_EVALS = ("list", "tier0", "run", "tier1", "tier2", "hybrid-sweep", "report")  # what `linnet eval` knows besides a checkpoint


class _Group(TyperGroup):
    """Turns refusals into one line on standard error."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.ensure_object(dict)["debug"] = "--debug" in args
        args = [arg for arg in args if arg != "--debug"]
        if args[:1] == ["eval"] and args[1:2] and args[1] in _EVALS:
            args[0] = "eval-tasks"
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted; a training run continues with --resume", err=True)
            raise typer.Exit(130) from None
        except (ValueError, OSError, ImportError) as error:
            if ctx.obj["debug"]:
                raise
            typer.echo("error: " + " ".join(str(error).split()), err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Linear-time sequence models: train, generate, evaluate, compare. --debug shows tracebacks.",
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, e.g. training.learning_rate=1e-3", show_default=False)
]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of the run")]
Recipe = Annotated[str | None, typer.Option("--recipe", help="a configuration that comes with linnet [default: quickstart]")]
Minutes = Annotated[float | None, typer.Option("--minutes", help="budget: minutes of training steps")]
Steps = Annotated[int | None, typer.Option("--steps", help="budget: optimizer steps")]
Tokens = Annotated[int | None, typer.Option("--tokens", help="budget: training tokens")]
Source = Annotated[str | None, typer.Option("--data", help="stdlib, a text file or folder, or datasets:NAME[:split]")]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", help="bytes, bpe:N, or a Hugging Face tokenizer")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads [default: all cores]")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ... [default: the GPU if there is one]")]
Checkpoint = Annotated[str, typer.Argument(help="folder of a run or checkpoint, or hf:NAME", show_default=False)]


def _set_threads(threads: int | None) -> None:
    import os

    import torch

    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1; got {threads}")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or available)


def _load(config: Path | None, recipe: str | None, overrides: list[str] | None, shortcuts: dict[str, Any]):
    """The configuration: file or recipe (quickstart if neither), overrides, then the options that were given."""
    from linnet.training.config import load_config, set_value

    budget = {key: value for key, value in shortcuts.items() if key.startswith("budget.") and value is not None}
    if len(budget) > 1:
        raise ValueError(f"give one of --minutes, --steps, --tokens; got {len(budget)} of them")
    if config is None and recipe is None:
        recipe = "quickstart"
    result = load_config(config, recipe=recipe, overrides=overrides or ())
    for name, value in shortcuts.items():
        if value is not None:
            set_value(result, *name.split(".", 1), value)
    return result


@app.command()
def train(
    overrides: Overrides = None,
    config: Config = None,
    recipe: Recipe = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder of the run [default: runs/<name of the configuration>]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out from its newest complete checkpoint")] = False,
    layers: Annotated[str | None, typer.Option("--layers", help='architecture, e.g. "3*kda + attention"')] = None,
    minutes: Minutes = None,
    steps: Steps = None,
    tokens: Tokens = None,
    data: Source = None,
    tokenizer: Tokenizer = None,
    seed: Annotated[int | None, typer.Option("--seed", help="of initialisation and data order")] = None,
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Train a model on text; print held-out bits per byte beside xz -9 and a byte unigram model."""
    out = out or Path("runs") / (config.stem if config else recipe or "quickstart")
    shortcuts = {
        "model.layers": layers,
        "budget.minutes": minutes,
        "budget.steps": steps,
        "budget.tokens": tokens,
        "data.source": data,
        "data.tokenizer": tokenizer,
        "training.seed": seed,
        "data.seed": seed,
    }
    if resume and config is None and recipe is None and (out / "run.yaml").exists():
        config = out / "run.yaml"
    settings = _load(config, recipe, overrides, shortcuts)
    _set_threads(threads)
    from linnet.training.trainer import train as run

    results = run(settings, out, resume=resume, quiet=quiet)
    if results and not quiet:  # the first process of several has the results
        typer.echo(f"saved in {out}; try: linnet generate {out} --prompt 'def '")


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="text to continue")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="tokens to generate at most")] = 200,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the most likely token")] = 0.8,
    top_p: Annotated[float, typer.Option("--top-p", help="sample from the most likely tokens of this total probability")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="sample from the k most likely tokens; 0: from all")] = 0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Continue a prompt, printing as it goes."""
    _set_threads(threads)
    from linnet.training.generation import stream

    for piece in stream(
        checkpoint, prompt, max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, device=device
    ):
        print(piece, end="", flush=True)
    print()


@app.command(name="eval")
def evaluate(
    checkpoint: Checkpoint,
    data: Source = None,
    split: Annotated[
        str | None, typer.Option("--split", help="validation, train or all [default: validation; all for other text]")
    ] = None,
    context: Annotated[int | None, typer.Option("--context", help="tokens of the longest window [default: as trained]")] = None,
    stride: Annotated[int | None, typer.Option("--stride", help="new tokens per window [default: half of the context]")] = None,
    max_bytes: Annotated[int | None, typer.Option("--max-bytes", help="use no more text than this")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Held-out bits per byte and perplexity of a model; by default on the held-out text of its own run.

    Tasks in place of a checkpoint: eval list | run TASK | tier0 | tier1 | tier2 | hybrid-sweep | report FOLDER; a saved model on
    text tasks: eval run CHECKPOINT --tasks niah_single_1,passkey (each has its own --help).
    """
    _set_threads(threads)
    import json

    from linnet.training.evaluation import evaluate_checkpoint

    results = evaluate_checkpoint(
        checkpoint, source=data, split=split, context=context, stride=stride, max_bytes=max_bytes, device=device
    )
    if as_json:
        typer.echo(json.dumps(results))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{checkpoint} on {results['text']}", show_header=False)
    table.add_row("bits per byte", f"[bold]{results['bits_per_byte']:.4f}[/]")
    table.add_row("  xz -9 on the same bytes", f"{results['xz_bits_per_byte']:.4f}")
    table.add_row("perplexity per token", f"{results['perplexity']:.3f}")
    table.add_row("text", f"{results['bytes']:,} bytes, {results['tokens']:,} tokens, {results['documents']:,} documents")
    table.add_row("windows", f"{results['context']:,} tokens, {results['stride']:,} new ones each")
    table.add_row("speed", f"{results['tokens'] / results['seconds']:,.0f} tokens/s")
    Console().print(table)


@app.command(
    name="eval-tasks",
    hidden=True,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def evaluate_tasks(ctx: typer.Context) -> None:
    """`linnet eval list | run | tier0 | tier1 | tier2 | hybrid-sweep | report`."""
    from linnet.evals.__main__ import main as run

    if code := run(list(ctx.args)):
        raise typer.Exit(code)


@app.command(name="lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lm_eval(
    ctx: typer.Context,
    checkpoint: Checkpoint,
    tasks: Annotated[str, typer.Option("--tasks", help="tasks of lm-evaluation-harness with commas between")],
) -> None:
    """A model in lm-evaluation-harness; further arguments go to its command (--batch_size 16, --limit 100, --device, ...)."""
    import importlib.util
    import sys

    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval needs lm-evaluation-harness: pip install 'linnet[eval]'")
    from lm_eval.__main__ import cli_evaluate

    import linnet.integrations.lm_eval  # noqa: F401  registers the model

    name = checkpoint.removeprefix("hf:")
    sys.argv = ["lm_eval", "--model", "linnet", "--model_args", f"pretrained={name}", "--tasks", tasks, *ctx.args]
    cli_evaluate()


@app.command()
def compare(
    overrides: Overrides = None,
    config: Config = None,
    recipe: Recipe = None,
    layers: Annotated[list[str] | None, typer.Option("--layers", help="a layer pattern; repeat for more architectures")] = None,
    mixers: Annotated[
        str | None, typer.Option("--mixers", help="mixer names with commas between; all, all-diagonal, all-delta")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="folder of the comparison")] = Path("runs/compare"),
    resume: Annotated[bool, typer.Option("--resume", help="skip finished architectures, continue unfinished ones")] = False,
    minutes: Minutes = None,
    steps: Steps = None,
    tokens: Tokens = None,
    data: Source = None,
    tokenizer: Tokenizer = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="runs per architecture")] = 1,
    parameters: Annotated[
        int | None, typer.Option("--parameters", help="parameters of every model [default: as the first has]")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="architectures trained at a time, in processes of their own")] = 1,
    threads: Threads = None,
) -> None:
    """Train several architectures under one budget (each) at one parameter count; print and plot one table."""
    shortcuts = {
        "budget.minutes": minutes,
        "budget.steps": steps,
        "budget.tokens": tokens,
        "data.source": data,
        "data.tokenizer": tokenizer,
    }
    settings = _load(config, recipe, overrides, shortcuts)
    _set_threads(threads)
    from linnet.models import parse_layers
    from linnet.training.comparison import arms_of
    from linnet.training.comparison import compare as run

    depth = settings.model.get("num_layers") or len(parse_layers(settings.model["layers"])) if "layers" in settings.model else 4
    names = [name.strip() for name in (mixers or "").split(",") if name.strip()]
    arms = arms_of(layers or (), names, depth)
    rows = run(settings, out, arms, seeds=range(seeds), parameters=parameters, resume=resume, jobs=jobs)
    typer.echo(f"results in {out}/results.jsonl, plot in {out}/comparison.png")
    failed = sorted({row["arm"] for row in rows if "error" in row})
    if failed:
        raise ValueError(f"{len(failed)} of {len(arms)} architectures failed: {', '.join(failed)}; see {out}/results.jsonl")


def _benchmarks() -> list[str]:
    import pkgutil

    import linnet.bench

    return sorted(m.name for m in pkgutil.iter_modules(linnet.bench.__path__) if not m.name.startswith("_"))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(ctx: typer.Context, target: Annotated[str, typer.Argument(help=f"what to measure: {', '.join(_benchmarks())}")]) -> None:
    """Measure speed and memory against peers; further arguments go to the benchmark."""
    import importlib
    import importlib.util

    name = f"linnet.bench.{target}"
    if not target.isidentifier() or target.startswith("_") or importlib.util.find_spec(name) is None:
        raise ValueError(f"benchmark must be one of {', '.join(_benchmarks()) or '(this installation has none)'}; got {target!r}")
    importlib.import_module(name).main(list(ctx.args))


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    mixers: Annotated[bool, typer.Option("--mixers", help="print the table of all mixers, in Markdown")] = False,
    write: Annotated[Path | None, typer.Option(help="with --mixers: put the table into this page, between its marks")] = None,
    threads: Threads = None,
) -> None:
    """Versions, devices, mixers, and which backend computes each operator here, and why."""
    _set_threads(threads)
    import json

    if mixers or write is not None:
        from linnet import _catalogue

        if write is None:
            typer.echo(_catalogue.table())
        else:
            _catalogue.write(write)
        return
    from linnet._info import info as collect

    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(", ".join(f"{name} {version or 'missing'}" for name, version in facts["versions"].items()), highlight=False)
    for device in facts["devices"]:
        console.print(
            ", ".join(f"{key} {value}" if key != "device" else str(value) for key, value in device.items()),
            highlight=False,
        )
    operators = Table(title="operators")
    for column in ("operator", "runs", "the others"):
        operators.add_column(column)
    for op, entry in facts["operators"].items():
        runs = ", ".join(f"{device}: [bold]{backend}[/]" for device, backend in entry["runs"].items())
        others = [
            f"{backend}: {reason or 'available by name'}" + (f" ({device})" if len(entry["runs"]) > 1 else "")
            for backend, reasons in entry["backends"].items()
            for device, reason in reasons.items()
            if entry["runs"][device] != backend
        ]
        operators.add_row(op, runs, "\n".join(others))
    console.print(operators)
    known = Table(title="mixers")
    for column in ("mixer", "what it is"):
        known.add_column(column)
    for name, line in facts["mixers"].items():
        known.add_row(name, line)
    console.print(known)


def main() -> None:
    """Entry point of the `linnet` command."""
    app()


if __name__ == "__main__":
    main()
