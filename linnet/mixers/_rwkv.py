"""What the RWKV time mixings with matrix states share: head sizes, the state, the norm per head, the start of the block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from linnet.mixers._base import Mixer
from linnet.mixers._options import MixerConfig, size


@dataclass(frozen=True)
class RWKVConfig(MixerConfig):
    heads: int | None = size(None, "heads (None: d_model / head_dim)")
    head_dim: int | None = size(None, "channels of a head (None: d_model / heads, 64 without both)")

    def check(self) -> None:
        if self.heads and self.head_dim and self.heads * self.head_dim != self.d_model:
            self.refuse("head_dim", f"d_model / heads = {self.d_model / self.heads:g}")
        self.divide("heads" if self.heads else "head_dim", self.d_model, self.heads or self.head_dim or 64)

    @property
    def size(self) -> int:
        return self.head_dim or (self.d_model // self.heads if self.heads else 64)

    @property
    def state_heads(self) -> int:
        return self.d_model // self.size


class TimeMixing(Mixer):
    """A subclass makes `norm`, the GroupNorm of the heads, and o_proj. State: shift [N, D], the last token, and S [N,H,K,K]."""

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c = self.config
        return {"shift": (c.d_model,), "S": (c.state_heads, c.size, c.size)}

    @property
    def depth(self) -> float:
        """From 0 in the first layer to 1 in the last."""
        return self.layer_index / max(self.num_layers - 1, 1)

    @property
    def rest(self) -> float:
        """1 - l / L, the share of the layers from this one on."""
        return 1 - self.layer_index / self.num_layers

    def reset_block(self, *projections: tuple[nn.Linear, float]) -> None:
        """Orthogonal projections of the given gains, no output, and a norm whose weight rises with depth."""
        for projection, gain in projections:
            nn.init.orthogonal_(projection.weight, gain=gain)
        nn.init.zeros_(self.o_proj.weight)
        nn.init.constant_(self.norm.weight, ((self.layer_index + 1) / self.num_layers) ** 0.7)
        nn.init.zeros_(self.norm.bias)

    def normed(self, o_BTHV: Tensor) -> Tensor:
        """GroupNorm of every head of every token, [B, T, D]."""
        return self.norm(o_BTHV.flatten(2).flatten(0, 1)).view(*o_BTHV.shape[:2], -1)
