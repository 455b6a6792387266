"""One pass over a set: what the model says about every image, in every view, gathered from all processes.

A row an image is kept, not a sum, so that every figure can be computed from one pass, in the set's order: any number
of processes gives the same figures, and the padding that evens out their shares is in none of them.
Axes: B batch, V views, R readings, K guesses, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiner_ds.data.batch import Batch
from refiner_ds.data.normalize import normalize
from refiner_ds.evaluation.metrics import Answers
from refiner_ds.training.world import World

__all__ = ["Predictions", "predict"]

Triple = tuple[float, float, float]
Reading = Sequence[int] | None  # the only classes that are guessed; None: all


@dataclass(frozen=True)
class Predictions:
    """Answers about a whole set, on every process.

    Attributes:
        answers: [V][R]; by view, and by which classes were guessed.
        bad: damaged images that were skipped and are in none of them.
    """

    answers: list[list[Answers]]
    bad: int


@torch.inference_mode()
def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    mean: Triple,
    std: Triple,
    *,
    views: int = 1,
    readings: Sequence[Reading] = (None,),
    bf16: bool = False,
    chunk: int | None = None,
) -> Predictions:
    """Ask ``model`` about this rank's ``batches``, and gather what all ranks found. Every rank must call it.

    Args:
        model: in evaluation mode, in fp32, on ``world.device``.
        mean, std: of the pixels, as in training.
        views: views of each image, one below the other in ``Batch.images_BHWC``.
        readings: which classes are guessed among; all are read off the same logits.
        bf16: compute under autocast.
        chunk: views computed at once; None: a batch's.
    """
    parts: list[list[np.ndarray]] = []
    bad = 0
    for batch in batches:
        bad += batch.bad
        valid_B = batch.valid_B.cpu().clone()
        size, rows, side = batch.images_BHWC.shape[:3]
        pixels = batch.images_BHWC.reshape(size * views, rows // views, side, 3)
        logits_C = [
            _logits(model, part, mean, std, bf16) for part in pixels.split(chunk or len(pixels))
        ]  # a batch is padded to its full size: an image is computed among as many others on any number of processes
        logits_BVC = torch.cat(logits_C).reshape(size, views, -1)
        found = [_read(logits_BVC, batch.labels_B, among) for among in readings]
        columns = [batch.sample_B, batch.labels_B, *(torch.stack(kind, 2) for kind in zip(*found, strict=True))]
        parts.append([column.cpu()[valid_B].numpy() for column in columns])
    gathered = world.gather(([np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [], bad))
    whole = [np.concatenate(column) for column in zip(*(rows for rows, _ in gathered if rows), strict=True)]
    if not whole:
        return Predictions([], sum(count for _, count in gathered))
    order_N = np.argsort(whole[0], kind="stable")
    samples_N, labels_N, guesses_NVRK, confidence_NVR, loss_NVR = (column[order_N] for column in whole)
    answers = [
        [
            Answers(samples_N, labels_N, guesses_NVRK[:, v, r], confidence_NVR[:, v, r], loss_NVR[:, v, r])
            for r in range(len(readings))
        ]
        for v in range(views)
    ]
    return Predictions(answers, sum(count for _, count in gathered))


def _logits(model: nn.Module, pixels_BHWC: Tensor, mean: Triple, std: Triple, bf16: bool) -> Tensor:
    with torch.autocast(pixels_BHWC.device.type, torch.bfloat16, enabled=bf16):
        return model(normalize(pixels_BHWC, mean, std, torch.float32)).float()


def _read(logits_BVC: Tensor, labels_B: Tensor, among: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """Guesses [B, V, K], confidence and loss [B, V]; the guesses are filled up with −1 where there are fewer than K."""
    kept = logits_BVC.shape[-1]
    if among is not None:
        restricted_BVC = torch.full_like(logits_BVC, -torch.inf)
        restricted_BVC[..., list(among)] = logits_BVC[..., list(among)]
        logits_BVC, kept = restricted_BVC, len(among)
    guesses_BVK = logits_BVC.topk(min(5, logits_BVC.shape[-1])).indices
    guesses_BVK[..., kept:] = -1
    log_p_BVC = F.log_softmax(logits_BVC, -1)
    loss_BV = -log_p_BVC.gather(-1, labels_B[:, None, None].expand(-1, logits_BVC.shape[1], 1))[..., 0]
    return guesses_BVK, log_p_BVC.amax(-1).exp(), loss_BV
