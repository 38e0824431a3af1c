"""Sparse state expansion: a recurrent state of several partitions, of which every token uses a few."""

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
class SSEConfig(MemoriesConfig, mixer="sse"):
    partitions: int = size(4, "partitions to choose from, beside the one that every token uses", least=2)
    top_k: int = size(1, "partitions that a token is written to and read from")
    recurrence: str = choice("gla", "what runs in a partition", *RECURRENCES)
    gate: str = choice("write_read", "what the weight of a partition multiplies", "write_read", "write", "read")
    gated_erase: bool = flag(True, "the write gate of a delta rule also multiplies what it erases")
    key_map: str | None = choice(None, "of keys (None: silu for delta rules, else softmax)", None, "softmax", "silu")
    key_rows: int | None = size(None, "rows that a softmax key writes, its largest ones (None: all)")
    rank: int | None = size(None, "rank of the output gate and of what is added to q and k (None: value channels per head)")
    conv_size: int | None = size(None, "taps of a short convolution on q, k, v (None: none)")

    def check(self) -> None:
        if self.top_k > self.partitions:
            self.refuse("top_k", f"at most partitions = {self.partitions}")
        if self.key_rows is not None and (self.key_function != "softmax" or self.key_rows > self.key_size):
            self.refuse("key_rows", f"None, or at most {self.key_size} with key_map = 'softmax'")

    @property
    def key_function(self) -> str:
        return self.key_map or ("silu" if RECURRENCES[self.recurrence][0] == "delta" else "softmax")


@register_mixer("sse")
class SSE(Mixer):
    r"""Pan et al., "Scaling Linear Attention with Sparse State Expansion", 2025 (arXiv 2507.16577).

        e_t = softmax(x_t W_e),   J_t = top_k(e_t)
        S^i_t = Lambda_t S^i_{t-1} + e_t^i k_t v_t^T  for i in J_t, else S^i_{t-1};   o_t = sum_{J_t} e_t^i (S^i_t)^T q_t / sqrt(K)
        y_t = W_o (RMSNorm_head(o'_t + o_t) * silu(x_t W_g))

    o' is the same recurrence in a partition that every token uses, with e = 1 and its own gates; there q and k are projections of
    x_t, to which the other partitions add a low-rank one. v is shared. k = softmax over the rows, q = silu. Maps to
    `linnet.ops.routing.Routes` and, over all partitions at once, `linnet.ops.linear_attention` or `linnet.ops.delta_rule` with
    packed segments. State: S [N, M, H, K, V], the partition of every token first (and the convolution's, where there is one).
    """

    family = "delta"
    Config = SSEConfig

    def __init__(self, config: SSEConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        keys, values, rank = c.heads * c.key_size, c.heads * c.value_size, c.rank or c.value_size
        self.widths = (keys, keys, values)
        self.router = Router(c.d_model, c.partitions, c.top_k, renormalize=False)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.d_model, width, bias=False) for width in self.widths)
        self.q_sparse, self.k_sparse = (L.LowRank(c.d_model, rank, keys) for _ in range(2))
        self.shared_gates, self.gates = (Gates(c.recurrence, c.heads, c.key_size, c.gate_rank) for _ in range(2))
        self.gate_proj = nn.Linear(c.d_model, 2 * self.gates.width, bias=False) if self.gates.width else None
        self.conv = L.ShortConv(sum(self.widths), c.conv_size, activation=None) if c.conv_size else None
        self.g_proj = L.LowRank(c.d_model, rank, values)
        self.o_norm = L.GatedRMSNorm(c.value_size, eps=c.norm_eps)
        self.o_proj = nn.Linear(values, c.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        L.init_normal(self)
        self.shared_gates.reset_parameters()
        self.gates.reset_parameters()

    def state_spec(self) -> StateSpec:
        c = self.config
        conv = self.conv.state_shape if self.conv else None
        return self.make_spec(conv=conv, S=(c.partitions + 1, c.heads, c.key_size, c.value_size))

    def map_key(self, k_BTHK: Tensor) -> Tensor:
        c = self.config
        if c.key_function == "silu":
            return F.silu(k_BTHK)
        if c.key_rows is not None and c.key_rows < c.key_size:
            k_BTHK = k_BTHK.masked_fill(k_BTHK < k_BTHK.topk(c.key_rows, dim=-1).values[..., -1:], -torch.inf)
        return L.full(k_BTHK).softmax(-1).to(k_BTHK.dtype)

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, S = self.open_state(state, "conv" if self.conv else None, "S")
        e_BTM, weight_BTJ, partition_BTJ = self.router(x_BTD)
        add_balance_loss(self, context, e_BTM, partition_BTJ)
        routes = Routes(partition_BTJ, c.partitions, context.cu_seqlens, shared=True)
        qkv = torch.cat((self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)), -1)
        if self.conv is not None:
            qkv, conv = self.conv(qkv, conv, context)
        q, k, v = qkv.split(self.widths, -1)
        split = lambda y: L.split_heads(y, c.heads)
        q = routes.take(F.silu(split(q + self.q_sparse(x_BTD))), F.silu(split(q)))
        k = routes.take(self.map_key(split(k + self.k_sparse(x_BTD))), self.map_key(split(k)))
        y = self.gate_proj(x_BTD) if self.gate_proj else x_BTD[..., :0]
        shared, sparse = y.chunk(2, -1) if self.gate_proj else (y, y)
        gates = [
            z if z is None or z.ndim < 3 else routes.take(z, shared)
            for z, shared in zip(self.gates(sparse), self.shared_gates(shared), strict=True)
        ]
        inside = Context(cu_seqlens=routes.cu_seqlens, return_state=context.return_state)
        write = routes.take_choices(weight_BTJ) if "write" in c.gate else None
        o, new = recur(
            c.recurrence, q, k, routes.take(F.silu(split(v))), *gates, routes.open(S), inside, write_BT=write, erase=c.gated_erase
        )
        o_BTHV = routes.put(o, weight_BTJ if "read" in c.gate else torch.ones_like(weight_BTJ))
        y_BTD = self.o_proj(self.o_norm(o_BTHV, split(self.g_proj(x_BTD))).flatten(2))
        return y_BTD, self.close_state(context, conv, routes.close(new[0], S) if new else None)
