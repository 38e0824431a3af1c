"""Gated DeltaNet: the delta rule with one decay per head (Qwen3-Next, Qwen3.5, OLMo hybrid)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._delta import DeltaMixer, ValueHeadsConfig
from linnet.mixers._options import flag, interval, share, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class GatedDeltaNetConfig(ValueHeadsConfig, mixer="gated_deltanet"):
    head_dim: int | None = size(None, "K, key channels per head (None: 3/4 d_model / heads, to a multiple of 8)")
    expand_v: float = share(2.0, "value channels per value head over key channels", of="key_size")
    value_dim: int | None = size(None, "value channels per value head directly (None: from expand_v)")
    allow_neg_eigval: bool = flag(False, "beta in (0, 2), not (0, 1)")
    gate: bool = flag(True, "multiply the normalised output by silu(x W_g)")
    A_range: tuple[float, float] = interval((1.0, 16.0), "exp(A_log) is uniform in it at the start")

    decay = "head"  # or "none", in mixers built on this one

    @property
    def key_size(self) -> int:
        return self.head_dim or max(8, 8 * int(0.75 * self.d_model / self.heads / 8 + 0.5))

    @property
    def value_size(self) -> int:
        return self.value_dim or int(self.key_size * self.expand_v)


@register_mixer("gated_deltanet")
class GatedDeltaNet(DeltaMixer):
    r"""Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024 (arXiv 2412.06464).

        S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
        log alpha_t = -exp(A_log) softplus(x_t W_a + dt_bias),   beta_t = sigmoid(x_t W_b)
        y_t = W_o (RMSNorm_head(o_t) * silu(x_t W_g))

    q, k, v are SiLU of a short convolution; q and k have unit length. Maps to `linnet.ops.short_conv` and `linnet.ops.delta_rule`
    with erase = beta, log_decay [B,T,H]. State: conv [N, channels, W-1], S [N,H,K,V].
    """

    Config = GatedDeltaNetConfig
    no_weight_decay = ("A_log", "dt_bias")

    gate_activation = "silu"

    def add_parts(self) -> None:
        c = self.config
        self.add_block(self.gate_activation if c.gate else None)
        self.b_proj = nn.Linear(c.d_model, self.steps * c.state_heads, bias=False)
        self.g_proj = nn.Linear(c.d_model, c.state_heads * c.value_size, bias=False) if c.gate else None
        if c.decay != "none":
            self.a_proj = nn.Linear(c.d_model, c.state_heads, bias=False)
            self.A_log, self.dt_bias = (nn.Parameter(torch.empty(c.state_heads)) for _ in range(2))

    def reset_parameters(self) -> None:
        L.init_normal(self)
        if self.config.decay != "none":
            L.init_A_log(self.A_log, *self.config.A_range)
            L.init_dt_bias(self.dt_bias)

    def gates(self, x_BTD: Tensor) -> dict[str, Tensor | None]:
        """erase [B, T*n, H] and log_decay [B, T, H] or None, in at least fp32."""
        c = self.config
        beta_BTH = torch.sigmoid(L.full(self.per_step(self.b_proj(x_BTD), c.state_heads)[..., 0]))
        g_BTH = None if c.decay == "none" else L.mamba_log_decay(self.a_proj(x_BTD), self.A_log, self.dt_bias)
        return {"erase": 2 * beta_BTH if c.allow_neg_eigval else beta_BTH, "log_decay": g_BTH}

    def mix(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, memory: list[Any], context: Context
    ) -> tuple[Tensor, State | None]:
        return self.delta_rule(q_BTHK, k_BTHK, v_BTHV, memory[0], context, **self.gates(x_BTD))
