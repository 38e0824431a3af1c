"""RetNet's multi-scale retention, and with other options the lightning attention of TransNormerLLM and MiniMax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._heads import HeadConfig
from linnet.mixers._options import choice, flag, number, option, share, size
from linnet.mixers._registry import register_mixer
from linnet.mixers._retention import Retention


@dataclass(frozen=True)
class RetNetConfig(HeadConfig, mixer="retnet"):
    heads: int = size(8, "heads")
    expand_v: float = share(2.0, "value width over d_model", parts="heads")
    decay: str | tuple[float, ...] = option(
        "retnet",
        'constant log-decay of head h (of H) in layer l (of L): "retnet" log(1 - 2^(-5-h)); "tnl" -(8h/H)(1 - l/L), the formula of '
        'the TransNormerLLM paper; "alibi" -2^(-8(h+1)/H) (1 - l/(L-1) + 1e-5), its code and MiniMax; or one log-decay per head',
    )
    position: str = choice(
        "retnet", '"retnet" turns pairs (2i, 2i+1) by theta^(-linspace(0, 1)); "rope" pairs (i, i + K/2) by rotary angles; "none"',
        "retnet", "rope", "none",
    )  # fmt: skip
    theta: float = number(10000.0, "base of the angles", above=0)
    activation: str = choice("identity", 'of q, k and v; lightning attention has "silu"', "identity", "silu")
    scale: float | None = number(None, "of q (None: K^-1/2; lightning attention has 1)", above=0)
    norm: str = choice("head", 'RMSNorm per "head", or "full" over all heads', "head", "full")
    norm_affine: bool = flag(False, "whether the norm has a weight (the paper's has none)")
    norm_eps: float = number(1e-5, "epsilon of the norm", above=0)
    gate: str | None = choice("silu", "activation of the output gate, or None", "silu", "sigmoid", None)

    def check(self) -> None:
        if isinstance(self.decay, tuple):
            if len(self.decay) != self.heads or not all(isinstance(g, (int, float)) and g <= 0 for g in self.decay):
                self.refuse("decay", f"{self.heads} numbers <= 0 (log-decays per head)")
        elif self.decay not in ("retnet", "tnl", "alibi"):
            self.refuse("decay", "one of 'retnet', 'tnl', 'alibi', or a log-decay per head")
        if self.key_size % 2 and self.position != "none":
            self.refuse("expand_k", "such that a head has an even number of key channels (rotary pairs)")


@register_mixer("retnet")
class RetNet(Retention):
    r"""Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023 (arXiv 2307.08621).

        S_t = gamma_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   y = W_o (swish(x W_g) * RMSNorm_head(o)),   q, k turned

    Maps to `linnet.ops.linear_attention` with a constant log-decay [H]. State: S [N,H,K,V] and, with positions, length [N].
    """

    Config = RetNetConfig

    def add_parts(self) -> None:
        c = self.config
        values = c.heads * c.value_size
        self.add_qkv()
        self.g_proj = nn.Linear(c.d_model, values, bias=False) if c.gate else None
        self.o_proj = nn.Linear(values, c.d_model, bias=False)
        self.o_norm = L.RMSNorm(c.value_size if c.norm == "head" else values, eps=c.norm_eps, affine=c.norm_affine)
        self.positional, self.interleaved = c.position != "none", c.position == "retnet"
        self.bound_decay()

    def reset_parameters(self) -> None:
        for part in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            if part is not None:
                nn.init.xavier_uniform_(part.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.o_proj.weight, gain=2**-1)
        self.o_norm.reset_parameters()

    def log_decays(self, like: Tensor) -> Tensor:
        c = self.config
        if isinstance(c.decay, tuple):
            return torch.tensor(c.decay, dtype=L.state_dtype(like), device=like.device)
        return L.constant_log_decays(c.decay, c.heads, self.layer_index, self.num_layers, like)

    def activate(self, *qkv: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(F.silu, qkv)) if self.config.activation == "silu" else qkv

    def angles(self, like: Tensor) -> Tensor:
        frequencies = L.retnet_frequencies if self.interleaved else L.rope_frequencies
        return frequencies(self.config.key_size, self.config.theta, like)

    def output(self, x_BTD: Tensor, o_BTHV: Tensor) -> Tensor:
        c = self.config
        o_BTD = self.o_norm(o_BTHV).flatten(2) if c.norm == "head" else self.o_norm(o_BTHV.flatten(2))
        return self.o_proj(o_BTD * L.ACTIVATIONS[c.gate](self.g_proj(x_BTD)) if c.gate else o_BTD)
