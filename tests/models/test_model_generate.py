"""The cache and `generate`: with and without state, padded or not, the same tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from linnet.models import LinnetCache

HYBRID = "gla + attention + attention(window=4) + gated_deltanet"
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A left-padded batch and its mask."""
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    return ids, mask


@pytest.fixture
def model(make_model):
    return make_model(HYBRID, torch.float64, tie_embeddings=False)


@pytest.fixture
def batch(tokens):
    return padded([tokens(1, n, seed=n) for n in (3, 9, 6)])


@torch.no_grad()
def test_greedy_is_argmax_of_the_full_forward_at_every_step(model, tokens):
    x = tokens(2, 5)
    y = model.generate(x, **GREEDY)
    assert torch.equal(model(y[:, :-1]).logits[:, 4:].argmax(-1), y[:, 5:])


@torch.no_grad()
def test_left_padded_batch_is_its_rows(model, batch):
    ids, mask = batch
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, real in enumerate(mask.bool()):
        alone = model.generate(ids[row : row + 1, real], **GREEDY)
        assert torch.equal(together[row, ids.shape[1] :], alone[0, int(real.sum()) :])


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 20},
     {"do_sample": True, "num_beams": 2}],
    ids=["greedy", "beams", "beams_many", "sample", "beam_sample"],
)  # fmt: skip
def test_with_and_without_state(model, batch, options):
    ids, mask = batch
    options = {**GREEDY, **options}
    torch.manual_seed(0)
    fast = model.generate(ids, attention_mask=mask, **options, use_cache=True)
    torch.manual_seed(0)
    slow = model.generate(ids, attention_mask=mask, **options, use_cache=False)
    assert torch.equal(fast, slow)


def test_beam_search_reorders_the_state(model, batch, monkeypatch):
    """The comparison above would mean nothing if no beam ever moved; and without reordering it fails."""
    ids, mask = batch
    moved = []
    reorder = LinnetCache.reorder_cache
    monkeypatch.setattr(LinnetCache, "reorder_cache", lambda self, index: (moved.append(index.tolist()), reorder(self, index))[1])
    right = model.generate(ids, attention_mask=mask, **GREEDY, num_beams=3)
    assert any(index != list(range(9)) for index in moved)
    monkeypatch.setattr(LinnetCache, "reorder_cache", lambda self, index: None)
    assert not torch.equal(right, model.generate(ids, attention_mask=mask, **GREEDY, num_beams=3))


@torch.no_grad()
@pytest.mark.parametrize("splits", [[12], [5, 7], [1] * 12, [3, 1, 8]])
def test_continuing_is_one_pass(model, tokens, splits):
    x = tokens(2, 12)
    cache, logits = LinnetCache(4), []
    for part in x.split(splits, 1):
        output = model(part, past_key_values=cache)
        assert output.past_key_values is cache
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(x).logits, rtol=1e-10, atol=1e-10)
    assert cache.get_seq_length() == 12 and cache.tokens_N.tolist() == [12, 12]


@torch.no_grad()
def test_continuing_padded_chunks(model, tokens):
    """Chunks of several tokens with padding in them, a cache, and one row that has nothing to say in one chunk."""
    x = tokens(3, 10)
    mask = torch.ones_like(x)
    mask[0, :3], mask[1, 4:7], mask[2, 8] = 0, 0, 0
    want = model(x, attention_mask=mask).logits[mask.bool()]
    for splits in ([4, 3, 3], [10], [1] * 10):
        cache, logits, seen = LinnetCache(4), [], 0
        for part in x.split(splits, 1):
            seen += part.shape[1]
            logits.append(
                model(part, attention_mask=mask[:, :seen], past_key_values=cache).logits
                if mask[:, seen - part.shape[1] : seen].any()
                else None
            )
        torch.testing.assert_close(torch.cat(logits, 1)[mask.bool()], want, rtol=1e-10, atol=1e-10)
        assert cache.get_seq_length() == 10 and cache.tokens_N.tolist() == [7, 7, 9]


@torch.no_grad()
def test_packed_prefill_then_rows(model, tokens):
    """Documents packed in one row give a cache with one row per document; each continues by itself."""
    documents = [tokens(1, n, seed=n) for n in (5, 2, 7)]
    cache = model(torch.cat(documents, 1), cu_seqlens=torch.tensor([0, 5, 7, 14]), use_cache=True).past_key_values
    assert cache.batch_size == 3 and cache.tokens_N.tolist() == [5, 2, 7]
    following = tokens(3, 2, seed=9)
    got = model(following, past_key_values=cache).logits
    want = torch.cat([model(torch.cat((d, f[None]), 1)).logits[:, -2:] for d, f in zip(documents, following, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_cache_rows_can_be_chosen_repeated_copied_reset(model, batch):
    ids, mask = batch
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    step = ids[:, -1:]
    want = model(step, past_key_values=copy.deepcopy(cache)).logits
    index = torch.tensor([2, 0, 0])
    for method in ("reorder_cache", "batch_select_indices"):
        other = copy.deepcopy(cache)
        getattr(other, method)(index)
        torch.testing.assert_close(model(step[index], past_key_values=other).logits, want[index], rtol=1e-10, atol=1e-10)
    other = copy.deepcopy(cache)
    other.batch_repeat_interleave(2)
    assert other.batch_size == 6
    got = model(step.repeat_interleave(2, 0), past_key_values=other).logits
    torch.testing.assert_close(got, want.repeat_interleave(2, 0), rtol=1e-10, atol=1e-10)
    assert cache.to("cpu") is cache and cache.to("meta").states[0][0].is_meta
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.batch_size == -1
    torch.testing.assert_close(
        model(ids, attention_mask=mask, past_key_values=cache).logits,
        model(ids, attention_mask=mask).logits,
        rtol=0,
        atol=0,
    )


@torch.no_grad()
def test_state_is_read_but_not_written_without_use_cache(model, tokens):
    x = tokens(2, 6)
    cache = model(x[:, :4]).past_key_values
    output = model(x[:, 4:], past_key_values=cache, use_cache=False)
    assert output.past_key_values is None and cache.get_seq_length() == 4
    torch.testing.assert_close(output.logits, model(x).logits[:, 4:], rtol=1e-10, atol=1e-10)


def test_gradients_flow_through_the_state(make_model, tokens):
    model, x = make_model("gla + gated_deltanet", torch.float64), tokens(2, 8)
    first = model(x[:, :4], use_cache=True)
    model(x[:, 4:], past_key_values=first.past_key_values).logits.sum().backward()
    got = model.model.layers[0].mixer.k_proj.weight.grad.clone()
    model.zero_grad()
    model(x).logits[:, 4:].sum().backward()
    torch.testing.assert_close(got, model.model.layers[0].mixer.k_proj.weight.grad, rtol=1e-8, atol=1e-10)
    assert not any(s.requires_grad for state in first.past_key_values.detach().states for s in state)


def test_generate_continues_a_given_cache(model, tokens):
    x = tokens(1, 10)
    want = model.generate(x, **GREEDY)
    with torch.no_grad():
        cache = model(x[:, :6], use_cache=True).past_key_values
    assert torch.equal(model.generate(x, past_key_values=cache, **GREEDY), want)
    assert torch.equal(model.generate(x, prefill_chunk_size=4, **GREEDY), want)
    embeds = model.model.embed_tokens(x).detach()
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), want[:, 10:])


def test_state_bytes(make_model, tokens):
    model = make_model("gla + attention")
    cache = model(tokens(3, 7), use_cache=True).past_key_values
    assert cache.state_bytes() == 3 * model.state_bytes(tokens=7)
    linear = make_model("2*gla")
    assert linear.state_bytes(10) == linear.state_bytes(100_000) == 2 * (2 * 4 * 8) * 4  # 2 layers, S [2, 4, 8] in fp32
    assert model.state_bytes(8) - model.state_bytes(7) == 2 * 16 * 4  # one key and one value of width 16


def test_what_is_refused(model, make_model, tokens):
    x = tokens(1, 4)
    cache = model(x, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="not keys and values"):
        cache.update(x, x, 0)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(x, prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="must be a LinnetCache or None; got DynamicCache"):
        model.generate(x, past_key_values=DynamicCache(), **GREEDY)
    with pytest.raises(ValueError, match="cache_implementation must be None .* got 'static'"):
        model.generate(x, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="must hold 4 layers; got 3"):
        model(x, past_key_values=LinnetCache(3))
    with pytest.raises(ValueError, match="must hold 2 rows .* got 1"):
        model(tokens(2, 4), past_key_values=cache)
    assert not cache.is_compileable and not cache.is_croppable
