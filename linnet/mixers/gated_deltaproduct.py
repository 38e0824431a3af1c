"""Gated DeltaProduct: several delta-rule steps per token, so that its transition is a product of Householder factors."""

from __future__ import annotations

from dataclasses import dataclass

from linnet.mixers._options import flag, size
from linnet.mixers._registry import register_mixer
from linnet.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig


@dataclass(frozen=True)
class GatedDeltaProductConfig(GatedDeltaNetConfig, mixer="gated_deltaproduct"):
    allow_neg_eigval: bool = flag(True, "beta in (0, 2), not (0, 1)")
    householder_steps: int = size(2, "n, delta-rule steps per token")


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
