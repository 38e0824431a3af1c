"""S4D: a diagonal state-space model per channel, initialised from HiPPO."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers import _ssm as S
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import choice, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class S4DConfig(S.SSMConfig, mixer="s4d"):
    d_state: int = size(64, 'N, real state size per channel: N/2 conjugate pairs (N real channels with init "real")')
    init: str = choice(
        "lin",
        'the eigenvalues at the start: "lin" -1/2 + i pi n, "inv" -1/2 + i N/pi (N/(2n+1) - 1), "legs" those of the normal part of '
        'HiPPO-LegS, "real" -(n+1)',
        "lin", "inv", "legs", "real",
    )  # fmt: skip
    discretization: str = choice("zoh", '"zoh" (zero-order hold) or "bilinear"', "zoh", "bilinear")
    output: str = choice("glu", 'after GELU, "glu" or "linear"', "glu", "linear")

    def check(self) -> None:
        if self.init != "real":
            self.divide("d_state", self.d_state, 2)

    @property
    def channels(self) -> int:
        return self.d_state if self.init == "real" else self.d_state // 2


@register_mixer("s4d")
class S4D(Mixer):
    r"""Gu, Gupta, Goel & Re, "On the Parameterization and Initialization of Diagonal State Space Models", 2022 (arXiv 2206.11893).

        x'(t) = A x(t) + u(t),  y(t) = 2 Re(C x(t)) + D u(t),  A = -exp(log_A_real) + i A_imag, discretised at step exp(log_dt)
        output GLU(W GELU(y) + b)

    B is 1 (C absorbs it). Training: `linnet.ops.long_conv` with kernel K_l = 2 Re sum_n C_n Bbar_n Abar_n^l; with a state:
    `linnet.ops.scan` with a = Abar, whose state is x without its input gain Bbar. State: x [N, D, d_state/2, 2].
    """

    Config = S4DConfig
    no_weight_decay = ("log_A_real", "A_imag", "C")

    def add_parts(self) -> None:
        c = self.config
        real = c.init == "real"
        self.log_dt, self.D = (nn.Parameter(torch.empty(c.d_model)) for _ in range(2))
        self.log_A_real = nn.Parameter(torch.empty(c.d_model, c.channels))
        self.A_imag = None if real else nn.Parameter(torch.empty(c.d_model, c.channels))
        self.C = nn.Parameter(torch.empty(c.d_model, c.channels, *([] if real else [2])))
        self.out_proj = nn.Linear(c.d_model, c.d_model * (2 if c.output == "glu" else 1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c, count = self.config, self.config.channels
        L.init_default(self)
        S.init_log_uniform(self.log_dt, c.dt_min, c.dt_max)
        nn.init.normal_(self.D)
        nn.init.normal_(self.C, std=1.0 if c.init == "real" else math.sqrt(0.5))
        n = torch.arange(count, dtype=torch.float64, device="cpu")
        self.log_A_real.copy_((n + 1).log() if c.init == "real" else torch.full_like(n, 0.5).log())
        if self.A_imag is not None:
            N = 2 * count
            imag = {"lin": lambda: math.pi * n, "inv": lambda: N / math.pi * (N / (2 * n + 1) - 1)}
            self.A_imag.copy_(S.legs_frequencies(count) if c.init == "legs" else imag[c.init]())

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        return {"x": tuple(self.C.shape)}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        (x,) = self.open_state(state)
        A, delta = -L.full(self.log_A_real).exp(), L.full(self.log_dt).exp()[:, None]
        if self.A_imag is not None:
            A = torch.complex(A, L.full(self.A_imag))
        log_a, gain = S.discretize(A, delta, c.discretization)
        weight = L.full(self.C) * gain if self.A_imag is None else 2 * S.as_complex(self.C) * gain
        y_BTD, x = S.diagonal_ssm(x_BTD, weight, log_a, self.D, x, context, c.mode)
        y_BTD = self.out_proj(F.gelu(y_BTD.to(x_BTD.dtype)))
        return F.glu(y_BTD) if c.output == "glu" else y_BTD, self.close_state(context, x)
