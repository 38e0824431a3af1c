"""Launch configurations of the linear-attention kernels, chosen by measurement; nothing is tuned when an operator is called.

A key is (architecture, decay kind, role, contraction width bucket, bytes per element); the value a `Tile`. An entry is only added
after its gradients passed the check of `linnet bench gpu --check`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """C tokens a chunk, BZ columns a program, M chunks a block of the gate's gradient.

    transposed: the state is the register operand; descriptors, store, sums: operands, outputs, prepared sums through the bulk
    copy engine. BD: widest contraction block; wider operands are cut into several.
    """

    C: int = 64
    BZ: int = 64
    warps: int = 4
    stages: int = 2
    M: int = 2
    transposed: bool = True
    descriptors: bool = True
    store: bool = True
    sums: bool = True
    BD: int = 128


NORMALIZED = {"normalized": Tile(M=4), "gradients": Tile(M=4)}  # o with a normalizer; `gradients_kernel`
NONE = {role: Tile(stages=4, M=4, store=False) for role in ("o", "dq", "dk", "dv")} | NORMALIZED
SCALAR = {
    "o": Tile(BZ=128, warps=8, M=4, stages=4),
    "dq": Tile(M=4, transposed=False, store=False),
    "dk": Tile(M=4, transposed=False),
    "dv": Tile(BZ=128, warps=8, M=4, stages=4),
} | NORMALIZED
CHANNEL = {  # one stage less for sequences whose chunks are not whole
    "o": Tile(BZ=128, warps=8, M=4, stages=4),
    "dq": Tile(BZ=128, warps=8, M=4, stages=3),
    "dk": Tile(BZ=128, warps=8, M=4, stages=3),
    "dv": Tile(BZ=128, warps=8, M=4, stages=4),
}
CHANNEL_REGISTERS = {"prepare": 80, "finish": 128}  # most registers a thread, so that more programs fit a processor
PAIR_WARPS = 2
FP32 = {
    "none": Tile(C=32, BZ=32, M=4, stages=1),
    "scalar": Tile(C=32, BZ=32, M=4, stages=1),
    "vector": Tile(C=16, BZ=32, M=8, stages=1),
    "exact": Tile(C=16, BZ=32, M=8, stages=1),
}


@dataclass(frozen=True)
class DeltaTile:
    """The delta rule on chunks of C tokens. BV, BD: columns of values and keys a program; 16-bit type of the inverse's products."""

    C: int = 64
    BV: int = 64
    BD: int = 128
    warps: int = 4
    stages: int = 2
    descriptors: bool = True
    inverse: str = "float16"
    registers: int | None = None  # most registers a thread, so that more programs fit a processor


SWEEP = DeltaTile(BV=128, warps=8)
NARROW_SWEEP = DeltaTile(BV=64, warps=4)  # of heads up to 64 channels, which eight warps would have to share
DELTA = {
    "scalar": {
        "prepare": DeltaTile(registers=128),
        "forward": SWEEP,
        "backward": SWEEP,
        "gradients": DeltaTile(BD=64, registers=168),
    },
    "vector": {"prepare": DeltaTile(BD=32), "forward": SWEEP, "backward": SWEEP, "gradients": DeltaTile(BD=32, descriptors=False)},
    "exact": {"prepare": DeltaTile(BD=32), "forward": SWEEP, "backward": SWEEP, "gradients": DeltaTile(BD=64)},
}
WIDE_SWEEP = DeltaTile(C=32, BV=64, warps=8)  # 32 tokens: what leaves the state its registers
DELTA_WIDE = {  # key or value heads of 129 to 256 channels
    "scalar": {
        "prepare": DeltaTile(C=32, BD=64, registers=128),
        "forward": WIDE_SWEEP,
        "backward": WIDE_SWEEP,
        "gradients": DeltaTile(C=32, BD=64),
    },
    "exact": {
        "prepare": DeltaTile(C=32, BD=32),
        "forward": WIDE_SWEEP,
        "backward": WIDE_SWEEP,
        "gradients": DeltaTile(C=32, BD=64),
    },
}
DELTA_FP32 = DeltaTile(C=32, BV=32, BD=64, warps=4, stages=1, descriptors=False, inverse="float32")
DPLR = {  # one frame a chunk; where a chunk is cut into frames or halves, wider tiles spill thousands of bytes
    "prepare": DeltaTile(BD=64),
    "fold": DeltaTile(BD=64),
    "forward": SWEEP,
    "backward": SWEEP,
    "solved": DeltaTile(BV=128),
    "gradients": DeltaTile(BD=64),
}
DPLR_CUT = DPLR | {part: DeltaTile(BD=32) for part in ("prepare", "fold", "gradients")}
DPLR_TABLE = {"sm90": {"whole": DPLR, "cut": DPLR_CUT}}
DELTA_TABLE = {"sm90": {128: DELTA, 256: DELTA_WIDE}}
TABLE = {"sm90": {"none": NONE, "scalar": SCALAR, "channel": CHANNEL}}
DEFAULT_ARCHITECTURE = "sm90"


NARROW = {16: 1, 32: 2}  # channels up to which a tile of fp32 has fewer warps: four would all form its factors and addresses


def narrow(chosen, width: int):
    """The configuration for heads of `width` channels."""
    return replace(chosen, warps=next((w for most, w in NARROW.items() if width <= most), chosen.warps))


def tile(architecture: str, kind: str, role: str, element_size: int, K: int, V: int) -> Tile:
    """The configuration of one role for heads of K key and V value channels.

    Architectures without measurements use those of sm90; older ones with at most two stages (they have less shared memory) and no
    tensor descriptors.
    """
    if element_size == 4:
        chosen = narrow(FP32[kind], max(K, V))
    else:
        chosen = TABLE.get(architecture, TABLE[DEFAULT_ARCHITECTURE])[kind][role]
        if V <= 64 and kind in ("none", "scalar") and role in ("o", "dv"):
            # eight warps would share 64 columns; with two or three stages two programs fit a processor
            chosen = replace(chosen, BZ=64, warps=4, stages=3 if K <= 64 else 2)
    older = int(architecture.removeprefix("sm")) < 90  # sm100 is newer
    return replace(chosen, descriptors=False, stages=min(chosen.stages, 2)) if older else chosen


def delta_tile(architecture: str, kind: str, part: str, element_size: int, width: int) -> DeltaTile:
    """The configuration of one kernel of the delta rule; width: the wider of a head's keys and values."""
    if element_size == 4:
        return narrow(DELTA_FP32, width)
    chosen = DELTA_TABLE.get(architecture, DELTA_TABLE[DEFAULT_ARCHITECTURE])[128 if width <= 128 else 256][kind][part]
    chosen = NARROW_SWEEP if chosen is SWEEP and width <= 64 else chosen
    return replace(chosen, descriptors=False) if int(architecture.removeprefix("sm")) < 90 else chosen


def dplr_tile(architecture: str, kind: str, part: str, element_size: int, width: int) -> DeltaTile:
    """The configuration of one kernel of DPLR; kind: whether its chunks are "whole" or "cut" into frames or halves."""
    if element_size == 4:
        return narrow(DELTA_FP32, width)
    chosen = DPLR_TABLE.get(architecture, DPLR_TABLE[DEFAULT_ARCHITECTURE])[kind][part]
    chosen = NARROW_SWEEP if chosen is SWEEP and width <= 64 else chosen
    return replace(chosen, descriptors=False) if int(architecture.removeprefix("sm")) < 90 else chosen


def splits(programs: int, tokens: int, unit: int, processors: int) -> int:
    """Into how many parts the time of a sequence is cut so that `programs` programs fill the processors; exact for any number."""
    wanted = 2 * processors // max(programs, 1)  # two programs a processor; one split more would cost its pass over the operands
    return max(1, min(wanted, tokens // (4 * unit))) if wanted > 1 else 1
