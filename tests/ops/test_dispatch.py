"""Which backend runs where none is named."""

from __future__ import annotations

import pytest

from linnet.ops import _dispatch


@pytest.fixture
def op():
    """An operator with a quick backend and a safe one; forgotten afterwards."""
    name = "test_dispatch_op"
    yield name
    for backend in _dispatch.BACKENDS:
        _dispatch._implementations.pop((name, backend), None)
        _dispatch._supports.pop((name, backend), None)
        _dispatch._by_name.discard((name, backend))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_backend_by_name_runs_only_where_it_is_named(op, by_name):
    _dispatch.implements(op, "triton", by_name=by_name)(lambda **arguments: "triton")
    _dispatch.implements(op, "torch")(lambda **arguments: "torch")
    assert _dispatch.choose(op, {}) == ("torch" if by_name else "triton")
    assert _dispatch.refusal(op, "triton", {}) is None
    reason = _dispatch.passed_over(op, "triton", {})
    assert reason == ("runs only where a call names it: some GPU checks have not passed" if by_name else None)


def test_a_refusal_stands_before_the_name(op):
    _dispatch.implements(op, "triton", lambda arguments: "too wide", by_name=True)(lambda **arguments: "triton")
    assert _dispatch.passed_over(op, "triton", {}) == "too wide"
