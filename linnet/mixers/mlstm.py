"""mLSTM: the matrix memory of the xLSTM, in the layer of xLSTM-7B."""

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
class MLSTMConfig:
    """Options of `mlstm`.

    expand_k, expand_v: key and value width over d_model.
    input_gate: "exp" e^i, kept in range by a running maximum, or "sigmoid" (tiled flash linear attention).
    normalizer: "floor" divides by max(|n.q|, 1); None does not, for the sigmoid gate only.
    soft_cap: c of c tanh(x / c) on both gates' inputs (None: no cap). input_bias: start of the input gate's bias.
    bias: of every projection and of the norm (the gates' projections always have one).
    """

    d_model: int
    heads: int = 8
    expand_k: float = 0.5
    expand_v: float = 1.0
    input_gate: str = "exp"
    normalizer: str | None = "floor"
    soft_cap: float | None = 15.0
    input_bias: float = -10.0
    bias: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self):
        L.check_positive("mlstm", d_model=self.d_model, heads=self.heads)
        L.check_number("mlstm", 0, expand_k=self.expand_k, expand_v=self.expand_v, soft_cap=self.soft_cap, norm_eps=self.norm_eps)
        L.check_number("mlstm", float("-inf"), input_bias=self.input_bias)
        L.check_choice("mlstm", ("exp", "sigmoid"), input_gate=self.input_gate)
        L.check_choice("mlstm", ("floor",) if self.input_gate == "exp" else ("floor", None), normalizer=self.normalizer)
        L.check_choice("mlstm", (True, False), bias=self.bias)
        L.divided("mlstm", "expand_k", self.d_model * self.expand_k, self.heads)
        L.divided("mlstm", "expand_v", self.d_model * self.expand_v, self.heads)

    @property
    def key_size(self) -> int:
        return int(self.d_model * self.expand_k / self.heads)

    @property
    def value_size(self) -> int:
        return int(self.d_model * self.expand_v / self.heads)


@register_mixer("mlstm")
class MLSTM(Mixer):
    r"""Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024 (arXiv 2405.04517), in the layer of xLSTM-7B (2503.13427).

        C_t = f_t C_{t-1} + i_t k_t v_t^T,   n_t = f_t n_{t-1} + i_t k_t,   f = sigmoid(cap(x W_f)),   i = exp(cap(x W_i))
        h_t = C_t^T q_t / sqrt(K) / max(|n_t.q_t| / sqrt(K), 1),   y_t = W_o (sigmoid(x_t W_g) * LayerNorm_head(h_t))

    With input_gate="sigmoid", i = sigmoid(cap(x W_i)) (Beck et al. 2025, arXiv 2503.14376).

    Maps to `linnet.ops.linear_attention` with log_decay log f [B,T,H], log_gain log i, normalizer="floor". State: C [N,H,K,V],
    with a normaliser n [N,H,K], the maximum m [N,H]; the true values are e^m C, e^m n.
    """

    Config = MLSTMConfig

    def __init__(self, config: MLSTMConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        keys, values = c.heads * c.key_size, c.heads * c.value_size
        self.q_proj, self.k_proj = (nn.Linear(c.d_model, keys, bias=c.bias) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(c.d_model, values, bias=c.bias) for _ in range(2))
        self.i_proj, self.f_proj = (nn.Linear(c.d_model, c.heads) for _ in range(2))
        self.o_norm = L.HeadLayerNorm(c.heads, c.value_size, eps=c.norm_eps, bias=c.bias)
        self.o_proj = nn.Linear(values, c.d_model, bias=c.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c = self.config
        L.init_normal(self, (2 / (5 * c.d_model)) ** 0.5)
        nn.init.normal_(self.o_proj.weight, std=2 / (self.num_layers * c.d_model**0.5))
        for gate in (self.g_proj, self.i_proj, self.f_proj):
            nn.init.zeros_(gate.weight)
        nn.init.constant_(self.i_proj.bias, c.input_bias)
        self.f_proj.bias.copy_(torch.linspace(3, 6, c.heads))
        self.o_norm.reset_parameters()

    def state_spec(self) -> StateSpec:
        c = self.config
        return self.make_spec(
            C=(c.heads, c.key_size, c.value_size), n=(c.heads, c.key_size) if c.normalizer else None, m=(c.heads,)
        )

    def gate(self, projection: nn.Linear, x_BTD: Tensor) -> Tensor:
        y_BTH, cap = L.full(projection(x_BTD)), self.config.soft_cap
        return y_BTH if cap is None else cap * torch.tanh(y_BTH / cap)

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        self.open_state(state, "C", "n" if c.normalizer else None, "m")
        q_BTHK, k_BTHK, v_BTHV = (L.split_heads(p(x_BTD), c.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        i_BTH = self.gate(self.i_proj, x_BTD)
        h_BTHV, new = ops.linear_attention(
            q_BTHK, k_BTHK, v_BTHV, F.logsigmoid(self.gate(self.f_proj, x_BTD)), normalizer=c.normalizer,
            log_gain=i_BTH if c.input_gate == "exp" else F.logsigmoid(i_BTH), initial_state=state,
            return_state=context.return_state, cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        return self.o_proj(torch.sigmoid(self.g_proj(x_BTD)) * self.o_norm(h_BTHV)), new
