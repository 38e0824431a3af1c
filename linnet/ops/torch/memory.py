r"""Torch neural memory: mini-batches in sequence, everything inside a mini-batch as matrix products.

Layer l of the network that reads token t sees, without ever forming the weights of that token (the dual form),

    x^T R_t = a_t x^T A + c_t x^T C + f_t x^T S - sum_{j <= t} G_tj (x . h_j) delta_j^T

A, C, S: weights at the last update, now, and their momentum, when the piece begins; h_j, delta_j: input and output gradient of the
layer for the key of token j at A; the coefficients come from the gates alone (`_Coefficients`).

A network without activation and norm is affine in its weights, so that several mini-batches make one chunk of `LINEAR_CHUNK` slots:
the errors X = V - K A solve (I + L) X = V - K (..), L the influence of earlier mini-batches of the chunk. One triangular solve for
all chunks of a group at once, and two products with the state per chunk in sequence.

Slots: tokens fill pieces of c slots, round by round over the rows; an empty slot has rate, log_decay and log_momentum 0 and adds no
momentum to the weights, which is an exact no-op. The state is stored once per group of about sqrt(rounds) pieces; the backward runs
a group again and differentiates it, so that memory is O(T + sqrt(T) P).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops._autograd import operator, records, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype, expand_heads
from linnet.ops.memory import flat_weights

LINEAR_CHUNK = 64  # slots of a chunk of a linear memory, at least


# ---- the network ---------------------------------------------------------------------------------------------------------


def _gelu_slope(x: Tensor) -> Tensor:
    t = torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x))
    return 0.5 * (1 + t) + 0.3989422804014327 * x * (1 - t * t) * (1 + 0.134145 * x * x)


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x @ w if b is None else x @ w + b


ACTIVATIONS = {  # value and derivative
    "gelu": (lambda x: F.gelu(x, approximate="tanh"), _gelu_slope),
    "silu": (F.silu, _silu_slope),
    "relu2": (lambda x: F.relu(x).square(), lambda x: 2 * F.relu(x)),
}


@dataclass(frozen=True)
class _Net:
    """What the memory is. Operands have shape [rows, H, slots, channels], flat weights [rows, H, P]."""

    sizes: tuple[int, ...]
    bias: bool
    residual: bool
    activation: str
    eps: float
    mini_batch: int

    def layers(self, W_NHP: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """(weight [.., a, b], bias [.., 1, b] or None) of every layer, as views."""
        layers, at = [], 0
        for a, b in zip(self.sizes, self.sizes[1:], strict=False):
            w, at = W_NHP[..., at : at + a * b].unflatten(-1, (a, b)), at + a * b
            layers.append((w, W_NHP[..., None, at : at + b] if self.bias else None))
            at += b if self.bias else 0
        return layers

    def normed(self, z: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        return z if norm is None else F.layer_norm(z, z.shape[-1:], eps=self.eps) * norm[0] + norm[1]

    def output_gradient(self, z: Tensor, target: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        """d/dz of 1/2 |LayerNorm(z) - target|^2."""
        if norm is None:
            return z - target
        centred = z - z.mean(-1, keepdim=True)
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        unit = centred * inverse
        d = (unit * norm[0] + norm[1] - target) * norm[0]
        return (d - d.mean(-1, keepdim=True) - unit * (d * unit).mean(-1, keepdim=True)) * inverse

    def backpropagate(
        self, W: Tensor, k: Tensor, v: Tensor, norm: tuple[Tensor, Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and output gradients of every layer for the keys k, targets v and weights W."""
        act, slope = ACTIVATIONS[self.activation]
        layers, inputs, sums = self.layers(W), [k], []
        for w, b in layers:
            sums.append(_affine(inputs[-1], w, b))
            inputs.append(act(sums[-1]) if len(sums) < len(layers) else sums[-1])
        deltas = [self.output_gradient(sums[-1], v - k if self.residual else v, norm)]
        for layer in range(len(layers) - 1, 0, -1):
            deltas.insert(0, (deltas[0] @ layers[layer][0].mT) * slope(sums[layer - 1]))
        return inputs[:-1], deltas

    def gradient(self, inputs: list[Tensor], deltas: list[Tensor], weight_NHc: Tensor) -> Tensor:
        """sum_j weight_j (gradient of token j), flat [rows, H, P]."""
        parts = []
        for h, delta in zip(inputs, deltas, strict=True):
            delta = delta * weight_NHc[..., None]
            parts.append((h.mT @ delta).flatten(-2))
            if self.bias:
                parts.append(delta.sum(-2))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


# ---- coefficients of the gates -------------------------------------------------------------------------------------------


def _products(g: Tensor) -> Tensor:
    """exp(sum_{j < l <= t} g_l) for j <= t, else 0: [.., c] -> [.., t, j]. Sums, not differences: -inf is exact."""
    c = g.shape[-1]
    lower = torch.ones(c, c, dtype=torch.bool, device=g.device).tril()
    sums = g.unsqueeze(-1).expand(*g.shape, c).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~lower, -torch.inf).exp()


class _Coefficients:
    """With all g_j at hand, from weights C and momentum S at the start of a piece of c slots:

        W_t = keep_t C + flow_t S - sum_j write_tj g_j,      S_c = stay S - sum_j last_j g_j

    keep is None for 1 (no decay), flow, stay and last are None without momentum.
    """

    def __init__(self, rate: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None, valid_Rc: Tensor):
        c = rate.shape[-1]
        self.keep = None if log_decay is None else log_decay.cumsum(-1).exp()
        B = rate.new_ones(c, c).tril() if log_decay is None else _products(log_decay)
        self.flow = self.stay = self.last = None
        if log_momentum is not None:
            H, h = _products(log_momentum), log_momentum.cumsum(-1).exp()
            B = B * valid_Rc[:, None, None]  # an empty slot does not move on
            self.flow, self.stay = (B @ h.unsqueeze(-1)).squeeze(-1), h[..., -1]
            self.last = H[..., -1, :] * rate
            B = B @ H
        self.write = B * rate.unsqueeze(-2)

    def rows(self, part: slice) -> _Coefficients:
        """Those of some of the pieces."""
        view = object.__new__(_Coefficients)
        view.__dict__ = {name: None if x is None else x[part] for name, x in self.__dict__.items()}
        return view


def _times(weight: Tensor | None, x: Tensor) -> Tensor:
    """A weight per slot or per state, broadcast to x."""
    return x if weight is None else weight.reshape(weight.shape + (1,) * (x.ndim - weight.ndim)) * x


def _advance(c: _Coefficients, C: Tensor, S: Tensor | None, written_C: Tensor, written_S: Tensor | None):
    """(W_c, S_c) after a piece; written: sum_j write_cj g_j and sum_j last_j g_j."""
    W = _times(None if c.keep is None else c.keep[..., -1], C) - written_C
    if S is None:
        return W, None
    return W + _times(c.flow[..., -1], S), _times(c.stay, S) - written_S


# ---- pieces in sequence --------------------------------------------------------------------------------------------------


class _Rows:
    """A, C, S of the rows that still have tokens; rows leave from the back."""

    def __init__(self, state: Tensor):
        self.now, self.finished = list(state.unbind(1)), []

    def take(self, count: int) -> list[Tensor | None]:
        if count < self.now[0].shape[0]:
            self.finished.append([x[count:] for x in self.now])
            self.now = [x[:count] for x in self.now]
        return [*self.now, None][:3]

    def put(self, A: Tensor, C: Tensor, S: Tensor | None) -> None:
        self.now = [A, C] if S is None else [A, C, S]

    def all(self) -> Tensor:
        return torch.stack([torch.cat([x, *reversed(parts)]) for x, *parts in zip(self.now, *self.finished, strict=True)], 1)


def _mini_batches(net: _Net, state, q, k, v, rate, log_decay, log_momentum, read_scale, norm, valid, anchor, active, first, full):
    """One group of pieces of one mini-batch each (or of one token); see `_group`."""
    rows, outputs, start = _Rows(state), [], 0
    gates = _Coefficients(rate, log_decay, log_momentum, valid)
    act = ACTIVATIONS[net.activation][0]
    for i, count in enumerate(active):
        A, C, S = rows.take(count)
        part = slice(start, start + count)
        start += count
        c, p = gates.rows(part), None if read_scale is None else read_scale[part]
        inputs, deltas = net.backpropagate(A, k[part], v[part], norm)
        write = _times(p, c.write)
        apart = first and i == 0  # the piece may begin inside a mini-batch, where A and C differ
        keep = c.keep
        if p is not None:
            keep = p if keep is None else p * keep
            keep = keep if apart else None if c.keep is None else 1 - p + keep
        terms = [(net.layers(C), keep)]
        if apart and p is not None:
            terms.append((net.layers(A), 1 - p))
        if S is not None:
            terms.append((net.layers(S), c.flow if p is None else p * c.flow))
        x = q[part]
        for layer, (h, delta) in enumerate(zip(inputs, deltas, strict=True)):
            z = sum(_times(weight, _affine(x, *layers[layer])) for layers, weight in terms)
            z = z - (write * (x @ h.mT + 1 if net.bias else x @ h.mT)) @ delta
            x = act(z) if layer < len(inputs) - 1 else z
        x = net.normed(x, norm)
        outputs.append(q[part] + x if net.residual else x)
        if i < full and not apart and S is None and c.keep is None:  # nothing but the steps: one pass over the weights
            R = A - net.gradient(inputs, deltas, write[..., -1, :])
            rows.put(R, R, None)
            continue
        written = net.gradient(inputs, deltas, c.write[..., -1, :])
        C, S = _advance(c, C, S, written, None if S is None else net.gradient(inputs, deltas, c.last))
        R = C if p is None else A + _times(p[..., -1], C - A)
        if i < full:
            rows.put(R, R, S)
        else:
            ends = (anchor[part] >= 0)[:, None, None]
            rows.put(torch.where(ends, R, A), C if p is None else torch.where(ends, R, C), S)
    return torch.cat(outputs), rows.all()


def _chunks(net: _Net, state, q, k, v, rate, log_decay, log_momentum, valid, anchor, active, first, full):
    """One group of chunks of a linear memory; a chunk holds whole mini-batches."""
    rows, size = _Rows(state), q.shape[2]
    c = _Coefficients(rate, log_decay, log_momentum, valid)
    target, skip = (v - k, q) if net.residual else (v, None)
    if net.bias:
        q, k = F.pad(q, (0, 1), value=1.0), F.pad(k, (0, 1), value=1.0)
    matrix = lambda W: None if W is None else W.unflatten(-1, (k.shape[-1], -1))
    slot = torch.arange(size, device=q.device)
    before = slot // net.mini_batch * net.mini_batch - 1  # the last slot that the weights of a slot's gradient have seen
    later = before >= 0
    seen = lambda x: x.index_select(2, before.clamp_min(0)) * later.view(size, *[1] * (x.ndim - 3))  # 0 in the first mini-batch
    k_C = k * later[:, None] if c.keep is None else _times(seen(c.keep), k)
    k_S = None if c.flow is None else _times(seen(c.flow), k)
    k_A = k * ~later[:, None]
    if size > net.mini_batch:
        L = (k @ k.mT) * seen(c.write)
        right = torch.cat([x for x in (target, k_C, k_A, k_S) if x is not None], -1)
        solved = torch.linalg.solve_triangular(L, right, upper=False, unitriangular=True)
        width = k.shape[-1]
        target, k_C, k_A, *rest = solved.split([target.shape[-1], *[width] * (2 if k_S is None else 3)], -1)
        k_S = rest[0] if rest else None
    k_both = k_A + k_C
    writes = (k * c.write[..., -1, :, None]).mT
    last = None if c.last is None else (k * c.last[..., None]).mT
    at = anchor.clamp_min(0)
    pick = lambda x: x.gather(2, at.view(-1, *[1] * (x.ndim - 1)).expand(-1, x.shape[1], 1, *x.shape[3:])).squeeze(2)
    marks = (k * pick(c.write)[..., None]).mT
    C_starts, S_starts, errors, start = [], [], [], 0
    for i, count in enumerate(active):
        A, C, S = (matrix(W) for W in rows.take(count))
        part = slice(start, start + count)
        start += count
        X = target[part] - (k_A[part] @ A + k_C[part] @ C if first and i == 0 else k_both[part] @ C)
        if S is not None:
            X = X - k_S[part] @ S
        C_starts.append(C)
        S_starts.append(S)
        errors.append(X)
        own = c.rows(part)
        W, S_end = _advance(own, C, S, -writes[part] @ X, None if S is None else -last[part] @ X)
        if i < full:
            A = W
        else:
            R = _times(None if own.keep is None else pick(c.keep)[part], C) + marks[part] @ X
            R = R if S is None else R + _times(pick(c.flow)[part], S)
            A = torch.where((anchor[part] >= 0)[:, None, None, None], R, A)
        rows.put(*(None if x is None else x.flatten(-2) for x in (A, W, S_end)))
    o = _times(c.keep, q @ torch.cat(C_starts)) + (c.write * (q @ k.mT)) @ torch.cat(errors)
    if c.flow is not None:
        o = o + _times(c.flow, q @ torch.cat(S_starts))
    return o if skip is None else o + skip, rows.all()


def _group(
    net: _Net, linear: bool, tensors: dict[str, Tensor], valid: Tensor, anchor: Tensor, active: list[int], first: bool, full: int
):  # fmt: skip
    """(o [R, H, c, V], state) of consecutive rounds.

    tensors: by name, the state [N, 2 or 3, H, P] of active[0] rows, q, k, v [R, H, c, *], gates [R, H, c], the norm.
    active: rows in each round, never growing. valid [R, c]: slots with a token.
    anchor [R]: the last slot of the piece that ends a mini-batch, -1 without one.
    first: the first round may begin inside a mini-batch. full: in so many leading rounds every mini-batch ends with the piece.
    """
    get, norm = tensors.get, None
    if "gamma" in tensors:
        norm = tensors["gamma"][:, None], tensors["beta"][:, None]
    operands = [tensors["state"], tensors["q"], tensors["k"], tensors["v"], tensors["rate"], get("log_decay"), get("log_momentum")]
    if linear:
        return _chunks(net, *operands, valid, anchor, active, first, full)
    return _mini_batches(net, *operands, get("read_scale"), norm, valid, anchor, active, first, full)


PIECES = ("q", "k", "v", "rate", "log_decay", "log_momentum", "read_scale")
SHARED = ("gamma", "beta")


def _groups(active: list[int]):
    """(first round, rounds, first piece, end piece) of every group."""
    size = isqrt(max(len(active) - 1, 0)) + 1
    piece = 0
    for start in range(0, len(active), size):
        rounds = active[start : start + size]
        yield start, rounds, piece, piece + sum(rounds)
        piece += sum(rounds)


def _arguments(tensors, part: slice, state: Tensor) -> dict[str, Tensor]:
    present = dict(zip((*PIECES, *SHARED), tensors, strict=True))
    own = {name: x[part] if name in PIECES else x for name, x in present.items() if x is not None}
    return own | {"state": state}


@operator("linnet::neural_memory")
def memory_op(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None, read_scale: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, state: Tensor, valid: Tensor, anchor: Tensor, active: list[int], full: int,
    partial: bool, save: bool,
    sizes: list[int], bias: bool, residual: bool, activation: str, eps: float, mini_batch: int, linear: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output pieces, the state at the end, and that at the start of every group."""
    net = _Net(tuple(sizes), bias, residual, activation, eps, mini_batch)
    tensors, outputs, saved = (q, k, v, rate, log_decay, log_momentum, read_scale, gamma, beta), [], []
    state = state.clone(memory_format=torch.contiguous_format)
    for start, rounds, begin, end in _groups(active):
        if save:
            saved.append(state.clone())
        own = _arguments(tensors, slice(begin, end), state[: rounds[0]])
        o, state[: rounds[0]] = _group(
            net, linear, own, valid[begin:end], anchor[begin:end], rounds, partial and start == 0, full - start
        )
        outputs.append(o)
    return torch.cat(outputs).contiguous(), state, torch.stack(saved) if save else state.new_empty(0, *state.shape)


@memory_op.register_fake
def _(q, k, v, rate, log_decay, log_momentum, read_scale, gamma, beta, state, valid, anchor, active, full, partial, save, *net):
    groups = len(list(_groups(active))) if save else 0
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(groups, *state.shape)


@operator("linnet::neural_memory_backward")
def memory_backward_op(
    do: Tensor, dstate: Tensor, saved: Tensor, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, log_decay: Tensor | None,
    log_momentum: Tensor | None, read_scale: Tensor | None, gamma: Tensor | None, beta: Tensor | None, valid: Tensor,
    anchor: Tensor, active: list[int], full: int, partial: bool,
    sizes: list[int], bias: bool, residual: bool, activation: str, eps: float, mini_batch: int, linear: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the tensors that are given, in their order, then of the state."""
    net = _Net(tuple(sizes), bias, residual, activation, eps, mini_batch)
    tensors = (q, k, v, rate, log_decay, log_momentum, read_scale, gamma, beta)
    grads = [None if x is None else x.new_zeros(x.shape) for x in tensors]
    dstate = dstate.clone(memory_format=torch.contiguous_format)
    for index, (start, rounds, begin, end) in reversed(list(enumerate(_groups(active)))):
        part, first = slice(begin, end), partial and start == 0
        own = _arguments(tensors, part, saved[index, : rounds[0]])
        run = lambda own, part=part, rounds=rounds, first=first, start=start: _group(
            net, linear, own, valid[part], anchor[part], rounds, first, full - start
        )
        _, pull = torch.func.vjp(run, own)
        (found,) = pull((do[part], dstate[: rounds[0]]))
        for name, grad in zip((*PIECES, *SHARED), grads, strict=True):
            if grad is not None:
                (grad[part] if name in PIECES else grad).add_(found[name])
        dstate[: rounds[0]] = found["state"]
    return [x for x in grads if x is not None] + [dstate]


@memory_backward_op.register_fake
def _(do, dstate, saved, q, k, v, rate, log_decay, log_momentum, read_scale, gamma, beta, *rest):
    tensors = (q, k, v, rate, log_decay, log_momentum, read_scale, gamma, beta, dstate)
    return [x.new_empty(x.shape) for x in tensors if x is not None]


def _setup(ctx, inputs, output):
    *tensors, state, valid, anchor, active, full, partial, _, sizes, bias, residual, activation, eps, mini_batch, linear = inputs
    ctx.options = (list(active), full, partial, list(sizes), bias, residual, activation, eps, mini_batch, linear)
    ctx.present = [x is not None for x in tensors]
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2], valid, anchor, *tensors)
    ctx.set_materialize_grads(False)  # the saved states would get zeros of their size


def _backward(ctx, do, dstate, _):
    saved, valid, anchor, *tensors = ctx.saved_tensors
    do = torch.zeros_like(tensors[2]) if do is None else do
    dstate = saved.new_zeros(saved.shape[1:]) if dstate is None else dstate
    grads = iter(memory_backward_op(do, dstate, saved, *tensors, valid, anchor, *ctx.options))
    own = [next(grads) if present else None for present in ctx.present]
    return *own, next(grads), *[None] * 13


memory_op.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(memory_backward_op)


# ---- tokens to slots -----------------------------------------------------------------------------------------------------


class _Plan:
    """Which token stands in which slot. Rows are ordered by their number of pieces, longest first; empty slots read token 0."""

    def __init__(self, q: Tensor, piece: int, mini_batch: int, count: Tensor | None, cu_seqlens: Tensor | None):
        B, T = q.shape[:2]
        self.shape, self.piece, self.index, self.order, self.full = (B, T), piece, None, None, 0
        offset = None if count is None or mini_batch == 1 else count % mini_batch
        if cu_seqlens is not None:
            self._pack(q, mini_batch, offset, cu_seqlens)
            return
        partial = offset is not None and T > 1
        rounds = -(-(T + (mini_batch - 1 if partial else 0)) // piece)
        self.active = [B] * rounds
        begins = torch.arange(0, rounds * piece, piece, device=q.device)[:, None]
        self.valid = (begins + torch.arange(piece, device=q.device) < T).repeat_interleave(B, 0)
        if partial:  # slot s of a row is token s - offset
            slot = torch.arange(rounds * piece, device=q.device).view(rounds, 1, piece)
            token = slot - offset[:, None]
            self.valid = (token >= 0) & (token < T)
            self.index = (token.clamp(0, T - 1) + T * torch.arange(B, device=q.device)[:, None]).flatten(0, 1)
            self.valid = self.valid.flatten(0, 1)
            place = offset[:, None] + torch.arange(T, device=q.device)
            self.inverse = ((place // piece * B + torch.arange(B, device=q.device)[:, None]) * piece + place % piece).flatten()
            used = (offset + T - begins).clamp(0, piece)
        elif offset is not None:  # one token, one slot
            used = torch.where((offset + 1) % mini_batch == 0, mini_batch, 0)[None]
        else:
            used = (T - begins).clamp(0, piece).expand(rounds, B)
            self.full = T // piece if piece % mini_batch == 0 else 0
        self.anchor = (used // mini_batch * mini_batch - 1).clamp_max(piece - 1).flatten()

    def _pack(self, q: Tensor, mini_batch: int, offset: Tensor | None, cu_seqlens: Tensor) -> None:
        edges = cu_seqlens.to(torch.int64).cpu()
        skip = torch.zeros_like(edges[1:]) if offset is None else offset.cpu()
        length = edges.diff()
        pieces = torch.where(length > 0, (length + skip + self.piece - 1) // self.piece, 0)
        order = torch.argsort(pieces, descending=True, stable=True)
        self.active = [int((pieces > i).sum()) for i in range(int(pieces.max()))]
        row = torch.cat([order[:count] for count in self.active])
        begin = torch.repeat_interleave(torch.arange(len(self.active)), torch.tensor(self.active)) * self.piece
        token = (edges[row] - skip[row] + begin)[:, None] + torch.arange(self.piece)
        valid = (token >= edges[row][:, None]) & (token < edges[row + 1][:, None])
        used = (skip[row] + length[row] - begin).clamp(0, self.piece)
        inverse = torch.empty(self.shape[1], dtype=torch.int64)
        inverse[token[valid]] = torch.arange(token.numel()).view(token.shape)[valid]
        there = lambda x: x.to(q.device)
        self.order, self.back, self.index, self.valid = (
            there(order),
            there(order.argsort()),
            there(token.clamp_min(0)),
            there(valid),
        )
        self.index = self.index * self.valid
        self.inverse, self.anchor = there(inverse), there(used // mini_batch * mini_batch - 1)

    def split(self, x: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
        """[B, T, h, ...] -> [R, heads, piece, ...], zeros in empty slots."""
        if x is None:
            return None
        x, (B, T) = expand_heads(x, heads).to(dtype), self.shape
        if self.index is None:
            rounds = len(self.active)
            if rounds * self.piece > T:
                x = torch.cat((x, x.new_zeros(B, rounds * self.piece - T, *x.shape[2:])), 1)
            x = x.unflatten(1, (rounds, self.piece)).transpose(0, 1).flatten(0, 1)
        else:
            x = x.flatten(0, 1)[self.index].masked_fill(~self.valid.view(*self.valid.shape, *[1] * (x.ndim - 2)), 0)
        return x.transpose(1, 2).contiguous()

    def join(self, o: Tensor) -> Tensor:
        """[R, H, piece, V] -> [B, T, H, V]."""
        (B, T), o = self.shape, o.transpose(1, 2)
        if self.index is None:
            return o.unflatten(0, (-1, B)).transpose(0, 1).flatten(1, 2)[:, :T]
        return o.flatten(0, 1)[self.inverse].unflatten(0, (B, T))


@implements("neural_memory", "torch")
def neural_memory(
    q, k, v, weights, biases, rate, log_decay, log_momentum, read_scale, norm_weight, norm_bias, norm_eps, residual, activation,
    mini_batch, initial_state, return_state, cu_seqlens,
):  # fmt: skip
    gates = (rate, log_decay, log_momentum, read_scale)
    dtype, out_dtype = accumulate_dtype(q, *(x for x in gates if x is not None), *weights), v.dtype
    heads = max(x.shape[2] for x in (q, k, v, *gates) if x is not None)
    heads = max(heads, weights[0].shape[0])
    count = W = A = S = None
    if initial_state is not None:
        count, W, *rest = initial_state
        A = rest.pop(0).to(dtype) if mini_batch > 1 else W.to(dtype)
        W, S = W.to(dtype), rest.pop(0).to(dtype) if rest else None
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if W is None:
        W = A = expand_heads(flat_weights(weights, biases), heads, 0).to(dtype).expand(rows, -1, -1)
    if log_momentum is not None and S is None:
        S = torch.zeros_like(W)
    linear = len(weights) == 1 and norm_weight is None
    if linear and read_scale is not None:  # exact where every token is a mini-batch and only its own gradient is scaled
        linear = mini_batch == 1 and log_decay is None and log_momentum is None
        rate, read_scale = (rate * read_scale, None) if linear else (rate, read_scale)
    piece = -(-LINEAR_CHUNK // mini_batch) * mini_batch if linear else mini_batch
    if cu_seqlens is None:
        piece = 1 if q.shape[1] == 1 else min(piece, -(-(q.shape[1] + mini_batch - 1) // mini_batch) * mini_batch)
    plan = _Plan(q, piece, mini_batch, count, cu_seqlens)
    state = torch.stack([A, W] if S is None else [A, W, S], 1)
    state = state if plan.order is None else state[plan.order]
    operands = [plan.split(x, heads, dtype) for x in (q, k, v, rate, log_decay, log_momentum, read_scale)]
    shared = [None if x is None else x.to(dtype) for x in (norm_weight, norm_bias)]
    sizes = [weights[0].shape[1], *(w.shape[2] for w in weights)]
    save = records(*operands, *shared, state)
    o, state, _ = memory_op(
        *operands, *shared, state, plan.valid, plan.anchor, plan.active, plan.full, count is not None, save, sizes,
        biases is not None, residual, activation, norm_eps, mini_batch, linear,
    )  # fmt: skip
    o = plan.join(o).to(out_dtype)
    if not return_state:
        return o, None
    state = state if plan.order is None else state[plan.back]
    tokens = torch.full((rows,), q.shape[1], device=q.device) if cu_seqlens is None else cu_seqlens.to(torch.int64).diff()
    A, W, *rest = state.unbind(1)
    return o, (tokens if count is None else count + tokens, W, *([A] if mini_batch > 1 else []), *rest)
