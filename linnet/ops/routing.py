"""Tokens dealt out to several memories, so that every memory sees its own as one packed segment.

A token chooses J of M memories. Its copies are sorted by (memory, row), stably, so that time order holds within a segment; the
recurrence over all memories is then one packed call with M * rows segments, whatever was chosen, and no token is ever dropped.
Work and memory grow with J, not with M. All shapes follow from B, T, J, M and the number of rows: nothing is read on the host.

Shape legend: B batch, T tokens, J choices per token, M memories, N rows of the state (the batch, or the packed documents),
S slots: B * T * J, and B * T more of a shared memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from linnet.ops._dispatch import product_dtype

# Rows of a block come in multiples of this: within whole tiles a matrix product gives a row the same bits wherever it stands, so
# that what one token chooses changes no bit of another's.
_TILE = 16


class _Take(torch.autograd.Function):
    """Row index[s] // copies of x for every slot s; back is the inverse permutation, so that the gradient is a gather too."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x.index_select(0, index // copies if copies > 1 else index)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (back,) = ctx.saved_tensors
        dx = dy.index_select(0, back)
        return (dx.unflatten(0, (-1, ctx.copies)).sum(1) if ctx.copies > 1 else dx), None, None, None


class _GroupedLinear(torch.autograd.Function):
    """y_s = W_{memory of s} x_s for slots sorted by memory, as products of blocks of P slots that share a memory.

    Each memory's slots are padded to whole blocks of a quarter of the average slots per memory (and whole tiles). So there are at
    most 5 M blocks, and padding costs a quarter at most.
    """

    @staticmethod
    def forward(ctx, x_SD: Tensor, weight_MED: Tensor, place_S: Tensor, memory_Z: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(x_SD, weight_MED, place_S, memory_Z)
        ctx.size = size
        y_ZPE = _blocks(x_SD, place_S, memory_Z, size) @ weight_MED.index_select(0, memory_Z).mT
        return y_ZPE.flatten(0, 1).index_select(0, place_S)

    @staticmethod
    def backward(ctx, dy_SE: Tensor):
        x_SD, weight_MED, place_S, memory_Z = ctx.saved_tensors
        dy_ZPE = _blocks(dy_SE, place_S, memory_Z, ctx.size)
        dx_SD = (dy_ZPE @ weight_MED.index_select(0, memory_Z)).flatten(0, 1).index_select(0, place_S)
        products_ZED = dy_ZPE.mT @ _blocks(x_SD, place_S, memory_Z, ctx.size)
        return dx_SD, torch.zeros_like(weight_MED).index_add(0, memory_Z, products_ZED), None, None, None


def _blocks(x_SD: Tensor, place_S: Tensor, memory_Z: Tensor, size: int) -> Tensor:
    rows = memory_Z.shape[0]
    return x_SD.new_zeros(rows * size, x_SD.shape[1]).index_copy(0, place_S, x_SD).unflatten(0, (rows, size))


class Routes:
    """Where the tokens of one call go.

    Args:
        memory_BTJ: the memories that every token chose, J different ones in 0 .. memories - 1.
        memories: M. cu_seqlens: [N+1] offsets of packed documents (B = 1), or None.
        shared: one memory more, number 0, that every token goes to; the chosen ones then count from 1.

    A state is [N, M (+ 1), ...]. The operands of `take` and the state of `open` belong to one call of an operator with the
    `cu_seqlens` of these routes; `put` and `close` bring its output and its state back. One token per row (decoding) is a batch of
    slots instead: only the states of chosen memories enter the operator.
    """

    def __init__(self, memory_BTJ: Tensor, memories: int, cu_seqlens: Tensor | None = None, *, shared: bool = False):
        B, T, J = memory_BTJ.shape
        device = memory_BTJ.device
        self.shape, self.choices, self.shared = (B, T), J, B * T if shared else 0
        self.single = T == 1 and cu_seqlens is None
        if cu_seqlens is None:
            start_N = torch.arange(B + 1, device=device) * T
        else:
            start_N = cu_seqlens.to(torch.int64)
        self.rows, self.memories = start_N.numel() - 1, memories + bool(shared)
        row_BT = torch.searchsorted(start_N[1:].contiguous(), torch.arange(B * T, device=device), right=True)
        row_BT = row_BT.clamp_max(self.rows - 1)
        segment_S, self.order = torch.sort((memory_BTJ.flatten(0, 1) * self.rows + row_BT[:, None]).flatten(), stable=True)
        self.back = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(B * T * J, device=device))
        start_G = torch.searchsorted(segment_S, torch.arange(memories * self.rows + 1, device=device))
        if shared:
            segment_S = torch.cat((row_BT, segment_S + self.rows))
            start_G = torch.cat((start_N[:-1], start_G + B * T))
        self._segment_S, self._start_G = segment_S, start_G
        self.cu_seqlens = None if self.single else start_G.to(torch.int32)

    def take(self, x: Tensor, shared: Tensor | None = None) -> Tensor:
        """x [B, T, ...] in slots [1, S, ...] ([S, 1, ...] when decoding); the shared memory takes `shared` where it is given."""
        y = _Take.apply(x.flatten(0, 1), self.order, self.back, self.choices)
        if self.shared:
            y = torch.cat(((x if shared is None else shared).flatten(0, 1), y))
        return y[:, None] if self.single else y[None]

    def take_choices(self, w_BTJ: Tensor) -> Tensor:
        """A number per choice in slots, 1 for the shared memory."""
        y = _Take.apply(w_BTJ.flatten(), self.order, self.back, 1)
        if self.shared:
            y = torch.cat((y.new_ones(self.shared), y))
        return y[:, None] if self.single else y[None]

    def put(self, y: Tensor, weight_BTJ: Tensor) -> Tensor:
        """Slots back to tokens [B, T, ...]: sum_j weight_j y_j, and the shared memory with weight 1."""
        shared, chosen = y.flatten(0, 1).tensor_split((self.shared,))
        z = _Take.apply(chosen, self.back, self.order, 1).unflatten(0, (*self.shape, self.choices))
        z = (z * weight_BTJ.reshape(*weight_BTJ.shape, *[1] * (z.ndim - 3))).sum(2)
        return (z + shared.unflatten(0, self.shape) if self.shared else z).to(y.dtype)

    def open(self, state: Tensor | None) -> Tensor | None:
        """The state [N, M, ...] of every segment (when decoding: of every slot), for the operator."""
        if state is None:
            return None
        state = state.transpose(0, 1).flatten(0, 1)
        return state.index_select(0, self._segment_S) if self.single else state

    def close(self, new: Tensor | None, old: Tensor | None) -> Tensor | None:
        """The operator's new state as [N, M, ...]; `old` is what `open` took."""
        if new is None:
            return None
        if self.single:
            shape = (self.memories * self.rows, *new.shape[1:])
            before = new.new_zeros(shape) if old is None else old.transpose(0, 1).flatten(0, 1).to(new.dtype)
            new = before.index_copy(0, self._segment_S, new)
        return new.unflatten(0, (self.memories, self.rows)).transpose(0, 1)

    def linear(self, x: Tensor, weight_MED: Tensor) -> Tensor:
        """Slots x [1, S, D] times the matrix of their memory [M, E, D], in the dtype of x (of autocast, if it is on)."""
        M, x_SD, dtype = self.memories, x.flatten(0, 1), product_dtype(x)
        slots = x_SD.shape[0]
        size = _TILE * -(-slots // (4 * M * _TILE))
        blocks = (slots + M * (size - 1)) // size
        start_M = self._start_G[:: self.rows]  # [M+1]
        ends_M = ((start_M.diff() + size - 1) // size).cumsum(0)
        memory_S = self._segment_S // self.rows
        offset_M = F.pad(ends_M[:-1], (1, 0)) * size - start_M[:-1]
        place_S = torch.arange(slots, device=x.device) + offset_M[memory_S]
        memory_Z = torch.searchsorted(ends_M, torch.arange(blocks, device=x.device), right=True).clamp_max(M - 1)
        with torch.autocast(x.device.type, enabled=False):
            y_SE = _GroupedLinear.apply(x_SD.to(dtype), weight_MED.to(dtype), place_S, memory_Z, size)
        return y_SE.unflatten(0, x.shape[:2])
