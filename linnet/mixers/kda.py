"""Kimi delta attention: the delta rule with one decay per key channel (Kimi Linear, Ling 3)."""

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
class KDAConfig:
    """Options of `kda`.

    heads: key heads. value_heads: a multiple of `heads` (None: `heads`); decay and write strength are per value head.
    head_dim: K, key channels per head (None: d_model / heads). expand_v: value channels per value head over key channels.
    decay_gate: "softplus" g = -exp(A_log) softplus(f + dt_bias); "safe" g = decay_min sigmoid(exp(A_log) (f + dt_bias)).
    gate_rank: rank of the projections of decay and output gate (None: value channels per head; 0: full matrices).
    gate: activation of the output gate, "sigmoid" or "silu". gate_bias: whether its projection has a bias.
    conv_size: taps of the short convolution on q, k, v (None: none, SiLU only). allow_neg_eigval: beta in (0, 2), not (0, 1).
    """

    d_model: int
    heads: int = 4
    value_heads: int | None = None
    head_dim: int | None = None
    expand_v: float = 1.0
    decay_gate: str = "softplus"
    decay_min: float = -5.0
    gate_rank: int | None = None
    gate: str = "sigmoid"
    gate_bias: bool = True
    conv_size: int | None = 4
    allow_neg_eigval: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self):
        L.check_positive(
            "kda", d_model=self.d_model, heads=self.heads, value_heads=self.value_heads, head_dim=self.head_dim,
            conv_size=self.conv_size, gate_rank=self.gate_rank or None,
        )  # fmt: skip
        L.check_number("kda", 0, expand_v=self.expand_v, norm_eps=self.norm_eps)
        L.check_number("kda", float("-inf"), 0, decay_min=self.decay_min)
        L.check_choice("kda", ("softplus", "safe"), decay_gate=self.decay_gate)
        L.check_choice("kda", ("sigmoid", "silu"), gate=self.gate)
        if self.state_heads % self.heads:
            L.refuse("kda", "value_heads", f"a multiple of heads = {self.heads}", self.value_heads)
        L.divided("kda", "expand_v", self.key_size * self.expand_v, 1)

    @property
    def state_heads(self) -> int:
        return self.value_heads or self.heads

    @property
    def key_size(self) -> int:
        return self.head_dim or L.divided("kda", "heads", self.d_model, self.heads)

    @property
    def value_size(self) -> int:
        return int(self.key_size * self.expand_v)


@register_mixer("kda")
class KDA(Mixer):
    r"""Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025 (arXiv 2510.26692).

        S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
        log alpha_t by `decay_gate` with f = x_t W_f1 W_f2,   beta_t = sigmoid(x_t W_b)
        y_t = W_o (RMSNorm_head(o_t) * sigmoid(x_t W_g1 W_g2 + b))

    q, k, v are SiLU of a short convolution; q and k have unit length. Maps to `linnet.ops.short_conv` and `linnet.ops.delta_rule`
    with erase = beta, log_decay [B,T,H,K] (log_decay_min declared with the safe gate). State: conv [N, channels, W-1], S [N,H,K,V].
    """

    Config = KDAConfig
    no_weight_decay = ("A_log", "dt_bias")

    def __init__(self, config: KDAConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        keys, values = c.heads * c.key_size, c.state_heads * c.value_size
        self.widths = (keys, keys, values)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.d_model, width, bias=False) for width in self.widths)
        self.b_proj = nn.Linear(c.d_model, c.state_heads, bias=False)

        def gate(width: int, bias: bool) -> nn.Module:
            if c.gate_rank == 0:
                return nn.Linear(c.d_model, width, bias=bias)
            return L.LowRank(c.d_model, c.gate_rank or c.value_size, width, bias=bias)

        self.f_proj, self.g_proj = gate(c.state_heads * c.key_size, False), gate(values, c.gate_bias)
        self.conv = L.ShortConv(sum(self.widths), c.conv_size) if c.conv_size else None
        self.A_log = nn.Parameter(torch.empty(c.state_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.state_heads, c.key_size))
        self.o_norm = L.GatedRMSNorm(c.value_size, eps=c.norm_eps, activation=c.gate)
        self.o_proj = nn.Linear(values, c.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        L.init_normal(self)
        L.init_dt_bias(self.dt_bias)
        L.init_A_log(self.A_log) if self.config.decay_gate == "softplus" else nn.init.zeros_(self.A_log)

    def state_spec(self) -> StateSpec:
        c = self.config
        return self.make_spec(conv=self.conv.state_shape if self.conv else None, S=(c.state_heads, c.key_size, c.value_size))

    def log_decay(self, x_BTD: Tensor) -> Tensor:
        """g [B, T, H, K] in at least fp32."""
        c, A = self.config, L.full(self.A_log).exp()[:, None]
        f_BTHK = L.full(L.split_heads(self.f_proj(x_BTD), c.state_heads)) + L.full(self.dt_bias)
        return -A * F.softplus(f_BTHK) if c.decay_gate == "softplus" else c.decay_min * torch.sigmoid(A * f_BTHK)

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, S = self.open_state(state, "conv" if self.conv else None, "S")
        qkv = torch.cat((self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)), -1)
        qkv, conv = self.conv(qkv, conv, context) if self.conv is not None else (F.silu(qkv), None)
        q_BTE, k_BTE, v_BTE = qkv.split(self.widths, -1)
        q_BTHK, k_BTHK = (L.l2_norm(L.split_heads(y, c.heads)) for y in (q_BTE, k_BTE))
        beta_BTH = torch.sigmoid(L.full(self.b_proj(x_BTD)))
        o_BTHV, new = ops.delta_rule(
            q_BTHK, k_BTHK, L.split_heads(v_BTE, c.state_heads), erase=2 * beta_BTH if c.allow_neg_eigval else beta_BTH,
            log_decay=self.log_decay(x_BTD), log_decay_min=c.decay_min if c.decay_gate == "safe" else None, initial_state=S,
            return_state=context.return_state, cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        o_BTHV = self.o_norm(o_BTHV, L.split_heads(self.g_proj(x_BTD), c.state_heads))
        return self.o_proj(o_BTHV.flatten(2)), self.close_state(context, conv, *(new or ()))
