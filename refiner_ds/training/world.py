"""Who takes part in a run: this process's rank, the device it computes on, and the few collectives the loop needs."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from refiner_ds.training import flight_recorder

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees it."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, the one process that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        dist.barrier()

    def broadcast(self, value: T) -> T:
        """The main process's ``value``, on every process."""
        box: list[T] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def first(self, value: T | None) -> T | None:
        """The ``value`` of the lowest rank that has one, on every process; None where none has."""
        gathered: list[T | None] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return next((one for one in gathered if one is not None), None)

    def gather(self, value: T) -> list[T]:
        """Every process's ``value``, in the order of ranks, on every process."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over processes, in place."""
        dist.all_reduce(values)
        return values

    def all_reduce_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over processes, in place."""
        return self.all_reduce_sum(values).div_(self.size)


def init(timeout_minutes: float = 30) -> World:
    """Open the process group that torchrun, the deepspeed launcher or a Slurm task describes in the environment.

    With nothing described, this is a group of one. NCCL between GPUs, gloo between CPUs.
    """
    import deepspeed
    from deepspeed.comm import comm as deepspeed_comm

    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, alone)
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    # DeepSpeed would compile a shared-memory all-reduce on first use on CPUs (half a minute with a compiler, a crash
    # without) and leave its segments in /dev/shm; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        flight_recorder.enable()
    if not deepspeed_comm.is_initialized():
        deepspeed.init_distributed(
            "nccl" if cuda else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(minutes=timeout_minutes),
        )
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def shutdown() -> None:
    """Close the process group; a later `init` may open another."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
