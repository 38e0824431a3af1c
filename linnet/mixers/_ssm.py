"""What the time-invariant state-space mixers share: HiPPO matrices, discretisation, kernels, the two modes of a diagonal system.

Complex numbers are kept as real tensors with a last axis (real, imaginary) in parameters and states, so that a model can be cast,
saved and optimised like any other.

Shape legend: B batch, T tokens, D channels, N state channels, L lags of a kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linnet import ops
from linnet.mixers import _layers as L
from linnet.mixers._base import Context
from linnet.mixers._options import MixerConfig, choice, number

MODES = ("auto", "recurrent")
SCAN_ELEMENTS = 1 << 22  # states that one scan of the recurrent mode holds


@dataclass(frozen=True)
class SSMConfig(MixerConfig):
    dt_min: float = number(1e-3, "smallest step size at the start; they are log-uniform", above=0)
    dt_max: float = number(0.1, "largest step size at the start", above="dt_min")
    mode: str = choice("auto", '"auto" convolves where no state is needed, "recurrent" always steps the state', *MODES)


def hippo_legs(size: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS (A [N, N], B [N]) in fp64: A_nk = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it; B_n = sqrt(2n+1).

    Gu et al. 2020, "HiPPO: Recurrent Memory with Optimal Polynomial Projections" (arXiv 2008.07669).
    """
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    B = (2 * n + 1).sqrt()
    return -(B[:, None] * B).tril(-1) - torch.diag(n + 1), B


def legs_frequencies(pairs: int) -> Tensor:
    """The w > 0, rising, of the eigenvalues -1/2 +- i w of A + P P^T, P_n = sqrt(n + 1/2): the diagonal of S4D-LegS."""
    A, B = hippo_legs(2 * pairs)
    skew = A + B[:, None] * B / 2
    skew = (skew - skew.T) / 2
    return torch.linalg.eigvalsh(1j * skew)[pairs:]


def init_log_uniform(parameter: Tensor, low: float, high: float) -> None:
    """The logarithm of a number that is log-uniform in [low, high]."""
    torch.nn.init.uniform_(parameter, math.log(low), math.log(high))


def as_complex(x: Tensor) -> Tensor:
    """[..., 2] -> [...] complex, in at least fp32."""
    return torch.view_as_complex(L.full(x).contiguous())


def discretize(A: Tensor, delta: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """(log of the factor per token, input gain) of h' = A h + u at step delta: zero-order hold, or the bilinear transform."""
    z = A * delta
    if method == "zoh":
        return z, torch.expm1(z) / A
    return torch.log((1 + z / 2) / (1 - z / 2)), delta / (1 - z / 2)


def exponential_kernel(weight_DN: Tensor, log_a_DN: Tensor, lags: int) -> Tensor:
    """K[d, l] = Re sum_n weight[d, n] exp(log_a[d, n] l), real [D, L]; log_a [D, N], or [1, N] for all channels.

    Lags are split, l = c i + j, so that two tables of about sqrt(L) exponentials and one matrix product make the kernel; nothing
    of size D x N x L exists. Exponents are formed in fp64, because a phase of 10^5 radians has lost its digits in fp32.
    """
    ratio = weight_DN.shape[0] / log_a_DN.shape[0]
    c = min(lags, max(1, math.ceil(math.sqrt(lags * ratio))))
    steps = torch.arange(c, device=log_a_DN.device, dtype=torch.float64)
    jumps = torch.arange(-(-lags // c), device=log_a_DN.device, dtype=torch.float64) * c
    exponent = log_a_DN.to(torch.complex128 if log_a_DN.is_complex() else torch.float64)[..., None]
    fine, coarse = ((exponent * l).exp().to(weight_DN.dtype) for l in (steps, jumps))
    left = (weight_DN[..., None] * coarse).mT
    if left.is_complex():
        left, fine = torch.cat((left.real, -left.imag), -1), torch.cat((fine.real, fine.imag), -2)
    return (left @ fine).flatten(1)[:, :lags]


def diagonal_ssm(
    u_BTD: Tensor, weight_DN: Tensor, log_a_DN: Tensor, skip_D: Tensor, state: Tensor | None, context: Context, mode: str
) -> tuple[Tensor, Tensor | None]:
    """x_t = exp(log_a) x_{t-1} + u_t for every state channel, y_t = Re sum_n weight_n x_t,n + skip u_t.

    mode "auto": a long convolution where no state comes in or is wanted (training), else the scan; "recurrent": always the scan,
    causal bit for bit. Returns y [B, T, D] in at least fp32 and the state [rows, D, N, 2] (complex), [rows, D, N] (real).
    """
    (batch, tokens, width), size = u_BTD.shape, weight_DN.shape[1]
    u, skip = L.full(u_BTD), L.full(skip_D)
    if mode == "auto" and state is None and not context.return_state:
        kernel = exponential_kernel(weight_DN, log_a_DN, tokens)
        return ops.long_conv(u, kernel, skip, cu_seqlens=context.cu_seqlens)[0], None
    is_complex, cu = weight_DN.is_complex(), context.cu_seqlens
    a = log_a_DN.to(torch.complex128 if is_complex else torch.float64).exp().to(weight_DN.dtype)
    x = state if state is None or not is_complex else torch.view_as_complex(state.to(u.dtype).contiguous())
    outputs, block = [], max(16, SCAN_ELEMENTS // (batch * width * size))
    for start in range(0, tokens, block):
        part = u[:, start : start + block, :, None].to(a.dtype).expand(-1, -1, -1, size)
        inside = None if cu is None else (cu - start).clamp(0, part.shape[1])  # documents that lie elsewhere are empty here
        x_BTDN, (x,) = ops.scan(part, a=a, initial_state=x, return_state=True, cu_seqlens=inside)
        y = torch.einsum("btdn,dn->btd", x_BTDN, weight_DN)
        outputs.append(y.real if is_complex else y)
    new = (torch.view_as_real(x) if is_complex else x) if context.return_state else None
    return torch.cat(outputs, 1) + skip * u, new


# ---- dense transitions (LSSL) --------------------------------------------------------------------------------------------

BLOCK = 64  # tokens between two applications of the dense transition


def discretize_dense(A: Tensor, B: Tensor, delta_D: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """(Abar [D, N, N], Bbar [D, N, 1]) of x' = A x + B u, A lower triangular [N, N], at every channel's step.

    "zoh": Abar = exp(dt A), Bbar = A^-1 (Abar - I) B. Generalised bilinear, alpha = 1/2 ("bilinear") or 1 ("backward"):
    Abar = (I - alpha dt A)^-1 (I + (1 - alpha) dt A), Bbar = dt (I - alpha dt A)^-1 B.
    """
    dt, eye = delta_D[:, None, None], torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    if method == "zoh":
        Abar = torch.linalg.matrix_exp(dt * A)
        return Abar, torch.linalg.solve_triangular(A, (Abar - eye) @ B[:, None], upper=False)
    alpha = {"bilinear": 0.5, "backward": 1.0}[method]
    both = torch.cat((eye + (1 - alpha) * dt * A, dt * B[:, None]), -1)
    both = torch.linalg.solve_triangular(eye - alpha * dt * A, both, upper=False)
    return both[..., :-1], both[..., -1:]


def krylov(A: Tensor, B: Tensor, steps: int) -> tuple[Tensor, list[Tensor]]:
    """([B, A B, ..., A^(c-1) B] [D, N, c], [A, A^2, A^4, ..., A^c]) for c = `steps` rounded up to a power of two."""
    powers = [A]
    while B.shape[-1] < steps:
        B = torch.cat((B, powers[-1] @ B), -1)
        powers.append(powers[-1] @ powers[-1])
    return B, powers


def krylov_kernel(A: Tensor, B: Tensor, C: Tensor, lags: int) -> Tensor:
    """K_l = C A^l B for A [D, N, N], B [D, N, 1], C [D, M, N]: [D * M, L], from two tables of about sqrt(L) powers."""
    fine, powers = krylov(A, B, math.ceil(math.sqrt(lags)))
    c, jump = fine.shape[-1], powers[-1]
    coarse = C[:, None]  # [D, I, M, N]: C A^(c i)
    while coarse.shape[1] * c < lags:
        coarse = torch.cat((coarse, coarse @ jump[:, None]), 1)
        jump = jump @ jump
    return (coarse @ fine[:, None]).transpose(1, 2).flatten(2).flatten(0, 1)[:, :lags]


def dense_ssm(
    u_BTE: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, context: Context
) -> tuple[Tensor, Tensor | None]:
    """x_t = A x_{t-1} + B u_t, y_t = C x_t per channel, in blocks; u [B, T, D * M] repeats each channel M times.

    In a block that starts from x: y_j = (C A^j B * u)_j + C A^(j+1) x, and a row with r of its tokens there leaves
    A^r x + sum_i A^i B u_(r-1-i). A^r acts through the binary digits of r. Returns y [B, T, D * M] and the state [rows, D, N].
    """
    (batch, tokens, _), (width, outs, size) = u_BTE.shape, C.shape
    kernel, (columns, powers) = krylov_kernel(A, B, C, min(BLOCK, tokens)), krylov(A, B, min(BLOCK, tokens))
    reads = (C @ A).mT  # [D, N, j, M]: (C A^(j+1))^T
    for power in powers[:-1]:
        reads = torch.cat((reads, power.mT @ reads), -1)
    reads = reads.unflatten(-1, (-1, outs))
    kernel, columns, reads = (p.to(u_BTE.dtype) for p in (kernel, columns, reads))
    powers, cu = [p.to(u_BTE.dtype) for p in powers], context.cu_seqlens
    rows = batch if cu is None else cu.numel() - 1
    x = u_BTE.new_zeros(rows, width, size) if state is None else state.to(u_BTE.dtype)
    outputs = []
    for start in range(0, tokens, BLOCK):
        part = u_BTE[:, start : start + BLOCK]
        count = part.shape[1]
        inside = None if cu is None else (cu.long() - start).clamp(0, count)
        y, _ = ops.long_conv(part, kernel[:, :count], method="direct", cu_seqlens=inside)
        u = part[..., ::outs]  # [B, c, D]
        back = torch.arange(count, device=u.device)
        if cu is None:
            own = torch.einsum("rdn,dnjm->rjdm", x, reads[:, :, :count])
            length, seen = torch.full((rows,), count, device=u.device), u.flip(1)
        else:
            segment = torch.searchsorted(inside[1:].contiguous(), back, right=True).clamp_max(rows - 1)
            position = back - inside[segment]
            own = torch.einsum("jdn,dnjm->jdm", x[segment], reads[:, :, position])[None]
            length, index = inside.diff(), inside[1:, None] - 1 - back
            seen = torch.where((back < length[:, None])[..., None], u[0][index.clamp(0, count - 1)], 0)
        outputs.append(y + own.flatten(2))
        for k, power in enumerate(powers):
            chosen = ((length >> k) & 1).bool()[:, None, None]
            x = torch.where(chosen, torch.einsum("dnk,rdk->rdn", power, x), x)
        x = x + torch.einsum("dni,rid->rdn", columns[:, :, :count], seen)
    return torch.cat(outputs, 1), x if context.return_state else None
