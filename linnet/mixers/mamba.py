"""Mamba: the selective state-space model S6."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class MambaConfig:
    """Options of `mamba`.

    d_state: N, state channels per inner channel. expand: inner width over d_model. d_conv: taps of the short convolution.
    dt_rank: rank of the step-size projection (None: ceil(d_model / 16)). dt_init: "random" or "constant" weights of W_dt, in
    +-dt_scale dt_rank^-1/2. dt_min, dt_max, dt_floor: the step sizes at the start. bias, conv_bias: biases of the projections
    and of the convolution. allow_neg_eigval: factors 2 exp(delta A) - 1 in (-1, 1) instead of exp(delta A).
    """

    d_model: int
    d_state: int = 16
    expand: float = 2
    d_conv: int = 4
    dt_rank: int | None = None
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    bias: bool = False
    conv_bias: bool = True
    allow_neg_eigval: bool = False

    def __post_init__(self):
        L.check_positive("mamba", d_model=self.d_model, d_state=self.d_state, d_conv=self.d_conv, dt_rank=self.dt_rank)
        L.check_number("mamba", 0, expand=self.expand, dt_scale=self.dt_scale, dt_min=self.dt_min, dt_floor=self.dt_floor)
        L.check_choice("mamba", ("random", "constant"), dt_init=self.dt_init)
        L.check_choice("mamba", (False, True), allow_neg_eigval=self.allow_neg_eigval)
        L.check_number("mamba", self.dt_min, dt_max=self.dt_max)
        L.divided("mamba", "expand", self.d_model * self.expand, 1)

    @property
    def width(self) -> int:
        return int(self.d_model * self.expand)

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

    def __init__(self, config: MambaConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        self.in_proj = nn.Linear(c.d_model, 2 * c.width, bias=c.bias)
        self.conv = L.ShortConv(c.width, c.d_conv, bias=c.conv_bias)
        self.x_proj = nn.Linear(c.width, c.rank + 2 * c.d_state, bias=False)
        self.dt_proj = nn.Linear(c.rank, c.width)
        self.A_log = nn.Parameter(torch.empty(c.width, c.d_state))
        self.D = nn.Parameter(torch.empty(c.width))
        self.out_proj = nn.Linear(c.width, c.d_model, bias=c.bias)
        self.reset_parameters()

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

    def state_spec(self) -> StateSpec:
        return self.make_spec(conv=self.conv.state_shape, h=(self.config.width, self.config.d_state))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, h = self.open_state(state, "conv", "h")
        u_BTE, z_BTE = self.in_proj(x_BTD).chunk(2, -1)
        u_BTE, conv = self.conv(u_BTE, conv, context)
        dt_BTR, B_BTN, C_BTN = self.x_proj(u_BTE).split((c.rank, c.d_state, c.d_state), -1)
        delta_BTE = F.softplus(L.full(F.linear(dt_BTR, self.dt_proj.weight)) + L.full(self.dt_proj.bias))
        A_EN, D_E = -L.full(self.A_log).exp(), L.full(self.D)
        keep = {"initial_state": h, "return_state": context.return_state, "cu_seqlens": context.cu_seqlens}
        if c.allow_neg_eigval:
            a_BTEN = 1 + 2 * torch.expm1(delta_BTE[..., None] * A_EN)
            h_BTEN, new = ops.scan((delta_BTE * L.full(u_BTE))[..., None] * L.full(B_BTN)[:, :, None], a=a_BTEN, **keep)
            y_BTE = torch.einsum("bten,btn->bte", h_BTEN, L.full(C_BTN)) + D_E * u_BTE
            y_BTE = (y_BTE * F.silu(L.full(z_BTE))).to(x_BTD.dtype)
        else:
            y_BTE, new = ops.selective_scan(u_BTE, delta_BTE, A_EN, B_BTN, C_BTN, D_E, z_BTE, **keep)
        return self.out_proj(y_BTE), self.close_state(context, conv, *(new or ()))
