"""What one warp executes of a compiled kernel: instructions, and operations on tensor cores.

Loops are counted as often as they run:

    machine code   where loops begin and end     SASS, as cuobjdump prints it
    Triton's IR    how often each runs           scf.for %i = %c0_i32 to %c197_i32 step %c32_i32

Both list loops in the same order. What is skipped by a forward branch or a predicate is counted all the same.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

__all__ = ["Executed", "amd_resources", "executed", "resources"]

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)([^;]*);")
FOR = re.compile(r"scf\.for %\S+ = (%[\w-]+) to (%[\w-]+) step (%[\w-]+)")
# HMMA.16816.F32.BF16: rows, columns and depth of a warp's product; HGMMA.64x32x16: of four warps' together.
PRODUCT = re.compile(r"HMMA\.(16)(8)(\d+)\.|HGMMA\.(\d+)x(\d+)x(\d+)\.")


class Executed(NamedTuple):
    """By one warp.

    Args:
        instructions: issued.
        products: floating-point operations on tensor cores, those in tf32 counted twice, at half the speed.
    """

    instructions: int
    products: int


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of plane, of the one kernel in a binary."""
    printed = _print(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found, printed
    return int(found[1]), int(found[2])


def amd_resources(assembly: str) -> tuple[int, int]:
    """Vector registers, accumulation registers included, and bytes of plane, of the one kernel in an AMD assembly."""
    found = {
        key: int(value)
        for key, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size|vgpr_spill_count):\s+(\d+)", assembly)
    }
    return found["vgpr_count"], max(found["private_segment_fixed_size"], 4 * found["vgpr_spill_count"])


def executed(cubin: bytes, ttgir: str, arguments: dict[str, object]) -> Executed | None:
    """What a warp executes; ``None`` where loops of the binary and of the IR do not correspond.

    Args:
        cubin, ttgir: of one kernel, as Triton compiled it.
        arguments: of the launch, by name: a loop may run as often as one says.
    """
    code = INSTRUCTION.findall(_print(cubin, "-sass"))
    place = {int(address, 16): index for index, (address, _, _) in enumerate(code)}
    loops = []
    for index, (_, name, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and place.get(int(target[1], 16), index) < index:
            loops.append((place[int(target[1], 16)], index))
    trips = [_trips(bounds, arguments) for bounds in FOR.findall(ttgir)]
    if len(loops) != len(trips) or None in trips:
        return None
    times = [1] * len(code)
    for (first, last), count in zip(sorted(loops), trips, strict=True):
        for index in range(first, last + 1):
            times[index] *= count or 0
    counted = [(one, time) for one, time in zip(code, times, strict=True) if one[1] not in ("NOP", "BRA.DIV")]
    return Executed(sum(time for _, time in counted), sum(time * _product(name) for (_, name, _), time in counted))


def _print(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOL, option, file.name], capture_output=True, text=True, check=True).stdout


def _trips(bounds: tuple[str, ...], arguments: dict[str, object]) -> int | None:
    """How often a loop runs; ``None`` where a bound is neither a constant nor an argument."""
    numbers = []
    for bound in bounds:
        constant = re.fullmatch(r"%c(\d+)_i32(?:_\d+)?", bound)
        number = int(constant[1]) if constant else arguments.get(bound.removeprefix("%"))
        if not isinstance(number, int):
            return None
        numbers.append(number)
    first, end, step = numbers
    return -(-(end - first) // step)


def _product(name: str) -> int:
    found = PRODUCT.match(name)
    if found is None:
        return 0
    rows, columns, depth = (int(x) for x in found.groups() if x is not None)
    share = 1 if name.startswith("HMMA") else 4
    return 2 * rows * columns * depth // share * (2 if "TF32" in name else 1)
