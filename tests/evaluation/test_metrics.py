"""Figures computed from answers are those of their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from refiner_ds.evaluation.corruptions import ALEXNET_ERRORS, SEVERITIES, CorruptedView, corruption_figures
from refiner_ds.evaluation.metrics import Answers, calibration_error, class_rows, confusions, figures, wilson


def answers(labels: list[int], firsts: list[int], confidence: list[float]) -> Answers:
    guesses_NK = np.array([[first, 7, 8, 9, label] for first, label in zip(firsts, labels, strict=True)])
    count = len(labels)
    return Answers(
        np.arange(count), np.array(labels), guesses_NK, np.array(confidence, np.float32), np.ones(count, np.float32)
    )


def test_intervals_are_wilsons() -> None:
    """Published examples: 10 of 100 and 0 of 10 (Newcombe, 1998, gives 81 of 263 as 0.2553 to 0.3662)."""
    assert wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.005)
    assert wilson(0, 10)[0] == 0 and wilson(0, 10)[1] == pytest.approx(27.75, abs=0.01)
    assert wilson(10, 10)[1] == 100 and wilson(0, 0) == (0, 100)


def test_calibration_error_weighs_bins_by_their_images() -> None:
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.5, 0.5], np.float32)
    right = np.array([True, True, True, False, True, True])
    error, bins = calibration_error(confidence, right)
    assert error == pytest.approx(100 * (4 * 0.20 + 2 * 0.5) / 6, abs=1e-4)
    assert [one["images"] for one in bins if one["images"]] == [2, 4] and len(bins) == 15
    assert calibration_error(np.array([1 / 15], np.float32), np.array([True]))[1][0]["images"] in (0, 1)


def test_classes_and_confusions_name_what_is_taken_for_what() -> None:
    found = answers([0, 0, 0, 1, 2], [0, 1, 1, 1, 0], [0.9, 0.6, 0.6, 0.8, 0.7])
    names = ["cat", "dog", "owl", "fox"] + [f"other {n}" for n in range(6)]
    first, second, third = class_rows(found, names)
    assert (first["class"], first["images"], first["right"], first["taken_for"]) == ("cat", 3, 1, "dog")
    assert first["taken_for_images"] == 2 and second["taken_for"] == "" and third["top1"] == 0
    assert [(p["class"], p["taken_for"], p["images"]) for p in confusions(found, names)] == [
        ("cat", "dog", 2), ("owl", "cat", 1),
    ]  # fmt: skip
    assert figures(found)["right1"] == 2 and figures(found)["right5"] == 5


def test_any_of_several_labels_is_right() -> None:
    found = answers([0, 0], [3, 4], [0.5, 0.5])
    assert figures(found, [[3, 5], [8]])["right1"] == 1
    assert figures(found, [[3, 5], [8]])["right5"] == 2
    assert "loss" not in figures(found, [[3, 5], [8]])


def test_mce_divides_by_alexnets_errors_and_needs_all_of_imagenet_c() -> None:
    alexnet = {name: [error] * 5 for name, error in ALEXNET_ERRORS.items()}
    assert corruption_figures(alexnet, SEVERITIES, imagenet=True)["mce"] == pytest.approx(100)
    half = {name: [error / 2] * 5 for name, error in ALEXNET_ERRORS.items()}
    assert corruption_figures(half, SEVERITIES, imagenet=True)["mce"] == pytest.approx(50)
    assert corruption_figures(half, SEVERITIES, imagenet=False)["mce"] is None
    part = {"fog": [50.0] * 5}
    found = corruption_figures(part, SEVERITIES, imagenet=True)
    assert found["mce"] is None and found["mean_error"] == 50
    assert found["corruptions"]["fog"]["ce"] == pytest.approx(100 * 50 / ALEXNET_ERRORS["fog"])


def test_every_corruption_is_the_same_whenever_it_is_made_and_stronger_with_severity() -> None:
    pytest.importorskip("imagecorruptions")
    from sklearn.datasets import load_sample_image

    photo = load_sample_image("china.jpg")
    clean = CorruptedView(64, "fog", 0)(photo, 3).astype(int)
    for name in ALEXNET_ERRORS:
        changes = []
        for severity in (1, 5):
            view = CorruptedView(64, name, severity)
            state = np.random.get_state()[1].copy()
            made = view(photo, 3)
            assert made.shape == (64, 64, 3) and made.dtype == np.uint8
            assert np.array_equal(made, view(photo, 3)), name
            assert np.array_equal(state, np.random.get_state()[1]), name
            changes.append(np.abs(made.astype(int) - clean).mean())
        assert min(changes) > 0 and (name == "frost" or changes[0] < changes[1]), (
            name,
            changes,
        )
    one, other = (CorruptedView(64, "gaussian_noise", 3)(photo, sample) for sample in (0, 1))
    assert not np.array_equal(one, other)
