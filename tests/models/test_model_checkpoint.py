"""Save and load: same bits, same logits, nothing initialised again, torn files refused by name."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from linnet.models import LinnetConfig, LinnetForCausalLM, LinnetModel

LAYERS = "gated_deltanet + attention + mamba2"


@pytest.fixture
def saved(make_model, tmp_path):
    model = make_model(LAYERS, d_model=32)
    with torch.no_grad():  # no parameter has the value of an initialisation
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def same_bits(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


@pytest.mark.parametrize("tie", [True, False])
def test_auto_classes_give_the_same_model(make_model, tokens, tmp_path, tie):
    model, x = make_model(LAYERS, d_model=32, tie_embeddings=tie), tokens(2, 7)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and isinstance(AutoConfig.from_pretrained(tmp_path), LinnetConfig)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, LinnetForCausalLM) and same_bits(again, model)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie
    assert torch.equal(again(x).logits, model(x).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, LinnetModel) and same_bits(base, model.model)


def test_loading_never_initialises_again(saved, monkeypatch):
    """Neither the generic pass nor a mixer's own initialisation touches what was loaded, whatever random numbers it draws."""
    model, path = saved
    for mixer in {type(layer.mixer) for layer in model.model.layers}:
        original = mixer.reset_parameters

        def spoil(self, original=original):
            if not any(p.is_meta for p in self.parameters()):
                raise AssertionError("initialised again")
            original(self)

        monkeypatch.setattr(mixer, "reset_parameters", spoil)
    assert same_bits(LinnetForCausalLM.from_pretrained(path), model)


@pytest.mark.parametrize(
    "missing", ["model.layers.0.mixer.A_log", "model.layers.1.mlp.up_proj.weight", "model.layers.2.mixer_norm.weight"]
)
def test_a_missing_tensor_is_named_and_initialised_alone(saved, missing, caplog):
    model, path = saved
    tensors = load_file(path / "model.safetensors")
    del tensors[missing]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    logging.enable_propagation()
    again, report = LinnetForCausalLM.from_pretrained(path, output_loading_info=True)
    logging.disable_propagation()
    assert set(report["missing_keys"]) == {missing} and missing in caplog.text
    got, want = again.state_dict(), model.state_dict()
    assert {k for k in want if not torch.equal(got[k], want[k])} == {missing}
    assert got[missing].isfinite().all()
    if "A_log" in missing:  # Mamba's: A uniform, not the generic normal
        assert (got[missing] <= torch.tensor(16.0).log()).all() and got[missing].std() > 0.02
    if missing.endswith("norm.weight"):
        assert torch.equal(got[missing], torch.ones(32))


@pytest.mark.parametrize("keep", [0, 5, 100, -1], ids=["empty", "in_length", "in_header", "in_data"])
def test_a_torn_file_is_refused_by_name(saved, keep):
    _, path = saved
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    for load in (LinnetForCausalLM, AutoModelForCausalLM):
        with pytest.raises(OSError, match=f"corrupt checkpoint: {file}"):
            load.from_pretrained(path)
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before


def test_a_torn_shard_is_refused_by_name(make_model, tmp_path):
    make_model(LAYERS, d_model=32).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and same_bits(LinnetForCausalLM.from_pretrained(tmp_path), make_model(LAYERS, d_model=32))
    shards[1].write_bytes(shards[1].read_bytes()[:-4])
    with pytest.raises(OSError, match=f"corrupt checkpoint: {shards[1]}:"):
        LinnetForCausalLM.from_pretrained(tmp_path)


def test_a_torn_configuration_is_refused_by_name(saved):
    _, path = saved
    (path / "config.json").write_text((path / "config.json").read_text()[:40])
    with pytest.raises(OSError, match="config.json"):
        LinnetForCausalLM.from_pretrained(path)


def test_an_unknown_mixer_in_a_checkpoint_is_refused_by_name(saved):
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"layers": "somebody_elses"}))
    with pytest.raises(ValueError, match="got 'somebody_elses'"):
        LinnetForCausalLM.from_pretrained(path)


def test_bf16_loading(saved, tokens):
    model, path = saved
    half = LinnetForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for (name, p), q in zip(half.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q if name.endswith(("A_log", "dt_bias")) else q.bfloat16()), name  # decays keep their precision
    assert half.model.layers[0].mixer.A_log.dtype == torch.float32
    output = half(tokens(1, 5), labels=tokens(1, 5), return_logits=True)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()


def test_loaded_weights_do_not_depend_on_the_file_any_more(saved):
    model, path = saved
    again = LinnetForCausalLM.from_pretrained(path)
    with open(path / "model.safetensors", "r+b") as file:
        file.seek(-50_000, 2)
        file.write(bytes(50_000))
    assert same_bits(again, model)
    assert all(p.data_ptr() % 64 == 0 for p in again.parameters())


def test_resizing_the_vocabulary_keeps_the_rest(saved, tokens):
    model, _ = saved
    x, before = tokens(1, 5), None
    before = model(x).logits
    model.resize_token_embeddings(80, mean_resizing=False)
    after = model(x).logits
    assert after.shape[-1] == 80 and model.config.vocab_size == 80
    torch.testing.assert_close(after[..., : before.shape[-1]], before)


def test_a_fresh_process_needs_one_import(saved, tokens, tmp_path):
    model, path = saved
    x = tokens(1, 6)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, linnet.models; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(torch.load(sys.argv[1] + '/x.pt')).logits.detach(), sys.argv[1] + '/y.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(x).logits)
