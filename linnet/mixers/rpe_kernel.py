"""Kernel attention with learned relative positions, a Toeplitz product by Fourier transforms; causal or bidirectional."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linnet import ops
from linnet.feature_maps import FEATURE_MAPS
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import MixerConfig, choice, flag, number, size
from linnet.mixers._registry import register_mixer
from linnet.mixers.performer import orthogonal_features

WORKSPACE = 1 << 23  # numbers of k v^T that exist at a time


@dataclass(frozen=True)
class RPEKernelConfig(MixerConfig, mixer="rpe_kernel"):
    heads: int = size(8, "heads")
    max_distance: int = size(512, "L: tokens at a distance of L or more are not seen")
    bidirectional: bool = flag(False, "tokens on both sides are seen (no state, no decoding)")
    feature_map: str = choice("prf", 'positive random features "prf", or a map of each channel', "prf", "elu+1", "relu")
    num_features: int | None = size(None, 'F, features of a head for "prf" (None: K)')
    normalize: bool = flag(True, "q and k of unit length")
    temperature: float = number(1.0, "tau, with `normalize`: the kernel is exp(tau q.k)", above=0)
    normalizer_eps: float = number(1e-6, "added to the denominator", least=0)
    seed: int = size(0, "of the random features, with the layer index", least=0)

    def check(self) -> None:
        self.divide("heads", self.d_model, self.heads)

    @property
    def head_size(self) -> int:
        return self.d_model // self.heads


@register_mixer("rpe_kernel")
class RPEKernel(Mixer):
    r"""Luo et al., "Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding", 2021 (arXiv 2106.12566).

        o_t = sum_s c_{t-s} phi(q_t).phi(k_s) v_s / (sum_s c_{t-s} phi(q_t).phi(k_s) + eps),   c_r = exp(b_r), learned per head
        "prf": phi(x) = F^{-1/2} exp(w_j.x' - |x'|^2/2),   x' = sqrt(tau) x/|x| (normalize, NPRF) or x / K^{1/4} (PRF)

    Maps to `linnet.ops.long_conv` of the channels phi_f(k) [v, 1] with kernel c, a few features f at a time, computed again in the
    backward: T K V numbers never exist. No constant state serves every c, so c ends at a distance of L = max_distance, here also
    in training. State: the last L - 1 (k, v, 1), window [N, 2D+1, L-1].
    """

    Config = RPEKernelConfig
    future_option = "bidirectional"
    no_weight_decay = ("rpe",)

    def add_parts(self) -> None:
        c = self.config
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(c.d_model, c.d_model, bias=False) for _ in range(4))
        self.rpe = nn.Parameter(torch.empty(c.heads, c.max_distance + (c.max_distance - 1) * c.bidirectional))
        with torch.device("cpu"):  # also when the parameters are built on the meta device
            self.omega_FK = orthogonal_features(c.num_features or c.head_size, c.head_size, (c.seed << 16) + self.layer_index)

    def reset_parameters(self) -> None:
        L.init_normal(self)
        nn.init.zeros_(self.rpe)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"window": (2 * self.config.d_model + 1, self.config.max_distance - 1)}

    def phi(self, x_BTHK: Tensor) -> Tensor:
        c, x = self.config, L.full(x_BTHK)
        if c.normalize:
            x = L.l2_norm(x) * (c.temperature**0.5 if c.feature_map == "prf" else 1)
        elif c.feature_map == "prf":
            x = x * c.head_size**-0.25
        if c.feature_map != "prf":
            return FEATURE_MAPS[c.feature_map](x)
        if self.omega_FK.device != x.device:
            self.omega_FK = self.omega_FK.to(x.device)
        omega_FK = self.omega_FK.to(x.dtype)
        return (x @ omega_FK.T - x.square().sum(-1, keepdim=True) / 2).exp() * omega_FK.shape[0] ** -0.5

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        self.refuse_state(state, context)
        (window,) = self.open_state(state)
        q_BTHF = self.phi(L.split_heads(self.q_proj(x_BTD), c.heads))
        kv1_BTC = torch.cat((L.full(self.k_proj(x_BTD)), L.full(self.v_proj(x_BTD)), q_BTHF.new_ones(*x_BTD.shape[:2], 1)), -1)
        new = None
        if context.return_state:  # a convolution keeps the inputs that its kernel can still meet
            newest = torch.eye(1, c.max_distance, dtype=kv1_BTC.dtype, device=x_BTD.device)
            _, new = ops.long_conv(kv1_BTC, newest, **context.carry(window))
        sums_BTHV = self.convolve(q_BTHF, kv1_BTC, window, context)
        o_BTHV = sums_BTHV[..., :-1] / (sums_BTHV[..., -1:] + c.normalizer_eps)
        return self.o_proj(o_BTHV.flatten(2).to(x_BTD.dtype)), self.close_state(context, *(new or ()))

    def convolve(self, q_BTHF: Tensor, kv1_BTC: Tensor, window: Tensor | None, context: Context) -> Tensor:
        """sum_s c_{t-s} phi(q_t).phi(k_s) [v_s, 1] for every head."""
        c, kernel_HL = self.config, L.full(self.rpe).exp()

        def operands(kv1: Tensor) -> tuple[Tensor, Tensor]:
            k, v, one = kv1.split((c.d_model, c.d_model, 1), -1)
            v = L.split_heads(v, c.heads)
            return self.phi(L.split_heads(k, c.heads)), torch.cat((v, one[..., None].expand(*v.shape[:-1], 1)), -1)

        def some_features(q_f: Tensor, kernel: Tensor, k_f: Tensor, v1: Tensor, *past: Tensor) -> Tensor:
            u = (k_f[..., None] * v1[..., None, :]).flatten(2)
            before = ((past[0][..., None] * past[1][..., None, :]).flatten(2).mT,) if past else None
            ahead = (c.max_distance - 1) * c.bidirectional
            y, _ = ops.long_conv(u, kernel, lookahead=ahead, initial_state=before, cu_seqlens=context.cu_seqlens)
            return (q_f[..., None] * y.view(*k_f.shape, -1)).sum(-2)

        k, v1 = operands(kv1_BTC)
        past = None if window is None else operands(window.mT.to(kv1_BTC.dtype))
        tokens = v1.shape[0] * v1.shape[1] + (0 if past is None else past[1].shape[0] * past[1].shape[1])
        step, total = max(1, WORKSPACE // (tokens * v1[0, 0].numel())), 0
        for f in range(0, k.shape[-1], step):
            part = slice(f, f + step)
            before = () if past is None else (past[0][..., part], past[1])
            total = total + checkpoint(
                some_features,
                q_BTHF[..., part],
                kernel_HL,
                k[..., part],
                v1,
                *before,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return total
