"""Tokenizers are lossless, deterministic, and survive saving."""

import numpy as np
import pytest

from linnet.training.tokenization import END_OF_TEXT, boundary_ids, build_tokenizer, encode, encode_documents, load_tokenizer

TEXTS = [
    "def f(x):\n\treturn x\r\n",
    "héllo → 世界 \U0001f600",
    "    spaces   and\n\n\nlines",
    "",
    "a </s> <pad> b",
    f"x {END_OF_TEXT} y",
]
CORPUS = ["the quick brown fox def return self " * 20, "import numpy as np\n    return self.value\n" * 20]


@pytest.fixture(scope="module", params=["bytes", "bpe:300"])
def tokenizer(request):
    return build_tokenizer(request.param, CORPUS)


def test_round_trip(tokenizer):
    for text, ids in zip(TEXTS, encode(tokenizer, TEXTS), strict=True):
        if "<" not in text:
            assert tokenizer.decode(ids) == text
        special = {i for i in (*boundary_ids(tokenizer),) if i is not None}
        assert not special & set(ids.tolist())  # text that spells a special token stays text


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert len(loaded) == len(tokenizer) and boundary_ids(loaded) == boundary_ids(tokenizer)
    for before, after in zip(encode(tokenizer, TEXTS), encode(loaded, TEXTS), strict=True):
        assert np.array_equal(before, after)


def test_bytes_are_byt5s():
    tokenizer = build_tokenizer("bytes")
    assert len(tokenizer) == 259 and boundary_ids(tokenizer) == (1, 1, 0)
    text = TEXTS[0] + TEXTS[1]
    assert encode(tokenizer, [text])[0].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_bpe_training_is_deterministic_and_has_every_byte():
    a, b = (build_tokenizer("bpe:300", CORPUS) for _ in range(2))
    assert a.get_vocab() == b.get_vocab() and len(a) == 300
    every = "".join(chr(i) for i in range(1, 0x250))
    assert a.decode(encode(a, [every])[0]) == every
    assert len(encode(a, CORPUS)[0]) < len(CORPUS[0].encode()) / 2


def test_documents_lie_between_boundaries(tokenizer):
    bos, eos, _ = boundary_ids(tokenizer)
    for ids, document in zip(encode(tokenizer, TEXTS), encode_documents(tokenizer, TEXTS), strict=True):
        assert document.tolist() == [bos, *ids.tolist(), eos]


@pytest.mark.parametrize("name", ["bpe:", "bpe:ten", "bpe:257", "bpe"])
def test_bad_bpe_sizes_are_refused(name):
    with pytest.raises(ValueError, match="N >= 258"):
        build_tokenizer(name, CORPUS)


def test_unknown_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer must be 'bytes', 'bpe:N'"):
        build_tokenizer(str(tmp_path / "nothing"))
