"""Bits per byte against hand computations."""

import lzma
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from linnet.evals.perplexity import (
    bits_per_byte,
    by_length,
    by_position,
    token_nats,
    unigram_bits_per_byte,
    windows,
    xz_bits_per_byte,
)
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


def test_perplexity_per_word_and_byte():
    """Words are what is between white space: 'a  b\\n' has 3, the last one empty, as lm-evaluation-harness counts them."""
    texts = ["one two", "a  b\n"]
    logits = torch.randn(259, generator=torch.Generator().manual_seed(0))
    result = bits_per_byte(Fixed(logits), build_tokenizer("bytes"), texts, context=16)
    nats = -sum(float(torch.log_softmax(logits, 0)[byte + 3]) for text in texts for byte in text.encode())
    assert result["words"] == 5 and result["bytes"] == 12
    assert result["word_perplexity"] == pytest.approx(math.exp(nats / 5), rel=1e-5)
    assert result["byte_perplexity"] == pytest.approx(math.exp(nats / 12), rel=1e-5)


class LogitsOnly(torch.nn.Module):
    """A causal language model of any library: logits of one row, nothing packed."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.model(input_ids).logits)


@pytest.mark.parametrize(("context", "stride"), [(8, 4), (1000, 500)])
@pytest.mark.parametrize("begin", [True, False])
def test_costs_of_the_tokens_add_up_to_the_bits(context, stride, begin):
    torch.manual_seed(0)
    model = LinnetForCausalLM(LinnetConfig(vocab_size=259, d_model=16, heads=2, layers="gla + attention"))
    tokenizer = build_tokenizer("bytes")
    if not begin:
        tokenizer.eos_token = None
    options = {"context": context, "stride": stride}
    nats = token_nats(model, tokenizer, TEXTS, **options, tokens_per_batch=40)
    assert [len(x) for x in nats] == [len(text.encode()) for text in TEXTS] and model.training
    total = bits_per_byte(model, tokenizer, TEXTS, **options)["bits"] * math.log(2)
    assert sum(x.sum() for x in nats) == pytest.approx(total, rel=1e-5)
    for a, b in zip(nats, token_nats(LogitsOnly(model), tokenizer, TEXTS, **options), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_costs_of_one_text_by_hand():
    torch.manual_seed(0)
    model = LinnetForCausalLM(LinnetConfig(vocab_size=259, d_model=16, heads=2, layers="gla")).eval()
    ids = torch.tensor([[1, *(byte + 3 for byte in b"abc")]])
    logp = model(ids).logits[0].detach().log_softmax(-1)
    expected = [-float(logp[t, ids[0, t + 1]]) for t in range(3)]
    assert token_nats(model, build_tokenizer("bytes"), ["abc"], context=8)[0] == pytest.approx(expected, abs=1e-5)


def test_by_position_and_by_length():
    nats = [np.log([2.0, 4.0, 8.0]), np.log([2.0]), np.array([])]
    assert [(r["documents"], r["tokens"]) for r in by_position(nats, [0, 1, 3, 9])] == [(2, 2), (1, 2), (0, 0)]
    first, second, empty = (r["perplexity"] for r in by_position(nats, [0, 1, 3, 9]))
    assert (first, second) == pytest.approx((2.0, math.sqrt(32.0))) and math.isnan(empty)
    short, long = by_length(nats, [1, 3, 4])
    assert (short["perplexity"], long["perplexity"]) == pytest.approx((2.0, 4.0))
    assert (short["from"], short["to"], long["tokens"]) == (1, 3, 3)
    for edges in ([], [5], [3, 3], [-1, 4]):
        with pytest.raises(ValueError, match="edges must be at least two increasing numbers"):
            by_position(nats, edges)


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
