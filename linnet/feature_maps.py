"""Feature maps phi of linear attention: by name those that act on every channel separately, below those that mix channels.

    get_feature_map("elu+1")(x) = elu(x) + 1

"elu+1": Katharopoulos et al., "Transformers are RNNs", 2020 (arXiv 2006.16236); positive everywhere, needed by a normaliser.
"relu": Kasai et al., "Finetuning Pretrained Transformers into RNNs", 2021 (arXiv 2103.13076), without its linear map.
"silu": Yang et al., "Parallelizing Linear Transformers with the Delta Rule", 2024 (arXiv 2406.06484); signed.
"identity": no map.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu+1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda x: x,
}


def get_feature_map(name: str) -> Callable[[Tensor], Tensor]:
    """The feature map called `name`; an unknown name is a ValueError that lists the known ones."""
    if name not in FEATURE_MAPS:
        raise ValueError(f"feature map must be one of {', '.join(map(repr, FEATURE_MAPS))}; got {name!r}")
    return FEATURE_MAPS[name]


# ---- maps that mix channels ----------------------------------------------------------------------------------------------


def hedgehog_features(u: Tensor, kind: str) -> Tensor:
    """[..., K] -> [..., 2K], the channels of u and of -u (Hedgehog, Zhang et al. 2024, arXiv 2402.04347, in three codes).

    "softmax": softmax over all 2K channels of [2u, -2u] (flash-linear-attention).
    "softmax_halves": [softmax(u), softmax(-u)], at least 1e-12 (LoLCATs).
    "exp_max": [exp(u - max u), exp(-u + min u)] (LoLCATs).
    """
    if kind == "softmax":
        return torch.cat((2 * u, -2 * u), -1).softmax(-1)
    if kind == "softmax_halves":
        return torch.cat((u.softmax(-1), (-u).softmax(-1)), -1).clamp_min(1e-12)
    if kind == "exp_max":
        return torch.cat((u - u.amax(-1, keepdim=True), u.amin(-1, keepdim=True) - u), -1).exp()
    raise ValueError(f"hedgehog_features: kind must be 'softmax', 'softmax_halves' or 'exp_max'; got {kind!r}")


def _products(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x_i^2, x_i x_j for i < j): the distinct entries of x x^T."""
    row, column = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
    return x.square(), x[..., row] * x[..., column]


def quadratic_features(x: Tensor) -> Tensor:
    """[..., K] -> [..., K(K+1)/2] with phi(q).phi(k) = (q.k)^2 / K (ReBased, Aksenov et al. 2024, arXiv 2402.10644)."""
    squares, pairs = _products(x)
    return torch.cat((squares, math.sqrt(2) * pairs), -1) * x.shape[-1] ** -0.5


def taylor_features(x: Tensor, order: int = 2, lowest: int = 0) -> Tensor:
    """[..., K] -> [..., F] with phi(q).phi(k) = sum_{n=lowest}^{order} s^n / n!, s = q.k / sqrt(K): 1 + s + s^2/2 as it stands.

    F counts the monomials of these degrees, `taylor_size`: every product of channels stands once. Polynomials of an even order are
    positive everywhere. Order 2: Based, Arora et al. 2024 (arXiv 2402.18668); any: Mongaras & Larson 2025 (arXiv 2507.23632).
    """
    root, parts, higher = math.sqrt(x.shape[-1]), [], None
    for n in range(lowest, order + 1):
        if n == 0:
            parts.append(torch.ones_like(x[..., :1]))
        elif n == 1:
            parts.append(x / math.sqrt(root))
        elif n == 2:
            squares, pairs = _products(x)
            parts += [squares / (math.sqrt(2) * root), pairs / root]
        else:
            higher = higher or _monomials(x, order)
            parts.append(higher[n] * root ** (-n / 2))
    return torch.cat(parts, -1)


def taylor_size(size: int, order: int, lowest: int = 0) -> int:
    """F of `taylor_features` for K = size."""
    return sum(math.comb(size + n - 1, n) for n in range(lowest, order + 1))


def _monomials(x: Tensor, order: int) -> list[Tensor]:
    """The monomials of every degree 0 .. order, each over the square root of the factorials of its exponents.

    Channel by channel: degree n of channels i, i+1, ... is x_i^m / sqrt(m!) times degree n - m of channels i+1, ...
    """
    one = torch.ones_like(x[..., :1])
    degrees = [one] + [x[..., :0]] * order
    for channel in reversed(x.split(1, -1)):
        powers = [one]
        for m in range(1, order + 1):
            powers.append(powers[-1] * channel / math.sqrt(m))
        degrees = [torch.cat([powers[m] * degrees[n - m] for m in range(n + 1)], -1) for n in range(order + 1)]
    return degrees
