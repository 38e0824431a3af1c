"""A loss that uses only the output, or only the final state: what nobody asked for is neither wrong nor allocated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import error
from torch.utils._python_dispatch import TorchDispatchMode

import linnet.ops as ops

T, H, K = 70, 2, 16


def call(name):
    rng = torch.Generator().manual_seed(0)
    n = lambda *shape: torch.randn(*shape, generator=rng)
    q, k, v = (n(1, T, H, K) for _ in range(3))
    scalar, vector = (-torch.rand(1, T, H, *more, generator=rng) for more in ((), (K,)))
    erase = torch.rand(1, T, H, generator=rng)
    unit = F.normalize(k, dim=-1)
    return {
        "linear_attention": (ops.linear_attention, dict(q=q, k=k, v=v, log_decay=scalar)),
        "linear_attention, per channel": (ops.linear_attention, dict(q=q, k=k, v=v, log_decay=vector)),
        "linear_attention, split in time": (
            ops.linear_attention,
            dict(q=q[:, :, :1], k=k[:, :, :1], v=v[:, :, :1], log_decay=None),
        ),
        "delta_rule": (ops.delta_rule, dict(q=q, k=unit, v=v, erase=erase, log_decay=scalar)),
        "delta_rule, per channel": (ops.delta_rule, dict(q=q, k=unit, v=v, erase=erase, log_decay=vector)),
        "dplr": (ops.dplr, dict(q=q, k=k, v=v, a=-unit, b=unit * erase[..., None], log_decay=vector)),
    }[name]


class Zeros(TorchDispatchMode):
    """The sizes of tensors of zeros that were made."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.name().startswith(("aten::zeros", "aten::new_zeros", "aten::_efficientzerotensor")):
            self.found.append(out.numel())
        return out


@pytest.mark.parametrize("part", ["output", "state"])
@pytest.mark.parametrize(
    "name",
    [
        "linear_attention", "linear_attention, per channel", "linear_attention, split in time", "delta_rule",
        "delta_rule, per channel", "dplr",
    ],
)  # fmt: skip
def test_a_loss_on_one_result(device, name, part):
    op, x = call(name)
    grads = {}
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = {n: a.to(device, dtype).requires_grad_() for n, a in x.items() if a is not None}
        o, (S,) = op(**leaves, return_state=True, backend=backend)
        weights = torch.randn(*(o if part == "output" else S).shape, generator=torch.Generator().manual_seed(1)).to(o)
        loss = ((o if part == "output" else S) * weights).sum()
        with Zeros() as zeros:
            grads[backend] = torch.autograd.grad(loss, list(leaves.values()))
        if backend == "triton":
            assert sum(zeros.found) <= (o.numel() if part == "state" else 0), zeros.found
    for n, a, b in zip(leaves, *grads.values(), strict=True):
        assert error(a, b) < 2e-5 or float(b.abs().max()) == 0 == float(a.abs().max()), n
