"""DeltaNet: a linear transformer that replaces, rather than adds, the value stored under a key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.feature_maps import FEATURE_MAPS, get_feature_map
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._heads import HeadConfig, HeadMixer
from linnet.mixers._options import choice, flag, number, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class DeltaNetConfig(HeadConfig, mixer="deltanet"):
    conv_size: int | None = size(4, "taps of the short convolution on q, k, v (None: none)")
    feature_map: str = choice("silu", "feature map of q and k, after the convolution", *FEATURE_MAPS)
    qk_norm: str = choice("l2", 'norm of q and k: "l2", "sum" (of non-negative features) or "none"', "l2", "sum", "none")
    beta: bool = flag(True, "whether the write strength is learned (False: 1)")
    allow_neg_eigval: bool = flag(False, "beta in (0, 2) instead of (0, 1)")
    gate: bool = flag(False, "multiply the normalised output by silu(x W_g)")
    norm_eps: float = number(1e-5, "epsilon of the output norm", above=0)

    def check(self) -> None:
        if self.qk_norm == "sum" and self.feature_map not in ("elu+1", "relu"):
            self.refuse("feature_map", "non-negative ('elu+1' or 'relu') with qk_norm='sum'")


@register_mixer("deltanet")
class DeltaNet(HeadMixer):
    r"""Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024 (arXiv 2406.06484);
    first Schlag et al., "Linear Transformers Are Secretly Fast Weight Programmers", 2021 (2102.11174: elu+1, sum norm).

        S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   y_t = W_o RMSNorm_head(o_t)

    Maps to `linnet.ops.short_conv` and `linnet.ops.delta_rule` with erase = beta [B,T,H].
    State: conv [N, channels, W-1], S [N,H,K,V].
    """

    family = "delta"
    Config = DeltaNetConfig

    def add_parts(self) -> None:
        c = self.config
        self.add_qkv(conv_size=c.conv_size, activation=None)
        self.b_proj = nn.Linear(c.d_model, c.heads, bias=False) if c.beta else None
        self.g_proj = nn.Linear(c.d_model, self.widths[2], bias=False) if c.gate else None
        self.o_norm = (L.GatedRMSNorm if c.gate else L.RMSNorm)(c.value_size, eps=c.norm_eps)
        self.o_proj = nn.Linear(self.widths[2], c.d_model, bias=False)
        self.phi = get_feature_map(c.feature_map)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c = self.config
        return {"conv": self.conv.state_shape if self.conv else None, "S": (c.heads, c.key_size, c.value_size)}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, S = self.open_state(state)
        q_BTHK, k_BTHK, v_BTHV, conv = self.convolved_qkv(x_BTD, conv, context)
        norm = {"l2": L.l2_norm, "sum": L.sum_norm, "none": lambda y: y}[c.qk_norm]
        q_BTHK, k_BTHK, v_BTHV = norm(self.phi(q_BTHK)), norm(self.phi(k_BTHK)), nn.functional.silu(v_BTHV)
        beta_BTH = torch.sigmoid(L.full(self.b_proj(x_BTD))) if c.beta else L.full(x_BTD).new_ones(*x_BTD.shape[:2], c.heads)
        o_BTHV, new = ops.delta_rule(
            q_BTHK, k_BTHK, v_BTHV, erase=2 * beta_BTH if c.allow_neg_eigval else beta_BTH, **context.carry(S)
        )
        o_BTHV = self.o_norm(o_BTHV, L.split_heads(self.g_proj(x_BTD), c.heads)) if c.gate else self.o_norm(o_BTHV)
        return self.o_proj(o_BTHV.flatten(2)), self.close_state(context, conv, *(new or ()))
