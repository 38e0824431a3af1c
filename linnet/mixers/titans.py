"""Titans: a deep memory that learns at test time, with momentum and forgetting, alone or beside attention."""

from __future__ import annotations

from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._registry import register_mixer
from linnet.mixers._titans import LongTermMemory, PersistentAttention, TitansConfig, in_segments


@register_mixer("titans")
class Titans(Mixer):
    r"""Behrouz et al., "Titans: Learning to Memorize at Test Time", 2025 (arXiv 2501.00663).

        S_t = eta_t S_{t-1} - theta_t gradient of |M(k_t; W') - v_t|^2,   W_t = (1 - alpha_t) W_{t-1} + S_t,   m_t = M(q_t; W_t)
        eta_t, theta_t / rate_max, alpha_t = sigmoid(x_t W + b) per head; W' the weights at the start of the mini-batch

        "memory"   y_t = W_o (RMSNorm(m_t) * silu(x_t W_g))
        "gate"     y_t = W_o (RMSNorm(a_t) * sigmoid(RMSNorm(m_t))),  a = attention(x) in a sliding window
        "layer"    y_t = W_o a_t,  a = attention(RMSNorm(m)) in a sliding window
        "context"  h_t = M(q'_t; W'),  a = attention(RMSNorm(h), x) inside a segment, m the memory of a, y as in "gate"

    M(z; W) = z + LayerNorm(gelu(z W_1) W_2), or the plain network with memory_norm=False: where that forgets faster than it learns,
    weights of two layers or more shrink to 0, which is a saddle of the loss, and stay there.

    The attention also sees persistent tokens, the same for every input. Maps to `linnet.ops.short_conv`,
    `linnet.ops.neural_memory` and `linnet.ops.softmax_attention`. State: conv [N, 3D, W-1], count [N], weights W, A [N,H,P] now
    and at the start of the mini-batch, momentum S [N,H,P]; with attention its window k, v [N,S,H,K] and length [N].
    """

    family = "delta"
    Config = TitansConfig

    def add_parts(self) -> None:
        c = self.config
        self.memory = LongTermMemory(c)
        self.attention = None if c.variant == "memory" else PersistentAttention(c)
        self.g_proj = nn.Linear(c.d_model, c.d_model, bias=False) if c.variant == "memory" else None
        norm = lambda *variants: L.RMSNorm(c.size, eps=c.norm_eps) if c.variant in variants else None
        self.h_norm, self.m_norm = norm("layer", "context"), norm("gate", "context")
        act = "silu" if c.variant == "memory" else "sigmoid"
        self.o_norm = None if c.variant == "layer" else L.GatedRMSNorm(c.size, eps=c.norm_eps, activation=act)
        self.o_proj = nn.Linear(c.d_model, c.d_model, bias=False)

    def reset_parameters(self) -> None:
        L.init_normal(self)
        self.memory.reset_parameters()
        if self.attention is not None:
            self.attention.reset_parameters()

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        return self.memory.state_shapes() | (self.attention.state_shapes() if self.attention is not None else {})

    def segment(self, x_BTD: Tensor, state: list[Tensor | None], context: Context) -> tuple[Tensor, list[Tensor | None]]:
        """Memory as context: tokens of one segment."""
        h_BTHK = self.h_norm(self.memory.recall(x_BTD, state[:5], context))
        a_BTHK, cache = self.attention(x_BTD, state[5:], state[1], context, h_BTHK.flatten(2))
        m_BTHK, memory = self.memory(a_BTHK.flatten(2), state[:5], context)
        return self.o_norm(a_BTHK, self.m_norm(m_BTHK)).flatten(2), [*memory, *cache]

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        own = self.open_state(state)
        if c.variant == "context":
            o_BTD, new = in_segments(self.segment, x_BTD, own, c.window, context)
            return self.o_proj(o_BTD), self.close_state(context, *new)
        m_BTHK, new = self.memory(x_BTD, own[:5], context)
        if c.variant == "memory":
            o_BTHK = self.o_norm(m_BTHK, L.split_heads(self.g_proj(x_BTD), c.heads))
        else:
            seen = x_BTD if c.variant == "gate" else self.h_norm(m_BTHK).flatten(2)
            o_BTHK, cache = self.attention(seen, own[5:], own[1], context)
            o_BTHK, new = o_BTHK if c.variant == "layer" else self.o_norm(o_BTHK, self.m_norm(m_BTHK)), [*new, *cache]
        return self.o_proj(o_BTHK.flatten(2)), self.close_state(context, *new)
