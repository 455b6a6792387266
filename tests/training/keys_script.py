"""The training command, with a log of what every step is made of, which may ask itself to stop.

    keys_script.py LOG STOP_BEFORE arguments of train.py …        STOP_BEFORE 0: never

LOG gets a line a micro-batch: step, samples, a checksum of each sample's pixels as they were drawn, and the optimizer's
weight decays. The last rank signals itself when it takes the batches of step STOP_BEFORE, counted from 0.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import zlib
from collections.abc import Iterator
from typing import Any

from refiner_ds import train
from refiner_ds.data.batch import Batch
from refiner_ds.training import loop
from refiner_ds.training.batches import train_batches_of
from refiner_ds.training.engine import Engine
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.world import World

engines: list[Engine] = []


class NotedEngine(Engine):
    """The engine of this run, to be looked at."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        engines.append(self)


def logged(ready: Preparation, world: World, step: int) -> Iterator[Batch]:
    log, stop_before = sys.argv[1], int(sys.argv[2])
    for number, batch in enumerate(train_batches_of(ready, world, step)):
        now = step + number // ready.batch.accumulation
        if 0 < stop_before == now and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        line: dict[str, Any] = {"step": now, "samples": batch.sample_B.tolist()}
        line["weight_decay"] = sorted({group["weight_decay"] for group in engines[-1].optimizer.param_groups})
        line["views"] = [zlib.crc32(image.numpy().tobytes()) for image in batch.images_BHWC]
        with open(f"{log}.{world.size}.{world.rank}", "a") as file:
            file.write(json.dumps(line) + "\n")
        yield batch


if __name__ == "__main__":
    loop.train_batches_of = logged
    loop.Engine = NotedEngine  # type: ignore[assignment, misc]
    sys.exit(train.main(sys.argv[3:]))
