"""When Python looks for garbage: not while libraries are imported, and later not among what those made.

Importing torch, DeepSpeed and timm makes a million objects that stay. Going through them again and again is a third of
a process's start, and each later collection of all generations would stall a step for a second.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Import libraries without looking for garbage meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def freeze() -> None:
    """Look for garbage once, and leave all that lives now out of later looks."""
    gc.collect()
    gc.freeze()
