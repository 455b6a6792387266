"""What is going to be submitted: a run, spread over so many processes of so many nodes."""

from __future__ import annotations

from dataclasses import dataclass

from refiner_ds.config import RunFile
from refiner_ds.config.batch import BatchPlan

from .cluster import ClusterProfile


@dataclass(frozen=True)
class Allocation:
    """A run and the machines it is to have.

    Args:
        gpus: GPUs, and so processes, a node; 0 trains on CPU with ``profile.tasks_per_node`` processes.
        local: the processes of all nodes run on this machine.
    """

    run: RunFile
    profile: ClusterProfile
    nodes: int
    gpus: int
    local: bool

    @property
    def tasks(self) -> int:
        """Processes a node."""
        return self.gpus or self.profile.tasks_per_node

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * self.tasks

    @property
    def batch(self) -> BatchPlan:
        """Batch arithmetic. Raises ConfigError where the batch does not divide over the processes."""
        return self.run.batch(self.world_size)

    def __str__(self) -> str:
        kind = "GPU" if self.gpus else "CPU"
        if self.local:
            return f"{_count(self.world_size, 'process', 'es')} on this machine, {kind}"
        each = f"{_count(self.tasks, kind)} each" if self.gpus else f"{_count(self.tasks, 'process', 'es')} each, CPU"
        return f"{_count(self.nodes, 'node')}, {each}"


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else plural}"
