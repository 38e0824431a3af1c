"""A way around a defect of ptxas 12.8, the assembler that Triton 3.6 and 3.7 bring along (12.9 and 13.0 do not have it).

A tile in shared memory that tensor cores read is described by 64 bits: its address in the low word, its layout in the high one.
Triton forms the descriptors of a tile's parts by 64-bit additions of a constant to the address. Now and then, where the address
was computed far above, this ptxas adds to another register: the product reads foreign memory, and nothing says so. Here the
additions become 32-bit ones of the low word beside a constant high word, which says the same and costs nothing.
tests/triton/machine_code.py finds the defect in compiled kernels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

ADDITION = re.compile(r"add\.s64\s+(%rd\d+), (%rd\d+), (-?\d+);")
OURS = "linnet/ops/triton"  # in the lines that name the source files; kernels of others are left as they are
LAYOUT = 0xC0003FFF  # the bits of the high word that Triton sets: swizzle and stride


def with_descriptors_in_halves(ptx: str) -> str:
    def halves(match: re.Match[str]) -> str:
        to, address, constant = match.group(1), match.group(2), int(match.group(3)) & (2**64 - 1)
        high, low = constant >> 32, constant & (2**32 - 1)
        if high >> 30 == 0 or high & ~LAYOUT:
            return match.group(0)
        return (
            f"{{ .reg .b32 %low, %high; mov.b64 {{%low, %high}}, {address}; add.s32 %low, %low, {low}; "
            f"mov.b64 {to}, {{%low, {high - 2**32 if high >= 2**31 else high}}}; }}"
        )

    return ADDITION.sub(halves, ptx)


def install() -> None:
    """Have Triton compile Linnet's kernels so. Nothing happens where its compiler cannot be asked."""
    try:
        from triton import knobs
    except ImportError:  # before 3.4
        return
    if not hasattr(knobs.runtime, "add_stages_inspection_hook"):
        return
    before: Callable[..., Any] | None = knobs.runtime.add_stages_inspection_hook
    if getattr(before, "__module__", None) == __name__:
        return

    def hook(*compilation: Any) -> Any:
        key = ("", "") if before is None else before(*compilation)
        if not compilation:  # newer versions ask for what the hook adds to the keys of their caches
            return key
        stages = compilation[1]
        assemble = stages.get("ptx")
        if assemble is not None:

            def ptx(source: Any, metadata: Any) -> str:
                text = assemble(source, metadata)
                foreign = ".file" in text and OURS not in text.replace("\\", "/")
                return text if foreign else with_descriptors_in_halves(text)

            stages["ptx"] = ptx
        return key

    knobs.runtime.add_stages_inspection_hook = hook
