"""What the state-space duals (Mamba-2, Mamba-3) share: the options of their sizes and step sizes."""

from __future__ import annotations

from dataclasses import dataclass

from linnet.mixers._heads import WidthConfig
from linnet.mixers._options import number, share, size


@dataclass(frozen=True)
class SSDConfig(WidthConfig):
    """Heads of head_dim value channels that fill the inner width, and keys of d_state channels in groups of heads."""

    heads: int | None = size(None, "H (None: inner width / head_dim)")
    head_dim: int | None = size(None, "V, value channels per head (None: inner width / heads, 64 without both)")
    d_state: int = size(128, "K, key channels")
    groups: int = size(1, "heads of B and C, a divisor of `heads`")
    expand: float = share(2, "inner width over d_model")
    norm_eps: float = number(1e-5, "epsilon of the norms", above=0)
    dt_min: float = number(1e-3, "smallest step size at the start", above=0)
    dt_max: float = number(0.1, "largest step size at the start", above="dt_min")
    dt_floor: float = number(1e-4, "lower bound of the step sizes at the start", above=0)

    def check(self) -> None:
        if self.heads and not self.head_dim:
            self.divide("heads", self.width, self.heads)
        if not self.heads:
            self.divide("head_dim", self.width, self.value_size)
        elif self.heads * self.value_size != self.width:
            self.refuse("head_dim", f"{self.width} / {self.heads}, inner width over heads")
        if self.state_heads % self.groups:
            self.refuse("groups", f"a divisor of heads = {self.state_heads}")

    @property
    def value_size(self) -> int:
        return self.head_dim or (self.width // self.heads if self.heads else 64)

    @property
    def state_heads(self) -> int:
        return self.width // self.value_size
