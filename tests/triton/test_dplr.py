"""Laws of dplr on the Triton kernels: they compute the recurrence, whatever the decay, packing, heads or split.

Under the interpreter (fp32, small shapes) the whole file runs; the laws marked `gpu` need the real compiler and 16-bit types.
"""

from __future__ import annotations

import accuracy
import pytest
import torch
import torch.nn.functional as F

import linnet.ops as ops

FP32, BF16 = 2e-5, 5e-3
RWKV = {"log_decay_min": -0.61, "scale": 1.0}
BOUND = {"log_decay_min": -5.0}


def operands(
    device, kind, T, K=16, V=16, B=1, heads=(2, 2, 2, 2, 2), decay="mild", gate=1.0, correlated=False, dtype=torch.float32,
    rows=None,
):  # fmt: skip
    """The arguments of dplr as RWKV-7 makes them, with head counts (q, k, v, a and b, decay), and a random initial state."""
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng)
    uniform = lambda *shape: torch.rand(*shape, generator=rng)
    Hq, Hk, Hv, Ha, Hg = heads
    kappa = normal(B, T, Ha, K)
    if correlated:
        kappa = 0.1 * kappa + normal(1, 1, Ha, K)
    kappa = F.normalize(kappa, dim=-1)
    x = {"q": F.normalize(normal(B, T, Hq, K), dim=-1), "k": F.normalize(normal(B, T, Hk, K), dim=-1), "v": normal(B, T, Hv, V)}
    x |= {"a": -kappa, "b": kappa * gate * uniform(B, T, Ha, 1 if correlated else K)}
    x = {n: a.to(dtype) for n, a in x.items()}
    if kind != "none":
        shape = (B, T, Hg) if kind == "scalar" else (B, T, Hg, K)
        u = uniform(*shape)
        x["log_decay"] = {
            "mild": -0.6 * u, "five": -4.99 + 0 * u, "strong": -20 * u, "reset": torch.where(u < 0.2, -torch.inf, -u),
        }[decay]  # fmt: skip
    state = normal(rows or B, max(Hk, Hv, Ha, Hg if kind != "none" else 1), K, V)
    return {n: a.to(device) for n, a in x.items()}, state.to(device)


def assert_is_the_recurrence(x, state, limit=FP32, **options):
    accuracy.assert_is_the_recurrence(ops.dplr, x, state, limit, **options)


CASES = {
    "none": ("none", 33, {}, {}),
    "scalar": ("scalar", 40, {}, BOUND),
    "a frame a chunk": ("vector", 65, {}, RWKV),
    "frames of 16": ("vector", 50, {"decay": "five"}, BOUND),
    "no bound": ("vector", 50, {"decay": "strong", "heads": (2, 1, 2, 2, 1)}, {}),
    "resets": ("vector", 33, {"decay": "reset"}, {}),
    "split in time": ("vector", 600, {"heads": (1, 1, 1, 1, 1)}, RWKV),
    "groups": ("vector", 17, {"heads": (1, 2, 4, 4, 2), "B": 2}, RWKV),
    "query groups": ("scalar", 17, {"heads": (4, 1, 2, 1, 2)}, RWKV),
    "correlated addresses, gate 2": ("vector", 64, {"correlated": True, "gate": 2.0}, RWKV),
    "odd sizes": ("vector", 15, {"K": 24, "V": 20}, BOUND),
    "one token": ("vector", 1, {"B": 2}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_recurrence(device, case):
    kind, T, shape, options = CASES[case]
    x, state = operands(device, kind, T, **shape)
    assert_is_the_recurrence(x, state, **options)


@pytest.mark.parametrize("options", [RWKV, {}], ids=["bound", "no bound"])
def test_packed_documents_are_separate(device, options):
    cu = torch.tensor([0, 3, 3, 40, 50], dtype=torch.int32, device=device)
    x, state = operands(device, "vector", 50, rows=4)
    assert_is_the_recurrence(x, state, cu_seqlens=cu, **options)


@pytest.mark.parametrize("options", [{"log_decay_min": -1.2}, BOUND, {}], ids=["a frame a chunk", "frames", "no bound"])
def test_the_past_is_bit_for_bit_independent_of_the_future(device, options):
    x, state = operands(device, "vector", 70)
    x["log_decay"] = x["log_decay"].clamp_min(-1.2)
    before = ops.dplr(**x, initial_state=(state,), backend="triton", **options)[0]
    changed = {n: a.clone() for n, a in x.items()}
    for a in changed.values():
        a[:, 41:] = -1.2 * torch.rand_like(a[:, 41:])
    after = ops.dplr(**changed, initial_state=(state,), backend="triton", **options)[0]
    assert torch.equal(before[:, :41], after[:, :41])
    assert not torch.equal(before[:, 41:], after[:, 41:])


def test_gradients_are_the_same_in_every_run(device):
    x, state = operands(device, "vector", 40)
    first, second = (accuracy.values_and_gradients(ops.dplr, x, state, "triton", **RWKV) for _ in range(2))
    assert all(torch.equal(a, second[n]) for n, a in first.items())


def test_wide_heads_are_left_to_other_backends(device):
    x, _ = operands(device, "vector", 4, K=144)
    with pytest.raises(ValueError, match="key channels per head must be at most 128, got 144"):
        ops.dplr(**x, backend="triton")
    assert ops.dplr(**x)[0].isfinite().all()


GPU = {
    "none": ("none", 256, {"B": 2}, {}),
    "scalar": ("scalar", 256, {"B": 2}, BOUND),
    "a frame a chunk": ("vector", 256, {"B": 2}, RWKV),
    "ragged": ("vector", 200, {"B": 2}, RWKV),
    "split": ("vector", 2048, {}, RWKV),
    "groups": ("vector", 192, {"heads": (1, 2, 4, 4, 2)}, RWKV),
    "frames of 16": ("vector", 256, {"B": 2}, BOUND),
    "no bound": ("vector", 200, {"B": 2, "decay": "strong"}, {}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU)
@pytest.mark.parametrize("size", [64, 128])
def test_16_bit_operands(device, case, size):
    kind, T, shape, options = GPU[case]
    x, state = operands(device, kind, T, K=size, V=size, dtype=torch.bfloat16, **shape)
    assert_is_the_recurrence(x, state, BF16, **options)
