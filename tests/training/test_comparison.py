"""Groups of mixers by name, and several runs at a time."""

from __future__ import annotations

import json

import pytest

from linnet.mixers import get_mixer, list_mixers
from linnet.mixers._base import FAMILIES
from linnet.training.comparison import arms_of, compare
from linnet.training.config import load_config


def test_groups_divide_the_mixers():
    names = {family: [arm.name for arm in arms_of((), [f"all-{family}"], 1)] for family in FAMILIES}
    assert sorted(sum(names.values(), [])) == list_mixers() == [arm.name for arm in arms_of((), ["all"], 1)]
    assert "mamba" in names["diagonal"] and "kda" in names["delta"] and names["softmax"] == ["attention"]
    assert [arm.name for arm in arms_of((), ["all-softmax", "gla"], 1)] == ["attention", "gla"]
    with pytest.raises(ValueError, match="mixers must be names or one of all, all-diagonal, .*; got 'all-dleta'"):
        arms_of((), ["all-dleta"], 1)
    with pytest.raises(ValueError, match="more than once"):
        arms_of((), ["all-softmax", "attention"], 1)


@pytest.mark.parametrize("name", list_mixers())
def test_every_mixer_belongs_to_a_family(name):
    assert get_mixer(name).family in FAMILIES


@pytest.mark.slow
def test_jobs_give_the_rows_that_one_process_gives(tmp_path):
    overrides = ["model.d_model=32", "model.heads=2", "data.context=64", "data.tokens_per_batch=128", "budget.steps=3"]
    config = load_config(recipe="quickstart", overrides=[*overrides, "evaluation.max_bytes=4096", "evaluation.points=1"])
    arms = arms_of((), ["gla", "retnet"], 1)
    rows = {jobs: compare(config, tmp_path / str(jobs), arms, jobs=jobs) for jobs in (1, 2)}
    score = {jobs: {row["arm"]: row["bits_per_byte"] for row in rows[jobs]} for jobs in rows}
    assert score[1] == score[2]
    saved = [json.loads(line) for line in (tmp_path / "2" / "results.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in saved} == {"gla", "retnet"}
