"""Monarch Mixer: gated long convolutions with implicit filters, bidirectional or causal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import MixerConfig, flag, number, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class MonarchMixerConfig(MixerConfig, mixer="monarch_mixer"):
    max_length: int = size(1024, "L, lags of a filter; a token sees L - 1 others on a side", least=2)
    bidirectional: bool = flag(False, "filters on both sides, as in M2-BERT (no state, no decoding)")
    residual: bool = flag(True, "a second long convolution, of the input, added before the output projection")
    filter_size: int = size(128, "width of the network that makes the filters")
    bands: int = size(2, "sines and cosines of the position that it sees")
    frequency: float = number(10.0, "of its sine activations at the start", above=0)
    conv_size: int | None = size(3, "width of the causal short convolution on the three branches (None: none)")


class ImplicitFilter(nn.Module):
    """h_d(l) = e^{-a_d l/(L-1)} MLP(l)_d of lags l = 0 .. L-1, with three sine layers and fixed decays a_d; parameters only.

    Poli et al., "Hyena Hierarchy", 2023 (arXiv 2302.10866). a_d lets channels fall to 1 % after 0.3 to 1.5 of the length.
    """

    def __init__(self, channels: int, config: MonarchMixerConfig):
        super().__init__()
        c, self.channels, self.config = config.filter_size, channels, config
        self.layers = nn.ModuleList(nn.Linear(width, c) for width in (2 * config.bands + 1, c, c))
        self.out = nn.Linear(c, channels, bias=False)
        self.frequency = nn.Parameter(torch.empty(c))

    def reset_parameters(self) -> None:
        for layer in (*self.layers, self.out):
            layer.reset_parameters()
        nn.init.constant_(self.frequency, self.config.frequency)

    def forward(self, lags: int) -> Tensor:
        """The first `lags` lags [D, lags], in at least fp32."""
        length, bands = self.config.max_length, self.config.bands
        kind = {"device": self.frequency.device, "dtype": L.state_dtype(self.frequency)}
        place = torch.arange(lags, **kind)
        angle = place[:, None] * torch.linspace(1e-4, bands - 1, bands, **kind) * (2 * math.pi / length)
        z = torch.cat((place[:, None] / (length - 1), angle.cos(), -angle.sin()), -1)
        for layer in self.layers:
            z = torch.sin(L.full(self.frequency) * nn.functional.linear(z, L.full(layer.weight), L.full(layer.bias)))
        decay = torch.linspace(1 / 1.5, 1 / 0.3, self.channels, **kind) * (math.log(0.01) / (length - 1))
        return (nn.functional.linear(z, L.full(self.out.weight)) * (place[:, None] * decay).exp()).mT


@register_mixer("monarch_mixer")
class MonarchMixer(Mixer):
    r"""Fu et al., "Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture", 2023 (arXiv 2310.12109), its sequence mixer.

        (x1, x2, v) = shortconv(x W),   y = W_o (x2 * (h * (x1 v) + d x1 v) + h' * x + d' x)       h * : convolution over time

    A filter is a small network of the lag (`ImplicitFilter`); bidirectional, a second one reads the future, from the next token on.
    The convolution is a product with Monarch matrices of order p (a Fourier transform in p steps): here any Fourier transform.
    Maps to `linnet.ops.short_conv` and `linnet.ops.long_conv`. State: conv [N,3D,W-1], the last products c [N,D,L-1] and inputs
    r [N,D,L-1].
    """

    Config = MonarchMixerConfig
    future_option = "bidirectional"
    no_weight_decay = ("filters",)

    def add_parts(self) -> None:
        c = self.config
        self.in_proj, self.out_proj = nn.Linear(c.d_model, 3 * c.d_model), nn.Linear(c.d_model, c.d_model)
        self.conv = L.ShortConv(3 * c.d_model, c.conv_size, bias=True, activation=None) if c.conv_size else None
        self.filters = nn.ModuleList(ImplicitFilter(c.d_model, c) for _ in range((1 + c.residual) * (1 + c.bidirectional)))
        self.skip = nn.Parameter(torch.empty(1 + c.residual, c.d_model))

    def reset_parameters(self) -> None:
        L.init_default(self)
        nn.init.normal_(self.skip)
        for part in self.filters:
            part.reset_parameters()

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c = self.config
        past = (c.d_model, c.max_length - 1)
        return {"conv": self.conv.state_shape if self.conv else None, "c": past, "r": past if c.residual else None}

    def convolve(self, u_BTD: Tensor, branch: int, past: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        """Convolution `branch` of u, in at least fp32: 0 that of the products, 1 that of the input."""
        c, ahead = self.config, 0
        kept = c.max_length if past is not None or context.return_state else min(c.max_length, u_BTD.shape[1])
        kernel = self.filters[branch](kept)
        if c.bidirectional and kept > 1:
            kernel, ahead = torch.cat((self.filters[1 + c.residual + branch](kept - 1).flip(1), kernel), 1), kept - 1
        y, new = ops.long_conv(L.full(u_BTD), kernel, L.full(self.skip[branch]), lookahead=ahead, **context.carry(past))
        return y, new[0] if new is not None else None

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        self.refuse_state(state, context)
        conv, past, r = self.open_state(state)
        branches = self.in_proj(x_BTD)
        if self.conv is not None:
            branches, conv = self.conv(branches, conv, context)
        x1, x2, v = branches.chunk(3, -1)
        y_BTD, past = self.convolve(x1 * v, 0, past, context)
        y_BTD = L.full(x2) * y_BTD
        if c.residual:
            z_BTD, r = self.convolve(x_BTD, 1, r, context)
            y_BTD = y_BTD + z_BTD
        return self.out_proj(y_BTD.to(x_BTD.dtype)), self.close_state(context, conv, past, r)
