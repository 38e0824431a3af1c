"""Retention: linear attention with one constant decay per head, whose queries and keys may be turned by their positions."""

from __future__ import annotations

import torch
from torch import Tensor

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State
from linnet.mixers._heads import HeadMixer


class Retention(HeadMixer):
    """S_t = e^{g_h} S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, y_t = `output` of o_t.

    A subclass calls `add_qkv` where its parts are made, and says what the decays are (`log_decays`), what becomes of q, k and v
    (`activate`), by which angles q and k turn (`angles`, where `positional`) and what leaves (`output`). Its config has a scale.
    State: S [N,H,K,V] and, with positions, length [N].
    """

    positional: bool = False
    interleaved: bool = False  # channel pairs (2i, 2i + 1) turn together, not (i, i + K/2)

    def log_decays(self, like: Tensor) -> Tensor | None:
        """The constant log-decay of every head [H], in at least fp32 on the device of `like`."""
        raise NotImplementedError

    def activate(self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def angles(self, like: Tensor) -> Tensor:
        """Radians per token of the channel pairs, [K/2] or [H, K/2]."""
        raise NotImplementedError

    def output(self, x_BTD: Tensor, o_BTHV: Tensor) -> Tensor:
        raise NotImplementedError

    def bound_decay(self) -> None:
        """Declares the smallest decay, from the CPU also when the parameters are built on the meta device."""
        with torch.device("cpu"):
            decays = self.log_decays(torch.empty(0))
        self.log_decay_min = None if decays is None else 1.001 * float(decays.min())

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c = self.config
        return {"S": (c.heads, c.key_size, c.value_size), "length": () if self.positional else None}

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        S, length_N = self.open_state(state)
        q_BTHK, k_BTHK, v_BTHV = self.qkv(x_BTD)
        q_BTHK, k_BTHK, v_BTHV = self.activate(q_BTHK, k_BTHK, v_BTHV)
        if self.positional:
            turns = L.turns(L.token_positions(x_BTD, context, length_N), self.angles(x_BTD))
            q_BTHK, k_BTHK = (L.rotate(y, turns, interleaved=self.interleaved) for y in (q_BTHK, k_BTHK))
        o_BTHV, new = ops.linear_attention(
            q_BTHK, k_BTHK, v_BTHV, self.log_decays(x_BTD), scale=c.scale, log_decay_min=self.log_decay_min, **context.carry(S)
        )
        length_N = L.token_counts(x_BTD, context, length_N) if self.positional else None
        return self.output(x_BTD, o_BTHV), self.close_state(context, *(new or ()), length_N)
