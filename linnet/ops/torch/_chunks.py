"""How a batch of sequences is cut into chunks that matrix products can work on.

Every row of the state (a batch row or a packed segment) is cut into chunks of C tokens. Chunk j of all rows that are long
enough forms wave j: with rows sorted by length, the rows of a wave are a prefix of the rows, so a state update is one batched
product whether the batch is regular or packed. Chunks are numbered wave by wave; a span is a run of waves whose operands are
laid out together, [chunks, heads, C, channels], so that temporaries stay small whatever T is. Rows past the end of a sequence
are zero, which every operator treats as an exact no-op.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def power_of_two(x: int) -> int:
    """The smallest power of two >= x."""
    return 1 << max(x - 1, 0).bit_length()


def span_width(rows: int, heads: int) -> int:
    """Waves of one span: about 64 chunks of one head, the fastest on the CPU, and at most 16 waves."""
    return max(1, min(16, 64 // max(1, rows * heads)))


class Chunks:
    """The chunk grid of one call. Reads `cu_seqlens` on the host."""

    def __init__(self, cu_seqlens: Tensor | None, batch: int, tokens: int, chunk: int, heads: int):
        self.batch, self.tokens = batch, tokens
        if cu_seqlens is None:
            starts, lengths = [0] * batch, [tokens] * batch
        else:
            offsets = cu_seqlens.tolist()
            starts, lengths = offsets[:-1], [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
        self.rows = len(lengths)
        self.C = C = min(chunk, power_of_two(max(lengths)))
        self.order = self.index = None
        waves = -(-max(lengths) // C)
        if cu_seqlens is None:
            self.counts = [batch] * waves
        else:
            order = sorted(range(self.rows), key=lambda r: -lengths[r])
            self.counts, index = [], []
            for j in range(waves):
                active = [r for r in order if lengths[r] > j * C]
                self.counts.append(len(active))
                index += [(starts[r] + j * C, min(C, lengths[r] - j * C)) for r in active]
            table = torch.tensor(index, dtype=torch.long).reshape(-1, 2)
            inside = torch.arange(C)
            self.valid = (inside < table[:, 1:]).to(cu_seqlens.device)  # [chunks, C]
            self.index = (table[:, :1] + torch.minimum(inside, table[:, 1:] - 1)).to(cu_seqlens.device)
            if order != list(range(self.rows)):
                self.order = torch.tensor(order, device=cu_seqlens.device)
        self.first = [0]
        for count in self.counts:
            self.first.append(self.first[-1] + count)
        self._buffers: dict[str, Tensor] = {}
        self._per_span = span_width(self.counts[0] if self.counts else 1, heads)

    def spans(self) -> list[tuple[int, int]]:
        """Runs of waves (first, end): enough chunks for efficient batched products, few enough to stay in the cache."""
        waves, width = len(self.counts), self._per_span
        return [(w, min(w + width, waves)) for w in range(0, waves, width)]

    def waves(self, span: tuple[int, int]) -> list[tuple[int, int, int]]:
        """The waves of a span as (first chunk, end, active rows), chunk numbers relative to the span."""
        base = self.first[span[0]]
        return [(self.first[w] - base, self.first[w + 1] - base, self.counts[w]) for w in range(*span)]

    def buffer(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory that the next span reuses under the same name: fresh pages cost more than the copy into them."""
        size = math.prod(shape)
        known = self._buffers.get(name)
        if known is None or known.numel() < size:
            known = self._buffers[name] = torch.empty(size, dtype=dtype, device=like.device)
        return known[:size].view(shape)

    def take(self, name: str, x: Tensor | None, span: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """The rows of x [B, T, H, D] that lie in a span as [chunks, H, C, D], zero past the ends.

        The memory is that of the operand's `name`: it holds until the next span takes the same name.
        """
        if x is None:
            return None
        H, D, C = x.shape[2], x.shape[3], self.C
        if self.index is not None:
            chosen = slice(self.first[span[0]], self.first[span[1]])
            rows = x[0].index_select(0, self.index[chosen].flatten()).unflatten(0, (-1, C))  # [c, C, H, D]
            out = self.buffer(name, (rows.shape[0], H, C, D), x, dtype)
            out.copy_(rows.transpose(1, 2))
            return out.masked_fill_(~self.valid[chosen][:, None, :, None], 0)  # not a product: -inf * 0
        waves, t0 = span[1] - span[0], span[0] * C
        t1 = min(span[1] * C, self.tokens)
        full = (t1 - t0) // C
        out = self.buffer(name, (waves, self.batch, H, C, D), x, dtype)
        if full:
            out[:full].copy_(x[:, t0 : t0 + full * C].unflatten(1, (full, C)).permute(1, 0, 3, 2, 4))
        if full < waves:
            rest = t1 - t0 - full * C
            out[full:, :, :, :rest].copy_(x[:, t1 - rest : t1].transpose(1, 2))
            out[full:, :, :, rest:].zero_()
        return out.flatten(0, 1)

    def put(self, out: Tensor, y: Tensor, span: tuple[int, int]) -> None:
        """Write y [chunks, H, C, D] of a span back into out [B, T, H, D]."""
        C = self.C
        if self.index is not None:
            chosen = slice(self.first[span[0]], self.first[span[1]])
            keep = self.valid[chosen]
            out[0].index_copy_(0, self.index[chosen][keep], y.transpose(1, 2)[keep].to(out.dtype))
            return
        waves, t0 = span[1] - span[0], span[0] * C
        t1 = min(span[1] * C, self.tokens)
        full = (t1 - t0) // C
        y = y.unflatten(0, (waves, self.batch))
        if full:
            out[:, t0 : t0 + full * C].unflatten(1, (full, C)).permute(1, 0, 3, 2, 4).copy_(y[:full])
        if full < waves:
            rest = t1 - t0 - full * C
            out[:, t1 - rest : t1].transpose(1, 2).copy_(y[full, :, :, :rest])

    def takes(self, span: tuple[int, int], dtype: torch.dtype, **operands: Tensor | None) -> list[Tensor | None]:
        """`take` of several operands by name."""
        return [self.take(name, x, span, dtype) for name, x in operands.items()]

    def span_states(self, save: bool, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for the states at the starts of the spans, one block of active rows after the other; empty unless `save`."""
        rows = sum(self.counts[w] for w, _ in self.spans()) if save else 0
        return torch.empty(rows, *shape, dtype=dtype, device=like.device)

    def sort(self, state: Tensor) -> Tensor:
        """Rows of a state in the order of the waves (longest first)."""
        return state if self.order is None else state.index_select(0, self.order)

    def unsort(self, state: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return state if self.order is None else torch.empty_like(state).index_copy_(0, self.order, state)
