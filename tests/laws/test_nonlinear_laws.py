"""Laws of almost_linear_rnn and slstm, over both backends, in fp64."""

from __future__ import annotations

import pytest
import torch

import linnet
from linnet import ops

OPS = ("alrnn", "alrnn-forced", "slstm")
every_op = pytest.mark.parametrize("case", OPS)


def operands(case: str, batch: int, tokens: int, rows: int, seed: int = 0) -> tuple[dict, dict, tuple]:
    """(operands with a time axis, the others, initial state), leaves that require gradients."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()
    if case == "slstm":
        H, K = 2, 3
        state = [normal(rows, H, K) for _ in range(4)]
        state[2] = state[2].detach().abs().add(0.3).requires_grad_()
        return {"x_BTHGK": normal(batch, tokens, H, 4, K)}, {"weight_HKGK": normal(H, K, 4, K)}, tuple(state)
    M = 5
    time = {"x_BTM": normal(batch, tokens, M)}
    if case == "alrnn-forced":
        strength = torch.rand(batch, tokens, M, generator=rng, dtype=torch.float64)
        strength[..., :2] = strength[..., :2].round()
        time |= {"target_BTM": normal(batch, tokens, M), "strength_BTM": strength.requires_grad_()}
    weight = (0.4 * normal(M, M)).detach().requires_grad_()
    return time, {"decay_M": (0.5 * normal(M)).detach().requires_grad_(), "weight_MM": weight}, (normal(rows, M),)


def run(case: str, time: dict, other: dict, state=None, **options):
    options = {"return_state": True} | options
    if case == "slstm":
        return ops.slstm(**time, **other, initial_state=state, **options)
    return ops.almost_linear_rnn(**time, **other, relu_units=2, initial_state=state, **options)


def close(actual, expected, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@every_op
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("lengths", [None, [3, 0, 6, 1, 0], [0, 0, 4]])
def test_backends_agree_in_values_and_gradients(case, given, lengths):
    batch, tokens = (2, 7) if lengths is None else (1, sum(lengths))
    rows = batch if lengths is None else len(lengths)
    cu = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    results = []
    for backend in ("reference", "torch"):
        time, other, state = operands(case, batch, tokens, rows)
        y, new = run(case, time, other, state if given else None, cu_seqlens=cu, backend=backend)
        rng = torch.Generator().manual_seed(5)
        outputs = (y, *new)
        loss = sum((p * torch.randn(p.shape, generator=rng, dtype=p.dtype)).sum() for p in outputs)
        loss.backward()
        leaves = {**time, **other} | ({f"state {i}": s for i, s in enumerate(state)} if given else {})
        results.append([*outputs, *(leaf.grad for leaf in leaves.values())])
    for expected, actual in zip(*results, strict=True):
        close(actual, expected)


@every_op
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_any_split_equals_the_whole(case, backend):
    grads = []
    for cuts in ([], [1], [4, 5]):
        time, other, state = operands(case, 2, 9, 2)
        parts, values = [], state
        for start, end in zip([0, *cuts], [*cuts, 9], strict=True):
            y, values = run(case, {k: x[:, start:end] for k, x in time.items()}, other, values, backend=backend)
            parts.append(y)
        whole = torch.cat(parts, 1)
        (whole * torch.arange(9).view(1, 9, *[1] * (whole.ndim - 2))).sum().backward()
        grads.append([whole, *values, *(leaf.grad for leaf in (*time.values(), *other.values(), *state))])
    for expected, *others in zip(*grads, strict=True):
        for actual in others:
            close(actual, expected)


@every_op
def test_packed_documents_equal_separate_documents(case):
    lengths = [4, 0, 1, 6]
    time, other, state = operands(case, 1, sum(lengths), len(lengths))
    cu = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    y, new = run(case, time, other, state, cu_seqlens=cu)
    for row, (start, length) in enumerate(zip(cu.tolist(), lengths, strict=False)):
        if length == 0:
            close([p[row] for p in new], [p[row] for p in state])
            continue
        part = {k: x[:, start : start + length] for k, x in time.items()}
        z, alone = run(case, part, other, tuple(p[row : row + 1] for p in state))
        close(y[:, start : start + length], z)
        close([p[row] for p in new], [p[0] for p in alone])


@every_op
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(case):
    time, other, _ = operands(case, 2, 9, 2)
    y, _ = run(case, time, other)
    for name in time:
        changed = dict(time) | {name: time[name].detach().clone()}
        changed[name][:, 5:] += 1
        z, _ = run(case, changed, other)
        assert torch.equal(z[:, :5], y[:, :5]) and not torch.equal(z[:, 5:], y[:, 5:])


@torch.no_grad()
def test_forcing_of_strength_one_replaces_the_unit_and_stops_its_gradient():
    time, other, _ = operands("alrnn-forced", 1, 4, 1)
    x, target, strength = (time[name].detach() for name in ("x_BTM", "target_BTM", "strength_BTM"))
    strength.zero_()
    strength[:, 2] = 1
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        z, _ = ops.almost_linear_rnn(leaf, **other, relu_units=2, target_BTM=target, strength_BTM=strength)
        z[:, 3].sum().backward()
    free, _ = ops.almost_linear_rnn(x[:, 2:], **other, relu_units=2, initial_state=target[:, 2])
    close(z[:, 2:].detach(), free)
    assert bool((leaf.grad[:, :2] == 0).all()) and bool((leaf.grad[:, 2] != 0).any())


@torch.no_grad()
def test_huge_gates_stay_finite():
    """Input gates of e^500 and forget gates of e^-500: only ratios of the stored C and n are formed."""
    _, other, _ = operands("slstm", 1, 6, 1)
    big = 500 * torch.randn(1, 6, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for backend in ("reference", "torch"):
        y, new = run("slstm", {"x_BTHGK": big}, other, backend=backend)
        assert bool(y.isfinite().all()) and all(bool(s.isfinite().all()) for s in new)
        assert float(y.abs().max()) <= 1


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_lower_precision_computes_in_fp32(case, dtype):
    time, other, _ = operands(case, 2, 9, 2)
    low = lambda given: {k: x.to(dtype) for k, x in given.items()}
    y, new = run(case, low(time), low(other))
    exact, _ = run(case, *({k: x.double() for k, x in low(given).items()} for given in (time, other)))
    assert y.dtype == dtype and all(s.dtype == torch.float32 for s in new)
    assert float((y.double() - exact).norm() / exact.norm()) < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]


@every_op
def test_double_backward_is_refused(case):
    time, other, _ = operands(case, 1, 3, 1)
    leaf = next(iter(time.values()))
    y, _ = run(case, time, other, backend="torch")
    (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        grad.sum().backward()


@every_op
def test_compiles_as_one_graph(case):
    time, other, state = operands(case, 2, 5, 2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t, o, s: run(case, t, o, s), fullgraph=True, backend="aot_eager")
    close(compiled(time, other, state)[0], run(case, time, other, state)[0])


def bad(case: str, **changes):
    time, other, state = operands(case, 2, 3, 2)
    given = {**time, **other, "initial_state": state} | changes
    return (ops.slstm if case == "slstm" else ops.almost_linear_rnn)(**({"relu_units": 2} if case != "slstm" else {}) | given)


X = torch.zeros(2, 3, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    "case,changes,argument",
    [
        ("alrnn", {"x_BTM": X[0]}, "x_BTM"),
        ("alrnn", {"x_BTM": X[:, :0]}, "x_BTM"),
        ("alrnn", {"decay_M": X[0]}, "decay_M"),
        ("alrnn", {"weight_MM": X[0]}, "weight_MM"),
        ("alrnn", {"relu_units": 6}, "relu_units"),
        ("alrnn", {"relu_units": True}, "relu_units"),
        ("alrnn", {"target_BTM": X}, "strength_BTM"),
        ("alrnn", {"target_BTM": X, "strength_BTM": X[:1]}, "strength_BTM"),
        ("alrnn", {"initial_state": (X[0],)}, "initial_state"),
        ("slstm", {"x_BTHGK": X}, "x_BTHGK"),
        ("slstm", {"weight_HKGK": X}, "weight_HKGK"),
        ("slstm", {"initial_state": (X,)}, "initial_state"),
        ("slstm", {"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens"),
    ],
)
def test_bad_arguments_are_refused_by_name(case, changes, argument):
    with pytest.raises(ValueError, match=f"argument '{argument}' must be .*; got "):
        bad(case, **changes)


def test_nan_is_found_in_debug_mode():
    with linnet.debug(), pytest.raises(ValueError, match="'x_BTM' must be free of NaN"):
        bad("alrnn", x_BTM=X * torch.nan)
