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


def test_the_first_backend_that_can_runs_a_call(op):
    _dispatch.implements(op, "triton", lambda arguments: "too wide" if arguments["wide"] else None)(lambda **arguments: "triton")
    _dispatch.implements(op, "torch")(lambda **arguments: "torch")
    assert _dispatch.choose(op, {"wide": False}) == "triton" and _dispatch.choose(op, {"wide": True}) == "torch"
    assert _dispatch.refusal(op, "triton", {"wide": True}) == "too wide"
