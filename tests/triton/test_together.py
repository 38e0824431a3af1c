"""Kernels of a call are compiled at the same time, once, and launched in their order."""

from __future__ import annotations

import threading

import pytest
import torch

from linnet.ops.triton import _together
from linnet.ops.triton._together import launch, together


class Kernel:
    """What `launch` asks of a kernel; `meets`: how many compile at the same time before any of them is done."""

    def __init__(self, name, log, meets=None, fails=False):
        self.name, self.log, self.meets, self.fails = name, log, meets, fails

    def __getitem__(self, grid):
        return lambda *operands, **constants: self.run(*operands, grid=grid, warmup=False, **constants)

    def run(self, *operands, grid, warmup, **constants):
        if warmup and self.meets is not None:
            self.meets.wait(timeout=20)
        if self.fails:
            raise ValueError("does not compile")
        self.log.append((self.name, warmup, grid, constants))
        return type("Compiled", (), {"run": None})


@pytest.fixture
def anywhere(monkeypatch):
    """As if tensors of a CPU were a GPU's."""
    compile = _together._compile
    monkeypatch.setattr(_together, "_compile", lambda host, args, _: compile(host, args, lambda: None))
    monkeypatch.setattr(_together, "_is_ready", lambda device: True)


def host_of(kernels):
    @together
    def host(x, scale=1.0):
        for kernel in kernels:
            launch(kernel, (x.shape[0],))(x, C=64)
        return x * scale

    return host


def test_compiled_at_the_same_time_and_launched_in_order(anywhere):
    log, meets = [], threading.Barrier(2)
    host = host_of([Kernel(name, log, meets) for name in "ab"])
    x = torch.ones(2, 128, 4, 16)
    assert host(x, 3.0).sum() == 3 * x.numel()
    assert sorted(log[:2]) == [(name, True, (2,), {"C": 64}) for name in "ab"]
    assert log[2:] == [(name, False, (2,), {"C": 64}) for name in "ab"]


def test_once_for_a_kind_of_call(anywhere):
    log = []
    host = host_of([Kernel("a", log)])
    compiled = lambda: sum(warmup for _, warmup, *_ in log)
    host(torch.ones(2, 128, 4, 16))
    host(torch.ones(2, 192, 4, 16))  # as many whole chunks, roughly
    assert compiled() == 1
    for count, x in enumerate((torch.ones(2, 130, 4, 16), torch.ones(2, 128, 4, 32), torch.ones(2, 128, 4, 16).half()), 2):
        host(x)
        assert compiled() == count


def test_what_does_not_compile_says_so_when_it_is_launched(anywhere):
    log = []
    host = host_of([Kernel("a", log), Kernel("b", log, fails=True)])
    with pytest.raises(ValueError, match="does not compile"):
        host(torch.ones(2, 128, 4, 16))
    assert [entry[:2] for entry in log] == [("a", True), ("a", False)]


def test_nothing_is_compiled_ahead_elsewhere():
    log = []
    host_of([Kernel("a", log)])(torch.ones(2, 128, 4, 16))
    assert [warmup for _, warmup, *_ in log] == [False]
