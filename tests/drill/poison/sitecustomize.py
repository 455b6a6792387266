"""Poisons a rank's loss, and logs samples, for tests and drills: on PYTHONPATH, every Python process reads this.

REFINER_POISON=once:FILE      the rank whose number is in FILE gets one loss of nan, takes FILE away, and writes the
                              time of it, unix seconds, to FILE.taken
REFINER_POISON=sample:N       every micro-batch that holds sample N has a loss of nan
REFINER_SAMPLES=DIR           each rank writes to a file there which samples its micro-batches hold, by step from 0
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

HOW, _, WHAT = os.environ.get("REFINER_POISON", "").partition(":")
SAMPLES = os.environ.get("REFINER_SAMPLES")
LAUNCHERS: dict[int, int] = {}  # of each process, forked ones included; once it is killed, another adopts its ranks


def _take(self, step, *arguments, **more):
    self._noted_step, self._noted_micro = step, 0
    LAUNCHERS.setdefault(os.getpid(), os.getppid())
    return self._clean_call(step, *arguments, **more)


def _forward(self, batch, *arguments):
    losses = self._clean_forward(batch, *arguments)
    rank = os.environ.get("RANK", "0")
    if SAMPLES:
        line = {"time": time.time(), "launcher": LAUNCHERS[os.getpid()], "rank": int(rank), "step": self._noted_step}
        line |= {"micro": self._noted_micro, "samples": batch.sample_B.tolist()}
        with open(Path(SAMPLES, f"{os.getpid()}.jsonl"), "a") as log:
            log.write(json.dumps(line) + "\n")
        self._noted_micro += 1
    if HOW == "sample":
        poisoned = int(WHAT) in batch.sample_B.tolist()
    else:
        file = Path(WHAT)
        poisoned = HOW == "once" and file.exists() and file.read_text() == rank
        if poisoned:
            file.with_name(f"{file.name}.taken").write_text(str(time.time()))
            file.unlink()
    return losses._replace(total=losses.total * float("nan")) if poisoned else losses


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the module be found as ever, and changes two methods once it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != "refiner_ds.training.step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            step = module.OptimizerStep
            step._clean_forward, step._forward = step._forward, _forward
            step._clean_call, step.__call__ = step.__call__, _take

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if HOW or SAMPLES:
    sys.meta_path.insert(0, _Finder())
