"""Kaczmarz linear attention: Gated DeltaNet whose step is divided by the squared length of the key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._options import flag, number
from linnet.mixers._registry import register_mixer
from linnet.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig


@dataclass(frozen=True)
class KaczmarzConfig(GatedDeltaNetConfig, mixer="kaczmarz"):
    allow_neg_eigval: bool = flag(False, "eta in (0, 2), not (0, 1)")
    key_eps: float = number(1e-4, "added to |k|^2", above=0)


@register_mixer("kaczmarz")
class Kaczmarz(GatedDeltaNet):
    r"""Zou, Ren & Liu, "Kaczmarz Linear Attention", 2026 (arXiv 2605.08587).

        S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
        beta_t = eta_t / (|k_t|^2 + eps),   eta_t = sigmoid(x_t W_b),   log alpha_t and y_t as in `gated_deltanet`

    Keys keep their length; eta = 1 projects S onto {S^T k = v}. Computed as the delta rule on k / s with step eta and values v / s,
    s = sqrt(|k|^2 + eps): the same state, every operand but v / s at most 1. q has unit length, which the output norm makes
    immaterial. Maps to `linnet.ops.short_conv` and `linnet.ops.delta_rule` with erase = eta, log_decay [B,T,H].
    State: conv [N, channels, W-1], S [N,H,K,V].
    """

    Config = KaczmarzConfig

    def key(self, k_BTHK: Tensor) -> Tensor:
        return k_BTHK

    def mix(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, memory: list[Any], context: Context
    ) -> tuple[Tensor, State | None]:
        c, k = self.config, L.full(k_BTHK)
        inverse_BTH1 = torch.rsqrt(k.square().sum(-1, keepdim=True) + c.key_eps)
        v = L.full(v_BTHV).unflatten(2, (c.heads, -1)) * inverse_BTH1[:, :, :, None]
        k_BTHK, v_BTHV = (k * inverse_BTH1).to(k_BTHK.dtype), v.flatten(2, 3).to(v_BTHV.dtype)
        return super().mix(x_BTD, q_BTHK, k_BTHK, v_BTHV, memory, context)
