"""Laws of the norms on the Triton kernels and on torch: the formula, with any gate, groups, widths and strides."""

from __future__ import annotations

import pytest
import torch
from accuracy import error

import linnet.ops as ops

LIMITS = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 5e-3}


def operands(device, *shape, gate=True, weight=True, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    normal = lambda *s: torch.randn(*s, generator=rng).to(device)
    x = {"x": normal(*shape).to(dtype)}
    if gate:
        x["gate"] = normal(*shape).to(dtype)
    if weight:
        x["weight"] = 1 + normal(shape[-1]) / 3
    return x


def results(f, x, backend, dtype=None, **options):
    leaves = {n: p.to(dtype or p.dtype).detach().requires_grad_() for n, p in x.items()}
    y = f(**leaves, backend=backend, **options)
    w = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(x["x"].dtype).to(y)
    grads = torch.autograd.grad((y * w).sum(), list(leaves.values()))
    return {"y": y.detach(), **{"d" + n: g for n, g in zip(leaves, grads, strict=True)}}


def assert_is_the_formula(f, x, **options):
    want = results(f, x, "reference", torch.float64, **options)
    assert all(error(p, want[n]) < 1e-14 for n, p in results(f, x, "torch", torch.float64, **options).items())
    misses = {n: error(p, want[n]) for n, p in results(f, x, "triton", **options).items()}
    assert all(miss < LIMITS[x["x"].dtype] for miss in misses.values()), {n: f"{m:.1e}" for n, m in misses.items()}


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 3])
def test_gates_and_groups(device, activation, norm_before_gate, groups):
    x = operands(device, 2, 5, 3, 12)
    assert_is_the_formula(ops.gated_rms_norm, x, activation=activation, norm_before_gate=norm_before_gate, groups=groups, eps=0.1)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("shape", [(7,), (40, 1), (3, 64), (1, 33, 100), (2, 3, 5, 17)])
def test_any_shape_without_a_gate(device, shape, weight):
    assert_is_the_formula(ops.gated_rms_norm, operands(device, *shape, gate=False, weight=weight))


def test_lengths_of_vectors(device):
    assert_is_the_formula(ops.l2_norm, operands(device, 2, 7, 3, 20, gate=False, weight=False), eps=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_operands(device, dtype):
    assert_is_the_formula(ops.gated_rms_norm, operands(device, 4, 30, 2, 64, dtype=dtype))


def test_parts_of_a_wider_projection(device):
    wide = torch.randn(2, 9, 3 * 24, generator=torch.Generator().manual_seed(0)).to(device)
    for x, gate in (
        (wide[..., :24].unflatten(-1, (2, 12)), wide[..., 48:].unflatten(-1, (2, 12))),
        (wide[..., :24], wide[..., 24:48]),
        (wide[:, :, :24].transpose(0, 1), wide[:, :, 24:48].transpose(0, 1)),
        (wide.unflatten(-1, (3, 24))[:, :, 1], wide.unflatten(-1, (24, 3))[..., 2]),
    ):
        assert error(ops.gated_rms_norm(x, gate, backend="triton"), ops.gated_rms_norm(x, gate, backend="torch")) < 1e-6


def test_refusals_name_the_argument(device):
    x = torch.randn(2, 6, device=device)
    for name, arguments in {
        "gate": {"gate": x[:1]},
        "weight": {"weight": x[0, :5]},
        "groups": {"groups": 4},
        "activation": {"activation": "tanh"},
    }.items():
        with pytest.raises(ValueError, match=f"gated_rms_norm: argument '{name}' must be"):
            ops.gated_rms_norm(x, **arguments)
