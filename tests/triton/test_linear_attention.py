"""Laws of linear_attention on the Triton kernels: they compute the recurrence, whatever the kind of decay, packing, heads or split.

Under the interpreter (fp32, small shapes) the whole file runs; the laws marked `gpu` need the real compiler and 16-bit types.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from accuracy import error

import linnet.ops as ops
from linnet.ops.triton import _plan, _table

FP32, BF16 = 2e-5, 5e-3


def operands(device, T, K=16, V=16, B=2, heads=(2, 1, 2, 1), kind="scalar", strength=1.0, dtype=torch.float32, rows=None, seed=0):
    """q, k, v, log_decay with head counts `heads`, and a random initial state."""
    rng = torch.Generator().manual_seed(seed)
    Hq, Hk, Hv, Hg = heads
    normal = lambda *shape: torch.randn(*shape, generator=rng)
    shape = {"none": None, "head": (Hg,), "scalar": (B, T, Hg), "vector": (B, T, Hg, K), "channel": (Hg, K)}[kind]
    x = {"q": normal(B, T, Hq, K).to(dtype), "k": normal(B, T, Hk, K).to(dtype), "v": normal(B, T, Hv, V).to(dtype)}
    if shape is not None:
        u = torch.rand(*shape, generator=rng)
        x["log_decay"] = (
            torch.where(u < 0.2, -torch.inf, -u)
            if strength == "reset"
            else torch.full_like(u, -20.0)
            if strength == "20"
            else -strength * u
        )
    state = normal(rows or B, max(Hk, Hv, 1 if shape is None else Hg), K, V)
    return {n: a.to(device) for n, a in x.items()}, state.to(device)


def values_and_gradients(x, state, backend, dtype=None, **options):
    leaves = {n: a.to(dtype or a.dtype).detach().requires_grad_() for n, a in {**x, "state": state}.items()}
    o, (S, *rest) = ops.linear_attention(
        **{n: a for n, a in leaves.items() if n != "state"},
        initial_state=leaves["state"] if "normalizer" not in options else None,
        return_state=True,
        backend=backend,
        **options,
    )
    if "normalizer" in options:
        leaves.pop("state")
    rng = torch.Generator().manual_seed(5)
    weigh = lambda a: (a * torch.randn(a.shape, generator=rng).to(x["v"].dtype).to(a)).sum()
    loss = weigh(o) + weigh(S) + (weigh(rest[0]) if "normalizer" in options else 0.0)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o.detach(), "S": S.detach(), **{"d" + n: a for n, a in zip(leaves, grads, strict=True)}}


def assert_is_the_recurrence(x, state, limit=FP32, **options):
    got = values_and_gradients(x, state, "triton", **options)
    want = values_and_gradients(x, state, "torch", torch.float64, **options)
    for name, value in got.items():
        miss = error(value, want[name])
        assert miss < limit, f"{name}: {miss:.1e}"


@pytest.mark.parametrize(
    ("kind", "T"),
    [*(("scalar", T) for T in (1, 15, 16, 17, 63, 64, 65, 130)), *(("vector", T) for T in (1, 15, 16, 17, 65))],
)
def test_any_length(device, kind, T):
    assert_is_the_recurrence(*operands(device, T, kind=kind, B=1, heads=(1, 1, 1, 1)))


@pytest.mark.parametrize("heads", [(2, 1, 2, 1), (1, 2, 1, 2), (4, 2, 1, 1), (1, 1, 1, 2)])
@pytest.mark.parametrize(("kind", "K", "V"), [("none", 24, 33), ("scalar", 16, 40), ("vector", 12, 16)])
def test_grouped_heads_and_odd_widths(device, kind, heads, K, V):
    assert_is_the_recurrence(*operands(device, 37, K, V, B=1, kind=kind, heads=heads))


@pytest.mark.parametrize("options", [{}, {"log_decay_min": -5.0}], ids=["any decay", "bounded"])
@pytest.mark.parametrize("read", ["after", "before"])
def test_vector_decay_with_and_without_a_bound(device, read, options):
    assert_is_the_recurrence(*operands(device, 70, B=1, kind="vector", heads=(1, 1, 1, 1), strength=5.0), read=read, **options)


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
@pytest.mark.parametrize("read", ["after", "before"])
def test_packed_documents(device, kind, read):
    cu = torch.tensor([0, 0, 33, 34, 34, 60], dtype=torch.int32, device=device)
    assert_is_the_recurrence(*operands(device, 60, kind=kind, B=1, rows=5, heads=(2, 1, 1, 1)), cu_seqlens=cu, read=read)


@pytest.mark.parametrize("strength", [0.0, "20", "reset"])
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_no_decay_strong_decay_and_resets(device, kind, strength):
    assert_is_the_recurrence(*operands(device, 70, kind=kind, B=1, heads=(1, 1, 1, 1), strength=strength))


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_constant_decays(device, kind):
    assert_is_the_recurrence(*operands(device, 40, kind=kind, B=1))


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
@pytest.mark.parametrize("packed", [False, True])
def test_splitting_the_time_is_exact(device, monkeypatch, kind, packed):
    monkeypatch.setattr(_table, "splits", lambda *_: 3)
    T = 200 if device == "cpu" else 4000
    cu = torch.tensor([0, 7, 7, T], dtype=torch.int32, device=device) if packed else None
    x, state = operands(device, T, kind=kind, B=1, rows=3 if packed else 1, heads=(2, 1, 1, 1), strength=0.1)
    assert_is_the_recurrence(x, state, cu_seqlens=cu)


@pytest.mark.parametrize("normalizer", ["sum", "floor"])
@pytest.mark.parametrize(("kind", "heads"), [("none", (1, 1, 1, 1)), ("scalar", (2, 1, 2, 1)), ("scalar", (4, 2, 1, 2))])
def test_splitting_the_time_with_a_normalizer(device, monkeypatch, kind, heads, normalizer):
    monkeypatch.setattr(_table, "splits", lambda *_: 3)
    T = 200 if device == "cpu" else 4000
    cu = torch.tensor([0, 7, 7, T], dtype=torch.int32, device=device) if heads[0] == 2 else None
    x, state = operands(device, T, 16, 24, kind=kind, B=1, heads=heads, rows=1 if cu is None else 3, strength=0.1)
    if normalizer == "sum":
        x["q"], x["k"] = x["q"].abs(), x["k"].abs()
    elif kind == "scalar":
        x["log_gain"] = torch.randn(1, T, heads[3], generator=torch.Generator().manual_seed(1)).to(device)
    assert_is_the_recurrence(x, state, normalizer=normalizer, normalizer_eps=0.3, cu_seqlens=cu)


def test_normalizer_bonus_and_gain(device):
    x, state = operands(device, 40, kind="scalar", B=1)
    x["q"], x["k"] = x["q"].abs(), x["k"].abs()
    assert_is_the_recurrence(x, state, normalizer="sum", normalizer_eps=0.3)


def test_gain_with_a_normalizer_and_shared_heads(device):
    x, state = operands(device, 40, kind="scalar", B=1, heads=(4, 2, 1, 2))
    gain = torch.randn(1, 40, 2, generator=torch.Generator().manual_seed(1)).to(device)
    cu = torch.tensor([0, 7, 40], dtype=torch.int32, device=device)
    assert_is_the_recurrence(x, state, log_gain=gain, normalizer="floor", cu_seqlens=cu)


@pytest.mark.parametrize("normalizer", ["sum", "floor"])
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("kind", ["none", "scalar"])
def test_normalizer_in_the_kernels(device, monkeypatch, kind, gained, normalizer):
    monkeypatch.setattr(_plan, "SHORT", 0)  # blocks of several chunks between the states that the gate's gradient uses
    x, state = operands(device, 170, 16, 24, kind=kind, B=1, heads=(1, 1, 1, 1), strength=0.1)
    if normalizer == "sum":
        x["q"], x["k"] = x["q"].abs(), x["k"].abs()
    if gained:
        x["log_gain"] = torch.randn(1, 170, 1, generator=torch.Generator().manual_seed(1)).to(device)
    assert_is_the_recurrence(x, state, normalizer=normalizer, normalizer_eps=0.3)


@pytest.mark.parametrize("normalizer", ["sum", "floor"])
def test_a_prefill_with_a_normalizer_is_continued(device, normalizer):
    x, _ = operands(device, 40, kind="scalar", B=1)
    x["q"], x["k"] = x["q"].abs(), x["k"].abs()
    x["log_gain"] = torch.randn(1, 40, 1, generator=torch.Generator().manual_seed(1)).to(device)
    part = lambda a, b: {n: y[:, a:b] for n, y in x.items()}
    want = ops.linear_attention(**{n: y.double() for n, y in x.items()}, normalizer=normalizer, backend="torch")[0]
    outputs, state = [], None
    for a, b in ((0, 25), (25, 39), (39, 40)):
        o, state = ops.linear_attention(
            **part(a, b), normalizer=normalizer, initial_state=state, return_state=True, backend="triton"
        )
        outputs.append(o)
    assert error(torch.cat(outputs, 1), want) < FP32


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "K", "V"), [(500, 128, 128), (1500, 64, 96)])
def test_gain_keeps_sixteen_bits(T, K, V):
    """The divisor's kink makes gradients near |n| = floor as uncertain as n: a high floor keeps to what rounding explains."""
    x, state = operands("cuda", T, K, V, kind="scalar", dtype=torch.bfloat16)
    x["log_gain"] = torch.randn(2, T, 2, generator=torch.Generator().manual_seed(1)).cuda() - 4
    assert_is_the_recurrence(x, state, limit=BF16, normalizer="floor")


@pytest.mark.parametrize("kind", ["scalar", "vector"])
@pytest.mark.parametrize("options", [{}, {"log_decay_min": -5.0}], ids=["any decay", "bounded"])
def test_causal_bit_for_bit_and_deterministic(device, kind, options):
    x, state = operands(device, 70, kind=kind, B=1, heads=(1, 1, 1, 1))
    t = 39
    run = lambda y: ops.linear_attention(y["q"], y["k"], y["v"], y["log_decay"], initial_state=state, backend="triton", **options)[
        0
    ]
    changed = {n: a.clone() for n, a in x.items()}
    for a in changed.values():
        a[:, t:] = -4.9 * torch.rand_like(a[:, t:])
    assert torch.equal(run(changed)[:, :t], run(x)[:, :t])
    assert torch.equal(run(x), run(x))


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
@pytest.mark.parametrize("read", ["after", "before"])
def test_decoding_continues_a_prefill(device, kind, read):
    x, state = operands(device, 20, 24, 33, kind=kind, B=1, heads=(4, 2, 1, 1))
    with torch.no_grad():
        run = lambda a, b, S: ops.linear_attention(
            *(y[:, a:b] for y in x.values()), initial_state=S, return_state=True, read=read, backend="triton"
        )
        whole, final = run(0, 20, state)
        parts, S = [], state
        for a, b in ((0, 17), (17, 18), (18, 19), (19, 20)):
            o, S = run(a, b, S)
            parts.append(o)
    assert error(torch.cat(parts, 1), whole) < 1e-5 and error(S[0], final[0]) < 1e-5


def test_importing_linnet_imports_no_triton():
    code = "import sys, linnet, linnet.ops, linnet.ops.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_refusals_say_why(device):
    x, state = operands(device, 8)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        ops.linear_attention(*(a.double() for a in x.values()), backend="triton")
    with pytest.raises(ValueError, match="scale must not be zero"):
        ops.linear_attention(*x.values(), scale=0.0, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "options"), [("none", {}), ("scalar", {}), ("vector", {}), ("vector", {"log_decay_min": -5.0})])
@pytest.mark.parametrize(("T", "K", "V"), [(130, 64, 64), (1000, 128, 128), (65, 256, 100), (63, 100, 257)])
def test_sixteen_bit_operands(kind, options, dtype, T, K, V):
    assert_is_the_recurrence(*operands("cuda", T, K, V, kind=kind, dtype=dtype), limit=BF16, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_compiles_into_one_graph(kind):
    x, state = operands("cuda", 100, 32, 32, kind=kind, dtype=torch.bfloat16)
    run = lambda q, k, v, g: ops.linear_attention(q, k, v, g)[0]
    leaves = [a.requires_grad_() for a in x.values()]
    results = []
    for f in (run, torch.compile(run, fullgraph=True)):
        o = f(*leaves)
        results.append([o, *torch.autograd.grad(o.float().square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert error(got, want) < 5e-3


@pytest.mark.gpu
def test_chosen_without_being_named():
    x, _ = operands("cuda", 8)
    assert ops.choose("linear_attention", {**x, "scale": 1.0}) == "triton"


def test_narrow_heads_have_fewer_warps():
    """Four warps of a tile of 16 channels would all form the same factors; eight of 64 columns in 16 bit would share them."""
    assert [_table.tile("sm90", "scalar", "o", 4, width, 8).warps for width in (8, 16, 24, 32, 64)] == [1, 1, 2, 2, 4]
    assert [_table.delta_tile("sm90", "scalar", "forward", 4, width).warps for width in (16, 32, 64)] == [1, 2, 4]
    assert [_table.dplr_tile("sm90", "cut", "forward", 4, width).warps for width in (16, 32, 64)] == [1, 2, 4]
    assert [_table.tile("sm90", "scalar", "o", 2, 128, V).warps for V in (16, 64, 65, 128)] == [4, 4, 8, 8]
    assert [_table.tile("sm90", "scalar", "dq", 2, 128, V).warps for V in (16, 64, 65, 128)] == [4, 4, 4, 4]
