"""The Linear Transformer: attention with a positive feature map instead of the softmax."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from linnet import ops
from linnet.feature_maps import FEATURE_MAPS, get_feature_map
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._heads import HeadConfig, HeadMixer
from linnet.mixers._options import choice, flag, number, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class LinearTransformerConfig(HeadConfig, mixer="linear_transformer"):
    heads: int = size(8, "query heads")
    kv_heads: int | None = size(None, "heads of k and v, a divisor of `heads` (None: `heads`)", divides="heads")
    feature_map: str = choice("elu+1", "feature map of q and k", *FEATURE_MAPS)
    normalizer: str | None = choice("sum", '"sum" divides by phi(q).z + normalizer_eps; None does not', "sum", None)
    normalizer_eps: float = number(1e-6, "added to the denominator", above=0)
    output_norm: bool = flag(False, "per-head RMSNorm with weight on the output, for use without a normaliser")
    bias: bool = flag(True, "bias of all four projections")
    norm_eps: float = number(1e-5, "epsilon of the output norm", above=0)

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads


@register_mixer("linear_transformer")
class LinearTransformer(HeadMixer):
    r"""Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", 2020
    (arXiv 2006.16236).

        S_t = S_{t-1} + phi(k_t) v_t^T,   z_t = z_{t-1} + phi(k_t),   o_t = S_t^T phi(q_t) / (phi(q_t).z_t + eps)

    Maps to `linnet.ops.linear_attention` without decay, normalizer="sum", scale 1. State: S [N,H,K,V], z [N,H,K].
    """

    Config = LinearTransformerConfig

    def add_parts(self) -> None:
        c = self.config
        self.phi = get_feature_map(c.feature_map)
        self.add_qkv(bias=c.bias)
        self.o_proj = nn.Linear(c.heads * c.value_size, c.d_model, bias=c.bias)
        self.o_norm = L.RMSNorm(c.value_size, eps=c.norm_eps) if c.output_norm else None

    def reset_parameters(self) -> None:
        L.init_default(self)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c = self.config
        return {"S": (c.groups, c.key_size, c.value_size), "z": (c.groups, c.key_size) if c.normalizer else None}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        self.open_state(state)
        q_BTHK, k_BTHK, v_BTHV = self.qkv(x_BTD)
        o_BTHV, new = ops.linear_attention(
            self.phi(q_BTHK), self.phi(k_BTHK), v_BTHV, normalizer=c.normalizer, normalizer_eps=c.normalizer_eps, scale=1.0,
            **context.carry(state),
        )  # fmt: skip
        if c.output_norm:
            o_BTHV = self.o_norm(o_BTHV)
        return self.o_proj(o_BTHV.flatten(2)), new
