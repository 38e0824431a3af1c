"""AL-RNN: an almost-linear recurrent network, a few of whose units are rectified. Sequential by nature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import MixerConfig, size
from linnet.mixers._registry import register_mixer


@torch.no_grad()
def init_dynamics(decay_M: Tensor, weight_MM: Tensor) -> None:
    """A: the diagonal of (R^T R / M + I) / its largest eigenvalue, R of standard normal numbers; W: N(0, 0.01^2)."""
    if decay_M.is_meta:  # no numbers to draw yet
        return
    units = decay_M.numel()
    R = torch.randn(units, units, device="cpu", dtype=torch.float64)
    gram = R.mT @ R / units + torch.eye(units, device="cpu", dtype=R.dtype)
    decay_M.copy_(gram.diagonal() / torch.linalg.eigvalsh(gram)[-1])
    nn.init.normal_(weight_MM, std=0.01)


@dataclass(frozen=True)
class ALRNNConfig(MixerConfig, mixer="al_rnn"):
    units: int | None = size(None, "M, units of the network (None: d_model)")
    relu_units: int | None = size(None, "P, how many of them are rectified (None: a tenth, as the paper's Lorenz-63)", least=0)

    def check(self) -> None:
        if self.relu_units is not None and self.relu_units > self.M:
            self.refuse("relu_units", f"at most {self.M}, the number of units")

    @property
    def M(self) -> int:
        return self.units or self.d_model

    @property
    def P(self) -> int:
        return max(1, self.M // 10) if self.relu_units is None else self.relu_units


@register_mixer("al_rnn")
class ALRNN(Mixer):
    r"""Brenner et al., "Almost-Linear RNNs Yield Highly Interpretable Symbolic Codes in Dynamical Systems Reconstruction", 2024
    (arXiv 2410.14240).

        z_t = A z_{t-1} + W phi(z_{t-1}) + C x_t + h,   y_t = W_o z_t,   A diagonal, W dense, phi the ReLU on the last P units

    Which units of the P are positive is a word of a symbolic code; within one word the network is linear. The paper reads the first
    units themselves, without inputs: `linnet.evals.dynamics` trains that form. Here inputs and outputs are dense maps.

    Maps to `linnet.ops.almost_linear_rnn`, which goes token by token. State: z [N, M].
    """

    Config = ALRNNConfig
    no_weight_decay = ("A",)

    def add_parts(self) -> None:
        c = self.config
        self.in_proj, self.o_proj = nn.Linear(c.d_model, c.M), nn.Linear(c.M, c.d_model, bias=False)
        self.A, self.W = nn.Parameter(torch.empty(c.M)), nn.Parameter(torch.empty(c.M, c.M))

    def reset_parameters(self) -> None:
        L.init_default(self)
        nn.init.zeros_(self.in_proj.bias)
        init_dynamics(self.A, self.W)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"z": (self.config.M,)}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        context = context or Context()
        self.open_state(state)
        z_BTM, new = ops.almost_linear_rnn(self.in_proj(x_BTD), self.A, self.W, self.config.P, **context.carry(state))
        return self.o_proj(z_BTM), new
