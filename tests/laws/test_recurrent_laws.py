"""Laws of linear_attention, delta_rule and dplr: the chunkwise backend is the recurrence, whatever the chunk, split or packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recurrent_cases import Call, calls, offsets

import linnet.ops as ops
from linnet.ops._dispatch import execute

few = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TOLERANCE = 1e-12


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative root-mean-square error; infinite where one is finite and the other is not."""
    if got.shape != want.shape:
        raise AssertionError(f"shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    finite = torch.isfinite(want)
    if not torch.equal(got[~finite], want[~finite]):
        return float("inf")
    got, want = got[finite], want[finite]
    return float((got - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0


def flatten(result) -> list[torch.Tensor]:
    o, state, *rest = result
    return [o, *(state or ()), *(x for pair in rest for x in pair)]


def values_and_gradients(call: Call, backend: str, **extra):
    """Outputs, and gradients of a random functional of the outputs and the final state (of true, unscaled quantities)."""
    tensors = {n: x.clone().requires_grad_() for n, x in call.tensors.items()}
    state = None if call.state is None else tuple(x.clone().requires_grad_() for x in call.state)
    outputs = flatten(call.run(backend, tensors=tensors, state=state, **extra))
    rng = torch.Generator().manual_seed(1)
    loss = 0.0
    for x in outputs:
        if x.requires_grad:
            weight = torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.dtype)
            loss = loss + (torch.where(torch.isfinite(x), x, 0) * weight).sum()
    leaves = [*tensors.values(), *(state or ())]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    names = [*tensors, *(f"state{i}" for i in range(len(state or ())))]
    return [x.detach() for x in outputs], {n: g for n, g in zip(names, grads, strict=True) if g is not None}


def assert_same(got, want, tolerance=TOLERANCE):
    (outputs, grads), (expected, expected_grads) = got, want
    for i, (x, y) in enumerate(zip(outputs, expected, strict=True)):
        assert error(x, y) < tolerance, f"output {i}: {error(x, y):.1e}"
    assert grads.keys() == expected_grads.keys()
    for name, y in expected_grads.items():
        assert error(grads[name], y) < tolerance, f"gradient of {name}: {error(grads[name], y):.1e}"


@few
@given(calls())
def test_torch_backend_is_the_recurrence(call):
    assert_same(values_and_gradients(call, "torch"), values_and_gradients(call, "reference"))


@few
@given(calls(), st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]))
def test_chunk_size_changes_nothing(call, chunk):
    arguments = captured_arguments(call)
    want = flatten(execute(call.op, "torch", arguments))
    got = flatten(execute(call.op, "torch", {**arguments, "chunk": chunk}))
    for x, y in zip(got, want, strict=True):
        assert error(x, y) < TOLERANCE


def captured_arguments(call: Call) -> dict:
    """The checked arguments that the public operator hands to its backend."""
    seen = {}
    with ops.use_handler(lambda op, backend, arguments: seen.update(arguments) or execute(op, backend, arguments)):
        call.run("torch")
    return seen


@few
@given(calls(packed=False), st.data())
def test_any_split_is_the_whole(call, data):
    T = call.tokens
    cuts = sorted(data.draw(st.sets(st.integers(1, max(T - 1, 1)), max_size=3))) if T > 1 else []
    bounds = [0, *cuts, T]
    o, state = call.run("torch")
    parts, carried = [], call.state
    for start, end in zip(bounds, bounds[1:], strict=False):
        part, carried = call.run("torch", tensors=call.slice(start, end), state=carried)
        parts.append(part)
    assert error(torch.cat(parts, 1), o) < 1e-11
    # the stabiliser may differ by rounding; the true state may not
    for x, y in zip(true_state(call, carried), true_state(call, state), strict=True):
        assert error(x, y) < 1e-11


def true_state(call: Call, state):
    if "log_gain" not in call.tensors:
        return state
    *stored, m = state
    shift = m.amax()  # a common factor, so that e^m stays in range
    return [x * (m - shift).exp().reshape(m.shape + (1,) * (x.ndim - 2)) for x in stored] + [shift[None]]


@few
@given(calls(packed=False, lengths=(17, 64, 65, 100)))
def test_token_by_token_decoding_is_the_whole(call):
    o, _ = call.run("torch")
    state, parts = call.state, []
    for t in range(call.tokens):
        part, state = call.run("torch", tensors=call.slice(t, t + 1), state=state)
        parts.append(part)
    assert error(torch.cat(parts, 1), o) < 1e-11


@few
@given(calls(packed=False, lengths=(17, 64, 65, 100), dtype=torch.float32), st.data())
def test_causal_bit_for_bit(call, data):
    t = data.draw(st.integers(1, call.tokens - 1))
    o, _ = call.run("torch")
    rng = torch.Generator().manual_seed(7)
    changed = dict(call.tensors)
    for name, x in call.tensors.items():
        if call.has_time(name):
            n = call.steps if name in call.per_step else 1
            x = x.clone()
            noise = torch.rand(x[:, t * n :].shape, generator=rng)
            x[:, t * n :] = -50 * noise if name in ("log_decay", "log_gain") else noise
            changed[name] = x
    perturbed, _ = call.run("torch", tensors=changed)
    assert torch.equal(perturbed[:, :t], o[:, :t])


@few
@given(calls(packed=True))
def test_packed_documents_are_separate_documents(call):
    bounds = call.cu_seqlens.tolist()
    outputs, grads = values_and_gradients(call, "torch")
    singles, total = [], {}
    tensors = {n: x.clone().requires_grad_() for n, x in call.tensors.items()}
    state = None if call.state is None else tuple(x.clone().requires_grad_() for x in call.state)
    finals = []
    for row, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        own = None if state is None else tuple(x[row : row + 1] for x in state)
        if start == end:
            finals.append(own)
            continue
        o, final = call.run("torch", tensors=call.slice(start, end, tensors), state=own, cu_seqlens=None)
        singles.append(o)
        finals.append(final)
    assert error(torch.cat(singles, 1), outputs[0]) < TOLERANCE
    rng = torch.Generator().manual_seed(1)
    loss = (torch.cat(singles, 1) * torch.randn(outputs[0].shape, generator=rng, dtype=outputs[0].dtype)).sum()
    for index, x in enumerate(outputs[1:]):
        weight = torch.randn(x.shape, generator=rng, dtype=x.dtype)
        for row, final in enumerate(finals):
            if final is not None:
                assert error(final[index][0], x[row]) < TOLERANCE
                if final[index].requires_grad:
                    loss = loss + (torch.where(torch.isfinite(final[index][0]), final[index][0], 0) * weight[row]).sum()
    names = [*tensors, *(f"state{i}" for i in range(len(state or ())))]
    leaves = dict(zip(names, [*tensors.values(), *(state or ())], strict=True))
    total = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
    for name, g in grads.items():
        if total[name] is not None:
            assert error(total[name], g) < TOLERANCE, name


@pytest.mark.parametrize("strength", [0.0, 20.0, float("inf")])
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule", "dplr"])
@pytest.mark.parametrize("channels", [1, 16])
def test_any_decay_in_single_precision(op, channels, strength):
    """fp32 stays within fp32 rounding of the fp64 recurrence for every tensor, the gradient of the gate included."""
    rng = torch.Generator().manual_seed(0)
    T, H, K = 130, 2, 16
    randn = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    g = -strength * torch.rand(1, T, H, channels, generator=rng, dtype=torch.float64)
    strong = torch.rand(1, T, H, channels, generator=rng) < 0.5
    g = torch.where(strong, torch.nan_to_num(g, nan=0.0, neginf=-torch.inf), -0.01)
    tensors = {"q": randn(1, T, H, K), "k": unit(randn(1, T, H, K)), "v": randn(1, T, H, K)}
    tensors["log_decay"] = g.squeeze(-1) if channels == 1 else g
    if op == "delta_rule":
        tensors["erase"] = torch.rand(1, T, H, generator=rng, dtype=torch.float64)
    if op == "dplr":
        kappa = unit(randn(1, T, H, K))
        tensors |= {"a": -kappa, "b": kappa * torch.rand(1, T, H, K, generator=rng, dtype=torch.float64)}
    single = values_and_gradients(Call(op, {n: x.float() for n, x in tensors.items()}, {}), "torch")
    rounded = values_and_gradients(Call(op, {n: x.float().double() for n, x in tensors.items()}, {}), "reference")
    as_double = ([x.double() for x in single[0]], {n: x.double() for n, x in single[1].items()})
    assert all(bool(torch.isfinite(x).all()) for x in [*single[0], *single[1].values()])
    assert_same(as_double, rounded, 2e-5)


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("keys", ["repeated", "correlated"])
def test_delta_rule_with_repeated_and_correlated_keys(keys, beta):
    rng = torch.Generator().manual_seed(0)
    T, H, K = 128, 2, 16
    base = torch.randn(1, 1, H, K, generator=rng, dtype=torch.float64)
    noise = 0.0 if keys == "repeated" else 0.3
    k = base + noise * torch.randn(1, T, H, K, generator=rng, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    tensors = {"q": torch.randn(1, T, H, K, generator=rng).double(), "k": k, "v": torch.randn(1, T, H, K, generator=rng).double()}
    tensors["erase"] = torch.full((1, T, H), beta, dtype=torch.float64)
    exact = values_and_gradients(Call("delta_rule", {n: x.float().double() for n, x in tensors.items()}, {}), "reference")
    single = values_and_gradients(Call("delta_rule", {n: x.float() for n, x in tensors.items()}, {}), "torch")
    # beta = 2 preserves norms, so that rounding errors add up instead of fading: 128 steps of fp32
    got = [x.double() for x in single[0]], {n: x.double() for n, x in single[1].items()}
    assert_same(got, exact, 2e-5 if beta == 1 else 2e-4)


@few
@given(calls(packed=False))
def test_state_can_be_saved_reordered_and_resumed(call):
    if call.tokens < 2 or call.tensors["q"].shape[0] < 2:
        return
    half = call.tokens // 2
    o, _ = call.run("torch")
    _, state = call.run("torch", tensors=call.slice(0, half))
    order = torch.tensor([1, 0])
    swapped = {n: (x[order] if call.has_time(n) else x) for n, x in call.slice(half, call.tokens).items()}
    rest, _ = call.run("torch", tensors=swapped, state=tuple(x.clone()[order] for x in state))
    assert error(rest[order], o[:, half:]) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule", "dplr"])
def test_no_drift_over_64k_tokens(op):
    rng = torch.Generator().manual_seed(0)
    T, K = 65536, 32
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    tensors = {"q": torch.randn(1, T, 1, K, generator=rng), "k": unit(torch.randn(1, T, 1, K, generator=rng))}
    tensors |= {"v": torch.randn(1, T, 1, K, generator=rng), "log_decay": -0.01 * torch.rand(1, T, 1, K, generator=rng)}
    if op == "delta_rule":
        tensors["erase"] = torch.rand(1, T, 1, generator=rng)
    if op == "dplr":
        kappa = unit(torch.randn(1, T, 1, K, generator=rng))
        tensors |= {"a": -kappa, "b": kappa * torch.rand(1, T, 1, K, generator=rng)}
    o, (S,) = Call(op, tensors, {}).run("torch")
    want, (S64,) = Call(op, {n: x.double() for n, x in tensors.items()}, {}).run("torch")
    assert error(o.double()[:, -1024:], want[:, -1024:]) < 1e-5
    assert error(S.double(), S64) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_single(dtype):
    rng = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(1, 70, 2, 8, generator=rng).to(dtype) for n in "qkv"}
    tensors["k"] = tensors["k"] / 4
    o, (S,) = Call("linear_attention", tensors, {}).run("torch")
    exact, (S64,) = Call("linear_attention", {n: x.double() for n, x in tensors.items()}, {}).run("reference")
    assert o.dtype == dtype and S.dtype == torch.float32
    assert error(S.double(), S64) < 1e-5 and error(o.double(), exact) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_double_backward_is_refused():
    x = torch.randn(1, 20, 1, 4, requires_grad=True)
    o, _ = ops.linear_attention(x, x, x, backend="torch")
    (g,) = torch.autograd.grad(o.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_attention: double backward"):
        torch.autograd.grad(g.sum(), x)


def good(T=6, H=2, K=4, V=4):
    return {"q": torch.randn(1, T, H, K), "k": torch.randn(1, T, H, K), "v": torch.randn(1, T, H, V)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.randn(1, 5, 2, 4)}, ["'k'", "size 6", "(1, 5, 2, 4)"]),
        ({"v": torch.randn(1, 6, 3, 4)}, ["divides 3", "2 heads"]),
        ({"q": torch.randn(6, 2, 4)}, ["'q'", "[B, T, H, K]", "(6, 2, 4)"]),
        ({"k": torch.randn(1, 6, 2, 4).double()}, ["'k'", "dtype of 'q'", "float64"]),
        ({"log_decay": torch.zeros(1, 6, 2, 3)}, ["'log_decay'", "size 4", "key channels"]),
        ({"read": "later"}, ["'read'", "'after'", "'later'"]),
        ({"normalizer": "max"}, ["'normalizer'", "'floor'", "'max'"]),
        ({"steps_per_token": 0}, ["'steps_per_token'", ">= 1", "0"]),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, ["'cu_seqlens'", "int32", "float32"]),
        ({"initial_state": torch.zeros(1, 2, 4, 3)}, ["'initial_state'", "[1, 2, 4, 4]", "(1, 2, 4, 3)"]),
        ({"bonus": torch.zeros(2, 4)}, ["'bonus'", "read='before'"]),
        ({"backend": "cuda"}, ["backend", "'cuda'", "reference"]),
        ({"log_decay_min": 1.0}, ["'log_decay_min'", "<= 0", "1.0"]),
    ],
)
def test_bad_input_is_refused_by_name(change, words):
    arguments = {**good(), **change}
    with pytest.raises(ValueError) as caught:
        ops.linear_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"log_decay": torch.ones(2)}, ["'log_decay'", "<= 0", "1.0"]),
        ({"log_decay": torch.full((2,), -2.0), "log_decay_min": -1.0}, ["'log_decay'", "-1.0", "-2.0"]),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, ["'cu_seqlens'", "non-decreasing", "[0, 4, 3, 6]"]),
        ({"q": torch.full((1, 6, 2, 4), float("nan"))}, ["'q'", "NaN", "48"]),
    ],
)
def test_debug_mode_checks_values(change, words):
    import linnet

    arguments = {**good(), **change}
    with linnet.debug(), pytest.raises(ValueError) as caught:
        ops.linear_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule", "dplr"])
def test_compiles_as_one_graph(op):
    def f(q, k, v, g, beta):
        if op == "linear_attention":
            return ops.linear_attention(q, k * beta[..., None], v, g, return_state=True)
        if op == "delta_rule":
            return ops.delta_rule(q, k, v, erase=beta, log_decay=g, return_state=True)
        return ops.dplr(q, k, v, -k, k * beta[..., None], g, return_state=True)

    rng = torch.Generator().manual_seed(0)
    x = [torch.randn(1, 70, 2, 8, generator=rng) / 4 for _ in range(3)]
    x += [-torch.rand(1, 70, 2, generator=rng), torch.rand(1, 70, 2, generator=rng)]
    results = []
    for function in (f, torch.compile(f, fullgraph=True)):
        leaves = [y.clone().requires_grad_() for y in x]
        o, (S,) = function(*leaves)
        results.append([o, S, *torch.autograd.grad(o.sum() + S.square().sum(), leaves)])
    for got, want in zip(results[1], results[0], strict=True):
        assert error(got, want) < 1e-5


def test_custom_operators_are_well_formed():
    """PyTorch's own check of schema, fake implementation and autograd registration."""
    from linnet.ops.torch import recurrent as r

    x = torch.randn(1, 9, 2, 4, dtype=torch.float64, requires_grad=True)
    g = -torch.rand(1, 9, 2, 1, dtype=torch.float64)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(r.linear_op.library, (x, x, x, g, None, None, 1.0, False, 2, 4, True, torch.float64), test_utils=tests)
    gates = (g.exp(), None, g, None, None)
    torch.library.opcheck(
        r.delta_op.library, (x, None, x, x, *gates, 1.0, False, False, 2, 4, True, torch.float64), test_utils=tests
    )
    torch.library.opcheck(r.dplr_op.library, (x, x, x, x, x, g, None, None, 1.0, 2, 4, True, torch.float64), test_utils=tests)
    cu = offsets([4, 5])
    torch.library.opcheck(r.linear_op.library, (x, x, x, g, None, cu, 1.0, False, 2, 4, True, torch.float64), test_utils=tests)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_normaliser_without_eps_holds_for_any_gain(backend):
    """The ratio does not depend on a common log-gain, however small or large, where nothing is added to the divisor."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 20, 2, 4, generator=rng) + 0.1 for _ in range(3))
    gain = torch.randn(1, 20, 2, generator=rng)
    results = [
        ops.linear_attention(q, k, v, log_gain=gain + shift, normalizer="sum", normalizer_eps=0.0, backend=backend)[0]
        for shift in (0.0, -300.0, 300.0)
    ]
    # the gains themselves are rounded at 300 in fp32
    assert error(results[1], results[0]) < 1e-4 and error(results[2], results[0]) < 1e-4
