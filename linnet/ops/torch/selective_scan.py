r"""Torch selective scan (S6): two-level scan over chunks of time, with a backward that recomputes each chunk.

The state of a row evolves elementwise, h_t = a_t h_{t-1} + (delta_t x_t) B_t with a_t = exp(delta_t A), and is never kept for
the whole sequence. A chunk of m tokens is n blocks of L steps. Sweep 1 advances all blocks side by side from zero; the
carries pass through the blocks in n small steps, the total decay of a block being exp(A sum delta); sweep 2 advances all
blocks again from their true starts and stores the states, which one batched matrix product reads out. Only decays in [0, 1]
are formed, so any strength is exact. The backward keeps the state at the start of each chunk, recomputes the rest, and runs
the same two sweeps backward in time for the gradient of the state.

Layout: channels D last (contiguous, vectorised), groups as rows, R = B * G rows of D / G channels. exp2 because its vector code
is about three times as fast as that of exp. A chunk and tile is sized to stay in the last-level cache. Work per token: N D
exponentials and about 6 N D other elementwise operations forward, 3 times that backward. Memory: the operands, one chunk, and
for the backward N D floats per chunk.

Packed segments: where a segment begins, the state that comes in is replaced by the segment's own initial state.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops._autograd import operator, records, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, expand_heads

CHUNK_ELEMENTS = 1 << 21  # N * D * tokens of one chunk and tile
LOG2_E = math.log2(math.e)


# ---- segments --------------------------------------------------------------------------------------------------------


def _boundaries(cu: Tensor | None) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(first token, segment) and (last token, segment) of the segments that are not empty. Reads cu on the host."""
    if cu is None:
        return [], []
    offsets = cu.tolist()
    spans = [(i, s, e) for i, (s, e) in enumerate(zip(offsets, offsets[1:], strict=False)) if e > s]
    return [(s, i) for i, s, _ in spans], [(e - 1, i) for i, _, e in spans]


@dataclass
class _Events:
    """Where a sweep's running state is replaced: tokens (positions in the chunk), their segments and the new values.

    at[j] = (block indices, event indices) of step j. values [R, events, N, D], None for zero.
    """

    tokens: Tensor
    segments: Tensor
    blocks: Tensor
    at: dict[int, tuple[Tensor, Tensor]]
    values: Tensor | None = None


def _events(pairs: list[tuple[int, int]], start: int, end: int, steps: int, device: torch.device) -> _Events | None:
    """Of the sorted (token, segment) pairs those inside [start, end), a chunk of blocks of `steps` tokens."""
    inside = [(t - start, segment) for t, segment in pairs[bisect_left(pairs, (start,)) : bisect_left(pairs, (end,))]]
    if not inside:
        return None

    def index(values):
        return torch.tensor(values, dtype=torch.int64, device=device)

    at = {}
    for j in {t % steps for t, _ in inside}:
        here = [i for i, (t, _) in enumerate(inside) if t % steps == j]
        at[j] = index([inside[i][0] // steps for i in here]), index(here)
    return _Events(index([t for t, _ in inside]), index([s for _, s in inside]), index(sorted({t // steps for t, _ in inside})), at)


# ---- one chunk -------------------------------------------------------------------------------------------------------


def _sweep(factor, total, left, right, carry, out, events, *, backward: bool) -> Tensor:
    """h_j = factor_j h_previous + left_j right_j over one chunk, forward or backward in time; returns the last h [R, N, D].

    factor, out [R, n, L, N, D] (may be one tensor); total() [R, n, N, D], the product of the factors of each block;
    left [R, n, L, 1, D]; right [R, n, L, N, 1]; carry [R, N, D]. At an event its value replaces factor_j h_previous.
    """
    blocks, steps = factor.shape[1], factor.shape[2]
    factors, lefts, rights, outs = (p.unbind(2) for p in (factor, left, right, out))
    order = range(steps - 1, -1, -1) if backward else range(steps)

    def advance(out, previous, j):
        torch.mul(factors[j], previous, out=out)
        if events is not None and j in events.at:
            where, which = events.at[j]
            if events.values is None:
                out.index_fill_(1, where, 0)
            else:
                out.index_copy_(1, where, events.values[:, which])
        return out.addcmul_(lefts[j], rights[j])

    starts = carry.unsqueeze(1)
    if blocks > 1:
        passed = total()
        if events is not None:
            passed.index_fill_(1, events.blocks, 0)
        local = torch.zeros_like(passed)
        for j in order:
            advance(local, local, j)
        starts = torch.empty_like(passed)
        blocks_in_order = list(zip(starts.unbind(1), passed.unbind(1), local.unbind(1), strict=True))[:: -1 if backward else 1]
        blocks_in_order[0][0].copy_(carry)
        for (start, decay, gained), (following, _, _) in zip(blocks_in_order, blocks_in_order[1:], strict=False):
            torch.addcmul(gained, decay, start, out=following)
    previous = starts
    for j in order:
        previous = advance(outs[j], previous, j)
    return previous[:, 0 if backward else -1]


class _Chunk:
    """Tokens [start, end) of one tile, padded to n * L with delta = 0, which leaves the state as it is."""

    def __init__(self, start: int, end: int, delta: Tensor, A2: Tensor):
        self.start, self.end, self.delta, self.A2 = start, end, delta, A2
        self.tokens = end - start
        self.steps = math.isqrt(self.tokens - 1) + 1 if self.tokens > 1 else 1
        self.blocks = -(-self.tokens // self.steps)
        self.padded = self.blocks * self.steps

    def of(self, x: Tensor, ahead: int = 0, extra: int = 0) -> Tensor:
        """Tokens start + ahead ... of x [R, T, *], as many as the padded chunk has and `extra` ones; zero where there are none."""
        x = x[:, self.start + ahead : self.end + ahead + extra]
        missing = self.padded + extra - x.shape[1]
        return F.pad(x, (0, 0, 0, missing)) if missing else x

    def blocked(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.blocks, self.steps))

    def view(self, buffer: Tensor, extra: int = 0) -> Tensor:
        """The beginning of a flat buffer as [R, m + extra, N, D]."""
        shape = self.delta.shape[0], self.padded + extra, *self.A2.shape[1:]
        return buffer[: math.prod(shape)].view(shape)

    def decays(self, buffer: Tensor, extra: int = 0) -> Tensor:
        """a_t [R, m + extra, N, D]."""
        a = self.view(buffer, extra)
        torch.mul(self.of(self.delta, extra=extra).unsqueeze(2), self.A2.unsqueeze(1), out=a)
        return torch.exp2(a, out=a)

    def total(self, ahead: int = 0):
        """A function that gives the product over each block of the decays of tokens t + ahead, [R, n, N, D]."""

        def product():
            a = self.blocked(self.of(self.delta, ahead)).sum(2).unsqueeze(2) * self.A2.unsqueeze(1)
            return torch.exp2(a, out=a)

        return product

    def outer(self, p: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """p [R, T, D] and r [R, T, N] as the left and right operand of a sweep."""
        return self.blocked(self.of(p)).unsqueeze(3), self.blocked(self.of(r)).unsqueeze(4)

    def events(self, pairs) -> _Events | None:
        return _events(pairs, self.start, self.end, self.steps, self.delta.device) if pairs else None


def _bmm(x: Tensor, y: Tensor) -> Tensor:
    """Matrix product over the two leading axes as batch; both contiguous there."""
    return torch.bmm(x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, x.shape[:2])


def _states(chunk: _Chunk, a: Tensor, u: Tensor, B: Tensor, carry: Tensor, state, pairs, out: Tensor):
    """The states of one chunk into `out` [R, m, N, D]; returns the last one and the events of the segments' first tokens."""
    events = chunk.events(pairs)
    if events is not None and state is not None:
        events.values = a[:, events.tokens] * state[:, events.segments]
    left, right = chunk.outer(u, B)
    last = _sweep(chunk.blocked(a), chunk.total(), left, right, carry, chunk.blocked(out), events, backward=False)
    return last, events


# ---- layout ----------------------------------------------------------------------------------------------------------


@dataclass
class _Layout:
    """Rows, tiles and chunks of one call."""

    groups: int
    rows: int
    channels: int
    state: int
    tokens: int
    packed: bool

    @staticmethod
    def of(delta: Tensor, B: Tensor, cu: Tensor | None) -> _Layout:
        groups = B.shape[2]
        return _Layout(groups, delta.shape[0] * groups, delta.shape[2] // groups, B.shape[3], delta.shape[1], cu is not None)

    def tile(self) -> tuple[int, int]:
        """Rows and channels worked on at a time: 64 tokens of them fit the budget."""
        limit = max(CHUNK_ELEMENTS // 64, 1)
        if self.channels * self.state > limit:
            return 1, min(self.channels, max(64, limit // self.state // 64 * 64))
        return max(1, min(self.rows, limit // (self.channels * self.state))), self.channels

    def tiles(self):
        rows, channels = self.tile()
        for r in range(0, self.rows, rows):
            for d in range(0, self.channels, channels):
                yield slice(r, r + rows), slice(d, d + channels)

    def chunk(self) -> int:
        """Tokens per chunk: the power of 4 (so that n = L) that fills the budget."""
        rows, channels = self.tile()
        size = 16
        while 4 * size * rows * channels * self.state <= CHUNK_ELEMENTS and size < min(self.tokens, 1024):
            size *= 4
        return size

    def buffer(self, like: Tensor) -> Tensor:
        """Flat memory for the states of one chunk and one token more (a chunk may be padded to a multiple of its steps)."""
        rows, channels = self.tile()
        size = min(self.chunk(), self.tokens)
        return like.new_empty(rows * (size + math.isqrt(size) + 2) * self.state * channels)

    def spans(self) -> list[tuple[int, int]]:
        size = self.chunk()
        return [(s, min(s + size, self.tokens)) for s in range(0, self.tokens, size)]

    def starts_shape(self) -> tuple[int, int, int, int]:
        return -(-self.tokens // self.chunk()), self.rows, self.state, self.channels

    def split(self, x: Tensor) -> Tensor:
        """[B, T, G*D] -> [R, T, D]."""
        return x.unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(0, 1) if self.groups > 1 else x

    def join(self, x: Tensor) -> Tensor:
        """[R, T, D] -> [B, T, G*D]."""
        return x.unflatten(0, (-1, self.groups)).transpose(1, 2).flatten(2) if self.groups > 1 else x

    def split_state(self, h: Tensor | None) -> Tensor | None:
        """[S, G*D, N] -> [R, N, D], with packed segments [G, S, N, D]."""
        if h is None:
            return None
        h = h.unflatten(1, (self.groups, -1)).mT
        return (h.transpose(0, 1) if self.packed else h.flatten(0, 1)).contiguous()

    def join_state(self, h: Tensor) -> Tensor:
        """The inverse of `split_state`."""
        h = h.transpose(0, 1) if self.packed else h.unflatten(0, (-1, self.groups))
        return h.mT.flatten(1, 2).contiguous()

    def split_A(self, A: Tensor) -> Tensor:
        """[G*D, N] -> [R, N, D]."""
        return A.unflatten(0, (self.groups, -1)).mT.repeat(self.rows // self.groups, 1, 1)

    def join_A(self, dA: Tensor) -> Tensor:
        """[R, N, D] -> [G*D, N], summed over the batch."""
        return dA.unflatten(0, (-1, self.groups)).sum(0).mT.flatten(0, 1).contiguous()

    def split_p(self, p: Tensor) -> Tensor:
        """[B, T, G, N] -> [R, T, N]."""
        return p.transpose(1, 2).flatten(0, 1)

    def join_p(self, p: Tensor) -> Tensor:
        """[R, T, N] -> [B, T, G, N]."""
        return p.unflatten(0, (-1, self.groups)).transpose(1, 2).contiguous()


# ---- the operator ----------------------------------------------------------------------------------------------------


@operator("linnet::selective_scan")
def selective_scan_op(
    delta: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None, cu_seqlens: Tensor | None,
    return_state: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y [B, T, D] without skip and gate, the final state [S, D, N], the states at chunk starts (empty if not asked for)."""
    layout = _Layout.of(delta, B, cu_seqlens)
    firsts, lasts = _boundaries(cu_seqlens)
    state = layout.split_state(h0)
    delta, x, B, C = layout.split(delta), layout.split(x), layout.split_p(B), layout.split_p(C)
    u, A2 = delta * x, layout.split_A(A) * LOG2_E
    y = torch.empty_like(u)
    starts = u.new_empty(layout.starts_shape() if keep else 0)
    if cu_seqlens is None:
        final = torch.empty_like(A2)
    else:
        final = u.new_zeros(layout.rows, cu_seqlens.numel() - 1, *A2.shape[1:]) if state is None else state.clone()
    buffer = layout.buffer(u)
    for r, d in layout.tiles():
        delta_, u_, A2_ = delta[r, :, d], u[r, :, d], A2[r, :, d].contiguous()
        state_ = None if state is None else state[r, ..., d]
        carry = torch.zeros_like(A2_) if state is None or layout.packed else state_
        for i, (s, e) in enumerate(layout.spans()):
            if keep:
                starts[i, r, :, d] = carry
            chunk = _Chunk(s, e, delta_, A2_)
            h = chunk.decays(buffer)
            carry, _ = _states(chunk, h, u_, B[r], carry, state_, firsts, out=h)
            carry = carry.clone()
            y[r, s:e, d] = _bmm(chunk.of(C[r]).unsqueeze(2), h).squeeze(2)[:, : e - s]
            ends = chunk.events(lasts)
            if ends is not None:
                final[r, :, :, d] = final[r, :, :, d].index_copy(1, ends.segments, h[:, ends.tokens])
        if not layout.packed:
            final[r, :, d] = carry
    return layout.join(y), layout.join_state(final) if return_state else u.new_empty(0), starts


@selective_scan_op.register_fake
def _(delta, x, A, B, C, h0, cu_seqlens, return_state, keep):
    layout = _Layout.of(delta, B, cu_seqlens)
    segments = delta.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = delta.new_empty(segments, *A.shape) if return_state else delta.new_empty(0)
    return delta.new_empty(delta.shape), final, delta.new_empty(layout.starts_shape() if keep else 0)


@operator("linnet::selective_scan_backward")
def selective_scan_backward_op(
    dy: Tensor, dfinal: Tensor | None, starts: Tensor, delta: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor,
    h0: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of delta, x, A, B, C and h0 (empty without h0).

    With G_t the gradient of h_t, G_t = dy_t C_t + a_{t+1} G_{t+1}: dC_t = h_t dy_t, dB_t = G_t u_t, du_t = B_t G_t,
    w_t = G_t a_t h_{t-1}, dA = sum_t delta_t w_t, ddelta_t = sum_n A w_t + x_t du_t, dh_0 = a_1 G_1.
    """
    layout = _Layout.of(delta, B, cu_seqlens)
    firsts, lasts = _boundaries(cu_seqlens)
    state, dstate = layout.split_state(h0), layout.split_state(dfinal)
    dy, delta, x = layout.split(dy), layout.split(delta), layout.split(x)
    B, C, A = layout.split_p(B), layout.split_p(C), layout.split_A(A)
    u, A2 = delta * x, A * LOG2_E
    ddelta, du, dA = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(A)
    dB, dC = B.new_zeros(B.shape), C.new_zeros(C.shape)
    dh0 = None
    if state is not None:  # an empty segment hands its gradient through
        dh0 = torch.zeros_like(state) if dstate is None else dstate.clone()
    buffers = [layout.buffer(u) for _ in range(3)]  # reused: fresh memory costs more than the arithmetic on it
    for r, d in layout.tiles():
        delta_, u_, dy_, A2_ = delta[r, :, d], u[r, :, d], dy[r, :, d], A2[r, :, d].contiguous()
        A_, state_ = A[r, :, d].unsqueeze(1), None if state is None else state[r, ..., d]
        dstate_ = None if dstate is None else dstate[r, ..., d]
        G_next = torch.zeros_like(A2_) if dstate is None or layout.packed else dstate_
        for i, (s, e) in reversed(list(enumerate(layout.spans()))):
            chunk = _Chunk(s, e, delta_, A2_)
            decays = chunk.decays(buffers[0], extra=1)
            a = decays[:, :-1]
            start = starts[i, r, :, d]
            h, G = chunk.view(buffers[1]), chunk.view(buffers[2])
            _, begins = _states(chunk, a, u_, B[r], start, state_, firsts, out=h)
            ends = chunk.events(lasts)
            if ends is not None and dstate_ is not None:
                ends.values = dstate_[:, ends.segments]
            left, right = chunk.outer(dy_, C[r])
            G_next = _sweep(
                chunk.blocked(decays[:, 1:]), chunk.total(ahead=1), left, right, G_next, chunk.blocked(G), ends, backward=True
            ).clone()
            tokens = e - s
            dC[r, s:e] += _bmm(h, chunk.of(dy_).unsqueeze(3)).squeeze(3)[:, :tokens]
            dB[r, s:e] += _bmm(G, chunk.of(u_).unsqueeze(3)).squeeze(3)[:, :tokens]
            du[r, s:e, d] = _bmm(chunk.of(B[r]).unsqueeze(2), G).squeeze(2)[:, :tokens]
            w = G.mul_(a)
            if i == 0 and dh0 is not None and not layout.packed:
                dh0[r, :, d] = w[:, 0]
            if begins is not None:
                entering = w[:, begins.tokens]
                if dh0 is not None:
                    dh0[r, :, :, d] = dh0[r, :, :, d].index_copy(1, begins.segments, entering)
            w[:, 1:].mul_(h[:, :-1])
            w[:, 0].mul_(start)
            if begins is not None:
                entering = entering.mul_(state_[:, begins.segments]) if state_ is not None else entering.zero_()
                w.index_copy_(1, begins.tokens, entering)
            torch.mul(w, A_, out=h)
            ddelta[r, s:e, d] = h.sum(2)[:, :tokens]
            dA[r, :, d] += w.mul_(chunk.of(delta_).unsqueeze(2)).sum(1)
    ddelta.addcmul_(x, du)
    du.mul_(delta)
    return (
        layout.join(ddelta), layout.join(du), layout.join_A(dA), layout.join_p(dB), layout.join_p(dC),
        u.new_empty(0) if dh0 is None else layout.join_state(dh0),
    )  # fmt: skip


@selective_scan_backward_op.register_fake
def _(dy, dfinal, starts, delta, x, A, B, C, h0, cu_seqlens):
    new = [p.new_empty(p.shape) for p in (delta, x, A, B, C)]
    return (*new, delta.new_empty(0 if h0 is None else h0.shape))


def _setup(ctx, inputs, output):
    delta, x, A, B, C, h0, cu_seqlens, _, _ = inputs
    ctx.save_for_backward(output[2], delta, x, A, B, C, h0, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal, _):
    starts, delta, x, A, B, C, h0, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    *grads, dh0 = torch.ops.linnet.selective_scan_backward(dy, dfinal, starts, delta, x, A, B, C, h0, cu_seqlens)
    return (*grads, dh0 if h0 is not None else None, None, None, None)


selective_scan_op.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(selective_scan_backward_op)


def _one_token(delta, x, A, B, C, h0):
    """The recurrence itself for T = 1, in the layout of the state; operands as those of the operator."""
    per_channel = x.shape[2] // B.shape[2]
    B, C = (p[:, 0].repeat_interleave(per_channel, dim=1) if p.shape[2] > 1 else p[:, 0] for p in (B, C))  # [B, D | 1, N]
    h = (delta[:, 0] * x[:, 0]).unsqueeze(2) * B
    if h0 is not None:
        h = torch.addcmul(h, torch.exp2(delta[:, 0].unsqueeze(2) * (A * LOG2_E)), h0)
    return (h * C).sum(2).unsqueeze(1), h


@implements("selective_scan", "torch")
def selective_scan(x_BTD, delta_BTD, A_DN, B_BTN, C_BTN, D_D, z_BTD, initial_state, return_state, cu_seqlens):
    dtype = accumulate_dtype(x_BTD, delta_BTD, A_DN)
    x, delta, A = x_BTD.to(dtype), delta_BTD.to(dtype), A_DN.to(dtype)
    B, C = ((p.unsqueeze(2) if p.ndim == 3 else p).to(dtype) for p in (B_BTN, C_BTN))
    groups = math.lcm(B.shape[2], C.shape[2])
    B, C = expand_heads(B, groups), expand_heads(C, groups)
    h0 = initial_state[0].to(dtype) if initial_state is not None else None
    if x.shape[1] == 1 and cu_seqlens is None:
        y, final = _one_token(delta, x, A, B, C, h0)
    else:
        keep = records(x, delta, A, B, C, h0)
        y, final, _ = selective_scan_op(delta, x, A, B, C, h0, cu_seqlens, return_state, keep)
    if D_D is not None:
        y = torch.addcmul(y, x, D_D.to(dtype))
    if z_BTD is not None:
        y = y * F.silu(z_BTD.to(dtype))
    return y.to(x_BTD.dtype), (final,) if return_state else None
