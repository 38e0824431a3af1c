"""cosFormer: a ReLU feature map re-weighted by the cosine of the distance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.mixers import _layers as L
from linnet.mixers._kernel import KernelAttention, KernelConfig
from linnet.mixers._options import size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class CosFormerConfig(KernelConfig, mixer="cosformer"):
    max_length: int = size(4096, "M of the weight cos(pi (t - s) / 2M)")

    @property
    def features(self) -> int:
        return 2 * self.key_size


@register_mixer("cosformer")
class CosFormer(KernelAttention):
    r"""Qin et al., "cosFormer: Rethinking Softmax in Attention", 2022 (arXiv 2202.08791).

        A_ts = relu(q_t).relu(k_s) cos(pi (t - s) / 2M),   o_t = sum_s A_ts v_s / (sum_s A_ts + eps)

    The cosine of a difference is a sum of two products: phi(x) = [relu(x) cos(pi t / 2M), relu(x) sin(pi t / 2M)]. Weights are
    negative for distances over M. Maps to `linnet.ops.linear_attention` with normalizer="sum", scale 1.
    State: S [N,H,2K,V], z [N,H,2K], length [N].
    """

    Config = CosFormerConfig
    positional = True

    def phi(self, q_BTHK: Tensor, k_BTHK: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        angle = positions_BT.to(L.state_dtype(q_BTHK))[:, :, None, None] * (math.pi / 2 / self.config.max_length)
        q, k = (torch.cat((y * angle.cos(), y * angle.sin()), -1) for y in (F.relu(L.full(q_BTHK)), F.relu(L.full(k_BTHK))))
        return q, k, None
