"""Text is read whole or refused by name, split once, and packed without leaks; batch i is a function of (seed, i)."""

import sys
import types

import numpy as np
import pytest
import torch

from linnet.models import LinnetConfig, LinnetForCausalLM
from linnet.training.data import PackedBatches, load_corpus, take_bytes


def test_reading_twice_gives_the_same_corpus(folder):
    assert load_corpus(str(folder)) == load_corpus(str(folder))


def test_split_is_disjoint_and_complete(folder):
    corpus = load_corpus(str(folder), validation_fraction=0.3)
    train, held_out = ({d.name for d in side} for side in (corpus.train, corpus.validation))
    assert train and held_out and not train & held_out
    assert train | held_out == {p.relative_to(folder).as_posix() for p in folder.rglob("*.txt")}
    assert not {d.text for d in corpus.train} & {d.text for d in corpus.validation}


def test_a_document_keeps_its_side_when_others_leave(folder):
    whole = {d.name for d in load_corpus(str(folder), validation_fraction=0.4).validation}
    part = load_corpus(str(folder), validation_fraction=0.4, glob="sub[01]/*")
    assert {d.name for d in part.validation} == {n for n in whole if not n.startswith("sub2")}


def test_bytes_are_kept(folder):
    corpus = load_corpus(str(folder))
    for document in corpus.train + corpus.validation:
        assert document.text.encode() == (folder / document.name).read_bytes()


def test_hash_follows_the_content(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(f"text {name}")
    before = load_corpus(str(tmp_path)).sha256
    (tmp_path / "c").write_text("text d")
    assert load_corpus(str(tmp_path)).sha256 != before


def test_exact_duplicates_are_kept_once(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_text("same" if name in "bc" else f"text {name}")
    corpus = load_corpus(str(tmp_path))
    assert sorted(d.name for d in corpus.train + corpus.validation) == ["a", "b", "d"]


def test_stdlib_is_large_and_sorted():
    corpus = load_corpus("stdlib", max_bytes=300_000)
    names = [d.name for d in corpus.train]
    assert names == sorted(names) and "Python" in corpus.origin and len(corpus.sha256) == 64
    assert 300_000 <= corpus.describe()["train_bytes"] + corpus.describe()["validation_bytes"] < 600_000


def test_a_single_file_is_split_by_lines(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i}\n" for i in range(500)))
    corpus = load_corpus(str(path), validation_fraction=0.1)
    held_out = sum(d.size for d in corpus.validation) / path.stat().st_size
    assert 0 < held_out < 0.4
    assert sum(d.size for d in corpus.train + corpus.validation) == path.stat().st_size


@pytest.mark.parametrize(("content", "what"), [(b"caf\xe9", "0xe9 at offset 3"), (b"ab\0c", "NUL byte at offset 2")])
def test_a_file_that_is_not_text_is_refused_by_name(tmp_path, content, what):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.bin.*{what}"):
        load_corpus(str(tmp_path))


def test_missing_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data.source must be"):
        load_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="at least two"):
        load_corpus(str(tmp_path))


def test_datasets_source(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_corpus("datasets:some/name")

    class Table(dict):
        column_names = ["text"]

    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, subset, split: Table(text=[f"{name} {split} {i}" for i in range(30)])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    corpus = load_corpus("datasets:some/name:test")
    assert len(corpus.train + corpus.validation) == 30 and corpus.train[0].text.startswith("some/name test")
    with pytest.raises(ValueError, match="text_column must be one of text"):
        load_corpus("datasets:some/name", text_column="body")


def test_take_bytes_cuts_at_a_character(folder):
    documents = load_corpus(str(folder), validation_fraction=0.5).validation
    total = sum(d.size for d in documents)
    assert take_bytes(documents, total) == documents
    for size in range(700, 720):
        taken = take_bytes(documents, size)
        assert size - 3 <= sum(d.size for d in taken) <= size


def documents_of(*sizes):
    """Documents whose tokens are all different: token = 1000 * document + position."""
    return [np.arange(size, dtype=np.int32) + 1000 * i for i, size in enumerate(sizes)]


def test_batches_depend_only_on_seed_and_index():
    make = lambda seed: PackedBatches(documents_of(70, 5, 33, 200), context=16, tokens_per_batch=40, seed=seed, length=50)
    a, b, c = make(1), make(1), make(2)
    forward = [a[i]["input_ids"] for i in range(50)]
    backward = [b[i]["input_ids"] for i in reversed(range(50))][::-1]
    assert all(torch.equal(x, y) for x, y in zip(forward, backward, strict=True))
    assert not all(torch.equal(x, c[i]["input_ids"]) for i, x in enumerate(forward))


def test_every_token_is_used_once_per_epoch():
    documents = documents_of(70, 5, 33, 200, 12)  # 320 tokens: 8 whole batches
    batches = PackedBatches(documents, context=16, tokens_per_batch=40)
    assert batches.batches_per_epoch == len(batches) == 8
    for epoch in range(2):
        batches.length = 16
        tokens = torch.cat([batches[8 * epoch + i]["input_ids"][0] for i in range(8)])
        assert sorted(tokens.tolist()) == sorted(np.concatenate(documents).tolist())


def test_segments_hold_one_document_and_predict_only_inside():
    batches = PackedBatches(documents_of(70, 5, 33, 200), context=16, tokens_per_batch=40, length=30)
    for i in range(30):
        item = batches[i]
        ids, labels, offsets = item["input_ids"][0], item["labels"][0], item["cu_seqlens"].tolist()
        assert offsets[0] == 0 and offsets[-1] == 40 == len(ids) and item["cu_seqlens"].dtype == torch.int32
        for start, end in zip(offsets, offsets[1:], strict=False):
            assert 1 <= end - start <= 16
            assert torch.equal(ids[start:end] - ids[start], torch.arange(end - start))  # consecutive tokens of one document
            assert labels[start] == -100 and torch.equal(labels[start + 1 : end], ids[start + 1 : end])


def test_nothing_leaks_between_packed_documents():
    """The loss of a packed batch is that of its pieces alone; changing one piece leaves the others' logits as they are."""
    torch.manual_seed(0)
    model = LinnetForCausalLM(LinnetConfig(vocab_size=64, d_model=16, heads=2, layers="retnet + attention")).double()
    documents = [np.random.default_rng(i).integers(0, 64, 20 + 7 * i).astype(np.int32) for i in range(4)]
    item = PackedBatches(documents, context=16, tokens_per_batch=48)[0]
    offsets = item["cu_seqlens"].tolist()
    packed = model(**item, return_logits=True)
    nats = targets = 0
    for start, end in zip(offsets, offsets[1:], strict=False):
        ids = item["input_ids"][:, start:end]
        alone = model(ids, labels=ids, return_logits=True)
        torch.testing.assert_close(alone.logits, packed.logits[:, start:end], rtol=1e-10, atol=1e-12)
        if end - start > 1:
            nats, targets = nats + alone.loss.item() * (end - start - 1), targets + end - start - 1
    assert packed.loss.item() == pytest.approx(nats / targets, rel=1e-6)
    changed = item["input_ids"].clone()
    changed[0, offsets[1] : offsets[2]] = 63 - changed[0, offsets[1] : offsets[2]]
    logits = model(input_ids=changed, cu_seqlens=item["cu_seqlens"]).logits
    assert torch.equal(logits[:, offsets[2] :], packed.logits[:, offsets[2] :])
    assert not torch.equal(logits[:, offsets[1] : offsets[2]], packed.logits[:, offsets[1] : offsets[2]])


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="data.tokens_per_batch must be at most 10, the tokens of the training set; got 11"):
        PackedBatches(documents_of(10), context=4, tokens_per_batch=11)
    with pytest.raises(ValueError, match="data.context must be an integer >= 2; got 1"):
        PackedBatches(documents_of(10), context=1, tokens_per_batch=4)
