"""What each task of an examination runs: ``python -m launch.health.probe``; prints what it finds as lines of JSON."""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from refiner_ds.errors import LaunchError

from ..environment import free_port, master_address, variables_on
from . import node, shared

NODE_MARK, SHARED_MARK, MEET_MARK = "DOCTOR-NODE", "DOCTOR-SHARED", "DOCTOR-MEET"
TOLD_SECONDS = shared.MEET_SECONDS


@dataclass(frozen=True)
class Place:
    """A task among the others, and where they meet; no address where that is not known, and ``unmet`` says why."""

    rank: int
    world_size: int
    address: str = ""
    port: int = 0
    unmet: str = ""


def main(argv: list[str] | None = None) -> int:
    """Measure this machine, then what the tasks find out together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where run folders are to lie")
    parser.add_argument("--data", default="", help="a set that every node must be able to read")
    parser.add_argument("--gpu", action="store_true", help="the all-reduce is NCCL's, over one GPU a task")
    parser.add_argument("--master-addr", default="name", help="how the first node is reached; as in a cluster profile")
    parser.add_argument("--node-environment", type=json.loads, default={}, help="variables by node; likewise, as JSON")
    given = parser.parse_args(argv)
    os.environ.update(variables_on(node.host_name(), given.node_environment))
    place = place_among_tasks(given.master_addr)
    print(shared.to_line(NODE_MARK, asdict(node.measure(place.rank, given.folder, given.data))), flush=True)
    found = shared.Shared(place.rank, node.host_name(), unmet=place.unmet)
    if place.address:
        meet = (place.rank, place.world_size, place.address, place.port)
        found = shared.examine(*meet, given.folder, given.gpu)
    print(shared.to_line(SHARED_MARK, asdict(found)), flush=True)
    return 0


def place_among_tasks(master_addr: str) -> Place:
    """This task's place: from torchrun's variables, or from Slurm's and what the first task says of its node."""
    if "RANK" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return Place(rank, world_size, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    from submitit.slurm.slurm import SlurmJobEnvironment

    task = SlurmJobEnvironment()
    rank, world_size = task.global_rank, task.num_tasks
    if rank == 0:
        print(shared.to_line(MEET_MARK, _meeting(master_addr, task.job_id)), flush=True)
    told, _, _ = select.select([sys.stdin], [], [], TOLD_SECONDS)
    line = sys.stdin.readline() if told else ""
    if not line:
        return Place(rank, world_size, unmet=f"has not heard from {task.hostnames[0]} where the ranks meet")
    meeting = json.loads(line)
    return Place(rank, world_size, meeting["address"], meeting["port"], meeting["error"] if rank == 0 else "")


def _meeting(master_addr: str, job_id: str) -> dict[str, str | int]:
    try:
        return {"address": master_address(master_addr), "port": free_port(job_id, 0), "error": ""}
    except LaunchError as error:
        return {"address": "", "port": 0, "error": str(error)}


if __name__ == "__main__":
    sys.exit(main())
