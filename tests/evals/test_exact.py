"""Tier 0, every measure within its limit, and its checks can fail."""

import pytest

from linnet.evals import exact

FAST = [name for name in exact.CHECKS if name != "measures"]  # padding of every mixer is a law of the model


@pytest.mark.parametrize("name", FAST)
def test_exactly(name):
    for row in exact.run_tier0([name]):
        assert row["ok"], f"{row['what']}: {row['value']:.3g}, limit {row['limit']:g}"


@pytest.mark.slow
def test_padding_is_inert_for_every_mixer():
    assert all(row["ok"] for row in exact.run_tier0(["measures"]))


def test_a_wrong_operator_is_noticed(monkeypatch):
    right = exact.ops.delta_rule

    def wrong(*args, erase, **options):
        return right(*args, erase=0.999 * erase, **options)

    monkeypatch.setattr(exact.ops, "delta_rule", wrong)
    for name in ("parity", "permutations", "counting", "rewriting", "kaczmarz"):
        assert not all(row["ok"] for row in exact.run_tier0([name])), name


def test_unknown_checks_are_refused():
    with pytest.raises(ValueError, match="check must be one of parity"):
        exact.run_tier0(["nothing"])
