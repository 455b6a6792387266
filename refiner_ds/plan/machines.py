"""What a run is to train on."""

from __future__ import annotations

from dataclasses import dataclass

from refiner_ds.gpus import Gpu

__all__ = ["Machines"]


@dataclass(frozen=True)
class Machines:
    """What a run is to train on.

    Attributes:
        gpu: None for CPU processes.
        nodes, per_node: how many, and processes on each.
        network: of a node, one direction, GB/s.
        disk: to the run folder, GB/s.
        price: of a GPU-hour; None: not asked.
        step_seconds: given, in place of what was measured or of the lower bound.
        memory_gib: of a process on CPUs; None: its share of this machine's.
    """

    gpu: Gpu | None
    nodes: int = 1
    per_node: int = 1
    network: float = 50.0
    disk: float = 1.0
    price: float | None = None
    step_seconds: float | None = None
    memory_gib: float | None = None

    @property
    def processes(self) -> int:
        """In all."""
        return self.nodes * self.per_node
