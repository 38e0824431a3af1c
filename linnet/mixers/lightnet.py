"""LightNet: linear attention whose keys are a softmax over time (an additive recurrence), causal or in one bidirectional pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _grid as G
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import MixerConfig, choice, flag, number, option, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class LightNetConfig(MixerConfig, mixer="lightnet"):
    heads: int | None = size(None, "H (None: d_model / 128)")
    expand_k: float = number(1.0, "key width over d_model", above=0)
    gate_rank: int = size(128, "rank of the output gate")
    gate: str = choice(
        "silu", 'its activation, "silu" (flash-linear-attention) or "sigmoid" (the authors\' later code)', "silu", "sigmoid"
    )
    scale: float | None = number(None, "of the output (None: K^-1/2)", above=0)
    bidirectional: bool = flag(False, "every token sees the whole sequence (no state, no decoding)")
    lrpe: str | None = choice(
        None, 'MD-LRPE: "cosine" doubles the channels, "rotate" turns pairs (None: no positions)', "cosine", "rotate"
    )
    tpe: bool = flag(False, "MD-TPE: add an average along every axis to the input")
    grid: tuple[int, ...] | None = option(None, "sizes of the axes of the positions, in raster order (None: one axis)", G.is_grid)
    theta: float = number(10000.0, "base of the frequencies of MD-LRPE", above=0)
    norm_eps: float = number(1e-5, "epsilon of the norms", above=0)

    def check(self) -> None:
        self.divide("expand_k", self.d_model * self.expand_k, self.state_heads)
        self.divide("heads", self.d_model, self.state_heads)
        if self.lrpe and self.turned % (len(self.grid or (1,))) or (self.lrpe == "rotate" and self.key_size % 2):
            self.refuse("lrpe", f"None, or its {self.turned} angles of a head must divide evenly among the axes")

    @property
    def state_heads(self) -> int:
        return self.heads or max(1, self.d_model // 128)

    @property
    def key_size(self) -> int:
        return int(self.d_model * self.expand_k / self.state_heads)

    @property
    def turned(self) -> int:
        """Angles of a head."""
        return self.key_size // 2 if self.lrpe == "rotate" else self.key_size


@register_mixer("lightnet")
class LightNet(Mixer):
    r"""Qin et al., "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet", 2024 (arXiv 2405.21022).

        z_t = log sum_{s<=t} e^{k_s},   S_t = Diag(e^{z_{t-1} - z_t}) S_{t-1} + e^{k_t - z_t} v_t^T = sum_s e^{k_s - z_t} v_s^T
        o_t = S_t^T silu(x_t W_q),   y_t = W_o (RMSNorm(o_t) * silu(x_t W_1 W_2));   bidirectional: z and S of the last token

    MD-LRPE on silu(q) and e^{k - z}: "cosine" [x cos(n th), x sin(n th)], whose products depend on distances alone; "rotate" turns
    pairs, which do so only where the channels of a pair decay alike, or bidirectionally. MD-TPE: x + tpe(x) in place of x, in every
    layer that has the option (the paper: once, at the embedding). Formulas of both: `_grid.py`.
    Maps to `linnet.ops.cumulative_logsumexp` (z), `linnet.ops.token_shift` (z_{t-1}) and `linnet.ops.linear_attention`, or
    `linnet.ops.bidirectional_attention`. State: z [N, H*K] (-inf before the first token), S [N,H,K,V] (2K for "cosine"), the sums
    of MD-TPE per axis, and with positions length [N].
    """

    Config = LightNetConfig
    future_option = "bidirectional"
    no_weight_decay = ("tpe.decay",)

    def add_parts(self) -> None:
        c = self.config
        self.keys = c.state_heads * c.key_size
        self.q_proj, self.k_proj = (nn.Linear(c.d_model, self.keys, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.g_proj = L.LowRank(c.d_model, c.gate_rank, c.d_model)
        self.o_norm = L.GatedRMSNorm(c.d_model, eps=c.norm_eps, activation=c.gate)
        self.o_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.tpe = G.MDTPE(c.d_model, c.state_heads, c.grid, c.norm_eps) if c.tpe else None

    def reset_parameters(self) -> None:
        L.init_normal(self)
        if self.tpe is not None:
            self.tpe.reset_parameters()

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c = self.config
        S = (c.state_heads, c.key_size * (1 + (c.lrpe == "cosine")), c.d_model // c.state_heads)
        tpe = self.tpe.state_shapes() if c.tpe else {}
        return {"z": (self.keys,), "S": S, **tpe, "length": () if c.tpe or c.lrpe else None}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        self.refuse_state(state, context)
        z_NE, S, *tpe, length_N = self.open_state(state)
        positions_BT = L.token_positions(x_BTD, context, length_N)
        if c.tpe:
            average_BTD, tpe = self.tpe(x_BTD, positions_BT, tpe, context)
            x_BTD = x_BTD + average_BTD
        q_BTE, k_BTE, v_BTD = nn.functional.silu(self.q_proj(x_BTD)), L.full(self.k_proj(x_BTD)), self.v_proj(x_BTD)
        z_BTE, g_BTE, new_z = self.sums(k_BTE, z_NE, context)
        q_BTHK, k_BTHK, v_BTHV = (L.split_heads(y, c.state_heads) for y in (q_BTE, (k_BTE - z_BTE).exp().to(q_BTE.dtype), v_BTD))
        if c.lrpe:
            angle = G.angles(positions_BT, c.grid, c.turned, c.theta, k_BTE)
            q_BTHK, k_BTHK = (turn(y, angle.cos(), angle.sin(), c.lrpe) for y in (q_BTHK, k_BTHK))
        scale = c.key_size**-0.5 if c.scale is None else c.scale
        if c.bidirectional:
            o_BTHV, new = ops.bidirectional_attention(q_BTHK, k_BTHK, v_BTHV, scale=scale, cu_seqlens=context.cu_seqlens)
        else:
            g_BTHK = L.split_heads(g_BTE, c.state_heads)
            g_BTHK = torch.cat((g_BTHK, g_BTHK), -1) if c.lrpe == "cosine" else g_BTHK
            o_BTHV, new = ops.linear_attention(q_BTHK, k_BTHK, v_BTHV, g_BTHK, scale=scale, **context.carry(S))
        y_BTD = self.o_proj(self.o_norm(o_BTHV.flatten(2), self.g_proj(x_BTD)))
        length_N = L.token_counts(x_BTD, context, length_N) if c.tpe or c.lrpe else None
        return y_BTD, self.close_state(context, *(new_z or ()), *(new or ()), *tpe, length_N)

    def sums(self, k_BTE: Tensor, z_NE: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None, State | None]:
        """z_t, the log-decay z_{t-1} - z_t and the new state; bidirectional: z of the last token, no decay, no state."""
        if self.config.bidirectional:
            _, (last_NE,) = ops.cumulative_logsumexp(k_BTE, return_state=True, cu_seqlens=context.cu_seqlens)
            if context.cu_seqlens is None:
                return last_NE[:, None], None, None
            tokens = context.cu_seqlens.long().diff()
            return torch.repeat_interleave(last_NE, tokens, 0, output_size=k_BTE.shape[1])[None], None, None
        start = k_BTE.new_full((context.rows(k_BTE), self.keys), -torch.inf) if z_NE is None else z_NE
        z_BTE, new_z = ops.cumulative_logsumexp(k_BTE, **context.carry((start,)))
        past_BTE, _ = ops.token_shift(z_BTE, initial_state=(start,), cu_seqlens=context.cu_seqlens)
        return z_BTE, (past_BTE - z_BTE).clamp_max(0), new_z


def turn(x_BTHK: Tensor, cos: Tensor, sin: Tensor, kind: str) -> Tensor:
    """Positions: "cosine" [x cos, x sin]. "rotate": channel pairs (i, i + K/2)."""
    return L.rotate(x_BTHK, (cos, sin)) if kind == "rotate" else torch.cat((x_BTHK * cos, x_BTHK * sin), -1).to(x_BTHK.dtype)
