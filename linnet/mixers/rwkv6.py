"""RWKV-6 "Finch": the time mixing, linear attention with a data-dependent decay and a bonus for the current token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer

MIXED = ("w", "k", "v", "r", "g")  # decay, key, value, receptance, gate


@dataclass(frozen=True)
class RWKV6Config:
    """Options of `rwkv6`.

    heads: None means d_model / head_dim. head_dim: None means d_model / heads, 64 without both.
    shift_rank, decay_rank: ranks of the token shift's and the decay's low-rank projections.
    norm_eps: of the group norm; the official code has 1e-5 * 8^2, flash-linear-attention 1e-5.
    """

    d_model: int
    heads: int | None = None
    head_dim: int | None = None
    shift_rank: int = 32
    decay_rank: int = 64
    norm_eps: float = 6.4e-4

    def __post_init__(self):
        L.check_positive(
            "rwkv6", d_model=self.d_model, heads=self.heads, head_dim=self.head_dim, shift_rank=self.shift_rank,
            decay_rank=self.decay_rank,
        )  # fmt: skip
        L.check_number("rwkv6", 0, norm_eps=self.norm_eps)
        if self.heads and self.head_dim and self.heads * self.head_dim != self.d_model:
            L.refuse("rwkv6", "head_dim", f"d_model / heads = {self.d_model / self.heads:g}", self.head_dim)
        L.divided("rwkv6", "heads" if self.heads else "head_dim", self.d_model, self.heads or self.head_dim or 64)

    @property
    def size(self) -> int:
        return self.head_dim or (self.d_model // self.heads if self.heads else 64)

    @property
    def state_heads(self) -> int:
        return self.d_model // self.size


@register_mixer("rwkv6")
class RWKV6(Mixer):
    r"""Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", 2024 (arXiv 2404.05892), time mixing.

        delta_t = x_{t-1} - x_t,   (m_w, m_k, m_v, m_r, m_g) = tanh((x_t + delta_t * mu_x) W_1) W_2
        x_i = x_t + delta_t * (mu_i + m_i)  for i in w, k, v, r, g;   r, k, v linear in x_r, x_k, x_v;   g = silu(x_g W_g)
        w_t = exp(-exp(w_0 + tanh(x_w D_1) D_2))
        o_t = (S_{t-1} + Diag(u) k_t v_t^T)^T r_t,   S_t = Diag(w_t) S_{t-1} + k_t v_t^T,   y_t = W_o (GroupNorm_heads(o_t) * g_t)

    Maps to `linnet.ops.token_shift` and `linnet.ops.linear_attention` with read="before", bonus u, scale 1.
    State: shift [N, D], S [N,H,K,K].
    """

    Config = RWKV6Config

    def __init__(self, config: RWKV6Config, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c, D = config, config.d_model
        self.mu = nn.ParameterDict({name: nn.Parameter(torch.empty(D)) for name in ("x", *MIXED)})
        self.shift_down = nn.Linear(D, len(MIXED) * c.shift_rank, bias=False)
        self.shift_up = nn.Parameter(torch.empty(len(MIXED), c.shift_rank, D))
        self.w_lora = L.LowRank(D, c.decay_rank, D, bias=True, activation="tanh")
        self.r_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(5))
        self.u = nn.Parameter(torch.empty(D))
        self.norm = nn.GroupNorm(c.state_heads, D, eps=c.norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        D = self.config.d_model
        depth, rest = self.layer_index / max(self.num_layers - 1, 1), 1 - self.layer_index / self.num_layers
        n = torch.arange(D, dtype=torch.float32)
        for name, power, offset in (("x", 1, 0), ("w", 1, 0), ("k", 1, 0), ("v", 1, 0.3 * depth), ("r", 0.5, 0), ("g", 0.5, 0)):
            self.mu[name].copy_(1 - (n / D) ** (power * rest) - offset)
        n = n / max(D - 1, 1)
        nn.init.zeros_(self.shift_down.weight)
        nn.init.zeros_(self.w_lora.down.weight)
        for weight in (self.shift_up, self.w_lora.up.weight):
            nn.init.uniform_(weight, -0.01, 0.01)
        self.w_lora.up.bias.copy_(-6 + 5 * n ** (0.7 + 1.3 * depth))
        self.u.copy_(depth * (1 - n) + 0.1 * ((torch.arange(D) + 1) % 3 - 1))
        for projection, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0), (self.g_proj, 0.1)):
            nn.init.orthogonal_(projection.weight, gain=gain)
        nn.init.zeros_(self.o_proj.weight)
        nn.init.constant_(self.norm.weight, ((self.layer_index + 1) / self.num_layers) ** 0.7)
        nn.init.zeros_(self.norm.bias)

    def state_spec(self) -> StateSpec:
        c = self.config
        return self.make_spec(shift=(c.d_model,), S=(c.state_heads, c.size, c.size))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        shift, S = self.open_state(state, "shift", "S")
        past_BTD, shift = ops.token_shift(
            x_BTD, initial_state=shift, return_state=context.return_state, cu_seqlens=context.cu_seqlens
        )
        delta_BTD = past_BTD - x_BTD
        low = torch.tanh(self.shift_down(x_BTD + delta_BTD * self.mu["x"])).unflatten(-1, (len(MIXED), c.shift_rank))
        mixes = torch.einsum("btmr,mrd->mbtd", low, self.shift_up)
        x_w, x_k, x_v, x_r, x_g = (x_BTD + delta_BTD * (self.mu[name] + m) for name, m in zip(MIXED, mixes, strict=True))
        r_BTHK, k_BTHK, v_BTHV = (L.split_heads(y, c.state_heads) for y in (self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)))
        log_w_BTHK = L.split_heads(-L.full(self.w_lora(x_w)).exp(), c.state_heads)
        o_BTHV, new = ops.linear_attention(
            r_BTHK, k_BTHK, v_BTHV, log_w_BTHK, bonus=self.u.view(c.state_heads, -1), read="before", scale=1.0, initial_state=S,
            return_state=context.return_state, cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        y_BTD = self.norm(o_BTHV.flatten(2).flatten(0, 1)).view_as(x_BTD) * F.silu(self.g_proj(x_g))
        return self.o_proj(y_BTD), self.close_state(context, *(shift or ()), *(new or ()))
