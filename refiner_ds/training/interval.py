"""What is known of a run between two metric lines: means of its steps, throughput, and the device's use."""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from refiner_ds.config import RunFile
from refiner_ds.training.build import training_flops
from refiner_ds.training.peak import peak_flops
from refiner_ds.training.step import Outcome
from refiner_ds.training.stragglers import RankTime
from refiner_ds.training.world import World


class Interval:
    """Sums over the optimizer steps since the last metric line.

    Attributes:
        checkpoint_seconds: that saving has held training up.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._losses: dict[str, Tensor] = {}
        self._seconds = self._waited = self._forward = 0.0
        self._bad = 0
        self.checkpoint_seconds = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count a step."""
        self.steps += 1
        for name, loss in outcome.losses.items():
            self._losses[name] = self._losses.get(name, torch.zeros(())) + loss
        self._seconds += outcome.seconds
        self._waited += outcome.data_wait_seconds
        self._bad += outcome.bad_samples
        self._forward += outcome.forward_seconds

    def rank_time(self, world: World) -> RankTime:
        """What this rank did before it met the others, a step."""
        return RankTime(world.rank, platform.node(), self._waited / self.steps, self._forward / self.steps)

    def numbers(self, global_batch: int) -> dict[str, float]:
        """Means a step, by the keys of metrics.jsonl; damaged samples are summed over steps and ranks.

        Args:
            global_batch: images an optimizer step, over all ranks.
        """
        return {
            **{name: float(total / self.steps) for name, total in self._losses.items()},
            "images_per_second": self.steps * global_batch / self._seconds,
            "step_seconds": self._seconds / self.steps,
            "data_wait_seconds": self._waited / self.steps,
            "checkpoint_seconds": self.checkpoint_seconds,
            "bad_samples": self._bad,
        }


class Utilisation:
    """Model FLOP/s utilisation (Chowdhery et al., 2022, appendix B): recomputation does not count.

    Args:
        num_classes: outputs of the model's heads.
    """

    def __init__(self, run: RunFile, num_classes: int, world: World) -> None:
        peak = peak_flops(world.device, run.refiner.run.peak_tflops)
        self._peak = None if peak is None else peak * world.size
        self._flops = training_flops(run, num_classes) if peak else 0

    def mfu(self, images_per_second: float) -> float | None:
        """Share of all devices' dense bf16 peak; None where the peak is not known."""
        return None if self._peak is None else images_per_second * self._flops / self._peak


def peak_memory_gib(device: torch.device) -> float:
    """Allocated on a GPU, or resident on a CPU machine, at most since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts kilobytes
