r"""What a segment does to the state, as a map that composes: the interface on which sequence parallelism stands.

Every recurrence here is affine in its state. Over a segment of tokens,

    state_out = M state_in + Z        M: a factor per channel (diagonal operators) or a matrix [K, K] per head (delta rule, DPLR)

and for the gradient, with `do` the gradient of the segment's outputs,

    d state_in = M^T d state_out + dZ(do)

`summarize` gives (M, Z) without the outputs, `summarize_grad` gives dZ. A rank that owns a segment needs only these of the
other ranks. M comes from the operator itself: a run without inputs that starts from unit states ends in M.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

from linnet.ops import elementwise, recurrent
from linnet.ops._shapes import expand_heads

_PUBLIC = {
    "linear_attention": recurrent.linear_attention,
    "delta_rule": recurrent.delta_rule,
    "dplr": recurrent.dplr,
    "scan": elementwise.scan,
    "selective_scan": elementwise.selective_scan,
}


@dataclass(frozen=True)
class Segment:
    """The affine map of a segment.

    transition: [N, H, K] (linear attention), [N, H, K, K] (delta rule, DPLR) or the shape of the state (scans), true values.
    offset: the state after the segment from an empty start, in the operator's own layout (relative to e^m with a log-gain).
    """

    op: str
    transition: Tensor
    offset: tuple[Tensor, ...]
    stabilised: bool = False

    def _move(self, x: Tensor) -> Tensor:
        if self.op in ("delta_rule", "dplr"):
            return self.transition @ x
        return self.transition.reshape(self.transition.shape + (1,) * (x.ndim - self.transition.ndim)) * x

    def apply(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The state after the segment that starts from `state`."""
        if not self.stabilised:
            return tuple(self._move(x) + z for x, z in zip(state, self.offset, strict=True))
        (*values, m_in), (*own, m_own) = state, self.offset
        m = torch.maximum(m_in + self.transition.amax(-1).log(), m_own)
        safe = m.masked_fill(m == -torch.inf, 0.0)
        weigh = lambda x, f: x * f.reshape(f.shape + (1,) * (x.ndim - f.ndim))
        f_in, f_own = (m_in - safe).exp(), (m_own - safe).exp()
        return (*(weigh(self._move(x), f_in) + weigh(z, f_own) for x, z in zip(values, own, strict=True)), m)

    def then(self, later: Segment) -> Segment:
        """This segment followed by `later`, as one segment."""
        matrix = self.op in ("delta_rule", "dplr")
        transition = later.transition @ self.transition if matrix else later.transition * self.transition
        return Segment(self.op, transition, later.apply(self.offset), self.stabilised)

    def backward(self, d_state: Tensor) -> Tensor:
        """M^T applied to the gradient of the first state tensor after the segment."""
        return self.transition.mT @ d_state if self.op in ("delta_rule", "dplr") else self._move(d_state)


def _arguments(op: str, operands: tuple, options: dict) -> dict:
    if op not in _PUBLIC:
        names = ", ".join(_PUBLIC)
        raise ValueError(f"summarize: op must be one of {names} (the others keep past inputs, not an affine state); got {op!r}")
    bound = inspect.signature(_PUBLIC[op]).bind(*operands, **options)
    bound.apply_defaults()
    return dict(bound.arguments)


def summarize(op: str, *operands: Tensor, **options) -> Segment:
    """The affine map of the call `op(*operands, **options)`; its `initial_state` is not used."""
    arguments = _arguments(op, operands, options) | {"initial_state": None, "return_state": True}
    if op in ("delta_rule", "dplr", "linear_attention"):
        arguments["q"] = torch.zeros_like(arguments["q"])  # the outputs are not needed
    offset = _PUBLIC[op](**arguments)[1]
    probe = dict(arguments)
    if op in ("scan", "selective_scan"):
        x = "x" if op == "scan" else next(n for n in probe if n.startswith("x"))
        probe[x] = torch.zeros_like(probe[x])
        probe["initial_state"] = tuple(torch.ones_like(z) for z in offset)
        return Segment(op, _PUBLIC[op](**probe)[1][0], offset)
    S, k, v = offset[0], probe["k"], probe["v"]
    rows, heads, key_size = S.shape[:3]
    matrix = op != "linear_attention"
    width = key_size if matrix else 1
    probe["v"] = v.new_zeros(*v.shape[:2], heads, width)
    if op == "linear_attention":
        probe["k"] = torch.zeros_like(k)
        probe |= {"log_gain": None, "bonus": None, "normalizer": None, "return_normalizer": False, "read": "after"}
        start = S.new_ones(rows, heads, key_size, 1)
    else:
        start = torch.eye(key_size, dtype=S.dtype, device=S.device).expand(rows, heads, -1, -1)
        if op == "delta_rule":
            probe["write"] = torch.zeros_like(probe["erase"][..., 0] if probe["erase"].ndim == 4 else probe["erase"])
    probe["initial_state"] = (start.contiguous(),)
    M = expand_heads(_PUBLIC[op](**probe)[1][0], heads, 1)
    return Segment(op, M if matrix else M[..., 0], offset, stabilised=not matrix and arguments["log_gain"] is not None)


def summarize_grad(op: str, do: Tensor, *operands: Tensor, **options) -> tuple[Tensor, ...]:
    """dZ: the gradient of <o, do> with respect to the initial state, for a zero gradient of the final state.

    `initial_state` must be given: with a normaliser the outputs are not linear in it.
    """
    arguments = _arguments(op, operands, options)
    if arguments["initial_state"] is None:
        raise ValueError("summarize_grad: argument 'initial_state' must be the state at the segment's start; got None")
    state = arguments["initial_state"]
    state = (state,) if isinstance(state, Tensor) else tuple(state)
    with torch.enable_grad():
        leaves = tuple(x.detach().requires_grad_() for x in state)
        detached = {n: x.detach() if isinstance(x, Tensor) else x for n, x in arguments.items()}
        o = _PUBLIC[op](**detached | {"initial_state": leaves})[0]
        grads = torch.autograd.grad(o, leaves, do, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))
