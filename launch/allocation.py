"""What is going to be submitted: a run, spread over so many processes of so many nodes."""

from __future__ import annotations

from dataclasses import dataclass

from refiner_ds.config import RunFile
from refiner_ds.config.batch import BatchSplit
from refiner_ds.errors import LaunchError

from .cluster import ClusterProfile
from .commands import Command
from .slurm import Nodes


@dataclass(frozen=True)
class Allocation:
    """A run and the machines it is to have.

    Args:
        nodes: nodes it asks for.
        gpus: GPUs, and so processes, a node; 0 trains on CPU with ``profile.tasks_per_node`` processes.
        local: the processes of all nodes run on this machine.
        cpus_per_task: cores a process; None leaves it to Slurm.
        mem_mb: memory a node, MB; 0 all of it; None leaves it to Slurm.
        min_nodes: nodes it can do with when there are no more; None: ``nodes``.
        has: what the partition's nodes have; None where it was not asked.
        command: what runs on the run folder; None: training.
    """

    run: RunFile
    profile: ClusterProfile
    nodes: int
    gpus: int
    local: bool = False
    cpus_per_task: int | None = None
    mem_mb: int | None = None
    min_nodes: int | None = None
    has: Nodes | None = None
    command: Command | None = None

    @property
    def name(self) -> str:
        """What the job is called: the run, and the command on it."""
        name = self.run.folder.name
        return name if self.command is None else f"{name}:{self.command.label}"

    @property
    def tasks(self) -> int:
        """Processes a node."""
        return self.gpus or self.profile.tasks_per_node

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * self.tasks

    @property
    def batch(self) -> BatchSplit:
        """Batch arithmetic. Raises ConfigError where the batch does not divide over the processes."""
        return self.run.batch(self.world_size)

    def refuse_indivisible(self) -> None:
        """Raise ConfigError where the batch does not divide over all the nodes, or over the fewest it can do with."""
        if self.command is not None:
            return
        for nodes in {self.nodes, self.min_nodes or self.nodes}:
            self.run.batch(nodes * self.tasks)

    @property
    def least(self) -> int:
        """Nodes it can do with."""
        return self.min_nodes or self.nodes

    @property
    def wait(self) -> str:
        """What keeps it waiting, whichever other jobs there are; empty where nothing does."""
        return self.has.wait(self.least) if self.has else ""

    @property
    def nodes_text(self) -> str | int:
        """The node count as sbatch takes it."""
        return self.nodes if self.min_nodes in (None, self.nodes) else f"{self.min_nodes}-{self.nodes}"

    def __str__(self) -> str:
        kind = "GPU" if self.gpus else "CPU"
        if self.local:
            return f"{_count(self.world_size, 'process', 'es')} on this machine, {kind}"
        each = f"{_count(self.tasks, kind)} each" if self.gpus else f"{_count(self.tasks, 'process', 'es')} each, CPU"
        nodes = _count(self.nodes, "node") if self.min_nodes is None else f"{self.nodes_text} nodes"
        return f"{nodes}, {each}"

    def resources(self) -> str:
        """Cores and memory in words; empty where they are left to Slurm."""
        cores = f"{_count(self.cpus_per_task, 'core')} a process" if self.cpus_per_task else ""
        memory = {None: "", 0: "all memory of a node"}.get(self.mem_mb, f"{(self.mem_mb or 0) / 1024:.0f} GB a node")
        return ", ".join(filter(None, (cores, memory)))

    def warnings(self) -> list[str]:
        """What can be asked for but will be slow."""
        workers, said = self.run.refiner.data.workers, list[str]()
        if self.command is not None:
            return said
        if self.cpus_per_task is not None and self.cpus_per_task < workers + 1:
            said.append(
                f"{_count(self.cpus_per_task, 'core')} a process for {_count(workers, 'loader worker')} and training;"
                f" raise cpus_per_task to {workers + 1}, or lower refiner.data.workers"
            )
        if self.wait:
            said.append(f"it will wait: {self.wait}")
        if self.has and self.has.limit and (asked := self.profile.minutes or 0) > self.has.limit:
            said.append(
                f"the time limit of {asked / 60:.3g} hours is more than the {self.has.limit / 60:.3g} that"
                f" {self.has.partition} allows: such a job waits for ever"
            )
        return said


def on_slurm(
    run: RunFile,
    profile: ClusterProfile,
    nodes: int,
    has: Nodes,
    min_nodes: int | None = None,
    command: Command | None = None,
) -> Allocation:
    """The allocation on a partition's nodes: GPUs as asked for or all of them, cores and memory by their share.

    A command has one node, and one that is a single process one GPU of it.

    Raises:
        LaunchError: the nodes have no GPUs and none were ruled out, too few, or not all the same number; or there are
            not as many nodes.
    """
    gpus = _gpus(profile, has)
    if command is not None:
        nodes, min_nodes = 1, None
    if has.count and (min_nodes or nodes) > has.count:
        flag, asked = ("--min-nodes", min_nodes) if min_nodes else ("--nodes", nodes)
        raise LaunchError(
            f"{has.partition} has {has.count} nodes, not {asked}; lower {flag}, or name another --partition"
        )
    if command is not None and command.alone:
        profile, gpus = _one_process(profile, gpus), min(gpus, 1)
    tasks, most = gpus or profile.tasks_per_node, max(has.gpus)
    share = min(1.0, gpus / most) if gpus else 1.0
    cpus, memory = profile.cpus_per_task, round(profile.mem_gb * 1024) if profile.mem_gb else None
    if cpus is None and has.cpus:
        cpus = max(1, int(has.cpus * share) // tasks)
    if memory is None and has.mem_mb > 1:  # 1 where a site does not tell Slurm its nodes' memory
        memory = int(has.mem_mb * share) if share < 1 else 0
    return Allocation(run, profile, nodes, gpus, False, cpus, memory, min_nodes, has, command)


def here(run: RunFile, profile: ClusterProfile, nodes: int, devices: int, command: Command | None = None) -> Allocation:
    """The allocation on this machine, which has so many GPUs."""
    gpus = devices // nodes if profile.gpus is None else profile.gpus
    if command is not None:
        nodes = 1
    if command is not None and command.alone:
        profile, gpus = _one_process(profile, gpus), min(gpus, 1)
    return Allocation(run, profile, nodes, gpus, local=True, command=command)


def _one_process(profile: ClusterProfile, gpus: int) -> ClusterProfile:
    kind, colon, _ = str(profile.gpus_per_node).rpartition(":")
    each = f"{kind}{colon}1" if gpus else 0
    return profile.model_copy(update={"gpus_per_node": each if colon or not gpus else 1, "tasks_per_node": 1})


def _gpus(profile: ClusterProfile, has: Nodes) -> int:
    if profile.gpus is not None:
        if profile.gpus > max(has.gpus):
            raise LaunchError(
                f"nodes of {has.partition} have {max(has.gpus)} GPUs, not {profile.gpus};"
                " lower --gpus-per-node, or name another --partition"
            )
        return profile.gpus
    if len(has.gpus) > 1:
        found = " or ".join(map(str, has.gpus))
        raise LaunchError(f"nodes of {has.partition} have {found} GPUs; say how many with --gpus-per-node")
    if has.gpus[0] == 0:
        raise LaunchError(
            f"nodes of {has.partition} have no GPUs; name another --partition, or train on CPU with --gpus-per-node 0"
        )
    return has.gpus[0]


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else plural}"
