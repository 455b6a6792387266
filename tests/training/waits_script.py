"""The training command, with a list of what would make the host wait for a GPU in each of its steps.

    waits_script.py LIST arguments of train.py …

LIST gets, a step, what was found and where, and how often; and the addresses that batches of pixels had.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from refiner_ds import train
from refiner_ds.training import engine
from refiner_ds.training.loop import Trainer
from tests.waits import Waits

steps: list[dict[str, int]] = []
take = Trainer._one_step
addresses: list[int] = []


def watched(trainer: Trainer) -> int | None:
    if trainer.step == 0:
        batches = trainer.batches

        def noted():  # type: ignore[no-untyped-def]
            for batch in batches:
                addresses.append(batch.images_BHWC.data_ptr())
                yield batch

        trainer.batches = noted()
    with Waits() as waits:
        code = take(trainer)
    steps.append(note_of(waits))
    return code


def note_of(waits: Waits) -> dict[str, int]:
    return {f"{what} | {where}": count for (what, where), count in sorted(waits.found.items())}


if __name__ == "__main__":
    engine.FUSED_ON = ("cpu",)  # as on a GPU: the other one keeps its counts on the host
    Trainer._one_step = watched  # type: ignore[method-assign, assignment]
    code = train.main(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps({"steps": steps, "addresses": addresses}))
    sys.exit(code)
