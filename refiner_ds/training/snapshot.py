"""A copy on the host of everything a checkpoint holds, taken between two steps and gathered while training goes on.

Each rank copies its own part of weights, EMA and moments into buffers that are allocated once (page-locked beside a
GPU): all that a step has to wait for. Parameters are put together from the copies later, on whichever rank writes them,
over a process group of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from refiner_ds.training.ema import ModelEma
from refiner_ds.training.engine import Engine
from refiner_ds.training.fragments import Fragment
from refiner_ds.training.world import World

WEIGHTS, EMA, FIRST, SECOND = KINDS = ("weights", "ema", "exp_avg", "exp_avg_sq")


class Snapshot:
    """This rank's copies, and the exchange that makes whole tensors of them.

    Args:
        writers: ranks that write, at least the main one; each is given its share of the parameters.
        group: a gloo process group that nobody else uses; None for a run of one process.
    """

    def __init__(
        self, engine: Engine, ema: ModelEma, world: World, writers: int, group: dist.ProcessGroup | None
    ) -> None:
        self._engine, self._ema, self._world, self._group = engine, ema, world, group
        self.owner = _share_out(engine.shapes, writers)
        mine = [one for one in engine.fragments if not engine.replicated or self.owner[one.name] == world.rank]
        mine.sort(key=lambda fragment: self.owner[fragment.name])  # what goes to one rank lies together
        self._fragments: list[list[Fragment]] = [mine]
        if group is not None:
            self._fragments = [[] for _ in range(world.size)]
            dist.all_gather_object(self._fragments, mine, group=group)
        pinned = world.device.type == "cuda"
        count = sum(fragment.numel for fragment in mine)
        self._copies = {kind: torch.empty(count, pin_memory=pinned) for kind in KINDS}
        self.buffers: dict[str, dict[str, Tensor]] = {}
        self.frozen = engine.frozen

    @torch.no_grad()
    def take(self) -> None:
        """Copy what is there now. Every rank must call it, with no gather under way."""
        engine, ema = self._engine, self._ema
        sources = {
            WEIGHTS: engine.masters(), EMA: ema.masters, FIRST: engine.moments(FIRST), SECOND: engine.moments(SECOND)
        }  # fmt: skip
        for kind, masters in sources.items():
            place = 0
            for fragment in self._fragments[self._world.rank]:
                copy = self._copies[kind][place : place + fragment.numel]
                copy.copy_(fragment.of(masters), non_blocking=True)
                place += fragment.numel
        self.frozen = engine.frozen
        live = {WEIGHTS: engine.statistics(), EMA: ema.buffers}
        self.buffers = {kind: {name: one.cpu().clone() for name, one in found.items()} for kind, found in live.items()}
        if self._world.device.type == "cuda":
            torch.cuda.current_stream(self._world.device).synchronize()  # the next step changes what is being copied

    def names(self, rank: int) -> list[str]:
        """Of the parameters that ``rank`` writes."""
        return [name for name, owner in self.owner.items() if owner == rank]

    def gather(self, kind: str) -> dict[str, Tensor]:
        """Whole trained tensors of one kind, those that this rank writes. Every rank must call it, in one order."""
        rank = self._world.rank
        mine = [name for name in self.names(rank) if name not in self.frozen]
        arrived = {rank: self._part(kind, rank, rank)}
        work: list[Any] = []
        for other in range(self._world.size):
            if other == rank:
                continue
            if count := _numel(self._for(other, rank)):
                arrived[other] = torch.empty(count)
                work.append(dist.irecv(arrived[other], other, group=self._group))
            if _numel(self._for(rank, other)):
                work.append(dist.isend(self._part(kind, rank, other), other, group=self._group))
        for one in work:
            one.wait()
        whole: dict[str, Tensor] = {}
        for source, flat in arrived.items():
            place = 0
            for fragment in self._for(source, rank):
                part = flat[place : place + fragment.numel]
                place += fragment.numel
                numel = self._engine.shapes[fragment.name].numel()
                if fragment.numel == numel:
                    whole[fragment.name] = part  # no copy where nothing has to be put together
                else:
                    whole.setdefault(fragment.name, torch.empty(numel))[fragment.offset :][: fragment.numel] = part
        return {name: whole[name].view(self._engine.shapes[name]) for name in mine}

    def _for(self, source: int, target: int) -> list[Fragment]:
        return [fragment for fragment in self._fragments[source] if self.owner[fragment.name] == target]

    def _part(self, kind: str, source: int, target: int) -> Tensor:
        before = _numel([one for one in self._fragments[source] if self.owner[one.name] < target])
        return self._copies[kind][before : before + _numel(self._for(source, target))]


def _numel(fragments: Sequence[Fragment]) -> int:
    return sum(fragment.numel for fragment in fragments)


def _share_out(shapes: dict[str, torch.Size], writers: int) -> dict[str, int]:
    """Which rank writes which parameter: runs of neighbours of about equal size."""
    total, before, owner = sum(shape.numel() for shape in shapes.values()), 0, {}
    for name, shape in shapes.items():
        owner[name] = min(writers - 1, before * writers // max(total, 1))
        before += shape.numel()
    return owner
