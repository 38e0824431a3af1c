"""(I + L)^{-1} for strictly lower triangular L, batched: the one inverse of the delta rule.

Recursive halving, X = [[A, 0], [-B L21 A, B]] from 1 x 1 blocks upwards: direct, hence as stable as forward substitution for
repeated keys and erase gates up to 2 (power series are not), and made of batched products. The first levels run as one
triangular solve over all diagonal blocks of `base` rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops.torch._decay import corner


def diagonal_blocks(M: Tensor, h: int) -> Tensor:
    """The diagonal blocks of h rows of M [..., C, C] as a view [..., C/h, h, h]."""
    return M.unflatten(-1, (-1, h)).unflatten(-3, (-1, h)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def unit_lower_inverse(L: Tensor, base: int = 16) -> Tensor:
    """L [..., C, C] strictly lower, C a power of two -> (I + L)^{-1}, same shape and dtype."""
    C = L.shape[-1]
    base = min(base, C)
    X = torch.zeros_like(L)
    eye = torch.eye(base, dtype=L.dtype, device=L.device)
    blocks = diagonal_blocks(L, base).contiguous()
    diagonal_blocks(X, base).copy_(torch.linalg.solve_triangular(blocks, eye, upper=False, unitriangular=True))
    h = base
    while h < C:
        D = diagonal_blocks(X, h)
        first, second = D[..., 0::2, :, :], D[..., 1::2, :, :]
        corner(X, h).copy_((second @ (corner(L, h) @ first)).neg_())
        h *= 2
    return X
