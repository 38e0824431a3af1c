"""Gated linear attention: a decay per key channel that depends on the token."""

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
from linnet.mixers._options import choice, flag, number, share, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class GLAConfig(HeadConfig, mixer="gla"):
    heads: int = size(4, "query heads")
    kv_heads: int | None = size(None, "heads of k, v and the decay, a divisor of `heads` (None: `heads`)", divides="heads")
    expand_k: float = share(0.5, "key width over d_model", parts="heads")
    gate_rank: int = size(16, "rank of the decay projection")
    temperature: float = number(16.0, "tau: the log-decay is logsigmoid(.) / tau", above=0)
    decay_min: float | None = number(None, "clamp of the log-decay from below (None: not clamped)", below=0)
    allow_neg_eigval: bool = flag(False, "2 alpha - 1 in (-1, 1) in place of alpha (Grazzi et al. 2024, arXiv 2411.12537)")
    feature_map: str = choice("identity", "feature map of q and k", *FEATURE_MAPS)
    conv_size: int | None = size(None, "width of a short convolution on q, k, v (None: none)")
    norm_eps: float = number(1e-5, "epsilon of the norm", above=0)

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads


@register_mixer("gla")
class GLA(HeadMixer):
    r"""Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023 (arXiv 2312.06635).

        S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/tau)
        y_t = W_o (RMSNorm_head(o_t) * swish(x_t W_g))

    Maps to `linnet.ops.linear_attention` with log_decay [B,T,H,K]. State: S [N,H,K,V] (and the convolution's, where there is one).
    """

    Config = GLAConfig

    def add_parts(self) -> None:
        c = self.config
        self.add_qkv(conv_size=c.conv_size)
        self.gk_proj = L.LowRank(c.d_model, c.gate_rank, c.groups * c.key_size, bias=True)
        self.g_proj = nn.Linear(c.d_model, c.heads * c.value_size, bias=False)
        self.o_norm = L.GatedRMSNorm(c.value_size, eps=c.norm_eps)
        self.o_proj = nn.Linear(c.heads * c.value_size, c.d_model, bias=False)
        self.phi = get_feature_map(c.feature_map)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c = self.config
        return {"conv": self.conv.state_shape if self.conv else None, "S": (c.groups, c.key_size, c.value_size)}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, S = self.open_state(state)
        q_BTHK, k_BTHK, v_BTHV, conv = self.convolved_qkv(x_BTD, conv, context)
        g_BTHK = L.split_heads(F.logsigmoid(L.full(self.gk_proj(x_BTD))) / c.temperature, c.groups)
        if c.decay_min is not None:
            g_BTHK = g_BTHK.clamp_min(c.decay_min)
        q_BTHK, k_BTHK, sign_NHK = self.phi(q_BTHK), self.phi(k_BTHK), None
        if c.allow_neg_eigval:
            g_BTHK, sign_BTHK, sign_NHK = signed_decay(g_BTHK, context)
            k_BTHK = k_BTHK * sign_BTHK.to(k_BTHK.dtype)
            q_BTHK = q_BTHK * sign_BTHK.to(q_BTHK.dtype).repeat_interleave(c.heads // c.groups, 2)
        o_BTHV, new = ops.linear_attention(
            q_BTHK, k_BTHK, v_BTHV, g_BTHK, log_decay_min=None if c.allow_neg_eigval else c.decay_min, **context.carry(S)
        )
        if new is not None and sign_NHK is not None:
            new = (new[0] * sign_NHK.unsqueeze(-1),)
        y_BTD = self.o_proj(self.o_norm(o_BTHV, L.split_heads(self.g_proj(x_BTD), c.heads)).flatten(2))
        return y_BTD, self.close_state(context, conv, *(new or ()))


def signed_decay(g_BTHK: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """(log |a|, the product of the signs of a up to each token, that of the whole row [N,H,K]) for a = 2 e^g - 1.

    With the products pi in q and k, S_t = Diag(a_t) S_{t-1} + k_t v_t^T is pi_t times a recurrence with the decay |a|. A factor
    below 1e-6 counts as 1e-6, where the gradient of its logarithm has no digits left.
    """
    a_BTHK = 1 + 2 * torch.expm1(g_BTHK)
    sign_BTHK = torch.where(a_BTHK < 0, -1.0, 1.0).to(g_BTHK.dtype)
    product_BTHK, last = ops.scan(
        torch.zeros_like(sign_BTHK), a=sign_BTHK, initial_state=(sign_BTHK.new_ones((context.rows(g_BTHK), *sign_BTHK.shape[2:])),),
        return_state=True, cu_seqlens=context.cu_seqlens,
    )  # fmt: skip
    return a_BTHK.abs().clamp_min(1e-6).log(), product_BTHK, last[0]
