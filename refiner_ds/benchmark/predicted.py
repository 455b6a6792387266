"""How long a kernel takes at least, from its machine code and its tensors: the largest of three times, and which it is.

    instructions    those that warps issue, loops counted as often as they run, four an SM and cycle
    products        floating-point operations on tensor cores at the data sheet's peak (tf32 at half of it)
    bytes           of the tensors it is given, each once, at the data sheet's bandwidth

A model, not a measurement: latency, bank conflicts, and what the cache does not save come on top, and a kernel with few
warps on an SM cannot hide the first. Where it and a clock disagree, the clock is right.
"""

from __future__ import annotations

from typing import NamedTuple

from refiner_ds.attention.kernels.launch import Compiled, Launch
from refiner_ds.gpus import Gpu, gpu

__all__ = ["BY_ARCHITECTURE", "Prediction", "gpu_of", "predict", "warps_an_sm"]

# Compute capability -> the card that stands for it where none is named.
BY_ARCHITECTURE = {80: "a100-80gb", 86: "a40", 89: "l40s", 90: "h100", 100: "b200", 120: "rtx-5090"}
# Of an SM: warps, programs, registers, and bytes of shared memory.
LIMITS = {80: (64, 32, 65536, 164 << 10), 86: (48, 16, 65536, 100 << 10), 89: (48, 24, 65536, 100 << 10),
          90: (64, 32, 65536, 228 << 10), 100: (64, 32, 65536, 228 << 10), 120: (48, 24, 65536, 100 << 10)}  # fmt: skip


class Prediction(NamedTuple):
    """Milliseconds by each bound."""

    instructions: float
    products: float
    bytes: float

    @property
    def milliseconds(self) -> float:
        """The largest."""
        return max(self)

    @property
    def bound(self) -> str:
        """What the largest is of."""
        return self._fields[self.index(max(self))]


def gpu_of(architecture: int) -> Gpu | None:
    """The card that stands for an architecture."""
    return gpu(BY_ARCHITECTURE[architecture]) if architecture in BY_ARCHITECTURE else None


def predict(launch: Launch, card: Gpu, architecture: int) -> Prediction | None:
    """Times of one launch; ``None`` where the loops of its machine code are not known."""
    if launch.compiled is None or launch.compiled.executed is None:
        return None
    warps, ran = launch.programs * launch.compiled.warps, launch.compiled.executed
    # An SM issues four instructions of 32 lanes a cycle; with 128 fp32 units, all of them may be multiply-adds.
    issued = card.fp32_tflops * 1e12 / 64 * (2 if architecture == 80 else 1)  # an A100's SM has 64 of these units
    products = ran.products * warps / ((card.bf16_tflops or card.fp32_tflops) * 1e12)
    return Prediction(
        1000 * ran.instructions * warps / issued, 1000 * products, 1000 * launch.bytes / (card.bandwidth * 1e9)
    )


def warps_an_sm(compiled: Compiled, architecture: int) -> int:
    """Warps of a kernel that fit on an SM together, by registers and shared memory."""
    warps, programs, registers, shared = LIMITS[architecture]
    of_a_warp = -(-compiled.registers * 32 // 256) * 256
    fitting = min(
        warps // compiled.warps,
        programs,
        registers // (of_a_warp * compiled.warps),
        shared // (compiled.shared + 1024),  # the driver's own kilobyte
    )
    return fitting * compiled.warps
