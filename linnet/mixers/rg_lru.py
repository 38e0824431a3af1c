"""RG-LRU: the real-gated linear recurrent unit, in the recurrent block of Griffin and Hawk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._heads import WidthConfig
from linnet.mixers._options import choice, interval, number, share, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class RGLRUConfig(WidthConfig, mixer="rg_lru"):
    heads: int = size(8, "blocks of the gates' matrices, a divisor of the width")
    expand: float = share(1.0, "inner width over d_model (the paper has about 4/3, RecurrentGemma-2B 1)")
    conv_size: int = size(4, "taps of the short convolution")
    c: float = number(8.0, "the power of the decay: a_t = a^(c r_t)", above=0)
    radius: tuple[float, float] = interval((0.9, 0.999), "range of the decay at the start, uniform in its square")
    start: str = choice("a^c", 'what lies in that range: "a^c", the paper, or "a", the official code', "a^c", "a")
    first_token: str = choice(
        "scaled", 'a document\'s first token enters by sqrt(1 - a^2), or by 1 ("unit", the official code)', "scaled", "unit"
    )

    def check(self) -> None:
        self.divide("heads", self.width, self.heads)
        if self.radius[1] >= 1:
            self.refuse("radius", "two numbers (low, high) with high < 1")


@register_mixer("rg_lru")
class RGLRU(Mixer):
    r"""De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models", 2024
    (arXiv 2402.19427).

        u = conv(x W_x + b_x),   r_t = sigmoid(u_t W_r + b_r),   i_t = sigmoid(u_t W_i + b_i),   W_r, W_i block-diagonal over heads
        h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * u_t),   log a_t = -c r_t softplus(Lambda)
        y_t = W_o (h_t * gelu(x_t W_y + b_y)) + b_o

    Maps to `linnet.ops.short_conv` and `linnet.ops.scan` with log_a. State: conv [N, width, W-1], h [N, width]; with
    first_token="unit" also the number of tokens seen.
    """

    Config = RGLRUConfig
    no_weight_decay = ("Lambda",)

    def add_parts(self) -> None:
        c, size = self.config, self.config.width // self.config.heads
        self.x_proj, self.y_proj, self.o_proj = (
            nn.Linear(*shape) for shape in ((c.d_model, c.width), (c.d_model, c.width), (c.width, c.d_model))
        )
        self.conv = L.ShortConv(c.width, c.conv_size, bias=True, activation=None)
        self.W_r, self.W_i = (nn.Parameter(torch.empty(c.heads, size, size)) for _ in range(2))
        self.b_r, self.b_i = (nn.Parameter(torch.empty(c.heads, size)) for _ in range(2))
        self.Lambda = nn.Parameter(torch.empty(c.width))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c = self.config
        L.init_normal(self, c.d_model**-0.5)
        for matrix, bias in ((self.W_r, self.b_r), (self.W_i, self.b_i)):
            nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)
            nn.init.zeros_(bias)
        minus_log = torch.empty_like(self.Lambda).uniform_(c.radius[0] ** 2, c.radius[1] ** 2).clamp_min(1e-8).log() * -0.5
        self.Lambda.copy_(torch.expm1(minus_log / (c.c if c.start == "a^c" else 1)).log())  # softplus(Lambda) = -log a

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        count = () if self.config.first_token == "unit" else None
        return {"conv": self.conv.state_shape, "h": (self.config.width,), "count": count}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, h, count = self.open_state(state)
        u_BTE, conv = self.conv(self.x_proj(x_BTD), conv, context)
        u_BTHK = L.full(L.split_heads(u_BTE, c.heads))
        gate = lambda W, b: torch.sigmoid(torch.einsum("bthk,hkl->bthl", u_BTHK, L.full(W)) + L.full(b)).flatten(2)
        log_a_BTE = -c.c * F.softplus(L.full(self.Lambda)) * gate(self.W_r, self.b_r)
        # the clamp keeps the slope of the root finite where a rounds to 1
        enter_BTE = (-torch.expm1(2 * log_a_BTE)).clamp_min(torch.finfo(log_a_BTE.dtype).tiny).sqrt()
        if c.first_token == "unit":
            first_BT = L.token_positions(x_BTD, context, count) == 0
            enter_BTE = torch.where(first_BT[..., None], 1, enter_BTE)
            count = L.token_counts(x_BTD, context, count)
        h_BTE, new = ops.scan(enter_BTE * gate(self.W_i, self.b_i) * u_BTHK.flatten(2), log_a=log_a_BTE, **context.carry(h))
        y_BTD = self.o_proj(h_BTE.to(x_BTD.dtype) * F.gelu(self.y_proj(x_BTD), approximate="tanh"))
        return y_BTD, self.close_state(context, conv, *(new or ()), count)
