"""Positions on a grid of several axes, whose cells are tokens in raster order.

`grid` gives the sizes of the axes, first axis first: (rows, columns) of an image. The first axis has no end, so a sequence can go
on beyond the grid; None is a single axis. Shape legend: B batch, T tokens, A axes, H heads, K channels, D model width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, State


def is_grid(value: object, config: object = None) -> str | None:
    """For an option: what was expected, unless `value` is None or at least two sizes."""
    good = isinstance(value, (tuple, list)) and len(value) >= 2
    return None if good and all(type(n) is int and n >= 1 for n in value) else "two or more integers >= 1, the sizes of the axes"


def strides(grid: tuple[int, ...] | None) -> list[int]:
    """Tokens between neighbours on every axis."""
    return [math.prod(grid[axis + 1 :]) for axis in range(len(grid))] if grid else [1]


def indices(positions_BT: Tensor, grid: tuple[int, ...] | None) -> Tensor:
    """The index of every token on every axis [B, T, A]."""
    each = [positions_BT // stride for stride in strides(grid)]
    return torch.stack([n if axis == 0 else n % grid[axis] for axis, n in enumerate(each)], -1)


def angles(positions_BT: Tensor, grid: tuple[int, ...] | None, channels: int, theta: float, like: Tensor) -> Tensor:
    """MD-LRPE: angles [B, T, 1, channels], channels split among the axes, each share turned by the index on its axis.

    Frequencies of a share of n channels: theta^(-i/n).
    """
    parts = []
    for index_BT in indices(positions_BT, grid).unbind(-1):
        n = channels // len(strides(grid))
        steps = torch.arange(n, device=like.device, dtype=L.state_dtype(like))
        parts.append(index_BT[..., None, None] * theta ** -(steps / n))
    return torch.cat(parts, -1)


class MDTPE(nn.Module):
    """MD-TPE: an exponential Toeplitz average of the input along every axis, in raster order.

        y_t = sum_axes W RMSNorm_head(a_h sum_{s up to t on the axis} lambda_h^distance x_s), a_h = q_h.k_h, lambda = sigmoid(.)

    A scan along each axis, done in raster order by one linear attention per axis: its key says in which of the `stride` open lines
    a token stands, so that only that line decays; its factor is 0 where a line begins.
    """

    def __init__(self, d_model: int, heads: int, grid: tuple[int, ...] | None, eps: float):
        super().__init__()
        self.d_model, self.heads, self.grid = d_model, heads, grid
        axes = len(strides(grid))
        self.q, self.k = (nn.Parameter(torch.empty(axes, heads, d_model // heads)) for _ in range(2))
        self.decay = nn.Parameter(torch.empty(axes, heads))
        self.norms = nn.ModuleList(L.RMSNorm(d_model, eps=eps, groups=heads) for _ in range(axes))
        self.projections = nn.ModuleList(nn.Linear(d_model, d_model, bias=False) for _ in range(axes))

    def reset_parameters(self) -> None:
        L.init_normal(self)
        for parameter in (self.q, self.k, self.decay):
            nn.init.normal_(parameter)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"tpe{axis}": (self.heads, stride, self.d_model // self.heads) for axis, stride in enumerate(strides(self.grid))}

    def forward(
        self, x_BTD: Tensor, positions_BT: Tensor, past: list[Tensor | None], context: Context
    ) -> tuple[Tensor, list[State]]:
        x_BTHV, total, states = L.split_heads(L.full(x_BTD), self.heads), 0, []
        index_BTA = indices(positions_BT, self.grid)
        for axis, stride in enumerate(strides(self.grid)):
            line_BTHS = F.one_hot(positions_BT % stride, stride)[:, :, None].to(x_BTHV.dtype)
            log_decay_BTH = F.logsigmoid(L.full(self.decay[axis])).expand(*positions_BT.shape, -1)
            if axis:
                log_decay_BTH = log_decay_BTH.masked_fill(index_BTA[..., axis, None] == 0, -torch.inf)
            log_decay_BTHS = torch.where(line_BTHS > 0, log_decay_BTH[..., None], 0)
            o_BTHV, new = ops.linear_attention(line_BTHS, line_BTHS, x_BTHV, log_decay_BTHS, scale=1.0, **context.carry(past[axis]))
            gain_H = (L.full(self.q[axis]) * L.full(self.k[axis])).sum(-1)
            normed_BTD = self.norms[axis]((o_BTHV * gain_H[:, None]).flatten(2))
            total = total + self.projections[axis](normed_BTD.to(x_BTD.dtype))
            states.extend(new or ())
        return total, states
