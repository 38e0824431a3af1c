"""The block around a delta rule: projections, short convolution, unit length, output norm. A mixer adds the rule itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import MixerConfig, number, share, size


@dataclass(frozen=True)
class DeltaConfig(MixerConfig):
    heads: int = size(4, "key heads")
    head_dim: int | None = size(None, "K, key channels per head (None: d_model / heads)")
    expand_v: float = share(1.0, "value channels per value head over key channels", of="key_size")
    conv_size: int | None = size(4, "taps of the short convolution on q, k, v (None: none, SiLU only)")
    norm_eps: float = number(1e-5, "epsilon of the output norm", above=0)

    @property
    def state_heads(self) -> int:
        """Heads of the values, and so of the state."""
        return self.heads

    @property
    def key_size(self) -> int:
        return self.head_dim or self.divide("heads", self.d_model, self.heads)

    @property
    def value_size(self) -> int:
        return int(self.key_size * self.expand_v)


@dataclass(frozen=True)
class ValueHeadsConfig(DeltaConfig):
    """Values and states may have more heads than keys: each key serves value_heads / heads of them."""

    value_heads: int | None = size(None, "heads of v and S, a multiple of `heads` (None: `heads`)", multiple_of="heads")

    @property
    def state_heads(self) -> int:
        return self.value_heads or self.heads


class DeltaMixer(Mixer):
    """q, k, v are SiLU of a short convolution, q and k of unit length; the rule makes o; y = W_o norm(o).

    A subclass gives `add_parts` and `mix`, and a config made from `DeltaConfig`; `steps` is the number of writes per token.
    """

    family = "delta"

    steps = 1

    def mix(self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, *more: Any) -> tuple[Tensor, State | None]:
        """(o [B, T, H, V], new state) of the projections, then the state and the context."""
        raise NotImplementedError

    def add_block(self, gate: str | None, *, value_conv: bool = True, **addresses: int) -> None:
        """q_proj, k_proj, v_proj, one Linear per further address, their convolution, o_norm with `gate`'s activation, o_proj.

        value_conv=False: v passes neither convolution nor SiLU.
        """
        c = self.config
        keys, values = c.heads * c.key_size, c.state_heads * c.value_size
        widths = {"q_proj": keys, "k_proj": self.steps * keys, "v_proj": self.steps * values} | addresses
        for name, width in widths.items():
            self.add_module(name, nn.Linear(c.d_model, width, bias=False))
        if not value_conv:
            widths.pop("v_proj")
        self.value_conv, self.inputs, self.widths = value_conv, tuple(widths), tuple(widths.values())
        self.conv = L.ShortConv(sum(self.widths), c.conv_size) if c.conv_size else None
        norm = L.RMSNorm(c.value_size, eps=c.norm_eps)
        self.o_norm = L.GatedRMSNorm(c.value_size, eps=c.norm_eps, activation=gate) if gate else norm
        self.o_proj = nn.Linear(values, c.d_model, bias=False)

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of what the rule keeps, the row axis left out."""
        return {"S": (self.config.state_heads, self.config.key_size, self.config.value_size)}

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        return {"conv": self.conv.state_shape if self.conv else None} | self.memory_shapes()

    def per_step(self, y_BTE: Tensor, heads: int) -> Tensor:
        """[B, T, n*H*C] -> [B, T*n, H, C], and [B, T, n*H] -> [B, T*n, H, 1]."""
        return y_BTE.unflatten(-1, (self.steps, heads, -1)).flatten(1, 2)

    def key(self, k_BTHK: Tensor) -> Tensor:
        """What becomes of the key after the convolution."""
        return L.l2_norm(k_BTHK)

    def project(self, x_BTD: Tensor, conv: Tensor | None, context: Context) -> tuple[list[Tensor], Tensor | None]:
        """[q, k, v, further addresses] and the convolution's state."""
        c, y_BTE = self.config, torch.cat([getattr(self, name)(x_BTD) for name in self.inputs], -1)
        y_BTE, conv = self.conv(y_BTE, conv, context) if self.conv is not None else (F.silu(y_BTE), None)
        q_BTE, k_BTE, *rest = y_BTE.split(self.widths, -1)
        v_BTE = rest.pop(0) if self.value_conv else self.v_proj(x_BTD)
        addresses = [L.l2_norm(L.split_heads(e_BTE, c.heads)) for e_BTE in rest]
        k_BTHK, v_BTHV = self.per_step(k_BTE, c.heads), self.per_step(v_BTE, c.state_heads)
        return [L.l2_norm(L.split_heads(q_BTE, c.heads)), self.key(k_BTHK), v_BTHV, *addresses], conv

    def delta_rule(self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, S: Tensor | None, context: Context, **gates: Any):
        return ops.delta_rule(q_BTHK, k_BTHK, v_BTHV, **gates, steps_per_token=self.steps, **context.carry(S))

    def output(self, x_BTD: Tensor, o_BTHV: Tensor) -> Tensor:
        if isinstance(self.o_norm, L.GatedRMSNorm):
            return self.o_proj(self.o_norm(o_BTHV, L.split_heads(self.g_proj(x_BTD), o_BTHV.shape[2])).flatten(2))
        return self.o_proj(self.o_norm(o_BTHV).flatten(2))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        context = context or Context()
        conv, *memory = self.open_state(state)
        operands, conv = self.project(x_BTD, conv, context)
        o_BTHV, new = self.mix(x_BTD, *operands, memory, context)
        return self.output(x_BTD, o_BTHV), self.close_state(context, conv, *(new or ()))


def diagonal_memory(
    v_BTHK: Tensor, log_decay: Tensor | None, state_NHK: Tensor | None, context: Context, *, read: str = "after"
) -> tuple[Tensor, Tensor | None]:
    """m_t = e^{g_t} m_{t-1} + v_t per head [B, T, H, K], or m_{t-1} with read="before", and the last m [N, H, K].

    Linear attention whose one key channel is 1.
    """
    one_BTH1 = v_BTHK.new_ones(*v_BTHK.shape[:3], 1)
    m_BTHK, new = ops.linear_attention(
        one_BTH1, one_BTH1, v_BTHK, log_decay, read=read, scale=1.0,
        **context.carry(None if state_NHK is None else state_NHK[:, :, None]),
    )  # fmt: skip
    return m_BTHK, None if new is None else new[0][:, :, 0]
