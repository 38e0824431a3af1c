"""RWKV-7 "Goose": the time mixing, a diagonal-plus-low-rank recurrence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._options import flag, number, size
from linnet.mixers._registry import register_mixer
from linnet.mixers._rwkv import RWKVConfig, TimeMixing

SHARED = "rwkv7_first_value"  # key of Context.shared: (layer index, value [B, T, D]) of the first RWKV-7 layer
DECAY_SCALE = -math.exp(-0.5)  # log-decay = DECAY_SCALE * sigmoid(.)
MIXED = ("r", "w", "k", "v", "a", "g")  # receptance, decay, key, value, in-context learning rate, gate


@dataclass(frozen=True)
class RWKV7Config(RWKVConfig, mixer="rwkv7"):
    decay_rank: int | None = size(None, "of the decay's low-rank projection (None: about 2.5 sqrt(d_model), the paper's)")
    a_rank: int | None = size(None, "of the in-context learning rate's (None: about 2.5 sqrt(d_model))")
    value_rank: int | None = size(None, "of the value residual's (None: about 1.7 sqrt(d_model))")
    gate_rank: int | None = size(None, "of the gate's (None: about 5 sqrt(d_model); the ranks are multiples of 32)")
    value_residual: bool | None = flag(
        None, "whether the value is mixed with that of the first RWKV-7 layer (None: in every layer but layer 0)"
    )
    norm_eps: float | None = number(None, "of the group norm (None: head_dim * 1e-5)", above=0)

    def rank(self, given: int | None, factor: float) -> int:
        return given or max(32, 32 * round(factor * math.sqrt(self.d_model) * self.size / 64 / 32))


@register_mixer("rwkv7")
class RWKV7(TimeMixing):
    r"""Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution", 2025 (arXiv 2503.14456), time mixing.

        x_m = x_t + (x_{t-1} - x_t) * mu_m  for m in r, w, k, v, a, g;   r, k, v linear in x_r, x_k, x_v
        log w = -e^{-1/2} sigmoid(w0 + tanh(x_w W1) W2),   a = sigmoid(a0 + x_a A1 A2),   g = sigmoid(x_g G1) G2
        v <- v + (v_first - v) * sigmoid(v0 + x_v V1 V2)   in every layer but the first
        kappa = (k * k_k) / |k * k_k| per head,   k' = k * (1 + (a - 1) * k_a)
        S_t = (Diag(w) - (kappa * a) kappa^T) S_{t-1} + k' v^T,   o_t = S_t^T r
        y_t = W_o ((GroupNorm_heads(o_t) + (sum_K r * k' * r_k) v) * g)

    Maps to `linnet.ops.token_shift` and `linnet.ops.dplr` with a = -kappa, b = kappa * a, scale 1.
    State: shift [N, D], S [N,H,K,K]. The first value passes through Context.shared.
    """

    family = "delta"
    Config = RWKV7Config
    no_weight_decay = ("w_lora", "a_lora", "v_lora", "g_lora", "r_k")

    def add_parts(self) -> None:
        c, D = self.config, self.config.d_model
        self.mu = nn.ParameterDict({name: nn.Parameter(torch.empty(D)) for name in MIXED})
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))
        residual = self.layer_index > 0 if c.value_residual is None else c.value_residual
        self.w_lora = L.LowRank(D, c.rank(c.decay_rank, 2.5), D, bias=True, activation="tanh")
        self.a_lora = L.LowRank(D, c.rank(c.a_rank, 2.5), D, bias=True)
        self.v_lora = L.LowRank(D, c.rank(c.value_rank, 1.7), D, bias=True) if residual else None
        self.g_lora = L.LowRank(D, c.rank(c.gate_rank, 5.0), D, activation="sigmoid")
        self.k_k, self.k_a = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(D))
        self.r_k = nn.Parameter(torch.empty(c.state_heads, c.size))
        self.norm = nn.GroupNorm(c.state_heads, D, eps=c.norm_eps or c.size * 1e-5)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c, D = self.config, self.config.d_model
        n = torch.arange(D, dtype=torch.float32)
        linear, zigzag = n / max(D - 1, 1) - 0.5, 2 * (n % c.size) / max(c.size - 1, 1) - 1
        zigzag = zigzag * zigzag.abs()
        for name, power in zip(MIXED, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            self.mu[name].copy_(1 - (n / D) ** (power * self.rest))
        for lora in (self.w_lora, self.a_lora, self.v_lora, self.g_lora):
            if lora is not None:
                nn.init.zeros_(lora.down.weight)
                nn.init.orthogonal_(lora.up.weight, gain=0.1)
        self.w_lora.up.bias.copy_(-5.5 + 6 * (linear + 0.5) ** (1 + self.depth**0.3) + 2.5 * zigzag)
        self.a_lora.up.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * linear)
        if self.v_lora is not None:
            self.v_lora.up.bias.copy_(0.73 - 0.4 * linear)
        self.k_k.copy_(0.71 - 0.1 * linear)
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        self.reset_block((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0))

    def value(self, x_BTD: Tensor, context: Context) -> Tensor:
        """v, mixed with the first RWKV-7 layer's; the first layer leaves its own for the others."""
        v_BTD = self.v_proj(x_BTD)
        layer, first_BTD = context.shared.setdefault(SHARED, (self.layer_index, v_BTD))
        if self.v_lora is None or layer == self.layer_index:
            return v_BTD
        return v_BTD + (first_BTD - v_BTD) * torch.sigmoid(self.v_lora(x_BTD))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        shift, S = self.open_state(state)
        past_BTD, shift = ops.token_shift(x_BTD, **context.carry(shift))
        delta_BTD = past_BTD - x_BTD
        x_r, x_w, x_k, x_v, x_a, x_g = (x_BTD + delta_BTD * self.mu[name] for name in MIXED)
        r_BTD, k_BTD, v_BTD = self.r_proj(x_r), self.k_proj(x_k), self.value(x_v, context)
        a_BTD, gate_BTD = torch.sigmoid(self.a_lora(x_a)), self.g_lora(x_g)
        dtype = r_BTD.dtype  # k_k, k_a may promote under autocast
        log_w_BTD = DECAY_SCALE * torch.sigmoid(L.full(self.w_lora(x_w)))
        kappa_BTHK = nn.functional.normalize(L.full(L.split_heads(k_BTD * self.k_k, c.state_heads)), dim=-1).to(dtype)
        k_BTD = (k_BTD * (1 + (a_BTD - 1) * self.k_a)).to(dtype)
        r_BTHK, k_BTHK, v_BTHV, a_BTHK = (L.split_heads(y, c.state_heads) for y in (r_BTD, k_BTD, v_BTD, a_BTD))
        o_BTHV, new = ops.dplr(
            r_BTHK, k_BTHK, v_BTHV, -kappa_BTHK, kappa_BTHK * a_BTHK, L.split_heads(log_w_BTD, c.state_heads), scale=1.0,
            log_decay_min=DECAY_SCALE * (1 + 1e-6), **context.carry(S),
        )  # fmt: skip
        y_BTD = self.normed(o_BTHV)
        y_BTD = y_BTD + ((r_BTHK * k_BTHK * self.r_k).sum(-1, keepdim=True) * v_BTHV).flatten(2)
        return self.o_proj(y_BTD * gate_BTD), self.close_state(context, *(shift or ()), *(new or ()))
