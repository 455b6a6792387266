"""Where torch.compile's inductor keeps the code it generates: a folder for each kind of CPU.

    <default>            torch's own folder, /tmp/torchinductor_<user>: its keys do not know the CPU
    <default>-avx2-…     this CPU's instructions by name, and a hash of all of them

A cache that unlike CPUs share computes wrong numbers: code generated for longer vectors, taken by a CPU with shorter
ones, leaves half of every tensor unwritten; and -march=native may use what another CPU lacks.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import torch

__all__ = ["CACHE", "keep_code_by_cpu"]

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def keep_code_by_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Path:
    """From now on inductor keeps code in a folder of this kind of CPU, unless the user has named another.

    Returns:
        the folder.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    default = os.path.abspath(default_cache_dir())
    if os.environ.get(CACHE, default) == default:  # torch writes its default there itself
        os.environ[CACHE] = f"{default}-{_kind(cpuinfo)}"
    return Path(os.environ[CACHE])


def _kind(cpuinfo: Path) -> str:
    """What torch takes this CPU for, which ATEN_CPU_CAPABILITY may lower, and a hash of its instructions."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    digest = hashlib.sha256(" ".join([platform.machine(), *sorted(flags)]).encode()).hexdigest()
    return f"{torch.backends.cpu.get_cpu_capability().lower()}-{digest[:8]}"
