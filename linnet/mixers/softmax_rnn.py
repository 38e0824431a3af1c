"""Softmax attention as a recurrent network: its exponential to order n, with what may stand in place of the denominator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.feature_maps import taylor_features, taylor_size
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._kernel import KernelAttention, KernelConfig
from linnet.mixers._options import choice, number, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class SoftmaxRNNConfig(KernelConfig, mixer="softmax_rnn"):
    heads: int = size(16, "query heads")
    feature_size: int = size(16, "K, the width of q and k")
    order: int = size(2, "n, the highest order of the exponential")
    lowest: int = size(0, "the lowest order: 0, or 1 for what linear attention keeps", least=0)
    position: str = choice("rope", "rotary positions of q and k, or none", "rope", "none")
    rope_theta: float = number(10000.0, "base of the rotary frequencies", above=0)
    denominator: str | None = choice("sum", "what divides the sum (None: nothing)", "sum", "detached", "floor", "length")
    gate: str | None = choice(None, "sigmoid gates per head (None: none)", "input", "output", "both")
    norm: str | None = choice(None, "norm of the output of every head (None: none)", "l2", "rms", "layer")
    norm_eps: float = number(1e-5, "epsilon of the norm", above=0)
    normalizer_eps: float = number(1e-12, "added to the denominator", least=0)

    def check(self) -> None:
        super().check()
        if self.lowest > self.order:
            self.refuse("lowest", f"at most order = {self.order}")
        if self.position == "rope" and self.feature_size % 2:
            self.refuse("feature_size", "even (rotary pairs)")

    @property
    def key_size(self) -> int:
        return self.feature_size

    @property
    def features(self) -> int:
        return taylor_size(self.key_size, self.order, self.lowest)


@register_mixer("softmax_rnn")
class SoftmaxRNN(KernelAttention):
    r"""Mongaras & Larson, "On the Expressiveness of Softmax Attention: A Recurrent Neural Network Perspective", 2025
    (arXiv 2507.23632).

        a_ts = sum_{j=lowest}^{n} s_ts^j / j!,   s_ts = q_t.k_s / sqrt(K),   o_t = G_t sum_{s<=t} a_ts v_s

    The state of order j is sum_s k_s^{(x)j} v_s^T with every product of channels kept once. G_t, by `denominator`: "sum"
    1 / (sum_s a_ts + eps) as in softmax, "detached" the same without a gradient, "floor" 1 / max(|sum_s a_ts|, 1), "length" 1 / t,
    None 1. Gates sigmoid(x W + b) per head, on v, o or both, as in the authors' code, whose clamp s <= 5 has no recurrent form.
    Maps to `linnet.ops.linear_attention`, scale 1. State: S [N,H,F,V], z [N,H,F] for a sum, length [N] for positions.
    """

    Config = SoftmaxRNNConfig

    def add_parts(self) -> None:
        super().add_parts()
        c = self.config
        self.summed = c.denominator in ("sum", "detached", "floor")
        self.positional = c.position == "rope" or c.denominator == "length"
        self.v_gate = nn.Linear(c.d_model, c.groups) if c.gate in ("input", "both") else None
        self.o_gate = nn.Linear(c.d_model, c.heads) if c.gate in ("output", "both") else None
        self.o_norm = L.make_norm(c.norm, c.value_size, c.norm_eps) if c.norm in ("rms", "layer") else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.o_norm is not None:
            self.o_norm.reset_parameters()

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        return super().state_shapes() | ({} if self.summed else {"z": None})

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        S, z, _, length_N = self.open_state(state)
        q_BTHK = L.split_heads(self.q_proj(x_BTD), c.heads)
        k_BTHK, v_BTHV = (L.split_heads(p(x_BTD), c.groups) for p in (self.k_proj, self.v_proj))
        positions_BT = L.token_positions(x_BTD, context, length_N) if self.positional else None
        if c.position == "rope":
            turns = L.turns(positions_BT, L.rope_frequencies(c.key_size, c.rope_theta, x_BTD))
            q_BTHK, k_BTHK = L.rotate(q_BTHK, turns), L.rotate(k_BTHK, turns)
        if self.v_gate is not None:
            v_BTHV = v_BTHV * torch.sigmoid(self.v_gate(x_BTD))[..., None]
        q_BTHF, k_BTHF = (taylor_features(L.full(y), c.order, c.lowest).to(v_BTHV.dtype) for y in (q_BTHK, k_BTHK))
        o_BTHV, new, *sums = ops.linear_attention(
            q_BTHF, k_BTHF, v_BTHV, normalizer={"detached": "sum", "length": None}.get(c.denominator, c.denominator),
            normalizer_eps=c.normalizer_eps, return_normalizer=c.denominator == "detached", scale=1.0,
            **context.carry(None if S is None else tuple(y for y in (S, z) if y is not None)),
        )  # fmt: skip
        if c.denominator == "detached":  # the gradient of the numerator over a constant
            sum_BTH = sums[0][0]
            o_BTHV = o_BTHV * (sum_BTH / sum_BTH.detach()).to(o_BTHV.dtype)[..., None]
        if c.denominator == "length":
            o_BTHV = o_BTHV / (positions_BT + 1).to(o_BTHV.dtype)[..., None, None]
        if self.o_gate is not None:
            o_BTHV = o_BTHV * torch.sigmoid(self.o_gate(x_BTD))[..., None]
        if c.norm is not None:
            o_BTHV = L.l2_norm(o_BTHV, c.norm_eps) if self.o_norm is None else self.o_norm(o_BTHV)
        length_N = L.token_counts(x_BTD, context, length_N) if self.positional else None
        return self.o_proj(o_BTHV.flatten(2)), self.close_state(context, *(new or ()), length_N)
