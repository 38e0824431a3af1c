"""Text, retrieval and image classification of Tay et al., "Long Range Arena", 2020 (arXiv 2011.04006), from the user's own files.

Nothing is downloaded; `path` says where the data lie. Batches are rows drawn at random from a split; where there are no validation
data, every tenth training row is held out. Bytes stand at the positions 0 .. length - 1, padding (0; bytes are 1 .. 256) after
them, and the class is asked at the last byte.
"""

from __future__ import annotations

import csv
import pickle
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from linnet.evals.tasks._base import Batch, Task, empty_targets, register_task

HELD_OUT = 10
IMAGE = 32
POSITIVE = {"1": 1, "1.0": 1, "pos": 1, "positive": 1, "0": 0, "0.0": 0, "neg": 0, "negative": 0}


class Rows(NamedTuple):
    """Contents (bytes, or pairs of bytes, or an array of pixels) and their classes."""

    contents: list
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class FileTask(Task):
    """A subclass reads a folder or file into splits: "train", "test" and perhaps "validation"."""

    length: int = 4096
    path: str = ""
    expected: ClassVar[str] = ""
    classes: ClassVar[int] = 2

    @property
    def input_size(self) -> int:
        return 257

    @property
    def output_size(self) -> int:
        return self.classes

    def read(self, path: Path) -> dict[str, Rows]:
        raise NotImplementedError

    def missing(self, came: str) -> ValueError:
        return ValueError(f"task {self.name!r}: path must be {self.expected}; got {came}")

    def rows(self, split: str) -> Rows:
        if not self.path:
            raise self.missing("no path (nothing is downloaded)")
        if not Path(self.path).expanduser().exists():
            raise self.missing(f"{self.path!r}, which does not exist")
        return _load(type(self), self.name, self.path)[split]

    def tokens(self, content: bytes) -> np.ndarray:
        return np.frombuffer(content[: self.length], np.uint8).astype(np.int64) + 1

    def generate(self, rng, size, split):
        contents, labels = self.rows(split)
        inputs, targets = np.zeros((size, self.length), np.int64), empty_targets((size, self.length))
        for row, index in enumerate(rng.integers(0, len(labels), size)):
            tokens = self.tokens(contents[index])
            inputs[row, : len(tokens)] = tokens
            targets[row, max(0, len(tokens) - 1)] = labels[index]
        return Batch(inputs, targets)


@lru_cache(maxsize=4)
def _load(kind: type[FileTask], name: str, path: str) -> dict[str, Rows]:
    task = kind(name=name, path=path)
    splits = task.read(Path(path).expanduser())
    for split in ("train", "test"):
        if split not in splits or len(splits[split].labels) < 2:
            raise task.missing(f"{path!r} with fewer than two rows for {split!r}")
    if "validation" not in splits:
        rows, count = splits["train"], len(splits["train"].labels)
        held_out = [i for i in range(count) if i % HELD_OUT == HELD_OUT - 1] or [count - 1]
        for split, chosen in (("validation", held_out), ("train", sorted(set(range(count)) - set(held_out)))):
            splits[split] = Rows([rows.contents[i] for i in chosen], [rows.labels[i] for i in chosen])
    return splits


def table(path: Path, delimiter: str) -> list[list[str]]:
    csv.field_size_limit(sys.maxsize)
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        return [row for row in csv.reader(file, delimiter=delimiter) if row]


@register_task("lra_text")
@dataclass(frozen=True, kw_only=True)
class LRAText(FileTask):
    """IMDb reviews as bytes, positive or negative, cut to `length`."""

    expected = (
        "the IMDb folder (train/pos/*.txt, train/neg, test/pos, test/neg) or a folder with train.csv and test.csv, whose header "
        "names a column text or review, and label or sentiment (0, 1, neg, pos, negative, positive)"
    )

    def read(self, path):
        splits = {}
        for split in ("train", "test"):
            file = path / f"{split}.csv"
            if file.is_file():
                head, *lines = table(file, ",")
                text = next((head.index(x) for x in ("text", "review") if x in head), None)
                label = next((head.index(x) for x in ("label", "sentiment") if x in head), None)
                if text is None or label is None or any(line[label].lower() not in POSITIVE for line in lines):
                    raise self.missing(f"{str(file)!r} with the columns {', '.join(head)}")
                splits[split] = Rows([line[text].encode() for line in lines], [POSITIVE[line[label].lower()] for line in lines])
            else:
                files = [(file, i) for i, kind in enumerate(("neg", "pos")) for file in sorted((path / split / kind).glob("*.txt"))]
                splits[split] = Rows([file.read_bytes() for file, _ in files], [i for _, i in files])
        return splits


@register_task("lra_retrieval")
@dataclass(frozen=True, kw_only=True)
class LRARetrieval(FileTask):
    """Pairs of papers of the ACL anthology network as bytes: does one cite the other?

    A row is the first document, a separator (257) and the second, each cut to half of `length`. Published models encode both
    documents alone, 4,000 bytes each, and compare the two codes; here one model reads both.
    """

    length: int = 8192
    expected = (
        "a folder with new_aan_pairs.train.tsv, .eval.tsv and .test.tsv (or train.tsv, eval.tsv, test.tsv), whose lines are "
        "label, id, id, text, text with tabs between"
    )

    @property
    def input_size(self) -> int:
        return 258

    def read(self, path):
        splits = {}
        for split, name in (("train", "train"), ("validation", "eval"), ("test", "test")):
            file = next((x for x in (path / f"new_aan_pairs.{name}.tsv", path / f"{name}.tsv") if x.is_file()), None)
            if file is None:
                continue
            lines = table(file, "\t")
            if any(len(line) != 5 or line[0].strip("'\" ") not in POSITIVE for line in lines):
                raise self.missing(f"{str(file)!r} with other lines")
            splits[split] = Rows([(a.encode(), b.encode()) for *_, a, b in lines], [POSITIVE[x[0].strip("'\" ")] for x in lines])
        return splits

    def tokens(self, content):
        half = (self.length - 1) // 2
        first, second = (np.frombuffer(x[:half], np.uint8).astype(np.int64) + 1 for x in content)
        return np.concatenate((first, [257], second))


@register_task("lra_image")
@dataclass(frozen=True, kw_only=True)
class LRAImage(FileTask):
    """CIFAR-10 in grey, 32 x 32 pixels row by row as vectors of one channel; the class is asked at the last pixel."""

    length: int = IMAGE
    inputs = "vectors"
    classes = 10
    expected = (
        "the folder of CIFAR-10 for Python (data_batch_1 .. 5, test_batch), or a folder with train/CLASS/*.png and test/CLASS/*.png"
    )

    @property
    def input_size(self) -> int:
        return 1

    def check(self) -> None:
        if self.length != IMAGE:
            self.refuse("length", f"{IMAGE}, the pixels of a row")

    def read(self, path):
        if (path / "test_batch").is_file() and (path / "data_batch_1").is_file():
            files = {"train": sorted(path.glob("data_batch_*")), "test": [path / "test_batch"]}
            return {split: self.batches(found) for split, found in files.items()}
        names = sorted({x.name for split in ("train", "test") for x in (path / split).glob("*") if x.is_dir()})
        if len(names) > self.classes:
            raise self.missing(f"{str(path)!r} with {len(names)} classes")
        return {split: self.pictures(path / split, names) for split in ("train", "test")}

    def batches(self, files: list[Path]) -> Rows:
        found = []
        for file in files:
            with open(file, "rb") as stream:
                found.append(_Arrays(stream, encoding="bytes").load())
        data = np.concatenate([np.asarray(x[b"data"], np.uint8).reshape(-1, 3, IMAGE * IMAGE) for x in found])
        return Rows(list(grey(data.transpose(0, 2, 1))), [int(y) for x in found for y in x[b"labels"]])

    def pictures(self, folder: Path, names: list[str]) -> Rows:
        try:
            from PIL import Image
        except ImportError as error:
            raise ValueError(f"task {self.name!r}: PNG files need Pillow: pip install pillow") from error
        files = [(file, i) for i, name in enumerate(names) for file in sorted((folder / name).glob("*.png"))]
        contents = []
        for file, _ in files:
            pixels = np.asarray(Image.open(file).convert("RGB"))
            if pixels.shape != (IMAGE, IMAGE, 3):
                raise self.missing(f"{str(file)!r} of {pixels.shape[1]} x {pixels.shape[0]} pixels, not {IMAGE} x {IMAGE}")
            contents.append(grey(pixels.reshape(-1, 3)))
        return Rows(contents, [i for _, i in files])

    def generate(self, rng, size, split):
        contents, labels = self.rows(split)
        chosen = rng.integers(0, len(labels), size)
        inputs = np.stack([contents[i] for i in chosen])[..., None]
        targets = empty_targets(inputs.shape[:2])
        targets[:, -1] = np.array(labels)[chosen]
        return Batch(inputs, targets)


def grey(rgb: np.ndarray) -> np.ndarray:
    """Luminance (ITU-R 601) of [..., 3] in 0 .. 255, as values from -1 to 1."""
    return (rgb.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 127.5 - 1).astype(np.float32)


class _Arrays(pickle.Unpickler):
    """Reads the pickles of CIFAR-10 and nothing that could run code: arrays, and what Python 2 wrote strings with."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar", "encode")

    def find_class(self, module, name):
        if name in self.ALLOWED and module.split(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module, name)
        raise ValueError(f"a CIFAR-10 file must hold arrays and lists only; got {module}.{name}")
