"""The training command, with a trouble of one rank in one step or from it on.

troubled_script.py TROUBLE RANK STEP arguments of train.py …        steps count from 0

slow      its loader takes a third of a second for each batch; an interval of four steps is worth a word here
memory    its forward pass finds no memory
kill      it is killed, as by the kernel
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from refiner_ds import train
from refiner_ds.data.batch import Batch
from refiner_ds.training import loop, progress
from refiner_ds.training.batches import train_batches_of
from refiner_ds.training.engine import Engine
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.world import World

TROUBLE, RANK, STEP = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
reached = False


class FullEngine(Engine):
    """An engine on a device that is full once the step is reached."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        if TROUBLE == "memory" and reached:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")
        return super().__call__(*given, **named)


def troubled(ready: Preparation, world: World, step: int) -> Iterator[Batch]:
    global reached
    for number, batch in enumerate(train_batches_of(ready, world, step)):
        reached = world.rank == RANK and step + number // ready.batch.accumulation >= STEP
        if reached and TROUBLE == "slow":
            time.sleep(0.3)
        if reached and TROUBLE == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


if __name__ == "__main__":
    progress.ADVICE_STEPS = 4
    loop.train_batches_of = troubled
    loop.Engine = FullEngine  # type: ignore[assignment, misc]
    sys.exit(train.main(sys.argv[4:]))
