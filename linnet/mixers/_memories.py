"""What mixers with several memories share: the router, its balance loss, and the recurrence that runs in every memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import MixerConfig, number, share, size

RECURRENCES = {  # update, decay
    "linear_attention": ("linear", "none"),
    "retnet": ("linear", "constant"),
    "gla": ("linear", "channel"),
    "deltanet": ("delta", "none"),
    "gated_deltanet": ("delta", "head"),
}


@dataclass(frozen=True)
class MemoriesConfig(MixerConfig):
    """Heads of every memory, and what routing and gates need."""

    heads: int = size(4, "heads of every memory or partition")
    balance: float = number(0.01, "weight of the balance loss; 0: none", least=0)
    head_dim: int | None = size(None, "key channels per head (None: d_model / heads)")
    expand_v: float = share(1.0, "value channels per head over key channels", of="key_size")
    gate_rank: int = size(16, "rank of the decay projection of gla")
    norm_eps: float = number(1e-5, "epsilon of the output norm", above=0)

    @property
    def key_size(self) -> int:
        return self.head_dim or self.divide("heads", self.d_model, self.heads)

    @property
    def value_size(self) -> int:
        return int(self.key_size * self.expand_v)


class Router(nn.Linear):
    """p = softmax(x W_r) over the memories, and the top_k of them: (weight, memory) [B, T, J].

    In at least fp32, autocast or not: a rounding that changes the choice changes the output by much more than itself.
    """

    def __init__(self, d_model: int, memories: int, top_k: int, *, renormalize: bool):
        super().__init__(d_model, memories, bias=False)
        self.top_k, self.renormalize = top_k, renormalize

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(x_BTD.device.type, enabled=False):
            p_BTM = F.linear(L.full(x_BTD), L.full(self.weight)).softmax(-1)
        weight_BTJ, memory_BTJ = p_BTM.topk(self.top_k, dim=-1)
        if self.renormalize:
            weight_BTJ = weight_BTJ / weight_BTJ.sum(-1, keepdim=True)
        return p_BTM, weight_BTJ, memory_BTJ


def balance_loss(p_BTM: Tensor, memory_BTJ: Tensor) -> Tensor:
    """M / J sum_m f_m P_m: f_m the share of the tokens that chose m, P_m the mean of p_m. It is 1 where all memories share alike.

    Fedus, Zoph & Shazeer, "Switch Transformers", 2021 (arXiv 2101.03961).
    """
    count_M = p_BTM.new_zeros(p_BTM.shape[-1]).index_add(0, memory_BTJ.flatten(), p_BTM.new_ones(memory_BTJ.numel()))
    return (count_M * p_BTM.mean((0, 1))).sum() * (p_BTM.shape[-1] / memory_BTJ.numel())


def add_balance_loss(mixer: Mixer, context: Context, p_BTM: Tensor, memory_BTJ: Tensor) -> None:
    """While training, the model adds config.balance times the balance loss of this layer to its own."""
    if mixer.training and mixer.config.balance > 0:
        context.losses[mixer.layer_index] = mixer.config.balance * balance_loss(p_BTM, memory_BTJ)


class Gates(nn.Module):
    """(log-decay, beta) of a recurrence from `width` projected channels y of a token; None for what it has not.

    head: log-decay -exp(A_log) softplus(y + dt_bias); channel: logsigmoid(y W_up + b) / 16; constant: RetNet's per head.
    """

    def __init__(self, recurrence: str, heads: int, key_size: int, rank: int):
        super().__init__()
        (update, self.decay), self.heads = RECURRENCES[recurrence], heads
        self.widths = (heads if update == "delta" else 0, {"head": heads, "channel": rank}.get(self.decay, 0))
        self.width = sum(self.widths)
        if self.decay == "head":
            self.A_log, self.dt_bias = (nn.Parameter(torch.empty(heads)) for _ in range(2))
        elif self.decay == "channel":
            self.up = nn.Linear(rank, heads * key_size)

    def reset_parameters(self) -> None:
        """All but the Linear, which the mixer initialises with its own."""
        if self.decay == "head":
            L.init_A_log(self.A_log)
            L.init_dt_bias(self.dt_bias)

    def forward(self, y_BTE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        beta_BTH, y_BTE = y_BTE.split(self.widths, -1)
        beta_BTH = torch.sigmoid(L.full(beta_BTH)) if self.widths[0] else None
        if self.decay == "head":
            return L.mamba_log_decay(y_BTE, self.A_log, self.dt_bias), beta_BTH
        if self.decay == "channel":
            return F.logsigmoid(L.full(L.split_heads(self.up(y_BTE), self.heads))) / 16, beta_BTH
        return L.constant_log_decays("retnet", self.heads, 0, 1, y_BTE) if self.decay == "constant" else None, beta_BTH


def recur(
    recurrence: str, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g: Tensor | None, beta_BTH: Tensor | None, S: Any,
    context: Context, *, write_BT: Tensor | None = None, erase: bool = True,
) -> tuple[Tensor, State | None]:  # fmt: skip
    """One call of the recurrence. write_BT scales what a token writes and, in a delta rule with `erase`, what it erases.

    q and k of a delta rule are brought to unit length before, so that the scale does not cancel.
    """
    options = {"initial_state": S, "return_state": context.return_state, "cu_seqlens": context.cu_seqlens, "log_decay": g}
    scale_BT1 = None if write_BT is None else write_BT[..., None]
    if RECURRENCES[recurrence][0] == "linear":
        k_BTHK = k_BTHK if scale_BT1 is None else (k_BTHK * scale_BT1[..., None]).to(k_BTHK.dtype)
        return ops.linear_attention(q_BTHK, k_BTHK, v_BTHV, **options)
    write_BTH = beta_BTH if scale_BT1 is None else beta_BTH * scale_BT1
    erase_BTH = write_BTH if erase else beta_BTH
    return ops.delta_rule(L.l2_norm(q_BTHK), L.l2_norm(k_BTHK), v_BTHV, erase=erase_BTH, write=write_BTH, **options)
