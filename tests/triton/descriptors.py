"""Finds products that read another tile than they were told: a defect of ptxas 12.8, see linnet/ops/triton/_ptxas.py.

In machine code the high word of a descriptor is the sum of its constant and zero, with the carry of the low word's sum. Where the
register is not known to hold zero, the address was lost. Known: followed in the order of the instructions, which is enough here.
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
