"""Gated DeltaNet-2: the delta rule with erase gates per key channel and write gates per value channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._options import flag
from linnet.mixers._registry import register_mixer
from linnet.mixers.kda import KDA, KDAConfig


@dataclass(frozen=True)
class GatedDeltaNet2Config(KDAConfig, mixer="gated_deltanet2"):
    allow_neg_eigval: bool = flag(False, "erase gates in (0, 2), with which the state may grow")

    @property
    def gate_heads(self) -> int:
        return self.heads  # decay and erase gate are per key head


@register_mixer("gated_deltanet2")
class GatedDeltaNet2(KDA):
    r"""Hatamizadeh, Choi & Kautz, "Gated DeltaNet-2: Decoupling Erase and Write in Linear Attention", 2026 (arXiv 2605.22791).

        S_t = (I - k_t (b_t * k_t)^T) Diag(alpha_t) S_{t-1} + k_t (w_t * v_t)^T,   o_t = S_t^T q_t / sqrt(K)
        b_t = sigmoid(x_t W_b) per key channel,   w_t = sigmoid(x_t W_w) per value channel,   log alpha_t and y_t as in `kda`

    b = w = beta is `kda`. Maps to `linnet.ops.short_conv` and `linnet.ops.delta_rule` with erase = b [B,T,H,K],
    write = w [B,T,H,V], log_decay [B,T,H,K]. State: conv [N, channels, W-1], S [N,H,K,V].
    """

    Config = GatedDeltaNet2Config

    def add_parts(self) -> None:
        c = self.config
        self.add_block(c.gate)
        self.b_proj = nn.Linear(c.d_model, c.heads * c.key_size, bias=False)
        self.w_proj = nn.Linear(c.d_model, c.state_heads * c.value_size, bias=False)
        self.add_gates()

    def gates(self, x_BTD: Tensor) -> dict[str, Any]:
        c = self.config
        b_BTHK = torch.sigmoid(L.full(L.split_heads(self.b_proj(x_BTD), c.heads)))
        return {
            "erase": 2 * b_BTHK if c.allow_neg_eigval else b_BTHK,
            "write": torch.sigmoid(L.full(L.split_heads(self.w_proj(x_BTD), c.state_heads))),
            "log_decay": self.log_decay(x_BTD),
            "log_decay_min": self.log_decay_min,
        }
