"""Gated DeltaNet: the delta rule with one decay per head (Qwen3-Next, Qwen3.5, OLMo hybrid)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Options of `gated_deltanet`.

    heads: key heads. value_heads: a multiple of `heads` (None: `heads`); each key head serves value_heads / heads of them.
    head_dim: K, key channels per head (None: 3/4 d_model / heads, rounded to a multiple of 8).
    expand_v: value channels per value head over key channels, or value_dim directly.
    conv_size: taps of the short convolution on q, k, v (None: none, SiLU only). allow_neg_eigval: beta in (0, 2), not (0, 1).
    gate: multiply the normalised output by silu(x W_g). A_range: exp(A_log) is uniform in it at the start.
    """

    d_model: int
    heads: int = 4
    value_heads: int | None = None
    head_dim: int | None = None
    expand_v: float = 2.0
    value_dim: int | None = None
    conv_size: int | None = 4
    allow_neg_eigval: bool = False
    gate: bool = True
    A_range: tuple[float, float] = (1.0, 16.0)
    norm_eps: float = 1e-5

    def __post_init__(self):
        L.check_positive(
            "gated_deltanet", d_model=self.d_model, heads=self.heads, value_heads=self.value_heads, head_dim=self.head_dim,
            value_dim=self.value_dim, conv_size=self.conv_size,
        )  # fmt: skip
        L.check_number("gated_deltanet", 0, expand_v=self.expand_v, norm_eps=self.norm_eps)
        object.__setattr__(self, "A_range", L.pair("gated_deltanet", "A_range", self.A_range))
        if self.state_heads % self.heads:
            L.refuse("gated_deltanet", "value_heads", f"a multiple of heads = {self.heads}", self.value_heads)
        L.divided("gated_deltanet", "expand_v", self.key_size * self.expand_v, 1)

    @property
    def state_heads(self) -> int:
        return self.value_heads or self.heads

    @property
    def key_size(self) -> int:
        return self.head_dim or max(8, 8 * int(0.75 * self.d_model / self.heads / 8 + 0.5))

    @property
    def value_size(self) -> int:
        return self.value_dim or int(self.key_size * self.expand_v)


@register_mixer("gated_deltanet")
class GatedDeltaNet(Mixer):
    r"""Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024 (arXiv 2412.06464).

        S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
        log alpha_t = -exp(A_log) softplus(x_t W_a + dt_bias),   beta_t = sigmoid(x_t W_b)
        y_t = W_o (RMSNorm_head(o_t) * silu(x_t W_g))

    q, k, v are SiLU of a short convolution; q and k have unit length. Maps to `linnet.ops.short_conv` and `linnet.ops.delta_rule`
    with erase = beta, log_decay [B,T,H]. State: conv [N, channels, W-1], S [N,H,K,V].
    """

    Config = GatedDeltaNetConfig
    no_weight_decay = ("A_log", "dt_bias")

    def __init__(self, config: GatedDeltaNetConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        keys, values = c.heads * c.key_size, c.state_heads * c.value_size
        self.widths = (keys, keys, values)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.d_model, width, bias=False) for width in self.widths)
        self.a_proj, self.b_proj = (nn.Linear(c.d_model, c.state_heads, bias=False) for _ in range(2))
        self.g_proj = nn.Linear(c.d_model, values, bias=False) if c.gate else None
        self.conv = L.ShortConv(sum(self.widths), c.conv_size) if c.conv_size else None
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(c.state_heads)) for _ in range(2))
        self.o_norm = (L.GatedRMSNorm if c.gate else L.RMSNorm)(c.value_size, eps=c.norm_eps)
        self.o_proj = nn.Linear(values, c.d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        L.init_normal(self)
        L.init_A_log(self.A_log, *self.config.A_range)
        L.init_dt_bias(self.dt_bias)

    def state_spec(self) -> StateSpec:
        c = self.config
        return self.make_spec(conv=self.conv.state_shape if self.conv else None, S=(c.state_heads, c.key_size, c.value_size))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, S = self.open_state(state, "conv" if self.conv else None, "S")
        qkv = torch.cat((self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)), -1)
        qkv, conv = self.conv(qkv, conv, context) if self.conv is not None else (nn.functional.silu(qkv), None)
        q_BTE, k_BTE, v_BTE = qkv.split(self.widths, -1)
        q_BTHK, k_BTHK = (L.l2_norm(L.split_heads(y, c.heads)) for y in (q_BTE, k_BTE))
        beta_BTH = torch.sigmoid(L.full(self.b_proj(x_BTD)))
        o_BTHV, new = ops.delta_rule(
            q_BTHK, k_BTHK, L.split_heads(v_BTE, c.state_heads), erase=2 * beta_BTH if c.allow_neg_eigval else beta_BTH,
            log_decay=L.mamba_log_decay(self.a_proj(x_BTD), self.A_log, self.dt_bias), initial_state=S,
            return_state=context.return_state, cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        o_BTHV = self.o_norm(o_BTHV, L.split_heads(self.g_proj(x_BTD), c.state_heads)) if c.gate else self.o_norm(o_BTHV)
        return self.o_proj(o_BTHV.flatten(2)), self.close_state(context, conv, *(new or ()))
