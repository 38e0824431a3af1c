"""Mamba-2: the state-space dual, linear attention with one decay per head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import flag, interval, size
from linnet.mixers._registry import register_mixer
from linnet.mixers._ssd import SSDConfig


@dataclass(frozen=True)
class Mamba2Config(SSDConfig, mixer="mamba2"):
    norm_groups: int | None = size(None, "blocks of the gated norm (None: `groups`, the authors' code; transformers 5.17 has 1)")
    d_conv: int = size(4, "taps of the short convolution")
    dt_limit: tuple[float, float] | None = interval(None, "(low, high) clamp of the step size")
    norm_before_gate: bool = flag(False, "RMSNorm(y) * silu(z) instead of the published RMSNorm(y * silu(z))")
    A_range: tuple[float, float] = interval((1.0, 16.0), "-A is uniform in it at the start")
    bias: bool = flag(False, "biases of the projections")
    conv_bias: bool = flag(True, "bias of the convolution")

    def check(self) -> None:
        super().check()
        if self.width % (self.norm_groups or self.groups):
            self.refuse("norm_groups", f"a divisor of the inner width {self.width}")


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

    def add_parts(self) -> None:
        c = self.config
        H, BC = c.state_heads, c.groups * c.d_state
        self.widths = (c.width, c.width + 2 * BC, H)
        self.inner = (c.width, BC, BC)
        self.in_proj = nn.Linear(c.d_model, sum(self.widths), bias=c.bias)
        self.conv = L.ShortConv(sum(self.inner), c.d_conv, bias=c.conv_bias)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(H)) for _ in range(3))
        self.norm = L.GatedRMSNorm(c.width, eps=c.norm_eps, groups=c.norm_groups or c.groups, norm_before_gate=c.norm_before_gate)
        self.out_proj = nn.Linear(c.width, c.d_model, bias=c.bias)

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

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c = self.config
        return {"conv": self.conv.state_shape, "S": (c.state_heads, c.d_state, c.value_size)}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, S = self.open_state(state)
        z_BTE, xBC, dt_BTH = self.in_proj(x_BTD).split(self.widths, -1)
        xBC, conv = self.conv(xBC, conv, context)
        x_BTE, B_BTE, C_BTE = xBC.split(self.inner, -1)
        x_BTHV, B_BTGK, C_BTGK = L.split_heads(x_BTE, c.state_heads), L.split_heads(B_BTE, c.groups), L.split_heads(C_BTE, c.groups)
        delta_BTH = F.softplus(L.full(dt_BTH) + L.full(self.dt_bias))
        if c.dt_limit is not None:
            delta_BTH = delta_BTH.clamp(*c.dt_limit)
        v_BTHV = (x_BTHV * delta_BTH[..., None]).to(x_BTHV.dtype)
        o_BTHV, new = ops.linear_attention(
            C_BTGK, B_BTGK, v_BTHV, -L.full(self.A_log).exp() * delta_BTH, scale=1.0, **context.carry(S)
        )
        y_BTHV = o_BTHV + (self.D[:, None] * x_BTHV).to(o_BTHV.dtype)
        return self.out_proj(self.norm(y_BTHV.flatten(2), z_BTE)), self.close_state(context, conv, *(new or ()))
