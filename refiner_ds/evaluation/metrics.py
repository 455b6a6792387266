"""From what a model said about every image to figures: accuracy, its interval, calibration, classes, confusions.

Axes: N images, K guesses (best first), C classes, M confidence bins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BINS", "Answers", "calibration_error", "class_rows", "confusions", "figures", "hits", "wilson"]

BINS = 15  # Guo et al., 2017
Z95 = 1.959963984540054  # two-sided 95 %


@dataclass(frozen=True)
class Answers:
    """What a model said about the images of a set, in the set's order.

    Attributes:
        samples_N: int64 numbers of the images in the set.
        labels_N: int64, as the model numbers classes.
        guesses_NK: int64, the K ≤ 5 likeliest classes, best first.
        confidence_N: float32 probability of the first guess.
        loss_N: float32 cross-entropy, nats.
    """

    samples_N: np.ndarray
    labels_N: np.ndarray
    guesses_NK: np.ndarray
    confidence_N: np.ndarray
    loss_N: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Answers:
        """The answers about some of the images."""
        return Answers(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson, 1927), in percent; (0, 100) for no trials.

    Unlike the normal approximation it stays within 0 to 100 and is not empty at either end.
    """
    if not count:
        return 0.0, 100.0
    share, spread = right / count, Z95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * np.sqrt(share * (1 - share) / count + spread / (4 * count))
    low = 0.0 if right == 0 else 100 * (centre - half)
    high = 100.0 if right == count else 100 * (centre + half)
    return float(low), float(high)


def hits(answers: Answers, accepted: Sequence[Sequence[int]] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Whether the first guess, and any of the guesses, is right; bool [N] each.

    Args:
        accepted: for every image the classes that count as right (ReaL); None: its label.
    """
    if accepted is None:
        hit_NK = answers.guesses_NK == answers.labels_N[:, None]
    else:
        rows = [np.isin(guesses, right) for guesses, right in zip(answers.guesses_NK, accepted, strict=True)]
        hit_NK = np.array(rows, bool).reshape(answers.guesses_NK.shape)
    return hit_NK[:, 0], hit_NK.any(1)


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray) -> tuple[float, list[dict[str, Any]]]:
    """Expected calibration error (Guo et al., 2017), percent, and its bins.

    Confidence is the probability of the first guess. Fifteen bins of equal width, (0, 1/15] … (14/15, 1]; the error is
    the mean over images of how far a bin's accuracy lies from its mean confidence.
    """
    confidence_N = confidence_N.astype(np.float64)
    bin_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    bins: list[dict[str, Any]] = []
    error = 0.0
    for number in range(BINS):
        inside_N = bin_N == number
        count = int(inside_N.sum())
        accuracy = 100 * float(right_N[inside_N].mean()) if count else None
        confidence = 100 * float(confidence_N[inside_N].mean()) if count else None
        if accuracy is not None and confidence is not None:
            error += count / len(confidence_N) * abs(accuracy - confidence)
        bins.append({"above": number / BINS, "images": count, "accuracy": accuracy, "confidence": confidence})
    return error, bins


def figures(answers: Answers, accepted: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
    """All figures of a set but those of single classes; percentages, and counts to check them by.

    Args:
        accepted: as for `hits`; there is no loss then, since there is no one label.
    """
    right1_N, right5_N = hits(answers, accepted)
    images, right1, right5 = len(right1_N), int(right1_N.sum()), int(right5_N.sum())
    error, bins = calibration_error(answers.confidence_N, right1_N)
    found: dict[str, Any] = {
        "top1": 100 * right1 / max(images, 1),
        "top1_interval": wilson(right1, images),
        "top5": 100 * right5 / max(images, 1),
        "top5_interval": wilson(right5, images),
        "calibration_error": error,
        "images": images,
        "right1": right1,
        "right5": right5,
    }
    if accepted is None:
        found["loss"] = float(answers.loss_N.astype(np.float64).mean()) if images else 0.0
    return found | {"calibration_bins": bins}


def class_rows(answers: Answers, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every class that has images: accuracy with its interval, confidence, and what it is taken for."""
    right1_N, right5_N = hits(answers)
    order_N = np.argsort(answers.labels_N, kind="stable")
    edges = np.searchsorted(answers.labels_N[order_N], np.arange(len(classes) + 1))
    rows = []
    for label, (start, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        if start == end:
            continue
        mine = order_N[start:end]
        count, right = int(end - start), int(right1_N[mine].sum())
        low, high = wilson(right, count)
        wrong = Counter(answers.guesses_NK[mine, 0][~right1_N[mine]].tolist())
        guess, times = min(wrong.items(), key=lambda item: (-item[1], item[0]), default=(None, 0))
        rows.append(
            {
                "class": classes[label],
                "images": count,
                "right": right,
                "top1": 100 * right / count,
                "top1_low": low,
                "top1_high": high,
                "top5": 100 * float(right5_N[mine].mean()),
                "confidence": 100 * float(answers.confidence_N[mine].astype(np.float64).mean()),
                "taken_for": "" if guess is None else classes[guess],
                "taken_for_images": times,
            }
        )
    return rows


def confusions(answers: Answers, classes: Sequence[str], most: int = 50) -> list[dict[str, Any]]:
    """The pairs of classes most often confused: images of one that are taken for the other, most frequent first."""
    wrong_N = answers.guesses_NK[:, 0] != answers.labels_N
    pairs = Counter(zip(answers.labels_N[wrong_N].tolist(), answers.guesses_NK[wrong_N, 0].tolist(), strict=True))
    counts = Counter(answers.labels_N.tolist())
    ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:most]
    return [
        {
            "class": classes[label], "taken_for": classes[guess], "images": times,
            "share": 100 * times / counts[label],
        }
        for (label, guess), times in ranked
    ]  # fmt: skip
