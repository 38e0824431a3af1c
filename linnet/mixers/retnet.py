"""RetNet's multi-scale retention, and with other options the lightning attention of TransNormerLLM and MiniMax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class RetNetConfig:
    """Options of `retnet`.

    expand_k, expand_v: key and value width over d_model.
    decay: constant log-decay of head h (of H) in layer l (of L): "retnet" log(1 - 2^(-5-h)); "tnl" -(8h/H)(1 - l/L), the formula of
        the TransNormerLLM paper; "alibi" -2^(-8(h+1)/H) (1 - l/(L-1) + 1e-5), its code and MiniMax; or one log-decay per head.
    position: "retnet" turns pairs (2i, 2i+1) by theta^(-linspace(0, 1)); "rope" turns pairs (i, i + K/2) by rotary angles; "none".
    activation: of q, k and v, "identity" or "silu" (lightning attention). scale: None means K^-1/2; lightning attention has 1.
    norm: "head" is a per-head RMSNorm, "full" one over all heads. norm_affine: whether it has a weight (the paper's has none).
    gate: activation of the output gate, "silu", "sigmoid" or None.
    """

    d_model: int
    heads: int = 8
    expand_k: float = 1.0
    expand_v: float = 2.0
    decay: str | tuple[float, ...] = "retnet"
    position: str = "retnet"
    theta: float = 10000.0
    activation: str = "identity"
    scale: float | None = None
    norm: str = "head"
    norm_affine: bool = False
    norm_eps: float = 1e-5
    gate: str | None = "silu"

    def __post_init__(self):
        L.check_positive("retnet", d_model=self.d_model, heads=self.heads)
        L.check_number(
            "retnet", 0, expand_k=self.expand_k, expand_v=self.expand_v, theta=self.theta, scale=self.scale, norm_eps=self.norm_eps
        )
        L.check_choice("retnet", ("retnet", "rope", "none"), position=self.position)
        L.check_choice("retnet", ("identity", "silu"), activation=self.activation)
        L.check_choice("retnet", ("head", "full"), norm=self.norm)
        L.check_choice("retnet", ("silu", "sigmoid", None), gate=self.gate)
        if isinstance(self.decay, list):  # configs read from JSON or YAML
            object.__setattr__(self, "decay", tuple(self.decay))
        if isinstance(self.decay, tuple):
            if len(self.decay) != self.heads or not all(isinstance(g, (int, float)) and g <= 0 for g in self.decay):
                L.refuse("retnet", "decay", f"{self.heads} numbers <= 0 (log-decays per head)", self.decay)
        else:
            L.check_choice("retnet", ("retnet", "tnl", "alibi"), decay=self.decay)
        L.divided("retnet", "expand_v", self.d_model * self.expand_v, self.heads)
        if L.divided("retnet", "expand_k", self.d_model * self.expand_k, self.heads) % 2 and self.position != "none":
            L.refuse("retnet", "expand_k", "such that a head has an even number of key channels (rotary pairs)", self.expand_k)

    @property
    def key_size(self) -> int:
        return int(self.d_model * self.expand_k / self.heads)

    @property
    def value_size(self) -> int:
        return int(self.d_model * self.expand_v / self.heads)


@register_mixer("retnet")
class RetNet(Mixer):
    r"""Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023 (arXiv 2307.08621).

        S_t = gamma_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   y = W_o (swish(x W_g) * RMSNorm_head(o)),   q, k turned

    Maps to `linnet.ops.linear_attention` with a constant log-decay [H]. State: S [N,H,K,V] and, with positions, length [N].
    """

    Config = RetNetConfig

    def __init__(self, config: RetNetConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c = config
        keys, values = c.heads * c.key_size, c.heads * c.value_size
        self.q_proj = nn.Linear(c.d_model, keys, bias=False)
        self.k_proj = nn.Linear(c.d_model, keys, bias=False)
        self.v_proj = nn.Linear(c.d_model, values, bias=False)
        self.g_proj = nn.Linear(c.d_model, values, bias=False) if c.gate else None
        self.o_proj = nn.Linear(values, c.d_model, bias=False)
        self.o_norm = L.RMSNorm(c.value_size if c.norm == "head" else values, eps=c.norm_eps, affine=c.norm_affine)
        with torch.device("cpu"):  # also when the parameters are built on the meta device
            self.log_decay_min = 1.001 * float(self.log_decays(torch.empty(0)).min())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for part in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            if part is not None:
                nn.init.xavier_uniform_(part.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.o_proj.weight, gain=2**-1)
        self.o_norm.reset_parameters()

    def state_spec(self) -> StateSpec:
        c = self.config
        return self.make_spec(S=(c.heads, c.key_size, c.value_size), length=None if c.position == "none" else ())

    def log_decays(self, like: Tensor) -> Tensor:
        """The constant log-decay of every head [H], in at least fp32 on the device of `like`."""
        c = self.config
        if isinstance(c.decay, tuple):
            return torch.tensor(c.decay, dtype=L.state_dtype(like), device=like.device)
        return L.constant_log_decays(c.decay, c.heads, self.layer_index, self.num_layers, like)

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        S, length_N = self.open_state(state, "S", None if c.position == "none" else "length")
        q_BTHK, k_BTHK, v_BTHV = (L.split_heads(p(x_BTD), c.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if c.activation == "silu":
            q_BTHK, k_BTHK, v_BTHV = (nn.functional.silu(y) for y in (q_BTHK, k_BTHK, v_BTHV))
        if c.position != "none":
            positions_BT, retnet = L.token_positions(x_BTD, context, length_N), c.position == "retnet"
            frequencies = (L.retnet_frequencies if retnet else L.rope_frequencies)(c.key_size, c.theta, x_BTD)
            turns = L.turns(positions_BT, frequencies)
            q_BTHK, k_BTHK = (L.rotate(y, turns, interleaved=retnet) for y in (q_BTHK, k_BTHK))
        o_BTHV, new = ops.linear_attention(
            q_BTHK, k_BTHK, v_BTHV, self.log_decays(x_BTD), scale=c.scale, log_decay_min=self.log_decay_min,
            initial_state=S, return_state=context.return_state, cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        o_BTD = self.o_norm(o_BTHV).flatten(2) if c.norm == "head" else self.o_norm(o_BTHV.flatten(2))
        if c.gate:
            o_BTD = o_BTD * L.ACTIVATIONS[c.gate](self.g_proj(x_BTD))
        if new is not None and c.position != "none":
            count_N = L.token_counts(x_BTD, context)
            new = (*new, count_N if length_N is None else length_N + count_N)
        return self.o_proj(o_BTD), new
