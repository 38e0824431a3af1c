"""Bits per byte of a trained model on disk, on the held-out text of its own run or on any other text."""

from __future__ import annotations

from typing import Any

from linnet.evals.perplexity import bits_per_byte, xz_bits_per_byte
from linnet.training.config import RunConfig
from linnet.training.data import load_corpus, take_bytes
from linnet.training.loading import load_model, run_config


def evaluate_checkpoint(
    checkpoint: str,
    *,
    source: str | None = None,
    split: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_bytes: int | None = None,
    device: Any = None,
) -> dict[str, Any]:
    """Bits per byte of `checkpoint`.

    Args:
        source: as `data.source` of a run; None means the run's own, `stdlib` for a model without a run.
        split: validation, train or all. None means validation on the run's own text and on stdlib, all of any other text.
        context, stride: tokens of a window and new tokens per window; None means as in the run (or 1024), and half of it.
        max_bytes: documents in hash order up to this many bytes.

    Returns:
        what `linnet.evals.perplexity.bits_per_byte` returns, and text, xz_bits_per_byte, context, stride.
    """
    if split not in (None, "validation", "train", "all"):
        raise ValueError(f"split must be 'validation', 'train' or 'all'; got {split!r}")
    stored = run_config(checkpoint)
    settings = stored or RunConfig()
    own = settings.data.source
    source = source or own
    split = split or ("validation" if source in (own, "stdlib") else "all")
    data = settings.data if source == own else RunConfig().data
    options = {key: getattr(data, key) for key in ("validation_fraction", "glob", "subset", "text_column", "max_bytes")}
    corpus = load_corpus(source, **options)
    documents = {"validation": corpus.validation, "train": corpus.train, "all": corpus.train + corpus.validation}[split]
    texts = [d.text for d in take_bytes(documents, max_bytes)]
    model, tokenizer = load_model(checkpoint, device)
    context = context or settings.evaluation.context or (settings.data.context if stored else 1024)
    stride = stride or (settings.evaluation.stride if context == settings.evaluation.context else None) or max(1, context // 2)
    results = bits_per_byte(
        model,
        tokenizer,
        texts,
        context=context,
        stride=stride,
        tokens_per_batch=max(settings.data.tokens_per_batch, context),
    )
    return {
        **results,
        "text": f"{corpus.origin} ({split})",
        "xz_bits_per_byte": xz_bits_per_byte(texts),
        "context": context,
        "stride": stride,
    }
