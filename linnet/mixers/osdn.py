"""OSDN: DeltaNet whose write key passes through a diagonal preconditioner that is learned online."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._delta import diagonal_memory
from linnet.mixers._options import choice, flag, number, share, size
from linnet.mixers._registry import register_mixer
from linnet.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig


@dataclass(frozen=True)
class OSDNConfig(GatedDeltaNetConfig, mixer="osdn"):
    head_dim: int | None = size(None, "K, key channels per head (None: d_model / heads)")
    expand_v: float = share(1.0, "value channels per value head over key channels", of="key_size")
    gate: bool = flag(False, "multiply the normalised output by silu(x W_g)")
    decay: str = choice("none", 'of S: "none" (DeltaNet) or "head" (Gated DeltaNet)', "none", "head")
    forgetting: str = choice(
        "token", 'of the preconditioner: "none", "constant", learned per "head", or from the "token"',
        "none", "constant", "head", "token",
    )  # fmt: skip
    keep: float = number(0.999, "gamma at the start", above=0, below=1)
    rate: float = number(1.0, "eta, step size of the preconditioner", above=0)
    precondition_max: float | None = number(2.0, "upper bound of d where it is used (None: none)", above=0)

    @property
    def key_size(self) -> int:
        return self.head_dim or self.divide("heads", self.d_model, self.heads)


@register_mixer("osdn")
class OSDN(GatedDeltaNet):
    r"""Zhou et al., "OSDN: Improving Delta Rule with Provable Online Preconditioning in Linear Attention", 2026 (arXiv 2605.13473).

        S_t = S_{t-1} + beta_t (d_t * k_t) (v_t - S_{t-1}^T k_t)^T,   o_t = S_t^T q_t / sqrt(K)
        d_{t+1} = gamma_t d_t + eta (1 - d_t^T k_t^2) k_t^2,   d_1 = d_init

    k^2 is elementwise: the gradient step of d on the residual 1 - beta d^T k^2 that a write leaves. S has no decay, or that of
    `gated_deltanet`. The recurrence of d is a delta rule of one value channel with key k^2, erased before its decay gamma; it gives
    d_t^T k_t^2, then a gated sum gives d_t. Where it is used, d is clamped to [0, precondition_max]: with the default, the
    transition's eigenvalue 1 - beta d^T k^2 stays in [-1, 1]. Maps to `linnet.ops.short_conv`, `linnet.ops.linear_attention` and
    twice `linnet.ops.delta_rule` (write_key = d * k). State: conv [N, channels, W-1], d [N,H,K], S [N,H,K,V].
    """

    Config = OSDNConfig
    no_weight_decay = ("d_init",)

    def add_parts(self) -> None:
        super().add_parts()
        c = self.config
        self.d_init = nn.Parameter(torch.empty(c.heads, c.key_size))
        self.keep_proj = nn.Linear(c.d_model, c.heads) if c.forgetting == "token" else None
        self.keep_logit = nn.Parameter(torch.empty(c.heads)) if c.forgetting == "head" else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        logit = math.log(self.config.keep / (1 - self.config.keep))
        nn.init.zeros_(self.d_init)
        if self.keep_proj is not None:
            nn.init.zeros_(self.keep_proj.weight)
            nn.init.constant_(self.keep_proj.bias, logit)
        if self.keep_logit is not None:
            nn.init.constant_(self.keep_logit, logit)

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"d": (self.config.heads, self.config.key_size)} | super().memory_shapes()

    def log_keep(self, x_BTD: Tensor) -> Tensor | None:
        """log gamma [B, T, H] or [H]."""
        c = self.config
        if c.forgetting == "token":
            return F.logsigmoid(L.full(self.keep_proj(x_BTD)))
        if c.forgetting == "head":
            return F.logsigmoid(L.full(self.keep_logit))
        return L.full(self.d_init).new_full((c.heads,), math.log(c.keep)) if c.forgetting == "constant" else None

    def preconditioner(self, x_BTD: Tensor, k_BTHK: Tensor, d_NHK: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        """d_t for every token [B, T, H, K] and the last d."""
        c, square_BTHK, log_keep = self.config, L.full(k_BTHK).square(), self.log_keep(x_BTD)
        if d_NHK is None:
            d_NHK = L.full(self.d_init).expand(context.rows(x_BTD), -1, -1)
        one_BTH = square_BTHK.new_ones(square_BTHK.shape[:3])
        r_BTH1, _ = ops.delta_rule(
            square_BTHK, square_BTHK, one_BTH[..., None], erase=one_BTH, write_key=c.rate * square_BTHK, log_decay=log_keep,
            erase_read="before_decay", read="before", scale=1.0, initial_state=d_NHK[..., None], cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        return diagonal_memory(c.rate * (1 - r_BTH1) * square_BTHK, log_keep, d_NHK, context, read="before")

    def mix(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, memory: list[Any], context: Context
    ) -> tuple[Tensor, State | None]:
        d_BTHK, d = self.preconditioner(x_BTD, k_BTHK, memory[0], context)
        write_key = (d_BTHK.clamp(0, self.config.precondition_max) * L.full(k_BTHK)).to(k_BTHK.dtype)
        o_BTHV, new = self.delta_rule(q_BTHK, k_BTHK, v_BTHV, memory[1], context, write_key=write_key, **self.gates(x_BTD))
        return o_BTHV, None if new is None else (d, *new)
