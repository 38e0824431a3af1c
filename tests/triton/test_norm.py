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


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("shape", [(7,), (3, 64), (2, 33, 100), (2, 3, 5, 350)])
def test_gated_linear_unit(device, shape, activation):
    assert_is_the_formula(ops.gated_linear_unit, operands(device, *shape, weight=False), activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gated_linear_unit_of_sixteen_bit(device, dtype):
    assert_is_the_formula(ops.gated_linear_unit, operands(device, 4, 30, 64, weight=False, dtype=dtype))


def test_gated_linear_unit_of_parts_of_a_projection(device):
    """Rows that are not packed, turned tokens, and a gradient that is expanded."""
    both = torch.randn(2, 9, 80, generator=torch.Generator().manual_seed(3)).to(device)
    packed = both[..., :40], both[..., 40:].contiguous()
    for x, gate in (both.chunk(2, -1), both.chunk(2, -1)[::-1], packed, both.transpose(1, 2).chunk(2, 1)):
        want = ops.gated_linear_unit(x, gate, backend="reference")
        assert error(ops.gated_linear_unit(x, gate, backend="triton"), want) < 3e-6
    leaf = both.clone().requires_grad_()
    grads = {}
    for backend in ("triton", "reference"):
        (grads[backend],) = torch.autograd.grad(ops.gated_linear_unit(*leaf.chunk(2, -1), backend=backend).sum(), leaf)
    assert error(grads["triton"], grads["reference"]) < 3e-6


def test_what_a_gated_linear_unit_is_not_given_is_refused(device):
    x = torch.randn(3, 8, device=device)
    with pytest.raises(ValueError, match="'gate'"):
        ops.gated_linear_unit(x, x[:, :4])
    with pytest.raises(ValueError, match="'activation'"):
        ops.gated_linear_unit(x, x, activation="gelu")


def test_a_gated_linear_unit_keeps_its_operands_alone(device):
    x, gate = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y.data_ptr()) or y, lambda y: y):
        y = ops.gated_linear_unit(x, gate, backend="triton")
    assert kept == [x.data_ptr(), gate.data_ptr()] and y.requires_grad
