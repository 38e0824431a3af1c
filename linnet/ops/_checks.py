"""Argument checks of the operators. Every refusal is a ValueError: the operator, the argument, what was expected, what came."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from linnet.ops._dispatch import debugging


def refuse(op: str, argument: str, expected: str, came: object) -> NoReturn:
    raise ValueError(f"{op}: argument '{argument}' must be {expected}; got {came}")


def describe(x: object) -> str:
    """A short description of what came: shape and dtype of a tensor, repr of anything else."""
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)} and dtype {str(x.dtype).removeprefix('torch.')}"
    return repr(x)


def tensor(op: str, name: str, x: object, shape: str, ndim: int | tuple[int, ...], like: Tensor | None = None) -> Tensor:
    """Check that `x` is a floating or complex tensor with `ndim` axes (described by `shape`), on the device of `like`."""
    dims = (ndim,) if isinstance(ndim, int) else ndim
    if not isinstance(x, Tensor):
        refuse(op, name, f"a tensor {shape}", describe(x))
    if x.ndim not in dims:
        refuse(op, name, f"of shape {shape}", describe(x))
    if not (x.is_floating_point() or x.is_complex()):
        refuse(op, name, "a floating-point tensor", describe(x))
    if like is not None and x.device != like.device:
        refuse(op, name, f"on {like.device} like the other operands", f"a tensor on {x.device}")
    if debugging() and x.is_floating_point() and bool(torch.isnan(x).any()):
        refuse(op, name, "free of NaN (checked because linnet.debug() is on)", f"{int(torch.isnan(x).sum())} NaN values")
    return x


def sizes(op: str, name: str, x: Tensor, expected: dict[int, tuple[str, int]]) -> None:
    """Check single axes: `expected` maps an axis to (its name, its size)."""
    for axis, (label, size) in expected.items():
        if x.shape[axis] != size:
            refuse(op, name, f"of size {size} on axis {axis} ({label})", describe(x))


def heads(op: str, counts: dict[str, int]) -> int:
    """The output head count: the largest of `counts`; every other count must divide it."""
    total = max(counts.values())
    for name, count in counts.items():
        if count < 1 or total % count:
            refuse(op, name, f"a tensor whose head count divides {total}, the largest head count of the operands", f"{count} heads")
    return total


def same_dtype(op: str, operands: dict[str, Tensor | None]) -> None:
    first_name, first = next((n, x) for n, x in operands.items() if x is not None)
    for name, x in operands.items():
        if x is not None and x.dtype != first.dtype:
            refuse(op, name, f"of the dtype of '{first_name}' ({first.dtype})", describe(x))


def choice(op: str, name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        refuse(op, name, "one of " + ", ".join(map(repr, allowed)), repr(value))


def cu_seqlens(op: str, cu: Tensor | None, batch: int, tokens: int, device: torch.device) -> int:
    """Check packed-sequence offsets [N+1]; return the number of rows of the state (N, or the batch without packing)."""
    if cu is None:
        return batch
    if not isinstance(cu, Tensor) or cu.ndim != 1 or cu.numel() < 2 or cu.dtype not in (torch.int32, torch.int64):
        refuse(op, "cu_seqlens", "an int32 tensor [N+1] of segment offsets with N >= 1", describe(cu))
    if cu.device != device:
        refuse(op, "cu_seqlens", f"on {device} like the other operands", f"a tensor on {cu.device}")
    if batch != 1:
        refuse(op, "cu_seqlens", "None unless the batch size is 1 (packed sequences)", f"cu_seqlens with batch size {batch}")
    if debugging():
        steps = cu.diff()
        if int(cu[0]) != 0 or int(cu[-1]) != tokens or bool((steps < 0).any()):
            refuse(op, "cu_seqlens", f"non-decreasing from 0 to the number of tokens {tokens}", cu.tolist())
    return cu.numel() - 1


def state(op: str, value: object, shapes: dict[str, tuple[int, ...]], device: torch.device) -> tuple[Tensor, ...] | None:
    """Check a state: None, a tuple with one tensor per entry of `shapes`, or a bare tensor where there is one entry."""
    if value is None:
        return None
    if isinstance(value, Tensor) and len(shapes) == 1:
        value = (value,)
    layout = ", ".join(f"{n} {list(s)}" for n, s in shapes.items())
    if not isinstance(value, (tuple, list)) or len(value) != len(shapes):
        came = f"{len(value)} tensors" if isinstance(value, (tuple, list)) else describe(value)
        refuse(op, "initial_state", f"a tuple ({layout})", came)
    for x, (name, shape) in zip(value, shapes.items(), strict=True):
        if not isinstance(x, Tensor) or tuple(x.shape) != tuple(shape):
            refuse(op, "initial_state", f"a tuple ({layout})", f"{describe(x)} for {name}")
        if x.device != device:
            refuse(op, "initial_state", f"on {device} like the other operands", f"a tensor on {x.device}")
    return tuple(value)


def log_decay(op: str, g: Tensor | None, like: Tensor, tokens: int, key_size: int, bound: float | None = None) -> int:
    """Check a log-decay (None | [H] | [H,K] | [B,T,H] | [B,T,H,K]); return its head count (1 for None)."""
    layouts = "None, [H], [H, K], [B, T, H] or [B, T, H, K]"
    if bound is not None and not (isinstance(bound, (int, float)) and bound <= 0):
        refuse(op, "log_decay_min", "a number <= 0 (a lower bound of the log-decay per token) or None", repr(bound))
    if g is None:
        return 1
    tensor(op, "log_decay", g, layouts, (1, 2, 3, 4), like)
    if g.ndim >= 3:
        sizes(op, "log_decay", g, {0: ("batch", like.shape[0]), 1: ("time", tokens)})
    if g.ndim in (2, 4):
        sizes(op, "log_decay", g, {-1: ("key channels", key_size)})
    if debugging():
        if bool((g > 0).any()):
            refuse(op, "log_decay", "<= 0 (a natural logarithm)", f"a largest value of {float(g.max())}")
        if bound is not None and bool((g < bound).any()):
            refuse(op, "log_decay", f">= log_decay_min = {bound} as declared", f"a smallest value of {float(g.min())}")
    return g.shape[0] if g.ndim <= 2 else g.shape[2]
