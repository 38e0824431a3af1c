"""Lightning attention: linear attention with a constant decay per head, as in TransNormerLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._heads import HeadDimConfig
from linnet.mixers._options import choice, flag, number
from linnet.mixers._registry import register_mixer
from linnet.mixers._retention import Retention


@dataclass(frozen=True)
class LightningConfig(HeadDimConfig, mixer="lightning"):
    decay: str = choice(
        "tnl",
        'constant log-decay of head h (of H) in layer l (of L): "tnl" -(8h/H)(1 - l/L), the paper; "alibi" '
        '-2^(-8(h+1)/H) (1 - l/(L-1) + 1e-5), MiniMax; "alibi_interleaved" the authors\' code, which differs from "alibi" where H '
        'is not a power of two; "none"',
        "tnl", "alibi", "alibi_interleaved", "none",
    )  # fmt: skip
    position: str = choice(
        "lrpe", '"lrpe" turns q and k in layer 0 by learned angles per head, starting as rotary ones; "none"', "lrpe", "none"
    )
    theta: float = number(10000.0, "base of the angles at the start", above=0)
    value_activation: bool = flag(False, "silu of v too (the authors' code, MiniMax); q and k always have it")
    scale: float = number(1.0, "scale of q", above=0)
    norm: str = choice(
        "srms", 'over all heads: "srms" x / rms(x) (the paper), "rms" with a weight (MiniMax), "layer" (the code)', *L.NORMS
    )
    norm_eps: float = number(1e-6, "epsilon of the norm", above=0)
    gate: str | None = choice(
        "linear",
        'of the normed output: "linear" x W_u (the paper), "sigmoid" of x W_u (MiniMax), "low_rank" sigmoid(x W_1 W_2) of rank '
        "head_dim (the code), or None",
        "linear", "sigmoid", "low_rank", None,
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        if self.size % 2 and self.position == "lrpe":
            self.refuse("position", "'none' where a head has an odd number of channels")


@register_mixer("lightning")
class Lightning(Retention):
    r"""Qin et al., "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models", 2024
    (arXiv 2401.04658); layer of Qin et al., "TransNormerLLM", 2023 (arXiv 2307.14995).

        S_t = lambda_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t,   q = silu(x W_q), k = silu(x W_k), v = x W_v
        y_t = W_o (Norm(o_t) * (x_t W_u))

    Maps to `linnet.ops.linear_attention` with a constant log-decay [H], scale 1: the paper's tiling is how that operator works.
    State: S [N,H,K,V] and, where positions turn q and k, length [N].
    """

    Config = LightningConfig

    def add_parts(self) -> None:
        c = self.config
        width = c.heads * c.size
        self.add_qkv()
        self.o_proj = nn.Linear(width, c.d_model, bias=False)
        if c.gate == "low_rank":
            self.g_proj = L.LowRank(c.d_model, c.size, width)
        else:
            self.g_proj = nn.Linear(c.d_model, width, bias=False) if c.gate else None
        self.o_norm = L.make_norm(c.norm, width, c.norm_eps)
        turned = c.position == "lrpe" and self.layer_index == 0
        self.angle = nn.Parameter(torch.empty(width // 2)) if turned else None  # radians per token of every channel pair
        self.positional = turned
        self.bound_decay()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.angle is not None:
            self.angle.copy_(L.rope_frequencies(self.config.size, self.config.theta, self.angle).repeat(self.config.heads))

    def log_decays(self, like: Tensor) -> Tensor | None:
        c = self.config
        return None if c.decay == "none" else L.constant_log_decays(c.decay, c.heads, self.layer_index, self.num_layers, like)

    def activate(self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.silu(q_BTHK), F.silu(k_BTHK), F.silu(v_BTHV) if self.config.value_activation else v_BTHV

    def angles(self, like: Tensor) -> Tensor:
        return L.full(self.angle).view(self.config.heads, -1)

    def output(self, x_BTD: Tensor, o_BTHV: Tensor) -> Tensor:
        o_BTD, gate = self.o_norm(o_BTHV.flatten(2)), self.config.gate
        if gate:
            u_BTD = self.g_proj(x_BTD)
            o_BTD = o_BTD * (u_BTD if gate == "linear" else torch.sigmoid(u_BTD))
        return self.o_proj(o_BTD)
