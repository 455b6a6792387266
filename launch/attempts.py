"""What a job leaves behind about itself: its attempts, and what failed in them.

    jobs/owner                          number of the job that the run folder belongs to
    jobs/<id>_attempts.json             one record a start of its tasks: when, where, how it ended, what was decided
    jobs/<id>_failures/<n>_<rank>.json  what a rank said when it failed in its n-th attempt
    jobs/<id>_environment.json          packages, driver, modules of the first node

These files alone answer ``launch/jobs.py`` when Slurm does not.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from refiner_ds.files import write_atomically
from refiner_ds.run_folder import STEP, RunFolder

from . import policy


@dataclass
class Record:
    """One start of a job's tasks.

    Attributes:
        number: 0 for the first; the restart count.
        started, ended: unix seconds; ``ended`` None while it runs, or where its end was not seen.
        nodes: their names, comma-separated as Slurm writes them.
        gpus: GPUs of the whole job.
        checkpoint: name of the newest one at its beginning; ``saved`` at its end.
        step: last optimizer step that was logged.
        cause: a `policy.Cause`.
        rank, node: of the task that failed first; ``node`` also where no node is to blame.
        symptom, evidence, advice: what failed, the line that shows it, what to do.
        action, reason: a `policy.Action`, and why.
    """

    number: int
    started: float
    nodes: str
    tasks: int
    gpus: int
    checkpoint: str | None
    ended: float | None = None
    saved: str | None = None
    step: int | None = None
    cause: str | None = None
    exit_code: int | None = None
    rank: int | None = None
    node: str = ""
    blames_node: bool = False
    symptom: str = ""
    evidence: str = ""
    advice: str = ""
    action: str = ""
    reason: str = ""

    def is_sound(self) -> bool:
        """Whether what was read back is of the kinds that were written."""
        numbers = (self.number, self.started, self.tasks, self.gpus)
        maybe = (self.ended, self.step, self.exit_code, self.rank)
        names = (self.checkpoint, self.saved)
        return (
            all(isinstance(one, int | float) for one in numbers)
            and all(one is None or isinstance(one, int | float) for one in maybe)
            and all(one is None or (isinstance(one, str) and STEP.fullmatch(one)) for one in names)
            and (self.cause is None or self.cause in list(policy.Cause))
        )

    def attempt(self) -> policy.Attempt:
        """What the policy wants to know of it."""
        cause = policy.Cause(self.cause) if self.cause else policy.Cause.LOST
        node = self.node if self.blames_node else ""
        progress = self.saved is not None and self.saved != self.checkpoint
        return policy.Attempt(cause, self.exit_code or 0, node, progress)

    def __str__(self) -> str:
        """What became of it in one sentence: rank, host, what happened, the line that shows it."""
        if self.cause in (policy.Cause.FINISHED, None):
            return "finished" if self.cause else "its end was not seen"
        if self.cause == policy.Cause.INTERRUPTED:
            return f"asked to stop; {f'saved {self.saved}' if self.saved else 'there was nothing to save'}"
        where = f"rank {self.rank} ({self.node}) " if self.rank is not None else f"{self.node} ".lstrip()
        return f"{where}{self.symptom} (exit code {self.exit_code}): {self.evidence}"

    @property
    def lost_steps(self) -> int:
        """Optimizer steps that were logged and that no checkpoint holds."""
        if self.step is None:
            return 0
        newest = self.saved or self.checkpoint
        return max(0, self.step - (int(newest.removeprefix("step_")) if newest else 0))


@dataclass
class Attempts:
    """The attempts of one job, on disk.

    Args:
        file: jobs/<id>_attempts.json.
    """

    file: Path
    records: list[Record] = field(default_factory=list)

    @classmethod
    def of(cls, run_folder: RunFolder, job_id: str) -> Attempts:
        """What is known of a job's attempts; none where it has not started."""
        file = run_folder.jobs / f"{job_id}_attempts.json"
        known = {each.name for each in fields(Record)}
        with suppress(OSError, ValueError, TypeError, AttributeError):
            entries = json.loads(file.read_text())
            records = [Record(**{key: entry[key] for key in entry.keys() & known}) for entry in entries]
            if all(record.is_sound() for record in records):
                return cls(file, records)
        return cls(file)

    def begin(self, nodes: str, tasks: int, gpus: int, run_folder: RunFolder) -> Record:
        """Note that the tasks are started."""
        newest = run_folder.latest_checkpoint()
        record = Record(len(self.records), time.time(), nodes, tasks, gpus, newest.name if newest else None)
        self.records.append(record)
        self.write()
        return record

    def write(self) -> None:
        """Bring them to disk. A full disk keeps what was there before: the job must go on."""
        with suppress(OSError):
            write_atomically(self.file, json.dumps([asdict(record) for record in self.records], indent=1) + "\n")

    @property
    def lost_steps(self) -> int:
        """Optimizer steps that were done twice."""
        return sum(record.lost_steps for record in self.records[:-1])


@dataclass(frozen=True)
class Failure:
    """What a rank said of its own failure."""

    rank: int
    host: str
    exit_code: int
    error: str  # "RuntimeError: …", or the sentence it was refused with
    at: float

    @staticmethod
    def folder(run_folder: RunFolder, job_id: str) -> Path:
        """Where a job's failures are noted."""
        return run_folder.jobs / f"{job_id}_failures"

    def note(self, run_folder: RunFolder, job_id: str, attempt: int) -> None:
        """Write it down; a full disk cannot take it, and then the log has to do."""
        folder = self.folder(run_folder, job_id)
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / f"{attempt}_{self.rank}.json", json.dumps(asdict(self)))

    @classmethod
    def noted(cls, run_folder: RunFolder, job_id: str, attempt: int) -> list[Failure]:
        """Failures of an attempt, the earliest first."""
        found = []
        for file in cls.folder(run_folder, job_id).glob(f"{attempt}_*.json"):
            with suppress(OSError, ValueError, TypeError):
                found.append(cls(**json.loads(file.read_text())))
        return sorted(found, key=lambda failure: failure.at)


def owner(run_folder: RunFolder) -> str | None:
    """The job that a run folder belongs to."""
    with suppress(OSError, ValueError):
        name = (run_folder.jobs / "owner").read_text().strip()
        return name if name.isdigit() else None
    return None


def take_ownership(run_folder: RunFolder, job_id: str) -> None:
    """Make the run folder this job's; an earlier one that starts again finds that it is not its own any more."""
    write_atomically(run_folder.jobs / "owner", f"{job_id}\n")
