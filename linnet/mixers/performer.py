"""Performer: the softmax kernel by positive orthogonal random features (FAVOR+), causal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.mixers import _layers as L
from linnet.mixers._kernel import KernelAttention, KernelConfig
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class PerformerConfig(KernelConfig):
    """Options of `performer`.

    num_features: F, random features of a head (None: K ln K). kernel: "softmax" exp(w.x - |x|^2/2), or "relu" relu(w.x), the
    generalised kernel. row_norms: lengths of the orthogonal rows w, "chi" as of Gaussian vectors or "sqrt" K^1/2.
    feature_eps: added to every feature; for "softmax" beside a largest feature of 1. seed: of w, with the layer index. The others:
    `KernelConfig`.
    """

    mixer: ClassVar[str] = "performer"

    num_features: int | None = None
    kernel: str = "softmax"
    row_norms: str = "chi"
    feature_eps: float = 1e-4
    seed: int = 0
    normalizer_eps: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        L.check_positive("performer", num_features=self.num_features)
        L.check_choice("performer", ("softmax", "relu"), kernel=self.kernel)
        L.check_choice("performer", ("chi", "sqrt"), row_norms=self.row_norms)
        L.check_number("performer", 0, feature_eps=self.feature_eps)
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            L.refuse("performer", "seed", "an integer in [0, 2^32)", self.seed)

    @property
    def features(self) -> int:
        return self.num_features or max(1, int(self.key_size * math.log(self.key_size)))


def orthogonal_features(rows: int, size: int, seed: int, row_norms: str = "chi") -> Tensor:
    """w [rows, size] fp64 on the CPU: blocks of `size` orthogonal rows, of the lengths of Gaussian vectors or size^1/2."""
    draw = torch.Generator("cpu").manual_seed(seed)
    options = {"generator": draw, "dtype": torch.float64, "device": "cpu"}
    blocks = []
    for _ in range(-(-rows // size)):
        Q, R = torch.linalg.qr(torch.randn(size, size, **options))
        blocks.append((Q * R.diagonal().sign()).T)  # QR alone fixes signs, which would bias the kernel
    norms = torch.randn(rows, size, **options).norm(dim=1) if row_norms == "chi" else math.sqrt(size)
    return torch.cat(blocks)[:rows] * torch.as_tensor(norms, device="cpu").reshape(-1, 1)


@register_mixer("performer")
class Performer(KernelAttention):
    r"""Choromanski et al., "Rethinking Attention with Performers", 2020 (arXiv 2009.14794).

        phi(x) = exp(w_j.x' - |x'|^2/2) + eps,  x' = x / K^{1/4},  w orthogonal,   E[phi(q).phi(k)] = exp(q.k / sqrt(K))
        o_t = sum_s phi(q_t).phi(k_s) v_s / (sum_s phi(q_t).phi(k_s) + eps')

    Maps to `linnet.ops.linear_attention` with normalizer="sum", scale 1; the largest exponent of a key is its log_gain, whose
    running maximum keeps the sums in range without looking ahead.
    w depends on (seed, layer) alone: it is neither trained nor saved.
    State: S [N,H,F,V], z [N,H,F], m [N,H] (for "softmax").
    """

    Config = PerformerConfig

    def __init__(self, config: PerformerConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        self.gain = config.kernel == "softmax"
        seed = (config.seed << 16) + layer_index
        with torch.device("cpu"):  # also when the parameters are built on the meta device
            self.omega_FK = orthogonal_features(config.features, config.key_size, seed, config.row_norms)
        self.reset_parameters()

    def random_features(self, x_BTHK: Tensor, omega_FK: Tensor) -> tuple[Tensor, Tensor | None]:
        """(features, log-gain [B,T,H]): features of a token with the largest one 1, and the logarithm that was taken out."""
        x, eps = L.full(x_BTHK) * self.config.key_size**-0.25, self.config.feature_eps
        u_BTHF = x @ omega_FK.to(x.dtype).T
        if not self.gain:
            return F.relu(u_BTHF) + eps, None
        u_BTHF = u_BTHF - x.square().sum(-1, keepdim=True) / 2
        top = u_BTHF.detach().amax(-1, keepdim=True)
        return (u_BTHF - top).exp() + eps, top[..., 0]

    def phi(self, q_BTHK: Tensor, k_BTHK: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.omega_FK.device != q_BTHK.device:
            self.omega_FK = self.omega_FK.to(q_BTHK.device)
        q_BTHF, _ = self.random_features(q_BTHK, self.omega_FK)
        return q_BTHF, *self.random_features(k_BTHK, self.omega_FK)
