"""What is asked of Slurm, through submitit, and what Slurm tells about a job."""

from __future__ import annotations

import getpass
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import submitit

from refiner_ds.errors import LaunchError
from refiner_ds.run_folder import RunFolder

from .cluster import ClusterProfile

ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
ANSWER_SECONDS = 60


def ask(*command: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. Raises LaunchError where there is none, or no answer."""
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except FileNotFoundError:
        raise LaunchError(f"there is no Slurm here ({command[0]} not found); add --local to run here") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"Slurm has not answered {command[0]} for {ANSWER_SECONDS} s; try again later") from None


def require_slurm() -> None:
    """Raise LaunchError unless this machine submits to a Slurm that answers."""
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise LaunchError(f"there is no Slurm here ({program} not found); add --local to run on this machine")
    answer = ask("sinfo", "--noheader", "--format=%P")
    if answer.returncode:
        raise LaunchError(f"Slurm does not answer: {_last_line(answer.stderr)}; add --local to run on this machine")


def gpus_of_nodes(partition: str | None) -> int:
    """GPUs that every node of the partition (None: the default one) has."""
    which = (f"--partition={partition}",) if partition else ()
    answer = ask("sinfo", "--noheader", "--format=%P %G", *which)
    rows = [line.split() for line in answer.stdout.splitlines()]
    rows = [row for row in rows if partition or row[0].endswith("*")]  # the asterisk marks the default partition
    counts = sorted({sum(int(n) for n in re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", row[1])) for row in rows})
    named = f"partition {partition}" if partition else "the default partition"
    if not counts:
        raise LaunchError(f"Slurm knows no node of {named}; say which with --partition, or give --gpus-per-node")
    if len(counts) > 1:
        found = " or ".join(map(str, counts))
        raise LaunchError(f"nodes of {named} have {found} GPUs; say how many with --gpus-per-node")
    return counts[0]


def executor(
    profile: ClusterProfile, *, nodes: int, gpus: int, tasks: int, run_folder: Path, code: Path
) -> submitit.SlurmExecutor:
    """submitit's executor for a job of ``nodes`` × ``tasks`` processes run from the snapshot ``code``."""
    slurm = submitit.SlurmExecutor(folder=RunFolder(run_folder).jobs)
    wanted: dict[str, Any] = {
        "job_name": run_folder.name,
        "nodes": nodes,
        "ntasks_per_node": tasks,
        "gpus_per_node": gpus or None,
        "cpus_per_task": profile.cpus_per_task,
        "mem": f"{round(profile.mem_gb * 1024)}M" if profile.mem_gb else None,
        "time": profile.minutes,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "wckey": None,  # submitit's own would be refused where keys are enforced
        "signal_delay_s": profile.signal_seconds,
        "stderr_to_stdout": True,
        "setup": _setup(profile, code),
        "srun_args": _srun_arguments(profile),
        "additional_parameters": {"chdir": str(code), "requeue": True, **profile.sbatch},
    }
    slurm.update_parameters(**wanted)
    return slurm


def script(slurm: submitit.SlurmExecutor) -> str:
    """The batch script that a submission through ``slurm`` writes."""
    return slurm._make_submission_file_text(slurm._submitit_command_str, "")


def _setup(profile: ClusterProfile, code: Path) -> list[str]:
    path = f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    variables = [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    return [*profile.setup, *variables, path]  # the path last: a module may set it too


def _srun_arguments(profile: ClusterProfile) -> list[str]:
    # The others would wait for a dead rank until the time limit; and srun no longer reads sbatch's cores a task.
    cores = [f"--cpus-per-task={profile.cpus_per_task}"] if profile.cpus_per_task else []
    return ["--kill-on-bad-exit=1", *cores]


def test_only(batch_script: str) -> None:
    """Have Slurm look at a batch script without taking it. Raises LaunchError with its objection."""
    answer = ask("sbatch", "--test-only", given=batch_script)
    if answer.returncode:
        raise LaunchError(f"Slurm refuses the job: {_last_line(answer.stderr)}")


def unfinished_job(run_folder: Path) -> str | None:
    """A job of this run that still waits or runs: "12 (RUNNING)"."""
    submitted = {file.name.partition("_")[0] for file in (RunFolder(run_folder).jobs).glob("*_submission.sh")}
    if not submitted:
        return None
    answer = ask("squeue", "--noheader", "--format=%A %T", f"--user={getpass.getuser()}")
    for line in answer.stdout.splitlines():
        number, _, state = line.partition(" ")
        if number in submitted:
            return f"{number} ({state})"
    return None


def ending(job_id: str) -> tuple[str, int] | None:
    """State and exit code of a job that has ended, else None.

    Raises:
        LaunchError: Slurm has forgotten the job.
    """
    shown = ask("scontrol", "show", "job", "--oneliner", job_id)
    if shown.returncode == 0:
        fields = dict(field.partition("=")[::2] for field in shown.stdout.split())
        return _ending(fields.get("JobState", ""), fields.get("ExitCode", "0:0"))
    if "Invalid job id" not in shown.stderr:
        return None  # the controller is away for a moment; it keeps the job
    if shutil.which("sacct"):
        kept = ask("sacct", "--jobs", job_id, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode")
        state, bar, code = kept.stdout.strip().partition("|")
        if bar:
            return _ending(state.split()[0], code)
    raise LaunchError(f"Slurm no longer knows job {job_id}; its logs are in the run folder")


def _ending(state: str, exit_code: str) -> tuple[str, int] | None:
    if state not in ENDED:
        return None
    code, _, number = exit_code.partition(":")
    if state == "COMPLETED":
        return state, 0
    return state, int(code) or (128 + int(number) if number.strip("0") else 1)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return re.sub(r"^(\w+: )?(error: )?(allocation failure: )?", "", lines[-1]) if lines else "it gave no reason"
