"""Slurm's commands: what its nodes have, what it says of a job, and a requeue that outlasts an absent controller."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from refiner_ds.errors import LaunchError

from .slurm_time import minutes_of

ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
GRES = re.compile(r"\bgpu(?::([^:,(]+))?:(\d+)")  # gpu:8, gpu:h100:8(S:0-1)
AWAY = re.compile(r"down|drain|drng|fail|maint|unk|.*\*$")  # sinfo's states of nodes that take no job; *: no answer
WHERE = ("SLURM_CONF", "SLURM_CLUSTERS")  # where Slurm is, not what an allocation around this command was given
SUPERVISOR = "REFINER_SUPERVISOR"  # the variable that tells tasks where their supervisor runs: host:process
ANSWER_SECONDS = 60  # a submission can wait so long for Slurm
TASK_ANSWER_SECONDS = 12  # a job that is to end soon cannot


class NoSlurm(LaunchError):
    """Slurm's commands are not on this machine."""


class Refused(LaunchError):
    """Slurm would not take a job."""


class Forgotten(LaunchError):
    """Slurm does not know the job, or no longer."""


def ask(
    *command: str, given: str | None = None, seconds: float = ANSWER_SECONDS, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. Raises LaunchError where there is none, or no answer."""
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds, env=env)
    except FileNotFoundError:
        raise NoSlurm(f"there is no Slurm here ({command[0]} not found); add --local to run here") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"Slurm has not answered {command[0]} for {seconds:g} s; try again later") from None


def outside_allocation(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment as it was before an allocation was given to this command."""
    return {
        name: value for name, value in environment.items() if name in WHERE or not name.startswith(("SLURM_", "PMI_"))
    }


def require_slurm() -> None:
    """Raise LaunchError unless Slurm's commands are here."""
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise NoSlurm(f"there is no Slurm here ({program} not found); add --local to run on this machine")


@dataclass(frozen=True)
class Nodes:
    """What every node of a partition has.

    Attributes:
        partition: as a sentence names it.
        gpus: GPUs of each kind of node, fewest first; of the wanted type alone, where one is wanted.
        cpus, mem_mb: of the smallest node that has the GPUs.
        gpu_type: of the GPUs, in Slurm's words, where it names one for all; else "".
        limit, default_limit: minutes that a job may take, and those of a job that does not say; None: any.
        count: nodes, those included that take no job now; 0: not counted.
        idle: of those, nodes without a job.
        away: reason that Slurm gives, by the names of nodes that take no job: they are down, drained or reserved.
        state: of the partition: up, down (jobs wait), drain or inact (it takes none).
    """

    partition: str
    gpus: tuple[int, ...]
    cpus: int
    mem_mb: int
    gpu_type: str = ""
    limit: int | None = None
    default_limit: int | None = None
    count: int = 0
    idle: int = 0
    away: Mapping[str, str] = field(default_factory=dict)
    state: str = "up"

    def wait(self, nodes: int) -> str:
        """What keeps a job of so many nodes waiting, whichever other jobs there are; empty where nothing does."""
        if self.state != "up":
            return f"{self.partition} is down"
        here = self.count - len(self.away)
        if not here < nodes <= self.count:
            return ""
        reasons = "; ".join(sorted({reason for reason in self.away.values() if reason not in ("", "none")}))
        names = ", ".join(self.away) + (f": {reasons}" if reasons else "")
        return f"{here} of {self.count} nodes of {self.partition} take jobs; the others are down or drained ({names})"


def nodes_of(partition: str | None, gpu_type: str | None = None) -> Nodes:
    """What the nodes of a partition (None: the default one) have.

    Raises:
        LaunchError: Slurm knows no node of it, or none with that type of GPU.
    """
    which = (f"--partition={partition}",) if partition else ()
    answer = ask("sinfo", "--noheader", "--Node", "--format=%P|%G|%c|%m|%l|%L|%a|%t|%N|%E", *which)
    if answer.returncode:
        raise LaunchError(f"Slurm does not answer: {last_line(answer.stderr)}; add --local to run on this machine")
    rows = [line.split("|", 9) for line in answer.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 10 and (partition or row[0].endswith("*"))]  # the default's asterisk
    named = f"partition {partition}" if partition else "the default partition"
    if not rows:
        raise LaunchError(f"Slurm knows no node of {named}; say which with --partition")
    counted = [(_gpus(row[1], gpu_type), int(row[2].rstrip("+")), int(row[3].rstrip("+"))) for row in rows]
    if gpu_type:
        counted = [row for row in counted if row[0]]
        if not counted:
            raise LaunchError(f"no node of {named} has GPUs of type {gpu_type}; sinfo --format='%P %G' lists them")
    types = {gpu_type} if gpu_type else {kind for row in rows for kind, _ in GRES.findall(row[1])}
    return Nodes(
        named,
        tuple(sorted({gpus for gpus, _, _ in counted})),
        min(cpus for _, cpus, _ in counted),
        min(memory for _, _, memory in counted),
        types.pop() if len(types) == 1 else "",
        minutes_of(rows[0][4]),
        minutes_of(rows[0][5]),
        len({row[8] for row in rows}),
        len({row[8] for row in rows if row[7].startswith("idle")}),
        {row[8]: row[9] for row in rows if AWAY.match(row[7])},
        rows[0][6],
    )


def _gpus(gres: str, gpu_type: str | None) -> int:
    return sum(int(count) for kind, count in GRES.findall(gres) if gpu_type in (None, kind))


def spare_nodes(partition: str | None, without: Iterable[str]) -> int:
    """Nodes of a partition that are up, ``without`` those named; 0 where Slurm does not answer."""
    which = (f"--partition={partition}",) if partition else ()
    try:
        answer = ask("sinfo", "--noheader", "--Node", "--format=%N %t", *which, seconds=TASK_ANSWER_SECONDS)
    except LaunchError:
        return 0
    states = dict(line.split()[:2] for line in answer.stdout.splitlines() if len(line.split()) >= 2)
    up = {node for node, state in states.items() if re.match(r"(idle|mix|alloc|comp|resv|plnd|plan)", state)}
    return len(up - set(without))


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job.

    Attributes:
        state: RUNNING, PENDING, FAILED, …
        exit_code, signal: as in ExitCode=0:9.
        restarts: how often it was requeued.
        fields: everything else that ``scontrol show job`` says.
    """

    state: str
    reason: str
    exit_code: int
    signal: int
    restarts: int
    nodes: str
    fields: dict[str, str]

    @property
    def ended(self) -> bool:
        """Whether it will not run again."""
        return self.state in ENDED

    @property
    def exit_code_or_signal(self) -> int:
        """As a shell has it: 128 + the number of a signal; 1 for a failure that has neither."""
        return self.exit_code or (128 + self.signal if self.signal else 1)

    @property
    def exit_text(self) -> str:
        """State, reason and exit code in Slurm's own words."""
        reason = f", {self.reason}" if self.reason else ""
        return f"{self.state}{reason}, exit code {self.exit_code}:{self.signal}"


def job_state(job_id: str, seconds: float = ANSWER_SECONDS, of: Path | None = None) -> JobState | None:
    """What the controller says of a job, or accounting; None where the controller is away.

    Args:
        of: its run folder; a job of the same number that works elsewhere is another.
    Raises:
        NoSlurm, Forgotten: there is no Slurm here, or it no longer knows the job.
    """
    end = time.monotonic() + seconds
    try:
        shown = ask("scontrol", "show", "job", "--oneliner", job_id, seconds=seconds)
    except NoSlurm:
        raise
    except LaunchError:
        return None
    if shown.returncode == 0 and shown.stdout.strip():
        state = _parsed(shown.stdout)
        if of is not None and not works_in(state.fields["WorkDir"], of):
            raise Forgotten(f"job {job_id} is another by now; the logs of this one are in the run folder")
        return state
    if "Invalid job id" not in shown.stderr:
        return None
    if shutil.which("sacct"):
        form = "--format=State,ExitCode,NodeList"
        words = ("sacct", "--jobs", job_id, "--allocations", "--noheader", "--parsable2", form)
        try:
            kept = ask(*words, seconds=max(0.1, end - time.monotonic()))
        except LaunchError:
            return None  # the database is away
        word, *rest = kept.stdout.strip().partition("\n")[0].split("|")
        if rest:
            code, _, number = (rest[0] or "0:0").partition(":")
            return JobState(word.split()[0], "", _int(code), _int(number), 0, rest[-1], {})
    raise Forgotten(f"Slurm no longer knows job {job_id}; its logs are in the run folder")


def _parsed(line: str) -> JobState:
    fields = dict(re.findall(r"(?:^|\s)([A-Za-z/:]+)=(\S*)", line))
    code, _, number = fields.get("ExitCode", "0:0").partition(":")
    return JobState(
        fields.get("JobState", ""),
        fields.get("Reason", "").replace("None", ""),
        _int(code),
        _int(number),
        _int(fields.get("Restarts", "0")),
        fields.get("NodeList", "").replace("(null)", ""),
        {**fields, "WorkDir": _folder_of(line)},
    )


def _folder_of(line: str) -> str:
    """The working directory in what scontrol shows of a job, whose words spaces separate, as may be in a name."""
    found = re.search(r" WorkDir=(.*?)(?: [A-Za-z/:]+=|$)", line.rstrip())
    return found[1] if found else ""


def _int(text: str) -> int:
    return int(text) if text.isdigit() else 0


def has_ended(job_id: str, seconds: float = TASK_ANSWER_SECONDS) -> bool:
    """Whether a job will not run again; False where Slurm does not say."""
    try:
        state = job_state(job_id, seconds)
    except Forgotten:
        return True
    return state is not None and state.ended


def unfinished_jobs(jobs: Path, besides: Iterable[str] = ()) -> dict[str, str]:
    """State of each job submitted from this jobs/ folder, ``besides`` those, that waits or runs, by its number."""
    submitted = {file.name.partition("_")[0] for file in jobs.glob("*_submission.sh")} - set(besides)
    if not submitted:
        return {}
    answer = ask("squeue", "--noheader", "--format=%A %T %Z", f"--user={getpass.getuser()}")
    if answer.returncode:
        raise LaunchError(f"Slurm does not say which jobs have ended: {last_line(answer.stderr)}; try again later")
    known = (line.split(" ", 2) for line in answer.stdout.splitlines())
    return {number: state for number, state, at in known if number in submitted and works_in(at, jobs.parent)}


def works_in(folder: str, run_folder: Path) -> bool:
    """Whether a job whose working directory is ``folder`` is of a run folder.

    Numbers come again, when a cluster is set up anew or has counted to its end; then it is another's.
    """
    try:
        return Path(folder).samefile(run_folder)
    except OSError:
        return not Path(folder).is_dir()  # cannot be told


def states(seconds: float) -> dict[str, tuple[str, str]]:
    """State and working directory of each job of this user that the controller remembers, by its number.

    Raises:
        LaunchError: it does not answer.
    """
    command = ("squeue", "--noheader", "--states=all", "--format=%A %T %Z", f"--user={getpass.getuser()}")
    answer = ask(*command, seconds=seconds)
    if answer.returncode:
        raise LaunchError(f"Slurm does not answer: {last_line(answer.stderr)}")
    known = (line.split(" ", 2) for line in answer.stdout.splitlines())
    return {number: (state, folder) for number, state, folder in known}


def requeue(job_id: str) -> str | None:
    """Have Slurm requeue a running job. Returns its objection, None where it did."""
    return _control("requeue", job_id)


def exclude(job_id: str, nodes: str) -> str | None:
    """Keep a job that waits, or has just been requeued, off these nodes. Returns Slurm's objection."""
    return _control("update", f"JobId={job_id}", f"ExcNodeList={nodes}")


def _control(*words: str) -> str | None:
    try:
        answer = ask("scontrol", *words, seconds=TASK_ANSWER_SECONDS)
    except LaunchError as error:
        return str(error)
    return (answer.stderr.strip() or f"exit code {answer.returncode}") if answer.returncode else None


def expected_start(batch_script: str, env: dict[str, str]) -> str:
    """Have Slurm look at a batch script without taking it. Returns when it would start.

    Raises:
        Refused: Slurm's objection, which may only be that nodes are down: ``sbatch`` takes such a job, and it waits.
    """
    answer = ask("sbatch", "--test-only", given=batch_script, env=env)
    if answer.returncode:
        raise Refused(f"Slurm refuses the job: {last_line(answer.stderr)}")
    found = re.search(r"to start at (\S+)", answer.stderr + answer.stdout)
    return found[1] if found else "unknown"


def last_line(text: str) -> str:
    """The last line of what a Slurm command complained, without the words that only say that it is a complaint."""
    lines = text.strip().splitlines()
    return re.sub(r"^(\w+: )?(error: )?(allocation failure: )?", "", lines[-1]) if lines else "it gave no reason"


def restart_count() -> int:
    """How often the job that this process belongs to has been restarted."""
    return int(os.environ.get("REFINER_RESTART_COUNT") or os.environ.get("SLURM_RESTART_COUNT") or "0")


def until(deadline: float, every: float = 5.0) -> Iterable[int]:
    """0, 1, 2, … with a pause between, for asking again until ``deadline`` (of time.monotonic)."""
    attempt = 0
    yield attempt
    while time.monotonic() + every < deadline:
        time.sleep(every)
        attempt += 1
        yield attempt
