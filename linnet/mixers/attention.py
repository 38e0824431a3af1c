"""Softmax attention: the full or sliding-window layer of a hybrid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class AttentionConfig:
    """Options of `attention`.

    kv_heads: key/value heads, a divisor of `heads` (None: `heads`). head_dim: None means d_model / heads.
    window: each token sees itself and the window - 1 tokens before it; None sees everything.
    position: "rope" or "none" (NoPE). rope_theta, rotary_dim: base, and how many channels are turned (None: all).
    qk_norm: per-head RMSNorm with weight on q and k before the rotation (Qwen3).
    gate: multiply the output by sigmoid(x W_g), one gate per channel (Qwen3-Next).
    bias: biases of q, k, v. out_bias: bias of the output projection (None: as `bias`; Qwen2 has bias=True, out_bias=False).
    """

    d_model: int
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    position: str = "rope"
    rope_theta: float = 10000.0
    rotary_dim: int | None = None
    qk_norm: bool = False
    gate: bool = False
    bias: bool = False
    out_bias: bool | None = None
    norm_eps: float = 1e-6

    def __post_init__(self):
        L.check_positive(
            "attention", d_model=self.d_model, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            window=self.window, rotary_dim=self.rotary_dim,
        )  # fmt: skip
        L.check_choice("attention", ("rope", "none"), position=self.position)
        L.check_number("attention", 0, rope_theta=self.rope_theta, norm_eps=self.norm_eps)
        if self.heads % self.groups:
            L.refuse("attention", "kv_heads", f"a divisor of heads = {self.heads}", self.kv_heads)
        if self.rotary % 2 or self.rotary > self.size:
            option = "head_dim" if self.rotary_dim is None else "rotary_dim"
            L.refuse("attention", option, f"even (rotary pairs) and at most {self.size} channels per head", self.rotary)

    @property
    def size(self) -> int:
        return self.head_dim or L.divided("attention", "heads", self.d_model, self.heads)

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def rotary(self) -> int:
        return 0 if self.position == "none" else self.rotary_dim or self.size


@register_mixer("attention")
class Attention(Mixer):
    r"""Causal softmax attention with grouped heads, Vaswani et al. 2017 (arXiv 1706.03762); RoPE 2104.09864; GQA 2305.13245.

        o_t = sum_{t-w < s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s

    Maps to `linnet.ops.softmax_attention`. State: the key/value cache (k [N,S,Hk,K], v [N,S,Hk,K], length [N] of valid slots);
    S grows with the tokens seen, or stops at window - 1. With a window and RoPE also position [N], the number of tokens seen.
    """

    Config = AttentionConfig

    def __init__(self, config: AttentionConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        out_bias = c.bias if c.out_bias is None else c.out_bias
        self.q_proj = nn.Linear(c.d_model, c.heads * c.size, bias=c.bias)
        self.k_proj = nn.Linear(c.d_model, c.groups * c.size, bias=c.bias)
        self.v_proj = nn.Linear(c.d_model, c.groups * c.size, bias=c.bias)
        self.g_proj = nn.Linear(c.d_model, c.heads * c.size, bias=c.bias) if c.gate else None
        self.o_proj = nn.Linear(c.heads * c.size, c.d_model, bias=out_bias)
        self.q_norm = L.RMSNorm(c.size, eps=c.norm_eps) if c.qk_norm else None
        self.k_norm = L.RMSNorm(c.size, eps=c.norm_eps) if c.qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        L.init_normal(self)

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
        q_BTHK = L.split_heads(self.q_proj(x_BTD), c.heads)
        k_BTHK = L.split_heads(self.k_proj(x_BTD), c.groups)
        v_BTHK = L.split_heads(self.v_proj(x_BTD), c.groups)
        if c.qk_norm:
            q_BTHK, k_BTHK = self.q_norm(q_BTHK), self.k_norm(k_BTHK)
        if c.position == "rope":
            positions_BT = L.token_positions(x_BTD, context, seen_N)
            turns = L.turns(positions_BT, L.rope_frequencies(c.rotary, c.rope_theta, x_BTD))
            q_BTHK, k_BTHK = L.rotate(q_BTHK, turns), L.rotate(k_BTHK, turns)
        o_BTHK, new = ops.softmax_attention(
            q_BTHK, k_BTHK, v_BTHK, window=c.window,
            initial_state=None if state is None else (k_cache, v_cache, length_N), return_state=context.return_state,
            cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        o_BTD = o_BTHK.flatten(2)
        if c.gate:
            o_BTD = o_BTD * torch.sigmoid(self.g_proj(x_BTD))
        if new is not None and self.counts:
            count_N = L.token_counts(x_BTD, context)
            new = (*new, count_N if seen_N is None else seen_N + count_N)
        return self.o_proj(o_BTD), new
