"""Kimi delta attention: the delta rule with one decay per key channel (Kimi Linear, Ling 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._delta import DeltaMixer, ValueHeadsConfig
from linnet.mixers._options import choice, flag, number, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class KDAConfig(ValueHeadsConfig, mixer="kda"):
    decay_gate: str = choice(
        "softplus",
        '"softplus" g = -exp(A_log) softplus(f + dt_bias); "safe" g = decay_min sigmoid(exp(A_log) (f + dt_bias))',
        "softplus", "safe",
    )  # fmt: skip
    decay_min: float = number(-5.0, "lower bound of the safe gate's log-decay", below=0)
    gate_rank: int | None = size(
        None, "rank of the projections of decay and output gate (None: value channels per head; 0: full matrices)", least=0
    )
    gate: str = choice("sigmoid", "activation of the output gate", "sigmoid", "silu")
    gate_bias: bool = flag(True, "whether the output gate's projection has a bias")
    allow_neg_eigval: bool = flag(False, "beta in (0, 2), not (0, 1)")

    @property
    def gate_heads(self) -> int:
        """Heads of the decay."""
        return self.state_heads


@register_mixer("kda")
class KDA(DeltaMixer):
    r"""Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025 (arXiv 2510.26692).

        S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
        log alpha_t by `decay_gate` with f = x_t W_f1 W_f2,   beta_t = sigmoid(x_t W_b)
        y_t = W_o (RMSNorm_head(o_t) * sigmoid(x_t W_g1 W_g2 + b))

    q, k, v are SiLU of a short convolution; q and k have unit length. Maps to `linnet.ops.short_conv` and `linnet.ops.delta_rule`
    with erase = beta, log_decay [B,T,H,K] (log_decay_min declared with the safe gate). State: conv [N, channels, W-1], S [N,H,K,V].
    """

    Config = KDAConfig
    no_weight_decay = ("A_log", "dt_bias")

    def low_rank(self, width: int, bias: bool = False) -> nn.Module:
        """A projection of the decay or the output gate."""
        c = self.config
        if c.gate_rank == 0:
            return nn.Linear(c.d_model, width, bias=bias)
        return L.LowRank(c.d_model, c.gate_rank or c.value_size, width, bias=bias)

    def add_gates(self) -> None:
        """Decay and output gate."""
        c = self.config
        self.f_proj = self.low_rank(c.gate_heads * c.key_size)
        self.g_proj = self.low_rank(c.state_heads * c.value_size, c.gate_bias)
        self.A_log = nn.Parameter(torch.empty(c.gate_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.gate_heads, c.key_size))

    def add_parts(self) -> None:
        c = self.config
        self.add_block(c.gate)
        self.b_proj = nn.Linear(c.d_model, c.state_heads, bias=False)
        self.add_gates()

    def reset_parameters(self) -> None:
        L.init_normal(self)
        L.init_dt_bias(self.dt_bias)
        L.init_A_log(self.A_log) if self.config.decay_gate == "softplus" else nn.init.zeros_(self.A_log)

    def log_decay(self, x_BTD: Tensor) -> Tensor:
        """g [B, T, H, K] in at least fp32."""
        c, A = self.config, L.full(self.A_log).exp()[:, None]
        f_BTHK = L.full(L.split_heads(self.f_proj(x_BTD), c.gate_heads)) + L.full(self.dt_bias)
        return -A * F.softplus(f_BTHK) if c.decay_gate == "softplus" else c.decay_min * torch.sigmoid(A * f_BTHK)

    @property
    def log_decay_min(self) -> float | None:
        return self.config.decay_min if self.config.decay_gate == "safe" else None

    def gates(self, x_BTD: Tensor) -> dict[str, Any]:
        """erase, log_decay and its bound, in at least fp32."""
        beta_BTH = torch.sigmoid(L.full(self.b_proj(x_BTD)))
        erase_BTH = 2 * beta_BTH if self.config.allow_neg_eigval else beta_BTH
        return {"erase": erase_BTH, "log_decay": self.log_decay(x_BTD), "log_decay_min": self.log_decay_min}

    def mix(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, memory: list[Any], context: Context
    ) -> tuple[Tensor, State | None]:
        return self.delta_rule(q_BTHK, k_BTHK, v_BTHV, memory[0], context, **self.gates(x_BTD))
