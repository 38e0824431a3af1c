"""(I + L)^{-1} for strictly lower triangular L, batched: the one inverse of the delta rule, by a named algorithm.

The default, "recursive", is recursive halving, X = [[A, 0], [-B L21 A, B]] from 1 x 1 blocks upwards: direct, hence as stable as
forward substitution for repeated keys and erase gates up to 2 (power series are not), and made of batched products. Its first
levels run as one triangular solve over all diagonal blocks of `base` rows. `use_inverse(name)` selects another one of `INVERSES`
for comparisons; docs/inverse.md has their errors.

Every algorithm maps L [..., C, C], C a power of two, to the same shape and dtype; `matmul` is the product that it is made of (a
product of rounded operands, in the benchmark).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from linnet.ops.torch._decay import corner

Matmul = Callable[[Tensor, Tensor], Tensor]


def diagonal_blocks(M: Tensor, h: int) -> Tensor:
    """The diagonal blocks of h rows of M [..., C, C] as a view [..., C/h, h, h]."""
    return M.unflatten(-1, (-1, h)).unflatten(-3, (-1, h)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def identity(L: Tensor) -> Tensor:
    return torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)


def solve(L: Tensor, matmul: Matmul = torch.matmul) -> Tensor:
    """The library's triangular solve with the identity on the right. Stable; C^3/3 multiply-adds."""
    return torch.linalg.solve_triangular(L, identity(L), upper=False, unitriangular=True)


def forward_substitution(L: Tensor, matmul: Matmul = torch.matmul) -> Tensor:
    """X_i = e_i - L_i X_{<i}, row by row: C dependent steps of vector work, C^3/6 multiply-adds. Stable; `matmul` is not used."""
    X = identity(L).expand_as(L).clone()
    for i in range(1, L.shape[-1]):
        X[..., i, :i] = -(L[..., i, :i, None] * X[..., :i, :i]).sum(-2)
    return X


def recursive(L: Tensor, matmul: Matmul = torch.matmul, base: int = 16, diagonal: Callable[[Tensor], Tensor] = solve) -> Tensor:
    """`diagonal` on blocks of `base` rows, then log2(C / base) levels of two products each; C^3/3 multiply-adds. Stable."""
    C = L.shape[-1]
    h = min(base, C)
    X = torch.zeros_like(L)
    diagonal_blocks(X, h).copy_(diagonal(diagonal_blocks(L, h).contiguous()))
    while h < C:
        D = diagonal_blocks(X, h)
        first, second = D[..., 0::2, :, :], D[..., 1::2, :, :]
        corner(X, h).copy_(matmul(second, matmul(corner(L, h), first)).neg_())
        h *= 2
    return X


def blocked(L: Tensor, matmul: Matmul = torch.matmul, base: int = 16) -> Tensor:
    """Diagonal blocks of `base` rows by `solve`, then X_ij = -X_ii sum_m L_im X_mj, one block diagonal after the other. Stable."""
    C = L.shape[-1]
    base = min(base, C)
    X = torch.zeros_like(L)
    diagonal_blocks(X, base).copy_(solve(diagonal_blocks(L, base).contiguous()))
    for distance in range(base, C, base):
        for i in range(distance, C, base):
            rows, columns, between = slice(i, i + base), slice(i - distance, i - distance + base), slice(i - distance, i)
            inner = matmul(L[..., rows, between], X[..., between, columns])
            X[..., rows, columns] = matmul(X[..., rows, rows], inner).neg_()
    return X


def neumann(L: Tensor, matmul: Matmul = torch.matmul) -> Tensor:
    """(I - L)(I + L^2)(I + L^4) ... (I + L^{C/2}), exact because L^C = 0: 2 (log2 C - 1) full products.

    Unstable: powers of L grow like binomial coefficients for correlated keys, and their sum cancels.
    """
    C = L.shape[-1]
    X, power, terms = identity(L) - L, L, 2
    while terms < C:
        power = matmul(power, power)
        X = X + matmul(X, power)
        terms *= 2
    return X


def recursive_neumann(L: Tensor, matmul: Matmul = torch.matmul, base: int = 16) -> Tensor:
    """`recursive` over `neumann` on the diagonal blocks: products only. Amplifies errors by about binomial(base - 1, base / 2)."""
    return recursive(L, matmul, base, lambda blocks: neumann(blocks, matmul))


def newton_schulz(L: Tensor, matmul: Matmul = torch.matmul, start: float | None = None, iterations: int | None = None) -> Tensor:
    """X <- X (2 I - (I + L) X) from X = start I (None: 1 / (2 C)), `iterations` times (None: 4 log2 C, at least 12).

    Two full products each. Corrects its own rounding errors. start = 1 is exact after log2 C iterations and algebraically
    `neumann`, with its growth.
    """
    C = L.shape[-1]
    eye = identity(L)
    A = eye + L
    X = (eye * (1 / (2 * C) if start is None else start)).expand_as(L)
    for _ in range(max(12, 4 * (C - 1).bit_length()) if iterations is None else iterations):
        X = 2 * X - matmul(matmul(X, A), X)
    return X.tril()


INVERSES: dict[str, Callable[..., Tensor]] = {
    "recursive": recursive,
    "blocked": blocked,
    "forward_substitution": forward_substitution,
    "solve": solve,
    "recursive_neumann": recursive_neumann,
    "neumann": neumann,
    "newton_schulz": newton_schulz,
}
_chosen = "recursive"


@contextmanager
def use_inverse(name: str) -> Iterator[None]:
    """Within the block, the torch backend inverts by the algorithm `name` of `INVERSES`, in every thread."""
    global _chosen
    if name not in INVERSES:
        raise ValueError(f"use_inverse: argument 'name' must be one of {', '.join(INVERSES)}; got {name!r}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def unit_lower_inverse(L: Tensor) -> Tensor:
    """L [..., C, C] strictly lower, C a power of two -> (I + L)^{-1}, same shape and dtype."""
    return INVERSES[_chosen](L)


def residual(L: Tensor, X: Tensor) -> Tensor:
    """max |(I + L) X - I| of each matrix [...], in fp64."""
    eye = identity(L).double()
    return ((eye + L.double()) @ X.double() - eye).abs().amax((-2, -1))
