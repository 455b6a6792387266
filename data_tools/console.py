"""Progress of long work: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 30.0


class Progress:
    """Progress over a known number of images, on stderr.

    Args:
        total: images there are.
        label: what the bar or line begins with.
    """

    def __init__(self, total: int, label: str) -> None:
        self._bar = tqdm(total=total, unit="img", desc=label) if sys.stderr.isatty() else None
        self._total, self._label = total, label
        self._done = 0
        self._began = self._printed = time.monotonic()

    def update(self, images: int) -> None:
        """Count images that are done."""
        self._done += images
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(images)
        elif now - self._printed >= LINE_SECONDS:
            self._printed = now
            print(self._line(now), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        return (
            f"{self._label}: {self._done:,} of {self._total:,} images ({self._done / max(self._total, 1):.1%}), "
            f"{rate:,.1f} images/s, {_duration(left)} left"
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
