"""Attention with a kernel in place of the softmax: what the mixers with a feature map of their own share.

Shape legend: B batch, T tokens, H heads, K channels of a head, F features, V value channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec


@dataclass(frozen=True)
class KernelConfig:
    """Options of every kernel attention.

    kv_heads: heads of k and v, a divisor of `heads` (None: `heads`). head_dim: channels of a head (None: d_model / heads).
    bias: of all four projections. normalizer_eps: added to the denominator.
    """

    mixer: ClassVar[str]

    d_model: int
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool = False
    normalizer_eps: float = 1e-6

    def __post_init__(self):
        sizes = {"d_model": self.d_model, "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        L.check_positive(self.mixer, **sizes)
        L.check_choice(self.mixer, (True, False), bias=self.bias)
        if not isinstance(self.normalizer_eps, (int, float)) or not self.normalizer_eps >= 0:
            L.refuse(self.mixer, "normalizer_eps", "a number >= 0", self.normalizer_eps)
        if self.heads % self.groups:
            L.refuse(self.mixer, "kv_heads", f"a divisor of heads = {self.heads}", self.kv_heads)
        if self.head_dim is None:
            L.divided(self.mixer, "heads", self.d_model, self.heads)

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def value_size(self) -> int:
        return self.head_dim or self.d_model // self.heads

    @property
    def key_size(self) -> int:
        return self.value_size

    @property
    def features(self) -> int:
        """F, the feature channels of a head."""
        raise NotImplementedError


class KernelAttention(Mixer):
    """o_t = sum_s phi(q_t).phi(k_s) v_s / (sum_s phi(q_t).phi(k_s) + eps): a subclass says what phi is.

    State: S [N,H,F,V], z [N,H,F], with a log-gain m [N,H], with positions length [N].
    """

    def __init__(self, config: Any, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        self.q_proj = nn.Linear(c.d_model, c.heads * c.key_size, bias=c.bias)
        self.k_proj = nn.Linear(c.d_model, c.groups * c.key_size, bias=c.bias)
        self.v_proj = nn.Linear(c.d_model, c.groups * c.value_size, bias=c.bias)
        self.o_proj = nn.Linear(c.heads * c.value_size, c.d_model, bias=c.bias)

    gain: bool = False  # whether `phi` returns a log-gain of the keys
    positional: bool = False  # whether `phi` needs positions

    def phi(self, q_BTHK: Tensor, k_BTHK: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features of q and of k [B,T,H,F] and the log-gain of the keys [B,T,H]: the true features of k are e^gain times these."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        L.init_normal(self)

    def state_spec(self) -> StateSpec:
        c = self.config
        gain, length = (c.groups,) if self.gain else None, () if self.positional else None
        return self.make_spec(S=(c.groups, c.features, c.value_size), z=(c.groups, c.features), m=gain, length=length)

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        names = ("S", "z", "m" if self.gain else None, "length" if self.positional else None)
        *past, length_N = self.open_state(state, *names)
        past = None if state is None else tuple(y for y in past if y is not None)
        q_BTHK = L.split_heads(self.q_proj(x_BTD), c.heads)
        k_BTHK, v_BTHV = (L.split_heads(p(x_BTD), c.groups) for p in (self.k_proj, self.v_proj))
        positions_BT = L.token_positions(x_BTD, context, length_N) if self.positional else None
        q_BTHF, k_BTHF, gain_BTH = self.phi(q_BTHK, k_BTHK, positions_BT)
        o_BTHV, new = ops.linear_attention(
            q_BTHF.to(v_BTHV.dtype), k_BTHF.to(v_BTHV.dtype), v_BTHV, log_gain=gain_BTH, normalizer="sum",
            normalizer_eps=c.normalizer_eps, scale=1.0, initial_state=past,
            return_state=context.return_state, cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        if new is not None and self.positional:
            count_N = L.token_counts(x_BTD, context)
            new = (*new, count_N if length_N is None else length_N + count_N)
        return self.o_proj(o_BTHV.flatten(2)), new


class HeadMap(nn.Module):
    """A linear map of every head's channels: y = x W_h + b_h, [B,T,H,K] -> [B,T,H,F]."""

    def __init__(self, heads: int, size_in: int, size_out: int, *, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, size_in, size_out))
        self.bias = nn.Parameter(torch.empty(heads, size_out)) if bias else None

    def forward(self, x_BTHK: Tensor) -> Tensor:
        y_BTHF = torch.einsum("bthk,hkf->bthf", x_BTHK, self.weight)
        return y_BTHF if self.bias is None else y_BTHF + self.bias
