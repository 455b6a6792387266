"""What a process computes on, by name: the GPU, or the CPU."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """ "NVIDIA H100 80GB HBM3", or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def driver_version(device: torch.device) -> str:
    """The GPU driver's version; "" on a CPU, and where it cannot be told."""
    if device.type != "cuda":
        return ""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""
    return first.partition(":")[2].strip()
