"""Linear systems with a running Gram matrix of the keys, one per token and head, solved by conjugate gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linnet import ops
from linnet.mixers._base import Context

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _apply(x_BTHK: Tensor, operands: Operands, return_state: bool = False) -> tuple[Tensor, Tensor | None]:
    """(H_t + Diag(ridge)) x_t and the last H: linear attention that reads x where the values are the weighted keys."""
    k_BTHK, u_BTHK, log_decay, ridge_HK, H_NHKK, cu_seqlens = operands
    y_BTHK, new = ops.linear_attention(
        x_BTHK, k_BTHK, u_BTHK, log_decay, scale=1.0, initial_state=H_NHKK, return_state=return_state, cu_seqlens=cu_seqlens
    )
    return y_BTHK if ridge_HK is None else y_BTHK + ridge_HK * x_BTHK, None if new is None else new[0]


@torch.no_grad()
def _conjugate_gradients(y_BTHK: Tensor, operands: Operands, steps: int) -> Tensor:
    x, r = torch.zeros_like(y_BTHK), y_BTHK
    p, rr = r, r.square().sum(-1, keepdim=True)
    for _ in range(steps):
        Ap = _apply(p, operands)[0]
        pAp = (p * Ap).sum(-1, keepdim=True)
        alpha = torch.where(pAp > 0, rr / pAp, 0)  # 0 / 0 once a system is solved exactly
        x, r = x + alpha * p, r - alpha * Ap
        rr, before = r.square().sum(-1, keepdim=True), rr
        p = r + torch.where(before > 0, rr / before, 0) * p
    return x


class _Solve(torch.autograd.Function):
    """The solution, as a function of the residual that it leaves: its gradient is one more solve of the same symmetric systems."""

    @staticmethod
    def forward(ctx, residual, solution, steps, *operands):
        ctx.steps = steps
        ctx.save_for_backward(*operands)
        return solution.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        operands = ctx.saved_tensors
        return _conjugate_gradients(dx, operands, ctx.steps), None, None, *(None,) * len(operands)


def gram_solve(
    y_BTHK: Tensor, k_BTHK: Tensor, weight_BTH: Tensor, log_decay: Tensor | None, ridge_HK: Tensor | None, H_NHKK: Tensor | None,
    context: Context, steps: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """x_t with (H_t + Diag(ridge)) x_t = y_t, H_t = e^{g_t} H_{t-1} + w_t k_t k_t^T, and the last H [N, H, K, K].

    `steps` conjugate-gradient steps from zero, each one linear attention. Gradients are implicit, at the cost of one
    more solve: exact once both solves have converged; no step is stored.
    """
    operands = (k_BTHK, weight_BTH[..., None] * k_BTHK, log_decay, ridge_HK, H_NHKK, context.cu_seqlens)
    solution = _conjugate_gradients(y_BTHK, operands, steps)
    product, H = _apply(solution, operands, context.return_state)
    return _Solve.apply(y_BTHK - product, solution, steps, *operands), H
