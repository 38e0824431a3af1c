"""Steps in place in PyTorch: the one-token calls of the training operators, one after the other, and the pool around them.

Nothing here reads a value on the host. A padding row computes on some entry and is dropped at the end.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from linnet.ops._dispatch import execute, implements
from linnet.ops._shapes import accumulate_dtype
from linnet.ops.decode import FORMS
from linnet.ops.torch.attention import _ragged


class Rows:
    """Which rows of a batch are real, which entries of the pool they have, and how to put their results back."""

    def __init__(self, slots: Tensor | None, rows: int):
        self.rows = rows
        self.real = None if slots is None else slots >= 0
        if slots is None:
            return
        # What a padding row writes is what the first real row writes: equal values at equal places, in any order. Without any
        # real row, row 0 writes back what it has read.
        self.source = torch.where(self.real, torch.arange(rows, device=slots.device), self.real.int().argmax())
        self.read = slots.clamp_min(0).long()
        self.write = self.read[self.source]

    def take(self, pool: Tensor) -> Tensor:
        return pool[: self.rows] if self.real is None else pool.index_select(0, self.read)

    def choose(self, condition: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
        """new in real rows where the condition [B] holds, old elsewhere."""
        for mask in (condition, self.real):
            if mask is not None:
                new = torch.where(mask.view(-1, *[1] * (new.ndim - 1)), new, old)
        return new

    def put(self, pool: Tensor, new: Tensor) -> None:
        """`new` of a padding row must be what was read."""
        if self.real is None:
            pool[: self.rows].copy_(new)
        else:
            pool.index_copy_(0, self.write, new.index_select(0, self.source).to(pool.dtype))

    def quiet(self, o: Tensor) -> Tensor:
        """Padding rows of an output are zero, whatever they computed on."""
        return o if self.real is None else o.masked_fill(~self.real.view(-1, *[1] * (o.ndim - 1)), 0)


def step(op: str, state: Tensor, slots: Tensor | None, counts: Tensor | None, update: bool, output: bool, **arguments: Any):
    """Any operator whose state is one tensor."""
    form = FORMS[op]
    first = arguments[form.tokens[0]]
    rows = Rows(slots, first.shape[0])
    old = rows.take(state)
    S = kept = old.to(accumulate_dtype(first, old))
    outputs = []
    for t in range(first.shape[1]):
        o, (S,) = execute(op, "torch", form.cut(arguments, slice(None), slice(t, t + 1)) | {"initial_state": (S,)})
        outputs.append(o)
        kept = S if counts is None else rows.choose(counts > t, S, kept)
    if update:
        rows.put(state, rows.choose(None, kept.to(state.dtype), old))
    return rows.quiet(torch.cat(outputs, 1)) if output else None


for _op in FORMS:
    if _op != "softmax_attention":
        implements(f"decode.{_op}", "torch")(partial(step, _op))


@implements("decode.softmax_attention", "torch")
def softmax_attention(q_BTHK, k_BTHK, v_BTHV, scale, state, slots, counts, update, output):
    keys, values, length = state
    batch, tokens = q_BTHK.shape[:2]
    rows = Rows(slots, batch)
    before = rows.take(length)
    entry = torch.arange(batch, device=q_BTHK.device) if slots is None else rows.write
    start = before if slots is None else before[rows.source]
    place = (entry[:, None], (start[:, None] + torch.arange(tokens, device=q_BTHK.device)).clamp_max(keys.shape[1] - 1))
    for pool, new in ((keys, k_BTHK), (values, v_BTHV)):
        new = new.to(pool.dtype)
        if slots is not None:
            new = torch.where(rows.real.any(), new[rows.source], pool[place])
        pool.index_put_(place, new)
    o = None
    if output:
        compute = accumulate_dtype(q_BTHK) if q_BTHK.device.type == "cpu" else q_BTHK.dtype
        q, k, v = (x.to(compute).transpose(1, 2) for x in (q_BTHK, rows.take(keys), rows.take(values)))
        o = rows.quiet(_ragged(q, k, v, before, True, None, scale, False)[0].transpose(1, 2).to(v_BTHV.dtype))
    if update:
        more = tokens if counts is None else counts.clamp(0, tokens)
        rows.put(length, rows.choose(None, before + more, before))
    return o
