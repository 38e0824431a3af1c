"""HGRN2: HGRN with a matrix state, its input gate tied to the forget gate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._bounded import BoundedConfig, BoundedMixer, bounded_gate
from linnet.mixers._options import choice, flag, number, size
from linnet.mixers._registry import register_mixer

ACTIVATIONS = L.ACTIVATIONS | {"identity": lambda x: x}


@dataclass(frozen=True)
class HGRN2Config(BoundedConfig, mixer="hgrn2"):
    heads: int | None = size(None, "H (None: d_model / 128), of d_model / H key channels, the paper's expansion ratio, and values")
    q_activation: str = choice("silu", 'activation of q; the official code has "sigmoid"', *ACTIVATIONS)
    v_activation: str = choice("identity", 'activation of v; the official code has "silu"', *ACTIVATIONS)
    norm: str = choice("rms", 'over all heads: "rms", "srms" (no weight) or "layer" (official)', *L.NORMS)
    bias: bool = flag(False, "bias of all projections (official: True)")
    scale: float | None = number(None, "of q (None: K^-1/2 as flash-linear-attention; the norm absorbs it; official: 1)", above=0)
    norm_eps: float = number(1e-5, "epsilon of the norm", above=0)

    def check(self) -> None:
        self.divide("heads", self.d_model, self.state_heads)

    @property
    def state_heads(self) -> int:
        return self.heads or max(1, self.d_model // 128)

    @property
    def size(self) -> int:
        return self.d_model // self.state_heads


@register_mixer("hgrn2")
class HGRN2(BoundedMixer):
    r"""Qin et al., "HGRN2: Gated Linear RNNs with State Expansion", 2024 (arXiv 2404.07904).

        f_t = lb + (1 - lb) sigmoid(x_t W_f),   S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T,   o_t = S_t^T q_t,   y_t = W_o Norm(o_t)

    Lower bounds rise with depth as in `hgrn`, and pass through Context.shared.

    Maps to `linnet.ops.linear_attention` with log_decay [B,T,H,K] = log f and k = 1 - f. State: S [N,H,K,V].
    """

    Config = HGRN2Config

    def add_parts(self) -> None:
        c = self.config
        self.q_proj, self.f_proj, self.v_proj, self.o_proj = (nn.Linear(c.d_model, c.d_model, bias=c.bias) for _ in range(4))
        self.add_bound(c.d_model)
        self.o_norm = L.make_norm(c.norm, c.d_model, c.norm_eps)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c = self.config
        return {"S": (c.state_heads, c.size, c.size)}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        self.open_state(state)
        log_f_BTD, k_BTD = bounded_gate(L.full(self.f_proj(x_BTD)), self.bound(context))
        q_BTD, v_BTD = ACTIVATIONS[c.q_activation](self.q_proj(x_BTD)), ACTIVATIONS[c.v_activation](self.v_proj(x_BTD))
        q_BTHK, k_BTHK, v_BTHV, g_BTHK = (L.split_heads(y, c.state_heads) for y in (q_BTD, k_BTD.to(q_BTD.dtype), v_BTD, log_f_BTD))
        o_BTHV, new = ops.linear_attention(q_BTHK, k_BTHK, v_BTHV, g_BTHK, scale=c.scale, **context.carry(state))
        return self.o_proj(self.o_norm(o_BTHV.flatten(2))), new
