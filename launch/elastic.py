"""Jobs that can do with fewer nodes than they ask for (``submit.py --nodes 4 --min-nodes 2``).

Slurm starts such a job on what there is; the batch stays the same, shared out over fewer processes. Where it does not
divide over all the nodes given, some idle. When more nodes are free, the job saves, and restarts on them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from refiner_ds.config import load
from refiner_ds.errors import ConfigError, LaunchError

from . import slurm


def usable_nodes(run_file: Path, nodes: int, least: int, tasks: int) -> int:
    """The most of ``nodes`` that the run's batch divides over; all where it does over none: training says which do.

    Args:
        least: the fewest that the job can do with.
        tasks: processes a node.
    """
    run = load(run_file)
    for count in range(nodes, least - 1, -1):
        with suppress(ConfigError):
            run.batch(count * tasks)
            return count
    return nodes


def step_size(nodes: int, tasks: int) -> tuple[str, ...]:
    """srun's flags for a step on so many of a job's nodes."""
    return (f"--nodes={nodes}", f"--ntasks={nodes * tasks}", f"--ntasks-per-node={tasks}")


def watch_for_nodes(
    job_id: str, partition: str, missing: int, usable: Callable[[int], int], minutes: float, log: Callable[[str], None]
) -> None:
    """From a thread: have the job save and restart once free nodes of the partition would make it larger.

    Args:
        missing: nodes that it asked for and has not.
        usable: how many nodes it could use with so many more.
        minutes: between two looks.
    """

    def look() -> None:
        while True:
            time.sleep(60 * minutes)
            with suppress(LaunchError):
                command = ("sinfo", "--noheader", "--states=idle", "--format=%D", f"--partition={partition}")
                free = sum(map(int, slurm.ask(*command, seconds=slurm.TASK_ANSWER_SECONDS).stdout.split()))
                if usable(min(missing, free)) > usable(0):
                    log(f"{free} more nodes are free: saving, to restart on {usable(min(missing, free))}")
                    slurm.ask("scancel", "--signal=USR2", job_id, seconds=slurm.TASK_ANSWER_SECONDS)
                    return

    threading.Thread(target=look, name="watch_for_nodes", daemon=True).start()
