"""Mamba-3: a state-space dual with a trapezoidal rule, data-dependent rotations and optionally several inputs per step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context, Mixer, State
from linnet.mixers._options import choice, flag, number, size
from linnet.mixers._registry import register_mixer
from linnet.mixers._ssd import SSDConfig


@dataclass(frozen=True)
class Mamba3Config(SSDConfig, mixer="mamba3"):
    rank: int = size(1, "R, inputs and outputs per step (1: SISO; above: MIMO, the authors' 4)")
    rope_fraction: float = number(0.5, "share of the key channels that turn", above=0, most=1)
    pairing: str | None = choice(
        None,
        'channels that turn together, "interleaved" (2i, 2i+1) or "half" (i, i + K/2); None: the first for SISO, the second for '
        "MIMO, as the authors' kernels",
        None, "interleaved", "half",
    )  # fmt: skip
    decay: str = choice(
        "heavy_tail", '-A = f(x): f(x) = 1 + x, below zero 1 / (1 - x) (the authors), or "softplus" (flash-linear-attention)',
        "heavy_tail", "softplus",
    )  # fmt: skip
    A_floor: float = number(1e-4, "smallest -A", above=0)
    output_norm: bool = flag(False, "RMSNorm(y) per head before the gate")

    def check(self) -> None:
        self.divide("d_state", self.d_state, 2)
        if self.d_state * self.rope_fraction % 2:
            self.refuse("rope_fraction", f"such that it turns an even number of the {self.d_state} channels")
        super().check()

    @property
    def angles(self) -> int:
        return int(self.d_state * self.rope_fraction / 2)


@register_mixer("mamba3")
class Mamba3(Mixer):
    r"""Lahoti et al., "Mamba-3: Improved Sequence Modeling using State Space Principles", 2026 (arXiv 2603.15569).

        (z, v, B, C, dt, a, trap, theta) = split(x W_in),  delta = softplus(dt + dt_bias),  A = -f(a),  lambda = sigmoid(trap)
        alpha = exp(A delta),   phi_t = phi_{t-1} + pi tanh(theta_t) delta_t
        k = turn(RMSNorm(B) + B_bias, phi),   q = turn(RMSNorm(C) + C_bias, phi)
        S_t = alpha_t S_{t-1} + alpha_t (1 - lambda_t) delta_t k_{t-1} v_{t-1}^T + lambda_t delta_t k_t v_t^T
        y_t = S_t^T q_t + D v_t,   output W_out (y * silu(z))

    MIMO: R keys, queries and outputs per token; v_r = v * M_x[r], z_r = z * M_z[r], S takes sum_r k_r v_r^T, y_r = S^T q_r + D v_r,
    and sum_r M_o[r] * y_r * silu(z_r) goes out.

    Causal with one write per token: H_t = alpha_t H_{t-1} + alpha_t w_t k_{t-1} v_{t-1}^T, w_t = lambda_{t-1} delta_{t-1} +
    (1 - lambda_t) delta_t, gives S_t = H_t + lambda_t delta_t k_t v_t^T. Maps to `linnet.ops.scan` (angles), `token_shift` and
    `linear_attention` with the shifted keys, log_decay = A delta, steps_per_token = R, scale 1. State: phi [N, H, K_turned / 2],
    last [N, H (R K + V + 1)] (key, value and weight of the last token), S [N, H, K, V].
    """

    Config = Mamba3Config
    no_weight_decay = ("B_bias", "C_bias", "M_x", "M_z", "M_o")

    def add_parts(self) -> None:
        c = self.config
        H, BC = c.state_heads, c.rank * c.groups * c.d_state
        self.widths = (c.width, c.width, BC, BC, H, H, H, c.angles)
        self.in_proj = nn.Linear(c.d_model, sum(self.widths), bias=False)
        self.B_norm, self.C_norm = (L.RMSNorm(c.d_state, eps=c.norm_eps) for _ in range(2))
        self.B_bias, self.C_bias = (nn.Parameter(torch.empty(H, c.rank, c.d_state)) for _ in range(2))
        self.dt_bias, self.D = (nn.Parameter(torch.empty(H)) for _ in range(2))
        if c.rank > 1:
            self.M_x, self.M_z, self.M_o = (nn.Parameter(torch.empty(H, c.rank, c.value_size)) for _ in range(3))
        else:
            self.M_x = self.M_z = self.M_o = None
        self.norm = L.GatedRMSNorm(c.width, eps=c.norm_eps, groups=H) if c.output_norm else None
        self.out_proj = nn.Linear(c.width, c.d_model, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c = self.config
        L.init_default(self)
        L.init_dt_bias(self.dt_bias, c.dt_min, c.dt_max, c.dt_floor)
        for ones in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(ones)
        if c.rank > 1:
            nn.init.ones_(self.M_z)
            for maps in (self.M_x, self.M_o):
                nn.init.constant_(maps, 1 / c.rank)

    def state_shapes(self) -> dict[str, tuple[int, ...] | None]:
        c, H = self.config, self.config.state_heads
        last = H * (c.rank * c.d_state + c.value_size + 1)
        return {"phi": (H, c.angles), "last": (last,), "S": (H, c.d_state, c.value_size)}

    def turn(self, x_BTHRK: Tensor, phi_BTHA: Tensor) -> Tensor:
        """Channel pairs turned by the angles; pairs beyond the angles stay."""
        c, half = self.config, self.config.d_state // 2
        angle = F.pad(phi_BTHA, (0, half - c.angles))[:, :, :, None]
        cos, sin = angle.cos(), angle.sin()
        if (c.pairing or ("half" if c.rank > 1 else "interleaved")) == "half":
            a, b = x_BTHRK.chunk(2, -1)
            return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
        a, b = x_BTHRK.unflatten(-1, (half, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        c, context = self.config, context or Context()
        phi, last, S = self.open_state(state)
        H, R = c.state_heads, c.rank
        z, v, B, C, dt_BTH, a_BTH, trap_BTH, theta_BTA = self.in_proj(x_BTD).split(self.widths, -1)
        delta_BTH = F.softplus(L.full(dt_BTH) + L.full(self.dt_bias))
        lam_BTH, a_BTH = torch.sigmoid(L.full(trap_BTH)), L.full(a_BTH)
        # f(a) without a division by zero in the branch that is not taken
        f_BTH = F.softplus(a_BTH) if c.decay == "softplus" else torch.where(a_BTH > 0, 1 + a_BTH, 1 / (1 - a_BTH.clamp_max(0)))
        g_BTH = -f_BTH.clamp_min(c.A_floor) * delta_BTH

        turns_BTHA = (math.pi * torch.tanh(L.full(theta_BTA))[:, :, None] * delta_BTH[..., None]).double()  # long sums of angles
        phi_BTHA, phi = ops.scan(turns_BTHA, a=turns_BTHA.new_ones(H, c.angles), **context.carry(phi))
        phi_BTHA = phi_BTHA.remainder(2 * math.pi).to(delta_BTH.dtype)
        phi = None if phi is None else phi[0].remainder(2 * math.pi).to(delta_BTH.dtype)

        def keys(x: Tensor, norm: L.RMSNorm, bias: Tensor) -> Tensor:  # [B, T, R * G * K] -> [B, T, H, R, K]
            x_BTGRK = norm(L.full(x).unflatten(-1, (R, c.groups, c.d_state))).transpose(2, 3)
            return self.turn(x_BTGRK.repeat_interleave(H // c.groups, 2) + L.full(bias), phi_BTHA)

        k_BTHRK, q_BTHRK = keys(B, self.B_norm, self.B_bias), keys(C, self.C_norm, self.C_bias)
        v_BTHV, gain_BTH = L.split_heads(L.full(v), H), lam_BTH * delta_BTH
        ranks = lambda y_BTHV, M: y_BTHV[:, :, :, None] * L.full(M) if R > 1 else y_BTHV[:, :, :, None]

        now = torch.cat((k_BTHRK.flatten(2), v_BTHV.flatten(2), gain_BTH), -1)
        before, last = ops.token_shift(now, **context.carry(last))
        k0, v0, gain0 = before.split((H * R * c.d_state, c.width, H), -1)
        w_BTH = g_BTH.exp() * (gain0 + (1 - lam_BTH) * delta_BTH)
        steps = lambda y_BTHRX: y_BTHRX.transpose(2, 3).flatten(1, 2).to(x_BTD.dtype)  # [B, T R, H, X]
        o_BTHV, new = ops.linear_attention(
            q_BTHRK.flatten(2, 3).to(x_BTD.dtype), steps(k0.unflatten(-1, (H, R, c.d_state))),
            steps(ranks(v0.unflatten(-1, (H, -1)) * w_BTH[..., None], self.M_x)), g_BTH,
            steps_per_token=R, scale=1.0, **context.carry(S),
        )  # fmt: skip
        v_BTHRV = ranks(v_BTHV, self.M_x)
        scores_BTHRR = q_BTHRK @ k_BTHRK.mT * gain_BTH[..., None, None]
        y = L.full(o_BTHV).unflatten(2, (H, R)) + scores_BTHRR @ v_BTHRV + L.full(self.D)[:, None, None] * v_BTHRV
        y, gate = (p.transpose(2, 3).flatten(3) for p in (y, ranks(L.split_heads(L.full(z), H), self.M_z)))  # [B, T, R, width]
        y = ops.gated_linear_unit(y, gate) if self.norm is None else self.norm(y, gate)
        y = y[:, :, 0] if R == 1 else (y * L.full(self.M_o).transpose(0, 1).flatten(1)).sum(2)
        return self.out_proj(y.to(x_BTD.dtype)), self.close_state(context, phi, *(last or ()), *(new or ()))
