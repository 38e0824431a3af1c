"""sLSTM: an LSTM with exponential gates, a normaliser and memory mixing inside heads. Sequential by nature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import register_mixer

GATES = 4  # i, f, z, o


@dataclass(frozen=True)
class SLSTMConfig:
    """Options of `slstm`.

    conv_size: taps of the short convolution before the input and forget gates (None: none). norm_eps: of the norm per head.
    """

    d_model: int
    heads: int = 4
    conv_size: int | None = 4
    norm_eps: float = 1e-5

    def __post_init__(self):
        L.check_positive("slstm", d_model=self.d_model, heads=self.heads, conv_size=self.conv_size)
        L.check_number("slstm", 0, norm_eps=self.norm_eps)
        L.divided("slstm", "heads", self.d_model, self.heads)


@register_mixer("slstm")
class SLSTM(Mixer):
    r"""Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024 (arXiv 2405.04517), the sLSTM layer.

        (i, f, z, o)_t = W (c_t, c_t, x_t, x_t) + R h_{t-1} + b,   c = silu(conv(x)),   W, R block-diagonal over heads
        m_t = max(log sigmoid(f_t) + m_{t-1}, i_t),   i' = exp(i_t - m_t),   f' = exp(log sigmoid(f_t) + m_{t-1} - m_t)
        C_t = f' C_{t-1} + i' tanh(z_t),   n_t = f' n_{t-1} + i',   h_t = sigmoid(o_t) C_t / n_t,   output LayerNorm per head of h

    The gates read h_{t-1}, so the recurrence is not linear in its state: no operator applies, and it runs as a loop over tokens.
    State: conv [N, D, W-1], h, C, n, m [N, D] each; m counts from the first token on (n = 0 before it).
    """

    Config = SLSTMConfig
    no_weight_decay = ("R",)

    def __init__(self, config: SLSTMConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        c, size = config, config.d_model // config.heads
        self.conv = L.ShortConv(c.d_model, c.conv_size, bias=True) if c.conv_size else None
        self.W, self.R = (nn.Parameter(torch.empty(c.heads, size, GATES, size)) for _ in range(2))
        self.bias = nn.Parameter(torch.empty(c.heads, GATES, size))
        self.norm_weight = nn.Parameter(torch.empty(c.d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c, size = self.config, self.config.d_model // self.config.heads
        if self.conv is not None:
            self.conv.reset_parameters()
        nn.init.normal_(self.W, std=math.sqrt(2 / (5 * c.d_model)))
        nn.init.zeros_(self.R)
        nn.init.zeros_(self.bias)
        depth = self.layer_index / max(self.num_layers - 1, 1)
        grid = torch.arange(size, device="cpu") / max(size - 1, 1)
        self.bias[:, 1].copy_((5 - 12 * grid ** (0.3 + 1.3 * depth)).expand(c.heads, -1))
        nn.init.ones_(self.norm_weight)

    def state_spec(self) -> StateSpec:
        d = (self.config.d_model,)
        return self.make_spec(conv=self.conv.state_shape if self.conv else None, h=d, C=d, n=d, m=d)

    def step(self, pre_NHGK: Tensor, R: Tensor, h: Tensor, C: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        """The next (h, C, n, m), [N, H, K] each; `pre` are the gates without their recurrent part."""
        i, f, z, o = (pre_NHGK + torch.einsum("nhk,hkgl->nhgl", h, R)).unbind(2)
        kept = F.logsigmoid(f) + m
        m = torch.where(n == 0, i, torch.maximum(kept, i))
        enter, keep = torch.exp((i - m).clamp_max(0)), torch.exp((kept - m).clamp_max(0))
        C, n = keep * C + enter * torch.tanh(z), keep * n + enter
        return torch.sigmoid(o) * C / n, C, n, m

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        conv, *values = self.open_state(state, "conv" if self.conv else None, "h", "C", "n", "m")
        y_BTD, cu = x_BTD, context.cu_seqlens
        if self.conv is not None:
            y_BTD, conv = self.conv(x_BTD, conv, context)
        gates = lambda y, W: torch.einsum("bthk,hkgl->bthgl", L.full(L.split_heads(y, c.heads)), W)
        W, R = L.full(self.W), L.full(self.R)
        pre = torch.cat((gates(y_BTD, W[:, :, :2]), gates(x_BTD, W[:, :, 2:])), 3) + L.full(self.bias)
        rows = x_BTD.shape[0] if cu is None else cu.numel() - 1
        zero = pre.new_zeros(rows, *pre.shape[2:3], pre.shape[4])
        values = [zero if v is None else v.to(zero.dtype).unflatten(1, zero.shape[1:]) for v in values]
        if cu is None:
            outputs = []
            for t in range(x_BTD.shape[1]):
                values = self.step(pre[:, t], R, *values)
                outputs.append(values[0])
            h_BTHK = torch.stack(outputs, 1)
        else:  # documents side by side: those that have ended keep their state
            starts, lengths = cu.long()[:-1], cu.long().diff()
            index = torch.arange(int(lengths.max()), device=cu.device)
            padded = pre[0][(starts[:, None] + index).clamp_max(pre.shape[1] - 1)]
            outputs = []
            for t in range(padded.shape[1]):
                new, live = self.step(padded[:, t], R, *values), (t < lengths)[:, None, None]
                values = [torch.where(live, a, b) for a, b in zip(new, values, strict=True)]
                outputs.append(values[0])
            h_BTHK = torch.stack(outputs, 1)[index < lengths[:, None]][None]
        y = F.layer_norm(h_BTHK, h_BTHK.shape[-1:], eps=c.norm_eps).flatten(2) * L.full(self.norm_weight)
        return y.to(x_BTD.dtype), self.close_state(context, conv, *(v.flatten(1) for v in values))
