"""The Linear Transformer: attention with a positive feature map instead of the softmax."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from linnet import ops
from linnet.feature_maps import get_feature_map
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class LinearTransformerConfig:
    """Options of `linear_transformer`.

    kv_heads: a divisor of `heads` (None: `heads`). expand_k, expand_v: key and value width over d_model.
    feature_map: "elu+1", "relu", "silu" or "identity". normalizer: "sum" divides by phi(q).z + normalizer_eps; None does not.
    output_norm: per-head RMSNorm with weight on the output, for use without a normaliser. bias: of all four projections.
    """

    d_model: int
    heads: int = 8
    kv_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0
    feature_map: str = "elu+1"
    normalizer: str | None = "sum"
    normalizer_eps: float = 1e-6
    output_norm: bool = False
    bias: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self):
        name = "linear_transformer"
        L.check_positive(name, d_model=self.d_model, heads=self.heads, kv_heads=self.kv_heads)
        L.check_number(
            name, 0, expand_k=self.expand_k, expand_v=self.expand_v, normalizer_eps=self.normalizer_eps, norm_eps=self.norm_eps
        )
        L.check_feature_map(name, feature_map=self.feature_map)
        L.check_choice(name, ("sum", None), normalizer=self.normalizer)
        if self.heads % self.groups:
            L.refuse(name, "kv_heads", f"a divisor of heads = {self.heads}", self.kv_heads)
        L.divided(name, "expand_k", self.d_model * self.expand_k, self.heads)
        L.divided(name, "expand_v", self.d_model * self.expand_v, self.heads)

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def key_size(self) -> int:
        return int(self.d_model * self.expand_k / self.heads)

    @property
    def value_size(self) -> int:
        return int(self.d_model * self.expand_v / self.heads)


@register_mixer("linear_transformer")
class LinearTransformer(Mixer):
    r"""Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", 2020
    (arXiv 2006.16236).

        S_t = S_{t-1} + phi(k_t) v_t^T,   z_t = z_{t-1} + phi(k_t),   o_t = S_t^T phi(q_t) / (phi(q_t).z_t + eps)

    Maps to `linnet.ops.linear_attention` without decay, normalizer="sum", scale 1. State: S [N,H,K,V], z [N,H,K].
    """

    Config = LinearTransformerConfig

    def __init__(self, config: LinearTransformerConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        self.phi = get_feature_map(c.feature_map)
        self.q_proj = nn.Linear(c.d_model, c.heads * c.key_size, bias=c.bias)
        self.k_proj = nn.Linear(c.d_model, c.groups * c.key_size, bias=c.bias)
        self.v_proj = nn.Linear(c.d_model, c.groups * c.value_size, bias=c.bias)
        self.o_proj = nn.Linear(c.heads * c.value_size, c.d_model, bias=c.bias)
        self.o_norm = L.RMSNorm(c.value_size, eps=c.norm_eps) if c.output_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        L.init_default(self)

    def state_spec(self) -> StateSpec:
        c = self.config
        z = (c.groups, c.key_size) if c.normalizer else None
        return self.make_spec(S=(c.groups, c.key_size, c.value_size), z=z)

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        self.open_state(state, "S", "z" if c.normalizer else None)
        o_BTHV, new = ops.linear_attention(
            self.phi(L.split_heads(self.q_proj(x_BTD), c.heads)), self.phi(L.split_heads(self.k_proj(x_BTD), c.groups)),
            L.split_heads(self.v_proj(x_BTD), c.groups), normalizer=c.normalizer, normalizer_eps=c.normalizer_eps, scale=1.0,
            initial_state=state, return_state=context.return_state, cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        if c.output_norm:
            o_BTHV = self.o_norm(o_BTHV)
        return self.o_proj(o_BTHV.flatten(2)), new
