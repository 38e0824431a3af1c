"""Pieces that several mixers share: norms, rotary positions, the Mamba decay, the short convolution.

Shape legend: B batch, T tokens, H heads, K key channels, V value channels, D model or inner width, W convolution width,
N rows of the state (the batch, or the packed segments).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops

if TYPE_CHECKING:
    from linnet.mixers._base import Context

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


# ---- numbers -------------------------------------------------------------------------------------------------------------


def full(x: Tensor) -> Tensor:
    """`x` in at least fp32 (fp64 stays): the precision of gates, decays and norms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def state_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a recurrent state beside parameters of this dtype."""
    return torch.promote_types(parameter.dtype, torch.float32)


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    return x_BTD.unflatten(-1, (heads, -1))


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis, computed in at least fp32."""
    return ops.l2_norm(x, eps=eps)


def sum_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / (sum(x) + eps) over the last axis; for non-negative features."""
    y = full(x)
    return (y / (y.sum(-1, keepdim=True) + eps)).to(x.dtype)


# ---- norms ---------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last axis, or over each of `groups` equal blocks of it.

    Computed in at least fp32. Zhang & Sennrich 2019 (arXiv 1910.07467).
    """

    def __init__(self, size: int, *, eps: float = 1e-5, affine: bool = True, groups: int = 1):
        super().__init__()
        self.size, self.eps, self.groups = size, eps, groups
        self.weight = nn.Parameter(torch.ones(size)) if affine else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return ops.gated_rms_norm(x, None, self.weight, eps=self.eps, groups=self.groups)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, affine={self.weight is not None}, groups={self.groups}"


class GatedRMSNorm(RMSNorm):
    """RMSNorm(x) * act(gate); with norm_before_gate=False RMSNorm(x * act(gate)), as in Mamba-2."""

    def __init__(self, size: int, *, activation: str = "silu", norm_before_gate: bool = True, **options: Any):
        super().__init__(size, **options)
        self.activation, self.norm_before_gate = activation, norm_before_gate

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return ops.gated_rms_norm(
            x, gate, self.weight, eps=self.eps, groups=self.groups, activation=self.activation,
            norm_before_gate=self.norm_before_gate,
        )  # fmt: skip


class HeadLayerNorm(nn.Module):
    """LayerNorm over the channels of each head, [B,T,H,V] -> [B,T,H*V], with a weight (and a bias) per channel of every head."""

    def __init__(self, heads: int, size: int, *, eps: float = 1e-6, bias: bool = False):
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(heads * size))
        self.bias = nn.Parameter(torch.zeros(heads * size)) if bias else None

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_BTHV: Tensor) -> Tensor:
        y_BTD = F.layer_norm(full(x_BTHV), (self.size,), eps=self.eps).flatten(2) * self.weight
        return (y_BTD if self.bias is None else y_BTD + self.bias).to(x_BTHV.dtype)


NORMS = ("srms", "rms", "layer")


def make_norm(kind: str, size: int, eps: float) -> nn.Module:
    """A norm by name: "srms" x / sqrt(mean(x^2)), without a weight (SimpleRMSNorm); "rms" with one; "layer" LayerNorm."""
    return nn.LayerNorm(size, eps=eps) if kind == "layer" else RMSNorm(size, eps=eps, affine=kind == "rms")


# ---- initialisation ------------------------------------------------------------------------------------------------------


def init_normal(module: nn.Module, std: float = 0.02) -> None:
    """N(0, std^2) for every Linear, biases 0; norms 1; convolutions as PyTorch's Conv1d. The usual start of a language model."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, (RMSNorm, nn.LayerNorm, HeadLayerNorm, ShortConv)):
            part.reset_parameters()


def init_default(module: nn.Module) -> None:
    """PyTorch's own initialisation of every Linear (uniform in +-fan_in^-1/2), norm and convolution."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, RMSNorm, ShortConv)):
            part.reset_parameters()


@torch.no_grad()
def init_dt_bias(dt_bias: Tensor, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> None:
    """Bias whose softplus is log-uniform in [low, high], at least `floor` (Mamba)."""
    dt = torch.empty_like(dt_bias).uniform_(math.log(low), math.log(high)).exp().clamp_min(floor)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def init_A_log(A_log: Tensor, low: float = 1.0, high: float = 16.0) -> None:
    """log A with A uniform in [low, high]."""
    A_log.copy_(torch.empty_like(A_log).uniform_(low, high).log())


# ---- decay ---------------------------------------------------------------------------------------------------------------


def mamba_log_decay(x_BTH: Tensor, A_log_H: Tensor, dt_bias_H: Tensor) -> Tensor:
    """g = -exp(A_log) softplus(x + dt_bias), the log-decay of Mamba-2 and Gated DeltaNet, in at least fp32."""
    return -full(A_log_H).exp() * F.softplus(full(x_BTH) + full(dt_bias_H))


def constant_log_decays(kind: str, heads: int, layer: int, layers: int, like: Tensor) -> Tensor:
    """The constant log-decay of every head [H] in layer l of L, in at least fp32 on the device of `like`; h = 0 .. H-1.

    "retnet" log(1 - 2^(-5-h)). "tnl" -(8h/H)(1 - l/L), the paper of TransNormerLLM. "alibi" -2^(-8(h+1)/H) (1 - l/(L-1) + 1e-5),
    its code and MiniMax. "alibi_interleaved": the slopes of ALiBi where H is not a power of two: those of the power P below,
    then every second one of 2P; the code of TransNormerLLM.
    """
    h = torch.arange(heads, dtype=state_dtype(like), device=like.device)
    if kind == "retnet":
        return torch.log1p(-torch.exp2(-5 - h))
    if kind == "tnl":
        return -(8 / heads) * (1 - layer / layers) * h
    power = heads if kind == "alibi" else 1 << (heads.bit_length() - 1)
    exponent = torch.where(h < power, (8 / power) * (h + 1), (4 / power) * (2 * (h - power) + 1))
    return -torch.exp2(-exponent) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)


class LowRank(nn.Module):
    """x W_down W_up + b: a Linear of rank `rank`, optionally with tanh or sigmoid between (RWKV-7)."""

    def __init__(self, d_in: int, rank: int, d_out: int, *, bias: bool = False, activation: str | None = None):
        super().__init__()
        self.down, self.up = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        return self.up(y if self.activation is None else getattr(torch, self.activation)(y))


# ---- time axis -----------------------------------------------------------------------------------------------------------


class ShortConv(nn.Module):
    """Causal depthwise convolution over the last `width` tokens, its parameters only: the work is `linnet.ops.short_conv`.

    Initialised uniformly in +-width^-1/2 (PyTorch's Conv1d with one channel per group).
    """

    def __init__(self, channels: int, width: int, *, bias: bool = False, activation: str | None = "silu"):
        super().__init__()
        self.channels, self.width, self.activation = channels, width, activation
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.width**-0.5), self.width**-0.5)

    @property
    def state_shape(self) -> tuple[int, int]:
        return (self.channels, self.width - 1)

    def forward(self, x_BTD: Tensor, state: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        y, new = ops.short_conv(
            x_BTD, self.weight, self.bias, activation=self.activation, initial_state=state,
            return_state=context.return_state, cu_seqlens=context.cu_seqlens,
        )  # fmt: skip
        return y, new[0] if new is not None else None

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}, bias={self.bias is not None}, activation={self.activation!r}"


def token_counts(x_BTD: Tensor, context: Context, before_N: Tensor | None = None) -> Tensor:
    """Tokens of every row of the state [N] int64: those of this call and `before`."""
    if context.cu_seqlens is None:
        count_N = torch.full((x_BTD.shape[0],), x_BTD.shape[1], dtype=torch.int64, device=x_BTD.device)
    else:
        count_N = context.cu_seqlens.to(torch.int64).diff()
    return count_N if before_N is None else before_N + count_N


def token_positions(x_BTD: Tensor, context: Context, length_N: Tensor | None = None) -> Tensor:
    """Positions [B, T]: `context.positions`, else 0, 1, ... in every row or segment, after the `length` tokens already seen."""
    if context.positions is not None:
        return context.positions
    index = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    if context.cu_seqlens is None:
        rows = index.expand(x_BTD.shape[0], -1)
        return rows if length_N is None else rows + length_N[:, None]
    starts = context.cu_seqlens.to(torch.int64)
    segment = torch.searchsorted(starts[1:].contiguous(), index, right=True).clamp_max(starts.numel() - 2)
    row = index - starts[segment]
    return (row if length_N is None else row + length_N[segment])[None]


def turns(positions_BT: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) [B, T, 1, len(frequencies)] of position * frequency, for `rotate`."""
    angle = positions_BT.to(frequencies.dtype)[:, :, None, None] * frequencies
    return angle.cos(), angle.sin()


def rotate(x_BTHK: Tensor, cos_sin: tuple[Tensor, Tensor], *, interleaved: bool = False) -> Tensor:
    """Rotary positions: channel pairs turned by the angles of `turns` (RoFormer, Su et al. 2021, arXiv 2104.09864).

    The first 2 * len(frequencies) channels are turned, the rest pass. Pairs are (i, i + half) (Llama, GPT-NeoX), or (2i, 2i + 1)
    with `interleaved` (RoFormer, RetNet). Computed in at least fp32.
    """
    (cos, sin), y = cos_sin, full(x_BTHK)
    half = cos.shape[-1]
    turned, rest = y[..., : 2 * half], y[..., 2 * half :]
    a, b = turned.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    a, b = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((turned, rest), -1).to(x_BTHK.dtype)


def rope_frequencies(channels: int, theta: float, like: Tensor) -> Tensor:
    """theta^(-2i / channels), i = 0 .. channels/2 - 1."""
    steps = torch.arange(0, channels, 2, device=like.device, dtype=state_dtype(like))
    return theta ** -(steps / channels)


def retnet_frequencies(channels: int, theta: float, like: Tensor) -> Tensor:
    """theta^(-u), u on an even grid over [0, 1] with both ends: RetNet's code, unlike rotary positions."""
    return theta ** -torch.linspace(0, 1, channels // 2, device=like.device, dtype=state_dtype(like))
