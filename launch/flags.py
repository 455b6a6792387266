"""Flags of sbatch and srun that a cluster profile may add, and those that the launcher decides itself."""

from __future__ import annotations

import re

Flags = dict[str, str | int | bool]

# A second opinion under ``sbatch:`` would silently win over what the launcher has worked out.
DECIDED = {
    "account": "use account",
    "array": "a run is one job; launch/sweep.py submits many",
    "chdir": "the job runs in its snapshot of the code",
    "clusters": "submit from the cluster that is to run the job",
    "constraint": "use constraint",
    "cpus-per-gpu": "use cpus_per_task",
    "cpus-per-task": "use cpus_per_task",
    "error": "logs are in the run folder",
    "export": "use environment",
    "export-file": "use environment",
    "gpus": "use gpus_per_node",
    "gpus-per-node": "use gpus_per_node",
    "gpus-per-socket": "use gpus_per_node",
    "gpus-per-task": "use gpus_per_node",
    "hold": "submit when the job may start",
    "input": "a job reads nothing",
    "job-name": "it is the name of the run folder",
    "mem": "use mem_gb",
    "mem-per-cpu": "use mem_gb",
    "mem-per-gpu": "use mem_gb",
    "no-kill": "a job that lost a node starts again on whole ones",
    "no-requeue": "use requeue: false",
    "nodes": "use --nodes",
    "ntasks": "use gpus_per_node or tasks_per_node",
    "ntasks-per-core": "use gpus_per_node or tasks_per_node",
    "ntasks-per-gpu": "use gpus_per_node or tasks_per_node",
    "ntasks-per-node": "use gpus_per_node or tasks_per_node",
    "ntasks-per-socket": "use gpus_per_node or tasks_per_node",
    "open-mode": "a requeued job adds to its log",
    "output": "logs are in the run folder",
    "parsable": "the launcher reads what sbatch prints",
    "partition": "use partition",
    "qos": "use qos",
    "quiet": "the launcher reads what sbatch prints",
    "requeue": "use requeue",
    "signal": "use signal_seconds",
    "tasks-per-node": "use gpus_per_node or tasks_per_node",
    "test-only": "use --dry-run",
    "time": "use hours or time",
    "wait": "use --wait",
    "wrap": "the launcher writes the batch script",
}

SRUN_DECIDED = {
    **{flag: why for flag, why in DECIDED.items() if flag not in ("gpus-per-task", "wait")},
    "kill-on-bad-exit": "the first task to fail ends the others",
    "no-shell": "the job is what runs",
    "nodelist": "the tasks run on every node of the job",
    "exclude": "the tasks run on every node of the job",
    "relative": "the first task runs on the first node",
    "multi-prog": "every task runs the same program",
    "pty": "a job has no terminal",
    "unbuffered": "it is always set",
    "task-prolog": "use setup",
    "jobid": "the tasks belong to the job",
}

SHORT = {
    "A": "account", "a": "array", "B": "extra-node-info", "b": "begin", "C": "constraint", "c": "cpus-per-task",
    "D": "chdir", "d": "dependency", "e": "error", "F": "nodefile", "G": "gpus", "H": "hold", "h": "help",
    "i": "input", "J": "job-name", "k": "no-kill", "K": "kill-on-bad-exit", "L": "licenses", "l": "label",
    "M": "clusters", "m": "distribution", "N": "nodes", "n": "ntasks", "o": "output", "O": "overcommit",
    "p": "partition", "q": "qos", "Q": "quiet", "r": "relative", "S": "core-spec", "s": "oversubscribe", "t": "time",
    "u": "unbuffered", "v": "verbose", "W": "wait", "w": "nodelist", "x": "exclude",
}  # fmt: skip

FLAG = re.compile(r"[a-z][a-z-]*")  # what else there is, "nodes=3" or "exclusive --array", would be a second one

# Whole names of flags that are also the beginning of one above.
KNOWN = {"export", "wait"}

# The variable that would override a flag of the batch script, where its name is not SBATCH_ and the flag's.
VARIABLES = {
    "array": "SBATCH_ARRAY_INX",
    "job-name": "SBATCH_JOB_NAME",
    "mem": "SBATCH_MEM_PER_NODE",
    "no-requeue": "SBATCH_NO_REQUEUE",
    "time": "SBATCH_TIMELIMIT",
}


def refuse_sbatch_flags(flags: Flags) -> Flags:
    """The flags under their long names. Raises ValueError for one that the launcher decides."""
    return _refuse(flags, DECIDED)


def refuse_srun_flags(flags: Flags) -> Flags:
    """The same for srun's."""
    return _refuse(flags, SRUN_DECIDED)


def _refuse(flags: Flags, decided: dict[str, str]) -> Flags:
    named = {_long(flag): value for flag, value in flags.items()}
    for flag, value in named.items():
        if not FLAG.fullmatch(flag):
            raise ValueError(f"cannot set {flag}: give a flag's name alone, and its value behind the colon")
        if not str(value).isprintable():
            raise ValueError(f"cannot set {flag} to {value!r}: it must be on one line")
        # getopt takes any unambiguous beginning of a flag for the flag: --no-req is --no-requeue.
        meant = [flag] if flag in decided or flag in KNOWN else [whole for whole in decided if whole.startswith(flag)]
        if meant and meant[0] in decided:
            raise ValueError(f"cannot set {flag}: {decided[meant[0]]}")
    return named


def _long(flag: str) -> str:
    name = flag.lstrip("-")
    return SHORT.get(name, name.replace("_", "-"))


def words(flags: Flags) -> list[str]:
    """Flags as a command's words; one that is false is left out."""
    given = {flag: value for flag, value in flags.items() if value is not False}
    return [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in given.items()]


def variables_over(flags: set[str]) -> set[str]:
    """Environment variables by which sbatch would take something else than the flags its script gives."""
    return {VARIABLES.get(flag, f"SBATCH_{flag.upper().replace('-', '_')}") for flag in flags}
