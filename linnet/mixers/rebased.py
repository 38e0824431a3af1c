"""ReBased: a quadratic kernel of normalised queries and keys, with learned scale and offset."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from linnet.feature_maps import quadratic_features
from linnet.mixers import _layers as L
from linnet.mixers._kernel import KernelAttention, KernelConfig
from linnet.mixers._options import flag, number, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class ReBasedConfig(KernelConfig, mixer="rebased"):
    heads: int = size(16, "query heads")
    feature_size: int = size(16, "K, the width of q and k")
    tied: bool = flag(False, "one scale and offset for q and k (flash-linear-attention)")
    norm_eps: float = number(1e-5, "epsilon of the layer norm", above=0)
    normalizer_eps: float = number(1e-5, "added to the denominator", least=0)

    @property
    def key_size(self) -> int:
        return self.feature_size

    @property
    def features(self) -> int:
        return self.key_size * (self.key_size + 1) // 2


@register_mixer("rebased")
class ReBased(KernelAttention):
    r"""Aksenov et al., "Linear Transformers with Learnable Kernel Functions are Better In-Context Models", 2024 (arXiv 2402.10644).

        q' = gamma_q * LN(q) + beta_q,   k' = gamma_k * LN(k) + beta_k,   phi(q').phi(k') = (q'.k')^2 / K
        o_t = sum_s phi(q'_t).phi(k'_s) v_s / (sum_s phi(q'_t).phi(k'_s) + eps)

    LN runs over the K channels of a head. phi has K(K+1)/2 features. Maps to `linnet.ops.linear_attention` with
    normalizer="sum", scale 1. State: S [N,H,F,V], z [N,H,F].
    """

    Config = ReBasedConfig

    def add_parts(self) -> None:
        super().add_parts()
        c = self.config
        self.q_norm = nn.LayerNorm(c.key_size, eps=c.norm_eps)
        self.k_norm = None if c.tied else nn.LayerNorm(c.key_size, eps=c.norm_eps)

    def phi(self, q_BTHK: Tensor, k_BTHK: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k = self.q_norm(q_BTHK), (self.k_norm or self.q_norm)(k_BTHK)
        return quadratic_features(L.full(q)), quadratic_features(L.full(k)), None
