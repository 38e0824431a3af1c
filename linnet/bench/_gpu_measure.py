"""One measurement of `linnet bench gpu`: time, memory, accuracy, and the first call in a process whose caches are empty."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from linnet.bench._gpu_rows import IMPLEMENTATION, ROWS, Operands, Row, Sizes, shape_name, traffic
from linnet.bench._measure import milliseconds
from linnet.ops import _dispatch

PART = {"B": 1, "H": 2, "G": 1, "D": 64, "C": 128}  # the rows, heads, channels whose accuracy is checked
NOMINAL = {"H200": 4.8e12, "H100": 3.35e12, "GH200": 4.9e12, "A100": 2.04e12, "B200": 8e12}  # bytes/s of the data sheets
CACHE_BYTES = 256 * 2**20  # operands of a small call are laid out so often that no cache holds them


def bandwidth(device: str) -> float:
    """Nominal memory bandwidth of this device in bytes/s; an H200's where the name is unknown."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((rate for part, rate in NOMINAL.items() if part in name), NOMINAL["H200"])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


class _Found(Exception):
    pass


def backend_of(run: Callable[..., Any], x: Operands, **options: Any) -> str:
    """The backend on which Linnet's call run(x) is measured: triton, named where it must be, else what is chosen by default."""
    found = []

    def look(op: str, backend: str | None, arguments: dict[str, Any]) -> None:
        kernels = op in _dispatch.operators() and _dispatch.refusal(op, "triton", arguments) is None
        found.append("triton" if kernels else _dispatch.choose(op, arguments))
        raise _Found

    with _dispatch.use_handler(look), contextlib.suppress(_Found):
        run(x, **options)
    return found[0]


def heads_first(a: Tensor) -> Tensor:
    return a.transpose(1, 2).contiguous() if a.ndim >= 3 else a


class Case:
    """One implementation of one row on one shape: operands, and the two things that are timed."""

    def __init__(self, row: Row, implementation: str, shape: Sizes, device: str = "cuda", dtype: torch.dtype = torch.bfloat16):
        self.row, self.device, self.dtype = row, device, dtype
        self.peer = None if implementation == IMPLEMENTATION else row.peers[implementation]
        x = row.make(shape, device, dtype)
        self.turn = heads_first if self.peer and self.peer.heads_first else (lambda a: a)
        self.x = {n: self.turn(a) for n, a in x.items()}
        sizes = row.sizes(shape)
        rng = torch.Generator(device=device).manual_seed(1)
        do = torch.randn([sizes[c] for c in row.output], generator=rng, device=device)
        self.do = self.turn(do.to(torch.float32 if row.own_gradient else dtype))
        self.learned = [n for n, a in x.items() if n not in row.constants and a.is_floating_point()]
        self.leaves = {n: a.detach().requires_grad_(n in self.learned) for n, a in self.x.items()}
        self.backend = implementation
        self.bytes = traffic(row, x, self.do.nbytes)

    def load(self) -> None:
        """Import the library and bind the call."""
        if self.peer is not None:
            self.call = self.peer.load()
        else:
            self.backend = backend_of(self.row.run, self.leaves)
            self.call = lambda x, **options: self.row.run(x, backend=self.backend, **options)[0]

    def forward(self) -> Tensor:
        more = {"return_gradient": False} if self.row.own_gradient and self.peer is None else {}
        with torch.no_grad():
            return self.call(self.x, **more)

    def both(self, do: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output and the gradients of `learned`."""
        if self.row.own_gradient and self.peer is None:
            o, gradient = self.row.run(self.x, backend=self.backend)
            return o, (gradient,)
        o = self.call(self.leaves)
        leaves = [self.leaves[n] for n in self.learned]
        return o.detach(), torch.autograd.grad(o, leaves, (self.do if do is None else do).to(o.dtype))


class Decode:
    """One token for every sequence of a batch: reads and writes the states. As many copies as no cache holds."""

    def __init__(self, row: Row, implementation: str, shape: Sizes, device: str = "cuda", dtype: torch.dtype = torch.bfloat16):
        self.row, self.device, self.backend = row, device, implementation
        self.peer = None if implementation == IMPLEMENTATION else row.peers[implementation]
        x = row.make(shape, device, dtype)
        sizes = row.sizes(shape)
        shapes = [[sizes[c] for c in letters] for letters in row.state.values()]
        size = 4 * sum(math.prod(s) for s in shapes)
        count = min(256, max(1, CACHE_BYTES // size)) if device == "cuda" else 1
        new = lambda s: torch.randn(s, device=device)
        self.copies = [({n: a.clone() for n, a in x.items()}, tuple(map(new, shapes))) for _ in range(count)]
        self.bytes = (traffic(row, x, x["v"].nbytes, size)[0], 0)

    def load(self) -> None:
        x, state = self.copies[0]
        with torch.no_grad():
            if self.peer is None:
                self.backend = backend_of(self.row.run, x, initial_state=state, return_state=True)
                options = {"backend": self.backend, "return_state": True}
                self.call = lambda x, state: self.row.run(x, initial_state=state, **options)
            elif self.peer.package == "linnet":
                one = self.peer.step()
                self.backend = backend_of(one, x, state=state[0])
                self.call = lambda x, state: one(x, state=state[0], backend=self.backend)
            else:
                one = self.peer.step()
                self.call = lambda x, state: one(x, state[0])

    def forward(self) -> None:
        with torch.no_grad():
            for x, state in self.copies:
                self.call(x, state)


def unlocked(c: Case) -> contextlib.AbstractContextManager:
    """Where a peer that refuses its gradient computes it all the same."""
    return c.peer.unlock() if c.peer is not None and c.peer.unlock is not None else contextlib.nullcontext()


def case(row: Row, implementation: str, shape: Sizes, device: str = "cuda") -> Case | Decode:
    return (Decode if shape["T"] == 1 and row.state else Case)(row, implementation, shape, device)


# time and memory


def eager_ms(f: Callable[[], Any], device: str, budget_ms: float = 100) -> float:
    """Median ms of calls launched one after the other by Python."""
    if device != "cuda":
        return milliseconds(f, budget=budget_ms / 1e3)
    f()
    pairs: list[tuple[Any, Any]] = []
    began = time.perf_counter()
    while len(pairs) < 5 or (len(pairs) < 100 and (time.perf_counter() - began) * 1e3 < budget_ms):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        pairs.append((start, end))
        if len(pairs) % 5 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs)


def replay_ms(f: Callable[[], Any], estimate_ms: float, budget_ms: float = 100) -> float:
    """Median ms of a call replayed from a CUDA graph, without what Python needs to launch it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            f()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    calls = min(20, max(1, math.ceil(5 / max(estimate_ms, 1e-3))))  # several calls a graph hide the cost of its launch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            f()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(min(20, max(5, math.ceil(budget_ms / (calls * max(estimate_ms, 1e-3)))))):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def kernels_ms(f: Callable[[], Any], device: str, calls: int = 3) -> dict[str, float]:
    """Milliseconds of f by kernel, as the profiler sees them, the longest first; what is below a hundredth is put together."""
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    f()
    synchronize(device)
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(calls):
            f()
        synchronize(device)
    times: dict[str, float] = {}
    for event in profile.key_averages():
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        name = re.split(r"[<(]", event.key.removeprefix("void "), maxsplit=1)[0]
        times[name] = times.get(name, 0.0) + spent / calls / 1e3
    least = 0.01 * sum(times.values())
    found = dict(sorted(((n, t) for n, t in times.items() if t > least), key=lambda x: -x[1]))
    rest = sum(times.values()) - sum(found.values())
    return found | ({"rest": rest} if rest > 0 else {})


def peak_mib(f: Callable[[], Any], device: str) -> float | None:
    """MiB that f needs beyond what is held already, its results included."""
    if device != "cuda":
        return None
    free(device)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    result = f()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - held) / 2**20


# accuracy


def part_of(a: Tensor, letters: str, part: dict[str, int]) -> Tensor:
    """The checked part of an operand, its gradient or the output."""
    return a[tuple(slice(part.get(c)) for c in letters)]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative root-mean-square error; NaN where the result is not finite."""
    if not bool(torch.isfinite(got).all()):
        return math.nan
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def errors(c: Case, shape: Sizes) -> dict[str, float]:
    """Errors of o and of every gradient on a few rows and heads against backend torch in fp64 on the same rounded operands.

    Outside the checked part the output's gradient is zero, so that the gradients of shared operands are those of the part.
    """
    row, part = c.row, PART | ({"H": 1} if shape["T"] > 32768 else {})
    fresh = Case(row, IMPLEMENTATION, shape, c.device, c.dtype)
    back = (lambda a: a.transpose(1, 2) if a.ndim >= 3 else a) if c.turn is heads_first else (lambda a: a)
    do = torch.zeros_like(fresh.do)
    part_of(do, row.output, part).copy_(part_of(fresh.do, row.output, part))
    c.x, c.leaves = (
        {n: c.turn(a.detach().clone()) for n, a in fresh.x.items()} for _ in range(2)
    )  # a loss may overwrite its logits
    for n in c.learned:
        c.leaves[n].requires_grad_()
    o, grads = c.both(c.turn(do))
    slices = {n: part_of(a.detach(), row.operands[n].letters, part) for n, a in fresh.x.items()}
    exact = {n: a.double().requires_grad_(n in c.learned) if a.is_floating_point() else a for n, a in slices.items()}
    if row.own_gradient:
        want, d = row.run({n: a.detach().clone() for n, a in exact.items()}, backend="torch")
        wanted = (d,) if c.peer is None else (d * part_of(do, row.output, part)[:, None].double(),)
    else:
        want, _ = row.run(exact, backend="torch")
        wanted = torch.autograd.grad(want, [exact[n] for n in c.learned], part_of(do, row.output, part).double())
    found = {"o": relative_error(part_of(back(o), row.output, part), want.detach())}
    for n, got, expected in zip(c.learned, grads, wanted, strict=True):
        found["d" + n] = relative_error(part_of(back(got), row.operands[n].letters, part), expected)
    return found


# one record


def words(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {' '.join(lines[:3])}"[:400]


def measure(row: Row, implementation: str, shape: Sizes, device: str = "cuda", check: bool = True) -> dict[str, Any]:
    """Everything about one implementation of one row on one shape. A gradient that fails leaves the forward's figures."""
    record: dict[str, Any] = {}
    c = case(row, implementation, shape, device)
    c.load()
    c.forward()
    record |= {"backend": c.backend, "forward_bytes": c.bytes[0], "both_bytes": c.bytes[1]}
    count = len(c.copies) if isinstance(c, Decode) else 1
    with contextlib.ExitStack() as stack:
        runs = {"forward": c.forward}
        if isinstance(c, Case):
            try:
                c.both()
            except Exception as problem:  # noqa: BLE001 - peers refuse in many ways
                record["backward_failed"] = words(problem)
            if "backward_failed" in record and c.peer is not None and c.peer.unlock is not None:
                stack.enter_context(unlocked(c))
                with contextlib.suppress(Exception):
                    c.both()
                    record["note"] = "the peer refuses this gradient here; timed with its refusal switched off"
                    record["refused"] = record.pop("backward_failed")
            if "backward_failed" not in record:
                runs["both"] = c.both
                record["peak_mib"] = peak_mib(c.both, device)
        for name, f in runs.items():
            record[f"{name}_eager_ms"] = eager_ms(f, device) / count
        for name, f in runs.items() if device == "cuda" else ():
            try:
                record[f"{name}_ms"] = replay_ms(f, record[f"{name}_eager_ms"] * count) / count
            except Exception as problem:  # noqa: BLE001 - what cannot be captured is reported as eager
                record["graph_failed"] = words(problem)
                synchronize(device)
        if implementation == IMPLEMENTATION and isinstance(c, Case):
            try:
                record["kernels"] = {name: kernels_ms(f, device) for name, f in runs.items()}
            except Exception as problem:  # noqa: BLE001 - not every machine lets one profile; the times stay
                record["profile_failed"] = words(problem)
        if check and "both" in runs and row.run is not None:
            try:
                record["errors"] = errors(c, shape)
            except Exception as problem:  # noqa: BLE001 - a missing check is shown, the times stay
                record["check_failed"] = words(problem)
    return record


# the first call


def first_call(row: Row, implementation: str, shape: Sizes, device: str) -> dict[str, float]:
    """Seconds from an imported torch and finished operands to the first gradients: importing the library, then the rest."""
    c = Case(row, implementation, shape, device)
    synchronize(device)
    start = time.perf_counter()
    c.load()
    imported = time.perf_counter()
    with unlocked(c):
        c.both()
        synchronize(device)
    return {"import_s": imported - start, "first_s": time.perf_counter() - start}


def cold(row: Row, implementation: str, shape: Sizes, device: str, timeout: float) -> dict[str, Any]:
    """first_call in a new process with an empty Triton cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ, TRITON_CACHE_DIR=os.path.join(folder, "triton"))
        command = [sys.executable, "-m", "linnet.bench.gpu", "--cold-case", row.name, implementation, shape_name(shape)]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [*command, "--device", device], capture_output=True, text=True, env=environment, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"no result after {timeout:.0f} s"}
        if done.returncode:
            return {"failed": " ".join(done.stderr.strip().splitlines()[-2:])[:400]}
        return {**json.loads(done.stdout.strip().splitlines()[-1]), "process_s": time.perf_counter() - start}


# filling Triton's cache


@contextlib.contextmanager
def quick_tuning(device: str) -> Iterator[None]:
    """Peers that tune themselves take 3 + 12 ms a configuration instead of Triton's 25 + 100: the same choice, sooner."""
    if device != "cuda" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import driver
    from triton.testing import do_bench

    active, before = driver.active, driver.active.get_benchmarker
    active.get_benchmarker = lambda: lambda f, quantiles=None, **_: do_bench(f, warmup=3, rep=12, quantiles=quantiles)
    try:
        yield
    finally:
        active.get_benchmarker = before


_tuners: set[Any] = set()
_share = (0, 1)


def _compile_only() -> None:
    """Let Triton's autotuner run every configuration of this process's share once and keep no timings.

    Timing many configurations from many processes on one GPU would choose by noise; the measuring process tunes alone, on
    kernels that are compiled by then.
    """
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    def once(f: Callable[[], Any], quantiles: Any = None, **_: Any) -> list[float]:
        f()
        return [1.0, 1.0, 1.0]

    run, bench = Autotuner.run, Autotuner._bench

    def shared_run(self, *args: Any, **kwargs: Any) -> Any:
        _tuners.add(self)
        self.cache_results = False
        return run(self, *args, **kwargs)

    def shared_bench(self, *args: Any, config: Any, **meta: Any) -> Any:
        index = self.configs.index(config) if config in self.configs else 0
        return bench(self, *args, config=config, **meta) if index % _share[1] == _share[0] else [math.inf] * 3

    Autotuner.run, Autotuner._bench = shared_run, shared_bench
    driver.active.get_benchmarker = lambda: once


def warm_start(device: str) -> None:
    """First thing in a process that fills the cache."""
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        _compile_only()


WarmJob = tuple[str, str, str, Sizes, int, int, str]  # key, row, implementation, shape, share, shares, device


def take_share(share: int, shares: int) -> None:
    """In a process that fills the cache: of the configurations of autotuned kernels every `shares`-th from `share` on."""
    global _share
    _share = (share, shares)
    for tuner in _tuners:
        tuner.cache.clear()


def warm_one(job: WarmJob) -> tuple[str, str | None]:
    """First calls of one implementation, for its share of configurations."""
    name, row, implementation, shape, share, shares, device = job
    take_share(share, shares)
    problem = None
    try:
        c = case(ROWS[row], implementation, shape, device)
        c.load()
        c.forward()
        if isinstance(c, Case):
            with unlocked(c):
                c.both()
        synchronize(device)
    except Exception as error:  # noqa: BLE001 - the measurement will tell
        problem = words(error)
    c = None
    free(device)
    return name, problem


def warm(
    jobs: list[Any], workers: int, seconds: float, device: str, one: Callable[[Any], tuple[str, str | None]] = warm_one
) -> Iterator[tuple[str, str | None]]:
    """Run the jobs in `workers` processes for at most `seconds`; yields (key, what went wrong) of those that end."""
    import multiprocessing

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    end = time.monotonic() + seconds
    pool = multiprocessing.get_context("spawn").Pool(workers, warm_start, (device,))
    try:
        results = pool.imap_unordered(one, jobs)
        for _ in jobs:
            yield results.next(timeout=max(0.1, end - time.monotonic()))
    except multiprocessing.TimeoutError:
        pass
    finally:
        pool.terminate()
        pool.join()
