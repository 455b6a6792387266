"""A copy on the host of everything a checkpoint holds, made beside the forward and backward passes of the next step.

Weights, moments and EMA change when the optimizer updates and at no other time of a step. So each rank copies its own
part of them in a thread, into buffers that are allocated once (page-locked beside a GPU), and only the update waits
until they are copied; the pipelined snapshots of CheckFreq (Mohan et al., FAST 2021). Running statistics change in
forward, and are copied at once. Parameters are put together from the copies later, on whichever rank writes them, over
a process group of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
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
        self._sources: dict[str, Sequence[Tensor]] = {}
        self._issued = threading.Event()  # copied, or on a GPU queued to be copied
        self._issued.set()
        self._side = SideStream(world.device) if pinned else None
        self.buffers: dict[str, dict[str, Tensor]] = {}
        self.frozen = engine.frozen

    @torch.no_grad()
    def take(self) -> None:
        """Decide that what is there now is to be copied. Every rank must call it, with no copy nor gather under way."""
        engine, ema = self._engine, self._ema
        # Found now: in the middle of an update DeepSpeed shows the optimizer one parameter group.
        self._sources = {
            WEIGHTS: engine.masters(), EMA: ema.masters, FIRST: engine.moments(FIRST), SECOND: engine.moments(SECOND)
        }  # fmt: skip
        self.frozen = engine.frozen
        live = {WEIGHTS: engine.statistics(), EMA: ema.buffers}
        self.buffers = {kind: {name: one.clone() for name, one in found.items()} for kind, found in live.items()}
        self._issued.clear()
        if self._side is not None:
            self._side.follow()

    @torch.no_grad()
    def copy(self) -> None:
        """Copy it; to be called once after each `take`, in another thread."""
        try:
            if self._side is None:
                self._copy_all()
            else:
                with self._side:
                    self._copy_all()
        finally:  # a copy that fails must not hold up training: its save fails
            self._sources = {}
            self._issued.set()
        if self._side is not None:
            self.buffers = self._side.on_the_host(self.buffers)

    def _copy_all(self) -> None:
        for kind, masters in self._sources.items():
            place = 0
            for fragment in self._fragments[self._world.rank]:
                _copy(self._copies[kind][place : place + fragment.numel], fragment.of(masters))
                place += fragment.numel

    def wait(self) -> None:
        """Return once what is being copied may change; on a GPU, what is queued from now on waits instead."""
        self._issued.wait()
        if self._side is not None:
            self._side.lead()

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


class SideStream:
    """Copies from a GPU on a stream of their own, between what was queued before and what will be."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._before, self._copied = torch.cuda.Event(), torch.cuda.Event()

    def follow(self) -> None:
        """Copy only after what is queued now."""
        self._before.record(torch.cuda.current_stream(self._device))

    def lead(self) -> None:
        """Let what will be queued wait for the copies; the host does not."""
        torch.cuda.current_stream(self._device).wait_event(self._copied)

    def on_the_host(self, buffers: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Small tensors, copied after all others; returns once every copy is there."""
        with torch.cuda.stream(self._stream):
            held = {kind: {name: one.cpu() for name, one in found.items()} for kind, found in buffers.items()}
        self._stream.synchronize()
        return held

    def __enter__(self) -> None:
        self._context = torch.cuda.stream(self._stream)
        self._context.__enter__()
        self._stream.wait_event(self._before)

    def __exit__(self, *error: object) -> None:
        self._copied.record(self._stream)
        self._context.__exit__(*error)


def _copy(into: Tensor, source: Tensor) -> None:
    if source.device.type == "cpu" and source.dtype == into.dtype:
        np.copyto(into.numpy(), source.numpy())  # on one core: torch would take all that training computes on
    else:
        into.copy_(source, non_blocking=True)


def _numel(fragments: Sequence[Fragment]) -> int:
    return sum(fragment.numel for fragment in fragments)


def _share_out(shapes: dict[str, torch.Size], writers: int) -> dict[str, int]:
    """Which rank writes which parameter: runs of neighbours of about equal size."""
    total, before, owner = sum(shape.numel() for shape in shapes.values()), 0, {}
    for name, shape in shapes.items():
        owner[name] = min(writers - 1, before * writers // max(total, 1))
        before += shape.numel()
    return owner
