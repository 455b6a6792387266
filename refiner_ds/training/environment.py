"""The launcher's environment variables (rank, world size, address), checked before any rank waits for another.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are torch's own variables; torchrun, the deepspeed launcher
and launch/ set all of them. A process that lacks some would pick its own port, or train as a run of one, and never
meet the others.
"""

from __future__ import annotations

from collections.abc import Mapping

from refiner_ds.errors import LaunchError

GROUP = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ADVICE = "start it with torchrun, with the deepspeed launcher or with launch/submit.py"
# What starts several tasks without telling torch so, and where it says how many they are.
TASKS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}


def world_size_of(environment: Mapping[str, str]) -> int:
    """How many processes train together.

    Raises:
        LaunchError: several, and this one could not find the others; or the numbers cannot be meant.
    """
    if "WORLD_SIZE" not in environment:
        for command, name in TASKS.items():
            if _number(environment, name, "1") > 1:
                raise LaunchError(
                    f"{command} started {environment[name]} tasks, and WORLD_SIZE is not set: each would train alone"
                    f" in the same run folder; {ADVICE}"
                )
        return 1
    size = _number(environment, "WORLD_SIZE", "1")
    if size < 1:
        raise LaunchError(f"WORLD_SIZE is {size}; it must be at least 1")
    if size > 1 and (missing := [name for name in GROUP if not environment.get(name)]):
        raise LaunchError(
            f"WORLD_SIZE is {size} and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set:"
            f" the processes would never meet; {ADVICE}"
        )
    if not 0 <= (rank := _number(environment, "RANK", "0")) < size:
        raise LaunchError(f"RANK is {rank}, which does not exist where WORLD_SIZE is {size}")
    return size


def _number(environment: Mapping[str, str], name: str, default: str) -> int:
    try:
        return int(environment.get(name) or default)
    except ValueError:
        raise LaunchError(f"{name} is {environment[name]!r}; it must be a whole number") from None
