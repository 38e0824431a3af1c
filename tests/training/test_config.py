"""Configurations: every key is known, numbers are numbers, the last budget counts."""

import pytest

from linnet.training import list_recipes, load_config
from linnet.training.config import RunConfig, from_dict


def test_overrides_reach_every_section():
    config = load_config(
        overrides=[
            "model.layers=3*kda + attention",
            "training.learning_rate=1e-3",
            "data.context=64",
            "budget.tokens=1000",
            "checkpoints.keep=3",
        ]
    )
    assert config.model == {"layers": "3*kda + attention"} and config.training == {"learning_rate": 1e-3}
    assert (config.data.context, config.budget.tokens, config.checkpoints.keep) == (64, 1000, 3)


def test_dictionary_round_trip():
    config = load_config(recipe="quickstart", overrides=["budget.steps=5"])
    assert from_dict(config.to_dict()) == config and config.budget.minutes is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layer=gla", "unknown model key 'layer' .did you mean 'layers'"),
        ("trainin.seed=1", "unknown section 'trainin' .did you mean 'training'"),
        ("training.learning_rat=1", "did you mean 'learning_rate'"),
        ("data.contxt=1", "did you mean 'context'"),
        ("data.context=long", "data.context must be int; got 'long'"),
        ("data.context=1.5", "data.context must be int; got 1.5"),
        ("data.context=true", "data.context must be int; got True"),
        ("training.output_dir=x", "training.output_dir is set by the run itself; use --out"),
        ("training.max_steps=3", "use budget.steps"),
        ("learning_rate=1", "override must look like section.key=value"),
        ("training.learning_rate", "override must look like section.key=value"),
        ("model.vocab_size=10", "unknown model key"),
    ],
)
def test_bad_overrides_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(overrides=[override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "budget must be exactly one of minutes, steps, tokens"),
        (["budget.steps=0"], "budget.steps must be more than 0; got 0"),
        (["budget.steps=1", "checkpoints.keep=0"], "checkpoints.keep must be more than 0"),
        (["budget.steps=1", "evaluation.points=-1"], "evaluation.points must be at least 0"),
    ],
)
def test_bad_values_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(overrides=overrides).validate()


def test_files(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  layers: 2*gla\ntraining:\n  learning_rate: 2e-3\nbudget:\n  minutes: 1\n")
    config = load_config(path)
    assert config.training["learning_rate"] == 2e-3 and config.budget.minutes == 1.0
    path.write_text("model: [1, 2]")
    with pytest.raises(ValueError, match="section 'model' must be a mapping"):
        load_config(path)
    path.write_text("a: b: c")
    with pytest.raises(ValueError, match=r"run\.yaml.*must be readable YAML"):
        load_config(path)
    with pytest.raises(ValueError, match="unknown recipe 'quickstrt' .did you mean 'quickstart'"):
        load_config(recipe="quickstrt")


def test_recipes_are_valid():
    assert "quickstart" in list_recipes()
    for name in list_recipes():
        assert isinstance(load_config(recipe=name).validate(), RunConfig)
