"""Mesa layer: every token reads the optimal regularised linear regression of the values on the keys so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._delta import DeltaMixer
from linnet.mixers._registry import register_mixer
from linnet.mixers._solve import gram_solve


@dataclass(frozen=True)
class MesaConfig:
    """Options of `mesa`.

    heads; head_dim: K, key channels per head (None: d_model / heads). expand_v: value channels per head over key channels.
    conv_size: taps of the short convolution on q and k (None: none, SiLU only). gate: multiply the normalised output by
        silu(x W_g).
    cg_steps: conjugate-gradient steps per solve. ridge_min: lower bound of the regulariser; ridge_init: its start.
    """

    d_model: int
    heads: int = 4
    head_dim: int | None = None
    expand_v: float = 1.0
    conv_size: int | None = 4
    gate: bool = False
    cg_steps: int = 16
    ridge_min: float = 0.25
    ridge_init: float = 1.0
    norm_eps: float = 1e-5
    mixer: ClassVar[str] = "mesa"

    def __post_init__(self):
        L.check_positive(
            self.mixer, d_model=self.d_model, heads=self.heads, head_dim=self.head_dim, conv_size=self.conv_size,
            cg_steps=self.cg_steps,
        )  # fmt: skip
        L.check_number(self.mixer, 0, expand_v=self.expand_v, ridge_min=self.ridge_min, norm_eps=self.norm_eps)
        L.check_number(self.mixer, self.ridge_min, ridge_init=self.ridge_init)
        L.divided(self.mixer, "expand_v", self.key_size * self.expand_v, 1)

    @property
    def state_heads(self) -> int:
        return self.heads

    @property
    def key_size(self) -> int:
        return self.head_dim or L.divided(self.mixer, "heads", self.d_model, self.heads)

    @property
    def value_size(self) -> int:
        return int(self.key_size * self.expand_v)


@register_mixer("mesa")
class Mesa(DeltaMixer):
    r"""von Oswald et al., "MesaNet: Sequence Modeling by Locally Optimal Test-Time Training", 2025 (arXiv 2506.05233).

        H_t = gamma_t H_{t-1} + beta_t k_t k_t^T,   Z_t = gamma_t Z_{t-1} + beta_t k_t v_t^T
        o_t = Z_t^T (H_t + Diag(lambda))^{-1} q_t
        gamma_t = sigmoid(x_t W_a + b_a),   beta_t = sigmoid(x_t W_b + b_b),   lambda = ridge_min + softplus(l) per head and channel
        y_t = W_o RMSNorm_head(o_t)

    q and k are SiLU of a short convolution with unit length, v is linear. Maps to `linnet.ops.short_conv` and
    `linnet.ops.linear_attention`: one read of H per conjugate-gradient step, one of Z.
    State: conv [N, channels, W-1], H [N,H,K,K], Z [N,H,K,V].
    """

    Config = MesaConfig
    no_weight_decay = ("ridge",)

    def add_parts(self) -> None:
        c = self.config
        self.add_block("silu" if c.gate else None, value_conv=False)
        self.a_proj, self.b_proj = (nn.Linear(c.d_model, c.heads) for _ in range(2))
        self.g_proj = nn.Linear(c.d_model, c.heads * c.value_size, bias=False) if c.gate else None
        self.ridge = nn.Parameter(torch.empty(c.heads, c.key_size))

    def reset_parameters(self) -> None:
        L.init_normal(self)
        nn.init.constant_(self.ridge, math.log(math.expm1(self.config.ridge_init - self.config.ridge_min)))

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        c = self.config
        return {"H": (c.heads, c.key_size, c.key_size), "Z": (c.heads, c.key_size, c.value_size)}

    def regulariser(self) -> Tensor:
        """lambda [H, K]."""
        return self.config.ridge_min + F.softplus(L.full(self.ridge))

    def mix(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, memory: list[Any], context: Context
    ) -> tuple[Tensor, State | None]:
        (H, Z), q, k, v = memory, L.full(q_BTHK), L.full(k_BTHK), L.full(v_BTHV)
        log_gamma_BTH, beta_BTH = F.logsigmoid(L.full(self.a_proj(x_BTD))), torch.sigmoid(L.full(self.b_proj(x_BTD)))
        solved, H = gram_solve(q, k, beta_BTH, log_gamma_BTH, self.regulariser(), H, context, self.config.cg_steps)
        o_BTHV, new = ops.linear_attention(
            solved, k, beta_BTH[..., None] * v, log_gamma_BTH, scale=1.0, initial_state=Z, return_state=context.return_state,
            cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        return o_BTHV.to(v_BTHV.dtype), None if new is None else (H, *new)
