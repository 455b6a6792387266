"""Where the seconds between a command and "submitted" go."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Stopwatch:
    """Laps of this process, the first from its start on."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.time() - _age()

    def lap(self, name: str) -> None:
        """Give the time since the last lap a name; the same name adds up."""
        now = time.time()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.laps.items())
        return f"{sum(self.laps.values()):.1f} s ({parts})"


def _age() -> float:
    """Seconds since the kernel started this process."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return up - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
