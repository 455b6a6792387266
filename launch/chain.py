"""Runs that follow one another in one command: training at 224, then fine-tuning at 384 and 448.

    submit.py --config refiner_l.json --then refiner_l_384.json --then refiner_l_448.json

Each starts when the one before has finished, from its weights: ``refiner.model.init_from`` of a later run file names
the folder of an earlier one, or is left out. All are checked before the first is submitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from refiner_ds.config import RunFile, load
from refiner_ds.errors import LaunchError
from refiner_ds.run_folder import RunFolder

from .allocation import Allocation


@dataclass(frozen=True)
class Stage:
    """One run of a chain.

    Attributes:
        check: overrides to check it with: the weights it starts from may not be there yet.
    """

    allocation: Allocation
    check: list[str]


def stages(
    config: str | None, then: list[str], overrides: list[str], allocate: Callable[[RunFile], Allocation]
) -> Iterator[Stage]:
    """The runs of a chain, in order.

    Args:
        config: run file of the first; ``then`` those of the others.
        overrides: of every run.
        allocate: finds the machines for a run.
    Raises:
        ConfigError, LaunchError: a run file is wrong, or two runs have one folder.
    """
    run = load(config, overrides)
    yield Stage(allocate(run), overrides)
    earlier = [run]
    for file in then:
        given = list(overrides)
        run = load(file, given)
        if run.refiner.model.init_from is None:
            given.append(f"refiner.model.init_from={earlier[-1].folder}")
            run = load(file, given)
        folders = [str(before.folder) for before in earlier]
        if str(run.folder) in folders:
            raise LaunchError(f"--then {file}: would train into {run.folder}, as an earlier run of the chain does")
        start = str(run.refiner.model.init_from)
        waits = start in folders and not RunFolder(start).saved_checkpoints()
        yield Stage(allocate(run), [*given, *(["refiner.model.init_from=null"] if waits else [])])
        earlier.append(run)
