"""Which backend computes an operator, and the one handler that every operator call goes through.

A public operator checks its arguments, fills in defaults and calls `call(op, backend, **arguments)`. The handler is
replaceable (`use_handler`), so that sequence parallelism or a recorder can wrap every operator of a model from outside
without touching a mixer. Backends register implementations under the operator's name; an implementation has the signature
of the public function without `backend`, and receives arguments that were already checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

BACKENDS = ("triton", "torch", "reference")  # in order of preference
Handler = Callable[[str, "str | None", dict[str, Any]], Any]

_implementations: dict[tuple[str, str], Callable] = {}
_supports: dict[tuple[str, str], Callable[[dict[str, Any]], str | None]] = {}
_handler: Handler | None = None
_debug = False


def implements(op: str, backend: str, supports: Callable[[dict[str, Any]], str | None] | None = None):
    """Decorator: register a function as the implementation of `op` in `backend`.

    `supports(arguments)` returns None if the backend can compute this call and a one-sentence reason if it cannot.
    """

    def register(function):
        _implementations[op, backend] = function
        if supports is not None:
            _supports[op, backend] = supports
        return function

    return register


def operators() -> list[str]:
    """The names of all operators that have an implementation."""
    return sorted({op for op, _ in _implementations})


def backends_of(op: str) -> list[str]:
    """The backends that implement `op`, in order of preference."""
    return [name for name in BACKENDS if (op, name) in _implementations]


def refusal(op: str, backend: str, arguments: dict[str, Any]) -> str | None:
    """Why `backend` cannot compute this call of `op`; None if it can."""
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)} or None; got {backend!r}")
    if (op, backend) not in _implementations:
        return f"{op} has no {backend} backend in this installation"
    check = _supports.get((op, backend))
    return check(arguments) if check is not None else None


def choose(op: str, arguments: dict[str, Any]) -> str:
    """The backend that runs this call when none is named: the first one that can; `reference` only by name."""
    for backend in BACKENDS[:-1]:
        if (op, backend) in _implementations and refusal(op, backend, arguments) is None:
            return backend
    return "reference"


def execute(op: str, backend: str | None, arguments: dict[str, Any]) -> Any:
    """Run an operator on this process: what the handler does unless it was replaced."""
    if backend is None:
        backend = choose(op, arguments)
    else:
        reason = refusal(op, backend, arguments)
        if reason is not None:
            raise ValueError(f"{op}: backend={backend!r} cannot run this call: {reason}")
    device = next(x.device.type for x in arguments.values() if isinstance(x, torch.Tensor))
    if torch.is_autocast_enabled(device):  # a backend chooses its own precision: sums and states stay in at least fp32
        with torch.autocast(device, enabled=False):
            return _implementations[op, backend](**arguments)
    return _implementations[op, backend](**arguments)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which linear layers multiply x: its own, or that of autocast, if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def call(op: str, backend: str | None, **arguments: Any) -> Any:
    """Entry point of every public operator."""
    if _handler is not None:
        return _handler(op, backend, arguments)
    return execute(op, backend, arguments)


@contextlib.contextmanager
def use_handler(handler: Handler) -> Iterator[None]:
    """Send every operator call of this process through `handler(op, backend, arguments)` inside the `with` block.

    The handler calls `linnet.ops.execute` to compute. Handlers nest: the previous one is restored at the end.
    """
    global _handler
    previous, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = previous


class debug:
    """Check the values of operator arguments (NaN, positive log-decays, order of cu_seqlens, declared bounds).

    `linnet.debug()` turns the checks on, `linnet.debug(False)` off; as a context manager it restores the previous setting.
    Off by default: the checks read values, which breaks graphs and synchronises GPUs.
    """

    def __init__(self, enabled: bool = True):
        global _debug
        self._previous, _debug = _debug, bool(enabled)

    def __enter__(self) -> debug:
        return self

    def __exit__(self, *_: object) -> None:
        global _debug
        _debug = self._previous


def debugging() -> bool:
    """Whether `linnet.debug()` is on."""
    return _debug and not torch.compiler.is_compiling()
