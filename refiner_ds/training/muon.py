"""DeepSpeed's Muon, imported without compiling it.

When DeepSpeed builds an engine it looks whether the optimizer is its Muon. That module compiles three functions as it
is imported, which loads all of inductor: a quarter of a process's start. Runs train with AdamW and never call them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from deepspeed.runtime import compiler

Function = TypeVar("Function", bound=Callable[..., object])


def import_uncompiled() -> None:
    """Import Muon, so that DeepSpeed finds it imported; a DeepSpeed that has it elsewhere imports it for itself."""
    compiles = compiler.compile
    compiler.compile = _left_as_it_is
    try:
        with suppress(ImportError):
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compiles


def _left_as_it_is(*_: object, **__: object) -> Callable[[Function], Function]:
    return lambda function: function
