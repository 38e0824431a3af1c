"""LRU: a linear recurrent unit with a complex diagonal transition on a ring of the unit disc."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import MixerConfig, choice, flag, interval, number, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class LRUConfig(MixerConfig, mixer="lru"):
    d_state: int | None = size(None, "N, complex state channels (None: d_model)")
    radius: tuple[float, float] = interval((0.0, 1.0), "(r_min, r_max) of |lambda| at the start, uniform on that ring of the disc")
    max_phase: float = number(6.28, "phases at the start are uniform in [0, max_phase]", above=0)
    gamma: bool = flag(True, "normalise the input by a learned factor that starts at sqrt(1 - |lambda|^2)")
    output: str = choice("glu", 'after GELU: "glu", "linear"; "none": y itself', "glu", "linear", "none")

    def check(self) -> None:
        if self.radius[1] > 1:
            self.refuse("radius", "two numbers (low, high) with high <= 1")

    @property
    def size(self) -> int:
        return self.d_state or self.d_model


@register_mixer("lru")
class LRU(Mixer):
    r"""Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences", 2023 (arXiv 2303.06349).

        h_t = lambda * h_{t-1} + gamma * (B u_t),   y_t = Re(C h_t) + D * u_t,   lambda = exp(-exp(nu) + i exp(theta)) in C^N
        output GLU(W GELU(y) + b)

    B and C are dense complex matrices, kept as real ones on (real, imaginary) halves. Maps to `linnet.ops.scan` with a = lambda.
    State: h [N, d_state, 2].
    """

    Config = LRUConfig

    def add_parts(self) -> None:
        c = self.config
        self.nu_log, self.theta_log = (nn.Parameter(torch.empty(c.size)) for _ in range(2))
        self.gamma_log = nn.Parameter(torch.empty(c.size)) if c.gamma else None
        self.B = nn.Linear(c.d_model, 2 * c.size, bias=False)
        self.C = nn.Linear(2 * c.size, c.d_model, bias=False)
        self.D = nn.Parameter(torch.empty(c.d_model))
        width = {"glu": 2 * c.d_model, "linear": c.d_model, "none": 0}[c.output]
        self.out_proj = nn.Linear(c.d_model, width) if width else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c, (low, high) = self.config, self.config.radius
        L.init_default(self)
        square = torch.empty_like(self.nu_log).uniform_(low**2, high**2).clamp(1e-8, 1 - 1e-7)
        self.nu_log.copy_((-0.5 * square.log()).log())
        self.theta_log.copy_(torch.empty_like(square).uniform_(0, c.max_phase).clamp_min(1e-7).log())
        if self.gamma_log is not None:
            self.gamma_log.copy_(0.5 * torch.log1p(-square))
        nn.init.normal_(self.B.weight, std=(2 * c.d_model) ** -0.5)
        nn.init.normal_(self.C.weight, std=c.size**-0.5)
        nn.init.normal_(self.D)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"h": (self.config.size, 2)}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        context = context or Context()
        (h,) = self.open_state(state)
        a_N = torch.polar((-L.full(self.nu_log).exp()).exp(), L.full(self.theta_log).exp())
        u_BTN = torch.complex(*L.full(self.B(x_BTD)).chunk(2, -1))
        if self.gamma_log is not None:
            u_BTN = u_BTN * L.full(self.gamma_log).exp()
        h = None if h is None else torch.view_as_complex(h.to(a_N.real.dtype).contiguous())
        h_BTN, new = ops.scan(u_BTN, a=a_N, **context.carry(h))
        y_BTD = self.C(torch.cat((h_BTN.real, -h_BTN.imag), -1).to(x_BTD.dtype)) + self.D * x_BTD
        if self.out_proj is not None:
            y_BTD = self.out_proj(F.gelu(y_BTD))
            y_BTD = F.glu(y_BTD) if self.config.output == "glu" else y_BTD
        return y_BTD, self.close_state(context, *(torch.view_as_real(x) for x in new or ()))
