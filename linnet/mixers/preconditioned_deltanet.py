"""Preconditioned DeltaNet: the gated delta rule whose write key is scaled by how much each key channel has been used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._delta import diagonal_memory
from linnet.mixers._options import number
from linnet.mixers._registry import register_mixer
from linnet.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig


@dataclass(frozen=True)
class PreconditionedDeltaNetConfig(GatedDeltaNetConfig, mixer="preconditioned_deltanet"):
    precondition_max: float = number(
        1.5, "x, the preconditioner stays in [1/x, x]; beta x <= 2 keeps the transition from growing", above=1
    )
    center_init: float = number(-0.2, "c at the start, the log of the use at which a channel is left alone")


@register_mixer("preconditioned_deltanet")
class PreconditionedDeltaNet(GatedDeltaNet):
    r"""Tumma, Loo & Rus, "Preconditioned DeltaNet: Curvature-aware Sequence Modeling for Linear Recurrences", 2026
    (arXiv 2604.21100).

        A_t = a_t A_{t-1} + c_t k_t^2,   r_t = ln(A_t + 1e-6) - center,   M_t = x^(-r_t / (1 + |r_t|))
        S_t = alpha_t S_{t-1} + beta_t (M_t * k_t) (v_t - alpha_t S_{t-1}^T k_t)^T,   o_t = S_t^T q_t / sqrt(K)
        a_t, c_t: a decay and a step like alpha_t, beta_t, per key head;   alpha_t, beta_t, y_t as in `gated_deltanet`

    k^2, ln and the power are elementwise; center is learned per key head. Maps to `linnet.ops.short_conv`,
    `linnet.ops.linear_attention` (the gated sum A) and `linnet.ops.delta_rule` with write_key = M * k.
    State: conv [N, channels, W-1], A [N,H,K], S [N,H,K,V].
    """

    Config = PreconditionedDeltaNetConfig
    no_weight_decay = ("A_log", "dt_bias", "use_A_log", "use_dt_bias", "center")

    def add_parts(self) -> None:
        super().add_parts()
        c = self.config
        self.use_a_proj, self.use_b_proj = (nn.Linear(c.d_model, c.heads, bias=False) for _ in range(2))
        self.use_A_log, self.use_dt_bias, self.center = (nn.Parameter(torch.empty(c.heads)) for _ in range(3))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        L.init_A_log(self.use_A_log, *self.config.A_range)
        L.init_dt_bias(self.use_dt_bias)
        nn.init.constant_(self.center, self.config.center_init)

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"A": (self.config.heads, self.config.key_size)} | super().memory_shapes()

    def mix(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, memory: list[Any], context: Context
    ) -> tuple[Tensor, State | None]:
        k = L.full(k_BTHK)
        step_BTH1 = torch.sigmoid(L.full(self.use_b_proj(x_BTD)))[..., None]
        log_a_BTH = L.mamba_log_decay(self.use_a_proj(x_BTD), self.use_A_log, self.use_dt_bias)
        A_BTHK, A = diagonal_memory(step_BTH1 * k.square(), log_a_BTH, memory[0], context)
        r_BTHK = torch.log(A_BTHK + 1e-6) - L.full(self.center)[:, None]
        M_BTHK = torch.exp(-math.log(self.config.precondition_max) * r_BTHK / (1 + r_BTHK.abs()))
        gates = self.gates(x_BTD) | {"write_key": (M_BTHK * k).to(k_BTHK.dtype)}
        o_BTHV, new = self.delta_rule(q_BTHK, k_BTHK, v_BTHV, memory[1], context, **gates)
        return o_BTHV, None if new is None else (A, *new)
