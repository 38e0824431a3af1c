"""FSMN: a feedforward layer with a memory block, a learned finite impulse response over past (and future) activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._heads import WidthConfig
from linnet.mixers._options import choice, share, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class FSMNConfig(WidthConfig, mixer="fsmn"):
    expand: float = share(2, "hidden width over d_model")
    lookback: int = size(20, "N1, past taps besides the current one")
    lookahead: int = size(0, "N2, future taps (0: causal; otherwise no state and no decoding)", least=0)
    lookback_stride: int = size(1, "tokens between past taps (DFSMN)")
    lookahead_stride: int = size(1, "tokens between future taps (DFSMN)")
    coefficients: str = choice("vector", '"vector" per channel (vFSMN) or "scalar" for all (sFSMN)', "vector", "scalar")


@register_mixer("fsmn")
class FSMN(Mixer):
    r"""Zhang et al., "Feedforward Sequential Memory Networks: A New Structure to Learn Long-term Dependency", 2015
    (arXiv 1512.08301), in the form of Zhang et al., "Deep-FSMN for Large Vocabulary Continuous Speech Recognition", 2018
    (arXiv 1803.05030).

        h_t = relu(W x_t + b),   p_t = V h_t + c
        y_t = p_t + sum_{i=0}^{N1} a_i * p_{t - s1 i} + sum_{j=1}^{N2} c_j * p_{t + s2 j}

    The model's residual stream is the skip connection between memory blocks of DFSMN. Maps to `linnet.ops.long_conv` with the
    taps spread by their strides, causal bit for bit without future taps. State: p [N, D, N1 s1], the last projections.
    """

    Config = FSMNConfig
    future_option = "lookahead"

    def add_parts(self) -> None:
        c = self.config
        rows = c.d_model if c.coefficients == "vector" else 1
        self.up, self.down = nn.Linear(c.d_model, c.width), nn.Linear(c.width, c.d_model)
        self.past = nn.Parameter(torch.empty(rows, c.lookback + 1))
        self.future = nn.Parameter(torch.empty(rows, c.lookahead)) if c.lookahead else None

    def reset_parameters(self) -> None:
        c = self.config
        L.init_default(self)
        bound = (c.lookback + 1 + c.lookahead) ** -0.5
        for taps in (self.past, self.future):
            if taps is not None:
                nn.init.uniform_(taps, -bound, bound)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        return {"p": (self.config.d_model, self.config.lookback * self.config.lookback_stride)}

    def kernel(self) -> Tensor:
        """[D or 1, N2 s2 + 1 + N1 s1]: the taps and the identity at their lags, most future first."""
        c, past = self.config, L.full(self.past)
        ahead, back = c.lookahead * c.lookahead_stride, c.lookback * c.lookback_stride
        lags = torch.arange(c.lookback + 1, device=past.device) * c.lookback_stride
        kernel = past.new_zeros(past.shape[0], ahead + back + 1).index_copy(1, ahead + lags, past)
        if self.future is not None:
            leads = torch.arange(1, c.lookahead + 1, device=past.device) * c.lookahead_stride
            kernel = kernel.index_copy(1, ahead - leads, L.full(self.future))
        return kernel

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        self.refuse_state(state, context)
        (p,) = self.open_state(state)
        p_BTD = L.full(self.down(F.relu(self.up(x_BTD))))
        y_BTD, new = ops.long_conv(
            p_BTD, self.kernel(), p_BTD.new_ones(c.d_model), lookahead=c.lookahead * c.lookahead_stride, method="direct",
            **context.carry(p),
        )  # fmt: skip
        return y_BTD.to(x_BTD.dtype), self.close_state(context, *(new or ()))
