"""`linnet bench model` on a CPU: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json

import pytest

from linnet.bench import model

SMALL = ["--device", "cpu", "--d-model", "32", "--num-layers", "1", "--heads", "2", "--vocabulary", "64", "--batch", "2"]


@pytest.mark.parametrize("layer", [*model.PAIRS, "mamba2", "gla(expand_k=1)"])
def test_a_step_of_every_layer(layer, tmp_path, capsys):
    model.main([*SMALL, "--length", "32", "--steps", "2", "--warm", "1", "--layers", layer, "--out", str(tmp_path)])
    (record,) = json.loads((tmp_path / "model.json").read_text())
    assert record["by"] == "linnet" and len(record["seconds"]) == 2 and record["tokens_per_second"] > 0
    assert record["losses"][-1] < record["losses"][0]
    assert f"linnet   {layer}" in capsys.readouterr().out


def test_what_fails_is_a_record(capsys):
    model.main([*SMALL, "--length", "8", "--steps", "1", "--layers", "no_such_mixer"])
    assert "no_such_mixer" in capsys.readouterr().out


@pytest.mark.parametrize(("argument", "value"), [("steps", "0"), ("heads", "3"), ("processes", "-1")])
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=f"argument '{argument}' must"):
        model.main([*SMALL, f"--{argument}", value])
