"""Decay inside a chunk without exponentials of sums: a binary tree of products.

Let a_t = e^{g_t} in [0, 1] and cut a chunk of C = 2^m tokens into blocks of h = 1, 2, 4, ..., C/2 tokens. For every block keep
    P_h(t) = product of a from the block's first token through t      (what decays between the block's start and a read at t)
    E_h(t) = the same without a_t                                     (a read before the decay of t)
    S_h(i) = product of a after i through the block's last token      (what decays between a write at i and the block's end)
    W_h    = product over the block.
Doubling h is one multiplication on half of the rows. A pair (t, i), i < t, belongs to exactly one level h: t in the second,
i in the first of two sibling blocks, and its decay is P_h(t) S_h(i): two factors <= 1, anchored at the boundary between the
siblings, which lies before t. So any decay down to -inf is exact (no cumulative sums, no differences), nothing overflows, and
no future token changes a past result, bit for bit.

The gradient of the log-decay runs down the same tree. At level h the pairs give d log P_h(t) = q_t . dq_t and d log S_h(i) =
k_i . dk_i, and
    d log W_h(first)  = d log W_2h + sum_{t in second} d log P_2h(t)
    d log W_h(second) = d log W_2h + sum_{i in first} d log S_2h(i)
so g_t collects exactly the terms that contain e^{g_t}: no difference of large sums, unlike a cumulative sum of q.dq - k.dk.

Shapes: c chunks, H heads, R query groups, C chunk, K channels. Queries x [c, H', R, C, K], keys y [c, H', C, K] with H'
dividing H; pair matrices [c, H, R, C, C].
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor


def halves(x: Tensor, h: int, axis: int = -2) -> tuple[Tensor, Tensor]:
    """First and second sibling blocks of h rows along `axis`, each [..., C/2h, h, ...] (views)."""
    pairs = x.unflatten(axis, (-1, 2, h))
    axis = axis - 1 if axis < 0 else axis + 1
    return pairs.select(axis, 0), pairs.select(axis, 1)


def corner(M: Tensor, h: int) -> Tensor:
    """The blocks (second, first) of level h of M [..., C, C] as a view [..., C/2h, h, h]."""
    blocks = M.unflatten(-1, (-1, 2 * h)).unflatten(-3, (-1, 2 * h)).diagonal(dim1=-4, dim2=-2)
    return blocks.movedim(-1, -3)[..., h:, :h]


def expand(x: Tensor, heads: int) -> Tensor:
    """[c, H', ...] -> [c, heads, ...], head h from h // (heads / H')."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def fold(x: Tensor, heads: int) -> Tensor:
    """The transpose of `expand`: sum the heads that share an operand head."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


def rows_times(x: Tensor, y: Tensor) -> Tensor:
    """x [c, H, R, C, K] times y [c, H, K, D] -> [c, H, R, C, D], as one product per head."""
    return (x.flatten(2, 3) @ y).unflatten(2, (x.shape[2], x.shape[3]))


def transposed_times(x: Tensor, y: Tensor) -> Tensor:
    """Sum over groups and rows: x [c, H, R, C, K], y [c, H, R, C, D] -> [c, H, K, D]."""
    return x.flatten(2, 3).transpose(-1, -2) @ y.flatten(2, 3)


def column_sums(M: Tensor, y: Tensor) -> Tensor:
    """M^T y summed over the query groups: M [c, H, R, C, J], y [c, H, R, C, D] -> [c, H, J, D]."""
    return M.flatten(2, 3).transpose(-1, -2) @ y.flatten(2, 3)


def scores(x: Tensor, y: Tensor) -> Tensor:
    """x y^T at the larger of the two head counts."""
    heads = max(x.shape[1], y.shape[1])
    return rows_times(expand(x, heads), expand(y, heads).transpose(-1, -2))


def scores_backward(dM: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    heads = max(x.shape[1], y.shape[1])
    dM = fold(dM, heads)
    dx = rows_times(dM, expand(y, heads))
    return fold(dx, x.shape[1]), fold(column_sums(dM, expand(x, heads)), y.shape[1])


def add_product_(out: Tensor, x: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
    """out += alpha x y over equal batch axes, in place and in one pass; out must be contiguous over its batch axes."""
    out.flatten(0, -3).baddbmm_(x.flatten(0, -3), y.flatten(0, -3), alpha=alpha)
    return out


def minus_product(x: Tensor, y: Tensor) -> Tensor:
    """-x y over equal batch axes."""
    out = torch.empty(*x.shape[:-1], y.shape[-1], dtype=x.dtype, device=x.device)
    return out.flatten(0, -3).baddbmm_(x.flatten(0, -3), y.flatten(0, -3), beta=0, alpha=-1).view(out.shape)


def mask_(M: Tensor, strict: bool) -> Tensor:
    """Zero the pairs with i > t (i >= t if strict), in place."""
    return M.tril_(-1 if strict else 0)


class NoDecay:
    """a = 1: every factor is one."""

    def __init__(self, heads: int):
        self.heads = heads

    def pair(self, x, y, *, exclusive, strict):
        return expand(mask_(scores(x, y), strict), self.heads)

    def pair_backward(self, dM, M, x, y, *, exclusive, strict):
        return scores_backward(mask_(dM, strict), x, y)

    def prefix(self, x, exclusive):
        return expand(x, self.heads)

    def prefix_backward(self, dx, x, exclusive):
        return dx

    def suffix(self, y):
        return expand(y, self.heads)

    def suffix_backward(self, dy, y):
        return dy

    def carry_(self, S, rows):
        return S

    def carry_backward(self, S, dS):
        return None

    def gradient(self):
        return None


class Decay:
    """Scalar (g [c, H', C, 1]) or per-channel (g [c, H', C, K]) log-decay of the chunks of one span, expanded to `heads`."""

    def __init__(self, g: Tensor, heads: int, exclusive: bool, backward: bool = False):
        self.heads, self.own_heads = heads, g.shape[1]
        self.scalar = g.shape[-1] == 1
        C = g.shape[-2]
        a = expand(g.exp(), heads)
        P, S, W = a.clone(), torch.ones_like(a), a  # W: one row per block
        E = torch.ones_like(a) if exclusive else None
        self.levels = []  # (h, P of second blocks, E of second blocks, S of first blocks)
        h = 1
        while h < C:
            (P2, S1), (S0, W0, W1) = (halves(P, h)[1], halves(S, h)[0]), (halves(S, h)[0], *halves(W, 1))
            E2 = halves(E, h)[1] if exclusive else None
            self.levels.append((h, P2.clone(), E2.clone() if exclusive else None, S1.clone()))
            P2.mul_(W0)
            if exclusive:
                E2.mul_(W0)
            S0.mul_(W1)
            W = (W0 * W1).squeeze(-2)
            h *= 2
        self.P, self.E, self.S, self.W = P, E, S, W[..., 0, :]
        self._D: dict[bool, Tensor] = {}
        if backward:
            like = lambda x: None if x is None else torch.zeros_like(x)
            self._d = {"P": like(P), "E": like(E), "S": like(S), "W": like(W)}
            self._levels = {name: [like(level[i]) for level in self.levels] for i, name in ((1, "P"), (2, "E"), (3, "S"))}

    def at(self, chunks: slice) -> Decay:
        """The decay of some of the chunks; what its backward collects is collected here."""
        part = copy.copy(self)
        cut = lambda x: None if x is None else x[chunks]
        part.P, part.E, part.S, part.W, part._D = cut(self.P), cut(self.E), cut(self.S), cut(self.W), {}
        part.levels = [(h, *map(cut, factors)) for h, *factors in self.levels]
        if hasattr(self, "_d"):
            part._d = {name: cut(x) for name, x in self._d.items()}
            part._levels = {name: list(map(cut, values)) for name, values in self._levels.items()}
        return part

    def _matrix(self, exclusive: bool) -> Tensor:
        """The decay matrix [c, H, C, C] of scalar decay: strictly lower part, ones on the diagonal."""
        if exclusive not in self._D:
            C = self.P.shape[-2]
            D = torch.zeros(*self.P.shape[:2], C, C, dtype=self.P.dtype, device=self.P.device)
            D.diagonal(dim1=-2, dim2=-1).fill_(1)
            for h, P2, E2, S1 in self.levels:
                torch.mul(E2 if exclusive else P2, S1.transpose(-1, -2), out=corner(D, h))
            self._D[exclusive] = D
        return self._D[exclusive]

    def pair(self, x: Tensor, y: Tensor, *, exclusive: bool, strict: bool) -> Tensor:
        """M[t, i] = sum_k x_t y_i * decay(i -> t); exclusive reads before the decay of t; strict leaves out i = t."""
        if self.scalar:
            M = scores(x, y)
            D = self._matrix(exclusive)[:, :, None]
            M = M.mul_(D) if M.shape[1] == self.heads else expand(M, self.heads).mul_(D)
            return mask_(M, True) if strict else M
        x, y = expand(x, self.heads), expand(y, self.heads)
        C = x.shape[-2]
        M = torch.zeros(*x.shape[:4], C, dtype=x.dtype, device=x.device)
        if not strict:
            M.diagonal(dim1=-2, dim2=-1).copy_((x * y[:, :, None]).sum(-1))
        for h, P2, E2, S1 in self.levels:
            left = halves(x, h)[1] * (E2 if exclusive else P2)[:, :, None]
            right = halves(y, h)[0] * S1
            corner(M, h).copy_(left @ right[:, :, None].transpose(-1, -2))
        return M

    def pair_backward(self, dM: Tensor, M: Tensor, x: Tensor, y: Tensor, *, exclusive: bool, strict: bool):
        """Gradients of x and y at their own heads; collects the gradient of the factors. May overwrite dM."""
        level_q, level_s = self._levels["E" if exclusive else "P"], self._levels["S"]
        if self.scalar:
            F = (dM * M).sum(2) if M.shape[2] > 1 else (dM * M)[:, :, 0]
            for n, (h, *_) in enumerate(self.levels):
                block = corner(F, h)
                level_q[n] += block.sum(-1, keepdim=True)
                level_s[n] += block.sum(-2).unsqueeze(-1)
            dM = dM.mul_(self._matrix(exclusive)[:, :, None])
            return scores_backward(mask_(dM, True) if strict else dM, x, y)
        heads_x, heads_y = x.shape[1], y.shape[1]
        x, y = expand(x, self.heads), expand(y, self.heads)
        if strict:
            dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        else:
            d = dM.diagonal(dim1=-2, dim2=-1)[..., None]
            dx, dy = d * y[:, :, None], (d * x).sum(2)
        for n, (h, P2, E2, S1) in enumerate(self.levels):
            f = (E2 if exclusive else P2)[:, :, None]
            left, right = halves(x, h)[1] * f, (halves(y, h)[0] * S1)[:, :, None]
            block = corner(dM, h)
            dleft = block @ right
            dright = (block.transpose(-1, -2) @ left).sum(2) if x.shape[2] > 1 else (block.transpose(-1, -2) @ left).squeeze(2)
            level_q[n] += (dleft * left).sum(2) if x.shape[2] > 1 else (dleft * left)[:, :, 0]
            level_s[n] += dright * right[:, :, 0]
            halves(dx, h)[1].add_(dleft.mul_(f))
            halves(dy, h)[0].add_(dright.mul_(S1))
        return fold(dx, heads_x), fold(dy, heads_y)

    def prefix(self, x: Tensor, exclusive: bool) -> Tensor:
        """x_t decayed from the chunk's start to the read at t: x [c, H', R, C, K] -> [c, H, R, C, K]."""
        return expand(x, self.heads) * (self.E if exclusive else self.P)[:, :, None]

    def prefix_backward(self, dx: Tensor, x: Tensor, exclusive: bool) -> Tensor:
        """From the gradient of `prefix(x)`, overwritten, to that of x (at H heads); x is the operand, not its product."""
        f = (self.E if exclusive else self.P)[:, :, None]
        dx = dx.mul_(f)
        self._collect("E" if exclusive else "P", dx * expand(x, self.heads), (2, -1) if self.scalar else 2)
        return dx

    def suffix(self, y: Tensor) -> Tensor:
        """y_i decayed from the write at i to the chunk's end: [c, H', C, K] -> [c, H, C, K]."""
        return expand(y, self.heads) * self.S

    def suffix_backward(self, dy: Tensor, y: Tensor) -> Tensor:
        dy = dy.mul_(self.S)
        self._collect("S", dy * expand(y, self.heads), -1 if self.scalar else None)
        return dy

    def carry_(self, S: Tensor, rows: slice) -> Tensor:
        """Decay states [rows, H, K, V] over a whole chunk, in place."""
        return S.mul_(self.W[rows, :, :, None])

    def carry_backward(self, S: Tensor, dS: Tensor) -> None:
        """Collect the gradient of the chunks' total decay: S before, dS after, both [c, H, K, V]."""
        d = (S * dS).sum(-1)
        self._d["W"] += ((d.sum(-1, keepdim=True) if self.scalar else d) * self.W)[:, :, None]

    def _collect(self, name: str, d: Tensor, axes: int | tuple[int, ...] | None) -> None:
        if axes is not None:
            d = d.squeeze(2) if axes == 2 and d.shape[2] == 1 else d.sum(axes)
        self._d[name] += d.unsqueeze(-1) if self.scalar else d

    def gradient(self) -> Tensor:
        """The gradient of g [c, H', C, 1 or K] from everything collected: down the tree."""
        P, E, S, W = self._d["P"], self._d["E"], self._d["S"], self._d["W"]
        for n in reversed(range(len(self.levels))):
            h = self.levels[n][0]
            after = halves(P, h)[1].sum(-2)
            if E is not None:
                after = after + halves(E, h)[1].sum(-2)
            W = torch.stack([W + after, W + halves(S, h)[0].sum(-2)], -2).flatten(-3, -2)
            halves(P, h)[1].add_(self._levels["P"][n])
            if E is not None:
                halves(E, h)[1].add_(self._levels["E"][n])
            halves(S, h)[0].add_(self._levels["S"][n])
        return fold(W + P, self.own_heads)
