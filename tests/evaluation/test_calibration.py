"""The crop ratio is chosen on images that are not reported, from one decoding; figures are those of an evaluation."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refiner_ds.evaluation.calibration import RATIOS, held_out, paired_difference
from refiner_ds.exit_codes import REFUSED
from tests.training.launched import ROOT, environment, ranks

IMAGES = 44


class Calibrated:
    """What a script found on one process, and where."""

    def __init__(self, place: Path) -> None:
        self.place, report = place, place / "found.json"
        self.env = environment(REFINER_DS_CACHE=str(place / "cache"))
        script = Path(__file__).with_name("calibration_script.py")
        done = ranks(script, report, processes=1, env=self.env, cwd=place)
        assert done.returncode == 0, done.stderr[-4000:]
        self.found: dict[str, Any] = json.loads(report.read_text())


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return Calibrated(tmp_path_factory.mktemp("calibrated"))


pytestmark = pytest.mark.slow


def test_the_ratio_that_fits_the_model_is_found(calibrated: Calibrated) -> None:
    """A model that knows squares by their size at 1.25 is right about all of them there, and nowhere else."""
    known = calibrated.found["known"]
    assert known["crop_ratio"] == 1.25 and known["own_crop_ratio"] == 0.9
    assert [row["crop_ratio"] for row in known["ratios"]] == list(RATIOS) and len(RATIOS) == 15
    others = [row for row in known["ratios"] if row["crop_ratio"] != 1.25]
    assert known["chosen"]["top1"] == 100 and all(row["top1"] < 100 for row in others)
    assert known["chosen"]["top1_low"] < 100 == known["chosen"]["top1_high"]
    low, high = known["difference_interval"]
    assert low < known["difference"] == known["chosen"]["top1"] - known["own"]["top1"] and high <= 100
    assert (known["held_out_images"], known["images"]) == (IMAGES // 4, IMAGES - IMAGES // 4)
    with open(calibrated.place / "best" / "calibration.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["crop_ratio"]) for row in rows] == list(RATIOS)
    assert (calibrated.place / "best" / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_decodes_every_image_once(calibrated: Calibrated) -> None:
    """Fifteen ratios must take less than twice the decoding of one evaluation; they take exactly as much."""
    decodes = calibrated.found["decodes"]
    assert decodes["sweep"] == IMAGES == decodes["test_vit"] == decodes["test_resnet"]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_figures_at_a_ratio_are_those_of_an_evaluation(calibrated: Calibrated, name: str) -> None:
    found = calibrated.found[name]
    swept = {f"{row['crop_ratio']:g}": row for row in found["calibrate"]["ratios"]}
    held, rest = found["calibrate"]["held_out_images"], found["calibrate"]["images"]
    assert held + rest == IMAGES and set(swept) == {"0.8", "1.2", f"{found['calibrate']['own_crop_ratio']:g}"}
    for ratio in ("0.8", "1.2"):
        row, whole = swept[ratio], found[ratio]
        right = (held * row["held_out_top1"] + rest * row["top1"]) / 100
        assert right == pytest.approx(whole["right1"], abs=1e-6)
        mean = (held * row["held_out_loss"] + rest * row["loss"]) / IMAGES
        assert mean == pytest.approx(whole["loss"], rel=1e-5)
    assert found["0.8"]["loss"] != pytest.approx(found["1.2"]["loss"], rel=1e-4)


def test_larger_test_images_are_calibrated_too(calibrated: Calibrated) -> None:
    larger = calibrated.found["larger"]
    assert larger["img_size"] == 96 and larger["ratios"][0]["resized_side"] == 120
    assert {file.name for file in (calibrated.place / "larger").iterdir()} == {
        "calibration.json", "calibration.csv", "calibration.png",
    }  # fmt: skip


def test_two_processes_find_what_one_does(calibrated: Calibrated) -> None:
    model = f"timm:test_resnet={calibrated.place / 'test_resnet.safetensors'}"
    words = (model, "--classes", calibrated.place / "names.txt", "--data", calibrated.place / "squares")
    told = ("--ratios", "0.8", "1.2", "--out", calibrated.place / "two")
    done = ranks(ROOT / "refiner_ds" / "calibrate.py", *words, *told, env=calibrated.env, cwd=calibrated.place)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = calibrated.found["test_resnet"]["calibrate"]
    assert json.loads((calibrated.place / "two" / "calibration.json").read_text()) == wanted
    assert f"crop ratio {wanted['crop_ratio']:g} of 3, chosen on 8 images of squares; on the other 36:" in done.stdout


def test_what_cannot_be_calibrated_is_refused_in_one_sentence(calibrated: Calibrated) -> None:
    wanted = (
        "--held-out 0.01: leaves 0 of 44 images to choose on and 44 to report",
        "--ratios 0: must lie between 0.1 and 4",
        "--held-out 1: must lie between 0 and 1",
        "'side 20' is none of the 1,000 synsets",
        "give --data SET",
    )
    for (code, error), sentence in zip(calibrated.found["refused"], wanted, strict=True):
        assert code == REFUSED and error.count("\n") == 1, error
        assert sentence in error


def test_the_held_out_part_is_a_share_of_every_class() -> None:
    labels = np.repeat(np.arange(7), 40)[np.random.default_rng(3).permutation(280)]
    chosen, again, other = (held_out(labels, 0.2, seed) for seed in (0, 0, 1))
    assert [int(chosen[labels == label].sum()) for label in range(7)] == [8] * 7
    assert np.array_equal(chosen, again) and not np.array_equal(chosen, other)


def test_the_interval_of_a_difference_is_agresti_and_mins() -> None:
    """Agresti's example: of 1,600 asked twice, 150 no longer approve and 86 now do; 4 points, by Wald 2.1 to 5.9."""
    one, other = np.zeros(1600, bool), np.zeros(1600, bool)
    one[:86], other[86:236] = True, True
    one[236:1000] = other[236:1000] = True
    difference, (low, high) = paired_difference(one, other)
    assert difference == pytest.approx(-4.0)
    assert (low, high) == pytest.approx((-5.87, -2.12), abs=0.02)
    same = paired_difference(one, one)
    assert same[0] == 0 and same[1][0] < 0 < same[1][1]
