"""`linnet bench gpu --check` and `--tune`: are the kernels of the rows right here, and which tiles are fastest."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from linnet.bench._gpu_measure import Case, backend_of, eager_ms, errors, free, relative_error, words
from linnet.bench._gpu_rows import BOUND, IMPLEMENTATION, ROWS, Draw, Operands, Row, Sizes, bounded, mild, shape_sets

LIMITS = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 2e-5}
SIZES = ((1, 64, 64), (15, 16, 32), (17, 128, 128), (63, 100, 65), (65, 256, 128), (130, 128, 257))  # T, K, V
PAST = 2001  # tokens before the changed ones in the test of causality


def strengths(row: Row) -> dict[str, Draw]:
    """Other decays than those of a layer at its start: down to -20 per token or the bound, resets, all at -5."""
    draw = row.operands["log_decay"].draw if "log_decay" in row.operands else None
    if draw not in (mild, bounded):
        return {}
    lowest = BOUND if draw is bounded else -torch.inf
    uniform = lambda n: torch.special.ndtr(n)
    return {
        "strong": lambda n, x: max(lowest, -20.0) * uniform(n) * (uniform(n) > 0.3),
        "reset": lambda n, x: torch.where(uniform(n) < 0.1, lowest, -0.01 * uniform(n)),
        "all at -5": lambda n, x: torch.full_like(n, -5.0),
    }


def gradients(row: Row, x: Operands, backend: str, double: bool, state: tuple[Tensor, ...] = (), **options: Any) -> Operands:
    """o, the final state and the gradients of everything, the initial state included."""
    cast = (lambda a: a.double()) if double else (lambda a: a)
    leaves = {n: cast(a).detach().requires_grad_() for n, a in x.items()}
    initial = tuple(cast(s).detach().requires_grad_() for s in state)
    o, final = row.run(leaves, backend=backend, initial_state=initial or None, return_state=True, **options)
    rng = torch.Generator(device=o.device).manual_seed(99)
    weight = lambda a: torch.randn(a.shape, generator=rng, device=a.device).to(x["v"].dtype).to(a.dtype)
    # the running maximum of a state is a choice of representation: only the true values S, z are compared
    scale = final[-1].exp()[..., None] if "m" in row.state else None
    true = [s if scale is None else s * scale.reshape(*scale.shape, *[1] * (s.ndim - 3)) for s in final[:2] if s.ndim > 2]
    loss = (o * weight(o)).sum() + sum((s * weight(s)).sum() for s in true if state)
    names = [*leaves, *(f"state{i}" for i in range(len(initial)))]
    grads = torch.autograd.grad(loss, [*leaves.values(), *initial])
    states = {f"final{i}": s.detach() for i, s in enumerate(true)}
    return {"o": o.detach(), **states, **{"d" + n: a for n, a in zip(names, grads, strict=True)}}


def compare(row: Row, x: Operands, state: tuple[Tensor, ...] = (), **options: Any) -> dict[str, float]:
    backend = backend_of(row.run, x, **options)
    got = gradients(row, x, backend, False, state, **options)
    want = gradients(row, x, "torch", True, state, **options)
    return {n: relative_error(a, want[n]) for n, a in got.items()}


def small_cases(row: Row, dtype: torch.dtype, device: str):
    """(name, operands, state, options) at odd sizes, strong decays, packed, and long enough that time is split."""
    shape = lambda B, T, K, V, H=2: {"B": B, "T": T, "H": H, "K": K, "V": V}

    def state(N: int, s: Sizes) -> tuple[Tensor, ...]:
        rng = torch.Generator(device=device).manual_seed(7)
        sizes = {**row.sizes(s), "B": N}
        return tuple(torch.randn([sizes[c] for c in letters], generator=rng, device=device) for letters in row.state.values())

    s = shape(2, 200, 64, 64)
    yield "T200 K64 V64", row.make(s, device, dtype), state(2, s), {}
    for name, draw in strengths(row).items():
        yield f"T200 K64 V64 {name}", row.make(s, device, dtype, log_decay=draw), state(2, s), {}
    for T, K, V in SIZES if dtype != torch.float16 else SIZES[-1:]:
        s = shape(2, T, K, V)
        yield f"T{T} K{K} V{V}", row.make(s, device, dtype), state(2, s), {}
    s = shape(1, 300, 64, 64)
    cu = torch.tensor([0, 0, 70, 71, 200, 200, 300], device=device, dtype=torch.int32)
    yield "packed", row.make(s, device, dtype), state(6, s), {"cu_seqlens": cu}
    s = shape(1, 2100, 64, 64, 1)
    yield "T2100, one head", row.make(s, device, dtype), state(1, s), {}


def check(rows: list[Row], device: str = "cuda", shape: Sizes | None = None) -> bool:
    """Values and gradients of every row against fp64 at small sizes and at the main shape, repeated, and causal bit for bit."""
    good = True

    def report(name: str, found: dict[str, float], limit: float) -> None:
        nonlocal good
        bad = any(not e < limit for e in found.values())
        good &= not bad
        print(f"{'MISS' if bad else 'ok  '} {name:55s}", " ".join(f"{n} {e:.1e}" for n, e in found.items()), flush=True)

    shape = shape or shape_sets()["main"][0]
    for row in (r for r in rows if r.run is not None):
        try:
            for dtype, limit in LIMITS.items() if row.state else ():
                for name, x, state, options in small_cases(row, dtype, device):
                    report(f"{row.name} {str(dtype)[6:]} {name}", compare(row, x, state, **options), limit)
            c = Case(row, IMPLEMENTATION, shape, device)
            c.load()
            report(f"{row.name} bfloat16 main shape, {c.backend}", errors(c, shape), LIMITS[torch.bfloat16])
            same, causal = repeated(row, shape, device, c.backend)
            good &= same and causal
            print(f"{'ok  ' if same and causal else 'MISS'} {row.name} deterministic {same}, causal {causal}", flush=True)
        except Exception as problem:  # noqa: BLE001 - the other rows are still checked
            good = False
            print(f"FAIL {row.name} {words(problem)}", flush=True)
        free(device)
    return good


def repeated(row: Row, shape: Sizes, device: str, backend: str) -> tuple[bool, bool]:
    """Whether two runs agree bit for bit, and whether a changed future leaves the outputs of the past as they were."""

    def both() -> list[Tensor]:
        c = Case(row, IMPLEMENTATION, shape, device)
        c.backend, c.call = backend, lambda x: row.run(x, backend=backend)[0]
        o, grads = c.both()
        return [o, *grads]

    first = both()
    same = all(torch.equal(a, b) for a, b in zip(first, both(), strict=True))
    if "T" not in row.output:
        return same, True
    past = min(PAST, shape["T"] // 2)
    x, other = row.make(shape, device), row.make(shape, device, seed=1)
    for n, a in x.items():
        if row.operands[n].letters[1:2] == "T":
            a[:, past:] = other[n][:, past:]
    with torch.no_grad():
        changed = row.run(x, backend=backend)[0]
        kept = row.run(row.make(shape, device), backend=backend)[0]
    return same, torch.equal(changed[:, :past], kept[:, :past])


def tune(kind: str, candidates: dict[str, list] | None = None, shape: Sizes | None = None) -> None:
    """Time every role of one decay kind over candidate tiles, the gate's gradient included."""
    from linnet.ops.triton import _channel, _linear, _table
    from linnet.ops.triton._plan import Call

    shape = shape or shape_sets()["main"][0]
    channel = kind == "channel"
    candidates = candidates or ({"stages": [2, 3, 4]} if channel else {"BZ": [64, 128], "warps": [4, 8], "stages": [2, 3]})
    B, T, H, K, V = shape.values()
    x = ROWS["linear-exact" if channel else f"linear-{kind}"].make(shape)
    q, k, v = (x[n] for n in "qkv")
    g = x["log_decay"].reshape(B, T, H, -1) if "log_decay" in x else None
    do = torch.randn_like(v)
    plan = Call(q, v, g, None, K**-0.5, False, H, None)
    table = _table.TABLE["sm90"][plan.table_kind]
    new = lambda *s, dtype=torch.float32: torch.empty(s, device="cuda", dtype=dtype)
    states = lambda: torch.zeros(plan.block_count(), H, V, K, device="cuda", dtype=torch.bfloat16)

    def launch(role: str) -> Callable[[], Any]:
        extra: dict[str, Any] = {}
        NZ = -(-K // table["dk"].BZ)
        if g is not None and role in ("dq", "dk"):
            extra |= {"blocks": states(), "weights": new(2, NZ, H, B * T), "other": q if role == "dq" else k}
            extra |= {"products": new(plan.block_count(), H, NZ)} if role == "dk" else {}
        operands = {"o": (q, k, v), "dq": (do, v, k), "dk": (v, do, q), "dv": (k, q, do)}[role]
        out = new(1, B, T, H, operands[2].shape[3], dtype=torch.bfloat16)
        return lambda: _linear._role(plan, role, *operands, out=out, **extra)

    def launch_channel(part: str) -> Callable[[], Any]:
        ready = _channel.prepared(plan, q, k)
        out = new(1, B, T, H, V, dtype=torch.bfloat16)
        X, blocks, ends = new(1, B, T, H, K), states(), new(plan.block_count(), H, 1, K)
        return {
            "prepare": lambda: _channel.prepared(plan, q, k),
            "o": lambda: _channel.keys(plan, ready, "o", v, heads=H, out=out),
            "dq": lambda: _channel.queries(plan, ready, "dq", do, v, X, blocks=blocks),
            "dk": lambda: _channel.queries(plan, ready, "dk", v, do, X, blocks=blocks, ends=ends),
            "dv": lambda: _channel.keys(plan, ready, "dv", do, heads=H, out=out),
            "all but dv": lambda: _channel.gradients(plan, ready, do, q, k, v, None, {}, True),
        }[part]

    for values in itertools.product(*candidates.values()):
        times = []
        for role in ("prepare", "o", "dq", "dk", "dv", "all but dv") if channel else ("o", "dq", "dk", "dv"):
            kept = dict(table)
            table.update({r: replace(t, **dict(zip(candidates, values, strict=True))) for r, t in table.items()})
            for r in table if "M" not in candidates else ():  # the block of the gate's gradient stays
                table[r] = replace(table[r], M=max(1, kept["dk"].C * kept["dk"].M // table[r].C))
            plan.sums = plan.pairs = None
            try:
                run = launch_channel(role) if channel else launch(role)
                began = time.perf_counter()
                run()
                torch.cuda.synchronize()
                compiled = time.perf_counter() - began
                times.append(f"{role} {eager_ms(run, 'cuda', 30):.3f} (first {compiled:.1f} s)")
            except Exception as problem:  # noqa: BLE001 - a candidate may not fit the machine
                times.append(f"{role} FAIL {type(problem).__name__}")
            table.update(kept)
        print(kind, " ".join(f"{n}={v}" for n, v in zip(candidates, values, strict=True)), "|", "  ".join(times), flush=True)
