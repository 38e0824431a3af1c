"""Comba: the gated delta rule as a closed loop, with feedback on the state and on the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._options import flag, number
from linnet.mixers._registry import register_mixer
from linnet.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig


@dataclass(frozen=True)
class CombaConfig(GatedDeltaNetConfig, mixer="comba"):
    output_feedback: bool = flag(True, "whether the query is corrected by D p")
    feedback_init: float = number(1.0, "D at the start (smaller models: 0.02)")


@register_mixer("comba")
class Comba(GatedDeltaNet):
    r"""Hu et al., "Comba: Improving Bilinear RNNs with Closed-loop Control", 2025 (arXiv 2506.02475).

        p_t = sigmoid(delta) k_t
        S_t = (alpha_t I - beta_t k_t p_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T (q_t - D p_t) / sqrt(K)
        beta_t = sigmoid(x_t W_b),   log alpha_t as in `gated_deltanet`,   y_t = W_o (RMSNorm_head(o_t) * sigmoid(x_t W_g))

    delta and D are one number per value head. The erased read p^T S is of the undecayed state. p is not normalised, or delta would
    cancel. Maps to `linnet.ops.short_conv` and `linnet.ops.delta_rule` with erase = sigmoid(delta) beta, write = beta,
    erase_read="before_decay", log_decay [B,T,H]. State: conv [N, channels, W-1], S [N,H,K,V].
    """

    Config = CombaConfig
    gate_activation = "sigmoid"
    no_weight_decay = ("A_log", "dt_bias", "delta")

    def add_parts(self) -> None:
        super().add_parts()
        self.delta = nn.Parameter(torch.empty(self.config.state_heads))
        self.D = nn.Parameter(torch.empty(self.config.state_heads)) if self.config.output_feedback else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.delta)
        if self.D is not None:
            nn.init.constant_(self.D, self.config.feedback_init)

    def mix(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, memory: list[Any], context: Context
    ) -> tuple[Tensor, State | None]:
        c, gates, inner_H = self.config, self.gates(x_BTD), torch.sigmoid(L.full(self.delta))
        gates["write"], gates["erase"] = gates["erase"], gates["erase"] * inner_H
        if self.D is not None:
            q, k = (L.full(y).repeat_interleave(c.state_heads // c.heads, 2) for y in (q_BTHK, k_BTHK))
            q_BTHK = (q - (L.full(self.D) * inner_H)[:, None] * k).to(q_BTHK.dtype)
        return self.delta_rule(q_BTHK, k_BTHK, v_BTHV, memory[0], context, erase_read="before_decay", **gates)
