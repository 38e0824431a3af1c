"""Attention with a kernel in place of the softmax: what the mixers with a feature map of their own share.

Shape legend: B batch, T tokens, H heads, K channels of a head, F features, V value channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._heads import GroupedConfig, HeadMixer
from linnet.mixers._options import flag, number


@dataclass(frozen=True)
class KernelConfig(GroupedConfig):
    bias: bool = flag(False, "bias of all four projections")
    normalizer_eps: float = number(1e-6, "added to the denominator", least=0)

    @property
    def features(self) -> int:
        """F, the feature channels of a head."""
        raise NotImplementedError


class KernelAttention(HeadMixer):
    """o_t = sum_s phi(q_t).phi(k_s) v_s / (sum_s phi(q_t).phi(k_s) + eps): a subclass says what phi is.

    State: S [N,H,F,V], z [N,H,F], with a log-gain m [N,H], with positions length [N].
    """

    gain: bool = False  # whether `phi` returns a log-gain of the keys
    positional: bool = False  # whether `phi` needs positions

    def add_parts(self) -> None:
        c = self.config
        self.add_qkv(bias=c.bias)
        self.o_proj = nn.Linear(c.heads * c.value_size, c.d_model, bias=c.bias)

    def phi(self, q_BTHK: Tensor, k_BTHK: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features of q and of k [B,T,H,F] and the log-gain of the keys [B,T,H]: the true features of k are e^gain times these."""
        raise NotImplementedError

    def attend(
        self, q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, gain_BTH: Tensor | None, past: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """The operator, over past tokens or the whole sequence: output [B,T,H,V] and state."""
        options = {"log_gain": gain_BTH, "normalizer": "sum", "normalizer_eps": self.config.normalizer_eps, "scale": 1.0}
        if self.causal:
            return ops.linear_attention(q_BTHF, k_BTHF, v_BTHV, **options, **context.carry(past))
        return ops.bidirectional_attention(q_BTHF, k_BTHF, v_BTHV, **options, cu_seqlens=context.cu_seqlens)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c = self.config
        gain, length = (c.groups,) if self.gain else None, () if self.positional else None
        return {"S": (c.groups, c.features, c.value_size), "z": (c.groups, c.features), "m": gain, "length": length}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        context = context or Context()
        self.refuse_state(state, context)
        *past, length_N = self.open_state(state)
        past = None if state is None else tuple(y for y in past if y is not None)
        q_BTHK, k_BTHK, v_BTHV = self.qkv(x_BTD)
        positions_BT = L.token_positions(x_BTD, context, length_N) if self.positional else None
        q_BTHF, k_BTHF, gain_BTH = self.phi(q_BTHK, k_BTHK, positions_BT)
        o_BTHV, new = self.attend(q_BTHF.to(v_BTHV.dtype), k_BTHF.to(v_BTHV.dtype), v_BTHV, gain_BTH, past, context)
        if new is not None and self.positional:
            new = (*new, L.token_counts(x_BTD, context, length_N))
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
