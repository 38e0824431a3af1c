"""Attention that keeps keys and values of every token: what the mixers beyond plain softmax share.

Shape legend: B batch, T tokens, H query heads, K channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, StateSpec
from linnet.mixers._heads import GroupedConfig
from linnet.mixers._options import choice, flag, number


@dataclass(frozen=True)
class CachedConfig(GroupedConfig):
    bias: bool = flag(False, "bias of all four projections")


@dataclass(frozen=True)
class RotaryConfig(CachedConfig):
    position: str = choice("rope", "rotary positions on q and k, or none", "rope", "none")
    rope_theta: float = number(10000.0, "base of the rotary frequencies", above=0)

    def check(self) -> None:
        super().check()
        if self.position == "rope" and self.size % 2:
            self.refuse("position", f"'none' where a head has an odd number of channels ({self.size})")


class CachedAttention(Mixer):
    """q, k, v of every token, rotated where the config says so; a subclass weighs the keys. The state ends with k, v, length."""

    family = "delta"

    def add_parts(self) -> None:
        c = self.config
        self.q_proj = nn.Linear(c.d_model, c.heads * c.size, bias=c.bias)
        self.k_proj, self.v_proj = (nn.Linear(c.d_model, c.groups * c.size, bias=c.bias) for _ in range(2))
        self.o_proj = nn.Linear(c.heads * c.size, c.d_model, bias=c.bias)

    def reset_parameters(self) -> None:
        L.init_normal(self)

    def cache_shapes(self) -> dict[str, tuple[int | None, ...]]:
        c = self.config
        return {"k": (None, c.groups, c.size), "v": (None, c.groups, c.size), "length": ()}

    def state_shapes(self) -> dict[str, tuple[int | None, ...]]:
        return self.cache_shapes()

    def state_spec(self) -> StateSpec:
        """Caches have the dtype of the model, the rest of the state at least fp32."""
        spec = super().state_spec()
        own = self.q_proj.weight.dtype
        dtypes = (own if shape[:1] == (None,) else dtype for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True))
        return replace(spec, dtypes=tuple(dtypes))

    def project(self, x_BTD: Tensor, length_N: Tensor | None, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """q [B,T,H,K], k and v [B,T,Hk,K]."""
        c = self.config
        q_BTHK = L.split_heads(self.q_proj(x_BTD), c.heads)
        k_BTHK, v_BTHK = (L.split_heads(p(x_BTD), c.groups) for p in (self.k_proj, self.v_proj))
        if getattr(c, "position", "none") == "rope":
            turns = L.turns(L.token_positions(x_BTD, context, length_N), L.rope_frequencies(c.size, c.rope_theta, x_BTD))
            q_BTHK, k_BTHK = L.rotate(q_BTHK, turns), L.rotate(k_BTHK, turns)
        return q_BTHK, k_BTHK, v_BTHK
