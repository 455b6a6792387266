"""Progress of long work: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 30.0


class Progress:
    """Progress over a known number of images, or of something else, on stderr.

    Args:
        total: how many there are.
        label: what the bar or line begins with.
        unit: what is counted.
    """

    def __init__(self, total: int, label: str, unit: str = "images") -> None:
        self._bar = tqdm(total=total, unit=f" {unit}", desc=label) if sys.stderr.isatty() else None
        self._total, self._label, self._unit = total, label, unit
        self._done = self._skipped = 0
        self._began = self._printed = time.monotonic()

    def update(self, count: int) -> None:
        """Count what is done."""
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(count)
        elif now - self._printed >= LINE_SECONDS:
            self._printed = now
            print(self._line(now), file=sys.stderr, flush=True)

    def skip(self, count: int) -> None:
        """Count what an earlier run has done."""
        self._done += count
        self._skipped += count
        if self._bar is not None:
            self._bar.initial += count
            self._bar.update(count)

    def _line(self, now: float) -> str:
        rate = (self._done - self._skipped) / max(now - self._began, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        return (
            f"{self._label}: {self._done:,} of {self._total:,} {self._unit} ({self._done / max(self._total, 1):.1%}), "
            f"{rate:,.1f} {self._unit}/s, {_duration(left)} left"
        )

    def clear(self) -> None:
        """Make room for a line of other output."""
        if self._bar is not None:
            self._bar.clear()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds} s"
