"""Poisons a rank's loss, for tests and drills: on PYTHONPATH, every Python process reads this when it starts.

REFINER_POISON=once:FILE      the rank whose number is in FILE gets one loss of nan, and takes FILE away
REFINER_POISON=sample:N       every micro-batch that holds sample N has a loss of nan
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path

HOW, _, WHAT = os.environ.get("REFINER_POISON", "").partition(":")


def _poisoned(self, batch, *arguments):
    losses = self._clean_forward(batch, *arguments)
    if HOW == "sample":
        poisoned = int(WHAT) in batch.sample_B.tolist()
    else:
        file = Path(WHAT)
        poisoned = file.exists() and file.read_text() == os.environ.get("RANK", "0")
        if poisoned:
            file.unlink()
    return losses._replace(total=losses.total * float("nan")) if poisoned else losses


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the module be found as ever, and changes one method once it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != "refiner_ds.training.step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.OptimizerStep._clean_forward = module.OptimizerStep._forward
            module.OptimizerStep._forward = _poisoned

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if HOW:
    sys.meta_path.insert(0, _Finder())
