"""T2R: a softmax transformer turned into an RNN by a learned ReLU feature map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.mixers._kernel import HeadMap, KernelAttention, KernelConfig
from linnet.mixers._options import flag, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class T2RConfig(KernelConfig, mixer="t2r"):
    feature_size: int | None = size(None, "F, feature channels of a head (None: head_dim)")
    map_bias: bool = flag(True, "whether the map has b")
    tied: bool = flag(False, "one map for q and k (then heads = kv_heads)")

    def check(self) -> None:
        super().check()
        if self.tied and self.groups != self.heads:
            self.refuse("tied", "False where kv_heads is not heads")

    @property
    def features(self) -> int:
        return self.feature_size or self.key_size


@register_mixer("t2r")
class T2R(KernelAttention):
    r"""Kasai et al., "Finetuning Pretrained Transformers into RNNs", 2021 (arXiv 2103.13076).

        phi(x) = relu(W_h x + b_h),   o_t = sum_s phi_q(q_t).phi_k(k_s) v_s / (sum_s phi_q(q_t).phi_k(k_s) + eps)

    Maps to `linnet.ops.linear_attention` with normalizer="sum", scale 1. State: S [N,H,F,V], z [N,H,F].
    """

    Config = T2RConfig

    def add_parts(self) -> None:
        super().add_parts()
        c = self.config
        self.q_map = HeadMap(c.heads, c.key_size, c.features, bias=c.map_bias)
        self.k_map = None if c.tied else HeadMap(c.groups, c.key_size, c.features, bias=c.map_bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        bound = self.config.key_size**-0.5  # PyTorch's Linear, head by head
        for part in (self.q_map, self.k_map):
            for parameter in part.parameters() if part is not None else ():
                nn.init.uniform_(parameter, -bound, bound)

    def phi(self, q_BTHK: Tensor, k_BTHK: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return F.relu(self.q_map(q_BTHK)), F.relu((self.k_map or self.q_map)(k_BTHK)), None
