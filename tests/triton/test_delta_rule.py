"""Laws of delta_rule on the Triton kernels: they compute the recurrence, whatever the decay, gates, packing, heads or split.

Under the interpreter (fp32, small shapes) the whole file runs; the laws marked `gpu` need the real compiler and 16-bit types.
"""

from __future__ import annotations

import accuracy
import pytest
import torch
import torch.nn.functional as F

import linnet.ops as ops

FP32, BF16 = 2e-5, 5e-3
SCALAR, VECTOR = {}, {"log_decay_min": -5.0}


def operands(
    device, kind, T, K=16, V=16, B=2, heads=(2, 2, 2, 2, 2), decay="mild", beta=1.0, write=False, write_key=False, correlated=False,
    dtype=torch.float32, rows=None, channels=False,
):  # fmt: skip
    """The arguments of delta_rule with head counts (q, k, v, decay, erase), and a random initial state."""
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng)
    uniform = lambda *shape: torch.rand(*shape, generator=rng)
    Hq, Hk, Hv, Hg, He = heads
    k = normal(B, T, Hk, K)
    if correlated:
        k = 0.1 * k + normal(1, 1, Hk, K)
    x = {"q": F.normalize(normal(B, T, Hq, K), dim=-1), "k": F.normalize(k, dim=-1), "v": normal(B, T, Hv, V)}
    x["erase"] = beta * uniform(B, T, He, *((K,) if channels else ()))
    if write or channels:
        x["write"] = uniform(B, T, Hv, *((V,) if channels else ()))
    if write_key:
        x["write_key"] = F.normalize(normal(B, T, Hk, K), dim=-1)
    x = {n: a.to(dtype) for n, a in x.items()}
    if kind != "none":
        shape = (B, T, Hg) if kind == "scalar" else (B, T, Hg, K)
        u = uniform(*shape)
        x["log_decay"] = {"mild": -u, "strong": -20 * u, "reset": torch.where(u < 0.2, -torch.inf, -u), "bound": -4.99 + 0 * u}[
            decay
        ]
    state = normal(rows or B, max(Hk, Hv, Hg if kind != "none" else 1, He), K, V)
    return {n: a.to(device) for n, a in x.items()}, state.to(device)


def assert_is_the_recurrence(x, state, limit=FP32, **options):
    accuracy.assert_is_the_recurrence(ops.delta_rule, x, state, limit, **options)


CASES = {
    "none": ("none", 33, {"write": True, "write_key": True, "B": 1}, SCALAR),
    "scalar": ("scalar", 65, {"B": 1}, SCALAR),
    "scalar, reset": ("scalar", 40, {"decay": "reset", "B": 1}, SCALAR),
    "scalar, reads before": ("scalar", 40, {"B": 1}, {"read": "before", "erase_read": "before_decay"}),
    "scalar, split in time": ("scalar", 600, {"B": 1, "heads": (1, 1, 1, 1, 1)}, SCALAR),
    "scalar, groups": ("scalar", 17, {"heads": (1, 2, 4, 4, 2), "write": True, "B": 1}, SCALAR),
    "scalar, query groups": ("scalar", 17, {"heads": (4, 1, 2, 2, 1), "B": 1}, SCALAR),
    "correlated keys, beta to 2": ("scalar", 64, {"beta": 2.0, "correlated": True, "B": 1}, SCALAR),
    "vector with a bound": ("vector", 50, {"decay": "bound", "B": 1}, VECTOR),
    "vector with a bound, reads before": ("vector", 33, {"B": 1}, VECTOR | {"read": "before", "erase_read": "before_decay"}),
    "vector": ("vector", 50, {"decay": "strong", "B": 1, "heads": (2, 1, 2, 2, 1)}, SCALAR),
    "vector, reset": ("vector", 33, {"decay": "reset", "B": 1, "write_key": True}, SCALAR),
    "odd sizes": ("vector", 15, {"K": 24, "V": 20, "B": 1}, VECTOR),
    "one token": ("scalar", 1, {}, SCALAR),
    "channel-wise gates, scalar decay": ("scalar", 33, {"channels": True, "B": 1}, SCALAR),
    "channel-wise gates": ("vector", 40, {"channels": True, "B": 1}, VECTOR),
    "channel-wise gates, write key, any decay": ("vector", 20, {"channels": True, "write_key": True, "B": 1}, SCALAR),
    "channel-wise gates, groups": ("vector", 17, {"channels": True, "heads": (4, 1, 2, 2, 1), "B": 1, "V": 24, "K": 20}, VECTOR),
    "wide": ("scalar", 40, {"K": 256, "V": 256, "B": 1, "heads": (1, 1, 1, 1, 1)}, SCALAR),
    "wide keys": ("scalar", 40, {"K": 192, "V": 48, "B": 1, "heads": (1, 1, 1, 1, 1), "write": True, "write_key": True}, SCALAR),
    "wide values, per channel": ("vector", 33, {"K": 32, "V": 192, "B": 1, "heads": (1, 1, 1, 1, 1), "channels": True}, VECTOR),
    "wide keys, per channel": ("vector", 33, {"K": 256, "V": 64, "B": 1, "heads": (1, 1, 1, 1, 1)}, SCALAR),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_recurrence(device, case):
    kind, T, shape, options = CASES[case]
    x, state = operands(device, kind, T, **shape)
    assert_is_the_recurrence(x, state, **options)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_packed_documents_are_separate(device, kind):
    cu = torch.tensor([0, 3, 3, 40, 50], dtype=torch.int32, device=device)
    x, state = operands(device, kind, 50, B=1, rows=4)
    assert_is_the_recurrence(x, state, cu_seqlens=cu)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_the_past_is_bit_for_bit_independent_of_the_future(device, kind):
    x, state = operands(device, kind, 70, B=1)
    options = VECTOR if kind == "vector" else {}
    before = ops.delta_rule(**x, backend="triton", **options)[0]
    changed = {n: a.clone() for n, a in x.items()}
    rng = torch.Generator().manual_seed(1)
    for n, a in changed.items():  # keys of length 1 at most: a future that overflows would pass through 0 * inf
        size = -4.9 if n == "log_decay" else 16**-0.5
        a[:, 41:] = (size * torch.rand(a[:, 41:].shape, generator=rng)).to(a)
    after = ops.delta_rule(**changed, backend="triton", **options)[0]
    assert torch.equal(before[:, :41], after[:, :41])
    assert not torch.equal(before[:, 41:], after[:, 41:])


def test_wide_heads_are_left_to_other_backends(device):
    x, _ = operands(device, "scalar", 4, K=512)
    with pytest.raises(ValueError, match="key channels per head must be at most 256, got 512"):
        ops.delta_rule(**x, backend="triton")
    assert ops.delta_rule(**x)[0].isfinite().all()


GPU = {
    "none": ("none", 256, {}, SCALAR),
    "scalar": ("scalar", 256, {}, SCALAR),
    "scalar, gates and keys": ("scalar", 256, {"write": True, "write_key": True}, SCALAR),
    "scalar, strong": ("scalar", 256, {"decay": "strong"}, SCALAR),
    "scalar, ragged": ("scalar", 200, {}, SCALAR),
    "scalar, split": ("scalar", 2048, {"B": 1}, SCALAR),
    "scalar, groups": ("scalar", 192, {"heads": (1, 2, 4, 4, 2), "write": True}, SCALAR),
    "vector": ("vector", 256, {}, VECTOR),
    "vector, exact": ("vector", 200, {"decay": "strong"}, SCALAR),
}


KNOWN = {("scalar, gates and keys", 64): 8.5e-3, ("scalar, strong", 128): 5.8e-3}  # d beta, docs/kernels.md


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU)
@pytest.mark.parametrize("size", [64, 128])
def test_16_bit_operands(device, case, size):
    kind, T, shape, options = GPU[case]
    x, state = operands(device, kind, T, K=size, V=size, dtype=torch.bfloat16, **shape)
    misses = accuracy.misses(ops.delta_rule, x, state, BF16, **options)
    if misses.keys() == {"derase"} and misses["derase"] < KNOWN.get((case, size), 0.0):
        pytest.xfail(f"known miss, docs/kernels.md: d beta {misses['derase']:.1e}, goal {BF16:.0e}")
    assert not misses, misses


@pytest.mark.gpu
def test_16_bit_operands_with_correlated_keys(device):
    """Rounded operands amplify: an inverse with entries near 2 multiplies the rounding of what it solves."""
    x, state = operands(device, "scalar", 256, K=64, V=64, beta=2.0, correlated=True, dtype=torch.bfloat16)
    got = accuracy.values_and_gradients(ops.delta_rule, x, state, "triton")
    want = accuracy.values_and_gradients(ops.delta_rule, x, state, "torch", torch.float64)
    worst = max(accuracy.error(a, want[n]) for n, a in got.items())
    if BF16 <= worst < 3e-2:
        pytest.xfail(f"known miss, docs/kernels.md: correlated keys in 16 bit {worst:.1e}, goal {BF16:.0e}")
    assert worst < BF16
