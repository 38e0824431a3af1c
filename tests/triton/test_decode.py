"""Laws of the steps in place on the Triton kernels: the training operator from the same states, in place, by slot, by count."""

from __future__ import annotations

import pytest
import torch

import linnet.ops as ops

T, P = 3, 4
SLOTS, COUNTS = [2, -1, 0], [1, 2, T]
LIMIT = 1e-5


class Draw:
    def __init__(self, device: str, seed: int = 0):
        self.device, self.rng = device, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng).to(self.device)

    def unit(self, *shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(self(*shape), dim=-1)

    def gate(self, *shape: int) -> torch.Tensor:
        return torch.sigmoid(self(*shape))

    def decay(self, *shape: int) -> torch.Tensor:
        return -self(*shape).abs()


def qkv(r: Draw, q=2, k=2, v=2, n=1, K=12, V=20):
    return {"q": r(3, T, q, K), "k": r.unit(3, T * n, k, K), "v": r(3, T * n, v, V)}


def delta(r: Draw, K=12, V=20, H=2, **options):
    return qkv(r, K=K, V=V, q=H, k=H, v=H) | {"erase": r.gate(3, T, H), "log_decay": r.decay(3, T, H)} | options


CASES = {
    "linear": lambda r: ("linear_attention", qkv(r, K=16, V=16)),
    "linear grouped": lambda r: ("linear_attention", qkv(r, 4, 1, 2) | {"log_decay": r.decay(3, T, 2, 12), "scale": 1.0}),
    "linear shared query": lambda r: ("linear_attention", qkv(r, 1, 1, 2) | {"log_decay": r.decay(2), "read": "before"}),
    "linear steps": lambda r: (
        "linear_attention",
        qkv(r, n=2) | {"steps_per_token": 2, "log_decay": r.decay(2, 12)},
    ),
    "delta": lambda r: ("delta_rule", delta(r)),
    "delta per channel": lambda r: (
        "delta_rule",
        delta(r, erase=r.gate(3, T, 1, 12), write=r.gate(3, T, 2, 20), log_decay=r.decay(3, T, 2, 12)),
    ),
    "delta before": lambda r: (
        "delta_rule",
        delta(r, write=r.gate(3, T, 2), write_key=r.unit(3, T, 1, 12), erase_read="before_decay", read="before"),
    ),
    "delta steps": lambda r: (
        "delta_rule",
        qkv(r, n=2) | {"erase": r.gate(3, 2 * T, 2), "log_decay": r.decay(3, T, 2), "steps_per_token": 2},
    ),
    "dplr": lambda r: (
        "dplr",
        qkv(r, 4, 2, 2) | {"a": -r.unit(3, T, 1, 12), "b": r.unit(3, T, 2, 12), "log_decay": r.decay(3, T, 2, 12)},
    ),
    "short conv": lambda r: (
        "short_conv",
        {"x_BTD": r(3, T, 150), "weight_DW": r(150, 4), "bias_D": r(150), "activation": "silu"},
    ),
    "short conv, longer than the call": lambda r: ("short_conv", {"x_BTD": r(3, T, 8), "weight_DW": r(8, 8)}),
    "short conv, one tap": lambda r: ("short_conv", {"x_BTD": r(3, T, 8), "weight_DW": r(8, 1)}),
    "selective scan": lambda r: (
        "selective_scan",
        {"x_BTD": r(3, T, 72), "delta_BTD": r.gate(3, T, 72), "A_DN": r.decay(72, 12), "B_BTN": r(3, T, 12),
         "C_BTN": r(3, T, 2, 12), "D_D": r(72), "z_BTD": r(3, T, 72)},
    ),
    "selective scan, plain": lambda r: (
        "selective_scan",
        {"x_BTD": r(3, T, 8), "delta_BTD": r.gate(3, T, 8), "A_DN": r.decay(8, 16), "B_BTN": r(3, T, 2, 16), "C_BTN": r(3, T, 16)},
    ),
}  # fmt: skip


def wanted(op: str, x: dict, S: torch.Tensor):
    """The training operator in fp64: outputs, and the states after 0 .. T tokens."""
    x = {name: p.double() if isinstance(p, torch.Tensor) else p for name, p in x.items()}
    n = x.get("steps_per_token", 1)
    states = [S.double()]
    for tokens in range(1, T + 1):
        cut = {
            name: p[:, : tokens * (p.shape[1] // T)]
            if isinstance(p, torch.Tensor) and p.ndim > 2 and p.shape[1] in (T, T * n)
            else p
            for name, p in x.items()
        }
        o, (state,) = getattr(ops, op)(**cut, initial_state=(S.double(),), return_state=True, backend="torch")
        states.append(state)
    return o, states


def pool_of(op: str, x: dict, r: Draw, dtype=torch.float32) -> torch.Tensor:
    _, (S,) = getattr(ops, op)(**x, return_state=True, backend="torch")
    return r(P, *S.shape[1:]).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor, limit: float = LIMIT) -> None:
    assert got.shape == want.shape
    assert not got.numel() or float((got.double() - want).abs().max()) <= limit * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_training_operator(device, case):
    r = Draw(device)
    op, x = CASES[case](r)
    step = getattr(ops.decode, op)
    pool = pool_of(op, x, r)
    before = pool.clone()
    o, states = wanted(op, x, pool[:3])
    close(step(**x, state=pool, backend="triton"), o)
    close(pool[:3], states[-1])
    assert torch.equal(pool[3], before[3])

    pool = before.clone()
    assert (
        step(**x, state=pool, counts=torch.tensor(COUNTS, dtype=torch.int32, device=device), output=False, backend="triton") is None
    )
    close(pool[:3], torch.stack([states[count][row] for row, count in enumerate(COUNTS)]))


@pytest.mark.parametrize("case", ["linear grouped", "delta", "dplr", "short conv", "selective scan"])
def test_slots_counts_and_padding(device, case):
    r = Draw(device)
    op, x = CASES[case](r)
    step = lambda **options: getattr(ops.decode, op)(**x, state=pool, slots=slots, backend="triton", **options)
    pool = pool_of(op, x, r)
    before = pool.clone()
    for p in x.values():  # whatever a padding row holds
        if isinstance(p, torch.Tensor) and p.ndim > 2:
            p[1] = torch.nan
    slots = torch.tensor(SLOTS, dtype=torch.int32, device=device)
    counts = torch.tensor(COUNTS, dtype=torch.int32, device=device)
    o, states = wanted(op, x, before[[2, 1, 0]])
    verified = step(update=False)
    assert torch.equal(pool, before) and not verified[1].any()
    for row in (0, 2):
        close(verified[row], o[row])
    assert torch.equal(step(counts=counts), verified)
    for row in (0, 2):
        close(pool[SLOTS[row]], states[COUNTS[row]][row])
    assert torch.equal(pool[[1, 3]], before[[1, 3]])
    slots.fill_(-1)
    after = pool.clone()
    assert not step().any() and torch.equal(pool, after)


@pytest.mark.parametrize("case", ["delta per channel", "short conv", "selective scan"])
def test_16_bit_operands_and_states(device, case):
    r = Draw(device)
    op, x = CASES[case](r)
    names = ("A_DN", "D_D", "log_decay", "weight_DW", "bias_D")
    x = {name: p.bfloat16() if isinstance(p, torch.Tensor) and name not in names else p for name, p in x.items()}
    pool = pool_of(op, x, r, torch.bfloat16)
    o, states = wanted(op, x, pool[:3])
    got = getattr(ops.decode, op)(**x, state=pool, backend="triton")
    assert got.dtype == torch.bfloat16 and pool.dtype == torch.bfloat16
    limit = 2**-8 if device == "cuda" else 2**-7  # a GPU rounds to bf16, the interpreter cuts off
    close(got, o, limit)
    close(pool[:3], states[-1], limit)


@pytest.mark.parametrize("case", ["linear grouped", "delta per channel", "dplr"])
@pytest.mark.parametrize("state", [False, True])
def test_a_single_token_of_the_training_operator(device, case, state):
    r = Draw(device)
    op, x = CASES[case](r)
    x = {name: p[:, :1] if isinstance(p, torch.Tensor) and p.ndim > 2 else p for name, p in x.items()}
    S = pool_of(op, x, r)[:3] if state else None
    o, (got,) = getattr(ops, op)(**x, initial_state=S, return_state=True, backend="triton")
    x = {name: p.double() if isinstance(p, torch.Tensor) else p for name, p in x.items()}
    S = None if S is None else S.double()
    want, (final,) = getattr(ops, op)(**x, initial_state=S, return_state=True, backend="torch")
    close(o, want)
    close(got, final)


def test_operands_inside_a_projection_and_a_pool_inside_a_larger_one(device):
    r = Draw(device)
    mixed = r(3, T, 3 * 2 * 16)
    q, k, v = (p.unflatten(2, (2, 16)) for p in mixed.chunk(3, 2))
    large = r(P, 5, 2, 16, 16)
    pool = large[:, 1]
    before = large.clone()
    o, states = wanted("linear_attention", {"q": q, "k": k, "v": v}, pool[:3])
    close(ops.decode.linear_attention(q, k, v, state=pool, backend="triton"), o)
    close(pool[:3], states[-1])
    before[:3, 1] = large[:3, 1]
    assert torch.equal(large, before)


@pytest.mark.parametrize("K", [1, 300])
def test_any_key_size(device, K):
    r = Draw(device)
    x = delta(r, K=K, V=5, H=1)
    pool = pool_of("delta_rule", x, r)
    o, states = wanted("delta_rule", x, pool[:3])
    close(ops.decode.delta_rule(**x, state=pool, backend="triton"), o)
    close(pool[:3], states[-1])


def test_what_the_kernels_cannot_do(device):
    x = {"x_BTD": torch.zeros(1, 1, 4, device=device), "weight_DW": torch.zeros(4, 9, device=device)}
    with pytest.raises(ValueError, match="more than 8 taps"):
        ops.decode.short_conv(**x, state=torch.zeros(1, 4, 8, device=device), backend="triton")
    q = torch.zeros(1, 1, 1, 4, device=device)
    with pytest.raises(ValueError, match="an entry of the state must be contiguous"):
        ops.decode.linear_attention(q, q, q, state=torch.zeros(1, 1, 4, 4, device=device).mT, backend="triton")
