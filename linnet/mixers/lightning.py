"""Lightning attention: linear attention with a constant decay per head, as in TransNormerLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class LightningConfig:
    """Options of `lightning`.

    head_dim: channels of a head (None: d_model / heads).
    decay: constant log-decay of head h (of H) in layer l (of L): "tnl" -(8h/H)(1 - l/L), the paper; "alibi"
        -2^(-8(h+1)/H) (1 - l/(L-1) + 1e-5), MiniMax; "alibi_interleaved" the authors' code, which differs from "alibi" where H is
        not a power of two; "none".
    position: "lrpe" turns q and k in layer 0 by learned angles per head, starting as rotary ones; "none".
    value_activation: silu of v too (the authors' code, MiniMax); q and k always have it.
    norm: "srms" x / rms(x) (the paper), "rms" with a weight (MiniMax) or "layer" LayerNorm (the code), over all heads.
    gate: of the normed output: "linear" x W_u (the paper), "sigmoid" of x W_u (MiniMax), "low_rank" sigmoid(x W_1 W_2) of rank
        head_dim (the code), or None.
    """

    d_model: int
    heads: int = 8
    head_dim: int | None = None
    decay: str = "tnl"
    position: str = "lrpe"
    theta: float = 10000.0
    value_activation: bool = False
    scale: float = 1.0
    norm: str = "srms"
    norm_eps: float = 1e-6
    gate: str | None = "linear"

    def __post_init__(self):
        L.check_positive("lightning", d_model=self.d_model, heads=self.heads, head_dim=self.head_dim)
        L.check_number("lightning", 0, theta=self.theta, scale=self.scale, norm_eps=self.norm_eps)
        L.check_choice("lightning", ("tnl", "alibi", "alibi_interleaved", "none"), decay=self.decay)
        L.check_choice("lightning", ("lrpe", "none"), position=self.position)
        L.check_choice("lightning", L.NORMS, norm=self.norm)
        L.check_choice("lightning", ("linear", "sigmoid", "low_rank", None), gate=self.gate)
        L.check_choice("lightning", (True, False), value_activation=self.value_activation)
        if self.head_dim is None:
            L.divided("lightning", "heads", self.d_model, self.heads)
        if self.size % 2 and self.position == "lrpe":
            L.refuse("lightning", "position", "'none' where a head has an odd number of channels", self.position)

    @property
    def size(self) -> int:
        return self.head_dim or self.d_model // self.heads


@register_mixer("lightning")
class Lightning(Mixer):
    r"""Qin et al., "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models", 2024
    (arXiv 2401.04658); layer of Qin et al., "TransNormerLLM", 2023 (arXiv 2307.14995).

        S_t = lambda_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t,   q = silu(x W_q), k = silu(x W_k), v = x W_v
        y_t = W_o (Norm(o_t) * (x_t W_u))

    Maps to `linnet.ops.linear_attention` with a constant log-decay [H], scale 1: the paper's tiling is how that operator works.
    State: S [N,H,K,V] and, where positions turn q and k, length [N].
    """

    Config = LightningConfig

    def __init__(self, config: LightningConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        width = c.heads * c.size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.d_model, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, c.d_model, bias=False)
        low = c.gate == "low_rank"
        self.g_proj = (L.LowRank(c.d_model, c.size, width) if low else nn.Linear(c.d_model, width, bias=False)) if c.gate else None
        self.o_norm = L.make_norm(c.norm, width, c.norm_eps)
        turned = c.position == "lrpe" and layer_index == 0
        self.angle = nn.Parameter(torch.empty(width // 2)) if turned else None  # radians per token of every channel pair
        with torch.device("cpu"):  # also when the parameters are built on the meta device
            decays = self.log_decays(torch.empty(0))
            self.log_decay_min = None if decays is None else 1.001 * float(decays.min())
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        L.init_normal(self)
        self.o_norm.reset_parameters()
        if self.angle is not None:
            self.angle.copy_(L.rope_frequencies(self.config.size, self.config.theta, self.angle).repeat(self.config.heads))

    def state_spec(self) -> StateSpec:
        c = self.config
        return self.make_spec(S=(c.heads, c.size, c.size), length=None if self.angle is None else ())

    def log_decays(self, like: Tensor) -> Tensor | None:
        """The constant log-decay of every head [H], in at least fp32 on the device of `like`."""
        c = self.config
        return None if c.decay == "none" else L.constant_log_decays(c.decay, c.heads, self.layer_index, self.num_layers, like)

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        S, length_N = self.open_state(state, "S", None if self.angle is None else "length")
        q_BTHK, k_BTHK, v_BTHV = (L.split_heads(p(x_BTD), c.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        q_BTHK, k_BTHK = F.silu(q_BTHK), F.silu(k_BTHK)
        if self.angle is not None:
            turns = L.turns(L.token_positions(x_BTD, context, length_N), L.full(self.angle).view(c.heads, -1))
            q_BTHK, k_BTHK = (L.rotate(y, turns) for y in (q_BTHK, k_BTHK))
        o_BTHV, new = ops.linear_attention(
            q_BTHK, k_BTHK, F.silu(v_BTHV) if c.value_activation else v_BTHV, self.log_decays(x_BTD), scale=c.scale,
            log_decay_min=self.log_decay_min, initial_state=S, return_state=context.return_state, cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        o_BTD = self.o_norm(o_BTHV.flatten(2))
        if c.gate:
            u_BTD = self.g_proj(x_BTD)
            o_BTD = o_BTD * (u_BTD if c.gate == "linear" else torch.sigmoid(u_BTD))
        if new is not None and self.angle is not None:
            count_N = L.token_counts(x_BTD, context)
            new = (*new, count_N if length_N is None else length_N + count_N)
        return self.o_proj(o_BTD), new
