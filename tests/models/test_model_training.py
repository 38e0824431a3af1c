"""Weight decay groups, and a step of transformers' Trainer."""

from __future__ import annotations

import pytest
import torch

from linnet.models import no_weight_decay_parameters, parameter_groups


def test_what_weight_decay_leaves_alone(make_model):
    model = make_model("gla + mamba")
    excluded = no_weight_decay_parameters(model)
    parameters = dict(model.named_parameters())
    assert {n for n, p in parameters.items() if p.ndim <= 1} < excluded
    for index, layer in enumerate(model.model.layers):
        for name in layer.mixer.no_weight_decay:
            assert any(x.startswith(f"model.layers.{index}.mixer.{name}") for x in excluded), name
    assert parameters["model.layers.1.mixer.A_log"].ndim == 2 and "model.layers.1.mixer.A_log" in excluded
    assert "model.layers.0.mlp.up_proj.weight" not in excluded and "model.embed_tokens.weight" not in excluded
    assert no_weight_decay_parameters(model, decay_embeddings=False) - excluded == {"model.embed_tokens.weight"}


def test_parameter_groups_hold_every_trained_parameter_once(make_model):
    model = make_model("gla + mamba")
    model.model.norm.weight.requires_grad_(False)
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    ids = [id(p) for group in (decayed, kept) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.5), lr=1.0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(before) - no_weight_decay_parameters(model) - {"model.norm.weight"}


def test_a_declared_name_that_does_not_exist_is_refused(make_model, monkeypatch):
    model = make_model("gla")
    monkeypatch.setattr(type(model.model.layers[0].mixer), "no_weight_decay", ("no_such_thing",))
    with pytest.raises(ValueError, match="mixer 'gla': no_weight_decay names 'no_such_thing'"):
        no_weight_decay_parameters(model)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_steps(make_model, tokens, tmp_path, accumulation):
    """Two rows at once, or one after the other with accumulation: the same update, though their lengths differ."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = make_model("gla + attention", tie_embeddings=False)
    x = tokens(2, 12)
    labels = x.clone()
    labels[1, 4:] = -100
    data = [{"input_ids": a, "labels": b} for a, b in zip(x, labels, strict=True)]
    expected = model(x, labels=labels).loss
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2 // accumulation, gradient_accumulation_steps=accumulation,
        learning_rate=0.1, max_grad_norm=0.0, optim="sgd", lr_scheduler_type="constant", report_to=[], use_cpu=True,
        save_strategy="no",
        eval_strategy="steps", eval_steps=1, disable_tqdm=True, gradient_checkpointing=accumulation == 2,
    )  # fmt: skip
    before = model.lm_head.weight.detach().clone()
    (gradient,) = torch.autograd.grad(expected, model.lm_head.weight)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    result = trainer.train()
    assert abs(result.training_loss - expected.item()) < 1e-5 * expected.item()
    torch.testing.assert_close(model.lm_head.weight.detach(), before - 0.1 * gradient, rtol=1e-4, atol=1e-6)
    (evaluated,) = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated < expected.item()


def test_lora_trains_and_generates(make_model, tokens):
    peft = pytest.importorskip("peft")
    x = tokens(2, 6)
    model = make_model("gla + attention")
    before = model(x).logits
    lora = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"]))
    torch.testing.assert_close(lora(input_ids=x).logits, before)
    lora(input_ids=x, labels=x).loss.backward()
    trained = {n for n, p in lora.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in n for n in trained)
    assert lora.generate(input_ids=x, max_new_tokens=3, do_sample=False).shape == (2, 9)
