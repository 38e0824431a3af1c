"""sLSTM: an LSTM with exponential gates, a normaliser and memory mixing inside heads. Sequential by nature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import MixerConfig, number, size
from linnet.mixers._registry import register_mixer

GATES = 4  # i, f, z, o


@dataclass(frozen=True)
class SLSTMConfig(MixerConfig, mixer="slstm"):
    heads: int = size(4, "blocks of W and R", divides="d_model")
    conv_size: int | None = size(4, "taps of the short convolution before the input and forget gates (None: none)")
    norm_eps: float = number(1e-5, "epsilon of the norm per head", above=0)


@register_mixer("slstm")
class SLSTM(Mixer):
    r"""Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024 (arXiv 2405.04517), the sLSTM layer.

        (i, f, z, o)_t = W (c_t, c_t, x_t, x_t) + R h_{t-1} + b,   c = silu(conv(x)),   W, R block-diagonal over heads
        m_t = max(log sigmoid(f_t) + m_{t-1}, i_t),   i' = exp(i_t - m_t),   f' = exp(log sigmoid(f_t) + m_{t-1} - m_t)
        C_t = f' C_{t-1} + i' tanh(z_t),   n_t = f' n_{t-1} + i',   h_t = sigmoid(o_t) C_t / n_t,   output LayerNorm per head of h

    Maps to `linnet.ops.short_conv` and `linnet.ops.slstm`: the gates read h_{t-1}, so the recurrence is not linear in its state
    and goes token by token. State: conv [N, D, W-1], and h, C, n, m [N, H, K] each; m counts from the first token on.
    """

    Config = SLSTMConfig
    no_weight_decay = ("R",)

    def add_parts(self) -> None:
        c, size = self.config, self.config.d_model // self.config.heads
        self.conv = L.ShortConv(c.d_model, c.conv_size, bias=True) if c.conv_size else None
        self.W, self.R = (nn.Parameter(torch.empty(c.heads, size, GATES, size)) for _ in range(2))
        self.bias = nn.Parameter(torch.empty(c.heads, GATES, size))
        self.norm_weight = nn.Parameter(torch.empty(c.d_model))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c, size = self.config, self.config.d_model // self.config.heads
        if self.conv is not None:
            self.conv.reset_parameters()
        nn.init.normal_(self.W, std=math.sqrt(2 / (5 * c.d_model)))
        nn.init.zeros_(self.R)
        nn.init.zeros_(self.bias)
        depth = self.layer_index / max(self.num_layers - 1, 1)
        grid = torch.arange(size, device="cpu") / max(size - 1, 1)
        self.bias[:, 1].copy_((5 - 12 * grid ** (0.3 + 1.3 * depth)).expand(c.heads, -1))
        nn.init.ones_(self.norm_weight)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        shape = (self.config.heads, self.config.d_model // self.config.heads)
        return {"conv": self.conv.state_shape if self.conv else None} | dict.fromkeys(("h", "C", "n", "m"), shape)

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, *values = self.open_state(state)
        y_BTD = x_BTD
        if self.conv is not None:
            y_BTD, conv = self.conv(x_BTD, conv, context)
        gates = lambda y, W: torch.einsum("bthk,hkgl->bthgl", L.full(L.split_heads(y, c.heads)), W)
        W = L.full(self.W)
        pre_BTHGK = torch.cat((gates(y_BTD, W[:, :, :2]), gates(x_BTD, W[:, :, 2:])), 3) + L.full(self.bias)
        h_BTHK, new = ops.slstm(pre_BTHGK, L.full(self.R), **context.carry(None if state is None else tuple(values)))
        y = F.layer_norm(h_BTHK, h_BTHK.shape[-1:], eps=c.norm_eps).flatten(2) * L.full(self.norm_weight)
        return y.to(x_BTD.dtype), self.close_state(context, conv, *(new or ()))
