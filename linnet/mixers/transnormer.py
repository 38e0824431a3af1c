"""TransNormer: softmax attention inside blocks in the lower layers, normed linear attention in the upper ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.feature_maps import FEATURE_MAPS
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._options import MixerConfig, choice, flag, number, size
from linnet.mixers._registry import register_mixer

PHI = FEATURE_MAPS | {"elu": F.elu}


@dataclass(frozen=True)
class TransNormerConfig(MixerConfig, mixer="transnormer"):
    heads: int = size(8, "heads")
    attention: str = choice("auto", '"diag" or "norm"; "auto": "diag" in the first half of the layers', "auto", "diag", "norm")
    block_size: int = size(64, 'W, tokens of a block of "diag"', least=2)
    feature_map: str = choice("elu+1", 'of q and k in "norm": "elu+1" (variant T2), "elu" (T1) and others', *PHI)
    norm: str = choice("rms", 'output of "norm", over all heads: "srms" x / rms(x), "rms" with a weight, or "layer"', *L.NORMS)
    norm_eps: float = number(1e-5, "epsilon of the norm", above=0)
    bias: bool = flag(False, "bias of all projections")

    def check(self) -> None:
        self.divide("heads", self.d_model, self.heads)

    @property
    def size(self) -> int:
        return self.d_model // self.heads


@register_mixer("transnormer")
class TransNormer(Mixer):
    r"""Qin et al., "The Devil in Linear Transformer", 2022 (arXiv 2210.10340), causal.

        diag:  o_t = sum_s softmax_s(q_t.k_s / sqrt(K)) v_s over s <= t in the block of t, blocks of W tokens from the start
        norm:  S_t = S_{t-1} + phi(k_t) v_t^T,   o_t = Norm(S_t^T phi(q_t)), without a denominator

    and y_t = W_o o_t. Maps to `linnet.ops.softmax_attention` with one segment per block, and to `linnet.ops.linear_attention`.
    State: "diag" the open block k, v [N,W-1,H,K] and the number of its tokens, length [N]; "norm" S [N,H,K,V].
    """

    Config = TransNormerConfig

    def add_parts(self) -> None:
        c = self.config
        self.diag = c.attention == "diag" or (c.attention == "auto" and 2 * self.layer_index < self.num_layers)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(c.d_model, c.d_model, bias=c.bias) for _ in range(4))
        self.o_norm = None if self.diag else L.make_norm(c.norm, c.d_model, c.norm_eps)

    def state_spec(self) -> StateSpec:
        c, dtype = self.config, self.q_proj.weight.dtype
        if not self.diag:
            return self.make_spec(S=(c.heads, c.size, c.size))
        slots = (c.block_size - 1, c.heads, c.size)
        return StateSpec(("k", "v", "length"), (slots, slots, ()), (dtype, dtype, torch.int64))

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        self.open_state(state, *(("k", "v", "length") if self.diag else ("S",)))
        q_BTHK, k_BTHK, v_BTHV = (L.split_heads(p(x_BTD), c.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.diag:
            o_BTHV, new = block_attention(q_BTHK, k_BTHK, v_BTHV, c.block_size, state, context)
            return self.o_proj(o_BTHV.flatten(2)), new
        phi = PHI[c.feature_map]
        o_BTHV, new = ops.linear_attention(phi(q_BTHK), phi(k_BTHK), v_BTHV, scale=1.0, **context.carry(state))
        return self.o_proj(self.o_norm(o_BTHV.flatten(2))), new


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, size: int, state: State | None, context: Context
) -> tuple[Tensor, State | None]:
    """Causal softmax attention inside blocks of `size` tokens, counted from the start of every row or document."""
    batch, tokens = q.shape[:2]
    if context.cu_seqlens is None and state is None:  # every block is a row
        count = -(-tokens // size)
        rows = (F.pad(y, (0, 0, 0, 0, 0, count * size - tokens)).unflatten(1, (count, size)).flatten(0, 1) for y in (q, k, v))
        o = ops.softmax_attention(*rows)[0].unflatten(0, (batch, count)).flatten(1, 2)[:, :tokens]
        length = torch.full((batch,), tokens % size, dtype=torch.int64, device=q.device)
        return o, _open_block(k[:, tokens - tokens % size :], v[:, tokens - tokens % size :], length, size, context)
    if context.cu_seqlens is None and tokens == 1:  # decode: an open block has room for one more token
        o, new = ops.softmax_attention(q, k, v, initial_state=state, return_state=True)
        return o, _open_block(new[0], new[1], new[2] % size, size, context)
    bounds = range(0, (batch + 1) * tokens, tokens) if context.cu_seqlens is None else context.cu_seqlens.tolist()
    used = [0] * (len(bounds) - 1) if state is None else state[2].tolist()
    edges, row_of, first, last = [0], [], [], []
    for row, (start, end) in enumerate(pairwise(bounds)):
        cuts = [*range(start + size - used[row], end, size), end]
        edges, row_of, first = edges + cuts, row_of + [row] * len(cuts), first + [1] + [0] * (len(cuts) - 1)
        last.append(len(row_of) - 1)
    cache = None
    if state is not None:  # only the first segment of a row goes on with its open block
        cache = (state[0][row_of], state[1][row_of], state[2][row_of] * torch.tensor(first, device=q.device))
    o, new = ops.softmax_attention(
        *(y.flatten(0, 1)[None] for y in (q, k, v)), initial_state=cache, return_state=True,
        cu_seqlens=torch.tensor(edges, dtype=torch.int32, device=q.device),
    )  # fmt: skip
    keys, values, length = (y[last] for y in new)
    return o.view(v.shape), _open_block(keys, values, length % size, size, context)


def _open_block(k: Tensor, v: Tensor, length_N: Tensor, size: int, context: Context) -> State | None:
    """The first length_N tokens of the rows k, v [N, S, H, K] in size - 1 slots, zeros behind."""
    if not context.return_state:
        return None
    kept = (torch.arange(size - 1, device=k.device) < length_N[:, None])[..., None, None]
    fit = lambda y: F.pad(y, (0, 0, 0, 0, 0, max(size - 1 - y.shape[1], 0)))[:, : size - 1]  # noqa: E731
    return torch.where(kept, fit(k), 0), torch.where(kept, fit(v), 0), length_N
