"""What each task of an examination runs: ``python -m launch.health.probe``; prints what it finds as lines of JSON."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from . import node, shared

NODE_MARK, SHARED_MARK = "DOCTOR-NODE", "DOCTOR-SHARED"
PORTS = range(20000, 30000)  # below the ephemeral range, where any outgoing connection may sit on a port


def main(argv: list[str] | None = None) -> int:
    """Measure this machine, then what the tasks find out together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where run folders are to lie")
    parser.add_argument("--data", default="", help="a set that every node must be able to read")
    parser.add_argument("--gpu", action="store_true", help="the all-reduce is NCCL's, over one GPU a task")
    given = parser.parse_args(argv)
    rank, world_size, address, port = place_among_tasks()
    print(shared.to_line(NODE_MARK, asdict(node.measure(rank, given.folder, given.data))), flush=True)
    found = shared.examine(rank, world_size, address, port, given.folder, given.gpu)
    print(shared.to_line(SHARED_MARK, asdict(found)), flush=True)
    return 0


def place_among_tasks() -> tuple[int, int, str, int]:
    """Rank, number of tasks, and address and port where they meet: from torchrun's variables, or from Slurm's."""
    if "RANK" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return rank, world_size, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    from submitit.slurm.slurm import SlurmJobEnvironment

    task = SlurmJobEnvironment()
    address = os.environ.get("MASTER_ADDR") or task.hostnames[0]
    return task.global_rank, task.num_tasks, address, PORTS[int(task.job_id) % len(PORTS)]


if __name__ == "__main__":
    sys.exit(main())
