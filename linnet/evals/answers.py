"""A saved model answers text tasks: prompts of RULER and its kind, greedy generation, scored by string match, by context length.

    linnet eval run runs/mine --tasks niah_single_1,ruler_variable_tracking,passkey --lengths 1024,4096

The score of a sample is the share of its answers that the generated text contains, case ignored (RULER's string_match_all). A
length counts the tokens of prompt and answers, of the model's own tokenizer. Prompts of one length are generated in one batch,
padded on the left with their mask, which a Linnet model takes apart.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from linnet.evals.runner import append_result, read_results
from linnet.evals.tasks._base import get_task, list_tasks
from linnet.evals.tasks.ruler import Sample, TextTask, matched
from linnet.training.tokenization import boundary_ids, encode

Generate = Callable[[Sequence[str]], list[str]]


def text_task(name: str, length: int) -> TextTask:
    """The text task of this name; `niah_*` are the `ruler_*` tasks here, as lm-evaluation-harness calls them."""
    known = {name: get_task(name) for name in list_tasks()}
    texts = sorted(name for name, task in known.items() if isinstance(task, TextTask))
    wanted = name if name in texts else "ruler_" + name.removeprefix("niah_")
    if wanted not in texts:
        raise ValueError(f"tasks must be text tasks: {', '.join(texts)} (niah_* for ruler_*); got {name!r}")
    return known[wanted].at(length=length)


def generator(model: Any, tokenizer: Any, *, max_tokens: int, batch_size: int = 8) -> Generate:
    """prompts -> the text that the model adds to each, taking the most likely token."""
    bos, eos, pad = boundary_ids(tokenizer)
    device = next(model.parameters()).device

    @torch.no_grad()
    def generate(prompts: Sequence[str]) -> list[str]:
        texts = []
        for begin in range(0, len(prompts), batch_size):
            rows = [([] if bos is None else [bos]) + ids.tolist() for ids in encode(tokenizer, prompts[begin : begin + batch_size])]
            longest = max(map(len, rows))
            ids = torch.tensor([[pad or 0] * (longest - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, eos_token_id=eos, pad_token_id=pad
            )
            texts += [tokenizer.decode(row, skip_special_tokens=True) for row in out[:, longest:].tolist()]
        return texts

    return generate


def score(task: TextTask, generate: Generate, count: Callable[[str], int], samples: int) -> dict[str, Any]:
    """Mean string match over `samples` test prompts, the share without a mistake, and the first sample with what came."""
    chosen: list[Sample] = task.samples("test", 0, samples, tokens=count)
    came = generate([sample.prompt for sample in chosen])
    hits = [matched(text, sample.answers) for text, sample in zip(came, chosen, strict=True)]
    first = {"answers": chosen[0].answers, "generated": came[0]}
    return {"accuracy": sum(hits) / samples, "sequence_accuracy": sum(hit == 1 for hit in hits) / samples, "first": first}


def answer(
    checkpoint: str,
    tasks: Sequence[str],
    lengths: Sequence[int],
    out: str | Path,
    *,
    samples: int = 100,
    max_tokens: int = 128,
    device: Any = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """One row per task and length in `out`/answers/results.jsonl, and a table; rows that are there already are not repeated."""
    if samples < 1 or max_tokens < 1:
        raise ValueError(f"samples and max_tokens must be at least 1; got {samples} and {max_tokens}")
    asked = [text_task(name, length) for name in tasks for length in lengths]
    from linnet.training.loading import load_model, resolve

    source = checkpoint if checkpoint.startswith("hf:") else str(resolve(Path(checkpoint).expanduser()).resolve())
    model, tokenizer = load_model(checkpoint, device)
    path, rows = Path(out) / "answers" / "results.jsonl", []
    count = lambda text: len(encode(tokenizer, [text])[0])
    generate = generator(model, tokenizer, max_tokens=max_tokens)
    for task in asked:
        settings = {"checkpoint": source, "task": task.name, "length": task.length, "samples": samples, "max_tokens": max_tokens}
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        row = next((row for row in read_results(path) if row["key"] == key), None)
        if row is None:
            began = time.perf_counter()
            metrics = {str(task.length): score(task, generate, count, samples)}
            row = {"key": key, **settings, "status": "done", "metrics": metrics, "seconds": time.perf_counter() - began}
            append_result(path, row)
        rows.append(row)
    if not quiet:
        from linnet.evals.report import show

        at = {(row["task"], row["length"]): f"{row['metrics'][str(row['length'])]['accuracy']:.3f}" for row in rows}
        names = list(dict.fromkeys(row["task"] for row in rows))
        header = ("string match", *(f"{length} tokens" for length in lengths))
        show(f"{checkpoint}, {samples} prompts each", header, [[name, *(at[name, n] for n in lengths)] for name in names])
    return rows
