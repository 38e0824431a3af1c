"""What a call of linear attention needs to know before any kernel runs: sizes, kind of decay, configuration, splits of the time.

Imports no triton: the fake implementations use it, too.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from linnet.ops.triton import _hopper, _table

SHORT = 1024  # tokens up to which a state is kept for every chunk: cheap there, and the most accurate
WIDEST = 256  # key and value channels per head that the delta rule holds: a state tile of 512 key channels fills the registers
CHANNEL_CHUNK, NEAR = 64, 66.0  # 64 tokens over which all log-decays together stay within 66 are near: e^66 = 2^95
RESET = -110.0  # e^-110 is zero in fp32
SAFE_EXPONENT = 80.0  # e^80 and e^-80 are in the range of fp32 and bf16
SAFE_EXPONENT_FP32 = 40.0  # and the last of the three terms of a TF32 product of e^-40 still is


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is for kernels, too: on the host it takes 10 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not less than n."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(None)
def device_facts(index: int | None) -> tuple[str, int]:
    """Architecture and number of multiprocessors; index None: Triton's interpreter on the CPU."""
    if index is None:
        return "sm90", 2
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm{major}{minor}", torch.cuda.get_device_properties(index).multi_processor_count


def facts(x: Tensor) -> tuple[str, int]:
    return device_facts(x.device.index if x.is_cuda else None)


def rows_of(x: Tensor) -> Tensor:
    """x [B, T, H, D] itself if its tokens are equally spaced rows of H*D packed values, a packed copy otherwise."""
    B, T, H, D = x.shape
    packed = (D == 1 or x.stride(3) == 1) and (H == 1 or x.stride(2) == D) and (B == 1 or x.stride(0) == T * x.stride(1))
    return x if packed else x.contiguous()


def safe_exponent(dtype: torch.dtype) -> float:
    return SAFE_EXPONENT_FP32 if dtype == torch.float32 else SAFE_EXPONENT


def frame_rows(kind: str, dtype: torch.dtype, bound: float | None) -> int:
    """Rows over which a declared bound keeps products in range; 0: halving, for any decay."""
    if kind != "vector" or bound is None or dtype == torch.float16 or 16 * -bound > safe_exponent(dtype):
        return 0
    return 16


class Call:
    """What all roles of one call share."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        g: Tensor | None,
        cu: Tensor | None,
        scale: float,
        exclusive: bool,
        heads: int,
        bound: float | None,
        gain: Tensor | None = None,
    ):
        self.B, self.T = q.shape[:2]
        self.K, self.V = q.shape[3], v.shape[3]
        self.N = self.B if cu is None else cu.shape[0] - 1
        self.heads, self.H = heads, max(q.shape[2], heads)
        self.cu, self.scale, self.exclusive = cu, scale, exclusive
        self.gain = None if gain is None else rows_of(gain)  # like g, which is given with it
        self.g = None if g is None else rows_of(g)
        self.kind = "none" if g is None else "scalar" if g.shape[3] == 1 else "vector"
        self.dtype = q.dtype
        self.frame = frame_rows(self.kind, q.dtype, bound)
        self.far = bound is None or bound * CHANNEL_CHUNK < -NEAR
        if self.in_channels:
            self.floor = RESET if self.far else -NEAR / CHANNEL_CHUNK
        else:
            self.floor = -safe_exponent(self.dtype) / self.frame if self.frame else -200.0
        self.architecture, self.processors = facts(q)
        self.on_hopper = _hopper.supported(q.is_cuda, self.architecture)
        self.sums = self.pairs = self.ready = None  # filled by the first role that needs them
        kind = "channel" if self.in_channels else "vector" if self.frame else "exact"
        self.table_kind = kind if self.kind == "vector" else self.kind

    @property
    def in_channels(self) -> bool:
        """Whether the kernels of _kernel_channel.py run: a decay per channel on 16-bit operands."""
        return self.kind == "vector" and self.dtype != torch.float32

    def tile(self, role: str) -> _table.Tile:
        return _table.tile(self.architecture, self.table_kind, role, self.dtype.itemsize, self.K, self.V)

    def chunk(self, role: str) -> int:
        """Tokens a program takes at a time."""
        return self.tile(role).C

    @property
    def block(self) -> int:
        """Tokens between the states that the gate's gradient uses; splits of the time are multiples of it."""
        t = self.tile("dk")
        chunk = max(t.C, self.tile("o").C)
        return chunk if self.T <= SHORT else max(chunk, t.C * t.M)

    @property
    def splits(self) -> int:
        t = self.tile("o")
        programs = self.N * self.heads * -(-self.V // t.BZ) * max(1, t.warps // 4)  # as many as of four warps
        return _table.splits(programs, self.T, self.block, self.processors)

    def block_count(self) -> int:
        return self.T // self.block + self.N if self.cu is not None else self.N * -(-self.T // self.block)


class DeltaCall:
    """What the kernels of one call of the delta rule share."""

    def __init__(
        self, q: Tensor, k: Tensor | None, p: Tensor, v: Tensor, g: Tensor | None, cu: Tensor | None, scale: float, before: bool,
        exclusive: bool, heads: int, bound: float | None,
    ):  # fmt: skip
        self.B, self.T = q.shape[:2]
        self.K, self.V = q.shape[3], v.shape[3]
        self.N = self.B if cu is None else cu.shape[0] - 1
        self.heads, self.H = heads, max(q.shape[2], heads)
        self.cu, self.scale, self.before, self.exclusive = cu, scale, before, exclusive
        self.kind = "none" if g is None else "scalar" if g.shape[3] == 1 else "vector"
        self.dtype = q.dtype
        self.frame = frame_rows(self.kind, q.dtype, bound)
        self.floor = -safe_exponent(self.dtype) / self.frame if self.frame else -200.0
        self.precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
        self.architecture, self.processors = facts(q)
        self.on_hopper = _hopper.supported(q.is_cuda, self.architecture)
        self.C = self.tile("forward").C
        self.chunks = self.T // self.C + self.N if cu is not None else self.N * -(-self.T // self.C)
        self.ragged = cu is not None or self.T % self.C != 0

    @property
    def framed(self) -> bool:
        """Whether the kernels for a declared bound run: 16-bit operands, one tile of keys and values."""
        return self.frame > 0 and self.dtype != torch.float32 and max(self.K, self.V) <= 128

    @property
    def levels(self) -> dict:
        """Options of the kernels for any decay."""
        return dict(LEVELS=self.C.bit_length() - 1, FRAME=self.frame > 0, SPLIT=self.dtype != torch.float32)

    def tile(self, part: str) -> _table.DeltaTile:
        kind = "scalar" if self.kind != "vector" else "vector" if self.framed else "exact"
        return _table.delta_tile(self.architecture, kind, part, self.dtype.itemsize, max(self.K, self.V))

    def triton_dtype(self, language):
        return language.float32 if self.dtype == torch.float32 else language.bfloat16

    @property
    def splits(self) -> int:
        t = self.tile("forward")
        programs = self.N * self.H * -(-self.V // t.BV) * max(1, t.warps // 4)  # as many as of four warps
        return _table.splits(programs, self.T, 2 * self.C, self.processors)


class DplrCall(DeltaCall):
    """What the kernels of one call of DPLR share; p and v are its k and v."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, cu: Tensor | None, scale: float, heads: int, bound: float | None
    ):
        super().__init__(q, None, k, v, g, cu, scale, True, False, heads, bound)
        # the longest frame over which the declared bound keeps e^{-sum} in range; one token: halving, for any decay
        reach = 0 if g is None or bound is None else self.C if bound == 0 else safe_exponent(self.dtype) / -bound
        self.frame = max((n for n in (16, 32, 64) if n <= min(self.C, reach)), default=1)
        self.floor = -safe_exponent(self.dtype) / self.frame if self.frame > 1 else -200.0

    def tile(self, part: str) -> _table.DeltaTile:
        kind = "whole" if self.kind == "none" or self.frame == _table.SWEEP.C else "cut"
        return _table.dplr_tile(self.architecture, kind, part, self.dtype.itemsize, max(self.K, self.V))
