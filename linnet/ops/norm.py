"""Norms over the last axis, with the gate that surrounds them, and gates by themselves: one pass over memory where the backend can.

Shape legend: `...` any axes, D the size of the last one.
"""

from __future__ import annotations

from torch import Tensor

from linnet.ops import _checks as check
from linnet.ops._dispatch import call

ACTIVATIONS = ("silu", "sigmoid")
PER_TOKEN = ("gated_linear_unit", "gated_rms_norm", "l2_norm", "softmax_cross_entropy")  # the operators that do not look along time


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    norm_before_gate: bool = True,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    r"""RMSNorm and a gate.

        norm(v) = weight * v / sqrt(mean(v^2) + eps)       over the last axis, or over each of `groups` equal blocks of it
        y = norm(x) * act(gate)      norm_before_gate
        y = norm(x * act(gate))      otherwise (Mamba-2)
        y = norm(x)                  without a gate

    Args:
        x: [..., D], real. gate: of the shape of x, or None. weight: [D] or None (ones).
        activation: "silu" or "sigmoid", of the gate. groups: divides D.

    Returns:
        y [..., D] in the dtype of x; computed in at least fp32.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: Zhang & Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467).
    """
    op = "gated_rms_norm"
    _operand(op, x)
    if gate is not None:
        check.tensor(op, "gate", gate, "[..., D]", x.ndim, x)
        check.sizes(op, "gate", gate, {axis: (f"axis {axis} of x", size) for axis, size in enumerate(x.shape)})
    if weight is not None:
        check.tensor(op, "weight", weight, "[D]", 1, x)
        check.sizes(op, "weight", weight, {0: ("last axis of x", x.shape[-1])})
    check.choice(op, "activation", activation, ACTIVATIONS)
    if not isinstance(groups, int) or groups < 1 or x.shape[-1] % groups:
        check.refuse(op, "groups", f"an integer that divides {x.shape[-1]}, the last axis of x", repr(groups))
    return call(
        op, backend, x=x, gate=gate, weight=weight, eps=eps, activation=activation, norm_before_gate=norm_before_gate, groups=groups
    )


def gated_linear_unit(x: Tensor, gate: Tensor, *, activation: str = "silu", backend: str | None = None) -> Tensor:
    r"""A gate.

        y = x * act(gate),      silu(z) = z sigmoid(z)

    Args:
        x: [..., D], real. gate: of the shape of x.
        activation: "silu" (SwiGLU) or "sigmoid" (GLU), of the gate.

    Returns:
        y [..., D] in the dtype of x; computed in at least fp32. For the backward x and the gate are kept, and on backend `triton`
        nothing else.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: Shazeer 2020, GLU Variants Improve Transformer (arXiv 2002.05202).
    """
    op = "gated_linear_unit"
    _operand(op, x)
    check.tensor(op, "gate", gate, "[..., D]", x.ndim, x)
    check.sizes(op, "gate", gate, {axis: (f"axis {axis} of x", size) for axis, size in enumerate(x.shape)})
    check.choice(op, "activation", activation, ACTIVATIONS)
    return call(op, backend, x=x, gate=gate, activation=activation)


def l2_norm(x: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    r"""Vectors of length 1.

        y = x / sqrt(sum(x^2) + eps)      over the last axis

    Args:
        x: [..., D], real.

    Returns:
        y [..., D] in the dtype of x; computed in at least fp32.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _operand("l2_norm", x)
    return call("l2_norm", backend, x=x, eps=eps)


def _operand(op: str, x: object) -> None:
    check.tensor(op, "x", x, "[..., D]", max(x.ndim, 1) if isinstance(x, Tensor) else 1)
    if x.is_complex():
        check.refuse(op, "x", "real", check.describe(x))
