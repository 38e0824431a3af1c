"""Compiling the kernels of a call at the same time, before the first of them is launched.

A kernel takes a second or two to compile and to load, and an operator has three to ten of them. Its host function names them by
launching them; so the first call of a kind goes through it twice, at first with every launch handed to a pool of threads, where it
ends when the kernel is loaded. (To compile the kernels of a backward along with those of its forward was not faster: much of
Triton's compiler is Python.)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

WORKERS = min(16, (os.cpu_count() or 1) + 1)  # more would only wait for each other
_pool: ContextVar[Callable[..., None] | None] = ContextVar("linnet_kernels_together", default=None)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """kernel[grid], to be called with the kernel's arguments."""
    compiling = _pool.get()
    return kernel[grid] if compiling is None else functools.partial(compiling, kernel, grid)


def together(host: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose kernels, all of them started by `launch`, are compiled at the same time when it is first called.

    A kind of call that differs from those before only in what `_kind` leaves out compiles its kernels one after another.
    """
    known: set[Any] = set()

    @functools.wraps(host)
    def run(*args: Any) -> Any:
        first = next(x for x in args if isinstance(x, Tensor))
        kind = _kind(first, args)
        if kind not in known:
            known.add(kind)
            if _is_ready(first.device):
                _compile(host, args, functools.partial(torch.cuda.set_device, first.device))
        return host(*args)

    return run


def _is_ready(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _kind(first: Tensor, args: Any) -> Any:
    """What decides which kernels a call has, as far as it can be asked at every call: dtypes, options, and of the first operand the
    heads, the channels and roughly how many rows and tokens."""
    rows, tokens, *shape = first.shape
    sorts = [x.dtype if isinstance(x, Tensor) else None if isinstance(x, (tuple, list)) else x for x in args]
    return first.device, rows.bit_length(), tokens.bit_length(), tokens % 64 == 0, *shape, *sorts


def _compile(host: Callable[..., Any], args: Any, prepare_thread: Callable[[], None]) -> None:
    jobs: dict[Any, Future[Any]] = {}

    def compile(kernel: Any, grid: Any, *operands: Any, **constants: Any) -> Any:
        return kernel.run(*operands, grid=grid, warmup=True, **constants).run  # the attribute: asking for it loads the kernel

    def ask(kernel: Any, grid: Any, *operands: Any, **constants: Any) -> None:
        key = id(kernel), *map(_like, operands), *((name, _like(x)) for name, x in constants.items())
        if key not in jobs:
            jobs[key] = pool.submit(compile, kernel, grid, *operands, **constants)

    with ThreadPoolExecutor(WORKERS, initializer=prepare_thread) as pool:
        token = _pool.set(ask)
        try:
            host(*args)
        finally:
            _pool.reset(token)
        wait(jobs.values())  # what failed fails again, and says so, when it is launched


def _like(x: Any) -> Any:
    """What two operands have in common if they are probably compiled to the same kernel."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return x if x < 4096 else x % 16 == 0
    return str(x) if isinstance(x, (float, str)) else (type(x), *getattr(x, "block_shape", ()))
