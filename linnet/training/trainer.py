"""A training run: `transformers.Trainer` around a packed text stream, from a configuration to a folder that explains itself.

The folder: run.yaml (the whole configuration), data.json (where the text came from, its hash), the tokenizer,
checkpoint-N/ (complete ones have a manifest), tensorboard/, and at the end model.safetensors, config.json, log.jsonl, loss.png
and results.json, which is written last: a folder with it is a finished run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, get_scheduler, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from linnet.evals.perplexity import bits_per_byte, unigram_bits_per_byte, xz_bits_per_byte
from linnet.models import LinnetConfig, LinnetForCausalLM, no_weight_decay_parameters
from linnet.training import callbacks, report
from linnet.training.checkpoints import newest_complete, set_aside, write_text
from linnet.training.config import RunConfig, from_dict
from linnet.training.data import Corpus, PackedBatches, load_corpus, take_bytes
from linnet.training.tokenization import boundary_ids, build_tokenizer, encode_documents, load_tokenizer

_UNBOUNDED_STEPS = 10_000_000  # of a run that is bounded by minutes
_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_strategy": "no",  # Milestones says when
    "eval_strategy": "no",
    "report_to": "none",  # TensorBoard is added with the run's own folder
    "seed": 0,
    "logging_nan_inf_filter": False,
    "ddp_find_unused_parameters": False,
}


@dataclass
class Text:
    """A corpus with its tokenizer and the tokens of its training split: what runs that are compared have in common."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    train_tokens: list

    @property
    def tokens_per_byte(self) -> float:
        return sum(map(len, self.train_tokens)) / sum(d.size for d in self.corpus.train)


def load_text(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Text:
    """Read, split and tokenize the text that `config.data` names."""
    data = config.data
    corpus = load_corpus(
        data.source,
        validation_fraction=data.validation_fraction,
        glob=data.glob,
        subset=data.subset,
        text_column=data.text_column,
        max_bytes=data.max_bytes,
    )
    texts = [d.text for d in corpus.train]
    tokenizer = tokenizer or build_tokenizer(data.tokenizer, texts)
    return Text(corpus, tokenizer, encode_documents(tokenizer, texts))


def model_config(config: RunConfig, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> LinnetConfig:
    """The LinnetConfig of a run: `config.model` with the tokenizer's vocabulary and boundary tokens."""
    bos, eos, pad = boundary_ids(tokenizer)
    options = {**config.model, **changes}
    return LinnetConfig(vocab_size=len(tokenizer), bos_token_id=bos, eos_token_id=eos, pad_token_id=pad, **options)


class LinnetTrainer(Trainer):
    """Trainer with the batches in their own order, Linnet's weight-decay groups, a schedule over time, and bits per byte.

    clock: how much of the budget is used. evaluator: () -> metrics, run whenever the Trainer evaluates.
    """

    def __init__(self, *args: Any, clock: callbacks.Clock, evaluator: Any, **kwargs: Any):
        self.clock, self.evaluator = clock, evaluator
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        excluded = no_weight_decay_parameters(model)
        return [name for name, _ in model.named_parameters() if name not in excluded]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Any schedule of transformers. `num_..._steps` below 1 are shares of the budget; with a budget in minutes the
        schedule is read at the elapsed share of the time."""
        optimizer = optimizer or self.optimizer
        timed = self.clock.budget_s is not None
        horizon = 10_000 if timed else num_training_steps
        specific = {
            key: max(1, round(value * horizon)) if key.endswith("_steps") and isinstance(value, float) and value < 1 else value
            for key, value in (self.args.lr_scheduler_kwargs or {}).items()
        }
        self.lr_scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=self.args.get_warmup_steps(horizon),
            num_training_steps=horizon,
            scheduler_specific_kwargs=specific,
        )
        if timed:
            factors = getattr(self.lr_scheduler, "lr_lambdas", None)
            if factors is None:
                came = self.args.lr_scheduler_type
                raise ValueError(f"training.lr_scheduler_type must be a function of the step with budget.minutes; got {came!r}")
            for group in optimizer.param_groups:  # the schedule above has already set the first rate
                group["lr"] = group["initial_lr"]
            # Asked for the rate of the step to come: at step 0 that is the rate of a small but positive elapsed share.
            at = lambda factor: lambda step: factor(max(1, round(horizon * self.clock.fraction(step, num_training_steps))))
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [at(factor) for factor in factors])
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in self.evaluator().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    text: Text | None = None,
    console: Any = None,
    quiet: bool = False,
    report_run: bool = True,
) -> dict[str, Any]:
    """Train a model and return its results, as in results.json.

    Args:
        config: what to train, on what, how long. out: the folder of the run, made here.
        resume: continue an interrupted run in `out` from its newest complete checkpoint, with the configuration stored there
            being equal to `config`. A finished run returns its results.
        text: tokenized text to share between runs; read from `config.data` if None.
        console: a rich console for the progress bar and the summary. quiet: print nothing. report_run: also print what the run
            starts from and the summary, not only the progress.

    Raises:
        ValueError: `out` holds a run and `resume` is false; the stored configuration or text differ; a bad key or value.
    """
    from rich.console import Console

    console = console or Console(quiet=quiet)
    transformers_logging.disable_progress_bar()  # one bar is enough
    config.validate()
    out = Path(out)
    args = _training_arguments(config, out)  # joins the process group, if there are several processes
    if args.process_index != 0:
        console = Console(quiet=True)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder; got the file {str(out)!r}")
    started = (out / "run.yaml").exists()
    if out.exists() and any(out.iterdir()) and not (resume and started):
        reason = "holds a run; give another folder, or resume it" if started else "is not empty and holds no run"
        raise ValueError(f"out folder {str(out)!r} {reason}")
    if started:
        _require_same(config, out)
        if (out / "results.json").exists():
            return _read_json(out / "results.json")

    bpe_saved = started and (out / "tokenizer_config.json").exists()
    text = text or load_text(config, load_tokenizer(out) if bpe_saved else None)
    corpus, described = text.corpus, text.corpus.describe()
    if started and (out / "data.json").exists() and _read_json(out / "data.json")["sha256"] != corpus.sha256:
        raise ValueError(
            f"data.source {config.data.source!r} must hold the text that the run in {str(out)!r} began with; its SHA-256 differs"
        )
    set_seed(args.seed)
    model = LinnetForCausalLM(model_config(config, text.tokenizer))
    parameters = sum(p.numel() for p in model.parameters())
    if report_run:
        sizes = f"{described['train_bytes']:,} bytes to train on, {described['validation_bytes']:,} held out"
        console.print(f"text: {described['origin']}: {sizes}\n      sha256 {corpus.sha256}")
        console.print(f"model: {model.config.layers}, {parameters:,} parameters, on {args.device}")

    batches_per_step = args.gradient_accumulation_steps * args.world_size
    tokens_per_step = config.data.tokens_per_batch * batches_per_step
    dataset = PackedBatches(
        text.train_tokens,
        context=config.data.context,
        tokens_per_batch=config.data.tokens_per_batch,
        seed=config.data.seed,
        length=args.max_steps * batches_per_step,
    )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # every process has seen the folder as it was
    with args.main_process_first(desc="run folder"):
        if not started and args.process_index == 0:
            _write_run(out, config, described, text.tokenizer)
        checkpoint = _find_checkpoint(out, console) if started else None

    clock = callbacks.Clock(config.budget.minutes)
    if checkpoint is not None:
        clock.elapsed_s = _read_json(checkpoint / callbacks.PROGRESS_FILE)["elapsed_s"]
    trainer = LinnetTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset if args.eval_strategy != "no" else None,  # only its presence matters
        data_collator=lambda batch: batch[0],
        clock=clock,
        evaluator=lambda: _evaluate(model, text, config, config.evaluation.during_bytes),
    )
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    progress = callbacks.Progress(clock, tokens_per_step, console)
    for callback in (
        clock,
        callbacks.Milestones(clock, config.evaluation.points, config.checkpoints.points),
        callbacks.CompleteCheckpoints(out, text.tokenizer, clock, config.checkpoints.keep),
        callbacks.FiniteLoss(),
        progress,
        *_tensorboard(out),
    ):
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        progress.stop()
    if not trainer.is_world_process_zero():
        return {}
    results = _results(trainer, model, text, config, clock, tokens_per_step, parameters)
    _save_final(out, trainer, model, results, 1 / math.log(2) * text.tokens_per_byte, tokens_per_step)
    if report_run:
        console.print(report.summary_table(results))
    return results


def _training_arguments(config: RunConfig, out: Path) -> TrainingArguments:
    values = {**_DEFAULTS, **config.training}
    if {"save_steps", "save_strategy"} & set(config.training):
        values["save_strategy"] = config.training.get("save_strategy", "steps")
    if {"eval_steps", "eval_strategy"} & set(config.training):
        values["eval_strategy"] = config.training.get("eval_strategy", "steps")
    gpu = torch.cuda.is_available() and not values.get("use_cpu")
    if gpu and not {"bf16", "fp16"} & set(config.training):
        values["bf16"] = torch.cuda.is_bf16_supported()
    values.setdefault("dataloader_pin_memory", gpu)
    try:
        args = TrainingArguments(
            output_dir=str(out),
            per_device_train_batch_size=1,
            max_steps=1,
            remove_unused_columns=False,
            disable_tqdm=True,
            **values,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"training: {error}") from error
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs of one process would be nn.DataParallel, which splits packed rows; use torchrun
    budget = config.budget
    if budget.minutes is not None:
        args.max_steps = _UNBOUNDED_STEPS
    else:
        tokens_per_step = config.data.tokens_per_batch * args.gradient_accumulation_steps * args.world_size
        args.max_steps = budget.steps or math.ceil(budget.tokens / tokens_per_step)
    return args


def _require_same(config: RunConfig, out: Path) -> None:
    stored, wanted = from_dict(yaml.safe_load((out / "run.yaml").read_text())).to_dict(), config.to_dict()
    for section, values in wanted.items():
        for key in sorted({*values, *stored[section]}):
            before, now = stored[section].get(key), values.get(key)
            if before != now:
                raise ValueError(f"{section}.{key} must be {before!r} as in the run in {str(out)!r} to resume it; got {now!r}")


def _write_run(out: Path, config: RunConfig, described: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    write_text(out / "data.json", json.dumps(described, indent=1))
    write_text(out / "run.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))  # last: it makes the folder a run


def _find_checkpoint(out: Path, console: Any) -> Path | None:
    checkpoint, torn = newest_complete(out)
    for path, reason in torn:
        kept = set_aside(path)
        warnings.warn(f"checkpoint {str(path)!r} is skipped: {reason}; it is kept as {kept.name!r}", stacklevel=3)
    console.print(f"resuming from {checkpoint.name}" if checkpoint else "no complete checkpoint: starting from the beginning")
    return checkpoint


def _tensorboard(out: Path) -> list:
    try:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback
    except ImportError:
        return []  # an optional dependency: log.jsonl holds the same numbers
    return [TensorBoardCallback(SummaryWriter(str(out / "tensorboard")))]


def _evaluate(model: torch.nn.Module, text: Text, config: RunConfig, max_bytes: int | None) -> dict[str, float]:
    evaluation = config.evaluation
    return bits_per_byte(
        model,
        text.tokenizer,
        [d.text for d in take_bytes(text.corpus.validation, max_bytes)],
        context=evaluation.context or config.data.context,
        stride=evaluation.stride,
        tokens_per_batch=config.data.tokens_per_batch,
    )


def _results(
    trainer: Trainer, model, text: Text, config: RunConfig, clock, tokens_per_step: int, parameters: int
) -> dict[str, Any]:
    held_out = _evaluate(model, text, config, config.evaluation.max_bytes)
    scored = [d.text for d in take_bytes(text.corpus.validation, config.evaluation.max_bytes)]
    steps = trainer.state.global_step
    device = trainer.args.device
    return {
        "layers": model.config.layers,
        "bits_per_byte": held_out["bits_per_byte"],
        "xz_bits_per_byte": xz_bits_per_byte(scored),
        "unigram_bits_per_byte": unigram_bits_per_byte((d.text for d in text.corpus.train), scored),
        "perplexity": held_out["perplexity"],
        "held_out_bytes": held_out["bytes"],
        "held_out_tokens": held_out["tokens"],
        "held_out_documents": held_out["documents"],
        "parameters": parameters,
        "state_bytes": {str(length): model.state_bytes(length) for length in report.STATE_LENGTHS},
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "train_seconds": clock.elapsed_s,
        "tokens_per_second": steps * tokens_per_step / clock.elapsed_s,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seed": trainer.args.seed,
        "data": text.corpus.describe(),
    }


def _save_final(out: Path, trainer: Trainer, model, results: dict, bits_per_nat: float, tokens_per_step: int) -> None:
    """The model moves into place whole; results.json comes last."""
    temporary = out / ".model"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for path in sorted(temporary.iterdir()):
        os.replace(path, out / path.name)
    temporary.rmdir()
    history = trainer.state.log_history
    write_text(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))
    baselines = {"xz -9": results["xz_bits_per_byte"], "byte unigram": results["unigram_bits_per_byte"]}
    report.plot_run(history, out / "loss.png", tokens_per_step, bits_per_nat, baselines)
    write_text(out / "results.json", json.dumps(results, indent=1))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"file {str(path)!r} must be readable JSON; got {error}") from error
