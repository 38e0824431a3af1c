"""Softmax attention: the full or sliding-window layer of a hybrid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State, StateSpec
from linnet.mixers._heads import GroupedConfig, HeadMixer
from linnet.mixers._options import choice, flag, number, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class AttentionConfig(GroupedConfig, mixer="attention"):
    window: int | None = size(None, "each token sees itself and the window - 1 tokens before it (None: everything)")
    position: str = choice("rope", '"rope" or "none" (NoPE)', "rope", "none")
    rope_theta: float = number(10000.0, "base of the rotary angles", above=0)
    rotary_dim: int | None = size(None, "channels of a head that are turned (None: all)")
    qk_norm: bool = flag(False, "per-head RMSNorm with weight on q and k before the rotation (Qwen3)")
    gate: bool = flag(False, "multiply the output by sigmoid(x W_g), one gate per channel (Qwen3-Next)")
    bias: bool = flag(False, "biases of q, k, v")
    out_bias: bool | None = flag(None, "bias of the output projection (None: as `bias`; Qwen2 has bias=True, out_bias=False)")
    norm_eps: float = number(1e-6, "epsilon of qk_norm", above=0)

    def check(self) -> None:
        super().check()
        if self.rotary % 2 or self.rotary > self.size:
            option = "head_dim" if self.rotary_dim is None else "rotary_dim"
            self.refuse(option, f"such that an even number of the {self.size} channels of a head is turned")

    @property
    def rotary(self) -> int:
        return 0 if self.position == "none" else self.rotary_dim or self.size


@register_mixer("attention")
class Attention(HeadMixer):
    r"""Vaswani et al., "Attention Is All You Need", 2017 (arXiv 1706.03762), causal, with grouped heads (arXiv 2305.13245) and
    rotary positions (arXiv 2104.09864).

        o_t = sum_{t-w < s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s

    Maps to `linnet.ops.softmax_attention`. State: the key/value cache (k [N,S,Hk,K], v [N,S,Hk,K], length [N] of valid slots);
    S grows with the tokens seen, or stops at window - 1. With a window and RoPE also position [N], the number of tokens seen.
    """

    family = "softmax"
    Config = AttentionConfig

    def add_parts(self) -> None:
        c = self.config
        out_bias = c.bias if c.out_bias is None else c.out_bias
        self.add_qkv(bias=c.bias)
        self.g_proj = nn.Linear(c.d_model, c.heads * c.size, bias=c.bias) if c.gate else None
        self.o_proj = nn.Linear(c.heads * c.size, c.d_model, bias=out_bias)
        self.q_norm = L.RMSNorm(c.size, eps=c.norm_eps) if c.qk_norm else None
        self.k_norm = L.RMSNorm(c.size, eps=c.norm_eps) if c.qk_norm else None

    @property
    def counts(self) -> bool:
        """Whether the position of the next token cannot be told from the cache."""
        return self.config.window is not None and self.config.position == "rope"

    def state_spec(self) -> StateSpec:
        c, dtype = self.config, self.q_proj.weight.dtype
        slots = (None if c.window is None else c.window - 1, c.groups, c.size)
        names = ("k", "v", "length", "position")[: 4 if self.counts else 3]
        return StateSpec(names, (slots, slots, (), ())[: len(names)], (dtype, dtype, torch.int64, torch.int64)[: len(names)])

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        k_cache, v_cache, length_N, seen_N = self.open_state(state, "k", "v", "length", "position" if self.counts else None)
        seen_N = seen_N if self.counts else length_N
        q_BTHK, k_BTHK, v_BTHK = self.qkv(x_BTD)
        if c.qk_norm:
            q_BTHK, k_BTHK = self.q_norm(q_BTHK), self.k_norm(k_BTHK)
        if c.position == "rope":
            positions_BT = L.token_positions(x_BTD, context, seen_N)
            turns = L.turns(positions_BT, L.rope_frequencies(c.rotary, c.rope_theta, x_BTD))
            q_BTHK, k_BTHK = L.rotate(q_BTHK, turns), L.rotate(k_BTHK, turns)
        o_BTHK, new = ops.softmax_attention(
            q_BTHK,
            k_BTHK,
            v_BTHK,
            window=c.window,
            **context.carry(None if state is None else (k_cache, v_cache, length_N)),
        )
        o_BTD = o_BTHK.flatten(2)
        if c.gate:
            o_BTD = ops.gated_linear_unit(o_BTD, self.g_proj(x_BTD), activation="sigmoid")
        if new is not None and self.counts:
            new = (*new, L.token_counts(x_BTD, context, seen_N))
        return self.o_proj(o_BTD), new
