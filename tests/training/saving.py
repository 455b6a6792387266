"""As much of a training as saving asks for, in one process: one weight of two numbers, or of many."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch

from refiner_ds.checkpoint.retention import Retention
from refiner_ds.run_folder import RunFolder, State
from refiner_ds.training.checkpoints import Checkpoints, Contents, Outcome
from refiner_ds.training.fragments import Fragment
from refiner_ds.training.world import World

T = TypeVar("T")


class Alone(World):
    """The only process of a run, without a process group."""

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def broadcast(self, value: T) -> T:
        """There is nobody else to hear it."""
        return value

    def gather(self, value: T) -> list[T]:
        """There is nobody else to hear."""
        return [value]


ALONE = Alone(0, 1, 0, torch.device("cpu"))


class Weights:
    """An engine as saving sees it."""

    replicated, optimizer_steps, skipped_steps = True, 1, 0

    def __init__(self, value: float, count: int = 2) -> None:
        self.masters_now = [torch.ones(count)]
        self.masters_now[0][0] = value
        self.fragments = [Fragment("w", 0, 0, count, 0)]
        self.shapes = {"w": torch.Size([count])}
        self.frozen: dict[str, torch.Tensor] = {}
        self.buffers: dict[str, torch.Tensor] = {}

    def masters(self) -> list[torch.Tensor]:
        return self.masters_now

    def moments(self, key: str) -> list[torch.Tensor]:
        return [torch.zeros_like(self.masters_now[0])]

    def statistics(self) -> dict[str, torch.Tensor]:
        return self.buffers


class Ema(Weights):
    """Its EMA."""

    masters: Any = property(lambda self: self.masters_now)


def checkpoints_of(folder: Path, newest: int, value: float = 1.0, best: int = 0, count: int = 2) -> Checkpoints:
    weights, ema = Weights(value, count), Ema(1.0, count)
    retention = Retention(newest, best)
    return Checkpoints(RunFolder(folder), retention, weights, ema, ALONE, 2**40)  # type: ignore[arg-type]


def save(checkpoints: Checkpoints, step: int, values: dict[int, float] | None = None) -> Outcome:
    state = State(step, step * 48, step / 10, 1)
    checkpoints.begin(Contents(state, {"refiner": {}}, ["a", "b"], {}, values or {}))
    outcome = checkpoints.outcome(wait=True)
    assert outcome is not None
    return outcome


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
