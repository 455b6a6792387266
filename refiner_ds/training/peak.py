"""The dense bf16 peak of a GPU, which MFU is a share of; data sheets often print twice that, for 2:4 sparsity."""

from __future__ import annotations

import re

import torch

# TFLOP/s, bf16, dense, fp32 accumulation, by a word of the name the driver gives. Longer names come before their parts.
TFLOPS = {
    "GB300": 2500.0,  # NVIDIA GB300 NVL72 data sheet, 360 sparse PFLOP/s for 72
    "GB200": 2500.0,  # NVIDIA GB200 NVL72 data sheet, 360 sparse PFLOP/s for 72
    "B300": 2250.0,  # NVIDIA HGX data sheet, 36 sparse PFLOP/s for 8
    "B200": 2250.0,  # NVIDIA HGX data sheet, 36 sparse PFLOP/s for 8
    "B100": 1750.0,  # NVIDIA Blackwell architecture brief
    "GH200": 989.4,  # NVIDIA GH200 data sheet
    "H200 NVL": 835.5,  # NVIDIA H200 data sheet, half of 1,671
    "H200": 989.4,  # NVIDIA H200 data sheet, SXM
    "H100 NVL": 835.5,  # NVIDIA H100 data sheet, half of 1,671
    "H100 PCIe": 756.4,  # NVIDIA H100 data sheet
    "H100": 989.4,  # NVIDIA H100 data sheet, SXM
    "A100": 312.0,  # NVIDIA A100 data sheet
    "A40": 149.7,  # NVIDIA A40 data sheet
    "A30": 165.0,  # NVIDIA A30 data sheet
    "A10G": 70.0,  # NVIDIA A10G data sheet
    "A10": 125.0,  # NVIDIA A10 data sheet
    "L40S": 362.0,  # NVIDIA L40S data sheet
    "L40": 181.0,  # NVIDIA L40 data sheet
    "L4": 121.0,  # NVIDIA L4 data sheet, half of 242
    "RTX 5090": 209.5,  # NVIDIA RTX Blackwell architecture white paper
    "RTX 4090": 165.2,  # NVIDIA Ada architecture white paper
    "RTX 3090": 71.0,  # NVIDIA Ampere GA102 architecture white paper
    "MI355X": 2516.6,  # AMD Instinct MI355X data sheet
    "MI350X": 2306.9,  # AMD Instinct MI350X data sheet
    "MI325X": 1307.4,  # AMD Instinct MI325X data sheet
    "MI300X": 1307.4,  # AMD Instinct MI300X data sheet
    "MI300A": 980.6,  # AMD Instinct MI300A data sheet
    "MI250X": 191.5,  # AMD Instinct MI250X data sheet, half of 383: each of its two dies is a device
}
# Of other speed than their names say: laptops' GPUs, slices of one, cut-down editions.
UNLIKE = re.compile(r"Laptop|Max-Q|MIG|RTX \d+ (Ti|D|SUPER)\b", re.IGNORECASE)


def peak_flops_of(name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, FLOP/s; None where it is not known."""
    if UNLIKE.search(name):
        return None
    found = (tflops for chip, tflops in TFLOPS.items() if re.search(rf"\b{chip}\b", name))
    tflops = next(found, None)
    return None if tflops is None else 1e12 * tflops


def peak_flops(device: torch.device, override_tflops: float | None = None) -> float | None:
    """Dense bf16 peak of a device, FLOP/s; None where it is not known (then no MFU is told).

    Args:
        override_tflops: what the run file says it is; None: nothing.
    """
    if override_tflops is not None:
        return 1e12 * override_tflops
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
