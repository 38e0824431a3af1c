"""Bits per byte against hand computations."""

import lzma
import math
from types import SimpleNamespace

import pytest
import torch

from linnet.evals.perplexity import bits_per_byte, unigram_bits_per_byte, windows, xz_bits_per_byte
from linnet.models import LinnetConfig, LinnetForCausalLM
from linnet.training.tokenization import build_tokenizer, encode

TEXTS = ["short", "a longer document, with é in it: " * 6, "x"]


class Fixed(torch.nn.Module):
    """Predicts every next token with the same logits, whatever came before."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, labels, cu_seqlens=None):
        logits = self.logits.expand(*input_ids.shape, -1)
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
        return SimpleNamespace(loss=loss)


def test_a_uniform_model_over_bytes_needs_8_bits():
    logits = torch.full((259,), -math.inf)
    logits[3:] = 0.0
    result = bits_per_byte(Fixed(logits), build_tokenizer("bytes"), TEXTS, context=16)
    assert result["bits_per_byte"] == pytest.approx(8.0, abs=1e-5)
    assert result["perplexity"] == pytest.approx(256, rel=1e-5)
    assert result["bytes"] == result["tokens"] == sum(len(t.encode()) for t in TEXTS) and result["documents"] == 3


def test_bytes_of_the_text_are_counted_for_any_tokenizer():
    tokenizer = build_tokenizer("bpe:320", TEXTS)
    result = bits_per_byte(Fixed(torch.zeros(len(tokenizer))), tokenizer, TEXTS, context=8, stride=3)
    tokens, size = sum(map(len, encode(tokenizer, TEXTS))), sum(len(t.encode()) for t in TEXTS)
    assert tokens < size and result["tokens"] == tokens and result["bytes"] == size
    assert result["bits_per_byte"] == pytest.approx(tokens * math.log2(len(tokenizer)) / size, rel=1e-5)


def test_without_a_begin_token_the_first_token_is_charged_uniformly():
    tokenizer = build_tokenizer("bytes")
    logits = torch.randn(259, generator=torch.Generator().manual_seed(0))
    nats = -torch.log_softmax(logits, 0)
    full = bits_per_byte(Fixed(logits), tokenizer, TEXTS, context=16)["bits"]
    tokenizer.eos_token = None
    first = sum(float(nats[text.encode()[0] + 3]) for text in TEXTS)
    without = bits_per_byte(Fixed(logits), tokenizer, TEXTS, context=16)["bits"]
    assert without == pytest.approx(full - first / math.log(2) + 3 * math.log2(259), rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(8, 1), (8, 4), (8, 7), (16, 5), (1000, 500)])
@pytest.mark.parametrize("tokens_per_batch", [1, 40, 10_000])
def test_sliding_windows_against_one_window_per_token(context, stride, tokens_per_batch):
    """Every target is scored once, given exactly the tokens that its window holds."""
    torch.manual_seed(0)
    model = LinnetForCausalLM(LinnetConfig(vocab_size=259, d_model=16, heads=2, layers="attention")).eval()
    tokenizer = build_tokenizer("bytes")
    nats = 0.0
    for text in TEXTS:
        ids = torch.tensor([[1, *encode(tokenizer, [text])[0].tolist()]])
        for start, end, scored in windows(ids.shape[1], context, stride):
            logits = model(ids[:, start:end]).logits.detach().log_softmax(-1)
            for target in range(scored, end):
                assert target - start >= min(target, context - stride)
                nats -= float(logits[0, target - start - 1, ids[0, target]])
    result = bits_per_byte(model, tokenizer, TEXTS, context=context, stride=stride, tokens_per_batch=tokens_per_batch)
    assert result["bits"] == pytest.approx(nats / math.log(2), rel=1e-5)


@pytest.mark.parametrize(("tokens", "context", "stride"), [(1, 4, 2), (2, 4, 2), (4, 4, 2), (5, 4, 2), (23, 6, 1), (23, 6, 5)])
def test_windows_cover_every_target_once(tokens, context, stride):
    scored = []
    for start, end, first in windows(tokens, context, stride):
        assert 0 <= start < first < end <= tokens and end - start <= context
        scored += range(first, end)
    assert scored == list(range(1, tokens))


def test_unigram_closed_form():
    # train: 3 a, 1 b; add one to each of 256 counts: p(a) = 4/260, p(b) = 2/260, p(c) = 1/260
    expected = -(2 * math.log2(4 / 260) + math.log2(2 / 260) + math.log2(1 / 260)) / 4
    assert unigram_bits_per_byte(["aa", "ab"], ["aab", "c"]) == pytest.approx(expected, rel=1e-12)


def test_xz_is_preset_9_of_the_concatenation():
    texts = ["é" * 100, "abc" * 50]
    data = "".join(texts).encode()
    assert xz_bits_per_byte(texts) == 8 * len(lzma.compress(data, preset=9)) / len(data)


@pytest.mark.parametrize(("context", "stride"), [(1, None), (8, 8), (8, 0)])
def test_bad_windows_are_refused(context, stride):
    with pytest.raises(ValueError, match="context must be at least 2|stride must be in 1..context-1"):
        bits_per_byte(Fixed(torch.zeros(259)), build_tokenizer("bytes"), TEXTS, context=context, stride=stride)
