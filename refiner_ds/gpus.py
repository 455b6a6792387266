"""GPUs by name: peak arithmetic, memory, bandwidth and link, from their makers' data sheets. No torch.

    gpu("h200")                               the one a person names; refused in one sentence if there is none
    recognise("NVIDIA H100 80GB HBM3")        the one that a driver names, or None

A figure belongs to what one process sees as one device: one of the two dies of an MI250X.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from refiner_ds.errors import ConfigError

__all__ = ["GPUS", "Gpu", "gpu", "recognise"]


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    Attributes:
        name: as a person writes it.
        words: those of the driver's name that tell it from others, upper case.
        bf16_tflops: dense peak of its matrix units in bf16, fp32 accumulation, TFLOP/s; None: it has none.
        fp32_tflops: peak of its ordinary units in fp32, TFLOP/s.
        memory_gib: what PyTorch reports as its total memory, GiB: less than the data sheet's gigabytes promise.
        bandwidth: of its memory, GB/s (1e9).
        link: to the other GPUs of its node, one direction, GB/s (1e9): half of what data sheets give for both.
    """

    name: str
    words: tuple[str, ...]
    bf16_tflops: float | None
    fp32_tflops: float
    memory_gib: float
    bandwidth: float
    link: float


# PCIe in one direction: generation 4 × 16 lanes 32 GB/s, generation 5 × 16 lanes 64 GB/s.
# Data sheets print matrix units with 2:4 sparsity; dense is half of that. Consumer cards halve fp32 accumulation again.
GPUS = (
    # NVIDIA A100 Tensor Core GPU data sheet (2021).
    Gpu("a100-40gb", ("A100", "40GB"), 312, 19.5, 39.4, 1555, 300),
    Gpu("a100-80gb", ("A100", "80GB"), 312, 19.5, 79.1, 2039, 300),
    Gpu("a100-80gb-pcie", ("A100", "80GB", "PCIE"), 312, 19.5, 79.1, 1935, 32),
    # A800: an A100 with a narrower NVLink (400 GB/s both ways).
    Gpu("a800", ("A800",), 312, 19.5, 79.1, 2039, 200),
    # NVIDIA H100 Tensor Core GPU data sheet (2023).
    Gpu("h100", ("H100",), 989.4, 66.9, 79.1, 3350, 450),
    Gpu("h100-pcie", ("H100", "PCIE"), 756, 51.2, 79.1, 2039, 64),
    Gpu("h100-nvl", ("H100", "NVL"), 835, 60, 93.0, 3938, 300),
    Gpu("h800", ("H800",), 989.4, 66.9, 79.1, 3350, 200),
    # NVIDIA H200 Tensor Core GPU data sheet (2024); GH200 data sheet (2024), its 96 GB model.
    Gpu("h200", ("H200",), 989.4, 66.9, 139.7, 4800, 450),
    Gpu("gh200", ("GH200",), 989.4, 66.9, 94.5, 4000, 450),
    Gpu("h20", ("H20",), 148, 44, 95.0, 4000, 450),
    # NVIDIA Blackwell architecture and HGX data sheets (2025), a GPU of eight.
    Gpu("b200", ("B200",), 2250, 75, 178.3, 7700, 900),
    Gpu("b300", ("B300",), 2250, 75, 267.0, 7700, 900),
    # NVIDIA L4, L40S, A10, A30 and A40 data sheets; A10G: that of AWS's G5 instances.
    Gpu("l4", ("L4",), 121, 30.3, 22.0, 300, 32),
    Gpu("l40s", ("L40S",), 362, 91.6, 44.4, 864, 32),
    Gpu("a10", ("A10",), 125, 31.2, 22.0, 600, 32),
    Gpu("a10g", ("A10G",), 70, 35, 22.0, 600, 32),
    Gpu("a30", ("A30",), 165, 10.3, 23.5, 933, 100),
    Gpu("a40", ("A40",), 149.7, 37.4, 44.3, 696, 56),
    # NVIDIA's whitepapers on GA102, AD102 and the RTX Blackwell architecture, appendices.
    Gpu("rtx-a6000", ("A6000",), 154.8, 38.7, 47.4, 768, 56),
    Gpu("rtx-6000-ada", ("6000", "ADA"), 364.2, 91.1, 47.4, 960, 32),
    Gpu("rtx-3090", ("3090",), 71, 35.6, 23.5, 936, 32),
    Gpu("rtx-4090", ("4090",), 165.2, 82.6, 23.5, 1008, 32),
    Gpu("rtx-5090", ("5090",), 209.5, 104.8, 31.3, 1792, 64),
    # NVIDIA V100 data sheet (2020): matrix units in fp16 alone.
    Gpu("v100-16gb", ("V100", "16GB"), None, 15.7, 15.7, 900, 150),
    Gpu("v100-32gb", ("V100", "32GB"), None, 15.7, 31.7, 900, 150),
    # AMD Instinct data sheets.
    Gpu("mi250x", ("MI250X",), 191.5, 23.9, 63.9, 1638, 100),
    Gpu("mi300x", ("MI300X",), 1307.4, 163.4, 191.9, 5300, 448),
    Gpu("mi325x", ("MI325X",), 1307.4, 163.4, 255.9, 6000, 448),
    Gpu("mi355x", ("MI355X",), 2516.6, 157.3, 287.9, 8000, 538),
)
SHORT = {"a100": "a100-80gb", "h100-sxm": "h100", "v100": "v100-32gb", "a6000": "rtx-a6000", "3090": "rtx-3090",
         "4090": "rtx-4090", "5090": "rtx-5090"}  # fmt: skip
# A part of a GPU, or one with less power: its figures are not in the table.
NOT_WHOLE = {"MIG", "LAPTOP", "MAX", "GRID"}


def gpu(name: str) -> Gpu:
    """The GPU that a person names: one of the table, in any case, or the driver's own name for it.

    Raises:
        ConfigError: there is none of that name in the table.
    """
    wanted = re.sub(r"[ _]+", "-", name.strip().lower())
    named = {one.name: one for one in GPUS}
    if found := named.get(SHORT.get(wanted, wanted)) or recognise(name):
        return found
    near = difflib.get_close_matches(wanted, [*named, *SHORT], 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(named)}"
    raise ConfigError(f"GPU {name} is not in the table; {hint}")


def recognise(device_name: str) -> Gpu | None:
    """The GPU that a driver names, as in ``torch.cuda.get_device_name``; None where the table has no such one."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if words & NOT_WHOLE:
        return None
    fitting = [one for one in GPUS if words.issuperset(one.words)]
    return max(fitting, key=lambda one: len(one.words), default=None)
