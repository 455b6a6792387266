"""Runs that follow one another in one command: training at 224, fine-tuning at 384, evaluating and exporting that.

    submit.py --config refiner_l.json --then refiner_l_384.json --then evaluate --then export

Each starts when the one before has finished. A training starts from the weights of an earlier one:
``refiner.model.init_from`` of its run file names that run's folder, or is left out. A command (launch/commands.py)
works on the run folder of the training before it. All are checked before the first is submitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from refiner_ds.config import RunFile, load
from refiner_ds.errors import LaunchError
from refiner_ds.run_folder import RunFolder

from .allocation import Allocation
from .commands import Command, command_of


@dataclass(frozen=True)
class Stage:
    """One job of a chain.

    Attributes:
        check: overrides to check a training with: the weights it starts from may not be there yet.
    """

    allocation: Allocation
    check: list[str]


Allocate = Callable[[RunFile, Command | None], Allocation]


def stages(config: str | None, then: list[str], overrides: list[str], allocate: Allocate) -> Iterator[Stage]:
    """The jobs of a chain, in order.

    Args:
        config: run file of the first; ``then`` those of the others, and commands.
        overrides: of every run.
        allocate: finds the machines for a run, or for a command on it.
    Raises:
        ConfigError, LaunchError: a run file or a command is wrong, or two runs have one folder.
    """
    run = load(config, overrides)
    yield Stage(allocate(run, None), overrides)
    earlier, commands = [run], list[Command]()
    for given in then:
        if (command := command_of(given, commands)) is not None:
            commands.append(command)
            yield Stage(allocate(earlier[-1], command), [])
            continue
        stage = _training(given, overrides, earlier, allocate)
        earlier.append(stage.allocation.run)
        yield stage


def _training(file: str, overrides: list[str], earlier: list[RunFile], allocate: Allocate) -> Stage:
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
    return Stage(allocate(run, None), [*given, *(["refiner.model.init_from=null"] if waits else [])])
