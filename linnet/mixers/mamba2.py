"""Mamba-2: the state-space dual, linear attention with one decay per head."""

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
class Mamba2Config:
    """Options of `mamba2`.

    heads: H (None: inner width / head_dim). head_dim: P, value channels per head (None: inner width / heads, 64 without both).
    d_state: N, key channels. groups: heads of B and C, a divisor of `heads`.
    norm_groups: blocks of the gated norm (None: `groups`, the authors' code; transformers 5.17 has 1).
    expand: inner width over d_model. d_conv: taps of the short convolution. dt_limit: (low, high) clamp of the step size.
    norm_before_gate: RMSNorm(y) * silu(z) instead of the published RMSNorm(y * silu(z)).
    A_range: -A is uniform in it at the start. dt_min, dt_max, dt_floor: the step sizes at the start. bias, conv_bias: biases.
    """

    d_model: int
    heads: int | None = None
    head_dim: int | None = None
    d_state: int = 128
    groups: int = 1
    norm_groups: int | None = None
    expand: float = 2
    d_conv: int = 4
    dt_limit: tuple[float, float] | None = None
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    A_range: tuple[float, float] = (1.0, 16.0)
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    bias: bool = False
    conv_bias: bool = True

    def __post_init__(self):
        L.check_positive(
            "mamba2", d_model=self.d_model, heads=self.heads, head_dim=self.head_dim, d_state=self.d_state, groups=self.groups,
            norm_groups=self.norm_groups, d_conv=self.d_conv,
        )  # fmt: skip
        L.check_number("mamba2", 0, expand=self.expand, norm_eps=self.norm_eps, dt_min=self.dt_min, dt_floor=self.dt_floor)
        L.check_number("mamba2", self.dt_min, dt_max=self.dt_max)
        for name in ("dt_limit", "A_range"):
            if getattr(self, name) is not None or name == "A_range":
                object.__setattr__(self, name, L.pair("mamba2", name, getattr(self, name)))
        width = L.divided("mamba2", "expand", self.d_model * self.expand, 1)
        size = self.head_dim or (L.divided("mamba2", "heads", width, self.heads) if self.heads else 64)
        heads = self.heads or L.divided("mamba2", "head_dim", width, size)
        if heads * size != width:
            L.refuse("mamba2", "head_dim", f"{width} / {heads}, inner width over heads", self.head_dim)
        if heads % self.groups:
            L.refuse("mamba2", "groups", f"a divisor of heads = {heads}", self.groups)
        if width % (self.norm_groups or self.groups):
            L.refuse("mamba2", "norm_groups", f"a divisor of the inner width {width}", self.norm_groups)

    @property
    def width(self) -> int:
        return int(self.d_model * self.expand)

    @property
    def value_size(self) -> int:
        return self.head_dim or (self.width // self.heads if self.heads else 64)

    @property
    def state_heads(self) -> int:
        return self.width // self.value_size


@register_mixer("mamba2")
class Mamba2(Mixer):
    r"""Dao & Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality", 2024
    (arXiv 2405.21060).

        (z, x, B, C, dt) = split(x W_in),   (x, B, C) = silu(conv(x, B, C)),   delta = softplus(dt + dt_bias)
        S_t = exp(A delta_t) S_{t-1} + B_t (delta_t x_t)^T,   y_t = S_t^T C_t + D x_t,   A = -exp(A_log) per head
        output W_out RMSNorm(y * silu(z))

    Maps to `linnet.ops.short_conv` and `linnet.ops.linear_attention` with q = C, k = B (shared by the heads of a group),
    v = delta x, log_decay = A delta, scale 1. State: conv [N, channels, W-1], S [N,H,d_state,head_dim].
    """

    Config = Mamba2Config
    no_weight_decay = ("A_log", "D", "dt_bias")

    def __init__(self, config: Mamba2Config, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        H, BC = c.state_heads, c.groups * c.d_state
        self.widths = (c.width, c.width + 2 * BC, H)
        self.inner = (c.width, BC, BC)
        self.in_proj = nn.Linear(c.d_model, sum(self.widths), bias=c.bias)
        self.conv = L.ShortConv(sum(self.inner), c.d_conv, bias=c.conv_bias)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(H)) for _ in range(3))
        self.norm = L.GatedRMSNorm(c.width, eps=c.norm_eps, groups=c.norm_groups or c.groups, norm_before_gate=c.norm_before_gate)
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
        L.init_A_log(self.A_log, *c.A_range)
        L.init_dt_bias(self.dt_bias, c.dt_min, c.dt_max, c.dt_floor)
        nn.init.ones_(self.D)

    def state_spec(self) -> StateSpec:
        c = self.config
        return self.make_spec(conv=self.conv.state_shape, S=(c.state_heads, c.d_state, c.value_size))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, S = self.open_state(state, "conv", "S")
        z_BTE, xBC, dt_BTH = self.in_proj(x_BTD).split(self.widths, -1)
        xBC, conv = self.conv(xBC, conv, context)
        x_BTE, B_BTE, C_BTE = xBC.split(self.inner, -1)
        x_BTHV, B_BTGK, C_BTGK = L.split_heads(x_BTE, c.state_heads), L.split_heads(B_BTE, c.groups), L.split_heads(C_BTE, c.groups)
        delta_BTH = F.softplus(L.full(dt_BTH) + L.full(self.dt_bias))
        if c.dt_limit is not None:
            delta_BTH = delta_BTH.clamp(*c.dt_limit)
        v_BTHV = (x_BTHV * delta_BTH[..., None]).to(x_BTHV.dtype)
        o_BTHV, new = ops.linear_attention(
            C_BTGK, B_BTGK, v_BTHV, -L.full(self.A_log).exp() * delta_BTH, scale=1.0, initial_state=S,
            return_state=context.return_state, cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        y_BTHV = o_BTHV + (self.D[:, None] * x_BTHV).to(o_BTHV.dtype)
        return self.out_proj(self.norm(y_BTHV.flatten(2), z_BTE)), self.close_state(context, conv, *(new or ()))
