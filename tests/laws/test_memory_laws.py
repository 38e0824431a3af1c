"""Laws of neural_memory: the torch backend is the token-by-token definition, in fp64 to 1e-12, gradients of everything included."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linnet import ops

few = settings(max_examples=25, deadline=None, derandomize=True)
TOLERANCE = 1e-12
H, K = 2, 3
GATES = ("rate", "log_decay", "log_momentum", "read_scale")
WIDE = torch.zeros(2, 4, 5, dtype=torch.float64)


@dataclass
class Call:
    """Operands by name; weights, biases and state are lists of tensors."""

    tensors: dict[str, Tensor]
    weights: list[Tensor]
    biases: list[Tensor] | None = None
    state: tuple[Tensor, ...] | None = None
    cu_seqlens: Tensor | None = None
    options: dict = field(default_factory=dict)

    def run(self, backend: str | None = "torch", **extra):
        return ops.neural_memory(
            **self.tensors, weights=self.weights, biases=self.biases, initial_state=self.state, cu_seqlens=self.cu_seqlens,
            return_state=True, backend=backend, **self.options | extra,
        )  # fmt: skip

    def part(self, start: int, end: int, state) -> Call:
        cut = {n: x if n.startswith("norm") else x[:, start:end] for n, x in self.tensors.items()}
        return replace(self, tensors=cut, state=state)

    def results(self, backend: str, asked: str = "") -> dict[str, Tensor]:
        """Outputs, final state and the gradients of a random linear functional of those whose names begin with `asked`."""
        leaf = lambda x: x.detach().clone().requires_grad_(x.is_floating_point())
        own = Call(
            {n: leaf(x) for n, x in self.tensors.items()}, [leaf(w) for w in self.weights],
            None if self.biases is None else [leaf(b) for b in self.biases],
            None if self.state is None else tuple(leaf(x) for x in self.state), self.cu_seqlens, self.options,
        )  # fmt: skip
        rng = torch.Generator().manual_seed(5)
        o, (count, *state) = own.run(backend)
        outputs = {"o": o} | {f"state{i}": x for i, x in enumerate(state)}
        weigh = lambda x: (x * torch.randn(x.shape, generator=rng, dtype=x.dtype)).sum()
        loss = sum(weigh(x) for name, x in outputs.items() if name.startswith(asked))
        leaves = (
            own.tensors | {f"w{i}": x for i, x in enumerate(own.weights)} | {f"b{i}": x for i, x in enumerate(own.biases or ())}
        )
        leaves |= {f"s{i}": x for i, x in enumerate(own.state[1:])} if own.state is not None else {}
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        zero = lambda x, g: torch.zeros_like(x) if g is None else g
        return outputs | {"count": count} | {f"d{n}": zero(x, g) for (n, x), g in zip(leaves.items(), grads, strict=True)}


@st.composite
def calls(draw, packed: bool | None = None, lengths=(1, 2, 7, 16, 33), linear: bool | None = None):
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    cu, flip = None, lambda: draw(st.booleans())
    if flip() if packed is None else packed:
        sizes = draw(st.lists(st.sampled_from([0, 1, 2, 5, 19]), min_size=1, max_size=5).filter(any))
        cu = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)
        batch, tokens, rows = 1, sum(sizes), len(sizes)
    else:
        batch = rows = draw(st.sampled_from([1, 3]))
        tokens = draw(st.sampled_from(lengths))
    depth = 1 if linear else draw(st.sampled_from([1, 2, 3]))
    widths = [K, *[4] * (depth - 1), K if flip() else 5]
    tensors = {"q": normal(batch, tokens, H, K), "k": 0.7 * normal(batch, tokens, H, K), "v": normal(batch, tokens, H, widths[-1])}
    tensors["rate"] = 0.2 * torch.rand(batch, tokens, H, generator=rng, dtype=torch.float64)
    if flip():
        tensors["log_decay"] = -torch.rand(batch, tokens, 1, generator=rng, dtype=torch.float64)
    if flip():
        tensors["log_momentum"] = -1 - normal(batch, tokens, H).exp()
    if not linear and flip():
        tensors["read_scale"] = 0.3 + torch.rand(batch, tokens, H, generator=rng, dtype=torch.float64)
    if not linear and flip():
        tensors |= {"norm_weight": 1 + 0.3 * normal(H, widths[-1]), "norm_bias": normal(H, widths[-1])}
    size = draw(st.sampled_from([1, 3, 4, 16]))
    weights = [0.5 * normal(H, a, b) for a, b in zip(widths, widths[1:], strict=False)]
    call = Call(tensors, weights, [normal(H, b) for b in widths[1:]] if flip() else None, cu_seqlens=cu)
    call.options = {
        "mini_batch": size,
        "residual": widths[-1] == K and flip(),
        "activation": draw(st.sampled_from(["gelu", "silu", "relu2"])),
        "norm_eps": 0.1,  # with 1e-6 a LayerNorm of forgotten weights turns one ulp of an operand into 1e-7, in the reference alone
    }
    if flip():
        total = sum(w[0].numel() for w in weights) + sum(b[0].numel() for b in call.biases or ())
        extra = (size > 1) + ("log_momentum" in tensors)
        count = torch.randint(0, 40, (rows,), generator=rng)
        W, *more = (0.5 * normal(rows, H, total) for _ in range(1 + extra))
        if size > 1:  # the weights differ from those of the gradients only inside a mini-batch
            more[0] = torch.where((count % size == 0)[:, None, None], W, more[0])
        call.state = (count, W, *more)
    return call


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    return float((got - want).detach().abs().max() / want.detach().abs().max().clamp_min(1e-12)) if want.numel() else 0.0


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, x in want.items():
        assert error(got[name], x) < TOLERANCE, f"{name}: {error(got[name], x):.1e}"


@settings(few, max_examples=30)
@given(calls())
def test_torch_backend_is_the_recurrence(call):
    assert_same(call.results("torch"), call.results("reference"))


@settings(few, max_examples=10)
@given(calls(), st.sampled_from(["o", "state"]))
def test_a_loss_on_the_output_or_the_state_alone(call, asked):
    assert_same(call.results("torch", asked), call.results("reference", asked))


@settings(few, max_examples=8)
@given(calls(linear=True, packed=False, lengths=(63, 64, 65, 130)))
def test_chunks_of_a_linear_memory_are_the_recurrence(call):
    assert_same(call.results("torch"), call.results("reference"))


@few
@given(calls(packed=False), st.lists(st.floats(0, 1), min_size=1, max_size=3), st.sampled_from(["torch", "reference"]))
def test_any_split_is_the_whole(call, where, backend):
    whole, final = call.run(backend)
    tokens, state, pieces = whole.shape[1], call.state, []
    cuts = sorted({round(w * tokens) for w in where} - {0, tokens})
    for start, end in zip([0, *cuts], [*cuts, tokens], strict=True):
        o, state = call.part(start, end, state).run(backend)
        pieces.append(o)
    assert error(torch.cat(pieces, 1), whole) < TOLERANCE
    for got, want in zip(state, final, strict=True):
        assert error(got, want) < TOLERANCE


@few
@given(calls(packed=True))
def test_packed_segments_are_separate_rows(call):
    o, state = call.run()
    edges = call.cu_seqlens.tolist()
    for row, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        own = None if call.state is None else tuple(x[row : row + 1] for x in call.state)
        if start == end:
            continue
        alone, final = replace(call.part(start, end, own), cu_seqlens=None).run()
        assert error(o[:, start:end], alone) < TOLERANCE
        for got, want in zip(state, final, strict=True):
            assert error(got[row : row + 1], want) < TOLERANCE


@few
@given(calls(packed=False, lengths=(33, 70)), st.integers(0, 32), st.sampled_from(("q", "k", "v", *GATES)))
def test_a_token_moves_nothing_before_it_bit_for_bit(call, token, name):
    if name not in call.tensors:
        return
    other = dict(call.tensors)
    other[name] = other[name].clone()
    other[name][:, token] *= 0.5
    before, after = call.run()[0], replace(call, tensors=other).run()[0]
    assert torch.equal(before[:, :token], after[:, :token])
    if name not in GATES[1:]:  # these may meet an empty memory
        assert not torch.equal(before[:, token:], after[:, token:])


def plain(batch=1, tokens=9, heads=2, key=4, value=4, seed=0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    return {
        "q": normal(batch, tokens, heads, key), "k": normal(batch, tokens, heads, key) / key**0.5,
        "v": normal(batch, tokens, heads, value), "rate": torch.rand(batch, tokens, heads, generator=rng, dtype=torch.float64),
    }  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 40, 129])
def test_a_linear_memory_of_single_tokens_is_the_gated_delta_rule(tokens):
    x = plain(2, tokens, value=5)
    g, W = -torch.rand(2, tokens, 2, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    o, state = ops.neural_memory(**x, weights=(W,), log_decay=g, mini_batch=1, return_state=True)
    want, (S,) = ops.delta_rule(
        x["q"], x["k"], x["v"], erase=x["rate"], log_decay=g, erase_read="before_decay", scale=1.0,
        initial_state=(W.expand(2, -1, -1, -1),), return_state=True,
    )  # fmt: skip
    assert error(o, want) < TOLERANCE and error(state[1], S.flatten(2)) < TOLERANCE


def test_one_mini_batch_of_a_linear_memory_from_zero_is_linear_attention():
    x = plain(1, 12)
    o, _ = ops.neural_memory(**x, weights=(torch.zeros(2, 4, 4, dtype=torch.float64),), mini_batch=12)
    want, _ = ops.linear_attention(x["q"], x["k"], x["rate"][..., None] * x["v"], scale=1.0)
    assert error(o, want) < TOLERANCE


def test_a_decay_of_minus_infinity_forgets_everything_before():
    """Two memories with different pasts agree from the last token of a mini-batch on, if it forgets and does not learn."""
    x, outputs = plain(1, 20), []
    g = torch.zeros(1, 20, 2, dtype=torch.float64)
    g[:, 7], x["rate"][:, 7] = -torch.inf, 0
    for seed in (1, 2):
        past = plain(1, 20, seed=seed)
        own = x | {name: torch.cat((past[name][:, :7], x[name][:, 7:]), 1) for name in ("k", "v")}
        o, _ = ops.neural_memory(**own, weights=(past["q"][0, :4].transpose(0, 1),), log_decay=g, mini_batch=4)
        assert bool(o.isfinite().all())
        outputs.append(o)
    assert torch.equal(outputs[0][:, 7:], outputs[1][:, 7:]) and not torch.equal(outputs[0][:, :7], outputs[1][:, :7])


def test_double_backward_is_refused():
    x = plain()
    q = x.pop("q").requires_grad_()
    o, _ = ops.neural_memory(q, **x, weights=(torch.randn(2, 4, 4, dtype=torch.float64),), mini_batch=4)
    (g,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


@pytest.mark.parametrize(
    "change,named",
    [
        ({"rate": torch.zeros(1, 9, dtype=torch.float64)}, "rate"),
        ({"weights": ()}, "weights"),
        ({"weights": (torch.zeros(2, 4, 3, dtype=torch.float64),)}, "weights"),
        ({"biases": (torch.zeros(2, 3, dtype=torch.float64),)}, "biases"),
        ({"norm_weight": torch.ones(2, 4, dtype=torch.float64)}, "norm_bias"),
        (
            {
                "v": torch.zeros(1, 9, 2, 5, dtype=torch.float64),
                "residual": True,
                "weights": (torch.zeros(2, 4, 5, dtype=torch.float64),),
            },
            "residual",
        ),
        ({"activation": "tanh"}, "activation"),
        ({"mini_batch": 0}, "mini_batch"),
        ({"log_momentum": torch.zeros(1, 8, 2, dtype=torch.float64)}, "log_momentum"),
        ({"initial_state": (torch.zeros(1, dtype=torch.int64),)}, "initial_state"),
        ({"q": torch.zeros(1, 9, 2, dtype=torch.float64)}, "q"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, named):
    arguments = plain() | {"weights": (torch.zeros(2, 4, 4, dtype=torch.float64),)} | change
    with pytest.raises(ValueError, match=f"neural_memory: argument '{named}' must be .*; got "):
        ops.neural_memory(**arguments)
