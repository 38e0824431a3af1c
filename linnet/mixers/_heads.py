"""Widths and heads: the options that say them, and the projections to queries, keys and values that most mixers share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer
from linnet.mixers._options import MixerConfig, share, size


@dataclass(frozen=True)
class WidthConfig(MixerConfig):
    """An inner width, given as a multiple of d_model."""

    expand: float = share(1.0, "inner width over d_model")

    @property
    def width(self) -> int:
        return int(self.d_model * self.expand)


@dataclass(frozen=True)
class HeadConfig(MixerConfig):
    """Heads that divide a key width and a value width, given as multiples of d_model."""

    heads: int = size(4, "heads")
    expand_k: float = share(1.0, "key width over d_model", parts="heads")
    expand_v: float = share(1.0, "value width over d_model", parts="heads")

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.heads

    @property
    def key_size(self) -> int:
        """K, key channels of a head."""
        return int(self.d_model * self.expand_k / self.heads)

    @property
    def value_size(self) -> int:
        """V, value channels of a head."""
        return int(self.d_model * self.expand_v / self.heads)


@dataclass(frozen=True)
class HeadDimConfig(MixerConfig):
    """Heads of head_dim channels each."""

    heads: int = size(8, "query heads")
    head_dim: int | None = size(None, "channels of a head (None: d_model / heads)")

    def check(self) -> None:
        if self.head_dim is None:
            self.divide("heads", self.d_model, self.heads)

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.heads

    @property
    def size(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.d_model // self.heads

    @property
    def key_size(self) -> int:
        return self.size

    @property
    def value_size(self) -> int:
        return self.size


@dataclass(frozen=True)
class GroupedConfig(HeadDimConfig):
    """Heads of head_dim channels; groups of them share a key and a value."""

    kv_heads: int | None = size(None, "heads of k and v, a divisor of `heads` (None: `heads`)", divides="heads")

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads


class HeadMixer(Mixer):
    """q of `heads`, k and v of `groups` heads: one projection each, and one short convolution over all three where there is one."""

    def add_qkv(self, *, bias: bool = False, conv_size: int | None = None, activation: str | None = "silu") -> None:
        c = self.config
        self.widths = (c.heads * c.key_size, c.groups * c.key_size, c.groups * c.value_size)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.d_model, width, bias=bias) for width in self.widths)
        self.conv = L.ShortConv(sum(self.widths), conv_size, activation=activation) if conv_size else None

    def qkv(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B,T,H,K], k [B,T,G,K] and v [B,T,G,V]."""
        c = self.config
        y = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        return tuple(L.split_heads(part, heads) for part, heads in zip(y, (c.heads, c.groups, c.groups), strict=True))

    def convolved_qkv(self, x_BTD: Tensor, conv: Tensor | None, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v of `qkv` after the convolution, and its state."""
        if self.conv is None:
            return *self.qkv(x_BTD), None
        y_BTE, conv = self.conv(torch.cat((self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)), -1), conv, context)
        c, (q_BTE, k_BTE, v_BTE) = self.config, y_BTE.split(self.widths, -1)
        return L.split_heads(q_BTE, c.heads), L.split_heads(k_BTE, c.groups), L.split_heads(v_BTE, c.groups), conv
