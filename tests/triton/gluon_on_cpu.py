"""Gluon kernels on a CPU: their own source, with torch in the place of the GPU and the worst order of events that it allows.

A buffer is NaN from the moment at which a copy into it is asked for until the program has waited for it; a copy out of a buffer
and a product read their operands as late as the waits allow. What reads or overwrites a buffer too early gives wrong numbers.
Operands may be fp32, so that nothing hides behind rounding.
Not modelled: threads and layouts (a missing barrier between warps), and accumulation order.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from types import SimpleNamespace

import torch

MODULES = ("linnet.ops.triton._kernel_hopper", "linnet.ops.triton._kernel_hopper_dplr")


@dataclasses.dataclass
class Rows:
    """A descriptor: tiles of the rows of a matrix."""

    matrix: torch.Tensor
    block: tuple[int, int]
    size: int  # bytes of a number on the GPU
    layout: None = None

    @property
    def dtype(self):
        return self.matrix.dtype

    def tile(self, at):
        row, column = (int(a) for a in at)
        assert row >= 0 and column >= 0
        tile = self.matrix[row : row + self.block[0], column : column + self.block[1]]
        assert tuple(tile.shape) == self.block
        return tile


def tiles(a: torch.Tensor, width: int, stride: int, rows: int, columns: int, size: int = 2) -> Rows:
    """As `_hopper._tiles`."""
    return Rows(a.as_strided((a.numel() // width, width), (stride, 1)), (rows, columns), size)


class Pointer:
    def __init__(self, values, at=0):
        self.values, self.at = values, at

    def __add__(self, offset):
        return Pointer(self.values, self.at + offset)

    def element(self):
        at = torch.as_tensor(self.at)
        assert bool((at >= 0).all()) and bool((at < self.values.numel()).all())
        return at


class Buffer:
    """A tile in shared memory, or a view of one."""

    def __init__(self, values):
        self.values = values
        self.shape, self.dtype = values.shape, values.dtype

    def index(self, i):
        return Buffer(self.values[i])

    def permute(self, order):
        return Buffer(self.values.permute(order))

    def slice(self, start, length):
        return Buffer(self.values[start : start + length])

    def load(self, layout):
        return self.values.clone()

    def store(self, x):
        assert x.dtype == self.dtype
        self.values.copy_(x)


class Barrier:
    pending, expected, phases = (), 0, 0


class Product:
    """a b + c, not before somebody waits for it."""

    def __init__(self, a, b, c):
        self.operands, self.value = (a, b, c), None

    def finish(self):
        a, b, c = (x.values if isinstance(x, Buffer) else x.value if isinstance(x, Product) else x for x in self.operands)
        assert a.dtype == b.dtype
        self.value = a.float() @ b.float() + c


class Program:
    """The modules that a kernel sees."""

    def __init__(self, program: int, programs: int):
        self.products, self.stores = [], []
        scalar = lambda x: torch.tensor(x, dtype=torch.int64)
        self.gl = SimpleNamespace(
            constexpr=lambda x: x, float32=torch.float32, int64=torch.int64, int32=torch.int32,
            program_id=lambda axis: scalar(program), num_programs=lambda axis: scalar(programs), static_range=range,
            thread_barrier=lambda: None, allocate_shared_memory=self.allocate,
            arange=lambda start, end, layout: torch.arange(start, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, x, dtype, layout: torch.full(shape, x, dtype=dtype), convert_layout=lambda x, layout: x,
            load=lambda p: p.values[p.element()], store=self.store, exp2=torch.exp2,
            minimum=lambda x, y: torch.as_tensor(x).clamp(max=y),
            where=torch.where, maximum=lambda x, y: torch.clamp(x, min=y), min=lambda x, axis: x.amin(axis),
            sum=lambda x, axis: x.sum(axis), **{n: lambda *a: None for n in (
                "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout")},
        )  # fmt: skip
        nothing = lambda *args, **options: None
        self.mbarrier = SimpleNamespace(MBarrierLayout=nothing, init=nothing, expect=self.expect, wait=self.wait)
        self.tma = SimpleNamespace(
            async_copy_global_to_shared=self.copy_in, async_copy_shared_to_global=self.copy_out, store_wait=self.store_wait
        )

    def allocate(self, dtype, shape, layout):
        if dtype == torch.int64:
            bars = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=bars.__getitem__)
        return Buffer(torch.full(shape, torch.nan, dtype=dtype))

    def store(self, p, x):
        p.values[p.element()] = x.to(p.values.dtype)

    def expect(self, bar, size):
        assert not bar.pending and not bar.expected
        bar.expected = size

    def wait(self, bar, phase):
        if bar.phases % 2 == phase:  # otherwise this phase has passed
            assert bar.pending and bar.expected == 0
            for buffer, tile in bar.pending:
                buffer.values.copy_(tile)
            bar.pending, bar.phases = (), bar.phases + 1

    def copy_in(self, source, at, bar, buffer):
        tile = source.tile(at)
        assert not any(s.values.data_ptr() == buffer.values.data_ptr() for s, _ in self.stores), "not yet written"
        buffer.values.fill_(torch.nan)
        bar.expected -= tile.numel() * source.size
        bar.pending = (*bar.pending, (buffer, tile))

    def copy_out(self, out, at, buffer):
        self.stores.append((buffer, out.tile(at)))

    def store_wait(self, left):
        assert left == 0
        for buffer, tile in self.stores:
            tile.copy_(buffer.values)
        self.stores.clear()

    def multiply(self, a, b, acc, use_acc=True, is_async=True):
        assert is_async
        made = Product(a, b, acc if use_acc else 0.0)
        self.products.append(made)
        return made

    def multiply_wait(self, left, deps):
        while len(self.products) > left:
            self.products.pop(0).finish()
        assert all(d.value is not None for d in deps)
        return deps[0].value if len(deps) == 1 else [d.value for d in deps]


def source() -> str:
    """The kernels without the imports of their modules, and without the one attribute that tensors here do not have."""
    body = []
    for module in MODULES:
        with open(importlib.util.find_spec(module).origin) as f:
            body += [x for x in ast.parse(f.read()).body if not isinstance(x, ast.ImportFrom)]
    return ast.unparse(ast.Module(body, [])).replace("by_warp.type.layout", "None")


class Kernel:
    def __init__(self, name: str):
        self.name, self.code, self.launches = name, compile(source(), MODULES[0], "exec"), 0

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches += 1
            args = [Pointer(a.view(-1)) if isinstance(a, torch.Tensor) else a for a in args]
            for program in range(grid[0]):
                seen = Program(program, grid[0])
                names = dict(
                    gl=seen.gl, mbarrier=seen.mbarrier, tma=seen.tma,
                    gluon=SimpleNamespace(jit=lambda f=None, **_: f or (lambda f: f)), fence_async_shared=lambda: None,
                    range=lambda *a: map(torch.tensor, range(*a)), warpgroup_mma=seen.multiply,
                    warpgroup_mma_wait=seen.multiply_wait,
                )  # fmt: skip
                exec(self.code, names)
                names[self.name](*args, **options)
                assert not seen.products and not seen.stores

        return launch
