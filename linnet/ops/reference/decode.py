"""Reference steps in place: row by row, the reference of the training operator from the row's entry of the pool."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from linnet.ops._dispatch import execute, implements
from linnet.ops._shapes import accumulate_dtype
from linnet.ops.decode import FORMS


def _entry(op: str, state: Any, entry: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The training operator's state of one row [1, ...]."""
    if op != "softmax_attention":
        return (state[entry, None].to(dtype),)
    used = int(state[2][entry])
    return state[0][entry, None, :used], state[1][entry, None, :used], state[2][entry, None]


def _put(op: str, state: Any, entry: int, new: tuple[Tensor, ...]) -> None:
    if op != "softmax_attention":
        state[entry] = new[0][0].to(state.dtype)
        return
    used = new[0].shape[1]
    state[0][entry, :used], state[1][entry, :used], state[2][entry] = new[0][0], new[1][0], used


def step(op: str, state: Any, slots: Tensor | None, counts: Tensor | None, update: bool, output: bool, **arguments: Any):
    """Any operator of `linnet.ops.decode`."""
    form = FORMS[op]
    first = arguments[form.tokens[0]]
    tokens, outputs = first.shape[1], []
    dtype = accumulate_dtype(first, *(x for x in (state,) if isinstance(x, Tensor)))
    for row in range(first.shape[0]):
        entry = row if slots is None else int(slots[row])
        run = lambda stop, start, row=row: execute(
            op, "reference", form.cut(arguments, slice(row, row + 1), slice(0, stop)) | {"initial_state": start}
        )[:2]  # fmt: skip
        start = _entry(op, state, max(entry, 0), dtype)
        o = run(tokens, start)[0]
        outputs.append(o if entry >= 0 else torch.zeros_like(o))
        count = tokens if counts is None else min(max(int(counts[row]), 0), tokens)
        if update and entry >= 0 and count:
            _put(op, state, entry, run(count, start)[1])
    return torch.cat(outputs) if output else None


for _op in FORMS:
    implements(f"decode.{_op}", "reference")(partial(step, _op))
