"""HGRN2: HGRN with a matrix state, its input gate tied to the forget gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer

SHARED = "hgrn2_lower_bounds"  # key of Context.shared: {layer index: lower bound [D]}
Q_ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid, "identity": lambda x: x}


@dataclass(frozen=True)
class HGRN2Config:
    """Options of `hgrn2`.

    heads: H (None: d_model / 128); keys have d_model / H channels, the expansion ratio of the paper, and so have values.
    lower_bound: of the forget gate in layer l of L: "learned" per channel, rising with depth from l/L; "fixed" l/L; "none".
    q_activation, v_activation: "silu", "sigmoid" or "identity"; the official code has "sigmoid" and "silu".
    norm: "rms" RMSNorm, "srms" one without a weight, or "layer" LayerNorm (official), over all heads.
    bias: of all projections (official: True).
    scale: None means K^-1/2 (flash-linear-attention; the norm absorbs it), the official code has 1.
    """

    d_model: int
    heads: int | None = None
    lower_bound: str = "learned"
    q_activation: str = "silu"
    v_activation: str = "identity"
    norm: str = "rms"
    bias: bool = False
    scale: float | None = None
    norm_eps: float = 1e-5

    def __post_init__(self):
        L.check_positive("hgrn2", d_model=self.d_model, heads=self.heads)
        L.check_choice("hgrn2", ("learned", "fixed", "none"), lower_bound=self.lower_bound)
        L.check_choice("hgrn2", Q_ACTIVATIONS, q_activation=self.q_activation, v_activation=self.v_activation)
        L.check_choice("hgrn2", L.NORMS, norm=self.norm)
        L.check_choice("hgrn2", (True, False), bias=self.bias)
        L.check_number("hgrn2", 0, scale=self.scale, norm_eps=self.norm_eps)
        L.divided("hgrn2", "heads", self.d_model, self.state_heads)

    @property
    def state_heads(self) -> int:
        return self.heads or max(1, self.d_model // 128)

    @property
    def size(self) -> int:
        return self.d_model // self.state_heads


@register_mixer("hgrn2")
class HGRN2(Mixer):
    r"""Qin et al., "HGRN2: Gated Linear RNNs with State Expansion", 2024 (arXiv 2404.07904).

        f_t = lb + (1 - lb) sigmoid(x_t W_f),   S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T,   o_t = S_t^T q_t,   y_t = W_o Norm(o_t)

    Lower bounds rise with depth as in `hgrn`, and pass through Context.shared.

    Maps to `linnet.ops.linear_attention` with log_decay [B,T,H,K] = log f and k = 1 - f. State: S [N,H,K,V].
    """

    Config = HGRN2Config
    no_weight_decay = ("bound_logit",)

    def __init__(self, config: HGRN2Config, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        self.q_proj, self.f_proj, self.v_proj, self.o_proj = (nn.Linear(c.d_model, c.d_model, bias=c.bias) for _ in range(4))
        learned = c.lower_bound == "learned" and layer_index > 0
        self.bound_logit = nn.Parameter(torch.empty(c.d_model)) if learned else None
        self.o_norm = L.make_norm(c.norm, c.d_model, c.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        L.init_normal(self)
        self.o_norm.reset_parameters()
        if self.bound_logit is not None:
            L.init_bound(self.bound_logit, self.layer_index, self.num_layers)

    def state_spec(self) -> StateSpec:
        c = self.config
        return self.make_spec(S=(c.state_heads, c.size, c.size))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        self.open_state(state, "S")
        lb = L.lower_bound(c.lower_bound, self.bound_logit, SHARED, self.layer_index, self.num_layers, context)
        log_f_BTD, k_BTD = L.bounded_gate(L.full(self.f_proj(x_BTD)), lb)
        q_BTD, v_BTD = Q_ACTIVATIONS[c.q_activation](self.q_proj(x_BTD)), Q_ACTIVATIONS[c.v_activation](self.v_proj(x_BTD))
        q_BTHK, k_BTHK, v_BTHV, g_BTHK = (L.split_heads(y, c.state_heads) for y in (q_BTD, k_BTD.to(q_BTD.dtype), v_BTD, log_f_BTD))
        o_BTHV, new = ops.linear_attention(
            q_BTHK, k_BTHK, v_BTHV, g_BTHK, scale=c.scale, initial_state=state, return_state=context.return_state,
            cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        return self.o_proj(self.o_norm(o_BTHV.flatten(2))), new
