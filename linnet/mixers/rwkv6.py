"""RWKV-6 "Finch": the time mixing, linear attention with a data-dependent decay and a bonus for the current token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._options import number, size
from linnet.mixers._registry import register_mixer
from linnet.mixers._rwkv import RWKVConfig, TimeMixing

MIXED = ("w", "k", "v", "r", "g")  # decay, key, value, receptance, gate


@dataclass(frozen=True)
class RWKV6Config(RWKVConfig, mixer="rwkv6"):
    shift_rank: int = size(32, "rank of the token shift's low-rank projections")
    decay_rank: int = size(64, "rank of the decay's")
    norm_eps: float = number(6.4e-4, "of the group norm; the official code has 1e-5 * 8^2, flash-linear-attention 1e-5", above=0)


@register_mixer("rwkv6")
class RWKV6(TimeMixing):
    r"""Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", 2024 (arXiv 2404.05892), time mixing.

        delta_t = x_{t-1} - x_t,   (m_w, m_k, m_v, m_r, m_g) = tanh((x_t + delta_t * mu_x) W_1) W_2
        x_i = x_t + delta_t * (mu_i + m_i)  for i in w, k, v, r, g;   r, k, v linear in x_r, x_k, x_v;   g = silu(x_g W_g)
        w_t = exp(-exp(w_0 + tanh(x_w D_1) D_2))
        o_t = (S_{t-1} + Diag(u) k_t v_t^T)^T r_t,   S_t = Diag(w_t) S_{t-1} + k_t v_t^T,   y_t = W_o (GroupNorm_heads(o_t) * g_t)

    Maps to `linnet.ops.token_shift` and `linnet.ops.linear_attention` with read="before", bonus u, scale 1.
    State: shift [N, D], S [N,H,K,K].
    """

    Config = RWKV6Config

    def add_parts(self) -> None:
        c, D = self.config, self.config.d_model
        self.mu = nn.ParameterDict({name: nn.Parameter(torch.empty(D)) for name in ("x", *MIXED)})
        self.shift_down = nn.Linear(D, len(MIXED) * c.shift_rank, bias=False)
        self.shift_up = nn.Parameter(torch.empty(len(MIXED), c.shift_rank, D))
        self.w_lora = L.LowRank(D, c.decay_rank, D, bias=True, activation="tanh")
        self.r_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(5))
        self.u = nn.Parameter(torch.empty(D))
        self.norm = nn.GroupNorm(c.state_heads, D, eps=c.norm_eps)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        D, depth = self.config.d_model, self.depth
        n = torch.arange(D, dtype=torch.float32)
        for name in self.mu:
            self.mu[name].copy_(1 - (n / D) ** ((0.5 if name in "rg" else 1) * self.rest))
        self.mu["v"].sub_(0.3 * depth)
        n = n / max(D - 1, 1)
        nn.init.zeros_(self.shift_down.weight)
        nn.init.zeros_(self.w_lora.down.weight)
        for weight in (self.shift_up, self.w_lora.up.weight):
            nn.init.uniform_(weight, -0.01, 0.01)
        self.w_lora.up.bias.copy_(-6 + 5 * n ** (0.7 + 1.3 * depth))
        self.u.copy_(depth * (1 - n) + 0.1 * ((torch.arange(D) + 1) % 3 - 1))
        self.reset_block((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0), (self.g_proj, 0.1))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        shift, S = self.open_state(state)
        past_BTD, shift = ops.token_shift(x_BTD, **context.carry(shift))
        delta_BTD = past_BTD - x_BTD
        low = torch.tanh(self.shift_down(x_BTD + delta_BTD * self.mu["x"])).unflatten(-1, (len(MIXED), c.shift_rank))
        mixes = torch.einsum("btmr,mrd->mbtd", low, self.shift_up)
        x_w, x_k, x_v, x_r, x_g = (x_BTD + delta_BTD * (self.mu[name] + m) for name, m in zip(MIXED, mixes, strict=True))
        r_BTHK, k_BTHK, v_BTHV = (L.split_heads(y, c.state_heads) for y in (self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)))
        log_w_BTHK = L.split_heads(-L.full(self.w_lora(x_w)).exp(), c.state_heads)
        o_BTHV, new = ops.linear_attention(
            r_BTHK, k_BTHK, v_BTHV, log_w_BTHK, bonus=self.u.view(c.state_heads, -1), read="before", scale=1.0, **context.carry(S),
        )  # fmt: skip
        y_BTD = ops.gated_linear_unit(self.normed(o_BTHV), self.g_proj(x_g))
        return self.o_proj(y_BTD), self.close_state(context, *(shift or ()), *(new or ()))
