"""How a run came to be: every command overlays all checkpoints that the run has kept, beside other models."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from refiner_ds.analysis.__main__ import main
from refiner_ds.analysis.loading import load_model, open_set
from refiner_ds.analysis.results import line_colors
from refiner_ds.config import load
from tests.commands.tiny_run import CLASSES_OF_RUN, write_run

STEPS = (10, 20, 30)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of three checkpoints, its plain twin, and a few real pictures."""
    folder = tmp_path_factory.mktemp("steps")
    write_run(folder, "refined", STEPS, depth=2)
    write_run(folder, "plain", (30,), depth=2, refiner="none")
    for number, pixels in enumerate(load_digits().images[:8]):
        file = folder / "set" / CLASSES_OF_RUN[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).save(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINER_DS_CACHE", str(folder / "cache"))
        yield folder


def table(file: Path) -> list[dict[str, str]]:
    with open(file) as lines:
        return list(csv.DictReader(lines))


def test_features_of_every_checkpoint_twin_and_others_share_a_picture(place: Path, tmp_path: Path) -> None:
    models = [place / "refined", place / "plain", "timm:test_resnet", "timm:test_vit"]
    words = ["features", *map(str, models), "--all-steps", "--data", str(place / "set"), "--out", str(tmp_path)]
    assert main(words) == 0
    labels = list(dict.fromkeys(row["model"] for row in table(tmp_path / "features.csv")))
    assert labels[:4] == [*(f"refined/step_{step:08d}" for step in STEPS), "plain/step_00000030"]
    assert len(labels) == 6 and (tmp_path / "features.png").stat().st_size > 10_000
    assert len({row["cka_last"] for row in table(tmp_path / "features.csv") if row["block"] == "0"}) == 6


def test_maps_of_every_checkpoint_share_a_picture(place: Path, tmp_path: Path) -> None:
    models = [str(place / "refined"), "timm:test_vit"]
    assert main(["maps", *models, "--all-steps", "--data", str(place / "set"), "--out", str(tmp_path)]) == 0
    rows = table(tmp_path / "maps.csv")
    assert len({(row["model"], row["entropy"]) for row in rows if row["block"] == "1" and row["stage"] == "after"}) == 4
    assert len(list(tmp_path.glob("maps_refined_step_*.png"))) == 3


def test_weights_of_every_checkpoint_share_a_picture(place: Path, tmp_path: Path) -> None:
    assert main(["weights", str(place / "refined"), "--all-steps", "--out", str(tmp_path)]) == 0
    rows = table(tmp_path / "refiner_weights.csv")
    assert [int(row["step"]) for row in rows] == list(STEPS)
    assert len({row["kernel_norm"] for row in rows}) == 3
    assert min((tmp_path / f"kernels{which}.png").stat().st_size for which in ("", "_by_step")) > 10_000
    latest = tmp_path / "latest"
    assert main(["weights", str(place / "refined"), "--out", str(latest)]) == 0
    assert not (latest / "kernels_by_step.png").exists()


def test_checkpoints_of_a_run_share_a_hue_and_darken() -> None:
    colors = line_colors(["a/step_1", "a/step_2", "b"])
    assert len(set(colors.values())) == 3 and sum(colors["a/step_1"][:3]) > sum(colors["a/step_2"][:3])
    assert all(colors[label][2] > colors[label][0] for label in ("a/step_1", "a/step_2"))  # both are blue
    assert colors["b"][2] < colors["b"][0]


def test_a_run_without_checkpoints_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    young = write_run(tmp_path, "young", ())
    for words in (["features", str(young)], ["maps", str(young)], ["weights", str(young), "--all-steps"]):
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert (
            error == f"error: {young}: the run has no checkpoint yet; let it train to its first, or give another run\n"
        )
    assert not (tmp_path / "out").exists()


def test_lists_of_class_folders_are_kept_where_the_run_says(place: Path, tmp_path: Path) -> None:
    model = load_model(str(place / "plain"))
    assert model.checkpoint is not None
    run = load(model.checkpoint / "config.json", [f"refiner.data.cache={tmp_path}"])
    assert open_set(replace(model, run=run), str(place / "set")).count == 8
    assert (tmp_path / "folders").is_dir()
