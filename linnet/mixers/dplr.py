"""DPLR: diagonal-plus-low-rank transitions, whose erase address is free of the write key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import State
from linnet.mixers._options import flag
from linnet.mixers._registry import register_mixer
from linnet.mixers.kda import KDA, KDAConfig


@dataclass(frozen=True)
class DPLRConfig(KDAConfig, mixer="dplr"):
    tied: bool = flag(
        True,
        "whether what the erase address e reads is also erased there (the transition never grows); False: it is erased at an "
        "address f of its own, the general rank-one term, with which the state may grow",
    )


@register_mixer("dplr")
class DPLR(KDA):
    r"""Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution", 2025 (arXiv 2503.14456), its transition in the block
    of `kda`, with erase addresses of its own as in Li et al., "Erase-then-Delta Attention: Decoupling Erase and Write Addresses in
    Delta-Rule Linear Attention", 2026 (arXiv 2606.26560).

        S_t = (I - beta_t f_t e_t^T) Diag(alpha_t) S_{t-1} + w_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
        beta_t = sigmoid(x_t W_b),   w_t = sigmoid(x_t W_w),   f = e if `tied`;   log alpha_t and y_t as in `kda`

    e and f are made like k: SiLU of a short convolution, unit length. e = f = k is `kda` with separate strengths. Maps to
    `linnet.ops.short_conv` and `linnet.ops.dplr` with a = -alpha * e, b = beta f, write w k. State: conv [N, channels, W-1],
    S [N,H,K,V].
    """

    Config = DPLRConfig

    def add_parts(self) -> None:
        c = self.config
        keys = c.heads * c.key_size
        self.add_block(c.gate, read_proj=keys, **({} if c.tied else {"erase_proj": keys}))
        self.b_proj, self.w_proj = (nn.Linear(c.d_model, c.state_heads, bias=False) for _ in range(2))
        self.add_gates()

    def mix(
        self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, e_BTHK: Tensor, *more: Any
    ) -> tuple[Tensor, State | None]:
        f_BTHK, ((S,), context) = (e_BTHK, more) if self.config.tied else (more[0], more[1:])
        c, gates = self.config, self.gates(x_BTD)
        w_BTH1 = torch.sigmoid(L.full(self.w_proj(x_BTD)))[..., None]
        decay_BTHK, repeats = gates["log_decay"].exp(), c.state_heads // c.heads
        e, f = (L.full(y).repeat_interleave(repeats, 2) for y in (e_BTHK, f_BTHK))
        v_BTHV, dtype = (w_BTH1 * L.full(v_BTHV)).to(v_BTHV.dtype), k_BTHK.dtype
        return ops.dplr(
            q_BTHK, k_BTHK, v_BTHV, (-decay_BTHK * e).to(dtype), (gates["erase"][..., None] * f).to(dtype), gates["log_decay"],
            log_decay_min=self.log_decay_min, **context.carry(S),
        )  # fmt: skip
