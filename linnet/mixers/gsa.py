"""Gated slot attention: softmax attention over a fixed number of slots that are written with forget gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.feature_maps import get_feature_map
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class GSAConfig:
    """Options of `gsa`.

    slots: M, memory slots of a head (None: its key channels). expand_k, expand_v: key and value width over d_model.
    temperature: tau, the log-decay is logsigmoid(.) / tau. feature_map: of q and k. scale: of the slot scores.
    """

    d_model: int
    heads: int = 4
    slots: int | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0
    temperature: float = 8.0
    feature_map: str = "silu"
    scale: float = 1.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        L.check_positive("gsa", d_model=self.d_model, heads=self.heads, slots=self.slots)
        L.check_number(
            "gsa", 0, expand_k=self.expand_k, expand_v=self.expand_v, temperature=self.temperature, scale=self.scale,
            norm_eps=self.norm_eps,
        )  # fmt: skip
        L.check_feature_map("gsa", feature_map=self.feature_map)
        L.divided("gsa", "expand_k", self.d_model * self.expand_k, self.heads)
        L.divided("gsa", "expand_v", self.d_model * self.expand_v, self.heads)

    @property
    def key_size(self) -> int:
        return int(self.d_model * self.expand_k / self.heads)

    @property
    def value_size(self) -> int:
        return int(self.d_model * self.expand_v / self.heads)

    @property
    def memory(self) -> int:
        return self.slots or self.key_size


@register_mixer("gsa")
class GSA(Mixer):
    r"""Zhang et al., "Gated Slot Attention for Efficient Linear-Time Sequence Modeling", 2024 (arXiv 2409.07146).

        alpha_t = sigmoid(x_t W_f)^(1/tau)                                                          [M]
        R_t = Diag(alpha_t) R_{t-1} + (1 - alpha_t) k_t^T,   U_t = Diag(alpha_t) U_{t-1} + (1 - alpha_t) v_t^T
        o_t = U_t^T softmax(R_t q_t),   y_t = W_o RMSNorm(silu(o_t))

    Maps to two passes of `linnet.ops.linear_attention`. The first decays along the axis that it reads out, so there every slot is a
    head with one value channel and a scalar decay; q and k are shared by the slots of a head. The second is gated linear attention
    with the softmax as query. State: R [N,H,M,K], U [N,H,M,V].
    """

    Config = GSAConfig

    def __init__(self, config: GSAConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        self.q_proj, self.k_proj = (nn.Linear(c.d_model, c.heads * c.key_size, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(c.d_model, c.heads * c.value_size, bias=False)
        self.f_proj = nn.Linear(c.d_model, c.heads * c.memory, bias=False)
        self.o_norm = L.RMSNorm(c.heads * c.value_size, eps=c.norm_eps)
        self.o_proj = nn.Linear(c.heads * c.value_size, c.d_model, bias=False)
        self.phi = get_feature_map(c.feature_map)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        L.init_normal(self)

    def state_spec(self) -> StateSpec:
        c = self.config
        return self.make_spec(R=(c.heads, c.memory, c.key_size), U=(c.heads, c.memory, c.value_size))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        R, U = self.open_state(state, "R", "U")
        options = {"return_state": context.return_state, "cu_seqlens": context.cu_seqlens, "scale": 1.0}
        q_BTHK, k_BTHK, v_BTHV = (L.split_heads(p(x_BTD), c.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        q_BTHK, k_BTHK, v_BTHV = self.phi(q_BTHK) * c.scale, self.phi(k_BTHK), F.silu(v_BTHV)
        g_BTHM = L.split_heads(F.logsigmoid(L.full(self.f_proj(x_BTD))) / c.temperature, c.heads)
        write_BTHM = -torch.expm1(g_BTHM).to(v_BTHV.dtype)
        scores, R = ops.linear_attention(
            q_BTHK, k_BTHK, write_BTHM.flatten(2).unsqueeze(-1), g_BTHM.flatten(2), **options,
            initial_state=None if R is None else R.flatten(1, 2).unsqueeze(-1),
        )  # fmt: skip
        p_BTHM = L.full(scores.squeeze(-1).unflatten(2, (c.heads, c.memory))).softmax(-1).to(v_BTHV.dtype)
        o_BTHV, U = ops.linear_attention(p_BTHM, write_BTHM, v_BTHV, g_BTHM, initial_state=U, **options)
        R = None if R is None else R[0].squeeze(-1).unflatten(1, (c.heads, c.memory))
        return self.o_proj(self.o_norm(F.silu(o_BTHV.flatten(2)))), self.close_state(context, R, *(U or ()))
