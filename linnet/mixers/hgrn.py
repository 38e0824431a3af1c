"""HGRN: an elementwise gated RNN whose forget gates have lower bounds that rise with depth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer

SHARED = "hgrn_lower_bounds"  # key of Context.shared: {layer index: lower bound [D]}


@dataclass(frozen=True)
class HGRNConfig:
    """Options of `hgrn`.

    expand: inner width over d_model (the official code has 2, flash-linear-attention 1).
    lower_bound: of the forget gate in layer l of L: "learned" per channel, rising with depth from l/L; "fixed" l/L; "none".
    output: "norm_gate" RMSNorm(h) * silu(x W_g); "gate_norm" LayerNorm(h * sigmoid(x W_g)), the official code.
    conv_size: width of a short convolution on the input (None: none).
    """

    d_model: int
    expand: float = 1
    lower_bound: str = "learned"
    output: str = "norm_gate"
    conv_size: int | None = None
    norm_eps: float = 1e-5

    def __post_init__(self):
        L.check_positive("hgrn", d_model=self.d_model, conv_size=self.conv_size)
        L.check_number("hgrn", 0, expand=self.expand, norm_eps=self.norm_eps)
        L.check_choice("hgrn", ("learned", "fixed", "none"), lower_bound=self.lower_bound)
        L.check_choice("hgrn", ("norm_gate", "gate_norm"), output=self.output)
        L.divided("hgrn", "expand", self.d_model * self.expand, 1)

    @property
    def width(self) -> int:
        return int(self.d_model * self.expand)


@register_mixer("hgrn")
class HGRN(Mixer):
    r"""Qin et al., "Hierarchically Gated Recurrent Neural Network for Sequence Modeling", 2023 (arXiv 2311.04823), real form.

        f_t = lb + (1 - lb) sigmoid(x_t W_f),   h_t = f_t * h_{t-1} + (1 - f_t) * silu(x_t W_i),   y_t = W_o out(h_t, x_t W_g)

    Lower bounds of layers 0 .. L-1 rise from 0: lb_l = lb_{l-1} + (1 - lb_{l-1}) sigmoid(delta_l), delta_l learned per channel.
    They pass through Context.shared, so that a layer's gradients reach the bounds below it. Where no bound was passed, layers
    below count as fixed: lb_{l-1} = (l-1)/L.

    Maps to `linnet.ops.scan` with log_a = log f. State: h [N, width] (and the convolution's, where there is one).
    """

    Config = HGRNConfig
    no_weight_decay = ("bound_logit",)

    def __init__(self, config: HGRNConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        self.i_proj, self.f_proj, self.g_proj = (nn.Linear(c.d_model, c.width, bias=False) for _ in range(3))
        self.conv = L.ShortConv(c.width, c.conv_size, activation=None) if c.conv_size else None
        learned = c.lower_bound == "learned" and layer_index > 0
        self.bound_logit = nn.Parameter(torch.empty(c.width)) if learned else None
        norm_gate = c.output == "norm_gate"
        self.o_norm = L.GatedRMSNorm(c.width, eps=c.norm_eps) if norm_gate else nn.LayerNorm(c.width, eps=c.norm_eps)
        self.o_proj = nn.Linear(c.width, c.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        L.init_normal(self)
        if isinstance(self.o_norm, nn.LayerNorm):
            self.o_norm.reset_parameters()
        if self.bound_logit is not None:
            L.init_bound(self.bound_logit, self.layer_index, self.num_layers)

    def state_spec(self) -> StateSpec:
        return self.make_spec(conv=self.conv.state_shape if self.conv else None, h=(self.config.width,))

    def bound(self, context: Context) -> Tensor | float:
        """The lower bound of this layer, 0 in the first one."""
        return L.lower_bound(self.config.lower_bound, self.bound_logit, SHARED, self.layer_index, self.num_layers, context)

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        context = context or Context()
        conv, h = self.open_state(state, "conv" if self.conv else None, "h")
        i_BTE, f_BTE = self.i_proj(x_BTD), L.full(self.f_proj(x_BTD))
        if self.conv is not None:
            i_BTE, conv = self.conv(i_BTE, conv, context)
        log_f_BTE, kept_BTE = L.bounded_gate(f_BTE, self.bound(context))
        input_BTE = kept_BTE * F.silu(L.full(i_BTE))
        h_BTE, new = ops.scan(
            input_BTE, log_a=log_f_BTE, initial_state=h, return_state=context.return_state, cu_seqlens=context.cu_seqlens
        )
        h_BTE, g_BTE = h_BTE.to(x_BTD.dtype), self.g_proj(x_BTD)
        y_BTE = self.o_norm(h_BTE, g_BTE) if self.config.output == "norm_gate" else self.o_norm(h_BTE * torch.sigmoid(g_BTE))
        return self.o_proj(y_BTE), self.close_state(context, conv, *(new or ()))
