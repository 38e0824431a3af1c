"""Superlinear attention: search about sqrt(T) anchors, attend within the best spans; O(T^1.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._cached import CachedAttention, RotaryConfig
from linnet.mixers._options import interval, number, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class SuperlinearConfig(RotaryConfig, mixer="superlinear"):
    search_dim: int | None = size(None, "channels of the search per head (None: as the keys)")
    spans: int = size(2, "spans that are read per query and head")
    window_stripes: int = size(7, "w: the last (w+1)^(1/search_power) - 1 tokens are always read")
    backward: float = number(2.0, "tokens of a span before its anchor, over n^span_power", least=0)
    forward: float = number(0.0, "tokens of a span behind its anchor, over n^span_power", least=0)
    search_power: float = number(0.5, "p: anchors lie j^(1/p) tokens back, about n^p of them", above=0, below=1)
    span_power: float = number(0.5, "growth of a span with the n visible tokens", above=0, below=1)
    A_range: tuple[float, float] = interval((1.0, 16.0), "exp(A_log) is uniform in it at the start")


@register_mixer("superlinear")
class Superlinear(CachedAttention):
    r"""Huang, "Superlinear Multi-Step Attention", 2026 (arXiv 2601.18401), with two steps.

        a_t = exp(g_t) a_{t-1} + dt_t W_a x_t,   g_t = -exp(A_log) dt_t,   dt_t = softplus(x_t W_dt + b)         accumulate
        anchors n - floor(j^{1/p}) of the n visible tokens, scored by (W_s x_t).a / sqrt(A)                    search
        o_t = sum over the best anchors of softmax(score) * softmax attention in their span and the window    attend

    Maps to `linnet.ops.scan` and `linnet.ops.span_attention`. From the paper: the stripes, spans that grow as a power, the gate by
    the search scores (which is what makes the search learnable), a Mamba-2 style recurrence under the search keys. Chosen here: the
    window is read together with every span, in one softmax; the recurrence has no convolution and no gate. With p = span_power
    = 1/2 and backward >= 2 any token is in reach. State: a [N,Hk,A] and the cache k, v, search_k [N,S,Hk,*], length [N], which
    grows; one decoded token reads about sqrt(S) of it.
    """

    Config = SuperlinearConfig
    no_weight_decay = ("A_log", "dt_bias")

    def add_parts(self) -> None:
        super().add_parts()
        c = self.config
        self.search_dim = size = c.search_dim or c.size
        self.search_q_proj, self.search_k_proj = (nn.Linear(c.d_model, n * size, bias=False) for n in (c.heads, c.groups))
        self.dt_proj = nn.Linear(c.d_model, c.groups, bias=False)
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(c.groups)) for _ in range(2))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        L.init_A_log(self.A_log, *self.config.A_range)
        L.init_dt_bias(self.dt_bias)

    def state_shapes(self) -> dict[str, tuple[int | None, ...]]:
        shapes, groups = self.cache_shapes(), self.config.groups
        length = shapes.pop("length")
        return {"a": (groups, self.search_dim)} | shapes | {"search_k": (None, groups, self.search_dim), "length": length}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        a, *cache = self.open_state(state)
        q_BTHK, k_BTHK, v_BTHK = self.project(x_BTD, cache[-1], context)
        dt_BTH1 = F.softplus(L.full(self.dt_proj(x_BTD)) + L.full(self.dt_bias)).unsqueeze(-1)
        step_BTHA = dt_BTH1 * L.split_heads(self.search_k_proj(x_BTD), c.groups)
        log_a = -L.full(self.A_log).exp().unsqueeze(-1) * dt_BTH1
        search_k_BTHA, new_a = ops.scan(step_BTHA, log_a=log_a, **context.carry(None if a is None else (a,)))
        o_BTHK, new = ops.span_attention(
            q_BTHK, k_BTHK, v_BTHK, L.split_heads(self.search_q_proj(x_BTD), c.heads), search_k_BTHA.to(q_BTHK.dtype),
            spans=c.spans, window_stripes=c.window_stripes, backward=c.backward, forward=c.forward, search_power=c.search_power,
            span_power=c.span_power, **context.carry(None if state is None else cache),
        )  # fmt: skip
        return self.o_proj(o_BTHK.flatten(2)), self.close_state(context, *(new_a or ()), *(new or ()))
