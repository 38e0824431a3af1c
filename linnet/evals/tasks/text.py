"""Language modelling and recall in one batch: what a hybrid of linear and softmax attention is asked for at small scale."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from linnet.evals.tasks._base import IGNORE, Batch, Task, empty_targets, register_task, stream
from linnet.evals.tasks.recall import MQAR
from linnet.evals.tasks.ruler import prose

BYTES = 256


@lru_cache(maxsize=2)
def corpus(path: str, max_bytes: int | None) -> tuple[dict[str, np.ndarray], str]:
    """(split -> bytes, hash) of a text source of `linnet.training.data`, of generated sentences for "". Documents are held out
    for validation and test as a training run holds them out; a zero byte stands between documents."""
    if not path:
        texts = {split: [" ".join(prose(stream("text", split), 20_000))] for split in ("train", "validation", "test")}
        return {split: _bytes(rows) for split, rows in texts.items()}, ""
    from linnet.training.data import load_corpus, take_bytes

    found = load_corpus(path)
    train = _bytes([d.text for d in take_bytes(found.train, max_bytes)])
    held_out = _bytes([d.text for d in take_bytes(found.validation, max_bytes)])
    half = len(held_out) // 2
    return {"train": train, "validation": held_out[:half], "test": held_out[half:]}, found.sha256[:12]


def _bytes(texts: list[str]) -> np.ndarray:
    return np.frombuffer("\0".join(texts).encode(), np.uint8)


@register_task("text_recall")
@dataclass(frozen=True, kw_only=True)
class TextRecall(Task):
    """Half of the rows are `length` bytes of text, every next byte asked; the others are MQAR rows in ids of their own. Both halves
    count alike in the loss, though the text asks more often.

    One model is trained on both, because a model of this size does not learn to look back from text alone: its recall after
    language modelling is chance at any ratio, and a second model trained on recall would not be the one whose loss is reported.
    path: "stdlib", a file or a folder (a generated text if empty). max_bytes: of each side of its split. digest: the first 12
    digits of the hash of the source, refused if the text is another one. pairs, symbols: of `mqar`.
    Measures: bits_per_byte of the text rows, accuracy of the recall rows, which is also the score.
    """

    length: int = 256
    path: str = ""
    max_bytes: int | None = None
    digest: str = ""
    pairs: int | tuple[int, ...] = (8, 16, 32)
    symbols: int = 128
    needs_logits = True

    def check(self) -> None:
        self.recall  # noqa: B018 (its options are checked)

    @property
    def recall(self) -> MQAR:
        return MQAR(name=self.name, length=self.length, pairs=self.pairs, vocabulary=self.symbols)

    @property
    def input_size(self) -> int:
        return BYTES + self.symbols

    @property
    def chance(self) -> float:
        return self.recall.chance

    def generate(self, rng, size, split):
        texts, digest = corpus(self.path, self.max_bytes)
        if self.digest not in ("", digest):
            self.refuse("digest", f"{digest!r}, the hash of the text at {self.path!r}")
        text, rows = texts[split], size - size // 2
        if len(text) <= self.length:
            self.refuse("length", f"less than the {len(text)} bytes of the {split} text")
        window = rng.integers(0, len(text) - self.length, (rows, 1)) + np.arange(self.length + 1)
        inputs, targets = empty_targets((size, self.length)), empty_targets((size, self.length))
        inputs[:rows], targets[:rows] = text[window[:, :-1]], text[window[:, 1:]]
        if rows < size:
            asked, wanted, _ = self.recall.generate(rng, size - rows, split)
            inputs[rows:], targets[rows:] = BYTES + asked, np.where(wanted == IGNORE, IGNORE, BYTES + wanted)
        return Batch(inputs, targets, {"part": (np.arange(size) >= rows).astype(np.int64)})

    def metrics(self, output, batch):
        text, asked = batch.info["part"][:, None] == 0, batch.targets != IGNORE
        logits = output[asked & text].astype(np.float64)
        top = logits.max(1, keepdims=True, initial=-np.inf)
        nats = (
            np.log(np.exp(logits - top).sum(1)) + (top - np.take_along_axis(logits, batch.targets[asked & text][:, None], 1))[:, 0]
        )
        right = (output.argmax(-1) == batch.targets) & asked & ~text
        return {
            "accuracy": (int(right.sum()), int((asked & ~text).sum())),
            "bits_per_byte": (float(nats.sum() / np.log(2)), int((asked & text).sum())),
        }
