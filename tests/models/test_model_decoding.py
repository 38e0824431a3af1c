"""The decoder of fixed size: the logits of the ordinary cache, for every mixer; a graph only replays it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import linnet
from linnet.models import GraphedDecoder, LinnetCache

HYBRID = "gated_deltanet + attention + attention(window=4) + mamba"
GROWING = {"lssa", "lssar", "music_relative", "sea", "superlinear"}  # caches of more than keys and values
LIMIT = 1e-11


def padded(tokens, lengths=(7, 3, 5)) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return tokens(len(lengths), max(lengths)) * mask, mask.long()


@torch.no_grad()
def misses(model, decoder: GraphedDecoder, tokens, steps: int) -> list[float]:
    """Differences to the ordinary forward with its cache, relative to the largest logit."""
    ids, mask = padded(tokens)
    cache = LinnetCache(len(decoder.states))
    want = [model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]]
    got = [decoder.prefill(ids, mask).clone()]
    for index in range(steps):
        new = tokens(len(ids), seed=index)
        want.append(model(new[:, None], past_key_values=cache).logits[:, -1])
        got.append(decoder.step(new).clone())
    return [float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True)]


def test_a_hybrid_for_many_tokens(make_model, tokens):
    model = make_model(HYBRID, torch.float64, tie_embeddings=False)
    decoder = GraphedDecoder(model, 3, max_tokens=7 + 20)
    assert max(misses(model, decoder, tokens, 20)) < LIMIT
    assert max(misses(model, decoder, tokens, 3)) < LIMIT  # other sequences in the same memory
    with pytest.raises(ValueError, match="max_tokens must leave room for one more token; got 27 with 27 tokens seen"):
        for _ in range(18):
            decoder.step(tokens(3))


@pytest.mark.parametrize("mixer", sorted(set(linnet.list_mixers()) - GROWING))
def test_every_mixer(make_model, tokens, mixer):
    model = make_model([mixer, mixer], torch.float64, tie_embeddings=False, d_model=32)
    assert max(misses(model, GraphedDecoder(model, 3, max_tokens=16), tokens, 4)) < LIMIT


@pytest.mark.parametrize("mixer", sorted(GROWING))
def test_layers_without_a_form_of_a_fixed_size_are_named(make_model, mixer):
    with pytest.raises(ValueError, match=rf"model must have layers .*; got layers 1 \({mixer}\)"):
        GraphedDecoder(make_model(["gla", mixer]), 1, max_tokens=16)


def test_operators_work_in_place_and_read_nothing_on_the_host(make_model, tokens):
    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select"), func
            return func(*args, **kwargs or {})

    decoder = GraphedDecoder(make_model("gated_deltanet + attention + mamba + gla"), 3, max_tokens=16)
    decoder.prefill(tokens(3, 4))
    where = [x.data_ptr() for state in decoder.states for x in state]
    new = tokens(3)
    with NoReading():
        decoder.step(new)
    assert where == [x.data_ptr() for state in decoder.states for x in state]
    assert decoder._stepped == {id(x) for state in decoder.states for x in state}


def test_generate_is_generate(make_model, tokens):
    model = make_model(HYBRID, torch.float64, tie_embeddings=False)
    ids, mask = padded(tokens)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]
    assert torch.equal(GraphedDecoder(model, 3, max_tokens=16).generate(ids, 6, mask), want)


@torch.no_grad()
def test_the_state_goes_back_to_an_ordinary_cache(make_model, tokens):
    model = make_model(HYBRID, torch.float64)
    decoder = GraphedDecoder(model, 2, max_tokens=16)
    ids = tokens(2, 9)
    decoder.prefill(ids[:, :6])
    decoder.step(ids[:, 6])
    cache = decoder.cache()
    decoder.step(ids[:, 7])  # the copy stays
    got = model(ids[:, 7:], past_key_values=cache).logits
    want = model(ids).logits[:, 7:]
    assert (got - want).abs().max() < LIMIT * want.abs().max() and cache.seen_tokens == 9


def test_bad_input(make_model, tokens):
    model = make_model("gla + attention")
    for options, message in (
        ({"batch_size": 0}, "batch_size must be an integer >= 1; got 0"),
        ({"batch_size": 2}, r"max_tokens must be given: the state of layer 1 \(attention\) grows; got None"),
        ({"batch_size": 2, "max_tokens": 1.5}, "max_tokens must be an integer >= 1; got 1.5"),
        ({"batch_size": 2, "max_tokens": 8, "graph": True}, "graph must be None or False on cpu; got True"),
    ):
        with pytest.raises(ValueError, match=message):
            GraphedDecoder(model, **options)
    with pytest.raises(ValueError, match="model must be a LinnetForCausalLM; got LinnetModel"):
        GraphedDecoder(model.model, 2, max_tokens=8)
    with pytest.raises(ValueError, match="model must be in eval mode"):
        GraphedDecoder(make_model().train(), 2, max_tokens=8)
    decoder = GraphedDecoder(model, 2, max_tokens=8)
    with pytest.raises(ValueError, match="step must follow prefill or load"):
        decoder.step(tokens(2))
    with pytest.raises(ValueError, match="cache must hold 2 rows; got LinnetCache"):
        decoder.prefill(tokens(3, 4))
    with pytest.raises(ValueError, match="cache must hold at most max_tokens = 8 tokens per row; got 9"):
        decoder.prefill(tokens(2, 9))
    decoder.prefill(tokens(2, 4))
    with pytest.raises(ValueError, match=r"ids_B must be of shape \[2\]; got \[3\]"):
        decoder.step(tokens(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_replays_the_step(make_model, tokens):
    model = make_model("gated_deltanet + attention + mamba + gla").cuda()
    draw = lambda *shape, **options: tokens(*shape, **options).cuda()
    graphed, plain = (GraphedDecoder(model, 3, max_tokens=32, graph=graph) for graph in (None, False))
    ids = draw(3, 7)
    assert graphed._graph is not None
    for decoder in (graphed, plain):
        decoder.prefill(ids)
    for index in range(8):
        new = draw(3, seed=index)
        got, want = graphed.step(new), plain.step(new)
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
