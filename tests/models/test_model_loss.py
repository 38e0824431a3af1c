"""Chunked linear cross-entropy == torch's cross-entropy on full logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from linnet.models import linear_cross_entropy, next_token_targets


def problem(n, d, v, dtype, ignored, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=dtype).requires_grad_()
    w = torch.randn(v, d, generator=generator, dtype=dtype).requires_grad_()
    y = torch.randint(v, (n,), generator=generator)
    y[:ignored] = -100
    return x, w, y


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 9),
    v=st.integers(2, 30),
    chunk=st.sampled_from([None, 1, 7, 64]),
    ignored=st.integers(0, 5),
)
def test_value_and_gradients_fp64(n, d, v, chunk, ignored):
    x, w, y = problem(n, d, v, torch.float64, min(ignored, n - 1))
    loss = linear_cross_entropy(x, w, y, chunk_tokens=chunk)
    expected = F.cross_entropy(x @ w.T, y)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(torch.autograd.grad(3 * loss, (x, w)), torch.autograd.grad(3 * expected, (x, w)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_fp32_within_1e6():
    x, w, y = problem(300, 32, 500, torch.float32, 3)
    loss, expected = linear_cross_entropy(x, w, y, chunk_tokens=64), F.cross_entropy(x.double() @ w.double().T, y)
    assert abs(loss - expected) / expected < 1e-6
    for got, want in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True):
        assert (got - want).norm() / want.norm() < 1e-6


def test_bf16_gradients_are_as_good_as_those_of_full_logits():
    x, w, y = problem(200, 32, 50, torch.bfloat16, 0)
    exact = torch.autograd.grad(F.cross_entropy(x.double() @ w.double().T, y), (x, w))
    full = torch.autograd.grad(F.cross_entropy((x @ w.T).float(), y), (x, w))
    ours = torch.autograd.grad(linear_cross_entropy(x, w, y, chunk_tokens=32), (x, w))
    for e, f, o in zip(exact, full, ours, strict=True):
        assert o.dtype == torch.bfloat16
        assert (o - e).norm() <= 1.1 * (f - e).norm()


def test_autocast_multiplies_in_bf16():
    x, w, y = problem(20, 8, 10, torch.float32, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, w, y)
    expected = linear_cross_entropy(x.bfloat16(), w.bfloat16(), y)
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    assert torch.autograd.grad(loss, w)[0].dtype == torch.float32


def test_num_items_and_nothing_to_predict():
    x, w, y = problem(6, 4, 9, torch.float64, 2)
    mean = linear_cross_entropy(x, w, y)
    torch.testing.assert_close(linear_cross_entropy(x, w, y, num_items=torch.tensor(8)), mean * 4 / 8)
    nothing = linear_cross_entropy(x, w, torch.full((6,), -100))
    assert nothing == 0 and torch.autograd.grad(nothing, x)[0].abs().max() == 0


def test_frozen_weight_gets_no_gradient_and_no_memory():
    x, w, y = problem(6, 4, 9, torch.float32, 0)
    loss = linear_cross_entropy(x, w.detach(), y)
    loss.backward()
    assert x.grad is not None and w.grad is None


def test_no_tensor_of_the_size_of_all_logits_is_made():
    """Every tensor that an operation makes, forward and backward, is far below [N, V]; likewise what is saved."""
    from torch.utils._python_dispatch import TorchDispatchMode

    n, d, v, chunk = 4096, 8, 512, 256
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    x, w, y = problem(n, d, v, torch.float32, 0)
    with Watch():
        linear_cross_entropy(x, w, y).backward()
    assert largest == chunk * v < n * v / 10


def test_targets_do_not_cross_documents_or_padding():
    labels = torch.arange(10, 16)[None]
    assert next_token_targets(labels).tolist() == [[11, 12, 13, 14, 15, -100]]
    cu = torch.tensor([0, 0, 2, 2, 6, 6])
    assert next_token_targets(labels, cu).tolist() == [[11, -100, 13, 14, 15, -100]]
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    assert next_token_targets(labels, None, mask).tolist() == [[-100, -100, 13, 14, -100, -100]]


def test_bad_arguments_are_refused():
    x, w, y = problem(6, 4, 9, torch.float32, 0)
    with pytest.raises(ValueError, match=r"targets must have the shape \(6,\) of .* got \(5,\)"):
        linear_cross_entropy(x, w, y[:5])
    with pytest.raises(ValueError, match=r"chunk_tokens must be >= 1 or None; got 0"):
        linear_cross_entropy(x, w, y, chunk_tokens=0)
