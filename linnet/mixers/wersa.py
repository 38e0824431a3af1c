"""WERSA: queries and keys filtered scale by scale in a Haar wavelet basis, then linear attention with random ReLU features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import MixerConfig, flag, number, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class WERSAConfig(MixerConfig, mixer="wersa"):
    heads: int = size(8, "heads")
    levels: int = size(4, "levels of the wavelet transform; the coarsest mean is over 2^levels tokens")
    num_features: int = size(1024, "R, random features of a head")
    shared_features: bool = flag(False, "one random matrix for q and k; published: one for each")
    conv_size: int = size(33, "taps of the depthwise convolution under the filters, odd where bidirectional")
    filter_size: int = size(64, "hidden width of the filters' MLP")
    bidirectional: bool = flag(False, "every token sees all of its document, as published; there is no state then")
    normalizer_eps: float = number(1e-6, "added to the denominator", above=0)
    seed: int = size(0, "of the random features, with the layer index", least=0)

    def check(self) -> None:
        self.divide("heads", self.d_model, self.heads)
        if self.bidirectional and self.conv_size % 2 == 0:
            self.refuse("conv_size", "odd where bidirectional")


@register_mixer("wersa")
class WERSA(Mixer):
    r"""Dentamaro, "Scaling Attention to Very Long Sequences in Linear Time with WERSA", 2025 (arXiv 2507.08637).

        x in {GELU(W_q x), GELU(W_k x)}:   a_0 = x,  a_l = a_{l-1} smoothed,  d_l = a_{l-1} - a_l     (x = a_L + sum_l d_l)
        x'_t = sum_l s_l f_{t,l} d_{t,l} + s_{L+1} f_{t,L+1} a_{t,L},      f_t = sigmoid(MLP(conv(x)_t))
        phi(x) = relu(Omega x / (softplus(b) + 0.1)) / sqrt(R),      o_t = sum_s phi(q'_t).phi(k'_s) v_s / (sum_s ... + eps)
        y_t = W_o LayerNorm(o_t)

    Bidirectional, as published: a_l is the mean over aligned blocks of 2^l tokens, the Haar transform of the zero-padded document;
    the filters act per token on each level. Causal: the a-trous transform, a_{t,l} = (a_{t,l-1} + a_{t-2^{l-1},l-1}) / 2, which
    sums to x in the same way, and a causal convolution. As ReLU is homogeneous, the bandwidth b nearly cancels in the normaliser.
    Maps to `linnet.ops.short_conv` and `linear_attention`; bidirectional: `block_mean`, `long_conv`, `bidirectional_attention`.
    State: smooth [N,2D,2^L-1], conv [N,D,W-1], S [N,H,R,V], z [N,H,R]. Omega depends on (seed, layer) alone: it is neither trained
    nor saved.
    """

    family = "delta"
    Config = WERSAConfig
    future_option = "bidirectional"
    no_weight_decay = ("bandwidth", "scales")

    def add_parts(self) -> None:
        c = self.config
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(c.d_model, c.d_model, bias=False) for _ in range(4))
        self.conv = L.ShortConv(c.d_model, c.conv_size, activation=None)
        self.filters = nn.Sequential(nn.Linear(c.d_model, c.filter_size), nn.GELU(), nn.Linear(c.filter_size, c.levels + 1))
        self.scales, self.bandwidth = nn.Parameter(torch.empty(c.levels + 1)), nn.Parameter(torch.empty(c.heads, 1))
        self.o_norm = nn.LayerNorm(c.d_model)
        draw = torch.Generator("cpu").manual_seed((c.seed << 16) + self.layer_index)
        shape = (2 - c.shared_features, c.num_features, c.d_model // c.heads)
        self.omega = torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu")

    def reset_parameters(self) -> None:
        L.init_normal(self)
        self.o_norm.reset_parameters()
        nn.init.constant_(self.scales, 0.5)
        nn.init.ones_(self.bandwidth)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        c = self.config
        S = (c.heads, c.num_features, c.d_model // c.heads)
        return {"smooth": (2 * c.d_model, 2**c.levels - 1), "conv": self.conv.state_shape, "S": S, "z": S[:2]}

    def smooth(self, a_BTD: Tensor, level: int, state: Tensor | None, context: Context) -> tuple[Tensor, list[Tensor]]:
        """a_l from a_{l-1}, whose last 2^(l-1) values, oldest first, are its state. Bidirectional: from a_0."""
        if self.config.bidirectional:
            return ops.block_mean(a_BTD, 2**level, cu_seqlens=context.cu_seqlens), []
        half = 2 ** (level - 1)
        weight_DW = F.pad(a_BTD.new_full((a_BTD.shape[2], half), 0.0), (1, 0), value=0.5)
        weight_DW = weight_DW + weight_DW.flip(1)
        past = None if state is None else (state[..., half - 1 : 2 * half - 1],)
        a_BTD, new = ops.short_conv(a_BTD, weight_DW, **context.carry(past))
        return a_BTD, list(new or ())

    def mask(self, x_BTD: Tensor, conv: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        """s f [B, T, L + 1] and the state of the convolution."""
        if self.config.bidirectional:
            kernel_DW = self.conv.weight.flip(1).to(x_BTD.dtype)  # lag (W - 1) / 2 ahead first
            y_BTD, _ = ops.long_conv(
                x_BTD, kernel_DW, lookahead=self.config.conv_size // 2, method="direct", cu_seqlens=context.cu_seqlens
            )
        else:
            y_BTD, conv = self.conv(x_BTD, conv, context)
        return self.scales * torch.sigmoid(L.full(self.filters(y_BTD))), conv

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        self.refuse_state(state, context)
        smooth, conv, S, z = self.open_state(state)
        mask_BTL, conv = self.mask(x_BTD, conv, context)
        signal_BTD = a_BTD = L.full(F.gelu(torch.cat((self.q_proj(x_BTD), self.k_proj(x_BTD)), -1)))
        kept, filtered = [], 0.0
        for level in range(1, c.levels + 1):
            coarse_BTD, new = self.smooth(signal_BTD if c.bidirectional else a_BTD, level, smooth, context)
            filtered = filtered + mask_BTL[..., level - 1 : level] * (a_BTD - coarse_BTD)
            a_BTD, kept = coarse_BTD, kept + new
        q_BTHK, k_BTHK = L.split_heads(filtered + mask_BTL[..., -1:] * a_BTD, 2 * c.heads).chunk(2, 2)
        if self.omega.device != x_BTD.device:
            self.omega = self.omega.to(x_BTD.device)
        omega, width = self.omega.to(q_BTHK.dtype), F.softplus(L.full(self.bandwidth)) + 0.1
        q_BTHR, k_BTHR = (F.relu(x @ w.T / width) * c.num_features**-0.5 for x, w in ((q_BTHK, omega[0]), (k_BTHK, omega[-1])))
        v_BTHV = L.split_heads(L.full(self.v_proj(x_BTD)), c.heads)
        attend, past = (ops.linear_attention, context.carry(None if S is None else (S, z)))
        if c.bidirectional:
            attend, past = ops.bidirectional_attention, {"cu_seqlens": context.cu_seqlens}
        o_BTHV, new = attend(q_BTHR, k_BTHR, v_BTHV, normalizer="sum", normalizer_eps=c.normalizer_eps, scale=1.0, **past)
        y_BTD = self.o_proj(self.o_norm(o_BTHV.flatten(2).to(x_BTD.dtype)))
        return y_BTD, self.close_state(context, torch.cat(kept, -1) if context.return_state else None, conv, *(new or ()))
