r"""Held-out bits per byte: what a language model would need to store a text, for any tokenizer.

    bits per byte = sum over documents, over text tokens t, of -log2 p(token_t | its past in the document) / bytes

Bytes are those of the text in UTF-8, not of the tokens. Each document is predicted from its own start: its first token
given the begin-of-document token, nothing given another document. The end-of-document token is not counted, as a
compressor of the concatenated text does not say where documents end either.

A document longer than `context` is scored with a sliding window: the first window scores all its tokens, each further
one scores `stride` new tokens given the `context - stride` before them. `context=L+1, stride=L` are the rolling windows
of lm-evaluation-harness with max_length L: L inputs and L targets each, the last window with its full left context.

`token_nats` gives the cost of every token, which `by_position` and `by_length` sort.
"""

from __future__ import annotations

import inspect
import lzma
import math
import re
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
        bits_per_byte; perplexity (per token), word_perplexity and byte_perplexity, each exp(nats / number); bits; bytes, words
        (pieces between white space, as lm-evaluation-harness counts them), tokens, documents; seconds.
    """
    stride = _stride(context, stride)
    size = sum(len(text.encode()) for text in texts)
    if size == 0:
        raise ValueError("texts must hold at least one byte; got none")
    words = sum(len(re.split(r"\s+", text)) for text in texts)
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
        "perplexity": _exp(nats / max(tokens, 1)),
        "word_perplexity": _exp(nats / words),
        "byte_perplexity": _exp(nats / size),
        "bits": bits,
        "bytes": size,
        "words": words,
        "tokens": tokens,
        "documents": len(documents),
        "seconds": time.perf_counter() - started,
    }


@torch.no_grad()
def token_nats(
    model: torch.nn.Module,
    tokenizer,
    texts: Sequence[str],
    *,
    context: int,
    stride: int | None = None,
    tokens_per_batch: int = 8192,
) -> list[np.ndarray]:
    """-ln p of every token of every text, given its past in the text: one fp64 array per text. Arguments as in `bits_per_byte`."""
    stride = _stride(context, stride)
    bos = boundary_ids(tokenizer)[0]
    documents = [ids.astype(np.int64) for ids in encode(tokenizer, texts)]
    lengths = [len(ids) for ids in documents]
    if bos is not None:
        documents = [np.concatenate([[bos], ids]) for ids in documents]
    packed = "cu_seqlens" in inspect.signature(model.forward).parameters
    was_training = model.training
    model.eval()
    try:
        scored = [
            next_token_scores(model, [window for window, _ in row], [len(window) - given for window, given in row])[0]
            for row in _rows(documents, context, stride, tokens_per_batch if packed else 0)
        ]
    finally:
        model.train(was_training)
    # windows come in the order of the text and score each of its tokens once
    nats = np.concatenate([x.double().cpu().numpy() for x in scored] or [np.zeros(0)])
    if bos is not None:
        return np.split(nats, np.cumsum(lengths)[:-1])
    first = math.log(len(tokenizer))
    pieces = np.split(nats, np.cumsum([max(n - 1, 0) for n in lengths])[:-1])
    return [np.concatenate([[first] * (n > 0), piece]) for n, piece in zip(lengths, pieces, strict=True)]


def next_token_scores(
    model: torch.nn.Module, sequences: Sequence[Sequence[int]], scored: Sequence[int], chunk: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Costs of the last `scored[i]` tokens of every sequence, given what is before them in it, without padding.

    The sequences are packed into one row; logits exist for `chunk` positions at a time. A model without `cu_seqlens` takes one
    sequence at a time.

    Returns:
        -ln p [N] in fp32 or wider, and whether each token is the most likely one [N], N = sum of `scored`, in order.
    """
    from linnet.models import LinnetForCausalLM

    device = next(model.parameters()).device
    lengths = [len(ids) for ids in sequences]
    row = torch.from_numpy(np.concatenate([np.asarray(ids, np.int64) for ids in sequences])).to(device)
    ends = np.cumsum(lengths)
    index = torch.from_numpy(np.concatenate([np.arange(end - n, end) for end, n in zip(ends, scored, strict=True)])).to(device)
    packing = {}
    if len(sequences) > 1:
        packing["cu_seqlens"] = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    if isinstance(model, LinnetForCausalLM):
        hidden = model.model(row[None], use_cache=False, **packing).last_hidden_state[0, index - 1]
        pieces = map(model.lm_head, hidden.split(chunk))
    else:
        pieces = iter(model(row[None], **packing).logits[0, index - 1].split(chunk))
    nats, greedy = [], []
    for logits, target in zip(pieces, row[index].split(chunk), strict=True):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        greedy.append(logits.argmax(-1) == target)
    return torch.cat(nats), torch.cat(greedy)


def by_position(nats: Sequence[np.ndarray], edges: Sequence[int]) -> list[dict[str, float]]:
    """Perplexity of the tokens at positions edges[i] .. edges[i+1]-1 of their texts (`nats`: from `token_nats`).

    With long texts and one window each it shows up to which length a model goes on making use of its past.
    """
    return [_bin(low, high, [x[low:high] for x in nats]) for low, high in _bins(edges)]


def by_length(nats: Sequence[np.ndarray], edges: Sequence[int]) -> list[dict[str, float]]:
    """Perplexity of the texts of edges[i] .. edges[i+1]-1 tokens (`nats`: from `token_nats`)."""
    return [_bin(low, high, [x for x in nats if low <= len(x) < high]) for low, high in _bins(edges)]


def _bins(edges: Sequence[int]) -> list[tuple[int, int]]:
    pairs = list(zip(edges[:-1], edges[1:], strict=True))
    if not pairs or edges[0] < 0 or any(low >= high for low, high in pairs):
        raise ValueError(f"edges must be at least two increasing numbers of tokens, from 0 on; got {list(edges)}")
    return pairs


def _bin(low: int, high: int, nats: list[np.ndarray]) -> dict[str, float]:
    tokens, documents = sum(map(len, nats)), sum(len(x) > 0 for x in nats)
    perplexity = _exp(sum(float(x.sum()) for x in nats) / tokens) if tokens else math.nan
    return {"from": low, "to": high, "documents": documents, "tokens": tokens, "perplexity": perplexity}


def _stride(context: int, stride: int | None) -> int:
    stride = max(1, context // 2) if stride is None else stride
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens; got {context}")
    if not 1 <= stride < context:
        raise ValueError(f"stride must be in 1..context-1 = {context - 1}; got {stride}")
    return stride


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # fp64 ends at exp(709)


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
