"""The learning rate as a pure function of samples seen.

Linear warm-up to the scaled peak, then a cosine over ``epochs`` to ``min_lr``, then the cool-down; the shape is timm's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from refiner_ds.config import BatchSplit
from refiner_ds.config.schema import RecipeKeys


@dataclass(frozen=True)
class Schedule:
    """Learning rate and length of a run.

    Args:
        recipe: the run file's ``refiner.recipe``.
        batch: batch arithmetic; the global batch scales the peak.
        images: training images an epoch.
    """

    recipe: RecipeKeys
    batch: BatchSplit
    images: int

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps of one epoch, its padded last batch included."""
        return self.batch.steps(self.images)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, cool-down included."""
        return max(1, round(self.recipe.all_epochs * self.steps_an_epoch))

    @property
    def peak(self) -> float:
        """Peak learning rate: lr · global batch / lr_batch (DeiT's linear rule)."""
        scale = self.batch.global_batch / self.recipe.lr_batch if self.recipe.lr_batch else 1.0
        return self.recipe.lr * scale

    def epoch(self, samples: int) -> float:
        """Epochs seen after so many samples, a fraction."""
        return samples / (self.steps_an_epoch * self.batch.global_batch)

    def epoch_shown(self, epoch: float) -> str:
        """An epoch as a person reads it: digits enough that a step of a short run shows."""
        epochs = self.total_steps / self.steps_an_epoch
        return f"{epoch:.{1 if epochs >= 10 else 2 if epochs >= 1 else 3}f}"

    def lr(self, samples: int) -> float:
        """Learning rate of the step that begins after so many samples."""
        recipe, now = self.recipe, self.epoch(samples)
        if now < recipe.warmup_epochs:
            return recipe.warmup_lr + (self.peak - recipe.warmup_lr) * now / recipe.warmup_epochs
        if recipe.schedule == "constant":
            return self.peak
        if now >= recipe.epochs:
            return recipe.min_lr
        return recipe.min_lr + (self.peak - recipe.min_lr) * (1 + math.cos(math.pi * now / recipe.epochs)) / 2
