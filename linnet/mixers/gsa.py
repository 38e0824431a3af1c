"""Gated slot attention: softmax attention over a fixed number of slots that are written with forget gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.feature_maps import FEATURE_MAPS, get_feature_map
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._heads import HeadConfig, HeadMixer
from linnet.mixers._options import choice, number, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class GSAConfig(HeadConfig, mixer="gsa"):
    slots: int | None = size(None, "M, memory slots of a head (None: its key channels)")
    temperature: float = number(8.0, "tau: the log-decay is logsigmoid(.) / tau", above=0)
    feature_map: str = choice("silu", "feature map of q and k", *FEATURE_MAPS)
    scale: float = number(1.0, "scale of the slot scores", above=0)
    norm_eps: float = number(1e-5, "epsilon of the output norm", above=0)

    @property
    def memory(self) -> int:
        return self.slots or self.key_size


@register_mixer("gsa")
class GSA(HeadMixer):
    r"""Zhang et al., "Gated Slot Attention for Efficient Linear-Time Sequence Modeling", 2024 (arXiv 2409.07146).

        alpha_t = sigmoid(x_t W_f)^(1/tau)                                                          [M]
        R_t = Diag(alpha_t) R_{t-1} + (1 - alpha_t) k_t^T,   U_t = Diag(alpha_t) U_{t-1} + (1 - alpha_t) v_t^T
        o_t = U_t^T softmax(R_t q_t),   y_t = W_o RMSNorm(silu(o_t))

    Maps to two passes of `linnet.ops.linear_attention`. The first decays along the axis that it reads out, so there every slot is a
    head with one value channel and a scalar decay; q and k are shared by the slots of a head. The second is gated linear attention
    with the softmax as query. State: R [N,H,M,K], U [N,H,M,V].
    """

    Config = GSAConfig

    def add_parts(self) -> None:
        c = self.config
        self.add_qkv()
        self.f_proj = nn.Linear(c.d_model, c.heads * c.memory, bias=False)
        self.o_norm = L.RMSNorm(c.heads * c.value_size, eps=c.norm_eps)
        self.o_proj = nn.Linear(c.heads * c.value_size, c.d_model, bias=False)
        self.phi = get_feature_map(c.feature_map)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c = self.config
        return {"R": (c.heads, c.memory, c.key_size), "U": (c.heads, c.memory, c.value_size)}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        R, U = self.open_state(state)
        q_BTHK, k_BTHK, v_BTHV = self.qkv(x_BTD)
        q_BTHK, k_BTHK, v_BTHV = self.phi(q_BTHK) * c.scale, self.phi(k_BTHK), F.silu(v_BTHV)
        g_BTHM = L.split_heads(F.logsigmoid(L.full(self.f_proj(x_BTD))) / c.temperature, c.heads)
        write_BTHM = -torch.expm1(g_BTHM).to(v_BTHV.dtype)
        scores, R = ops.linear_attention(
            q_BTHK, k_BTHK, write_BTHM.flatten(2).unsqueeze(-1), g_BTHM.flatten(2), scale=1.0,
            **context.carry(None if R is None else R.flatten(1, 2).unsqueeze(-1)),
        )  # fmt: skip
        p_BTHM = L.full(scores.squeeze(-1).unflatten(2, (c.heads, c.memory))).softmax(-1).to(v_BTHV.dtype)
        o_BTHV, U = ops.linear_attention(p_BTHM, write_BTHM, v_BTHV, g_BTHM, scale=1.0, **context.carry(U))
        R = None if R is None else R[0].squeeze(-1).unflatten(1, (c.heads, c.memory))
        return self.o_proj(self.o_norm(F.silu(o_BTHV.flatten(2)))), self.close_state(context, R, *(U or ()))
