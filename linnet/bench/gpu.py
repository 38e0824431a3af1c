"""Measure the Triton kernels of linear attention on this GPU, check them there, and try launch configurations.

    python -m linnet.bench.gpu                 the table of docs/kernels.md: forward, forward + backward, peak memory, first call
    python -m linnet.bench.gpu --check         values and gradients against float64, at small and at the measured shapes
    python -m linnet.bench.gpu --tune KIND     every role of a decay kind over candidate tiles (none, scalar, vector, exact)

Times are medians in ms, replayed from a CUDA graph; `eager` includes what Python needs to launch the kernels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import linnet.ops as ops
from linnet.ops.triton import _table

KINDS = ("none", "constant", "scalar", "vector", "exact")
BOUND = -5.0  # declared by kind "vector"
BANDWIDTH = 4.3e12  # bytes/s, measured device copy of an H200


def make(
    kind: str, B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype, seed: int = 0, strength: str = "mild"
) -> dict[str, Any]:
    """Operands of one call: q, k, v ~ N(0, 1), decays mild (a gated layer at the start) or at the edge."""
    rng = torch.Generator(device="cuda").manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng, device="cuda")
    x = {"q": normal(B, T, H, K).to(dtype), "k": normal(B, T, H, K).to(dtype), "v": normal(B, T, H, V).to(dtype)}
    shape = {"none": None, "constant": (H,), "scalar": (B, T, H)}.get(kind, (B, T, H, K))
    if shape is not None:
        u = torch.rand(*shape, generator=rng, device="cuda")
        g = F.logsigmoid(normal(*shape) + 2) if strength == "mild" else -5 * u
        if strength == "mild":
            g = g.clamp_min(BOUND) if kind == "vector" else g
        if strength == "constant5":
            g = torch.full_like(u, -5.0)
        if strength == "strong":
            g = -5 * u if kind == "vector" else -20 * u * (u > 0.3)
        if strength == "reset":
            g = torch.where(u < 0.1, -5.0 if kind == "vector" else -torch.inf, -0.01 * u)
        x["log_decay"] = g
    return x


def call(x: dict[str, Any], kind: str, backend: str | None = None, **options):
    q, k, v, *g = x.values()
    return ops.linear_attention(q, k, v, *g, log_decay_min=BOUND if kind == "vector" else None, backend=backend, **options)


def error(got: Tensor, want: Tensor) -> float:
    """Relative root-mean-square error; NaN where the result is not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("nan")
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def gradients(x: dict[str, Any], kind: str, backend: str, double: bool, state=None, **options) -> dict[str, Tensor]:
    cast = (lambda a: a.double()) if double else (lambda a: a)
    leaves = {n: cast(a).detach().requires_grad_() for n, a in x.items()}
    rng = torch.Generator(device="cuda").manual_seed(99)
    initial = None if state is None else cast(state).detach().requires_grad_()
    o, (S,) = call(leaves, kind, backend, return_state=True, initial_state=initial, **options)
    do = torch.randn(o.shape, generator=rng, device="cuda").to(x["v"].dtype)
    loss = (o * do.to(o.dtype)).sum()
    if state is not None:
        leaves["S0"] = initial
        loss = loss + (S * torch.randn(S.shape, generator=rng, device="cuda").to(S.dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o.detach(), "S": S.detach(), **{"d" + n: a for n, a in zip(leaves, grads, strict=True)}}


def compare(x, kind, **options) -> dict[str, float]:
    got = gradients(x, kind, "triton", False, **options)
    want = gradients(x, kind, "torch", True, **options)
    return {n: error(a, want[n]) for n, a in got.items()}


def check(small: bool = True) -> bool:
    limits = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 2e-5}
    good = True

    def report(name: str, errors: dict[str, float], limit: float):
        nonlocal good
        bad = [n for n, e in errors.items() if not e < limit]
        good &= not bad
        print(f"{'MISS' if bad else 'ok  '} {name:60s}", " ".join(f"{n} {e:.1e}" for n, e in errors.items()), flush=True)

    for dtype, limit in limits.items() if small else ():
        for kind in ("none", "scalar", "vector", "exact"):
            for strength in ("mild",) if kind == "none" else ("mild", "strong", "reset", "constant5"):
                x = make(kind, 2, 200, 2, 64, 64, dtype, strength=strength)
                state = torch.randn(2, 2, 64, 64, device="cuda")
                report(f"{str(dtype)[6:]} {kind} {strength} T200 D64", compare(x, kind, state=state), limit)
            for T, K, V in ((1, 64, 64), (15, 16, 32), (17, 128, 128), (63, 100, 65), (65, 256, 128), (130, 128, 257)):
                if dtype == torch.float16 and T != 130:
                    continue
                x = make(kind, 2, T, 2, K, V, dtype)
                report(
                    f"{str(dtype)[6:]} {kind} T{T} K{K} V{V}", compare(x, kind, state=torch.randn(2, 2, K, V, device="cuda")), limit
                )
            x = make(kind, 1, 300, 2, 64, 64, dtype)
            cu = torch.tensor([0, 0, 70, 71, 200, 200, 300], device="cuda", dtype=torch.int32)
            state = torch.randn(6, 2, 64, 64, device="cuda")
            report(f"{str(dtype)[6:]} {kind} packed", compare(x, kind, state=state, cu_seqlens=cu), limit)
            x = make(kind, 1, 2100, 1, 64, 64, dtype)
            report(f"{str(dtype)[6:]} {kind} split", compare(x, kind, state=torch.randn(1, 1, 64, 64, device="cuda")), limit)
            report(
                f"{str(dtype)[6:]} {kind} read before", compare(make(kind, 2, 200, 2, 64, 64, dtype), kind, read="before"), limit
            )
    for kind in ("none", "scalar", "vector", "exact"):
        x = make(kind, 1, 4096, 2, 128, 128, torch.bfloat16)
        big = make(kind, 8, 4096, 16, 128, 128, torch.bfloat16)
        for n, a in big.items():
            a[:1, :, :2] = x[n]
        got = gradients(big, kind, "triton", False)
        rng = torch.Generator(device="cuda").manual_seed(99)
        do = torch.randn(got["o"].shape, generator=rng, device="cuda").to(torch.bfloat16)[:1, :, :2]
        leaves = {n: a.double().requires_grad_() for n, a in x.items()}
        o, _ = call(leaves, kind, "torch")
        grads = torch.autograd.grad((o * do.double()).sum(), list(leaves.values()))
        want = {"o": o, **{"d" + n: a for n, a in zip(leaves, grads, strict=True)}}
        report(f"bf16 {kind} measured shape", {n: error(got[n][:1, :, :2], a.detach()) for n, a in want.items()}, 5e-3)
        again = gradients(big, kind, "triton", False)
        same = all(torch.equal(a, again[n]) for n, a in got.items())
        changed = {n: a.clone() for n, a in big.items()}
        for a in changed.values():
            a[:, 2001:] = -4.9 * torch.rand_like(a[:, 2001:])
        causal = torch.equal(call(changed, kind, "triton")[0][:, :2001], got["o"][:, :2001])
        good &= same and causal
        print(f"{'ok  ' if same and causal else 'MISS'} bf16 {kind} deterministic {same}, causal bit for bit {causal}", flush=True)
        del big, got, again, changed
    return good


def median(f: Callable[[], Any], rep: int = 60, graph: bool = False) -> float:
    """ms of one call; graph: replayed from a CUDA graph, without the time Python needs to launch it."""
    from triton.testing import do_bench, do_bench_cudagraph

    return do_bench_cudagraph(f, rep=rep, return_mode="median") if graph else do_bench(f, warmup=20, rep=rep, return_mode="median")


def floor_ms(kind: str, B: int, T: int, H: int, K: int, V: int) -> tuple[float, float]:
    """ms to read every input and write every output once: forward, forward + backward (fp32 decays)."""
    tokens, gate = B * T * H, {"none": 0, "constant": 0, "scalar": 4}.get(kind, 4 * K)
    forward = tokens * (2 * (2 * K + 2 * V) + gate)
    backward = tokens * (2 * (2 * K + 2 * V) + 2 * (2 * K + V) + 2 * gate)
    return forward / BANDWIDTH * 1e3, (forward + backward) / BANDWIDTH * 1e3


def measure(kind: str, B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    x = make(kind, B, T, H, K, V, dtype)
    for a in x.values():
        a.requires_grad_()
    do = torch.randn(B, T, H, V, device="cuda").to(dtype)

    def both():
        o, _ = call(x, kind, "triton")
        return torch.autograd.grad(o, list(x.values()), do)

    torch.cuda.synchronize()
    start = time.perf_counter()
    both()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    with torch.no_grad():
        forward, eager_forward = (median(lambda: call(x, kind, "triton"), graph=graph) for graph in (True, False))
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    eager_both = median(both)
    peak = torch.cuda.max_memory_allocated() - held
    total = median(both, graph=True)
    floors = floor_ms(kind, B, T, H, K, V)
    return dict(
        kind=kind, B=B, T=T, H=H, K=K, V=V, forward_ms=forward, both_ms=total,
        eager_forward_ms=eager_forward, eager_both_ms=eager_both, forward_floor=floors[0], both_floor=floors[1],
        peak_mib=peak / 2**20, first_call_s=first,
    )  # fmt: skip


SHAPES = (
    (8, 4096, 16, 128, 128), (16, 2048, 16, 128, 128), (1, 32768, 16, 128, 128), (1, 32768, 4, 128, 128), (8, 4096, 32,
    64, 64), (8, 4096, 8, 256, 256),
)  # fmt: skip


def decode(batch: int, H: int = 16, K: int = 128, V: int = 128) -> dict[str, Any]:
    """One token with an fp32 state, in a CUDA graph; bytes are those of reading and writing the state."""
    x = make("scalar", batch, 1, H, K, V, torch.bfloat16)
    S = torch.randn(batch, H, K, V, device="cuda")
    from triton.testing import do_bench_cudagraph

    with torch.no_grad():
        ms = do_bench_cudagraph(
            lambda: call(x, "scalar", "triton", initial_state=S, return_state=True), rep=50, return_mode="median"
        )
    return dict(batch=batch, us=ms * 1e3, share_of_bandwidth=8 * batch * H * K * V / (ms * 1e-3) / BANDWIDTH)


def tune(
    kind: str,
    shape=SHAPES[0],
    roles=("o", "dq", "dk", "dv"),
    candidates: dict[str, list] | None = None,
    rep: int = 30,
    gate=torch.float32,
) -> None:
    """Time every role of one kind over candidate tiles, gate's gradient included."""
    from linnet.ops.triton import _linear
    from linnet.ops.triton._plan import Call

    B, T, H, K, V = shape
    x = make(kind, B, T, H, K, V, torch.bfloat16)
    q, k, v, *g = x.values()
    g = g[0].reshape(B, T, H, -1).to(gate) if g else None
    do = torch.randn(B, T, H, V, device="cuda").bfloat16()
    bound = BOUND if kind == "vector" else None
    plan = Call(q, v, g, None, K**-0.5, False, H, bound)
    table = _table.TABLE["sm90"][plan.table_kind]
    names = list(candidates)
    for values in itertools.product(*candidates.values()):
        times = []
        for role in roles:
            kept = dict(table)
            table.update({r: replace(t, **dict(zip(names, values, strict=True))) for r, t in table.items()})
            for r in table if "M" not in names else ():  # the block of the gate's gradient stays
                table[r] = replace(table[r], M=max(1, kept["dk"].C * kept["dk"].M // table[r].C))
            plan.sums = plan.pairs = None
            try:
                new = lambda *s, dtype=torch.float32: torch.empty(s, device="cuda", dtype=dtype)
                extra: dict[str, Any] = {}
                NB = plan.block_count()
                NZ = -(-K // table["dk"].BZ)
                if g is not None and role in ("dq", "dk"):
                    extra["blocks"] = torch.zeros(NB, H, V, K, device="cuda", dtype=torch.bfloat16)
                    if plan.kind == "vector":
                        extra["inter"] = torch.zeros(1, B, T, H, K, device="cuda", dtype=torch.bfloat16)
                        if role == "dk":
                            extra |= dict(other=k, dg=new(1, B, T, H, K))
                    else:
                        extra |= dict(weights=new(2, NZ, H, B * T), other=q if role == "dq" else k)
                        if role == "dk":
                            extra["products"] = new(NB, H, NZ)
                args = {"o": (q, k, v), "dq": (do, v, k), "dk": (v, do, q), "dv": (k, q, do)}[role]
                out = new(1, B, T, H, args[2].shape[3], dtype=torch.bfloat16)
                run = lambda role=role, args=args, out=out, extra=extra: _linear._role(plan, role, *args, out=out, **extra)
                began = time.perf_counter()
                run()
                torch.cuda.synchronize()
                compiled = time.perf_counter() - began
                times.append(f"{role} {median(run, rep):.3f} (first {compiled:.1f}s)")
            except Exception as problem:  # noqa: BLE001 - a candidate may not fit the machine
                times.append(f"{role} FAIL {type(problem).__name__}")
            table.update(kept)
        print(kind, " ".join(f"{n}={v}" for n, v in zip(names, values, strict=True)), "|", "  ".join(times), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tune", choices=KINDS)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    if options.check and not check():
        raise SystemExit("a check failed")
    if options.tune:
        tune(options.tune, candidates={"BZ": [64, 128], "warps": [4, 8], "stages": [2, 3]})
    if options.check or options.tune:
        return
    rows = []
    for shape in SHAPES:
        for kind in options.kinds.split(","):
            row = measure(kind, *shape)
            rows.append(row)
            print(
                f"B{row['B']} T{row['T']} H{row['H']} K{row['K']} V{row['V']} {kind:9s} "
                f"forward {row['forward_ms']:.3f} (floor {row['forward_floor']:.3f})  "
                f"forward+backward {row['both_ms']:.3f} (floor {row['both_floor']:.3f})  "
                f"eager {row['eager_forward_ms']:.3f} | {row['eager_both_ms']:.3f}  "
                f"peak {row['peak_mib']:.0f} MiB  first call {row['first_call_s']:.1f} s",
                flush=True,
            )
    for batch in (1, 64, 256):
        row = decode(batch)
        rows.append(row)
        print(f"decode batch {batch}: {row['us']:.1f} us, {row['share_of_bandwidth']:.0%} of the bandwidth", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
