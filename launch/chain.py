"""Runs that follow one another in one command: training at 224, fine-tuning at 384, evaluating and exporting that.

    submit.py --config refiner_l.json --then refiner_l_384.json --then evaluate --then export

Each starts when the one before has finished. A training starts from the weights of an earlier one:
``refiner.model.init_from`` of its run file names that run's folder, or is left out. A command (launch/commands.py)
works on the run folder of the training before it. All are checked before the first is submitted. Typed again, the same
chain goes on with what is missing: what has finished is left alone, and so are jobs that wait or run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from refiner_ds.config import RunFile, load
from refiner_ds.config.differences import changes
from refiner_ds.config.finished import is_finished
from refiner_ds.errors import LaunchError
from refiner_ds.files import read_object
from refiner_ds.run_folder import RunFolder

from . import slurm
from .allocation import Allocation
from .attempts import Attempts
from .commands import Command, command_of
from .policy import Cause
from .snapshot import JOB_FILE, RUN_FILE


@dataclass(frozen=True)
class Standing:
    """How far a job of a chain has come already: it has finished, waits or runs, or is missing.

    Attributes:
        job: number of the one that waits or runs.
        words: the same for a person; empty where it is missing.
    """

    job: str = ""
    words: str = ""

    @property
    def missing(self) -> bool:
        """Whether it is to be submitted."""
        return not self.words


MISSING = Standing()


@dataclass(frozen=True)
class Stage:
    """One job of a chain.

    Attributes:
        check: overrides to check a training with: the weights it starts from may not be there yet.
        standing: how far it has come; nobody has looked where it is `MISSING`.
    """

    allocation: Allocation
    check: list[str]
    standing: Standing = MISSING


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


def looked_up(stages: Sequence[Stage]) -> list[Stage]:
    """The same jobs, with how far each has come already.

    What starts from a training that is missing, or works on its run folder, is missing too: what there is of it comes
    from other weights.
    """
    found, missing = list[Stage](), set[str]()
    for stage in stages:
        run, command = stage.allocation.run, stage.allocation.command
        source = str(run.folder) if command else str(run.refiner.model.init_from)
        standing = MISSING if source in missing else _of_command(stage) if command else _of_training(stage)
        if command is None and standing.missing:
            missing.add(str(run.folder))
        found.append(replace(stage, standing=standing))
    return found


def _of_training(stage: Stage) -> Standing:
    run = stage.allocation.run
    for job, state in _unfinished(stage, "").items():
        if read_object(RunFolder(run.folder).code / job / RUN_FILE) == run.resolved():
            return Standing(job, f"job {job} ({state})")
    if not is_finished(run):
        return MISSING
    keys = RunFolder(run.folder).resolved() or run.resolved()
    others = [key for key, _ in changes(keys["refiner"]["recipe"], run.resolved()["refiner"]["recipe"])]
    return Standing(words=f"finished{f', with another {others[0]}' if others else ''}")


def _of_command(stage: Stage) -> Standing:
    """The newest job of the same words counts where it ended well after training did."""
    folder, command = RunFolder(stage.allocation.run.folder), stage.allocation.command
    assert command is not None
    asked = {"runs": str(command)}
    if len(command.words) > 1:  # paths among its flags are relative to that
        asked["typed_in"] = command.folder
    for job, state in _unfinished(stage, command.label).items():
        if (read_object(folder.code / job / JOB_FILE) or {}).items() >= asked.items():
            return Standing(job, f"job {job} ({state})")
    snapshots = [file.parent.name for file in folder.code.glob(f"[0-9]*/{JOB_FILE}")]
    same = [job for job in snapshots if (read_object(folder.code / job / JOB_FILE) or {}).items() >= asked.items()]
    for job in sorted(same, key=int)[-1:]:
        attempts = Attempts.of(folder, job)
        with suppress(OSError):
            after = attempts.file.stat().st_mtime >= folder.complete.stat().st_mtime
            if after and attempts.records and attempts.records[-1].cause == Cause.FINISHED:
                return Standing(words="finished")
    return MISSING


def _unfinished(stage: Stage, label: str) -> dict[str, str]:
    """Jobs of a run folder that wait or run, of those with this label; none on this machine, where nobody knows."""
    if stage.allocation.local:
        return {}
    folder = RunFolder(stage.allocation.run.folder)
    jobs = slurm.unfinished_jobs(folder.jobs)
    return {job: state for job, state in jobs.items() if _label(folder, job) == label}


def _label(folder: RunFolder, job: str) -> str:
    return str((read_object(folder.code / job / JOB_FILE) or {}).get("label", ""))
