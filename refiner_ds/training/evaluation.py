"""Accuracy over a validation set, exact to the image whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from refiner_ds.data.batch import Batch
from refiner_ds.data.normalize import normalize
from refiner_ds.training.world import World

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Accuracy:
    """Counts over a whole set.

    Attributes:
        right1, right5: images whose class is the first, or among the first five, of the model's guesses.
        loss: mean cross-entropy, nats.
        images: images that were evaluated.
        bad: damaged images that were skipped, and are in none of the above.
    """

    right1: int
    right5: int
    loss: float
    images: int
    bad: int

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.right1 / max(self.images, 1)

    @property
    def top5(self) -> float:
        """Percent."""
        return 100 * self.right5 / max(self.images, 1)


class EvaluationStopped(Exception):
    """A rank was asked to stop in the middle of an evaluation."""


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    mean: Triple,
    std: Triple,
    bf16: bool = False,
    asked_to_stop: Callable[[], bool] | None = None,
    among: Sequence[int] | None = None,
) -> Accuracy:
    """Evaluate ``model`` over this rank's ``batches`` and add up over ranks. Every rank must call it.

    Args:
        model: in fp32, on ``world.device``, as batches are.
        mean, std: of the pixels, as in training.
        bf16: compute under autocast.
        asked_to_stop: looked at before every batch; None: nothing stops an evaluation.
        among: the only classes that are guessed, for a set that has some of the model's; None: all.
    Raises:
        EvaluationStopped: on all ranks, before the same batch, where any of them was asked to stop.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(4, dtype=torch.int64, device=world.device)
    loss = torch.zeros(1, dtype=torch.float64, device=world.device)
    requests, bad = None, 0
    among_A = None if among is None else torch.tensor(list(among), device=world.device)
    for batch in batches:
        if asked_to_stop is not None:
            if requests is not None and requests.item():  # of the batch before: the device is not waited for
                model.train(was_training)
                raise EvaluationStopped
            requests = world.all_reduce_sum(torch.full((), float(asked_to_stop()), device=world.device))
        valid_B, labels_B = batch.valid_B, batch.labels_B
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            logits_BC = model(normalize(batch.images_BHWC, mean, std, torch.float32)).float()
        if among_A is not None:
            restricted_BC = torch.full_like(logits_BC, -torch.inf)
            restricted_BC[:, among_A] = logits_BC[:, among_A]
            logits_BC = restricted_BC
        guesses_BK = logits_BC.topk(min(5, logits_BC.shape[1])).indices
        hits_BK = (guesses_BK == labels_B[:, None]) & valid_B[:, None]
        counts[:3] += torch.stack([hits_BK[:, 0].sum(), hits_BK.sum(), valid_B.sum()])
        loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
        loss += torch.where(valid_B, loss_B, 0).double().sum()  # picking the valid ones would wait for the device
        bad += batch.bad
    counts[3] = bad
    world.all_reduce_sum(counts)
    world.all_reduce_sum(loss)
    model.train(was_training)
    right1, right5, images, bad = counts.tolist()
    return Accuracy(right1, right5, loss.item() / max(images, 1), images, bad)
