"""Mamba: the selective state-space model S6."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._heads import WidthConfig
from linnet.mixers._options import choice, flag, number, share, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class MambaConfig(WidthConfig, mixer="mamba"):
    d_state: int = size(16, "N, state channels per inner channel")
    expand: float = share(2, "inner width over d_model")
    d_conv: int = size(4, "taps of the short convolution")
    dt_rank: int | None = size(None, "rank of the step-size projection (None: ceil(d_model / 16))")
    dt_init: str = choice("random", "weights of W_dt in +-dt_scale dt_rank^-1/2, or all that large", "random", "constant")
    dt_scale: float = number(1.0, "scale of W_dt at the start", above=0)
    dt_min: float = number(1e-3, "smallest step size at the start", above=0)
    dt_max: float = number(0.1, "largest step size at the start", above="dt_min")
    dt_floor: float = number(1e-4, "lower bound of the step sizes at the start", above=0)
    bias: bool = flag(False, "biases of the projections")
    conv_bias: bool = flag(True, "bias of the convolution")
    norm_eps: float | None = number(None, "epsilon of weightless RMS norms of dt, B and C, FalconMamba (None: no norms)", above=0)
    allow_neg_eigval: bool = flag(False, "factors 2 exp(delta A) - 1 in (-1, 1) instead of exp(delta A)")

    @property
    def rank(self) -> int:
        return self.dt_rank or math.ceil(self.d_model / 16)


@register_mixer("mamba")
class Mamba(Mixer):
    r"""Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023 (arXiv 2312.00752).

        (x, z) = split(x W_in),   x = silu(conv(x)),   (dt, B, C) = split(x W_x),   delta = softplus(dt W_dt + b_dt)
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,   y_t = W_out ((C_t . h_t + D x_t) * silu(z_t)),   A = -exp(A_log)

    Maps to `linnet.ops.short_conv` and `linnet.ops.selective_scan`. With allow_neg_eigval (Grazzi et al., 2024,
    arXiv 2411.12537) the factors 2 exp(delta_t A) - 1 go through `linnet.ops.scan`. State:
    conv [N, width, W-1], h [N, width, d_state].
    """

    Config = MambaConfig
    no_weight_decay = ("A_log", "D", "dt_proj.bias")

    def add_parts(self) -> None:
        c = self.config
        self.in_proj = nn.Linear(c.d_model, 2 * c.width, bias=c.bias)
        self.conv = L.ShortConv(c.width, c.d_conv, bias=c.conv_bias)
        self.x_proj = nn.Linear(c.width, c.rank + 2 * c.d_state, bias=False)
        self.dt_proj = nn.Linear(c.rank, c.width)
        self.A_log = nn.Parameter(torch.empty(c.width, c.d_state))
        self.D = nn.Parameter(torch.empty(c.width))
        self.out_proj = nn.Linear(c.width, c.d_model, bias=c.bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c = self.config
        L.init_default(self)
        for bias in (self.in_proj.bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        self.out_proj.weight.div_(math.sqrt(self.num_layers))
        std = c.dt_scale * c.rank**-0.5
        nn.init.constant_(self.dt_proj.weight, std) if c.dt_init == "constant" else nn.init.uniform_(self.dt_proj.weight, -std, std)
        L.init_dt_bias(self.dt_proj.bias, c.dt_min, c.dt_max, c.dt_floor)
        self.A_log.copy_(torch.arange(1, c.d_state + 1).log().expand(c.width, -1))
        nn.init.ones_(self.D)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        return {"conv": self.conv.state_shape, "h": (self.config.width, self.config.d_state)}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, h = self.open_state(state)
        u_BTE, z_BTE = self.in_proj(x_BTD).chunk(2, -1)
        u_BTE, conv = self.conv(u_BTE, conv, context)
        dt_BTR, B_BTN, C_BTN = self.x_proj(u_BTE).split((c.rank, c.d_state, c.d_state), -1)
        if c.norm_eps is not None:
            dt_BTR, B_BTN, C_BTN = (F.rms_norm(L.full(p), p.shape[-1:], eps=c.norm_eps).to(p.dtype) for p in (dt_BTR, B_BTN, C_BTN))
        delta_BTE = F.softplus(L.full(F.linear(dt_BTR, self.dt_proj.weight)) + L.full(self.dt_proj.bias))
        A_EN, D_E = -L.full(self.A_log).exp(), L.full(self.D)
        if c.allow_neg_eigval:
            a_BTEN = 1 + 2 * torch.expm1(delta_BTE[..., None] * A_EN)
            h_BTEN, new = ops.scan((delta_BTE * L.full(u_BTE))[..., None] * L.full(B_BTN)[:, :, None], a=a_BTEN, **context.carry(h))
            y_BTE = torch.einsum("bten,btn->bte", h_BTEN, L.full(C_BTN)) + D_E * u_BTE
            y_BTE = ops.gated_linear_unit(y_BTE, z_BTE).to(x_BTD.dtype)
        else:
            y_BTE, new = ops.selective_scan(u_BTE, delta_BTE, A_EN, B_BTN, C_BTN, D_E, z_BTE, **context.carry(h))
        return self.out_proj(y_BTE), self.close_state(context, conv, *(new or ()))
