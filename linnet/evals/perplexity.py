r"""Held-out bits per byte: what a language model would need to store a text, for any tokenizer.

    bits per byte = sum over documents, over text tokens t, of -log2 p(token_t | its past in the document) / bytes

Bytes are those of the text in UTF-8, not of the tokens. Each document is predicted from its own start: its first token
given the begin-of-document token, nothing given another document. The end-of-document token is not counted, as a
compressor of the concatenated text does not say where documents end either.

A document longer than `context` is scored with a sliding window: the first window scores all its tokens, each further
one scores `stride` new tokens given the `context - stride` before them.
"""

from __future__ import annotations

import inspect
import lzma
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from linnet.training.tokenization import boundary_ids, encode


def windows(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored target) of every window over a sequence of `tokens` tokens whose first is given."""
    scored = 1
    while scored < tokens:
        end = min(tokens, context if scored == 1 else scored + stride)
        yield max(0, end - context), end, scored
        scored = end


@torch.no_grad()
def bits_per_byte(
    model: torch.nn.Module,
    tokenizer,
    texts: Sequence[str],
    *,
    context: int,
    stride: int | None = None,
    tokens_per_batch: int = 8192,
) -> dict[str, float]:
    """Held-out bits per byte of `model` on `texts`, each an independent document.

    Args:
        model: a causal language model. If its forward takes `cu_seqlens`, windows are packed into rows of
            `tokens_per_batch` tokens; otherwise they are run one by one.
        tokenizer: any Hugging Face tokenizer. Without a begin-of-document token, the first token of each document costs
            log2(vocabulary) bits.
        context: tokens of the longest window. stride: new tokens per window, `context // 2` if None.

    Returns:
        bits_per_byte, perplexity (per token), bits, bytes, tokens, documents, seconds.
    """
    stride = max(1, context // 2) if stride is None else stride
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens; got {context}")
    if not 1 <= stride < context:
        raise ValueError(f"stride must be in 1..context-1 = {context - 1}; got {stride}")
    size = sum(len(text.encode()) for text in texts)
    if size == 0:
        raise ValueError("texts must hold at least one byte; got none")
    started = time.perf_counter()
    bos = boundary_ids(tokenizer)[0]
    documents = [ids.astype(np.int64) for ids in encode(tokenizer, texts)]
    tokens = sum(map(len, documents))
    nats = 0.0
    if bos is None:
        nats += math.log(len(tokenizer)) * sum(len(ids) > 0 for ids in documents)
    else:
        documents = [np.concatenate([[bos], ids]) for ids in documents]
    packed = "cu_seqlens" in inspect.signature(model.forward).parameters
    was_training = model.training
    model.eval()
    try:
        for row in _rows(documents, context, stride, tokens_per_batch if packed else 0):
            nats += _nats(model, row, packed)
    finally:
        model.train(was_training)
    bits = nats / math.log(2)
    return {
        "bits_per_byte": bits / size,
        "perplexity": math.exp(min(nats / max(tokens, 1), 700.0)),
        "bits": bits,
        "bytes": size,
        "tokens": tokens,
        "documents": len(documents),
        "seconds": time.perf_counter() - started,
    }


def _rows(documents: list[np.ndarray], context: int, stride: int, room: int) -> Iterator[list[tuple[np.ndarray, int]]]:
    """Windows, each (ids, how many of its first tokens are only given), gathered into rows of at most `room` tokens."""
    row, used = [], 0
    for ids in documents:
        for start, end, scored in windows(len(ids), context, stride):
            if row and used + end - start > room:
                yield row
                row, used = [], 0
            row.append((ids[start:end], scored - start))
            used += end - start
    if row:
        yield row


def _nats(model: torch.nn.Module, row: list[tuple[np.ndarray, int]], packed: bool) -> float:
    """Sum of -ln p over the scored targets of a row."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.concatenate([window for window, _ in row]))
    labels = torch.cat([torch.from_numpy(np.where(np.arange(len(w)) < given, -100, w)) for w, given in row])
    inputs = {"input_ids": ids[None].to(device), "labels": labels[None].to(device)}
    if packed:
        inputs["cu_seqlens"] = torch.tensor(np.cumsum([0] + [len(w) for w, _ in row]), dtype=torch.int32, device=device)
    loss = model(**inputs).loss
    return float(loss) * int((labels != -100).sum())


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per byte of `xz -9` on the texts, concatenated."""
    data = "".join(texts).encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


def unigram_bits_per_byte(train: Iterable[str], held_out: Iterable[str]) -> float:
    """Bits per byte of the byte frequencies of `train`, each count plus one, on `held_out`."""
    counts, targets = _byte_counts(train) + 1, _byte_counts(held_out)
    return float(-(targets * np.log2(counts / counts.sum())).sum() / targets.sum())


def _byte_counts(texts: Iterable[str]) -> np.ndarray:
    total: Counter[int] = Counter()
    for text in texts:
        total.update(text.encode())
    return np.array([total[byte] for byte in range(256)], np.float64)
