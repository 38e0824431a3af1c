"""Length-scaled softplus attention (LSSA), and the same with re-weighting (LSSAR)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._cached import CachedAttention, RotaryConfig
from linnet.mixers._options import number
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class LSSAConfig(RotaryConfig, mixer="lssa"):
    power: float | None = number(None, "p of the re-weighting (None: no re-weighting)", least=1)
    offset: float = number(1.0, "what is subtracted from n times the weights before the power", least=0)


@dataclass(frozen=True)
class LSSARConfig(LSSAConfig, mixer="lssar"):
    power: float | None = number(3.0, "p of the re-weighting; 15 extrapolates furthest in the paper", least=1)


@register_mixer("lssa")
class LSSA(CachedAttention):
    r"""Gao & Spratling, "Softplus Attention with Re-weighting Boosts Length Extrapolation in LLMs", 2025 (arXiv 2501.13428).

        A_ts = softplus(log K log n  q_t.k_s),  |q| = |k| = 1,  n = t + 1 visible tokens;    w_t = A_t / |A_t|_1
        o_t = sum_{s <= t} w_ts v_s,      y_t = W_o o_t

    With `power` p the rows are sharpened: R_ts = max(n w_ts - 1, 0)^p, w_t = R_t / |R_t|_1 (rows of fewer than three tokens
    subtract nothing). Maps to `linnet.ops.softplus_attention`. Rotary positions as in the paper's models. A flat row, of which
    nothing would be left, keeps its weights: the paper does not say. State: the cache k, v [N,S,Hk,K], length [N], which grows.
    """

    Config = LSSAConfig

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        q_BTHK, k_BTHK, v_BTHK = self.project(x_BTD, self.open_state(state)[-1], context)
        o_BTHK, new = ops.softplus_attention(
            L.l2_norm(q_BTHK), L.l2_norm(k_BTHK), v_BTHK, power=c.power, offset=c.offset, **context.carry(state)
        )
        return self.o_proj(o_BTHK.flatten(2)), new


@register_mixer("lssar")
class LSSAR(LSSA):
    r"""Gao & Spratling, "Softplus Attention with Re-weighting Boosts Length Extrapolation in LLMs", 2025 (arXiv 2501.13428).

        o_t = sum_{s <= t} w_ts v_s,      w_t = R_t / |R_t|_1,   R_ts = max(n A_ts / |A_t|_1 - 1, 0)^p,   A_t as in `lssa`

    `lssa` with re-weighting on by default.
    """

    Config = LSSARConfig
