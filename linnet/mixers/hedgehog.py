"""Hedgehog: a learned, spiky and monotone feature map that mimics the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from linnet.feature_maps import hedgehog_features
from linnet.mixers import _layers as L
from linnet.mixers._kernel import HeadMap, KernelAttention, KernelConfig
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class HedgehogConfig(KernelConfig):
    """Options of `hedgehog`.

    feature_map: of u = W x + b; "exp" [exp(u), exp(-u)], the paper's formula; "softmax" over [2u, -2u]
        (flash-linear-attention); "softmax_halves" [softmax(u), softmax(-u)] and "exp_max" [exp(u - max u), exp(-u + min u)]
        (LoLCATs). Weights trained with one do not fit another.
    map_bias: whether the map has b. tied: one map for q and k (then heads = kv_heads). The others: `KernelConfig`.
    """

    mixer: ClassVar[str] = "hedgehog"

    feature_map: str = "softmax_halves"
    map_bias: bool = True
    tied: bool = False

    def __post_init__(self):
        super().__post_init__()
        L.check_choice("hedgehog", ("exp", "softmax", "softmax_halves", "exp_max"), feature_map=self.feature_map)
        L.check_choice("hedgehog", (True, False), map_bias=self.map_bias, tied=self.tied)
        if self.tied and self.groups != self.heads:
            L.refuse("hedgehog", "tied", "False where kv_heads is not heads", self.tied)

    @property
    def features(self) -> int:
        return 2 * self.key_size


@register_mixer("hedgehog")
class Hedgehog(KernelAttention):
    r"""Zhang et al., "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry", 2024 (arXiv 2402.04347).

        phi(x) = [f(W x + b), f(-W x - b)] per head, W starting as the identity
        o_t = sum_s phi_q(q_t).phi_k(k_s) v_s / (sum_s phi_q(q_t).phi_k(k_s) + eps)

    Maps to `linnet.ops.linear_attention` with normalizer="sum", scale 1; for "exp" the largest exponent of a key is its log_gain,
    that of a query is taken out (the ratio does not change), and no feature is below 1e-12 of the largest.
    State: S [N,H,2K,V], z [N,H,2K], for "exp" m [N,H].
    """

    Config = HedgehogConfig

    def __init__(self, config: HedgehogConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        self.gain = c.feature_map == "exp"
        self.q_map = HeadMap(c.heads, c.key_size, c.key_size, bias=c.map_bias)
        self.k_map = None if c.tied else HeadMap(c.groups, c.key_size, c.key_size, bias=c.map_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for part in (self.q_map, self.k_map):
            if part is not None:
                part.weight.copy_(torch.eye(part.weight.shape[-1], device=part.weight.device))
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def phi(self, q_BTHK: Tensor, k_BTHK: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k = L.full(self.q_map(q_BTHK)), L.full((self.k_map or self.q_map)(k_BTHK))
        if not self.gain:
            return hedgehog_features(q, self.config.feature_map), hedgehog_features(k, self.config.feature_map), None
        (q, _), (k, top_BTH) = (_spread(u) for u in (q, k))
        return q, k, top_BTH


def _spread(u: Tensor) -> tuple[Tensor, Tensor]:
    """([e^u, e^-u] / e^m, m) with m = max |u|; at least 1e-12, so that two features of different channels still meet."""
    m = u.detach().abs().amax(-1, keepdim=True)
    return torch.cat((u - m, -u - m), -1).exp().clamp_min(1e-12), m[..., 0]
