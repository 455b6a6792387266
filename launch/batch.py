"""The batch script of a job, as submitit writes it, and its submission.

#SBATCH …                     what the allocation asks for
code=…/code/$SLURM_JOB_ID     the snapshot, which the submission puts there once the job has its number
<setup lines>                 the first that fails ends the job and is named
exec … launch.supervisor … -- srun … submitit      starts the tasks and obeys launch/policy.py when they have ended
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import submitit

from refiner_ds.errors import LaunchError
from refiner_ds.run_folder import RunFolder

from . import flags
from .allocation import Allocation
from .slurm import outside_allocation

SNAPSHOT_SECONDS = 60  # a shared file system shows a folder a little later on another machine
SUPERVISOR = f"{__package__}.supervisor"


class Executor(submitit.SlurmExecutor):
    """submitit's executor, with the supervisor between the batch script and srun."""

    def __init__(self, allocation: Allocation, exclude: str = "", dependency: str = "") -> None:
        self._run_folder = RunFolder(allocation.run.folder)
        self._srun = _srun_words(allocation, self._run_folder)
        super().__init__(folder=self._run_folder.jobs)
        self.update_parameters(**_parameters(allocation, self._run_folder, exclude, dependency))

    @property
    def _submitit_command_str(self) -> str:
        supervisor = (sys.executable, "-u", "-m", SUPERVISOR, str(self._run_folder), "--")
        task = (sys.executable, "-u", "-m", "submitit.core._submit", str(self.folder))
        return f"exec {shlex.join((*supervisor, *self._srun, *task))}"

    def script(self) -> str:
        """The batch script that a submission writes."""
        return self._make_submission_file_text(self._submitit_command_str, "")

    def send(self, job: Any) -> submitit.Job[Any]:
        """Submit ``job``, a callable, in the environment of `submission_environment`."""
        with _environment(submission_environment(self.script())):
            try:
                return self.submit(job)
            except submitit.core.utils.FailedJobError as error:
                raise LaunchError(f"Slurm refuses the job: {str(error).strip().splitlines()[-1]}") from None


def submission_environment(script: str) -> dict[str, str]:
    """The environment in which sbatch takes its script as it stands.

    Within an allocation, SLURM_MEM_PER_CPU and others would reach the new job's srun and contradict its own;
    SBATCH_PARTITION and others would silently win over the script's flags.
    """
    given = {line.removeprefix("#SBATCH --").partition("=")[0] for line in script.splitlines() if "#SBATCH" in line}
    dropped = flags.variables_over(given | set(flags.DECIDED) - {"account", "constraint", "partition", "qos", "time"})
    return outside_allocation({name: value for name, value in os.environ.items() if name not in dropped})


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _parameters(allocation: Allocation, run_folder: RunFolder, exclude: str, dependency: str) -> dict[str, Any]:
    profile = allocation.profile
    added = {flag: value for flag, value in profile.sbatch.items() if value is not False}
    if exclude:
        added["exclude"] = ",".join(filter(None, (str(added.get("exclude", "")), exclude)))
    cpus, tasks = allocation.cpus_per_task, allocation.tasks
    elastic = allocation.min_nodes not in (None, allocation.nodes)
    if elastic:
        # With tasks a node, Slurm gives the fewest nodes of a range; without, the most. The supervisor tells srun.
        added["nodes"] = allocation.nodes_text  # after submitit has counted the tasks
        cpus = cpus * tasks if cpus else None
    if dependency:
        added["dependency"] = ",".join(filter(None, (str(added.get("dependency", "")), dependency)))
        added.setdefault("kill-on-invalid-dep", "yes")  # else it waits for ever for a job that has failed
    if not profile.requeue:
        added["no-requeue"] = True
    return {
        "job_name": allocation.name,
        "nodes": allocation.nodes,
        **({} if elastic else {"ntasks_per_node": tasks}),
        "gpus_per_node": profile.gpus_per_node if profile.gpus else allocation.gpus or None,
        "cpus_per_task": cpus,
        "mem": None if allocation.mem_mb is None else f"{allocation.mem_mb}M" if allocation.mem_mb else "0",
        "time": profile.minutes,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "wckey": None,  # submitit's own would be refused where keys are enforced
        "signal_delay_s": profile.signal_seconds,
        "stderr_to_stdout": True,
        "setup": _setup(allocation, run_folder),
        "use_srun": False,
        "additional_parameters": {"chdir": str(run_folder), **({"requeue": True} if profile.requeue else {}), **added},
    }


def _srun_words(allocation: Allocation, run_folder: RunFolder) -> tuple[str, ...]:
    # The others would wait for a dead rank until the time limit; and srun no longer reads sbatch's cores a task.
    cores = (f"--cpus-per-task={allocation.cpus_per_task}",) if allocation.cpus_per_task else ()
    own = ("--unbuffered", f"--output={run_folder.jobs}/%j_%t_log.out", "--kill-on-bad-exit=1", *cores)
    return ("srun", *own, *flags.words(allocation.profile.srun))


def _setup(allocation: Allocation, run_folder: RunFolder) -> list[str]:
    profile = allocation.profile
    supervisor = shlex.join((sys.executable, "-u", "-m", SUPERVISOR, str(run_folder)))
    missing = f"launch: its code has not appeared in {run_folder.code} for {SNAPSHOT_SECONDS} s; submit the run again"
    lines = [
        f"code={shlex.quote(str(run_folder.code))}/$SLURM_JOB_ID",
        f'for _ in {{1..{SNAPSHOT_SECONDS}}}; do [ -d "$code" ] && break; sleep 1; done',
        f'cd "$code" || {{ echo {shlex.quote(missing)}; exit 2; }}',
        'export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"',
    ]
    if profile.setup:
        # EXIT too: a line that leaves would end the job without a word.
        failed = f'failed=$BASH_COMMAND; trap - ERR EXIT; cd "$code"; exec {supervisor} --setup-failed "$failed"'
        lines += [f"trap {shlex.quote(failed)} ERR EXIT", *profile.setup, "trap - ERR EXIT", 'cd "$code"']
    lines += [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    if profile.setup:
        lines.append('export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"')  # again: a module may have set it
    return lines
