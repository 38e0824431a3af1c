"""mLSTM: the matrix memory of the xLSTM, in the layer of xLSTM-7B."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._heads import HeadConfig
from linnet.mixers._options import choice, flag, number, share, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class MLSTMConfig(HeadConfig, mixer="mlstm"):
    heads: int = size(8, "heads")
    expand_k: float = share(0.5, "key width over d_model", parts="heads")
    input_gate: str = choice("exp", '"exp": e^i, kept in range by a running maximum, or "sigmoid" (TFLA)', "exp", "sigmoid")
    normalizer: str | None = choice("floor", '"floor" divides by max(|n.q|, 1); None, for the sigmoid gate only', "floor", None)
    soft_cap: float | None = number(15.0, "c of c tanh(x / c) on both gates' inputs (None: no cap)", above=0)
    input_bias: float = number(-10.0, "start of the input gate's bias")
    bias: bool = flag(False, "biases of every projection and of the norm (the gates' projections always have one)")
    norm_eps: float = number(1e-6, "epsilon of the norm", above=0)

    def check(self) -> None:
        if self.input_gate == "exp" and self.normalizer is None:
            self.refuse("normalizer", "'floor' with the exponential input gate")


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

    def add_parts(self) -> None:
        c = self.config
        keys, values = c.heads * c.key_size, c.heads * c.value_size
        self.q_proj, self.k_proj = (nn.Linear(c.d_model, keys, bias=c.bias) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(c.d_model, values, bias=c.bias) for _ in range(2))
        self.i_proj, self.f_proj = (nn.Linear(c.d_model, c.heads) for _ in range(2))
        self.o_norm = L.HeadLayerNorm(c.heads, c.value_size, eps=c.norm_eps, bias=c.bias)
        self.o_proj = nn.Linear(values, c.d_model, bias=c.bias)

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

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c = self.config
        return {"C": (c.heads, c.key_size, c.value_size), "n": (c.heads, c.key_size) if c.normalizer else None, "m": (c.heads,)}

    def remember(
        self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, i_BTH: Tensor, f_BTH: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """The cell: h [B, T, H, V] from queries, keys, values and the inputs of both gates."""
        c, gates = self.config, (L.full(i_BTH), L.full(f_BTH))
        i_BTH, f_BTH = gates if c.soft_cap is None else (c.soft_cap * torch.tanh(g / c.soft_cap) for g in gates)
        return ops.linear_attention(
            q_BTHK, k_BTHK, v_BTHV, F.logsigmoid(f_BTH), log_gain=i_BTH if c.input_gate == "exp" else F.logsigmoid(i_BTH),
            normalizer=c.normalizer, **context.carry(state),
        )  # fmt: skip

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        self.open_state(state)
        q_BTHK, k_BTHK, v_BTHV = (L.split_heads(p(x_BTD), c.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        h_BTHV, new = self.remember(q_BTHK, k_BTHK, v_BTHV, self.i_proj(x_BTD), self.f_proj(x_BTD), state, context)
        return self.o_proj(ops.gated_linear_unit(self.o_norm(h_BTHV), self.g_proj(x_BTD), activation="sigmoid")), new
