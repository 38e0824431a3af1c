"""ReBased: a quadratic kernel of normalised queries and keys, with learned scale and offset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from linnet.feature_maps import quadratic_features
from linnet.mixers import _layers as L
from linnet.mixers._kernel import KernelAttention, KernelConfig
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class ReBasedConfig(KernelConfig):
    """Options of `rebased`.

    feature_size: the width K of q and k. tied: one scale and offset for q and k (flash-linear-attention). norm_eps: of the layer
    norm. The others: `KernelConfig`.
    """

    mixer: ClassVar[str] = "rebased"

    heads: int = 16
    feature_size: int = 16
    tied: bool = False
    norm_eps: float = 1e-5
    normalizer_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        L.check_positive("rebased", feature_size=self.feature_size)
        L.check_choice("rebased", (True, False), tied=self.tied)
        L.check_number("rebased", 0, norm_eps=self.norm_eps)

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

    def __init__(self, config: ReBasedConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        self.q_norm = nn.LayerNorm(config.key_size, eps=config.norm_eps)
        self.k_norm = None if config.tied else nn.LayerNorm(config.key_size, eps=config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def phi(self, q_BTHK: Tensor, k_BTHK: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k = self.q_norm(q_BTHK), (self.k_norm or self.q_norm)(k_BTHK)
        return quadratic_features(L.full(q)), quadratic_features(L.full(k)), None
