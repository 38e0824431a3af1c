"""LightNet: linear attention whose keys are a running softmax over time (an additive recurrence)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class LightNetConfig:
    """Options of `lightnet`.

    heads: H (None: d_model / 128). expand_k: key width over d_model. gate_rank: rank of the output gate. gate: its activation,
    "silu" (flash-linear-attention) or "sigmoid" (the authors' later code). scale: None means K^-1/2.
    """

    d_model: int
    heads: int | None = None
    expand_k: float = 1.0
    gate_rank: int = 128
    gate: str = "silu"
    scale: float | None = None
    norm_eps: float = 1e-5

    def __post_init__(self):
        L.check_positive("lightnet", d_model=self.d_model, heads=self.heads, gate_rank=self.gate_rank)
        L.check_number("lightnet", 0, expand_k=self.expand_k, scale=self.scale, norm_eps=self.norm_eps)
        L.check_choice("lightnet", ("silu", "sigmoid"), gate=self.gate)
        L.divided("lightnet", "expand_k", self.d_model * self.expand_k, self.state_heads)
        L.divided("lightnet", "heads", self.d_model, self.state_heads)

    @property
    def state_heads(self) -> int:
        return self.heads or max(1, self.d_model // 128)

    @property
    def key_size(self) -> int:
        return int(self.d_model * self.expand_k / self.state_heads)

    @property
    def value_size(self) -> int:
        return self.d_model // self.state_heads


@register_mixer("lightnet")
class LightNet(Mixer):
    r"""Qin et al., "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet", 2024 (arXiv 2405.21022).

    Its causal form:

        z_t = log sum_{s<=t} e^{k_s},   S_t = Diag(e^{z_{t-1} - z_t}) S_{t-1} + e^{k_t - z_t} v_t^T = sum_s e^{k_s - z_t} v_s^T
        o_t = S_t^T silu(x_t W_q),   y_t = W_o (RMSNorm(o_t) * silu(x_t W_1 W_2))

    Maps to `linnet.ops.cumulative_logsumexp` (z), `linnet.ops.token_shift` (z_{t-1}) and `linnet.ops.linear_attention`.
    State: z [N, H*K] (-inf before the first token), S [N,H,K,V].
    """

    Config = LightNetConfig

    def __init__(self, config: LightNetConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        self.keys = c.state_heads * c.key_size
        self.q_proj, self.k_proj = (nn.Linear(c.d_model, self.keys, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.g_proj = L.LowRank(c.d_model, c.gate_rank, c.d_model)
        self.o_norm = L.GatedRMSNorm(c.d_model, eps=c.norm_eps, activation=c.gate)
        self.o_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        L.init_normal(self)

    def state_spec(self) -> StateSpec:
        c = self.config
        return self.make_spec(z=(self.keys,), S=(c.state_heads, c.key_size, c.value_size))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        z_NE, S = self.open_state(state, "z", "S")
        k_BTE = L.full(self.k_proj(x_BTD))
        if z_NE is None:
            rows = x_BTD.shape[0] if context.cu_seqlens is None else context.cu_seqlens.numel() - 1
            z_NE = k_BTE.new_full((rows, self.keys), -torch.inf)
        options = {"initial_state": (z_NE,), "cu_seqlens": context.cu_seqlens}
        z_BTE, new_z = ops.cumulative_logsumexp(k_BTE, return_state=context.return_state, **options)
        past_BTE, _ = ops.token_shift(z_BTE, **options)
        g_BTE, weight_BTE = (past_BTE - z_BTE).clamp_max(0), (k_BTE - z_BTE).exp()
        q_BTE, v_BTD = nn.functional.silu(self.q_proj(x_BTD)), self.v_proj(x_BTD)
        q_BTHK, k_BTHK, v_BTHV, g_BTHK = (
            L.split_heads(y, c.state_heads) for y in (q_BTE, weight_BTE.to(q_BTE.dtype), v_BTD, g_BTE)
        )
        o_BTHV, new = ops.linear_attention(
            q_BTHK, k_BTHK, v_BTHV, g_BTHK, scale=c.scale, initial_state=S, return_state=context.return_state,
            cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        y_BTD = self.o_proj(self.o_norm(o_BTHV.flatten(2), self.g_proj(x_BTD)))
        return y_BTD, self.close_state(context, *(new_z or ()), *(new or ()))
