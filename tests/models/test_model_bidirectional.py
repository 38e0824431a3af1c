"""A model of mixers that see later tokens: an encoder without a cache, and never a causal language model."""

from __future__ import annotations

import pytest
import torch

from linnet import LinnetConfig, LinnetForCausalLM
from linnet.models import LinnetModel

LAYERS = ["performer(bidirectional=True)", "rpe_kernel(bidirectional=True, max_distance=7)", "monarch_mixer(bidirectional=True)"]
LAYERS += ["lightnet(bidirectional=True, gate_rank=4)", "dlr(bidirectional=True, d_state=4)", "fsmn(lookahead=2)"]


def config(layers: str) -> LinnetConfig:
    return LinnetConfig(vocab_size=11, d_model=16, heads=2, layers=layers)


@pytest.mark.parametrize("layers", LAYERS)
def test_a_causal_language_model_refuses_it_by_name(layers):
    name, option = layers.partition("(")[0], "lookahead" if "lookahead" in layers else "bidirectional"
    with pytest.raises(ValueError, match=f"{name}: option '{option}' must be (False|0) in a causal language model; got (True|2)"):
        LinnetForCausalLM(config("gla + " + layers))


@pytest.mark.parametrize("layers", LAYERS)
@torch.no_grad()
def test_an_encoder_reads_padded_rows_and_keeps_no_cache(layers):
    model = LinnetModel(config(f"gla + {layers}")).eval()
    ids, mask = torch.randint(0, 11, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    output = model(ids, attention_mask=mask)
    alone = model(ids[:1, 4:]).last_hidden_state
    assert output.past_key_values is None and model.state_bytes() == LinnetModel(config("gla")).state_bytes()
    torch.testing.assert_close(output.last_hidden_state[0, 4:], alone[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="where a state is given or wanted"):
        model(ids, use_cache=True)
