"""Based: the exponential by its second-order Taylor polynomial."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linnet.feature_maps import taylor_features
from linnet.mixers import _layers as L
from linnet.mixers._kernel import KernelAttention, KernelConfig
from linnet.mixers._options import number, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class BasedConfig(KernelConfig, mixer="based"):
    heads: int = size(16, "query heads")
    feature_size: int = size(16, "K, the width of q and k")
    normalizer_eps: float = number(1e-12, "added to the denominator", least=0)

    @property
    def key_size(self) -> int:
        return self.feature_size

    @property
    def features(self) -> int:
        return 1 + self.key_size + self.key_size * (self.key_size + 1) // 2


@register_mixer("based")
class Based(KernelAttention):
    r"""Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff", 2024 (arXiv 2402.18668).

        phi(q).phi(k) = 1 + s + s^2/2,  s = q.k / sqrt(K),   o_t = sum_s phi(q_t).phi(k_s) v_s / (sum_s phi(q_t).phi(k_s) + eps)

    phi has 1 + K + K(K+1)/2 features: each product x_i x_j, i < j, once. Maps to `linnet.ops.linear_attention` with
    normalizer="sum", scale 1. State: S [N,H,F,V], z [N,H,F].
    """

    Config = BasedConfig

    def phi(self, q_BTHK: Tensor, k_BTHK: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return taylor_features(L.full(q_BTHK)), taylor_features(L.full(k_BTHK)), None
