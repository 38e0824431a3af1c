"""Steps in place: the training operator from the same states, nothing else touched, nothing read on the host."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import linnet
from linnet import ops

B, T, P = 3, 4, 5
FP64 = torch.float64


def draw(*shape: int, seed: int = 0, dtype=FP64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(dtype)


def unit(*shape: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(draw(*shape, seed=seed), dim=-1)


def decay(*shape: int) -> torch.Tensor:
    return -draw(*shape, seed=9).abs()


def gates(*shape: int, seed: int) -> torch.Tensor:
    return torch.sigmoid(draw(*shape, seed=seed))


def qkv(n: int = 1, heads: tuple[int, int, int] = (2, 2, 2), K: int = 4, V: int = 6) -> dict[str, torch.Tensor]:
    return {
        "q": draw(B, T, heads[0], K, seed=1),
        "k": unit(B, T * n, heads[1], K, seed=2),
        "v": draw(B, T * n, heads[2], V, seed=3),
    }


def delta(n: int = 1, channels: bool = False, **options):
    last = lambda size: (size,) if channels else ()
    return qkv(n) | {"erase": gates(B, T * n, 2, *last(4), seed=4), "write": gates(B, T * n, 2, *last(6), seed=5)} | options


def attention_like(q: int = 2, k: int = 2, v: int = 2, **options):
    return qkv(options.get("steps_per_token", 1), (q, k, v)) | options


CASES = {
    "linear": ("linear_attention", attention_like()),
    "linear scalar decay": ("linear_attention", attention_like(log_decay=decay(B, T, 2), scale=1.0)),
    "linear constant decay": ("linear_attention", attention_like(log_decay=decay(2))),
    "linear constant decay per channel": ("linear_attention", attention_like(log_decay=decay(2, 4))),
    "linear read before": ("linear_attention", attention_like(log_decay=decay(B, T, 2, 4), read="before")),
    "linear grouped": ("linear_attention", attention_like(4, 1, 2, log_decay=decay(B, T, 1))),
    "linear shared query": ("linear_attention", attention_like(1, 1, 2, log_decay=decay(B, T, 2, 4))),
    "linear steps": ("linear_attention", attention_like(steps_per_token=2, log_decay=decay(B, T, 2))),
    "delta": ("delta_rule", delta()),
    "delta write is erase": ("delta_rule", qkv() | {"erase": gates(B, T, 2, seed=4), "log_decay": decay(B, T, 2)}),
    "delta per channel": ("delta_rule", delta(channels=True, log_decay=decay(B, T, 2, 4))),
    "delta write key": ("delta_rule", delta(write_key=unit(B, T, 2, 4, seed=7), log_decay=decay(B, T, 2))),
    "delta before": ("delta_rule", delta(erase_read="before_decay", read="before", log_decay=decay(B, T, 2, 4))),
    "delta steps": ("delta_rule", delta(2, steps_per_token=2, log_decay=decay(B, T, 2))),
    "delta steps before": (
        "delta_rule",
        delta(2, steps_per_token=2, erase_read="before_decay", read="before", log_decay=decay(B, T, 2)),
    ),
    "dplr": (
        "dplr",
        qkv() | {"a": -unit(B, T, 2, 4, seed=4), "b": gates(B, T, 2, 1, seed=5) * unit(B, T, 2, 4, seed=4)}
        | {"log_decay": decay(B, T, 2, 4), "scale": 1.0},
    ),
    "scan": ("scan", {"x": draw(B, T, 5, 2), "log_a": decay(B, T, 5, 2)}),
    "scan constant": ("scan", {"x": draw(B, T, 5), "a": draw(5, seed=1).tanh()}),
    "scan complex": ("scan", {"x": draw(B, T, 5), "a": torch.polar(gates(B, T, 5, seed=1), draw(B, T, 5, seed=2))}),
    "selective scan": (
        "selective_scan",
        {"x_BTD": draw(B, T, 6), "delta_BTD": gates(B, T, 6, seed=1), "A_DN": decay(6, 4), "B_BTN": draw(B, T, 4, seed=3),
         "C_BTN": draw(B, T, 2, 4, seed=4), "D_D": draw(6, seed=5), "z_BTD": draw(B, T, 6, seed=6)},
    ),
    "selective scan, plain": (
        "selective_scan",
        {"x_BTD": draw(B, T, 6), "delta_BTD": gates(B, T, 6, seed=1), "A_DN": decay(6, 4), "B_BTN": draw(B, T, 4, seed=3),
         "C_BTN": draw(B, T, 4, seed=4)},
    ),
    "short conv": (
        "short_conv",
        {"x_BTD": draw(B, T, 6), "weight_DW": draw(6, 4, seed=1), "bias_D": draw(6, seed=2), "activation": "silu"},
    ),
    "short conv, wide": ("short_conv", {"x_BTD": draw(B, T, 6), "weight_DW": draw(6, 7, seed=1)}),
    "short conv, one tap": ("short_conv", {"x_BTD": draw(B, T, 6), "weight_DW": draw(6, 1, seed=1)}),
}  # fmt: skip
ONE_OF_EACH = ["linear read before", "delta per channel", "dplr", "scan", "selective scan", "short conv"]


def train(op: str, x: dict, state: torch.Tensor | None = None, tokens: int = T):
    """The training operator on the first tokens: output and final state."""
    n = x.get("steps_per_token", 1)
    cut = lambda v: v[:, : tokens * (n if v.shape[1] == T * n else 1)]
    timed = {k: cut(v) if isinstance(v, torch.Tensor) and v.ndim > 2 and v.shape[0] == B else v for k, v in x.items()}
    o, (S,) = getattr(ops, op)(**timed, initial_state=None if state is None else (state,), return_state=True, backend="reference")
    return o, S


def pool_for(op: str, x: dict, dtype=None) -> torch.Tensor:
    S = train(op, x)[1]
    noise = draw(P, *S.shape[1:], seed=8)
    return (torch.complex(noise, noise.flip(0)) if S.is_complex() else noise).to(dtype or S.dtype)


def close(got: torch.Tensor, want: torch.Tensor, limit: float = 1e-12) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= limit * want.abs().max().clamp_min(1) if got.numel() else True


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_training_operator(case):
    op, x = CASES[case]
    pool = pool_for(op, x)
    want, S = train(op, x, pool[:B])
    rest = pool[B:].clone()
    o = getattr(ops.decode, op)(**x, state=pool)
    close(o, want)
    close(pool[:B], S)
    assert torch.equal(pool[B:], rest)


@pytest.mark.parametrize("options", [{}, {"update": False}, {"output": False}], ids=["step", "verify", "commit"])
@pytest.mark.parametrize("case", CASES)
def test_backends_agree(case, options):
    op, x = CASES[case]
    pool = pool_for(op, x)
    other = pool.clone()
    where = {"slots": torch.tensor([4, -1, 0], dtype=torch.int32), "counts": torch.tensor([T, 3, 2], dtype=torch.int32)}
    got = getattr(ops.decode, op)(**x, **where, **options, state=pool)
    want = getattr(ops.decode, op)(**x, **where, **options, state=other, backend="reference")
    close(pool, other)
    assert (got is None) == (want is None) == ("output" in options)
    if got is not None:
        close(got, want)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_slots_choose_entries_and_padding_rows_do_nothing(case):
    op, x = CASES[case]
    pool = pool_for(op, x)
    before = pool.clone()
    x = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in x.items()}
    for value in x.values():  # whatever a padding row holds
        if isinstance(value, torch.Tensor) and value.ndim > 2:
            value[1] = torch.nan
    slots = torch.tensor([3, -1, 0], dtype=torch.int32)
    o = getattr(ops.decode, op)(**x, state=pool, slots=slots)
    want, S = train(op, x, before[[3, 1, 0]])
    assert torch.equal(o[1], torch.zeros_like(o[1]))
    for row, entry in ((0, 3), (2, 0)):
        close(o[row], want[row])
        close(pool[entry], S[row])
    assert torch.equal(pool[[1, 2, 4]], before[[1, 2, 4]])


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_a_batch_of_padding_changes_nothing(case):
    op, x = CASES[case]
    pool = pool_for(op, x)
    before = pool.clone()
    o = getattr(ops.decode, op)(**x, state=pool, slots=torch.full((B,), -1, dtype=torch.int32))
    assert torch.equal(pool, before) and not o.any()


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_verify_then_commit_the_accepted_tokens(case):
    op, x = CASES[case]
    step = getattr(ops.decode, op)
    pool = pool_for(op, x)
    before = pool.clone()
    slots = torch.tensor([2, 4, 1], dtype=torch.int32)
    verified = step(**x, state=pool, slots=slots, update=False)
    assert torch.equal(pool, before)
    close(verified, train(op, x, before[slots.long()])[0])
    counts = torch.tensor([T, 0, 2], dtype=torch.int32)
    assert step(**x, state=pool, slots=slots, counts=counts, output=False) is None
    for row, (entry, count) in enumerate(zip(slots.tolist(), counts.tolist(), strict=True)):
        close(pool[entry], train(op, x, before[slots.long()], count)[1][row] if count else before[entry])
    both = before.clone()
    assert torch.equal(step(**x, state=both, slots=slots, counts=counts), verified) and torch.equal(both, pool)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_a_16_bit_state_is_computed_in_fp32(case):
    op, x = CASES[case]
    x = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in x.items()}
    pool = pool_for(op, x, torch.bfloat16)
    want, S = train(op, x, pool[:B].float())
    o = getattr(ops.decode, op)(**x, state=pool)
    close(o, want, 1e-5)
    assert (pool[:B].float() - S).abs().max() <= S.abs().max() / 256


@pytest.mark.parametrize("case", ["delta", "short conv"])
def test_compiles_without_breaks(case):
    op, x = CASES[case]
    step = lambda pool, slots: getattr(ops.decode, op)(**x, state=pool, slots=slots)
    pool, slots = pool_for(op, x), torch.tensor([3, -1, 0], dtype=torch.int32)
    other = pool.clone()
    with torch.no_grad():
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(pool, slots)
    close(got, step(other, slots))
    close(pool, other)


class NoReading(TorchDispatchMode):
    """Refuses what waits for a device: values read on the host, shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.WAITS, func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_reads_nothing_on_the_host(case):
    op, x = CASES[case]
    pool, counts = pool_for(op, x), torch.tensor([1, 0, T], dtype=torch.int32)
    with NoReading():
        getattr(ops.decode, op)(**x, state=pool, slots=torch.tensor([3, -1, 0], dtype=torch.int32), counts=counts)


def cache(room: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return draw(P, room, 1, 4, seed=5), draw(P, room, 2, 6, seed=6), torch.tensor([3, 0, 5, 1, 2])


def attended(row: int, entry: int, x: dict, state, tokens: int = T):
    used = int(state[2][entry])
    old = tuple(s[entry : entry + 1, :used] for s in state[:2]) + (state[2][entry : entry + 1],)
    new = {k: v[row : row + 1, :tokens] for k, v in x.items()}
    o, (k, v, _) = ops.softmax_attention(**new, initial_state=old, return_state=True, backend="reference")
    return o[0], k[0], v[0]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("slots", [None, [4, -1, 0]])
def test_softmax_attention_on_a_cache_of_fixed_size(slots, backend):
    x = {"q_BTHK": draw(B, T, 2, 4, seed=1), "k_BTHK": draw(B, T, 1, 4, seed=2), "v_BTHV": draw(B, T, 2, 6, seed=3)}
    state, entries = cache(), slots or [0, 1, 2]
    before = tuple(s.clone() for s in state)
    at = None if slots is None else torch.tensor(slots, dtype=torch.int32)
    verified = ops.decode.softmax_attention(**x, state=state, slots=at, update=False, backend=backend)
    assert torch.equal(state[2], before[2])
    counts = torch.tensor([T, 1, 2], dtype=torch.int32)
    with NoReading() if backend == "torch" else contextlib.nullcontext():
        o = ops.decode.softmax_attention(**x, state=state, slots=at, counts=counts, backend=backend)
    assert torch.equal(o, verified)
    for row, entry in enumerate(entries):
        if entry < 0:
            assert not o[row].any()
            continue
        close(o[row], attended(row, entry, x, before)[0])
        _, k, v = attended(row, entry, x, before, int(counts[row]))
        assert int(state[2][entry]) == k.shape[0] == int(before[2][entry] + counts[row])
        assert torch.equal(state[0][entry, : k.shape[0]], k) and torch.equal(state[1][entry, : v.shape[0]], v)
    for entry in set(range(P)) - set(entries):
        assert all(torch.equal(s[entry], b[entry]) for s, b in zip(state, before, strict=True))


def state_of(case: str = "delta", **options):
    op, x = CASES[case]
    return getattr(ops.decode, op), x | {"state": pool_for(op, x)} | options


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("state", torch.zeros(P, 2, 4, 5)),
        ("state", torch.zeros(B - 1, 2, 4, 6)),
        ("state", torch.zeros(P, 2, 4, 6, dtype=torch.int32)),
        ("state", None),
        ("slots", torch.zeros(B)),
        ("slots", torch.zeros(B + 1, dtype=torch.int32)),
        ("counts", torch.zeros(B, dtype=torch.int64)),
        ("read", "during"),
        ("erase_read", "later"),
        ("erase", torch.zeros(B, T, 3, dtype=FP64)),
        ("k", torch.zeros(B, T, 2, 5, dtype=FP64)),
        ("steps_per_token", 0),
    ],
)
def test_bad_input(argument, value):
    step, x = state_of(**{argument: value})
    with pytest.raises(ValueError, match=f"decode.delta_rule: argument '{argument if argument != 'erase' else '.*'}' must be"):
        step(**x)


def test_bad_switches():
    step, x = state_of()
    with pytest.raises(ValueError, match="argument 'output' must be True where update is False"):
        step(**x, update=False, output=False)
    with pytest.raises(ValueError, match="argument 'v' must be without gradient"):
        step(**x | {"v": x["v"].clone().requires_grad_()})
    with torch.no_grad():
        step(**x | {"v": x["v"].clone().requires_grad_()})
    with linnet.debug():
        for slots in ([0, 0, 1], [0, 1, P], [0, -2, 1]):
            with pytest.raises(ValueError, match="argument 'slots' must be -1 or different entries below 5"):
                step(**x, slots=torch.tensor(slots, dtype=torch.int32))
        with pytest.raises(ValueError, match="argument 'counts' must be between 0 and the 4 tokens"):
            step(**x, counts=torch.tensor([0, 1, T + 1], dtype=torch.int32))


def test_bad_attention():
    x = {"q_BTHK": draw(B, T, 2, 4), "k_BTHK": draw(B, T, 1, 4), "v_BTHV": draw(B, T, 2, 6)}
    k, v, length = cache()
    for state in (k, (k, v), (k, v[:-1], length), (k, v, length.int()), (k[..., :3], v, length)):
        with pytest.raises(ValueError, match="decode.softmax_attention: argument 'state' must be"):
            ops.decode.softmax_attention(**x, state=state)
    with linnet.debug(), pytest.raises(ValueError, match="room for 4 more tokens"):
        ops.decode.softmax_attention(**x, state=(k, v, length + 3))
