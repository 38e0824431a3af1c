"""Mixture of memories: every token is written to and read from a few of several recurrent states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._memories import RECURRENCES, Gates, MemoriesConfig, Router, add_balance_loss, recur
from linnet.mixers._options import choice, flag, size
from linnet.mixers._registry import register_mixer
from linnet.ops.routing import Routes


@dataclass(frozen=True)
class MoMConfig(MemoriesConfig, mixer="mom"):
    memories: int = size(4, "memories to choose from", least=2)
    top_k: int = size(2, "memories that a token is written to and read from")
    shared_memory: bool = flag(True, "one memory more, which every token uses with weight 1")
    recurrence: str = choice("gated_deltanet", "what runs in a memory", *RECURRENCES)
    own_projections: bool = flag(True, "a key, value and gate projection per memory; False: one for all")
    renormalize: bool = flag(True, "divide the chosen weights by their sum (needs top_k > 1)")
    conv_size: int | None = size(4, "taps of the short convolution on q, k, v in every memory (None: SiLU only)")

    def check(self) -> None:
        if self.top_k > self.memories:
            self.refuse("top_k", f"at most memories = {self.memories}")
        if self.renormalize and self.top_k == 1:
            self.refuse("renormalize", "False with top_k = 1, where the only weight would be 1 and the router would learn nothing")


@register_mixer("mom")
class MoM(Mixer):
    r"""Du et al., "MoM: Linear Sequence Modeling with Mixture-of-Memories", 2025 (arXiv 2502.13685).

        p_t = softmax(x_t W_r),   J_t = top_k(p_t),   w_m = p_m / sum_{J_t} p
        memory m in J_t: one step of the recurrence with q_t, (k, v, gates)_t = x_t W_m;   m not in J_t: unchanged
        y_t = W_o (RMSNorm_head(o_shared + sum_{m in J_t} w_m o_m) * silu(x_t W_g))

    q, k, v are SiLU of a short convolution over the tokens of the memory. Maps to `linnet.ops.routing.Routes` and, over all
    memories at once, `linnet.ops.short_conv` and `linnet.ops.delta_rule` or `linnet.ops.linear_attention` with packed segments.
    State: conv [N, M, channels, W-1], S [N, M, H, K, V], the shared memory first.
    """

    family = "delta"
    Config = MoMConfig

    def __init__(self, config: MoMConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        keys, values = c.heads * c.key_size, c.heads * c.value_size
        self.gates = Gates(c.recurrence, c.heads, c.key_size, c.gate_rank)
        self.widths = (keys + values, self.gates.width)
        self.memories = c.memories + c.shared_memory
        self.router = Router(c.d_model, c.memories, c.top_k, renormalize=c.renormalize)
        self.q_proj = nn.Linear(c.d_model, keys, bias=False)
        self.kv_weight = nn.Parameter(torch.empty(self.memories if c.own_projections else 1, sum(self.widths), c.d_model))
        self.conv = L.ShortConv(2 * keys + values, c.conv_size) if c.conv_size else None
        self.g_proj = nn.Linear(c.d_model, values, bias=False)
        self.o_norm = L.GatedRMSNorm(c.value_size, eps=c.norm_eps)
        self.o_proj = nn.Linear(values, c.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        L.init_normal(self)
        nn.init.normal_(self.kv_weight, std=0.02)
        self.gates.reset_parameters()

    def state_spec(self) -> StateSpec:
        c = self.config
        conv = (self.memories, *self.conv.state_shape) if self.conv else None
        return self.make_spec(conv=conv, S=(self.memories, c.heads, c.key_size, c.value_size))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, S = self.open_state(state, "conv" if self.conv else None, "S")
        p_BTM, weight_BTJ, memory_BTJ = self.router(x_BTD)
        add_balance_loss(self, context, p_BTM, memory_BTJ)
        routes = Routes(memory_BTJ, c.memories, context.cu_seqlens, shared=c.shared_memory)
        inside = Context(cu_seqlens=routes.cu_seqlens, return_state=context.return_state)
        if c.own_projections:
            y = routes.linear(routes.take(x_BTD), self.kv_weight)
        else:
            y = routes.take(F.linear(x_BTD, self.kv_weight[0]))
        kv, gates = y.split(self.widths, -1)
        qkv, new_conv = torch.cat((routes.take(self.q_proj(x_BTD)), kv), -1), None
        qkv, new_conv = self.conv(qkv, routes.open(conv), inside) if self.conv is not None else (F.silu(qkv), None)
        keys = c.heads * c.key_size
        q, k, v = (L.split_heads(z, c.heads) for z in qkv.split((keys, keys, c.heads * c.value_size), -1))
        o, new = recur(c.recurrence, q, k, v, *self.gates(gates), routes.open(S), inside)
        o_BTHV = routes.put(o, weight_BTJ)
        y_BTD = self.o_proj(self.o_norm(o_BTHV, L.split_heads(self.g_proj(x_BTD), c.heads)).flatten(2))
        return y_BTD, self.close_state(context, routes.close(new_conv, conv), routes.close(new[0], S) if new else None)
