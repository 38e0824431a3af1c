"""The model's forward pass: packing, padding, loss, checkpointing, dtypes, compilation, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from linnet.mixers import Mixer, _registry, register_mixer
from linnet.models import LinnetConfig, LinnetForCausalLM, LinnetModel, mlp, register_mlp

HYBRID = "gla + attention + retnet"


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] - want[name]).norm() <= tolerance * want[name].norm(), name


@pytest.mark.parametrize("tie", [True, False])
def test_loss_is_cross_entropy_of_full_logits(make_model, tokens, tie):
    model, x = make_model(HYBRID, torch.float64, tie_embeddings=tie), tokens(2, 9)
    labels = x.clone()
    labels[0, 3] = -100
    logits = model(x).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    want = gradients(model, expected)
    output = model(x, labels=labels)
    assert output.logits is None and output.past_key_values is None
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    assert_same(gradients(model, output.loss), want, 1e-10)


def test_labels_and_logits_on_request(make_model, tokens):
    model, x = make_model(), tokens(2, 5)
    both = model(x, labels=x, return_logits=True)
    assert torch.equal(both.logits, model(x).logits)
    assert model(x, return_logits=False).logits is None
    shifted = F.pad(x[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(x, shift_labels=shifted).loss, both.loss)
    torch.testing.assert_close(model(x, labels=x, num_items_in_batch=torch.tensor(16)).loss, both.loss / 2)
    close = torch.testing.assert_close  # not to the bit: with several threads a product of fewer rows is added up otherwise
    close(model(x, logits_to_keep=2).logits, both.logits[:, -2:])
    close(model(x, logits_to_keep=torch.tensor([0, 3])).logits, both.logits[:, [0, 3]])
    hidden = model(x, output_hidden_states=True).hidden_states
    assert [h.shape for h in hidden] == [(2, 5, 16)] * 3
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(x)).logits, both.logits)
    assert torch.equal(model(x, return_dict=False)[0], both.logits)


def test_packed_documents_are_separate_documents(make_model, tokens):
    """Logits, loss and gradients; the first token of a document is no target of the one before it."""
    model = make_model(HYBRID, torch.float64)
    documents = [tokens(1, n, seed=n) for n in (5, 1, 7)]
    packed, cu = torch.cat(documents, 1), torch.tensor([0, 5, 5, 6, 13], dtype=torch.int32)
    logits = torch.cat([model(d).logits for d in documents], 1)
    torch.testing.assert_close(model(packed, cu_seqlens=cu).logits, logits, rtol=1e-10, atol=1e-10)
    sums = [model(d, labels=d, num_items_in_batch=1).loss for d in documents]
    expected = sum(sums) / (4 + 0 + 6)
    want = gradients(model, expected)
    loss = model(packed, labels=packed, cu_seqlens=cu).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same(gradients(model, loss), want, 1e-9)


def test_packing_by_position_ids_and_by_transformers_names(make_model, tokens):
    """What transformers' padding-free collators send: position_ids that restart, with or without cu_seq_lens_q."""
    model, x = make_model(HYBRID, torch.float64), tokens(1, 8)
    cu, positions = torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    expected = model(x, labels=x, cu_seqlens=cu, return_logits=True)
    for arguments in ({"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}, {"position_ids": positions}):
        got = model(x, labels=x, return_logits=True, **arguments)
        assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_is_inert(make_model, tokens, side):
    model, x = make_model(HYBRID, torch.float64), tokens(3, 8)
    mask = torch.ones_like(x)
    if side == "holes":
        mask[0, [2, 5]] = 0
    else:
        mask[0, : 3 if side == "left" else None] = 0
        mask[0, -3:] = 0 if side == "right" else 1
        mask[0, :5] = 1 if side == "right" else mask[0, :5]
    keep = mask[0].bool()
    other = torch.where(mask == 1, x, (x + 7) % 61)
    output = model(x, attention_mask=mask)
    torch.testing.assert_close(output.logits[0, keep], model(x[:1, keep]).logits[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.logits[1:], model(x[1:]).logits, rtol=1e-10, atol=1e-10)
    assert torch.equal(output.logits, model(other, attention_mask=mask).logits)
    if side != "holes":
        losses = [
            model(x[i : i + 1, mask[i].bool()], labels=x[i : i + 1, mask[i].bool()], num_items_in_batch=1).loss for i in range(3)
        ]
        expected = sum(losses) / (4 + 7 + 7)
        want = gradients(model, expected)
        loss = model(x, attention_mask=mask, labels=x).loss
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert_same(gradients(model, loss), want, 1e-9)


def test_causality(make_model, tokens):
    model, x = make_model(HYBRID), tokens(1, 12)
    other = x.clone()
    other[:, 7] = (x[:, 7] + 1) % 61
    a, b = model(x).logits, model(other).logits
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.equal(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("layers", [HYBRID, "2*rwkv7", "2*hgrn"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, tokens, layers):
    model, x = make_model(layers, torch.float64).train(), tokens(2, 6)
    want = gradients(model, model(x, labels=x).loss)
    model.gradient_checkpointing_enable()
    runs = 0

    def count(*_):
        nonlocal runs
        runs += 1

    handle = model.model.layers[0].mixer_norm.register_forward_hook(count)
    got = gradients(model, model(x, labels=x).loss)
    handle.remove()
    assert runs == 2  # once forward, once recomputed
    assert_same(got, want, 1e-12)
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_recomputation_sees_the_shared_values_of_the_first_run(make_model, tokens, monkeypatch):
    """A mixer that changes a shared value in every layer: the recomputation of a layer must not see the final one."""
    monkeypatch.setattr(_registry, "_registry", dict(_registry._registry))

    @dataclasses.dataclass(frozen=True)
    class AccumulatingConfig:
        d_model: int

    @register_mixer("test_accumulating")
    class Accumulating(Mixer):
        Config = AccumulatingConfig

        def __init__(self, config, **kwargs):
            super().__init__(config, **kwargs)
            self.proj = nn.Linear(config.d_model, config.d_model)

        def reset_parameters(self):
            self.proj.reset_parameters()

        def forward(self, x_BTD, state=None, *, context=None):
            total = context.shared["total"] = context.shared.get("total", 0) + self.proj(x_BTD)
            return torch.tanh(total), None

    model, x = make_model("3*test_accumulating", torch.float64).train(), tokens(2, 6)
    want = gradients(model, model(x, labels=x).loss)
    model.gradient_checkpointing_enable()
    assert_same(gradients(model, model(x, labels=x).loss), want, 1e-12)


def test_bf16_forward_backward_and_autocast(make_model, tokens):
    x = tokens(2, 6)
    reference = make_model(HYBRID)
    exact = reference(x, labels=x).loss
    model = make_model(HYBRID, torch.bfloat16)
    loss = model(x, labels=x).loss
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.05 * exact
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = reference(x, labels=x).loss
    assert abs(loss - exact) < 0.05 * exact
    loss.backward()


def test_autocast_converts_what_projections_read_once(make_model, tokens):
    model, x = make_model("gated_deltanet"), tokens(2, 6)
    seen = []
    for block in model.model.layers:
        block.mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        block.register_forward_pre_hook(lambda _, inputs: seen.append(("residual", inputs[0].dtype)))
    model(x)
    assert set(seen) == {torch.float32, ("residual", torch.float32)}
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    assert set(seen) == {torch.bfloat16, ("residual", torch.float32)}


def test_norms_are_computed_in_fp32(make_model):
    norm = make_model(dtype=torch.bfloat16).model.norm
    x = torch.randn(4, 16).bfloat16()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.equal(norm(x), exact.bfloat16())


@pytest.mark.parametrize("pattern", ["moe(experts=3, top_k=2)", "none"])
def test_other_mlps(make_model, tokens, pattern):
    model, x = make_model(HYBRID, torch.float64, mlp=pattern), tokens(2, 6)
    gradients(model, model(x, labels=x).loss)
    torch.testing.assert_close(model(x).logits[1:], model(x[1:]).logits, rtol=1e-10, atol=1e-10)


def test_moe_with_all_experts_is_their_weighted_sum(make_model):
    moe = make_model("gla", torch.float64, mlp="moe(experts=3, top_k=3)").model.layers[0].mlp
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    p = moe.router(x).softmax(-1)
    torch.testing.assert_close(moe(x), sum(p[..., i, None] * e(x) for i, e in enumerate(moe.experts)), rtol=1e-12, atol=1e-12)


def test_an_mlp_can_be_registered(make_model, tokens, monkeypatch):
    monkeypatch.setattr(mlp, "_mlps", dict(mlp._mlps))

    @register_mlp("test_linear")
    class LinearMLP(nn.Module):
        def __init__(self, d_model, d_ff, bias=False):
            super().__init__()
            self.down_proj = nn.Linear(d_model, d_model, bias=bias)

        def forward(self, x):
            return self.down_proj(x)

    model = make_model("gla", mlp="test_linear(bias=true)")
    assert model.model.layers[0].mlp.down_proj.bias is not None
    model(tokens(1, 3))


def test_initialisation():
    torch.manual_seed(0)
    config = LinnetConfig(
        vocab_size=300,
        d_model=128,
        heads=4,
        layers="2*mamba2",
        num_layers=8,
        tie_embeddings=False,
        initializer_range=0.05,
    )
    model = LinnetForCausalLM(config)
    assert abs(model.lm_head.weight.std() / 0.05 - 1) < 0.02
    assert abs(model.model.embed_tokens.weight.std() / 0.05 - 1) < 0.02
    block = model.model.layers[0]
    assert abs(block.mlp.up_proj.weight.std() / 0.05 - 1) < 0.02
    assert abs(block.mlp.down_proj.weight.std() / (0.05 / 4) - 1) < 0.02  # sqrt(2 * 8) = 4
    # The generic pass leaves the mixers alone: the same seed and class give the same values without a model around them.
    torch.manual_seed(7)
    block.mixer.reset_parameters()
    torch.manual_seed(7)
    alone = type(block.mixer)(block.mixer.config, layer_index=0, num_layers=8)
    for _ in range(2):
        for (name, a), b in zip(block.mixer.named_parameters(), alone.parameters(), strict=True):
            assert a.shape == b.shape, name
        model.init_weights()
    torch.manual_seed(7)
    alone.reset_parameters()
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.initialize_weights()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_model_without_head(make_model, tokens):
    lm, x = make_model(), tokens(2, 5)
    model = LinnetModel(lm.config).eval()
    model.load_state_dict(lm.model.state_dict())
    torch.testing.assert_close(lm.lm_head(model(x).last_hidden_state), lm(x).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds must be given; got neither"),
        ({"inputs_embeds": torch.zeros(2, 5, 16)}, "got both"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must be of shape \[2, 5\].* got \[2, 4\]"),
        ({"attention_mask": torch.zeros(2, 5)}, "at least one real token; got only zeros"),
        ({"position_ids": torch.zeros(3, 5)}, r"position_ids must be of shape \[2, 5\].* got \[3, 5\]"),
        ({"labels": torch.zeros(2, 4)}, r"labels must be of shape \[2, 5\].* got \[2, 4\]"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens needs one row .* got batch size 2"),
        ({"past_key_values": ()}, "past_key_values must be a LinnetCache or None; got tuple"),
        ({"output_attentions": True}, "output_attentions must be false"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(make_model, tokens, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**{"input_ids": tokens(2, 5), **arguments})


@pytest.mark.parametrize("cu", [[0, 4], [1, 5], [0, 4, 3, 5], [0.0, 5.0], [5]])
def test_bad_offsets_are_refused(make_model, tokens, cu):
    with pytest.raises(ValueError, match="cu_seqlens must be"):
        make_model()(tokens(1, 5), cu_seqlens=torch.tensor(cu))


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(make_model, tokens, training):
    model, x = make_model("gated_deltanet + attention").train(training), tokens(2, 70)
    compiled = torch.compile(model, fullgraph=True)
    if training:
        got, want = compiled(x, labels=x), model(x, labels=x)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
        assert_same(gradients(model, got.loss), gradients(model, model(x, labels=x).loss), 1e-4)
    else:
        torch.testing.assert_close(compiled(x, use_cache=False).logits, model(x).logits, rtol=1e-4, atol=1e-4)
