"""Layer patterns and the configuration."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from linnet.models import LinnetConfig, parse_layers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gla", [("gla", {})]),
        ("3*gla + attention", [("gla", {})] * 3 + [("attention", {})]),
        ("2*(gla + attention)", [("gla", {}), ("attention", {})] * 2),
        ("2*(2*a+b)+c", [("a", {}), ("a", {}), ("b", {})] * 2 + [("c", {})]),
        ("2*3*a", [("a", {})] * 6),
        (" a ( x = 1 , y=-2.5e-3 ) ", [("a", {"x": 1, "y": -2.5e-3})]),
        ("a(x=true, y=None, z=word)", [("a", {"x": True, "y": None, "z": "word"})]),
        ("a(w='two words', v=[1, 2.0])", [("a", {"w": "two words", "v": [1, 2.0]})]),
        ("a(f='elu+1')", [("a", {"f": "elu+1"})]),
        ("a()", [("a", {})]),
        (["2*a", {"mixer": "b", "x": 1}, "c"], [("a", {}), ("a", {}), ("b", {"x": 1}), ("c", {})]),
    ],
)  # fmt: skip
def test_patterns(text, expected):
    assert [tuple(spec) for spec in parse_layers(text)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"layers: expected a mixer name, a count or '\(' at position 0 of ''; got the end"),
        ("gla +", r"a count or '\(' at position 5 of 'gla \+'; got the end"),
        ("gla attention", r"expected '\+' or the end at position 4 .* got 'attention'"),
        ("0*gla", r"expected a whole number of layers >= 1 at position 0 .* got '0'"),
        ("1.5*gla", r"whole number of layers >= 1 at position 0 .* got '1.5'"),
        ("3 gla", r"expected '\*' after the count 3 at position 2 .* got 'gla'"),
        ("2*(gla", r"expected '\)' at position 6 .* got the end"),
        ("gla)", r"expected '\+' or the end at position 3 .* got '\)'"),
        ("gla(x)", r"expected '=' after the option 'x' at position 5 .* got '\)'"),
        ("gla(x=)", r"expected a number, true, false.* at position 6 .* got '\)'"),
        ("gla(x=1 y=2)", r"expected ',' or '\)' at position 8 .* got 'y'"),
        ("gla(x=1, x=2)", r"expected every option once at position 9 .* got 'x'"),
        ("gla(__import__('os'))", r"expected '=' after the option '__import__' at position 14 .* got '\('"),
        ("gla; rm", r"expected a name, a number .* at position 3 .* got ';'"),
        ("99999999*gla", r"at most 10000 layers at position 0 .* got 99999999"),
        ([], r"layers must be a pattern .* or a non-empty list; got \[\]"),
        ([{"name": "gla"}], r"layers\[0\] must be .* a dictionary with the key 'mixer'; got {'name': 'gla'}"),
        (["gla", "a+"], r"layers\[1\]: expected a mixer name"),
        (3, r"layers must be a pattern .* got 3"),
    ],
)  # fmt: skip
def test_bad_patterns_say_where_and_what(text, message):
    with pytest.raises(ValueError, match=message):
        parse_layers(text)


def tiny(**options) -> LinnetConfig:
    return LinnetConfig(**{"vocab_size": 11, "d_model": 16, "heads": 2, "layers": "gla + attention", **options})


def test_layers_are_repeated_and_cut():
    assert [s.mixer for s in tiny(num_layers=5).layer_specs] == ["gla", "attention", "gla", "attention", "gla"]
    assert tiny().num_layers == 2


def test_layer_types_are_those_of_transformers():
    config = tiny(layers="gla + attention + attention(window=4)")
    assert config.layer_types == ["linear_attention", "full_attention", "sliding_attention"]


def test_names_of_transformers_read_and_write():
    config = LinnetConfig(
        vocab_size=11, hidden_size=32, num_attention_heads=4, num_hidden_layers=3, intermediate_size=48, layers="gla",
        rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    assert (config.d_model, config.heads, config.num_layers, config.d_ff) == (32, 4, 3, 48)
    assert (config.norm_eps, config.tie_embeddings) == (1e-5, False)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (32, 3, 48)


def test_d_ff_is_a_multiple_of_64():
    assert tiny(d_model=512, heads=4).d_ff == 1408  # 512 * 8/3 = 1365.3
    assert tiny(d_model=48, heads=4, mlp_ratio=4).d_ff == 192


@pytest.mark.parametrize(
    "layers",
    ["2*(gla(expand_v=2) + attention(window=3))", ["gla", {"mixer": "attention", "window": 3}]],
    ids=["pattern", "list"],
)
def test_round_trip_through_json(tmp_path, layers):
    config = tiny(layers=layers, num_layers=6, tie_embeddings=False, pad_token_id=0, eos_token_id=3, mlp_ratio=2)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, LinnetConfig)
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert again.layer_specs == config.layer_specs
    assert json.loads((tmp_path / "config.json").read_text())["layers"] == layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "gla + atention"}, r"layer 1 \(atention\): .* must be one of .* got 'atention' \(did you mean 'attention'\?\)"),
        ({"layers": "gla + attention(windw=3)"}, r"layer 1 .*option must be one of .*window.* got 'windw'"),
        ({"layers": "gla(d_model=3)"}, r"option must not be 'd_model'"),
        ({"num_layers": 1}, r"num_layers must be at least 2, the layers .* got 1"),
        ({"num_layers": 0}, r"num_layers must be an integer >= 1 or None; got 0"),
        ({"d_model": 0}, r"d_model must be an integer >= 1; got 0"),
        ({"vocab_size": True}, r"vocab_size must be an integer >= 1; got True"),
        ({"norm_eps": -1.0}, r"norm_eps must be a number > 0; got -1.0"),
        ({"mlp": "swiglo"}, r"mlp must be one of .* got 'swiglo' \(did you mean 'swiglu'\?\)"),
        ({"mlp": "moe(expert=3)"}, r"mlp 'moe': option must be one of experts, top_k; got 'expert'"),
        ({"d_modle": 8}, r"unknown argument 'd_modle' \(did you mean 'd_model'\?\)"),
    ],
)  # fmt: skip
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_a_layer_may_have_its_own_heads(make_model):
    model = make_model("attention(heads=4) + gla")
    assert [layer.mixer.config.heads for layer in model.model.layers] == [4, 2]
