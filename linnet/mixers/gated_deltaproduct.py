"""Gated DeltaProduct: several delta-rule steps per token, so that its transition is a product of Householder factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from linnet.mixers import _layers as L
from linnet.mixers._registry import register_mixer
from linnet.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig


@dataclass(frozen=True)
class GatedDeltaProductConfig(GatedDeltaNetConfig):
    """Options of `gated_deltaproduct`: those of `gated_deltanet`, and householder_steps, delta-rule steps per token."""

    allow_neg_eigval: bool = True
    householder_steps: int = 2
    mixer: ClassVar[str] = "gated_deltaproduct"

    def __post_init__(self):
        super().__post_init__()
        L.check_positive(self.mixer, householder_steps=self.householder_steps)


@register_mixer("gated_deltaproduct")
class GatedDeltaProduct(GatedDeltaNet):
    r"""Siems et al., "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", 2025 (arXiv 2502.10297).

        S_{t,0} = alpha_t S_{t-1}
        S_{t,j} = (I - beta_{t,j} k_{t,j} k_{t,j}^T) S_{t,j-1} + beta_{t,j} k_{t,j} v_{t,j}^T,   j = 1 .. n;   S_t = S_{t,n}
        o_t = S_t^T q_t / sqrt(K),   beta = 2 sigmoid(x_t W_b),   log alpha_t and y_t as in `gated_deltanet`

    Each step has its own key, value and beta. Maps to `linnet.ops.short_conv` and `linnet.ops.delta_rule` with
    steps_per_token = n, erase = beta [B,T*n,H], log_decay [B,T,H]. State: conv [N, channels, W-1], S [N,H,K,V].
    """

    Config = GatedDeltaProductConfig

    @property
    def steps(self) -> int:
        return self.config.householder_steps
