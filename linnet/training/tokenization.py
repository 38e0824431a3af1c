"""Tokenizers by name: `bytes`, `bpe:N` trained on the training split, or any Hugging Face tokenizer.

A document becomes [boundary] + tokens + [boundary], so that its first token is predicted too and its end can be generated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"


def build_tokenizer(name: str, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer `name`; `texts` (the training split) are read only by `bpe:N`.

    `bytes`: ByT5's, 256 bytes after 3 special tokens. `bpe:N`: byte-level BPE with N tokens, specials included.
    Anything else: a name or path for `AutoTokenizer.from_pretrained`.
    """
    if name == "bytes":
        from transformers import ByT5Tokenizer

        return ByT5Tokenizer(extra_ids=0)
    if name == "bpe" or name.startswith("bpe:"):
        size = name.partition(":")[2]
        if not re.fullmatch(r"\d+", size) or int(size) < 258:
            raise ValueError(f"data.tokenizer 'bpe:N' needs an integer N >= 258 (256 bytes and 2 special tokens); got {name!r}")
        return train_bpe(texts, int(size))
    return load_tokenizer(name)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer by name or path; ValueError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name))
    except Exception as error:  # the library raises OSError, ValueError, KeyError, JSON and Rust errors alike
        raise ValueError(
            f"tokenizer must be 'bytes', 'bpe:N', or a Hugging Face tokenizer's name or path; got {str(name)!r} ({error})"
        ) from error


def train_bpe(texts: Iterable[str], size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE with `size` tokens (fewer if the texts are too short), every byte among them: lossless on any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def boundary_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None, int | None]:
    """Ids of (begin of document, end of document, padding); a missing one is replaced by the nearest in meaning."""
    eos = _first(tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
    bos = _first(tokenizer.bos_token_id, tokenizer.cls_token_id, eos)
    return bos, eos, _first(tokenizer.pad_token_id, eos)


def _first(*ids: int | None) -> int | None:
    return next((i for i in ids if i is not None), None)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text alone, without special tokens; text that spells a special token stays text."""
    from transformers import ByT5Tokenizer

    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    if isinstance(tokenizer, ByT5Tokenizer):  # id = byte + 3; the library's own loop over characters is 100 times slower
        return [np.frombuffer(text.encode(), np.uint8).astype(dtype) + dtype(3) for text in texts]
    rows = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"] if texts else []
    return [np.asarray(row, dtype) for row in rows]


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each document between its boundary tokens."""
    bos, eos, _ = boundary_ids(tokenizer)
    rows = encode(tokenizer, texts)
    head, tail = ([] if i is None else [i] for i in (bos, eos))
    return [np.concatenate([np.asarray(head, row.dtype), row, np.asarray(tail, row.dtype)]) for row in rows]
