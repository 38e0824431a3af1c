"""Based: the exponential by its second-order Taylor polynomial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from linnet.feature_maps import taylor_features
from linnet.mixers import _layers as L
from linnet.mixers._kernel import KernelAttention, KernelConfig
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class BasedConfig(KernelConfig):
    """Options of `based`: feature_size, the width K of q and k, and those of `KernelConfig`."""

    mixer: ClassVar[str] = "based"

    heads: int = 16
    feature_size: int = 16
    normalizer_eps: float = 1e-12

    def __post_init__(self):
        super().__post_init__()
        L.check_positive("based", feature_size=self.feature_size)

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

    def __init__(self, config: BasedConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        self.reset_parameters()

    def phi(self, q_BTHK: Tensor, k_BTHK: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return taylor_features(L.full(q_BTHK)), taylor_features(L.full(k_BTHK)), None
