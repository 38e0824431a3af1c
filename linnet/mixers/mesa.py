"""Mesa layer: every token reads the optimal regularised linear regression of the values on the keys so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._delta import DeltaConfig, DeltaMixer
from linnet.mixers._options import flag, number, size
from linnet.mixers._registry import register_mixer
from linnet.mixers._solve import gram_solve


@dataclass(frozen=True)
class MesaConfig(DeltaConfig, mixer="mesa"):
    conv_size: int | None = size(4, "taps of the short convolution on q and k (None: none, SiLU only)")
    gate: bool = flag(False, "multiply the normalised output by silu(x W_g)")
    cg_steps: int = size(16, "conjugate-gradient steps per solve")
    ridge_min: float = number(0.25, "lower bound of the regulariser", above=0)
    ridge_init: float = number(1.0, "the regulariser at the start", above="ridge_min")


@register_mixer("mesa")
class Mesa(DeltaMixer):
    r"""von Oswald et al., "MesaNet: Sequence Modeling by Locally Optimal Test-Time Training", 2025 (arXiv 2506.05233).

        H_t = gamma_t H_{t-1} + beta_t k_t k_t^T,   Z_t = gamma_t Z_{t-1} + beta_t k_t v_t^T
        o_t = Z_t^T (H_t + Diag(lambda))^{-1} q_t
        gamma_t = sigmoid(x_t W_a + b_a),   beta_t = sigmoid(x_t W_b + b_b),   lambda = ridge_min + softplus(l) per head and channel
        y_t = W_o RMSNorm_head(o_t)

    q and k are SiLU of a short convolution with unit length, v is linear. Maps to `linnet.ops.short_conv` and
    `linnet.ops.linear_attention`: one read of H per conjugate-gradient step, one of Z.
    State: conv [N, channels, W-1], H [N,H,K,K], Z [N,H,K,V].
    """

    Config = MesaConfig
    no_weight_decay = ("ridge",)

    def add_parts(self) -> None:
        c = self.config
        self.add_block("silu" if c.gate else None, value_conv=False)
        self.a_proj, self.b_proj = (nn.Linear(c.d_model, c.heads) for _ in range(2))
        self.g_proj = nn.Linear(c.d_model, c.heads * c.value_size, bias=False) if c.gate else None
        self.ridge = nn.Parameter(torch.empty(c.heads, c.key_size))

    def reset_parameters(self) -> None:
        L.init_normal(self)
        nn.init.constant_(self.ridge, math.log(math.expm1(self.config.ridge_init - self.config.ridge_min)))

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        c = self.config
        return {"H": (c.heads, c.key_size, c.key_size), "Z": (c.heads, c.key_size, c.value_size)}

    def regulariser(self) -> Tensor:
        """lambda [H, K]."""
        return self.config.ridge_min + F.softplus(L.full(self.ridge))

    def mix(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, memory: list[Any], context: Context
    ) -> tuple[Tensor, State | None]:
        (H, Z), q, k, v = memory, L.full(q_BTHK), L.full(k_BTHK), L.full(v_BTHV)
        log_gamma_BTH, beta_BTH = F.logsigmoid(L.full(self.a_proj(x_BTD))), torch.sigmoid(L.full(self.b_proj(x_BTD)))
        solved, H = gram_solve(q, k, beta_BTH, log_gamma_BTH, self.regulariser(), H, context, self.config.cg_steps)
        o_BTHV, new = ops.linear_attention(solved, k, beta_BTH[..., None] * v, log_gamma_BTH, scale=1.0, **context.carry(Z))
        return o_BTHV.to(v_BTHV.dtype), None if new is None else (H, *new)
