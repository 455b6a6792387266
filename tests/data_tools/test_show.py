"""show.py draws what training sees: the outline where the view came from, tints on the same things in both pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.contact_sheet import OUTLINE, TILE, Example, colour_of, outline, patch_classes, tinted
from data_tools.show import main
from refiner_ds.data.augment import TrainView, View, seed_sample
from refiner_ds.data.index import MapFormat
from refiner_ds.data.score_maps import ScoreMap, encode
from refiner_ds.data.writer import SetWriter
from tests.data.conftest import views
from tests.data_tools.conftest import picture


def halves() -> ScoreMap:
    """Class 1 in the left half, class 2 in the right one."""
    numbers = np.ones((1, 6, 6), np.int16)
    numbers[..., 3:] = 2
    return ScoreMap(np.full((1, 6, 6), 9, np.float16), numbers, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with SetWriter(tmp_path / "set", ["zero", "one", "two"], 4, MapFormat(1, 6, 6)) as writer:
        for number in range(6):
            writer.add(str(number), picture(number, size=(60, 40)), "jpg", 0, encode(halves()))
    return tmp_path / "set"


def test_sheet_is_a_picture_with_outlines_and_tints(folder: Path, tmp_path: Path) -> None:
    assert main([str(folder), str(tmp_path / "sheet.png"), "--count", "5", "--auto-augment", "rand-m9-n2-p1"]) == 0
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    assert pixels.shape[1] > 6 * TILE and pixels.shape[0] > 2 * TILE
    assert (np.abs(pixels - OUTLINE).sum(-1) == 0).sum() > 5 * TILE
    for number in (1, 2):  # a legend patch is of the plain colour
        assert (np.abs(pixels - colour_of(number)).sum(-1) == 0).sum() >= 5 * 50


def test_images_of_one_row_or_column_are_drawn_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINER_DS_CACHE", str(tmp_path / "cache"))
    for number, size in enumerate(((1, 1000), (1000, 1), (1, 1))):
        (tmp_path / "thin" / "one").mkdir(parents=True, exist_ok=True)
        (tmp_path / "thin" / "one" / f"{number}.png").write_bytes(picture(number, kind="PNG", size=size))
    assert main([str(tmp_path / "thin"), str(tmp_path / "sheet.png")]) == 0


def test_outline_encloses_what_the_view_shows() -> None:
    """The corners of a sheared view of a flipped crop, in the order of the view's own corners."""
    shear, crop = np.array([[1, 0.2, 0], [0, 1, 0]]), np.array([[-0.5, 0, 0.75], [0, 0.25, 0.5]])
    corners = outline(View(np.zeros((8, 8, 3), np.uint8), [shear, crop]))[::20]
    assert np.allclose(corners, [[0.75, 0.5], [0.25, 0.5], [0.15, 0.75], [0.65, 0.75]])


def test_tints_of_the_view_follow_a_flip() -> None:
    view_of = TrainView(views(32, crop_scale=(1, 1), crop_ratio=(1, 1), hflip=1.0))
    seed_sample(0, 0, 0)
    example = Example("", np.zeros((32, 32, 3), np.uint8), view_of(np.zeros((32, 32, 3), np.uint8)), halves())
    assert patch_classes(example, 3, 2).tolist() == [[2, 1], [2, 1]]


def test_untinted_cells_stay_as_they_are() -> None:
    plain = Image.new("RGB", (20, 20), (10, 20, 30))
    drawn = np.asarray(tinted(plain, np.array([[-1, 1]])))
    assert (drawn[:, :10] == (10, 20, 30)).all() and (drawn[:, 10:] != (10, 20, 30)).any(-1).all()


def test_refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent"), str(tmp_path / "a.png")]) == 2
    assert main([str(folder), str(tmp_path / "no" / "a.png")]) == 2
    assert main([str(folder), str(tmp_path / "a.png"), "--auto-augment", "augmix-m3"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(error.startswith("error: ") for error in errors)
