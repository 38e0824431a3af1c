"""Recursive least squares: the delta rule whose write key is the Kalman gain, so that the memory is the ridge regression so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._options import number
from linnet.mixers._registry import register_mixer
from linnet.mixers._solve import gram_solve
from linnet.mixers.mesa import Mesa, MesaConfig


@dataclass(frozen=True)
class RLSConfig(MesaConfig, mixer="rls"):
    keep: float = number(1.0, "forgetting factor per token (1: nothing is forgotten)", above=0, most=1)


@register_mixer("rls")
class RLS(Mesa):
    r"""Plackett, "Some theorems in least squares", 1950, recursive least squares; as a sequence layer: MesaNet (von Oswald et al.
    2025, arXiv 2506.05233).

        H_t = keep H_{t-1} + beta_t k_t k_t^T,   H_0 = Diag(lambda)
        S_t = S_{t-1} + beta_t H_t^{-1} k_t (v_t - S_{t-1}^T k_t)^T,   o_t = S_t^T q_t / sqrt(K)
        beta_t = sigmoid(x_t W_b + b_b),   lambda and y_t as in `mesa`

    S_t is the minimiser of sum_i keep^{t-i} beta_i |S^T k_i - v_i|^2 + keep^t tr(S^T Diag(lambda) S) at every t. Maps to
    `linnet.ops.short_conv`, `linnet.ops.linear_attention` (one read of H per conjugate-gradient step) and `linnet.ops.delta_rule`
    with erase = write = 1, write_key = beta H^{-1} k. State: conv [N, channels, W-1], H [N,H,K,K], S [N,H,K,V].
    """

    Config = RLSConfig

    def add_parts(self) -> None:
        c = self.config
        self.add_block("silu" if c.gate else None, value_conv=False)
        self.b_proj = nn.Linear(c.d_model, c.heads)
        self.g_proj = nn.Linear(c.d_model, c.heads * c.value_size, bias=False) if c.gate else None
        self.ridge = nn.Parameter(torch.empty(c.heads, c.key_size))

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        c = self.config
        return {"H": (c.heads, c.key_size, c.key_size), "S": (c.heads, c.key_size, c.value_size)}

    def mix(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, memory: list[Any], context: Context
    ) -> tuple[Tensor, State | None]:
        (H, S), k, beta_BTH = memory, L.full(k_BTHK), torch.sigmoid(L.full(self.b_proj(x_BTD)))
        if H is None:
            H = torch.diag_embed(self.regulariser()).expand(context.rows(x_BTD), -1, -1, -1)
        log_keep = None if self.config.keep == 1 else k.new_full((self.config.heads,), math.log(self.config.keep))
        gain_BTHK, H = gram_solve(beta_BTH[..., None] * k, k, beta_BTH, log_keep, None, H, context, self.config.cg_steps)
        one_BTH = torch.ones_like(beta_BTH)
        o_BTHV, new = self.delta_rule(q_BTHK, k_BTHK, v_BTHV, S, context, erase=one_BTH, write_key=gain_BTHK.to(k_BTHK.dtype))
        return o_BTHV, None if new is None else (H, *new)
