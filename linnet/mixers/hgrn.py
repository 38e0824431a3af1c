"""HGRN: an elementwise gated RNN whose forget gates have lower bounds that rise with depth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._bounded import BoundedConfig, BoundedMixer, bounded_gate
from linnet.mixers._heads import WidthConfig
from linnet.mixers._options import choice, flag, number, share, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class HGRNConfig(WidthConfig, BoundedConfig, mixer="hgrn"):
    expand: float = share(1, "inner width over d_model (the official code has 2, flash-linear-attention 1)")
    output: str = choice(
        "norm_gate", '"norm_gate" RMSNorm(h) * silu(x W_g); "gate_norm" LayerNorm(h * sigmoid(x W_g)), the official code',
        "norm_gate", "gate_norm",
    )  # fmt: skip
    complex: bool = flag(False, "the paper's complex state with a learned rotation per channel (False: real, as the official code)")
    conv_size: int | None = size(None, "width of a short convolution on the input (None: none)")
    norm_eps: float = number(1e-5, "epsilon of the norm", above=0)


@register_mixer("hgrn")
class HGRN(BoundedMixer):
    r"""Qin et al., "Hierarchically Gated Recurrent Neural Network for Sequence Modeling", 2023 (arXiv 2311.04823).

        f_t = lb + (1 - lb) sigmoid(x_t W_f),   h_t = f_t * h_{t-1} + (1 - f_t) * silu(x_t W_i),   y_t = W_o out(h_t, x_t W_g)

    Lower bounds of layers 0 .. L-1 rise from 0: lb_l = lb_{l-1} + (1 - lb_{l-1}) sigmoid(delta_l), delta_l learned per channel.
    They pass through Context.shared, so that a layer's gradients reach the bounds below it. Where no bound was passed, layers
    below count as fixed: lb_{l-1} = (l-1)/L.

    `complex`: h_t = f_t e^{i theta} * h_{t-1} + (1 - f_t) * (silu(x_t W_r) + i silu(x_t W_i)), theta learned per channel, and out
    reads [Re h, Im h]. Maps to `linnet.ops.scan` with log_a = log f, or a = f e^{i theta}. State: h [N, width] or [N, width, 2]
    (and the convolution's, where there is one).
    """

    Config = HGRNConfig

    def add_parts(self) -> None:
        c = self.config
        parts = c.width * (1 + c.complex)
        self.i_proj, self.g_proj = (nn.Linear(c.d_model, parts, bias=False) for _ in range(2))
        self.f_proj = nn.Linear(c.d_model, c.width, bias=False)
        self.conv = L.ShortConv(parts, c.conv_size, activation=None) if c.conv_size else None
        self.add_bound(c.width)
        self.theta = nn.Parameter(torch.empty(c.width)) if c.complex else None
        norm_gate = c.output == "norm_gate"
        self.o_norm = L.GatedRMSNorm(parts, eps=c.norm_eps) if norm_gate else nn.LayerNorm(parts, eps=c.norm_eps)
        self.o_proj = nn.Linear(parts, c.d_model, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.theta is not None:  # as rotary positions
            with torch.no_grad():
                self.theta.copy_(L.rope_frequencies(2 * self.config.width, 10000.0, self.theta))

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c = self.config
        return {"conv": self.conv.state_shape if self.conv else None, "h": (c.width, 2) if c.complex else (c.width,)}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        context = context or Context()
        conv, h = self.open_state(state)
        i_BTE, f_BTE = self.i_proj(x_BTD), L.full(self.f_proj(x_BTD))
        if self.conv is not None:
            i_BTE, conv = self.conv(i_BTE, conv, context)
        log_f_BTE, kept_BTE = bounded_gate(f_BTE, self.bound(context))
        if self.theta is None:
            h_BTE, new = ops.scan(kept_BTE * F.silu(L.full(i_BTE)), log_a=log_f_BTE, **context.carry(h))
        else:
            a_BTE = torch.polar(log_f_BTE.exp(), L.full(self.theta).expand_as(log_f_BTE))
            input_BTE = kept_BTE * torch.complex(*F.silu(L.full(i_BTE)).chunk(2, -1))
            h = None if h is None else torch.view_as_complex(h.to(kept_BTE.dtype).contiguous())
            h_BTE, new = ops.scan(input_BTE, a=a_BTE, **context.carry(h))
            h_BTE, new = torch.cat((h_BTE.real, h_BTE.imag), -1), new and tuple(torch.view_as_real(y) for y in new)
        h_BTE, g_BTE = h_BTE.to(x_BTD.dtype), self.g_proj(x_BTD)
        y_BTE = self.o_norm(h_BTE, g_BTE) if self.config.output == "norm_gate" else self.o_norm(h_BTE * torch.sigmoid(g_BTE))
        return self.o_proj(y_BTE), self.close_state(context, conv, *(new or ()))
