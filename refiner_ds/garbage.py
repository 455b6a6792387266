"""When Python looks for garbage: not while libraries are imported, and later not among what those made.

Importing torch, DeepSpeed and timm makes a million objects that stay. Going through them again and again is a third of
a process's start, and each later collection of all generations would stall a step for a second.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Import libraries without looking for garbage meanwhile; what they made is left out of later looks."""
    was_enabled, imported = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > imported:  # or the first look would go through all of it, a second long
            gc.freeze()
        if was_enabled:
            gc.enable()


def freeze() -> None:
    """Look for garbage once, and leave all that lives now out of later looks."""
    gc.collect()
    gc.freeze()
