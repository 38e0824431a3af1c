"""Forget gates with lower bounds that rise with depth, as in HGRN and HGRN2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer
from linnet.mixers._options import MixerConfig, choice


@dataclass(frozen=True)
class BoundedConfig(MixerConfig):
    lower_bound: str = choice(
        "learned", 'of the forget gate in layer l of L: "learned" per channel, rising with depth from l/L; "fixed" l/L; "none"',
        "learned", "fixed", "none",
    )  # fmt: skip


class BoundedMixer(Mixer):
    """A subclass calls `add_bound` where its parts are made. Bounds pass between layers through Context.shared."""

    no_weight_decay = ("bound_logit",)

    def add_bound(self, width: int) -> None:
        learned = self.config.lower_bound == "learned" and self.layer_index > 0
        self.bound_logit = nn.Parameter(torch.empty(width)) if learned else None

    def reset_parameters(self) -> None:
        """The bound starts at l/L: sigmoid = 1 / (L - l + 1) is the step from (l-1)/L to l/L."""
        super().reset_parameters()
        if self.bound_logit is not None:
            nn.init.constant_(self.bound_logit, -math.log(max(self.num_layers - self.layer_index, 1e-3)))

    def bound(self, context: Context) -> Tensor | float:
        """The lower bound of the forget gates of layer l of L, 0 in the first one.

        Learned: lb_l = lb_{l-1} + (1 - lb_{l-1}) sigmoid(logit); lb_{l-1} comes from Context.shared, through which gradients
        reach the layers below. Layers without a bound count as fixed steps.
        """
        kind, layer, layers = self.config.lower_bound, self.layer_index, self.num_layers
        if kind == "none" or layer == 0:
            return 0.0
        if kind == "fixed":
            return layer / layers
        bounds = context.shared.setdefault(f"{self.name}_lower_bounds", {})  # layer index -> bound [D]
        below = max([0] + [k for k in bounds if k < layer])
        previous = bounds.get(below, 0.0)
        previous = previous + (1 - previous) * (layer - 1 - below) / (layers - below)
        bounds[layer] = previous + (1 - previous) * torch.sigmoid(L.full(self.bound_logit))
        return bounds[layer]


def bounded_gate(x_BTD: Tensor, bound: Tensor | float) -> tuple[Tensor, Tensor]:
    """(log f, 1 - f) of the forget gate f = lb + (1 - lb) sigmoid(x), without leaving log space."""
    log_f_BTD = F.logsigmoid(x_BTD)
    if not isinstance(bound, float) or bound > 0:
        bound = (x_BTD.new_full((), bound) if isinstance(bound, float) else bound).clamp_min(1e-30)
        log_f_BTD = torch.logaddexp(bound.log(), torch.log1p(-bound) + log_f_BTD)
    return log_f_BTD, (1 - bound) * torch.sigmoid(-x_BTD)
