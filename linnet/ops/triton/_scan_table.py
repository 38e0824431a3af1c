"""Launch configurations of the operators with a vector state and of the norms, chosen by measurement. Imports no triton.

An entry holds for every shape: these kernels are bound by memory or by exponentials, and a program's share does not depend on the
size of the call. More parallelism than rows and channels offer comes from splitting the time.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linnet.ops.triton._plan import facts


@dataclass(frozen=True)
class Tile:
    """BD channels a program, U tokens unrolled (the tokens between two kept states of selective_scan), buffers of the ring."""

    BD: int = 64
    U: int = 16
    stages: int = 3
    warps: int = 1
    vector: int = 4


TABLE = {
    "sm90": {
        "scan": Tile(64, 16, 6),
        "selective_scan": Tile(32, 4, 3),
        "short_conv": Tile(256, 64, 2),
        "softmax_cross_entropy": Tile(U=4096, stages=2, warps=8),  # U logits at a time
        "norm": Tile(U=16, warps=4),  # U rows of 128 values a program
    }
}


def choose(op: str, x: Tensor) -> Tile:
    """The configuration of an operator on the device of x; architectures without measurements use those of sm90."""
    return TABLE.get(facts(x)[0], TABLE["sm90"])[op]


def splits(programs: int, tokens: int, unit: int, x: Tensor, wanted: int = 2) -> int:
    """Into how many parts the time is cut so that about `wanted` programs a processor run; 1 where half of that is reached."""
    room = wanted * facts(x)[1] // max(programs, 1)
    return max(1, min(room, tokens // (8 * unit), 16))
