"""DeltaProduct: several delta-rule steps per token and no decay."""

from __future__ import annotations

from dataclasses import dataclass

from linnet.mixers._options import interval
from linnet.mixers._registry import register_mixer
from linnet.mixers.gated_deltaproduct import GatedDeltaProduct, GatedDeltaProductConfig


@dataclass(frozen=True)
class DeltaProductConfig(GatedDeltaProductConfig, mixer="deltaproduct"):
    A_range: tuple[float, float] = interval((1.0, 16.0), "of `gated_deltaproduct`; without meaning here")

    decay = "none"


@register_mixer("deltaproduct")
class DeltaProduct(GatedDeltaProduct):
    r"""Siems et al., "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", 2025 (arXiv 2502.10297).

        S_{t,j} = (I - beta_{t,j} k_{t,j} k_{t,j}^T) S_{t,j-1} + beta_{t,j} k_{t,j} v_{t,j}^T,   j = 1 .. n;   S_t = S_{t,n}
        o_t = S_t^T q_t / sqrt(K),   beta = 2 sigmoid(x_t W_b),   y_t as in `gated_deltanet`

    Maps to `linnet.ops.short_conv` and `linnet.ops.delta_rule` with steps_per_token = n, erase = beta [B,T*n,H].
    State: conv [N, channels, W-1], S [N,H,K,V].
    """

    Config = DeltaProductConfig
    no_weight_decay = ()
