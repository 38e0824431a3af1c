"""What the test-time learners share: the memory network, the layer around TTT, attention beside a memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import MixerConfig, flag, number, size
from linnet.ops.memory import memory_size


class MemoryNetwork(nn.Module):
    """The network that a memory starts from, its parameters only: the work is `linnet.ops.neural_memory`."""

    def __init__(
        self, heads: int, sizes: tuple[int, ...], mini_batch: int, *, bias: bool, norm: bool, residual: bool,
        activation: str = "gelu", momentum: bool = False, eps: float = 1e-6,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.sizes, self.mini_batch, self.momentum = heads, sizes, mini_batch, momentum
        self.options = {"residual": residual, "activation": activation, "norm_eps": eps}
        self.weights = nn.ParameterList(torch.empty(heads, a, b) for a, b in pairwise(sizes))
        self.biases = nn.ParameterList(torch.empty(heads, b) for b in sizes[1:]) if bias else None
        self.norm_weight, self.norm_bias = (nn.Parameter(torch.empty(heads, sizes[-1])) if norm else None for _ in range(2))

    def reset_parameters(self, std: float | None = None) -> None:
        """Weights N(0, std^2), or N(0, 1 / d_in) without `std`; biases 0; the norm the identity."""
        for w in self.weights:
            nn.init.normal_(w, std=w.shape[1] ** -0.5 if std is None else std)
        for zero in (*(self.biases or ()), self.norm_bias):
            if zero is not None:
                nn.init.zeros_(zero)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        flat = (self.heads, memory_size(self.sizes, self.biases is not None))
        return {"count": (), "W": flat, "A": flat if self.mini_batch > 1 else None, "S": flat if self.momentum else None}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, memory: State | None, context: Context, **gates: Tensor | None):
        return ops.neural_memory(
            q, k, v, list(self.weights), None if self.biases is None else list(self.biases), **gates, norm_weight=self.norm_weight,
            norm_bias=self.norm_bias, mini_batch=self.mini_batch, **self.options, **context.carry(memory),
        )  # fmt: skip


def given(state: list[Tensor | None]) -> State | None:
    """A part of `open_state` as an operator takes it."""
    kept = tuple(x for x in state if x is not None)
    return kept or None


@dataclass(frozen=True)
class TTTConfig(MixerConfig):
    heads: int = size(4, "heads")
    mini_batch: int = size(16, "tokens whose inner gradients are taken at the same weights")
    base_lr: float = number(1.0, "inner learning rate times the channels of a head, at most", above=0)
    share_qk: bool = flag(True, "q and k from one projection, told apart by their convolutions (Mamba backbone)")
    conv_size: int | None = size(4, "width of the short convolution on q and k (None: none)")
    gate: bool = flag(True, "multiply the normalised output by gelu(x W_g) (Mamba backbone)")
    inner_norm: bool = flag(True, "LayerNorm at the end of the inner network")
    residual: bool = flag(True, "inner network f(z) = z + ..")
    bias: bool = flag(True, "biases of the inner network")
    position_scale: bool = flag(True, "a token reads after a step scaled by 1/(i+1) + learnt, i its place in the mini-batch")
    rope_theta: float | None = number(10000.0, "base of the rotary positions in the mini-batch (None: no rotation)", above=0)
    norm_eps: float = number(1e-6, "epsilon of the norms", above=0)

    def check(self) -> None:
        if self.divide("heads", self.d_model, self.heads) % 2 and self.rope_theta is not None:
            self.refuse("heads", "such that a head has an even number of channels (rotary pairs)")
        if self.share_qk and self.conv_size is None:
            self.refuse("share_qk", "False where conv_size is None: q and k would be the same")

    @property
    def size(self) -> int:
        """Channels of a head."""
        return self.d_model // self.heads

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths of the inner network."""
        return (self.size, self.size)


class TTTMixer(Mixer):
    """The layer around an inner network; see `ttt_linear`."""

    family = "delta"

    def add_parts(self) -> None:
        c = self.config
        self.q_proj, self.v_proj, self.o_proj = (nn.Linear(c.d_model, c.d_model, bias=False) for _ in range(3))
        self.k_proj = None if c.share_qk else nn.Linear(c.d_model, c.d_model, bias=False)
        self.g_proj = nn.Linear(c.d_model, c.d_model, bias=False) if c.gate else None
        self.conv = L.ShortConv(2 * c.d_model, c.conv_size, bias=True, activation=None) if c.conv_size else None
        self.lr_proj = nn.Linear(c.d_model, c.heads)
        self.position_scale = nn.Parameter(torch.empty(c.mini_batch)) if c.position_scale else None
        self.inner = MemoryNetwork(
            c.heads, c.sizes, c.mini_batch, bias=c.bias, norm=c.inner_norm, residual=c.residual, eps=c.norm_eps
        )  # fmt: skip
        self.post_norm = nn.LayerNorm(c.d_model, eps=c.norm_eps)

    def reset_parameters(self) -> None:
        L.init_normal(self)
        self.inner.reset_parameters(std=0.02)
        self.post_norm.reset_parameters()
        if self.position_scale is not None:
            nn.init.zeros_(self.position_scale)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        return {"conv": self.conv.state_shape if self.conv else None} | self.inner.state_shapes()

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, *memory = self.open_state(state)
        q_BTD = self.q_proj(x_BTD)
        qk = torch.cat((q_BTD, q_BTD if self.k_proj is None else self.k_proj(x_BTD)), -1)
        if self.conv is not None:
            qk, conv = self.conv(qk, conv, context)
        q, k, v = (L.split_heads(y, c.heads) for y in (*qk.chunk(2, -1), self.v_proj(x_BTD)))
        # mini-batches count the tokens of the row, whatever positions the caller gives them
        place_BT = L.token_positions(x_BTD, replace(context, positions=None), memory[0]) % c.mini_batch
        if c.rope_theta is not None:
            turns = L.turns(place_BT, L.rope_frequencies(c.size, c.rope_theta, x_BTD))
            q, k = (L.rotate(y, turns, interleaved=True) for y in (q, k))
        gates = {"rate": c.base_lr / c.size * torch.sigmoid(L.full(self.lr_proj(x_BTD)))}
        if self.position_scale is not None:
            gates["read_scale"] = (L.full(self.position_scale)[place_BT] + 1 / (place_BT + 1)).clamp_min(0)[..., None]
        o_BTHV, new = self.inner(q, k, v, given(memory), context, **gates)
        o_BTD = self.post_norm(o_BTHV.flatten(2))
        if self.g_proj is not None:
            o_BTD = o_BTD * F.gelu(self.g_proj(x_BTD), approximate="tanh")
        return self.o_proj(o_BTD), self.close_state(context, conv, *(new or ()))
