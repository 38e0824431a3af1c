"""DLR: a linear RNN with one diagonal complex transition for all channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers import _ssm as S
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import choice, flag, number, size
from linnet.mixers._registry import register_mixer

# weight of the complex kernel sum_n W_n Lambda_n^l whose real part is wanted
READS = {"real": 1, "imag": -1j, "sum": 1 - 1j}


@dataclass(frozen=True)
class DLRConfig(S.SSMConfig, mixer="dlr"):
    d_state: int = size(1024, "N, complex state channels, whose transition all channels share")
    dt_min: float = number(1e-4, "smallest -2 Re(log Lambda) at the start; they are log-uniform", above=0)
    dt_max: float = number(0.1, "largest", above="dt_min")
    kernel: str = choice("real", '"real", "imag" or "sum" of both parts of the complex kernel', *READS)
    bidirectional: bool = flag(False, "a second kernel reads the future (no state, no decoding)")

    def check(self) -> None:
        if self.bidirectional and self.mode != "auto":
            self.refuse("mode", "'auto' with bidirectional=True")


@register_mixer("dlr")
class DLR(Mixer):
    r"""Gupta et al., "Simplifying and Understanding State Space Models with Diagonal Linear RNNs", 2022 (arXiv 2212.00768).

        x_t = Lambda * x_{t-1} + 1 u_t,   y_t = Re(W x_t) + D u_t,   Lambda = exp(-rho^2 + i omega) in C^N, shared by all channels
        output W_o GELU(y) + b_o

    Training: `linnet.ops.long_conv` with kernel K_l = Re sum_n W_n Lambda_n^l; with a state: `linnet.ops.scan`, a = Lambda.
    State: x [N, D, d_state, 2].
    """

    Config = DLRConfig
    future_option = "bidirectional"
    no_weight_decay = ("W",)

    def add_parts(self) -> None:
        c = self.config
        self.rho, self.omega = (nn.Parameter(torch.empty(c.d_state)) for _ in range(2))
        self.W = nn.Parameter(torch.empty(1 + c.bidirectional, c.d_model, c.d_state, 2))
        self.D = nn.Parameter(torch.empty(c.d_model))
        self.out_proj = nn.Linear(c.d_model, c.d_model)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c = self.config
        L.init_default(self)
        S.init_log_uniform(self.rho, c.dt_min, c.dt_max)
        self.rho.copy_((self.rho.exp() / 2).sqrt())
        self.omega.copy_(torch.arange(c.d_state, device="cpu") * (2 * math.pi / c.d_state))
        nn.init.normal_(self.W, std=1 / c.d_state)
        nn.init.normal_(self.D)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        return {"x": tuple(self.W.shape[1:])}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        self.refuse_state(state, context)
        (x,) = self.open_state(state)
        log_a = torch.complex(-L.full(self.rho).square(), L.full(self.omega))[None]
        weight = S.as_complex(self.W) * READS[c.kernel]
        if not c.bidirectional:
            y_BTD, x = S.diagonal_ssm(x_BTD, weight[0], log_a, self.D, x, context, c.mode)
        else:
            T = x_BTD.shape[1]
            past, future = (S.exponential_kernel(w, log_a, T) for w in weight)  # the second kernel starts at the next token
            kernel = torch.cat((future[:, : T - 1].flip(1), past), 1)
            y_BTD, _ = ops.long_conv(L.full(x_BTD), kernel, L.full(self.D), lookahead=T - 1, cu_seqlens=context.cu_seqlens)
        return self.out_proj(F.gelu(y_BTD.to(x_BTD.dtype))), self.close_state(context, x)
