"""The parts of Titans: its options, the memory, the attention beside it, and the loop over segments of memory-as-context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._options import MixerConfig, choice, flag, number, size
from linnet.mixers._test_time import MemoryNetwork, given

FORGET_BIAS = -4.0  # a token forgets 2 % at the start


@dataclass(frozen=True)
class TitansConfig(MixerConfig, mixer="titans"):
    heads: int = size(4, "heads of memory and attention")
    variant: str = choice("gate", "memory as a gate, as context or as layer, or alone", "gate", "context", "layer", "memory")
    depth: int = size(2, "layers of the memory network")
    expand: int = size(2, "hidden width of the memory network over the channels of a head")
    mini_batch: int | None = size(None, "tokens whose gradients are taken at the same weights (None: 16, `window` as context)")
    window: int = size(128, "tokens that attention sees, as context those of a segment", least=2)
    persistent: int = size(4, "persistent tokens of the attention", least=0)
    momentum: bool = flag(True, "momentum of the gradients (past surprise)")
    forget: bool = flag(True, "weight decay of the memory (forgetting)")
    rate_max: float | None = number(None, "upper bound of theta (None: 1 / (2 mini_batch))", above=0)
    memory_norm: bool = flag(True, "LayerNorm and a residual around the memory network (False: the plain network of the paper)")
    bias: bool = flag(False, "biases of the memory network")
    activation: str = choice("gelu", "of the memory network", "gelu", "silu")
    conv_size: int | None = size(4, "width of the short convolution on q, k, v of the memory (None: none)")
    rope_theta: float = number(10000.0, "base of the rotary positions of the attention", above=0)
    norm_eps: float = number(1e-5, "epsilon of the norms", above=0)

    def check(self) -> None:
        if self.divide("heads", self.d_model, self.heads) % 2:
            self.refuse("heads", "such that a head has an even number of channels (rotary pairs)")
        if self.variant == "context" and self.batch != self.window:
            self.refuse("mini_batch", f"None or window = {self.window} where the memory is context")

    @property
    def size(self) -> int:
        """Channels of a head."""
        return self.d_model // self.heads

    @property
    def batch(self) -> int:
        """Tokens of a mini-batch."""
        return self.mini_batch or (self.window if self.variant == "context" else 16)


class LongTermMemory(nn.Module):
    """Keys, values, queries and gates of the neural memory; one call reads and writes all tokens."""

    def __init__(self, c: TitansConfig):
        super().__init__()
        self.heads, self.mini_batch = c.heads, c.batch
        self.rate_max = 0.5 / c.batch if c.rate_max is None else c.rate_max
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.d_model, c.d_model, bias=False) for _ in range(3))
        self.conv = L.ShortConv(3 * c.d_model, c.conv_size) if c.conv_size else None
        self.rate_proj = nn.Linear(c.d_model, c.heads)
        self.momentum_proj = nn.Linear(c.d_model, c.heads) if c.momentum else None
        self.forget_proj = nn.Linear(c.d_model, c.heads) if c.forget else None
        self.net = MemoryNetwork(
            c.heads, (c.size, *[c.expand * c.size] * (c.depth - 1), c.size), c.batch, bias=c.bias, norm=c.memory_norm,
            residual=c.memory_norm, activation=c.activation, momentum=c.momentum,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        self.net.reset_parameters()
        if self.forget_proj is not None:
            nn.init.constant_(self.forget_proj.bias, FORGET_BIAS)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        return {"conv": self.conv.state_shape if self.conv else None} | self.net.state_shapes()

    def recall(self, x_BTD: Tensor, state: list[Tensor | None], context: Context) -> Tensor:
        """What the weights at the start of the mini-batch know of the tokens: a read without a write [B, T, H, K]."""
        q = L.l2_norm(L.split_heads(F.silu(self.q_proj(x_BTD)), self.heads))
        _, count, W, A, _ = state
        memory = None if count is None else (torch.zeros_like(count), *[W if A is None else A] * (1 if A is None else 2))
        zero = torch.zeros(*q.shape[:3], dtype=L.state_dtype(q), device=q.device)
        return self.net(q, q, q, memory, replace(context, return_state=False), rate=zero)[0]

    def forward(self, x_BTD: Tensor, state: list[Tensor | None], context: Context) -> tuple[Tensor, list[Tensor | None]]:
        conv, *memory = state
        y = torch.cat([p(x_BTD) for p in (self.q_proj, self.k_proj, self.v_proj)], -1)
        y, conv = (F.silu(y), None) if self.conv is None else self.conv(y, conv, context)
        q, k, v = (L.split_heads(part, self.heads) for part in y.chunk(3, -1))
        gates = {"rate": 2 * self.rate_max * torch.sigmoid(L.full(self.rate_proj(x_BTD)))}  # 2: the loss has no factor 1/2
        if self.momentum_proj is not None:
            gates["log_momentum"] = F.logsigmoid(L.full(self.momentum_proj(x_BTD)))
        if self.forget_proj is not None:
            gates["log_decay"] = F.logsigmoid(-L.full(self.forget_proj(x_BTD)))
        o_BTHK, new = self.net(L.l2_norm(q), L.l2_norm(k), v, given(memory), context, **gates)
        rest = iter(new or ())
        kept = [None if new is None or shape is None else next(rest) for shape in self.net.state_shapes().values()]
        return o_BTHK, [conv, *kept]


class PersistentAttention(nn.Module):
    """Causal attention in a sliding window, or in segments with a recalled token before each; persistent tokens are always seen."""

    def __init__(self, c: TitansConfig):
        super().__init__()
        self.heads, self.size, self.window, self.theta = c.heads, c.size, c.window, c.rope_theta
        self.segments = c.variant == "context"
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.d_model, c.d_model, bias=False) for _ in range(3))
        self.persistent = nn.Parameter(torch.empty(c.persistent, c.d_model)) if c.persistent else None

    def reset_parameters(self) -> None:
        if self.persistent is not None:
            nn.init.normal_(self.persistent, std=1.0)  # as large as the normed hidden states beside them

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        slots = (2 * (self.window - 1) if self.segments else self.window - 1, self.heads, self.size)
        return {"k": slots, "v": slots, "length": ()}

    def forward(
        self, x_BTD: Tensor, cache: list[Tensor | None], seen_N: Tensor | None, context: Context, recalled_BTD: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        tokens, n = x_BTD, 1
        if recalled_BTD is not None:
            tokens, n = torch.stack((recalled_BTD, x_BTD), 2).flatten(1, 2), 2
        q, k, v = (L.split_heads(p(y), self.heads) for p, y in ((self.q_proj, x_BTD), (self.k_proj, tokens), (self.v_proj, tokens)))
        places_BT = L.token_positions(x_BTD, replace(context, positions=None), seen_N)
        turns = L.turns(places_BT, L.rope_frequencies(self.size, self.theta, x_BTD))
        turned = L.rotate(q, turns).repeat_interleave(n, 1)
        k = L.rotate(k, tuple(y.repeat_interleave(n, 1) for y in turns))
        o, new, lse = ops.softmax_attention(
            turned, k, v, window=None if self.segments else self.window, return_lse=True, initial_state=given(cache),
            return_state=context.return_state, cu_seqlens=None if context.cu_seqlens is None else n * context.cu_seqlens,
        )  # fmt: skip
        o, lse = o[:, n - 1 :: n], lse[:, n - 1 :: n]
        if self.persistent is not None:  # without a place of their own: the query is not turned
            key, value = (L.full(L.split_heads(p(self.persistent), self.heads)) for p in (self.k_proj, self.v_proj))
            score_BTHP = torch.einsum("bthk,phk->bthp", L.full(q), key) * self.size**-0.5
            total = torch.logaddexp(L.full(lse), score_BTHP.logsumexp(-1))[..., None]
            seen = torch.einsum("bthp,phk->bthk", (score_BTHP - total).exp(), value)
            o = ((L.full(lse)[..., None] - total).exp() * L.full(o) + seen).to(o.dtype)
        return o, [None] * 3 if new is None else self.fit(*new)

    def fit(self, k: Tensor, v: Tensor, length_N: Tensor) -> list[Tensor]:
        """The cache in its constant number of slots; that of a finished segment is empty."""
        slots = self.state_shapes()["k"][0]
        length_N = length_N % (2 * self.window) if self.segments else length_N
        used = (torch.arange(slots, device=k.device) < length_N[:, None])[..., None, None]
        sized = (F.pad(L.full(y), (0, 0, 0, 0, 0, max(slots - y.shape[1], 0)))[:, :slots] for y in (k, v))
        return [*(torch.where(used, y, 0) for y in sized), length_N]


Run = Callable[[Tensor, list[Tensor | None], Context], tuple[Tensor, list[Tensor | None]]]


def in_segments(run: Run, x_BTD: Tensor, state: list[Tensor | None], size: int, context: Context) -> tuple[Tensor, State]:
    """`run` over segments of `size` tokens in sequence, counted from the start of every row or document.

    state: its entry 1 is the count of tokens, its last three the cache of the open segment. All rows go side by side, packed where
    their segments do not end together.
    """
    B, T = x_BTD.shape[:2]
    keep, outputs = replace(context, return_state=True), []
    if context.cu_seqlens is None and (T == 1 or state[1] is None):
        for start in range(0, T, size):
            if start:
                state = [*state[:-3], None, None, None]
            y, state = run(x_BTD[:, start : start + size], state, keep)
            outputs.append(y)
        return torch.cat(outputs, 1), state
    edges = range(0, (B + 1) * T, T) if context.cu_seqlens is None else context.cu_seqlens.tolist()
    used = [0] * (len(edges) - 1) if state[1] is None else (state[1] % size).tolist()
    bounds = [[start, *range(start + size - u, end, size), end] for (start, end), u in zip(pairwise(edges), used, strict=True)]
    order, x_SD = [], x_BTD.flatten(0, 1)
    for i in range(max(map(len, bounds)) - 1):
        spans = [(b + [b[-1]] * (i + 2))[i : i + 2] for b in bounds]
        tokens = torch.cat([torch.arange(*span) for span in spans]).to(x_BTD.device)
        lengths = accumulate((end - start for start, end in spans), initial=0)
        packed = torch.tensor(list(lengths), dtype=torch.int32, device=x_BTD.device)
        y, state = run(x_SD[tokens][None], state, replace(keep, cu_seqlens=packed))
        outputs.append(y[0])
        order.append(tokens)
    return torch.cat(outputs)[torch.cat(order).argsort()].unflatten(0, (B, T)), state
