"""The mLSTM block of the first xLSTM paper: the memory between an up- and a down-projection, behind a short convolution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._heads import WidthConfig
from linnet.mixers._options import choice, flag, number, share, size
from linnet.mixers._registry import register_mixer
from linnet.mixers.mlstm import MLSTM


@dataclass(frozen=True)
class MLSTMBlockConfig(WidthConfig, mixer="mlstm_block"):
    heads: int = size(4, "heads")
    expand: float = share(2.0, "inner width over d_model")
    conv_size: int = size(4, "taps of the short convolution before q and k")
    block_size: int = size(4, "channels of a block of the block-diagonal maps to q, k and v")
    input_gate: str = choice("exp", '"exp": e^i, kept in range by a running maximum, or "sigmoid" (TFLA)', "exp", "sigmoid")
    normalizer: str | None = choice("floor", '"floor" divides by max(|n.q|, 1); None, for the sigmoid gate only', "floor", None)
    soft_cap: float | None = number(None, "c of c tanh(x / c) on both gates' inputs (None: no cap)", above=0)
    bias: bool = flag(False, "biases of the up-, down- and block-diagonal maps")
    norm_eps: float = number(1e-5, "epsilon of the norm", above=0)

    def check(self) -> None:
        self.divide("heads", self.width, self.heads)
        if self.width % self.block_size:
            self.refuse("block_size", f"a divisor of the inner width {self.width}")
        if self.input_gate == "exp" and self.normalizer is None:
            self.refuse("normalizer", "'floor' with the exponential input gate")

    @property
    def key_size(self) -> int:
        return self.width // self.heads

    value_size = key_size


@register_mixer("mlstm_block")
class MLSTMBlock(MLSTM):
    r"""Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024 (arXiv 2405.04517), the mLSTM block.

        C_t = f_t C_{t-1} + i_t k_t v_t^T,   n_t and h_t as in `mlstm`,   log i_t, logit f_t = (q, k, v)_t W_if + b
        (u, z) = split(x W_up),   c = silu(conv(u)),   q = c B_q,   k = c B_k,   v = u B_v,   B block-diagonal in blocks of 4
        y = W_down ((LayerNorm_head(h) + skip * c) * silu(z))

    Maps to `linnet.ops.short_conv`, and as `mlstm` to `linnet.ops.linear_attention`, with K = V = width / H. State:
    conv [N, width, W-1], then C, n, m of `mlstm`.
    """

    Config = MLSTMBlockConfig
    no_weight_decay = ("skip",)

    def add_parts(self) -> None:
        c = self.config
        self.up_proj = nn.Linear(c.d_model, 2 * c.width, bias=c.bias)
        self.conv = L.ShortConv(c.width, c.conv_size, bias=True)
        self.qkv = nn.Parameter(torch.empty(3, c.width // c.block_size, c.block_size, c.block_size))
        self.qkv_bias = nn.Parameter(torch.empty(3, c.width)) if c.bias else None
        self.i_proj, self.f_proj = (nn.Linear(3 * c.width, c.heads) for _ in range(2))
        self.o_norm = L.HeadLayerNorm(c.heads, c.value_size, eps=c.norm_eps)
        self.skip = nn.Parameter(torch.empty(c.width))
        self.down_proj = nn.Linear(c.width, c.d_model, bias=c.bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c = self.config
        L.init_normal(self, (2 / (5 * c.d_model)) ** 0.5)
        nn.init.normal_(self.down_proj.weight, std=2 / (self.num_layers * c.d_model**0.5))
        nn.init.normal_(self.qkv, std=(2 / (5 * c.width)) ** 0.5)
        for gate in (self.i_proj, self.f_proj):
            nn.init.zeros_(gate.weight)
        nn.init.normal_(self.i_proj.bias, std=0.1)
        self.f_proj.bias.copy_(torch.linspace(3, 6, c.heads))
        nn.init.ones_(self.skip)
        if self.qkv_bias is not None:
            nn.init.zeros_(self.qkv_bias)
        self.o_norm.reset_parameters()

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        return {"conv": self.conv.state_shape} | super().state_shapes()

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, *_ = self.open_state(state)
        u_BTE, z_BTE = self.up_proj(x_BTD).chunk(2, -1)
        c_BTE, conv = self.conv(u_BTE, conv, context)
        parts = (y.unflatten(-1, (-1, c.block_size)) for y in (c_BTE, c_BTE, u_BTE))
        parts = [torch.einsum("btnk,nlk->btnl", y, W).flatten(2) for y, W in zip(parts, self.qkv, strict=True)]
        if self.qkv_bias is not None:
            parts = [y + b for y, b in zip(parts, self.qkv_bias, strict=True)]
        gates, memory = torch.cat(parts, -1), None if state is None else state[1:]
        q, k, v = (L.split_heads(y, c.heads) for y in parts)
        h_BTHV, new = self.remember(q, k, v, self.i_proj(gates), self.f_proj(gates), memory, context)
        y_BTE = ops.gated_linear_unit(self.o_norm(h_BTHV) + self.skip * c_BTE, z_BTE)
        return self.down_proj(y_BTE), self.close_state(context, conv, *(new or ()))
