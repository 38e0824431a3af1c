"""RWKV-4: the time mixing, a decaying weighted mean per channel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._heads import WidthConfig
from linnet.mixers._registry import register_mixer

MIXED = ("k", "v", "r")  # key, value, receptance


@dataclass(frozen=True)
class RWKV4Config(WidthConfig, mixer="rwkv4"):
    pass


@register_mixer("rwkv4")
class RWKV4(Mixer):
    r"""Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", 2023 (arXiv 2305.13048), time mixing; per channel:

        x_i = mu_i x_t + (1 - mu_i) x_{t-1}  for i in k, v, r;   k, v linear in x_k, x_v;   r = sigmoid(x_r W_r)
        a_t = e^{-w} a_{t-1} + e^{k_t} v_t,   b_t = e^{-w} b_{t-1} + e^{k_t},   w = e^{decay} > 0
        o_t = (a_{t-1} + e^{u + k_t} v_t) / (b_{t-1} + e^{u + k_t}),   y_t = W_o (r_t * o_t)

    Maps to `linnet.ops.token_shift` and `linnet.ops.linear_attention`: every channel is a head with K = V = 1, log_gain k,
    log_decay -w, read="before", bonus e^u, normalizer="sum".
    State: shift [N, D], a [N,E,1,1], b [N,E,1] and the running maximum m [N,E]: the true values are e^m a, e^m b.
    """

    Config = RWKV4Config

    def add_parts(self) -> None:
        D, E = self.config.d_model, self.config.width
        self.mu = nn.ParameterDict({name: nn.Parameter(torch.empty(D)) for name in MIXED})
        self.k_proj, self.v_proj, self.r_proj = (nn.Linear(D, E, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(E, D, bias=False)
        self.decay, self.u = nn.Parameter(torch.empty(E)), nn.Parameter(torch.empty(E))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        D, E = self.config.d_model, self.config.width
        depth, rest = self.layer_index / max(self.num_layers - 1, 1), 1 - self.layer_index / self.num_layers
        n, m = torch.arange(D, dtype=torch.float32) / D, torch.arange(E, dtype=torch.float32)
        self.mu["k"].copy_(n**rest)
        self.mu["v"].copy_(n**rest + 0.3 * depth)
        self.mu["r"].copy_(n ** (0.5 * rest))
        self.decay.copy_(-5 + 8 * (m / max(E - 1, 1)) ** (0.7 + 1.3 * depth))
        self.u.copy_(math.log(0.3) + 0.5 * ((m + 1) % 3 - 1))
        nn.init.orthogonal_(self.v_proj.weight)
        for projection in (self.k_proj, self.r_proj, self.o_proj):
            nn.init.zeros_(projection.weight)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        E = self.config.width
        return {"shift": (self.config.d_model,), "a": (E, 1, 1), "b": (E, 1), "m": (E,)}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        context = context or Context()
        shift, *past = self.open_state(state)
        past_BTD, shift = ops.token_shift(x_BTD, **context.carry(shift))
        x_k, x_v, x_r = (past_BTD + (x_BTD - past_BTD) * self.mu[name] for name in MIXED)
        k_BTE, v_BTE1 = L.full(self.k_proj(x_k)), self.v_proj(x_v).unsqueeze(-1)
        one_BT11 = torch.ones_like(v_BTE1[:, :, :1])
        o_BTE1, new = ops.linear_attention(
            one_BT11, one_BT11, v_BTE1, -L.full(self.decay).exp(), log_gain=k_BTE, bonus=L.full(self.u).exp().unsqueeze(-1),
            read="before", normalizer="sum", normalizer_eps=0.0, scale=1.0, **context.carry(None if state is None else tuple(past)),
        )  # fmt: skip
        y_BTD = self.o_proj(torch.sigmoid(self.r_proj(x_r)) * o_BTE1.squeeze(-1))
        return y_BTD, self.close_state(context, *(shift or ()), *(new or ()))
