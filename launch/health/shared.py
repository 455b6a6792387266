"""What the tasks of several nodes find out together: that they meet, clocks, the shared folder, a real all-reduce.

The tasks meet at a TCP store on the first node. Of each node one task, its leader, examines clock and folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from .node import host_name

MEET_SECONDS = 25.0
FOLDER_SECONDS = 8.0  # network file systems keep names and contents for a few seconds
PINGS = 4
GPU_BYTES, CPU_BYTES = 256 * 2**20, 8 * 2**20
ROUNDS = 3


@dataclass
class Shared:
    """What one task has found out with the others.

    Attributes:
        error: why the tasks could not meet, or what ended the examination, or "".
        unmet: why this task does not know where to meet, or "".
        missing: ranks that have not come.
        clock_ahead: seconds by which this node's clock is ahead of the first one's.
        clock_margin: how exactly that is known.
        unseen: hosts whose file in the shared folder has not appeared here.
        stale: whether a replaced file still has its old contents here.
        lock: "held" where the first node's lock is respected here, "ignored" where it is not, "taken" on that node
            itself, or why it cannot be tried.
        reduce_error: why an all-reduce failed, or "".
        rates: bytes/s of an all-reduce: "all", "within" the node, "between" nodes, and by the host of a neighbour.
    """

    rank: int
    host: str
    error: str = ""
    unmet: str = ""
    missing: list[int] = field(default_factory=list)
    clock_ahead: float = 0.0
    clock_margin: float = 0.0
    unseen: list[str] = field(default_factory=list)
    stale: bool = False
    lock: str = ""
    backend: str = ""
    reduce_error: str = ""
    rates: dict[str, float] = field(default_factory=dict)


class Rendezvous:
    """The store at which all tasks meet.

    Args:
        store: torch's TCPStore.
        hosts: of all ranks, in order.
    """

    def __init__(self, store: Any, rank: int, hosts: list[str]) -> None:
        self.store = store
        self.rank = rank
        self.hosts = hosts
        self.leaders = [hosts.index(host) for host in dict.fromkeys(hosts)]
        self.is_leader = rank in self.leaders
        self._barriers = 0

    def barrier(self) -> None:
        """Wait for the leaders of all nodes."""
        self._barriers += 1
        name = f"barrier-{self._barriers}"
        self.store.set(f"{name}-{self.rank}", "")
        self.store.wait([f"{name}-{leader}" for leader in self.leaders], timedelta(seconds=MEET_SECONDS))


def examine(rank: int, world_size: int, address: str, port: int, folder: Path, gpu: bool) -> Shared:
    """Take part in the examination."""
    found = Shared(rank, host_name())
    try:
        rendezvous = _rendezvous(found, world_size, address, port)
        if rendezvous is None:
            return found
        if rendezvous.is_leader and len(rendezvous.leaders) > 1:
            _compare_clocks(found, rendezvous)
            _examine_folder(found, rendezvous, folder / f".doctor-{port}")
        _all_reduce(found, rendezvous, gpu)
        rendezvous.store.set(f"done-{rank}", "")
        if rank == 0:  # whose end is the store's
            rendezvous.store.wait([f"done-{other}" for other in range(world_size)], timedelta(seconds=MEET_SECONDS))
    except Exception as error:  # whatever a network or a file system raises is a finding
        found.error = found.error or _first_line(error)
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _rendezvous(found: Shared, world_size: int, address: str, port: int) -> Rendezvous | None:
    from torch.distributed import TCPStore

    limit = timedelta(seconds=MEET_SECONDS)
    try:
        store = TCPStore(address, port, is_master=found.rank == 0, timeout=limit, wait_for_workers=False)
        store.set(f"host-{found.rank}", found.host)
    except Exception as error:
        found.error = f"cannot reach {address} port {port} ({_first_line(error)})"
        return None
    try:
        store.wait([f"host-{other}" for other in range(world_size)], limit)
    except Exception:
        found.missing = [other for other in range(world_size) if not store.check([f"host-{other}"])]
        return None
    return Rendezvous(store, found.rank, [store.get(f"host-{other}").decode() for other in range(world_size)])


def _compare_clocks(found: Shared, rendezvous: Rendezvous) -> None:
    """Ask the first node for its time, a few times; the quickest answer counts."""
    store = rendezvous.store
    for leader in rendezvous.leaders[1:]:
        for ping in range(PINGS):
            question, answer = f"ask-{leader}-{ping}", f"answer-{leader}-{ping}"
            if found.rank == 0:
                store.wait([question])
                store.set(answer, repr(time.time()))
            elif found.rank == leader:
                before = time.time()
                store.set(question, "")
                theirs = float(store.get(answer))
                took = time.time() - before
                if ping == 0 or took / 2 < found.clock_margin:
                    found.clock_ahead, found.clock_margin = before + took / 2 - theirs, took / 2


def _examine_folder(found: Shared, rendezvous: Rendezvous, folder: Path) -> None:
    """Whether files appear, replaced files change, and locks hold between nodes."""
    first = rendezvous.rank == 0
    value = folder / "value"
    _write(folder / f"from-{rendezvous.rank}", found.host)
    if first:
        _write(value, "old")
    rendezvous.barrier()
    others = {leader: folder / f"from-{leader}" for leader in rendezvous.leaders}
    _until(lambda: value.exists() and all(path.exists() for path in others.values()))
    found.unseen = [rendezvous.hosts[leader] for leader, path in others.items() if not path.exists()]
    _read(value)  # so that there is something old to be kept
    rendezvous.barrier()
    if first:
        _write(folder / "new", "new", replaces=value)
    rendezvous.barrier()
    _until(lambda: _read(value) == "new")
    found.stale = not found.unseen and _read(value) != "new"
    _try_lock(found, rendezvous, folder / "lock")
    if first:
        shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, text: str, replaces: Path | None = None) -> None:
    """Write a file as far as it can be: why it cannot is another finding, and the others wait at the next barrier."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if replaces:
            os.replace(path, replaces)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + FOLDER_SECONDS
    while not true() and time.monotonic() < end:
        time.sleep(0.05)


def _try_lock(found: Shared, rendezvous: Rendezvous, path: Path) -> None:
    """The first node holds a lock; the others try to take it."""
    with ExitStack() as opened:
        if rendezvous.rank == 0:
            found.lock = _lock(path, opened)
        rendezvous.barrier()
        if rendezvous.rank:
            found.lock = {"taken": "ignored"}.get(taken := _lock(path, opened), taken)
        rendezvous.barrier()


def _lock(path: Path, opened: ExitStack) -> str:
    """Take the lock of a file: "taken", "held" by another, or why it cannot be tried."""
    try:
        fcntl.flock(opened.enter_context(path.open("a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        return error.strerror or str(error)
    return "taken"


def _all_reduce(found: Shared, rendezvous: Rendezvous, gpu: bool) -> None:
    """Add up the ranks' numbers for real, and time it within nodes, between nodes and with each neighbour."""
    import torch
    from torch import distributed

    found.backend = "nccl" if gpu else "gloo"
    device = torch.device("cpu")
    try:
        if gpu:
            device = torch.device("cuda", rendezvous.rank - rendezvous.hosts.index(found.host))
            torch.cuda.set_device(device)
        world, limit = len(rendezvous.hosts), timedelta(seconds=MEET_SECONDS)
        distributed.init_process_group(
            found.backend, store=rendezvous.store, rank=rendezvous.rank, world_size=world, timeout=limit
        )
        number = torch.tensor([rendezvous.rank + 1.0], device=device)
        distributed.all_reduce(number)
        if number.item() != world * (world + 1) / 2:
            found.reduce_error = f"the sum of 1 … {world} came out as {number.item():g}"
            return
        for name, ranks in _groups(rendezvous).items():
            group = distributed.new_group(ranks)  # which every rank must enter
            if rendezvous.rank in ranks and len(ranks) > 1:
                found.rates[name.removeprefix(f"{found.host}|")] = _rate(group, len(ranks), device)
        distributed.destroy_process_group()
    except Exception as error:
        found.reduce_error = _first_line(error)


def _groups(rendezvous: Rendezvous) -> dict[str, list[int]]:
    """Ranks that reduce together: all, each node's, the nodes' leaders, and each leader with the next one."""
    hosts, leaders = rendezvous.hosts, rendezvous.leaders
    groups = {"all": list(range(len(hosts)))}
    for host in dict.fromkeys(hosts):
        groups[f"{host}|within"] = [rank for rank, other in enumerate(hosts) if other == host]
    groups["between"] = leaders
    if len(leaders) > 2:
        for one, next_one in zip(leaders, [*leaders[1:], leaders[0]], strict=True):
            groups[f"{hosts[one]}–{hosts[next_one]}"] = sorted((one, next_one))
    return groups


def _rate(group: Any, size: int, device: Any) -> float:
    """Bytes/s that each rank sends and receives in an all-reduce: 2 (n − 1) / n of the tensor, over the time."""
    import torch
    from torch import distributed

    count = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4
    tensor = torch.ones(count, device=device)
    best = float("inf")
    for _ in range(ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        distributed.all_reduce(tensor, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * (size - 1) / size * 4 * count / best


def read_shared(stored: dict[str, Any]) -> Shared:
    """A Shared from what `dataclasses.asdict` made of it."""
    return Shared(**stored)


def to_line(mark: str, stored: dict[str, Any]) -> str:
    """A line that a task prints and `gather` finds again."""
    return f"{mark} {json.dumps(stored)}"
