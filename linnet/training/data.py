"""Text sources, the train/validation split, and packed batches.

A source is a list of documents. Its split is by document: a document goes to the validation set when the SHA-256 of its
name falls below `validation_fraction`, so that it stays on its side when other documents come or go. Exact duplicates are
kept once. Batches are one row of `tokens_per_batch` tokens made of pieces of documents, with `cu_seqlens` between the
pieces; batch i depends only on (seed, i), which makes the position in the stream a number.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

# What of the standard library is left out: third-party code, tests (some distributions ship none), generated tables, and
# files that depend on how Python was built.
_STDLIB_SKIPPED = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}
_STDLIB_BUILD_FILES = ("_sysconfigdata", "_sysconfig_vars")


@dataclass(frozen=True)
class Document:
    """One text and the name that errors and the split use (a path relative to the source)."""

    name: str
    text: str

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """Documents on both sides of the split, and what identifies them: stored with a run and checked on resume."""

    source: str
    origin: str
    sha256: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]

    def describe(self) -> dict:
        """Counts, origin and hash, as stored in `data.json`."""
        return {
            "source": self.source,
            "origin": self.origin,
            "sha256": self.sha256,
            "train_documents": len(self.train),
            "train_bytes": sum(d.size for d in self.train),
            "validation_documents": len(self.validation),
            "validation_bytes": sum(d.size for d in self.validation),
        }


def load_corpus(
    source: str,
    *,
    validation_fraction: float = 0.05,
    glob: str = "**/*",
    subset: str | None = None,
    text_column: str = "text",
    max_bytes: int | None = None,
) -> Corpus:
    """Read a source and split it by document.

    Args:
        source: `stdlib` (source text of the running Python's standard library), the path of a text file or folder, or
            `datasets:NAME[:split]` (a data set of the `datasets` library, split `train` if not named).
        validation_fraction: share of the documents held out, in (0, 1).
        glob: which files of a folder are documents (hidden ones never are).
        subset, text_column: configuration and text column of a `datasets` source.
        max_bytes: read whole documents, in order, until there are this many bytes or more.

    Raises ValueError naming the file that is not UTF-8 text, or the source that has too few documents to split.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"data.validation_fraction must be between 0 and 1; got {validation_fraction!r}")
    if source == "stdlib":
        origin, documents = f"Python {platform.python_version()} standard library", _stdlib()
    elif source.startswith("datasets:"):
        origin, documents = _datasets(source, subset, text_column)
    else:
        path = Path(source).expanduser()
        if path.is_file():
            origin, documents = f"file {path.name}", _halves(path, validation_fraction)
        elif path.is_dir():
            origin, documents = f"folder {path.name}, {glob}", _folder(path, glob)
        else:
            raise ValueError(
                f"data.source must be 'stdlib', 'datasets:NAME[:split]', or an existing file or folder; got {source!r}"
            )
    kept: list[Document] = []
    seen: set[bytes] = set()
    total, digest = 0, hashlib.sha256()
    for document in documents:
        raw = document.text.encode()
        content = hashlib.sha256(raw).digest()
        if not raw or content in seen:
            continue
        seen.add(content)
        kept.append(document)
        total += len(raw)
        digest.update(document.name.encode() + b"\0" + content)
        if max_bytes is not None and total >= max_bytes:
            break
    if len(kept) < 2:
        raise ValueError(f"data.source {source!r} must hold at least two different non-empty documents to split; got {len(kept)}")
    train, validation = _split(kept, validation_fraction)
    return Corpus(source, origin, digest.hexdigest(), tuple(train), tuple(validation))


def _split(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Validation: the documents whose hash lies below `fraction`; at least one document on each side."""
    place = {d.name: int.from_bytes(hashlib.sha256(d.name.encode()).digest()[:8], "big") / 2**64 for d in documents}
    order = sorted(documents, key=lambda d: (place[d.name], d.name))
    held_out = min(max(sum(place[d.name] < fraction for d in documents), 1), len(documents) - 1)
    names = {d.name for d in order[:held_out]}
    return [d for d in documents if d.name not in names], [d for d in documents if d.name in names]


def _read(path: Path, name: str) -> Document:
    """A UTF-8 text file, byte for byte (line ends are kept); anything else is refused by name."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"data file {str(path)!r} must be readable; got {error.strerror or error}") from error
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data file {str(path)!r} must be UTF-8 text; got byte 0x{raw[error.start]:02x} at offset {error.start}"
        ) from error
    if "\0" in text:
        raise ValueError(f"data file {str(path)!r} must be text; got a NUL byte at offset {raw.index(0)} (a binary file?)")
    return Document(name, text)


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    found = 0
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if _STDLIB_SKIPPED.isdisjoint(relative.parts) and not path.name.startswith(_STDLIB_BUILD_FILES):
            found += 1
            yield _read(path, relative.as_posix())
    if found < 50:
        raise ValueError(
            f"data.source 'stdlib' needs the standard library as files; {root} holds {found}. Name a text folder instead"
        )


def _folder(root: Path, glob: str) -> Iterator[Document]:
    for path in sorted(root.glob(glob), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield _read(path, relative.as_posix())


def _halves(path: Path, fraction: float) -> Iterator[Document]:
    """A single file: its lines in 1 / min(fraction, 1/2) documents or more, so that a share of them can be held out."""
    lines = _read(path, path.name).text.splitlines(keepends=True)
    pieces = min(len(lines), max(2, round(4 / fraction)))
    bounds = [len(lines) * i // pieces for i in range(pieces + 1)] if pieces else []
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        yield Document(f"{path.name}#{i}", "".join(lines[start:end]))


def _datasets(source: str, subset: str | None, text_column: str) -> tuple[str, Iterator[Document]]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"data.source {source!r} needs the 'datasets' library: pip install datasets") from error
    name, _, split = source.removeprefix("datasets:").partition(":")
    split = split or "train"
    table = datasets.load_dataset(name, subset, split=split)
    if text_column not in table.column_names:
        raise ValueError(f"data.text_column must be one of {', '.join(table.column_names)}; got {text_column!r}")
    return f"data set {name}, split {split}", (Document(f"{split}/{i}", row) for i, row in enumerate(table[text_column]))


def take_bytes(documents: tuple[Document, ...], max_bytes: int | None) -> tuple[Document, ...]:
    """Documents in hash order up to `max_bytes` of text; the last one is cut at a character."""
    if max_bytes is None or sum(d.size for d in documents) <= max_bytes:
        return documents
    taken, room = [], max_bytes
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest()):
        text = document.text if document.size <= room else document.text.encode()[:room].decode(errors="ignore")
        if text:
            taken.append(Document(document.name, text))
            room -= len(text.encode())
        if room <= 0 or text != document.text:
            break
    return tuple(taken)


class PackedBatches(Dataset):
    """Map-style data set of packed batches: item i depends only on (documents, context, tokens_per_batch, seed, i).

    Documents are cut into pieces of at most `context` tokens. Every epoch lays the pieces end to end in a new order and cuts
    the stream into batches, so that each token is used once per epoch (but for the last, incomplete batch). The first token
    of a piece is never a target (label -100).

    Item: input_ids [1, tokens_per_batch] int64, labels (the same, -100 where nothing is predicted; the model shifts them),
    cu_seqlens [N+1] int32.
    """

    def __init__(
        self,
        documents: list[np.ndarray],
        *,
        context: int,
        tokens_per_batch: int,
        seed: int = 0,
        length: int | None = None,
    ):
        for name, value in (("data.context", context), ("data.tokens_per_batch", tokens_per_batch)):
            if not isinstance(value, int) or value < 2:
                raise ValueError(f"{name} must be an integer >= 2; got {value!r}")
        self.tokens = np.concatenate(documents)
        self.tokens_per_batch, self.seed = tokens_per_batch, seed
        self.batches_per_epoch = len(self.tokens) // tokens_per_batch
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"data.tokens_per_batch must be at most {len(self.tokens)}, the tokens of the training set; got {tokens_per_batch}"
            )
        starts, sizes, offset = [], [], 0
        for document in documents:
            begins = np.arange(0, len(document), context)
            starts.append(offset + begins)
            sizes.append(np.minimum(context, len(document) - begins))
            offset += len(document)
        self.starts, self.sizes = np.concatenate(starts), np.concatenate(sizes)
        self.length = self.batches_per_epoch if length is None else length
        self._epoch, self._order, self._ends = -1, self.starts, self.starts

    def __len__(self) -> int:
        return self.length

    def pieces(self, i: int) -> list[tuple[int, int]]:
        """The (start, size) ranges of `self.tokens` that batch i is made of."""
        epoch, batch = divmod(i, self.batches_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.starts))
            self._ends = np.cumsum(self.sizes[self._order])
            self._epoch = epoch
        begin = batch * self.tokens_per_batch
        end = begin + self.tokens_per_batch
        ranges, position = [], begin
        piece = int(np.searchsorted(self._ends, begin, side="right"))
        while position < end:
            index, piece_end = self._order[piece], int(self._ends[piece])
            stop = min(piece_end, end)
            start = int(self.starts[index]) + position - (piece_end - int(self.sizes[index]))
            ranges.append((start, stop - position))
            position, piece = stop, piece + 1
        return ranges

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if not 0 <= i < self.length:
            raise IndexError(i)
        ranges = self.pieces(i)
        ids = torch.from_numpy(np.concatenate([self.tokens[s : s + n] for s, n in ranges]).astype(np.int64))
        cu_seqlens = torch.from_numpy(np.cumsum([0] + [n for _, n in ranges]).astype(np.int32))
        labels = ids.clone()
        labels[cu_seqlens[:-1].long()] = -100
        return {"input_ids": ids[None], "labels": labels[None], "cu_seqlens": cu_seqlens}
