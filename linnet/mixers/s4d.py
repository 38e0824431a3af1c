"""S4D: a diagonal state-space model per channel, initialised from HiPPO."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers import _ssm as S
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class S4DConfig:
    """Options of `s4d`.

    d_state: N, real state size per channel: N/2 conjugate pairs (N real channels with init "real").
    init: the eigenvalues at the start: "lin" -1/2 + i pi n, "inv" -1/2 + i N/pi (N/(2n+1) - 1), "legs" those of the normal part
    of HiPPO-LegS, "real" -(n+1). discretization: "zoh" or "bilinear". dt_min, dt_max: log-uniform step sizes at the start.
    output: after GELU, "glu" or "linear". mode: "auto" convolves where no state is needed, "recurrent" always scans.
    """

    d_model: int
    d_state: int = 64
    init: str = "lin"
    discretization: str = "zoh"
    dt_min: float = 1e-3
    dt_max: float = 0.1
    output: str = "glu"
    mode: str = "auto"

    def __post_init__(self):
        L.check_positive("s4d", d_model=self.d_model, d_state=self.d_state)
        L.check_choice("s4d", ("lin", "inv", "legs", "real"), init=self.init)
        L.check_choice("s4d", ("zoh", "bilinear"), discretization=self.discretization)
        L.check_choice("s4d", ("glu", "linear"), output=self.output)
        L.check_choice("s4d", S.MODES, mode=self.mode)
        L.check_number("s4d", 0, dt_min=self.dt_min)
        L.check_number("s4d", self.dt_min, dt_max=self.dt_max)
        if self.init != "real":
            L.divided("s4d", "d_state", self.d_state, 2)

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

    def __init__(self, config: S4DConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c, real = config, config.init == "real"
        self.log_dt, self.D = (nn.Parameter(torch.empty(c.d_model)) for _ in range(2))
        self.log_A_real = nn.Parameter(torch.empty(c.d_model, c.channels))
        self.A_imag = None if real else nn.Parameter(torch.empty(c.d_model, c.channels))
        self.C = nn.Parameter(torch.empty(c.d_model, c.channels, *([] if real else [2])))
        self.out_proj = nn.Linear(c.d_model, c.d_model * (2 if c.output == "glu" else 1))
        self.reset_parameters()

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

    def state_spec(self) -> StateSpec:
        return self.make_spec(x=tuple(self.C.shape))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        (x,) = self.open_state(state, "x")
        A, delta = -L.full(self.log_A_real).exp(), L.full(self.log_dt).exp()[:, None]
        if self.A_imag is not None:
            A = torch.complex(A, L.full(self.A_imag))
        log_a, gain = S.discretize(A, delta, c.discretization)
        weight = L.full(self.C) * gain if self.A_imag is None else 2 * S.as_complex(self.C) * gain
        y_BTD, x = S.diagonal_ssm(x_BTD, weight, log_a, self.D, x, context, c.mode)
        y_BTD = self.out_proj(F.gelu(y_BTD.to(x_BTD.dtype)))
        return F.glu(y_BTD) if c.output == "glu" else y_BTD, self.close_state(context, x)
