"""Hedgehog: a learned, spiky and monotone feature map that mimics the softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet.feature_maps import hedgehog_features
from linnet.mixers import _layers as L
from linnet.mixers._kernel import HeadMap, KernelAttention, KernelConfig
from linnet.mixers._options import choice, flag
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class HedgehogConfig(KernelConfig, mixer="hedgehog"):
    feature_map: str = choice(
        "softmax_halves",
        'of u = W x + b: "exp" [exp(u), exp(-u)], the paper\'s formula; "softmax" over [2u, -2u] (flash-linear-attention); '
        '"softmax_halves" [softmax(u), softmax(-u)] and "exp_max" [exp(u - max u), exp(-u + min u)] (LoLCATs); weights trained '
        "with one do not fit another",
        "exp", "softmax", "softmax_halves", "exp_max",
    )  # fmt: skip
    map_bias: bool = flag(True, "whether the map has b")
    tied: bool = flag(False, "one map for q and k (then heads = kv_heads)")

    def check(self) -> None:
        super().check()
        if self.tied and self.groups != self.heads:
            self.refuse("tied", "False where kv_heads is not heads")

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

    def add_parts(self) -> None:
        super().add_parts()
        c = self.config
        self.gain = c.feature_map == "exp"
        self.q_map = HeadMap(c.heads, c.key_size, c.key_size, bias=c.map_bias)
        self.k_map = None if c.tied else HeadMap(c.groups, c.key_size, c.key_size, bias=c.map_bias)

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
