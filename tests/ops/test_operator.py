"""Operators of torch.library that plain calls pass by: the same numbers, and whoever watches still sees the operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import linnet.ops as ops
from linnet.ops._autograd import Operator
from linnet.ops.torch import recurrent


class Names(TorchDispatchMode):
    """The operators that are called inside the `with` block."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append(operator._schema.name)
        return operator(*args, **(kwargs or {}))


class Marked(Tensor):
    pass


@pytest.fixture
def operands():
    rng = torch.Generator().manual_seed(0)
    x = {n: torch.randn(1, 70, 2, 8, generator=rng) for n in "qkv"}
    return x | {"log_decay": -torch.rand(1, 70, 2, generator=rng)}


@pytest.fixture
def by_library(monkeypatch):
    """How many calls went through torch.library."""
    calls = []
    watched = Operator.watched
    monkeypatch.setattr(Operator, "watched", lambda self, *args: calls.append(self.library._name) or watched(self, *args))
    return calls


def results(x):
    leaves = {n: a.clone().requires_grad_() for n, a in x.items()}
    o = ops.linear_attention(**leaves, backend="torch")[0]
    return [o.detach(), *torch.autograd.grad(o.square().sum(), list(leaves.values()))]


def test_a_plain_call_is_that_of_the_library(operands, by_library):
    plain = results(operands)
    assert by_library == []
    with Names() as names:
        watched = results(operands)
    assert by_library == ["linear_attention", "linear_attention_backward"]
    assert {"linnet::linear_attention", "linnet::linear_attention_backward"} <= set(names.seen)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_nothing_is_recorded_without_gradients(operands, by_library):
    with torch.no_grad():
        o, _ = ops.linear_attention(**operands, backend="torch")
    assert by_library == [] and o.grad_fn is None
    leaf = operands["q"].requires_grad_()
    assert ops.linear_attention(**operands, backend="torch")[0].grad_fn is not None and leaf.requires_grad


def test_subclasses_and_transforms_meet_the_operator(operands, by_library):
    marked = operands | {"q": operands["q"].as_subclass(Marked)}
    ops.linear_attention(**marked, backend="torch")
    assert by_library == ["linear_attention"]


def test_a_compiled_graph_holds_the_operator(operands):
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(lambda x: ops.linear_attention(**x, backend="torch")[0], backend=backend, fullgraph=True)
    want, _ = ops.linear_attention(**operands, backend="torch")
    assert torch.equal(compiled(operands), want)
    assert "linnet.linear_attention.default" in seen


def test_what_the_gradient_needs_is_asked_for(operands):
    """Gradients of some operands only, and of a state alone."""
    state = torch.randn(1, 2, 8, 8, requires_grad=True)
    o, (final,) = ops.linear_attention(**operands, initial_state=state, return_state=True, backend="torch")
    (d,) = torch.autograd.grad(final.sum(), [state], retain_graph=True)
    assert d.abs().sum() > 0 and recurrent.linear_op._function is not None
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        (d,) = torch.autograd.grad(o.square().sum(), [state], create_graph=True)
        d.sum().backward()
