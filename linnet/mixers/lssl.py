"""LSSL: a linear state-space layer per channel with the dense HiPPO-LegS matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers import _ssm as S
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import choice, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class LSSLConfig(S.SSMConfig, mixer="lssl"):
    d_state: int = size(64, "N, state size per channel (the authors: up to 256)")
    channels: int = size(1, "M, outputs per channel before the projection")
    discretization: str = choice(
        "bilinear", '"bilinear" (the authors\' default), "backward" (Euler) or "zoh"', "bilinear", "backward", "zoh"
    )


@register_mixer("lssl")
class LSSL(Mixer):
    r"""Gu et al., "Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers", 2021
    (arXiv 2110.13985), with A and B fixed (LSSL-fixed); step sizes are learned.

        x'(t) = A x(t) + B u(t),   y(t) = C x(t) + D u(t),   A, B: HiPPO-LegS, discretised per channel at step exp(log_dt)
        output W_o GELU(y) + b_o

    Training: `linnet.ops.long_conv` with the kernel K_l = C Abar^l Bbar, from repeated squaring. With a state: blocks of 64 tokens,
    a short `linnet.ops.long_conv` inside and the dense Abar between them. State: x [N, D, d_state].
    """

    Config = LSSLConfig
    no_weight_decay = ("C", "D")

    def add_parts(self) -> None:
        c = self.config
        self.log_dt = nn.Parameter(torch.empty(c.d_model))
        self.C = nn.Parameter(torch.empty(c.d_model, c.channels, c.d_state))
        self.D = nn.Parameter(torch.empty(c.d_model, c.channels))
        self.out_proj = nn.Linear(c.d_model * c.channels, c.d_model)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        L.init_default(self)
        S.init_log_uniform(self.log_dt, self.config.dt_min, self.config.dt_max)
        nn.init.normal_(self.C)
        nn.init.normal_(self.D)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        return {"x": (self.config.d_model, self.config.d_state)}

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """(Abar [D, N, N], Bbar [D, N, 1], C [D, M, N]) in fp64: powers of Abar lose digits."""
        A, B = (m.to(self.C.device) for m in S.hippo_legs(self.config.d_state))
        Abar, Bbar = S.discretize_dense(A, B, self.log_dt.double().exp(), self.config.discretization)
        return Abar, Bbar, self.C.double()

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        (x,) = self.open_state(state)
        u = L.full(x_BTD).repeat_interleave(c.channels, -1)  # output m of channel d is d * M + m
        if c.mode == "auto" and x is None and not context.return_state:
            kernel = S.krylov_kernel(*self.system(), x_BTD.shape[1]).to(u.dtype)
            y, x = ops.long_conv(u, kernel, L.full(self.D).flatten(), cu_seqlens=context.cu_seqlens)[0], None
        else:
            y, x = S.dense_ssm(u, *self.system(), x, context)
            y = y + L.full(self.D).flatten() * u
        return self.out_proj(F.gelu(y.to(x_BTD.dtype))), self.close_state(context, x)
