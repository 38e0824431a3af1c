"""SEA: a linear estimate of the attention matrix, its best cells, softmax attention over the keys of those cells."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._cached import CachedAttention, RotaryConfig
from linnet.mixers._options import flag, size
from linnet.mixers._registry import register_mixer
from linnet.mixers.performer import orthogonal_features


@dataclass(frozen=True)
class SEAConfig(RotaryConfig, mixer="sea"):
    cells: int = size(128, "C, cells of an estimated row, a multiple of 4")
    top_keys: int = size(64, "keys per query and head, as long as that is at least one cell: n / C keys")
    prior: bool = flag(True, "add the logarithm of the estimate to the logits, so that the model's own loss trains it")
    num_features: int | None = size(None, "F, random features of a head (None: K ln K)")
    position_size: int = size(16, "sine and cosine channels by which the estimate knows positions, an even number")
    hidden: int | None = size(None, "hidden width of the estimate's MLP (None: 2 K)")
    seed: int = size(0, "of the random features, with the layer index", least=0)

    def check(self) -> None:
        super().check()
        if self.cells % 4:
            self.refuse("cells", "a multiple of 4")
        if self.position_size % 2:
            self.refuse("position_size", "even")

    @property
    def features(self) -> int:
        return self.num_features or max(1, int(self.size * math.log(self.size)))


@register_mixer("sea")
class SEA(CachedAttention):
    r"""Lee et al., "SEA: Sparse Linear Attention with Estimated Attention Mask", 2023 (arXiv 2310.01777), causal.

        c_t = sum_s phi(q_t).phi(k_s) [v_s, pos_s] / sum_s phi(q_t).phi(k_s),   h_t = MLP(LN([c_t, v_t, pos_t]))
        estimate_t = up-sampled 3x3 convolution of W h over (t - 2 .. t) x cells, softmax over C cells of the n visible keys
        o_t = m_t p_t softmax over the best cells (q_t.k_s / sqrt(K) + log estimate) v_s + (1 - m_t) mean_{s <= t} v_s

    p_t, m_t are sigmoids of h_t. Maps to `linnet.ops.linear_attention`, `token_shift` and `cell_attention`. From the paper: the
    parts and their order. Chosen here: ReLU features, sinusoids in place of a resized identity matrix (any length), the best cells
    per head and not over all heads, two small convolutions with sub-pixel up-sampling, and the prior, without which only a
    teacher's attention trains the estimate (`estimate_loss`). State: S, z of phi, sum and count of v, two shifted rows, and the
    cache k, v, length, which grows.
    """

    Config = SEAConfig

    def add_parts(self) -> None:
        super().add_parts()
        c = self.config
        width, hidden = 2 * (c.size + c.position_size), c.hidden or 2 * c.size
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU())
        self.cell_proj, self.mix_proj = nn.Linear(hidden, c.cells // 4), nn.Linear(hidden, 2)
        self.conv, self.out_conv = nn.Conv1d(3 * c.heads, 4 * c.heads, 3, padding=1), nn.Conv1d(c.heads, c.heads, 3, padding=1)
        with torch.device("cpu"):  # also when the parameters are built on the meta device
            self.omega_FK = orthogonal_features(c.features, c.size, (c.seed << 16) + self.layer_index)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for part in (self.mlp[0], self.conv, self.out_conv):
            part.reset_parameters()

    def state_shapes(self) -> dict[str, tuple[int | None, ...]]:
        c, row = self.config, (self.config.heads * self.config.cells // 4,)
        S, mean = (c.groups, c.features, c.size + c.position_size), (c.groups, 1, c.size)
        return {"S": S, "z": S[:2], "sum": mean, "count": mean[:2], "before": row, "before2": row} | self.cache_shapes()

    def phi(self, x_BTHK: Tensor) -> Tensor:
        if self.omega_FK.device != x_BTHK.device:
            self.omega_FK = self.omega_FK.to(x_BTHK.device)
        x = L.full(x_BTHK) * self.config.size**-0.25
        return (F.relu(x @ self.omega_FK.to(x.dtype).T) + 1e-3).to(x_BTHK.dtype)

    def estimate(self, q, k, v, positions_BT: Tensor, state: list, context: Context) -> tuple[Tensor, Tensor, list]:
        """(logits of the estimated rows [B,T,H,C], the two gates [B,T,H,2], new state)."""
        c, group = self.config, self.config.heads // self.config.groups
        pos = torch.cat(L.turns(positions_BT, L.rope_frequencies(c.position_size, 10000.0, v)), -1).to(v.dtype)
        read, new = ops.linear_attention(
            self.phi(q), self.phi(k), torch.cat((v, pos.expand(-1, -1, c.groups, -1)), -1), normalizer="sum", scale=1.0,
            **context.carry(None if state[0] is None else tuple(state[:2])),
        )  # fmt: skip
        h = self.mlp(torch.cat((read, v.repeat_interleave(group, 2), pos.expand(-1, -1, c.heads, -1)), -1))
        rows = [self.cell_proj(h).flatten(2)]
        for before in state[4:6]:
            row, kept = ops.token_shift(rows[-1], **context.carry(None if before is None else (before,)))
            rows, new = [*rows, row], (*(new or ()), *(kept or ()))
        image = torch.cat([row.unflatten(-1, (c.heads, -1)) for row in rows], 2).flatten(0, 1)  # [B T, 3 H, C / 4]
        image = F.gelu(self.conv(image)).unflatten(1, (-1, 4)).mT.flatten(2)  # 4 cells from one; copies would tie in the selection
        return self.out_conv(image).unflatten(0, v.shape[:2]), torch.sigmoid(L.full(self.mix_proj(h))), list(new)

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        *memory, k_cache, v_cache, length_N = self.open_state(state)
        q, k, v = self.project(x_BTD, length_N, context)
        positions_BT = L.token_positions(x_BTD, context, length_N)
        estimate_BTHC, gates_BTH2, new = self.estimate(q, k, v, positions_BT, memory, context)
        one = v.new_ones(*v.shape[:3], 1)
        mean_BTHK, total = ops.linear_attention(
            one, one, v, normalizer="sum", normalizer_eps=0.0, scale=1.0,
            **context.carry(None if state is None else tuple(memory[2:4])),
        )  # fmt: skip
        o_BTHK, cache = ops.cell_attention(
            q, k, v, estimate_BTHC.to(q.dtype), top_keys=c.top_keys, prior=c.prior,
            **context.carry(None if state is None else (k_cache, v_cache, length_N)),
        )  # fmt: skip
        p, m = gates_BTH2.to(o_BTHK.dtype).split(1, -1)
        y_BTHK = m * p * o_BTHK + (1 - m) * mean_BTHK.repeat_interleave(c.heads // c.groups, 2)
        return self.o_proj(y_BTHK.flatten(2)), self.close_state(context, *new[:2], *(total or ()), *new[2:], *(cache or ()))

    def estimated_attention(self, x_BTD: Tensor) -> Tensor:
        """The estimated attention matrix [B, H, T, T] of a batch of sequences, its rows probabilities over the visible keys."""
        positions_BT = L.token_positions(x_BTD, Context())
        estimate, _, _ = self.estimate(*self.project(x_BTD, None, Context()), positions_BT, [None] * 6, Context())
        return ops.expand_cells(L.full(estimate))

    def estimate_loss(self, x_BTD: Tensor, teacher_BHTT: Tensor) -> Tensor:
        """KL(teacher || estimate) per row, averaged, plus their mean squared difference: what a teacher's attention teaches."""
        p = self.estimated_attention(x_BTD)
        kl = torch.xlogy(teacher_BHTT, teacher_BHTT / p.clamp_min(1e-30)).sum(-1).mean()
        return kl + (p - teacher_BHTT).square().mean()
