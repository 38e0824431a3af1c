"""Parity with PyTorch's attention, dtypes, memory, compilation and refusals of softmax_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import linnet
import linnet.ops as ops


def qkv(batch=2, tokens=40, heads=4, kv_heads=4, size=8, dtype=torch.float32):
    shape = lambda h: (batch, tokens, h, size)  # noqa: E731
    return [torch.randn(shape(h), dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_is_scaled_dot_product_attention(backend, causal, kv_heads):
    q, k, v = qkv(kv_heads=kv_heads)
    args = [x.transpose(1, 2) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*args, is_causal=causal, enable_gqa=True).transpose(1, 2)
    assert relative(ops.softmax_attention(q, k, v, causal=causal, backend=backend)[0], want) < 1e-6


@pytest.mark.parametrize("tokens", [200, 700])
@pytest.mark.parametrize("window", [3, 128, 129, 300])
def test_window_is_a_band_mask(tokens, window):
    q, k, v = qkv(1, tokens, 2, 1)
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    args = [x.transpose(1, 2) for x in (q, k, v)]
    mask = (age >= 0) & (age < window)
    want = F.scaled_dot_product_attention(*args, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    assert relative(ops.softmax_attention(q, k, v, window=window)[0], want) < 1e-6


def test_lse_merges_branches():
    """Attention over all keys = attention over two parts, weighted by their log-sum-exp."""
    q, k, v = qkv(dtype=torch.float64)
    cache = lambda cut: (k[:, cut], v[:, cut], torch.full((2,), k[:, cut].shape[1]))  # noqa: E731
    one, parts = (q[:, -1:], k[:, -1:], v[:, -1:]), []
    for cut in (slice(0, 20), slice(20, 39)):
        parts.append(ops.softmax_attention(*one, initial_state=cache(cut), return_lse=True))
    own, _, own_lse = ops.softmax_attention(*one, return_lse=True)
    want, _, lse = ops.softmax_attention(q, k, v, return_lse=True)
    total = sum(p[2].exp() for p in parts)  # the newest key is in both parts
    merged = sum(p[0] * p[2].exp()[..., None] for p in parts) - own * own_lse.exp()[..., None]
    total = total - own_lse.exp()
    assert relative(merged / total[..., None], want[:, -1:]) < 1e-12
    assert relative(total.log(), lse[:, -1:]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    q, k, v = qkv(dtype=dtype)
    o, state, lse = ops.softmax_attention(q, k, v, return_state=True, return_lse=True)
    assert o.dtype == state[0].dtype == dtype and lse.dtype == torch.float32
    want, _ = ops.softmax_attention(q.float(), k.float(), v.float(), backend="reference")
    assert relative(o, want) < torch.finfo(dtype).eps


def test_long_window_needs_linear_memory():
    """8192 tokens: one score matrix would be 268 MB per head."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 8192, 1, 1))
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    for lse in (False, True):
        with Largest():
            ops.softmax_attention(q, k, v, window=64, return_lse=lse)[0].sum().backward()
    assert 0 < largest < 24e6


def test_compiles_in_one_graph():
    q, k, v = qkv()
    cache = (k, v, torch.tensor([40, 7]))
    for options in ({}, {"window": 5}, {"return_lse": True}, {"initial_state": cache}):
        call = lambda q, k, v, options=options: ops.softmax_attention(q, k, v, return_state=True, **options)  # noqa: E731
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
        want = call(q, k, v)
        assert relative(got[0], want[0]) < 1e-6 and torch.equal(got[1][2], want[1][2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q_BTHK": torch.randn(2, 40, 8)}, "'q_BTHK' must be of shape"),
        ({"q_BTHK": torch.randn(2, 40, 6, 8)}, "'k_BTHK'.*divides the 6 heads"),
        ({"k_BTHK": torch.randn(2, 39, 4, 8)}, "'k_BTHK'.*size 40 on axis 1"),
        ({"k_BTHK": torch.randn(2, 40, 4, 9)}, "'k_BTHK'.*key channels"),
        ({"v_BTHV": torch.randn(2, 40, 4, 8).double()}, "'v_BTHV'.*dtype"),
        ({"window": 0}, "'window' must be an integer >= 1"),
        ({"window": 2.5}, "'window' must be an integer >= 1"),
        ({"window": 4, "causal": False}, "'window' must be None when causal=False"),
        ({"initial_state": torch.zeros(2)}, "initial_state.*a tuple"),
        ({"initial_state": (torch.zeros(2, 3, 4, 7), torch.zeros(2, 3, 4, 8), torch.zeros(2).long())}, "for k"),
        ({"initial_state": (torch.zeros(2, 3, 4, 8), torch.zeros(2, 2, 4, 8), torch.zeros(2).long())}, "for v"),
        ({"initial_state": (torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 8), torch.zeros(2))}, "for length"),
        ({"cu_seqlens": torch.tensor([0, 40], dtype=torch.int32)}, "cu_seqlens.*batch size 2"),
        ({"cu_seqlens": [0, 40]}, "'cu_seqlens' must be an int32 tensor"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.softmax_attention(**(dict(zip(("q_BTHK", "k_BTHK", "v_BTHV"), qkv(), strict=True)) | arguments))


def test_debug_mode_checks_lengths():
    q, k, v = qkv()
    with linnet.debug(), pytest.raises(ValueError, match="lengths between 0 and the 40 slots"):
        ops.softmax_attention(q, k, v, initial_state=(k, v, torch.tensor([3, 41])))
