"""Finds what ptxas 12.8 compiles wrongly, in machine code.

A lost address: a product reads another tile than it was told, see linnet/ops/triton/_ptxas.py. The high word of a descriptor is the
sum of its constant and zero, with the carry of the low word's sum; where the register is not known to hold zero, the address was
lost. Known: followed in the order of the instructions, which is enough here.

An overwritten operand: a product is asynchronous and may read its registers at any time until it was waited for. Where two products
share constant registers, ptxas may set one of them between the two, too late for the first.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def machine_code(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, "-sass", file.name], check=True, capture_output=True, text=True).stdout


def lost_addresses(code: str) -> list[str]:
    """The instructions of a kernel that form a descriptor from something else than its address."""
    zero: dict[int, bool] = {}
    found = []
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", code):
        match = re.match(r"(@!?U?P\w+\s+)?((?:U|R2UR|S2UR|CS2UR)[A-Z0-9_.]*)\s+(.*)", instruction)
        if match is None:
            continue
        conditional, operation, operands = match.groups()
        values = [x for x in operands.replace(" ", "").split(",") if not re.fullmatch(r"!?U?P[0-9T]", x)]
        if not values or not re.fullmatch(r"UR\d+", values[0]):
            continue
        to = int(values[0][2:])
        if operation == "UIADD3.X" and any(_is_layout(x) for x in values[1:]):
            if not all(zero.get(int(x[2:]), False) for x in values[1:] if re.fullmatch(r"UR\d+", x)):
                found.append(instruction.strip())
        is_zero = operation == "UMOV" and values[1] == "URZ" and (conditional is None or zero.get(to, False))
        for register in range(to, to + (2 if ".64" in operation or "WIDE" in operation else 1)):
            zero[register] = False
        zero[to] = is_zero
    return found


def _is_layout(x: str) -> bool:
    match = re.fullmatch(r"(-?)0x([0-9a-f]+)", x)
    word = int(match.group(2), 16) * (-1 if match.group(1) else 1) % 2**32 if match else 0
    return word >> 30 > 0 and word & 0x3FFFFF00 == 0


_NO_RESULT = ("ST", "RED", "BAR", "BRA", "UTMA", "SYNCS", "DEPBAR", "MEMBAR", "FENCE", "WARP")


def overwritten_operands(code: str) -> list[str]:
    """The instructions that write a register which a product under way may still read, in the order of the instructions."""
    groups: list[list[range]] = [[]]  # of products under way, the oldest first
    found = []
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", code):
        operation, _, operands = re.sub(r"^@!?U?P\w+\s+", "", instruction.strip()).partition(" ")
        values = [x.strip() for x in operands.split(",")]
        if operation.startswith("HGMMA"):
            if len(values) > 2 and re.fullmatch(r"R\d+", values[1]):
                groups[-1].append(range(int(values[1][1:]), int(values[1][1:]) + 4))
            if "gsb0" in values:
                groups.append([])
        elif operation.startswith("WARPGROUP.DEPBAR"):
            left = int(values[1], 16)
            groups = groups[:-1][len(groups) - 1 - left :] + groups[-1:] if left else groups[-1:]
        elif not operation.startswith(_NO_RESULT):
            values = [x for x in values if not re.fullmatch(r"U?P[T\d]", x)]
            first = re.match(r"R(\d+)", values[0]) if values else None
            count = 4 if ".128" in operation or "M88.4" in operation else 2 if ".64" in operation or "WIDE" in operation else 1
            written = range(int(first[1]), int(first[1]) + count) if first else range(0)
            if any(register in operand for register in written for group in groups for operand in group):
                found.append(instruction.strip())
    return found
