"""DeltaNet: a linear transformer that replaces, rather than adds, the value stored under a key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.feature_maps import get_feature_map
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class DeltaNetConfig:
    """Options of `deltanet`.

    expand_k, expand_v: key and value width over d_model. conv_size: taps of the short convolution on q, k, v (None: none).
    feature_map: of q and k after the convolution. qk_norm: "l2", "sum" (of non-negative features) or "none".
    beta: whether the write strength is learned (False: 1). allow_neg_eigval: beta in (0, 2) instead of (0, 1).
    gate: multiply the normalised output by silu(x W_g).
    """

    d_model: int
    heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_size: int | None = 4
    feature_map: str = "silu"
    qk_norm: str = "l2"
    beta: bool = True
    allow_neg_eigval: bool = False
    gate: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self):
        L.check_positive("deltanet", d_model=self.d_model, heads=self.heads, conv_size=self.conv_size)
        L.check_number("deltanet", 0, expand_k=self.expand_k, expand_v=self.expand_v, norm_eps=self.norm_eps)
        L.check_feature_map("deltanet", feature_map=self.feature_map)
        L.check_choice("deltanet", ("l2", "sum", "none"), qk_norm=self.qk_norm)
        if self.qk_norm == "sum" and self.feature_map not in ("elu+1", "relu"):
            L.refuse("deltanet", "feature_map", "non-negative ('elu+1' or 'relu') with qk_norm='sum'", self.feature_map)
        L.divided("deltanet", "expand_k", self.d_model * self.expand_k, self.heads)
        L.divided("deltanet", "expand_v", self.d_model * self.expand_v, self.heads)

    @property
    def key_size(self) -> int:
        return int(self.d_model * self.expand_k / self.heads)

    @property
    def value_size(self) -> int:
        return int(self.d_model * self.expand_v / self.heads)


@register_mixer("deltanet")
class DeltaNet(Mixer):
    r"""Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024 (arXiv 2406.06484);
    first Schlag et al., "Linear Transformers Are Secretly Fast Weight Programmers", 2021 (2102.11174: elu+1, sum norm).

        S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   y_t = W_o RMSNorm_head(o_t)

    Maps to `linnet.ops.short_conv` and `linnet.ops.delta_rule` with erase = beta [B,T,H].
    State: conv [N, channels, W-1], S [N,H,K,V].
    """

    Config = DeltaNetConfig

    def __init__(self, config: DeltaNetConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        self.widths = (c.heads * c.key_size, c.heads * c.key_size, c.heads * c.value_size)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.d_model, width, bias=False) for width in self.widths)
        self.conv = L.ShortConv(sum(self.widths), c.conv_size, activation=None) if c.conv_size else None
        self.b_proj = nn.Linear(c.d_model, c.heads, bias=False) if c.beta else None
        self.g_proj = nn.Linear(c.d_model, self.widths[2], bias=False) if c.gate else None
        self.o_norm = (L.GatedRMSNorm if c.gate else L.RMSNorm)(c.value_size, eps=c.norm_eps)
        self.o_proj = nn.Linear(self.widths[2], c.d_model, bias=False)
        self.phi = get_feature_map(c.feature_map)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        L.init_normal(self)

    def state_spec(self) -> StateSpec:
        c = self.config
        return self.make_spec(conv=self.conv.state_shape if self.conv else None, S=(c.heads, c.key_size, c.value_size))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, S = self.open_state(state, "conv" if self.conv else None, "S")
        qkv = torch.cat((self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)), -1)
        if self.conv is not None:
            qkv, conv = self.conv(qkv, conv, context)
        q_BTHK, k_BTHK, v_BTHV = (L.split_heads(y, c.heads) for y in qkv.split(self.widths, -1))
        norm = {"l2": L.l2_norm, "sum": L.sum_norm, "none": lambda y: y}[c.qk_norm]
        q_BTHK, k_BTHK, v_BTHV = norm(self.phi(q_BTHK)), norm(self.phi(k_BTHK)), nn.functional.silu(v_BTHV)
        beta_BTH = torch.sigmoid(L.full(self.b_proj(x_BTD))) if c.beta else L.full(x_BTD).new_ones(*x_BTD.shape[:2], c.heads)
        o_BTHV, new = ops.delta_rule(
            q_BTHK, k_BTHK, v_BTHV, erase=2 * beta_BTH if c.allow_neg_eigval else beta_BTH, initial_state=S,
            return_state=context.return_state, cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        o_BTHV = self.o_norm(o_BTHV, L.split_heads(self.g_proj(x_BTD), c.heads)) if c.gate else self.o_norm(o_BTHV)
        return self.o_proj(o_BTHV.flatten(2)), self.close_state(context, conv, *(new or ()))
