"""Music Transformer: softmax attention with learned embeddings of the distance, in linear memory by the skew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers._base import Context, State
from linnet.mixers._cached import CachedAttention, CachedConfig
from linnet.mixers._options import choice, flag, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class MusicRelativeConfig(CachedConfig, mixer="music_relative"):
    max_distance: int = size(512, "R, the number of distances with an embedding: 0 .. R - 1")
    beyond: str = choice("clip", "a longer distance uses the last embedding, or none (logits of content only)", "clip", "zero")
    shared: bool = flag(False, "one table of embeddings for all heads")


@register_mixer("music_relative")
class MusicRelative(CachedAttention):
    r"""Huang et al., "Music Transformer: Generating Music with Long-Term Structure", 2018 (arXiv 1809.04281).

        o_t = sum_{s <= t} softmax_s((q_t.k_s + q_t.e_{t-s}) / sqrt(K)) v_s,      y_t = W_o o_t

    Maps to `linnet.ops.relative_attention`, where the products q.e, computed by distance, become logits by slot through a change of
    strides (the skew of the paper) in place of embeddings gathered for every pair. Global attention of the paper, not its local
    blocks. The paper has as many embeddings as tokens; what lies beyond R is clipped (Shaw et al. 2018, arXiv 1803.02155), or left
    without an embedding. State: the cache k, v [N,S,Hk,K], length [N], which grows.
    """

    Config = MusicRelativeConfig
    no_weight_decay = ("distance",)

    def add_parts(self) -> None:
        super().add_parts()
        c = self.config
        self.distance = nn.Parameter(torch.empty(c.max_distance, 1 if c.shared else c.heads, c.size))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.distance, std=self.config.size**-0.5)

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        context = context or Context()
        self.open_state(state)
        q_BTHK, k_BTHK, v_BTHK = self.project(x_BTD, None, context)
        o_BTHK, new = ops.relative_attention(
            q_BTHK, k_BTHK, v_BTHK, self.distance.to(q_BTHK.dtype), beyond=self.config.beyond, **context.carry(state)
        )
        return self.o_proj(o_BTHK.flatten(2)), new
