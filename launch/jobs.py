"""Look after submitted runs.

    python launch/jobs.py list                             every run submitted from here, newest first
    python launch/jobs.py status RUN                       where it stands, its attempts, what it has cost
    python launch/jobs.py why RUN                          why it waits, failed or was requeued, in one sentence
    python launch/jobs.py logs RUN [--rank N] [--follow]   the log of a rank
    python launch/jobs.py cancel RUN                       end it for good; it saves first if Slurm leaves it the time
    python launch/jobs.py requeue RUN                      save and start again, or start a failed job again

RUN is a run folder, its name, or a job's number; NAME:evaluate is the job that evaluates a run after training. Where
Slurm does not answer, run folders do, and the answer says so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "launch"

from refiner_ds.command_line import Parser
from refiner_ds.errors import LaunchError, report_errors
from refiner_ds.files import read_object
from refiner_ds.run_folder import RunFolder

from . import slurm
from .asking import Question
from .attempts import Attempts, Record, owner
from .commands import NAMES
from .cost import cost_line, hours_held
from .diagnosis import last_lines
from .follow import follow
from .policy import Action, Cause
from .registry import registered
from .slurm import JobState
from .snapshot import JOB_FILE
from .why import ago, why

QUICK_SECONDS = 1.0  # for Slurm to answer; a controller that is away takes minutes to say nothing
ALONE = "this is what the run folder tells"


@dataclass(frozen=True)
class JobOfRun:
    """The newest job of a run folder, and what can be known of it.

    Attributes:
        question: what Slurm has been asked about it; None for a local job, or where it has not been asked.
    """

    folder: RunFolder
    job_id: str
    attempts: Attempts
    question: Question[JobState | None] | None = None

    @property
    def state(self) -> JobState | None:
        """What Slurm says; None where it does not answer, no longer knows the job, or never did (a local job)."""
        return self.question.answer if self.question else None

    @property
    def records(self) -> list[Record]:
        """Its attempts, oldest first."""
        return self.attempts.records

    @property
    def submitted(self) -> dict[str, object]:
        """What was asked of the cluster; empty where the snapshot is gone."""
        return read_object(self.folder.code / self.job_id / JOB_FILE) or {}

    @property
    def label(self) -> str:
        """Of the command that it runs on the run folder; empty where it trains."""
        return str(self.submitted.get("label", ""))

    @property
    def name(self) -> str:
        """As a person names it: the run, and the command."""
        return ":".join(filter(None, (self.folder.path.name, self.label)))

    @property
    def local(self) -> bool:
        """Whether it runs on this machine, without Slurm."""
        return bool(self.submitted.get("local"))

    @property
    def process(self) -> int | None:
        """The controller of a local job, while it lives."""
        with suppress(OSError):
            words = Path(f"/proc/{self.job_id}/cmdline").read_bytes().decode(errors="replace")
            return int(self.job_id) if str(self.folder) in words else None
        return None

    @property
    def word(self) -> str:
        """Its state in one word, Slurm's where there is one."""
        if self.state is not None:
            return self.state.state
        if self.local and self.process:
            return "RUNNING"
        last = self.records[-1] if self.records else None
        gone = self.local or (self.question is not None and self.question.forgotten)
        if last is None or last.ended is None:
            return "LOST" if gone else "STARTED" if last else "SUBMITTED"
        if last.cause == Cause.FINISHED:
            return "COMPLETED"
        return "FAILED" if last.action == Action.END else "REQUEUED"

    @property
    def moved(self) -> float:
        """When the run folder last changed, unix seconds."""
        own = self.folder.jobs / f"{self.job_id}_submission.sh"
        files = (self.attempts.file, own) if self.label else (self.folder.metrics, self.attempts.file, own)
        return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)

    def why(self) -> str:
        """One sentence."""
        if self.local and self.process:
            return f"it runs here, process {self.job_id}"
        sentence = why(self.folder, self.job_id, self.state)
        if self.question is None or self.state is not None:
            return sentence
        if silence := self.question.silence:
            return f"{sentence} ({silence}; {ALONE})"
        return sentence if self.word != "LOST" else f"{sentence}; Slurm no longer knows it: submit the run again"


def of_folder(folder: RunFolder, job_id: str | None = None) -> JobOfRun | None:
    """The job of a run folder, without asking Slurm; None where none was submitted."""
    found = job_id or owner(folder)
    if found is None:
        scripts = sorted(folder.jobs.glob("*_submission.sh"), key=lambda file: file.stat().st_mtime)
        found = scripts[-1].name.partition("_")[0] if scripts else None
    return None if found is None else JobOfRun(folder, found, Attempts.of(folder, found))


def commands_of(folder: RunFolder) -> list[JobOfRun]:
    """The newest job of every command that was submitted to follow a run, in the order of their numbers."""
    files = sorted(folder.code.glob(f"[0-9]*/{JOB_FILE}"), key=lambda file: int(file.parent.name))
    jobs = (JobOfRun(folder, file.parent.name, Attempts.of(folder, file.parent.name)) for file in files)
    return list({job.label: job for job in jobs if job.label}.values())


def find(target: str) -> JobOfRun:
    """The job that a person means by a run folder, a name or a number.

    Raises:
        LaunchError: none, or several.
    """
    if (Path(target) / "jobs").is_dir() and (job := of_folder(RunFolder(Path(target).absolute()))):
        return job
    folders = known_folders()
    run, _, label = target.rpartition(":")
    if run and label.partition("-")[0] in NAMES and target not in (folder.name for folder in folders):
        for job in commands_of(find(run).folder):
            if job.label == label:
                return job
        raise LaunchError(f"{target}: no {label} was submitted to follow that run")
    if target.isdigit():
        holding = [folder for folder in folders if list((folder / "jobs").glob(f"{target}_*"))]
        if len(holding) > 1:
            raise LaunchError(f"{target}: several runs had a job of this number, give the folder: {_listed(holding)}")
        for folder in holding:
            if job := of_folder(RunFolder(folder), target):
                return job
        shown = slurm.job_state(target, QUICK_SECONDS)
        if shown is None:
            raise LaunchError(f"{target}: no run that was submitted from here has this job, and Slurm does not answer")
        folder = Path(shown.fields.get("WorkDir", "/nowhere"))
        if (folder / "jobs").is_dir() and (job := of_folder(RunFolder(folder), target)):
            return job
    named = [folder for folder in folders if folder.name == target]
    if len(named) > 1:
        raise LaunchError(f"{target}: several runs have this name, give the folder: {_listed(named)}")
    if named and (job := of_folder(RunFolder(named[0]))):
        return job
    if Path(target).is_dir():
        raise LaunchError(f"{target}: no job was submitted for it")
    raise LaunchError(f"{target}: no run that was submitted from here; give its run folder (jobs.py list shows them)")


def _listed(folders: list[Path]) -> str:
    return ", ".join(map(str, folders))


def known_folders() -> list[Path]:
    """Run folders with jobs: those submitted from here, and those in ./runs."""
    here = sorted(Path("runs").absolute().glob("*/jobs")) if Path("runs").is_dir() else []
    return list(dict.fromkeys([*registered(), *(jobs.parent for jobs in here)]))


def ask_slurm(job: JobOfRun, seconds: float = QUICK_SECONDS) -> JobOfRun:
    """The same job, of which Slurm is being asked."""
    if job.local:
        return job
    return replace(job, question=Question(lambda limit: slurm.job_state(job.job_id, limit, job.folder.path), seconds))


def list_runs(limit: int) -> str:
    """A line a run, newest first."""
    question = Question(slurm.states, QUICK_SECONDS)
    folders = [RunFolder(folder) for folder in known_folders()]
    found = [job for folder in folders for job in (of_folder(folder), *commands_of(folder)) if job]
    newest = sorted(found, key=lambda job: -job.moved)[:limit]
    known = [_row(job) for job in newest]
    states = question.answer or {}
    rows: list[tuple[str, ...]] = [("run", "job", "state", "step", "restarts", "cost", "changed", "folder")]
    for job, (name, number, word, *rest) in zip(newest, known, strict=True):
        state, folder = states.get(number, ("", ""))
        known_to_slurm = state and not job.local and slurm.works_in(folder, job.folder.path)
        rows.append((name, number, state if known_to_slurm else word, *rest))
    if len(rows) == 1:
        return "no run was submitted from here"
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if question.silence and not all(job.local for job in newest):
        lines.append(f"{question.silence}: states are as run folders tell them")
    return "\n".join(lines)


def _row(job: JobOfRun) -> tuple[str, ...]:
    hours, unit = hours_held(job.attempts, time.time())
    step = None if job.label else last_metric(job.folder, "step")
    where = (f"{hours:.1f} {unit}", ago(job.moved), str(job.folder))
    restarts = str(max(0, len(job.records) - 1))
    return (job.name, job.job_id, job.word, "-" if step is None else f"{step:.0f}", restarts, *where)


def status(job: JobOfRun) -> str:
    """Where a run stands, in some lines."""
    newest = job.folder.latest_checkpoint()
    lines = [f"runs         {job.submitted['runs']}"] if job.label else [f"step         {_progress(job.folder)}"]
    lines.append(f"checkpoint   {newest.name if newest else 'none'}")
    for record in job.records:
        ended = f"{record.ended - record.started:.0f} s" if record.ended else "running"
        what = f": {record}" if record.cause else ""
        lines.append(f"attempt {record.number:<4} {_clock(record.started)}, {ended}, {record.nodes}{what}")
    if job.records:
        lines.append(cost_line(None if job.label else job.folder, job.attempts))
    if command := job.submitted.get("command"):
        lines.append(f"submitted by {command}")
    lines.append(f"log          tail -F {job.folder.jobs}/{job.job_id}_0_log.out")
    # Slurm's answer last: it has had the time in which the run folder was read.
    said = [f"run folder   {job.folder}", f"job          {job.job_id}: {job.word}", f"             {job.why()}"]
    return "\n".join([*said, *lines])


def _progress(folder: RunFolder) -> str:
    step, loss = last_metric(folder, "step"), last_metric(folder, "loss")
    return "none logged yet" if step is None else f"{step:.0f}, loss {loss}"


def last_metric(folder: RunFolder, key: str) -> float | None:
    """A figure of the last training line that was logged."""
    for line in reversed(last_lines(folder.metrics)):
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if entry["kind"] == "train":
                return float(entry[key])
    return None


def show_log(job: JobOfRun, rank: int, follows: bool) -> int:
    """Print the log of a rank, until the job ends where it ``follows``."""
    file = job.folder.jobs / f"{job.job_id}_{rank}_log.out"
    if not file.exists() and not follows:
        raise LaunchError(f"{file}: not there; the job has not started, or has no rank {rank}")
    if not follows:
        sys.stdout.write(file.read_text(errors="replace"))
        return 0

    def ended() -> bool:
        return job.process is None if job.local else slurm.has_ended(job.job_id, QUICK_SECONDS)

    with suppress(KeyboardInterrupt):
        follow(file, ended, sys.stdout)
    return 0


def cancel(job: JobOfRun) -> str:
    """End a job for good."""
    if job.local:
        if job.process is None:
            raise LaunchError(f"{job.folder}: its local job {job.job_id} does not run")
        os.kill(job.process, signal.SIGTERM)
        return f"job {job.job_id} saves and ends"
    state = slurm.job_state(job.job_id, of=job.folder.path)
    if state is not None and state.ended:
        raise LaunchError(f"job {job.job_id} has ended already ({state.state})")
    answer = slurm.ask("scancel", job.job_id)
    if answer.returncode:
        raise LaunchError(f"job {job.job_id}: {slurm.last_line(answer.stderr)}")
    return f"job {job.job_id} is cancelled"


def requeue(job: JobOfRun) -> str:
    """Have a running job save and start again, or a job that ended start again."""
    if job.local:
        raise LaunchError(f"{job.folder}: a local job is not requeued; submit the run again, and it resumes")
    state = slurm.job_state(job.job_id, of=job.folder.path)
    if state is None:
        raise LaunchError("Slurm does not answer; try again later")
    if state.state == "PENDING":
        raise LaunchError(f"job {job.job_id} waits already: {job.why()}")
    if state.state == "RUNNING":
        answer = slurm.ask("scancel", "--signal=USR2", job.job_id)
        if answer.returncode:
            raise LaunchError(f"job {job.job_id}: {slurm.last_line(answer.stderr)}")
        return f"job {job.job_id} saves and starts again"
    if state.state == "COMPLETED":
        raise LaunchError(
            f"job {job.job_id} has finished; submit the run again to train it further, or its command anew"
        )
    if not job.label and (owned := owner(job.folder)) not in (None, job.job_id):
        raise LaunchError(f"{job.folder}: belongs to job {owned} now; job {job.job_id} cannot go on")
    objection = slurm.requeue(job.job_id)
    if objection:
        raise LaunchError(f"job {job.job_id}: {slurm.last_line(objection)}; submit the run again, and it resumes")
    return f"job {job.job_id} starts again"


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit code: 0, or 2 where it refuses."""
    args = _parser().parse_args(argv)
    if args.command == "list":
        print(list_runs(args.limit))
        return 0
    job = find(args.run)
    if args.command == "logs":
        return show_log(job, args.rank, args.follow)
    acts = {"status": status, "why": lambda job: f"job {job.job_id}: {job.why()}", "cancel": cancel, "requeue": requeue}
    print(acts[args.command](ask_slurm(job)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list").add_argument("--limit", type=int, default=20, metavar="N", help="runs (20)")
    for name in ("status", "why", "logs", "cancel", "requeue"):
        one = commands.add_parser(name)
        one.add_argument("run", help="run folder, its name, or a job's number")
        if name == "logs":
            one.add_argument("--rank", type=int, default=0, metavar="N", help="rank (0)")
            one.add_argument("--follow", "-f", action="store_true", help="until the job ends")
    return parser


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


if __name__ == "__main__":
    sys.exit(main())
