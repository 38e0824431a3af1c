"""Performer: the softmax kernel by positive orthogonal random features (FAVOR+), causal or bidirectional."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.mixers import _layers as L
from linnet.mixers._kernel import KernelAttention, KernelConfig
from linnet.mixers._options import choice, flag, number, size
from linnet.mixers._registry import register_mixer


@dataclass(frozen=True)
class PerformerConfig(KernelConfig, mixer="performer"):
    num_features: int | None = size(None, "F, random features of a head (None: K ln K)")
    kernel: str = choice("softmax", '"softmax" exp(w.x - |x|^2/2), or "relu" relu(w.x), the generalised kernel', "softmax", "relu")
    row_norms: str = choice("chi", 'lengths of the rows w: "chi" as of Gaussian vectors, "sqrt" K^1/2', "chi", "sqrt")
    feature_eps: float = number(1e-4, 'added to every feature; for "softmax" beside a largest feature of 1', above=0)
    seed: int = size(0, "of w, with the layer index", least=0)
    bidirectional: bool = flag(False, "every token sees the whole sequence (no state, no decoding)")
    normalizer_eps: float = number(0.0, "added to the denominator", least=0)

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
        o_t = sum_s phi(q_t).phi(k_s) v_s / (sum_s phi(q_t).phi(k_s) + eps'),   s <= t, or all s

    Maps to `linnet.ops.linear_attention`, or `linnet.ops.bidirectional_attention`, with normalizer="sum", scale 1; the largest
    exponent of a key is its log_gain, which keeps the sums in range without looking ahead.
    w depends on (seed, layer) alone: it is neither trained nor saved.
    State: S [N,H,F,V], z [N,H,F], m [N,H] (for "softmax"); none if bidirectional.
    """

    Config = PerformerConfig
    future_option = "bidirectional"

    def add_parts(self) -> None:
        super().add_parts()
        c = self.config
        self.gain = c.kernel == "softmax"
        with torch.device("cpu"):  # also when the parameters are built on the meta device
            self.omega_FK = orthogonal_features(c.features, c.key_size, (c.seed << 16) + self.layer_index, c.row_norms)

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
