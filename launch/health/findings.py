"""From measurements to sentences: what is wrong, on which nodes, and what to do about it. Pure; the tests' table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from .gather import Reports
from .limits import (
    BETWEEN_RATE,
    CLOCK_SECONDS,
    DISK_ERROR,
    DISK_WARNING,
    GPU_IN_USE,
    INODES,
    MEMORY_ERROR,
    MEMORY_WARNING,
    OPEN_FILES,
    SHARED_MEMORY,
    SLOWER,
    WRITE_RATE,
)
from .node import GIB, MIB, Node
from .shared import Shared


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        serious: training will fail; otherwise it will suffer.
        hosts: where.
        what: is wrong, and what to do, as one sentence.
    """

    serious: bool
    hosts: tuple[str, ...]
    what: str

    def __str__(self) -> str:
        where = f"{', '.join(self.hosts)}: " if self.hosts else ""
        return f"{'error' if self.serious else 'warning'}: {where}{self.what}"


@dataclass(frozen=True)
class Requirements:
    """What training needs of its nodes.

    Attributes:
        gpus: a node; None: whatever there is.
        workers: loader processes a task.
        images_per_second: that one task will train on; 0: unknown.
    """

    gpus: int | None = None
    workers: int = 4
    images_per_second: float = 0.0


@dataclass(frozen=True)
class Host:
    """The tasks of one node: how many, and the cores that each has."""

    tasks: int
    cores_each: float

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> Host:
        """From what they measured; where they are not bound to cores of their own they share them."""
        return cls(len(nodes), len({core for node in nodes for core in node.cores}) / len(nodes))

    def __str__(self) -> str:
        return _count(self.tasks, "process", "es")


Found = Iterator[tuple[bool, str]]  # whether it is serious, and the sentence


def examine(reports: Reports, needs: Requirements) -> list[Finding]:
    """All findings, serious ones first; the same sentence of several nodes is said once."""
    nodes = [reports.nodes[rank] for rank in sorted(reports.nodes)]
    shared = [reports.shared[rank] for rank in sorted(reports.shared)]
    places = {node.host: Host.of([other for other in nodes if other.host == node.host]) for node in nodes}
    hosts: dict[tuple[bool, str], list[str]] = {}
    for node in nodes:
        for check in NODE_CHECKS:
            for found in check(node, needs, places[node.host]):
                hosts.setdefault(found, []).append(node.host)
    for one in shared:
        for found in _together(one):
            hosts.setdefault(found, []).append(one.host)
    findings = [Finding(serious, tuple(dict.fromkeys(where)), what) for (serious, what), where in hosts.items()]
    findings += [*_absent(reports), *_different(nodes), *_slower(nodes, shared)]
    return sorted(findings, key=lambda finding: not finding.serious)


def _cores(node: Node, needs: Requirements, host: Host) -> Found:
    each = host.cores_each
    if each < needs.workers + 1:
        yield (
            False,
            (
                f"{each:g} cores for a process with {needs.workers} loader workers; "
                "ask for more with cpus_per_task, or lower refiner.data.workers"
            ),
        )
    rate = node.decode_rate * min(each, needs.workers or 1)
    if 0 < rate < needs.images_per_second:
        yield (
            False,
            (
                f"{each:g} cores decode {rate:,.0f} images/s where a process is to train on "
                f"{needs.images_per_second:,.0f}; ask for more cores and workers"
            ),
        )


def _memory(node: Node, needs: Requirements, host: Host) -> Found:
    for serious, limit in ((True, MEMORY_ERROR), (False, MEMORY_WARNING)):
        if 0 <= node.memory < limit * host.tasks:
            yield (
                serious,
                f"{node.memory / GIB:.1f} GiB of memory for {host}; ask for more with mem_gb",
            )
            return


def _shared_memory(node: Node, needs: Requirements, host: Host) -> Found:
    if node.shared_memory < SHARED_MEMORY * host.tasks:
        yield (
            True,
            (
                f"/dev/shm has {max(0, node.shared_memory) / MIB:.0f} MiB free for {host}; remove what "
                "others left there, or give a container more (--shm-size)"
            ),
        )


def _limits(node: Node, needs: Requirements, host: Host) -> Found:
    if 0 <= node.open_files < OPEN_FILES:
        yield True, f"a process may open {node.open_files} files; raise the limit (ulimit -n {OPEN_FILES}) in setup"


def _folder(node: Node, needs: Requirements, host: Host) -> Found:
    folder = node.folder
    if folder.error:
        yield True, f"{folder.path} cannot be written ({folder.error}); choose a folder that every node can write"
        return
    left = folder.free if folder.quota_left < 0 else min(folder.free, folder.quota_left)
    whose = "your quota leaves" if 0 <= folder.quota_left < folder.free else "its disk has"
    for serious, limit in ((True, DISK_ERROR), (False, DISK_WARNING)):
        if left < limit:
            yield serious, f"{folder.path}: {whose} {left / GIB:.1f} GiB for checkpoints; free some, or choose another"
            break
    if 0 <= folder.free_inodes < INODES:
        yield True, f"{folder.path}: room for {folder.free_inodes} more files; remove some, or choose another folder"
    if 0 <= folder.write_rate < WRITE_RATE:
        yield (
            False,
            (
                f"{folder.path}: writes {folder.write_rate / MIB:.0f} MiB/s; checkpoints will take long, "
                "choose a parallel file system"
            ),
        )


def _gpus(node: Node, needs: Requirements, host: Host) -> Found:
    if node.gpu_error:
        yield True, f"{node.gpu_error}; have the node drained and its driver looked at"
    if needs.gpus and len(node.gpus) < needs.gpus and not node.gpu_error:
        yield True, f"{len(node.gpus)} GPUs where {needs.gpus} are wanted; exclude the node and report it"
    for gpu in node.gpus:
        if gpu.ecc_errors:
            yield True, f"GPU {gpu.index} has {gpu.ecc_errors} uncorrectable memory errors; exclude the node, report it"
        if gpu.slowed_by:
            yield False, f"GPU {gpu.index} is slowed down by {gpu.slowed_by}; report the node"
        if gpu.used > GPU_IN_USE:
            yield False, f"GPU {gpu.index} has {gpu.used:,} MiB in use by another process; see nvidia-smi, end it"
        if gpu.mig:
            yield False, f"GPU {gpu.index} is split by MIG, over which NCCL does not reduce; ask for whole GPUs"


def _data(node: Node, needs: Requirements, host: Host) -> Found:
    if node.data_error:
        yield True, f"the data cannot be read here: {node.data_error}"


NODE_CHECKS: Sequence[Callable[[Node, Requirements, Host], Found]] = (
    _cores,
    _memory,
    _shared_memory,
    _limits,
    _folder,
    _gpus,
    _data,
)


def _together(one: Shared) -> Found:
    """What one task has found out with the others."""
    if one.unmet:
        yield True, one.unmet
    if one.error:
        yield True, f"{one.error}; see that nodes resolve each other's names and no firewall is between them"
    if one.unseen:
        yield True, f"does not see what {', '.join(one.unseen)} wrote; the run folder must lie on a shared file system"
    elif one.stale:
        yield True, "still reads the old contents of a replaced file; mount the folder without such caching (NFS: noac)"
    elif one.lock == "ignored":
        yield True, "does not respect another node's file lock; mount with locks between nodes (Lustre: flock)"
    elif one.lock not in ("", "held", "taken"):
        yield True, f"cannot lock files in the run folder ({one.lock}); mount it with locks"
    if abs(one.clock_ahead) - one.clock_margin > CLOCK_SECONDS:
        way = "ahead of" if one.clock_ahead > 0 else "behind"
        yield False, f"its clock is {abs(one.clock_ahead):.1f} s {way} the first node's; have NTP set up"
    if one.reduce_error:
        yield (
            True,
            (
                f"an all-reduce over {one.backend} fails: {one.reduce_error}; run with NCCL_DEBUG=INFO, "
                "and choose the interface with NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
            ),
        )
    between = one.rates.get("between", 0.0)
    if one.backend == "nccl" and 0 < between < BETWEEN_RATE:
        yield (
            False,
            (
                f"reduces at {between * 8 / 1e9:.1f} Gbit/s with the other nodes; "
                "see that NCCL uses the fast network (NCCL_DEBUG=INFO, NCCL_IB_HCA)"
            ),
        )


def _absent(reports: Reports) -> Iterator[Finding]:
    """Tasks that have not reported, or not to the end."""
    host = {rank: node.host for rank, node in reports.nodes.items()}
    unmet = sorted({rank for one in reports.shared.values() for rank in one.missing})
    for rank in range(reports.tasks):
        said = reports.stderr.get(rank, reports.stderr.get(-1, ""))
        words = f": {said}" if said else ""
        if rank not in reports.nodes:
            yield Finding(
                True, (), f"rank {rank} does not start{words}; see that clone and Python are there on every node"
            )
        elif rank not in reports.shared:
            how = "hangs" if not reports.ended else "dies"
            yield Finding(True, (host[rank],), f"rank {rank} {how} where all ranks work together{words}")
        elif rank in unmet:
            yield Finding(True, (host[rank],), f"rank {rank} has not reached the rendezvous")


def _different(nodes: Sequence[Node]) -> Iterator[Finding]:
    """What should be alike on all nodes and is not."""
    kinds = {name: {node.host: node.versions.get(name, "none") for node in nodes} for name in _names(nodes)}
    kinds["the GPU"] = {node.host: ", ".join(gpu.name for gpu in node.gpus) or "none" for node in nodes}
    for name, by_host in kinds.items():
        usual, times = Counter(by_host.values()).most_common(1)[0] if by_host else ("", 0)
        for host, found in by_host.items():
            if found != usual:
                yield Finding(
                    name != "the GPU",
                    (host,),
                    f"{name} is {found} here and {usual} on {_count(times, 'other node')}; make all nodes alike",
                )


def _names(nodes: Sequence[Node]) -> list[str]:
    return list(dict.fromkeys(name for node in nodes for name in node.versions))


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{plural if number != 1 else ''}"


def _slower(nodes: Sequence[Node], shared: Sequence[Shared]) -> Iterator[Finding]:
    """Nodes that are slower than the others by half: at decoding, at writing, in the network."""
    decoding = _lowest((node.host, node.decode_rate) for node in nodes)
    writing = _lowest((node.host, node.folder.write_rate) for node in nodes)
    within = _lowest((one.host, one.rates.get("within", -1.0)) for one in shared)
    for what, advice, rates, unit in (
        ("decodes", "see what else runs there", decoding, (1, "images/s")),
        ("writes to the run folder at", "see its link to the file system", writing, (1e6, "MB/s")),
        ("reduces between its own GPUs at", "see nvidia-smi topo -m, and report it", within, (1e9, "GB/s")),
    ):
        for host, rate in rates.items():
            others = [other for name, other in rates.items() if name != host]
            if len(others) > 1 and rate < SLOWER * median(others):
                scale, name = unit
                yield Finding(
                    False,
                    (host,),
                    f"{what} {rate / scale:,.1f} {name}, other nodes {median(others) / scale:,.1f}; {advice}",
                )
    yield from _slow_links(shared)


def _lowest(rates: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The lowest rate of each host's tasks; those that are unknown aside."""
    lowest: dict[str, float] = {}
    for host, rate in rates:
        if rate > 0:
            lowest[host] = min(rate, lowest.get(host, rate))
    return lowest


def _slow_links(shared: Sequence[Shared]) -> Iterator[Finding]:
    links = _lowest((name, rate) for one in shared for name, rate in one.rates.items() if "–" in name)
    usual = median(links.values()) if links else 0.0
    slow = [name.split("–") for name, rate in links.items() if rate < SLOWER * usual]
    times = Counter(host for pair in slow for host in pair)
    for host, number in times.items():
        if number == 2:  # both neighbours find it slow
            rate = max(links[name] for name in links if host in name.split("–"))
            yield Finding(
                False,
                (host,),
                f"reduces with its neighbours at {rate * 8 / 1e9:.1f} Gbit/s where other nodes reach "
                f"{usual * 8 / 1e9:.1f}; exclude the node and report its network card",
            )
