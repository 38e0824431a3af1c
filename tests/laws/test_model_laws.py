"""The laws of the model, for every registered mixer: packing, padding, state, export, generation, recomputation.

Law 4: packed documents == separate documents, padding is inert. Law 6: save, select, resume == uninterrupted. Law 9: export
-> load == the same bits; generate == the full forward. Every model here has the mixer under test twice (values that layers
share) in fp64.
"""

from __future__ import annotations

import copy

import pytest
import torch

from linnet.mixers import Mixer, get_mixer, list_mixers
from linnet.models import LinnetCache, LinnetConfig, LinnetForCausalLM, no_weight_decay_parameters

VOCAB = 53
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
BUILTIN = [name for name in list_mixers() if get_mixer(name).causal and get_mixer(name).__module__.startswith("linnet.")]


def build(mixer: str, dtype: torch.dtype = torch.float64) -> LinnetForCausalLM:
    torch.manual_seed(0)
    config = LinnetConfig(
        vocab_size=VOCAB,
        d_model=32,
        heads=2,
        d_ff=32,
        layers=f"2*{mixer}",
        tie_embeddings=False,
        initializer_range=0.3,
        pad_token_id=0,
    )
    model = LinnetForCausalLM(config)
    with torch.no_grad():  # mixers start with small outputs; the laws must notice what they say
        for part in model.modules():
            if isinstance(part, Mixer):
                for linear in part.modules():
                    if isinstance(linear, torch.nn.Linear):
                        if bool(linear.weight.any()):
                            linear.weight.mul_(3)
                        else:  # RWKV's projections that start at zero would hide the rest
                            linear.weight.normal_(std=0.3)
    return model.to(dtype).eval()


@pytest.fixture(params=BUILTIN)
def model(request) -> LinnetForCausalLM:
    return build(request.param)


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: LinnetForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    largest = max(x.norm() for x in want.values())
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-8 * want[name].norm() + 1e-12 * largest, name


def test_packed_documents_are_separate_documents(model):
    documents = [draw(1, n, seed=n) for n in (19, 1, 6)]
    packed, cu = torch.cat(documents, 1), torch.tensor([0, 19, 20, 20, 26], dtype=torch.int32)
    parts = [model(d, labels=d, return_logits=True, num_items_in_batch=1) for d in documents]
    whole = model(packed, labels=packed, cu_seqlens=cu, return_logits=True)
    torch.testing.assert_close(whole.logits, torch.cat([p.logits for p in parts], 1), **CLOSE)
    expected = sum(p.loss for p in parts) / 23
    torch.testing.assert_close(whole.loss, expected, rtol=1e-10, atol=0)
    assert_same(gradients(model, whole.loss), gradients(model, expected))


def test_every_parameter_gets_a_gradient(model):
    x = draw(2, 19)
    got = gradients(model, model(x, labels=x).loss)
    silent = [name for name, p in model.named_parameters() if name not in got or not got[name].any()]
    # Parameters that only later layers use, or that start behind a zero: the mixers' own tests cover them.
    assert not [name for name in silent if "mixer" not in name], silent
    assert all(x.isfinite().all() for x in got.values())


@torch.no_grad()
def test_generate_is_the_full_forward_padded_or_not(model):
    """Greedy: the state, left padding and packing change no token."""
    rows = [draw(1, n, seed=n) for n in (4, 9)]
    ids = torch.cat([torch.nn.functional.pad(r, (9 - r.shape[1], 0)) for r in rows])
    mask = (ids != 0).long()
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, new in zip(rows, together[:, 9:], strict=True):
        text = torch.cat((row, new[None]), 1)
        assert torch.equal(model(text[:, :-1]).logits[0, row.shape[1] - 1 :].argmax(-1), new)
    assert len(set(together[:, 9:].flatten().tolist())) > 2


def test_beam_search_with_and_without_state(model):
    ids = draw(2, 5)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


@torch.no_grad()
def test_state_saved_selected_resumed(model):
    """Chunks with padding inside, a copy taken in the middle, rows exchanged: as if nothing had happened."""
    x = draw(3, 22)
    mask = torch.ones_like(x)
    mask[0, :3], mask[1, 14:16] = 0, 0
    want = model(x, attention_mask=mask).logits
    cache = LinnetCache(2)
    model(x[:, :13], attention_mask=mask[:, :13], past_key_values=cache)
    saved = copy.deepcopy(cache)
    model(x[:, 13:], attention_mask=mask, past_key_values=cache)  # must not reach into the copy
    order = torch.tensor([2, 0, 1])
    saved.reorder_cache(order)
    y, m = x[order], mask[order]
    parts = [model(y[:, 13:18], attention_mask=m[:, :18], past_key_values=saved).logits]
    parts += [model(y[:, t : t + 1], attention_mask=m[:, : t + 1], past_key_values=saved).logits for t in range(18, 22)]
    real = m[:, 13:].bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], want[order][:, 13:][real], **CLOSE)
    bytes_now = sum(part.state_spec().bytes_per_row(22) for part in (layer.mixer for layer in model.model.layers))
    assert model.state_bytes(22) == bytes_now


def test_export_and_load_are_the_same_bits(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = LinnetForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    x = draw(1, 9)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert torch.equal(model(x).logits, again(x).logits)


@pytest.mark.parametrize("mixer", BUILTIN)
def test_tensors_that_a_checkpoint_lacks_get_the_mixers_own_initialisation(mixer, tmp_path):
    """What a checkpoint has is kept; the mixers it lacks get what their `reset_parameters` draws, and nothing else is drawn."""
    model = build(mixer, torch.float32)
    state = {k: v.clone() for k, v in model.state_dict().items() if ".mixer." not in k}
    torch.manual_seed(3)
    again = LinnetForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    torch.manual_seed(3)
    for layer in model.model.layers:
        layer.mixer.reset_parameters()
    for (name, a), b in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_recomputed_gradients_are_the_same(model):
    x = draw(2, 18)
    want = gradients(model, model.train()(x, labels=x).loss)
    model.gradient_checkpointing_enable()
    assert_same(gradients(model, model(x, labels=x).loss), want)


@pytest.mark.parametrize("mixer", BUILTIN)
def test_bf16_weights_work(mixer):
    model, x = build(mixer, torch.bfloat16).train(), draw(2, 18)
    loss = model(x, labels=x).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    prompt = model.eval().generate(x, max_new_tokens=2, do_sample=False)
    assert prompt.shape == (2, 20)


def test_decays_and_norms_are_free_of_weight_decay(model):
    excluded = no_weight_decay_parameters(model)  # refuses names that do not exist
    assert {n for n, p in model.named_parameters() if p.ndim <= 1} <= excluded
