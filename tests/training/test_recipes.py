"""The run files are the authors' recipes, and docs/reproducing.md says so truly, row by row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from refiner_ds.config import load
from refiner_ds.training.build import build_model, parameter_count
from tests.training.launched import ROOT

CONFIGS = ROOT / "ds_configs"
PAGE = (ROOT / "docs" / "reproducing.md").read_text()

# image, images a GPU, drop path, score maps, mix-token, cos-reg pairs, crop ratio: the authors' scripts/*.yaml.
AUTHORS = {
    "refiner_s": (224, 32, 0.1, False, False, 2, 0.9),
    "refiner_s_relabel": (224, 32, 0.2, True, True, 12, 0.9),
    "refiner_m": (224, 32, 0.2, False, False, 2, 1.0),
    "refiner_m_relabel": (224, 32, 0.25, True, True, 12, 1.0),
    "refiner_l_relabel": (224, 32, 0.25, True, True, 12, 1.13),
    "refiner_l_448": (448, 12, 0.2, True, False, None, 1.13),
}


def tables() -> list[list[list[str]]]:
    """The page's tables: rows of cells, header first."""
    found = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines() if "| ---" not in line]
        for table in found
    ]


def table_with(header: str) -> list[list[str]]:
    (rows,) = [rows for rows in tables() if rows[0][1] == header]
    return rows[1:]


def value(run: Any, key: str) -> Any:
    found = run.keys.model_dump(mode="json")
    for part in key.split("."):
        found = found[part]
    return found


@pytest.mark.parametrize("name", AUTHORS)
def test_what_differs_from_file_to_file_is_the_authors(name: str) -> None:
    run = load(CONFIGS / f"{name}.json")
    model, data, recipe = run.refiner.model, run.refiner.data, run.refiner.recipe
    pairs = model.cos_reg_pairs if model.cos_reg else None
    assert (
        model.img_size, run.keys.train_micro_batch_size_per_gpu, model.drop_path, data.score_maps, recipe.mix_token,
        pairs, data.eval_crop_ratio,
    ) == AUTHORS[name]  # fmt: skip
    assert model.cos_reg in (0, 0.1)
    assert model.return_dense is data.score_maps, "labels alone train the class head alone"
    (row,) = [row for row in table_with("run file") if row[1] == f"`{name}.json`"]
    size, images, drop_path, maps, mix_token, pairs, crop = AUTHORS[name]
    told = [size, images, drop_path, "maps" if maps else "class", "yes" if mix_token else "no", pairs or "none", crop]
    assert row[2:] == [str(part) for part in told]


@pytest.mark.parametrize("row", table_with("authors"), ids=lambda row: row[0])
def test_a_key_is_the_authors_or_the_page_says_why_not(row: list[str]) -> None:
    key, authors, ours, why = row
    assert value(load(CONFIGS / "refiner_s.json"), key.strip("`")) == json.loads(ours.strip("`"))
    if not why:
        theirs = yaml.safe_load(authors.split("`")[1])
        if isinstance(theirs, dict):
            (theirs,) = theirs.values()
        same = json.loads(ours.strip("`"))
        assert theirs is None or float_or_same(theirs) == same, f"{authors} and {ours} differ without a reason"


def float_or_same(theirs: Any) -> Any:
    try:
        return float(theirs) if isinstance(theirs, str) else theirs  # YAML 1.1 reads 1.0e-06 as a number, 1e-06 not
    except ValueError:
        return theirs


def test_every_key_of_the_recipe_is_in_the_table() -> None:
    told = {row[0].strip("`") for row in table_with("authors")}
    differing = {"mix_token"}  # from file to file, in the other table
    later = {"layer_decay", "aug_repeats"}  # not of the authors' recipe
    recipe = load(CONFIGS / "refiner_s.json").refiner.recipe
    assert {f"refiner.recipe.{key}" for key in type(recipe).model_fields.keys() - differing - later} <= told


@pytest.mark.parametrize("name", ["refiner_s_384", "refiner_m_384", "refiner_l_384", "refiner_l_448"])
def test_fine_tuning_files_take_what_the_page_says_from_where_it_says(name: str) -> None:
    run = load(CONFIGS / f"{name}.json")
    for key, _, ours in table_with("taken from"):
        assert value(run, key.strip("`")) == json.loads(ours.strip("`")), key
    assert Path(run.refiner.model.init_from or "").name == f"{name.rsplit('_', 1)[0]}_relabel"
    assert run.refiner.data.score_maps and run.refiner.model.return_dense


@pytest.mark.parametrize("row", table_with("what it trains"), ids=lambda row: row[0])
def test_the_files_train_models_of_the_size_the_page_gives(row: list[str]) -> None:
    run = load(ROOT / row[0].strip("`"))
    with torch.device("meta"):
        assert f"{parameter_count(build_model(run, 1000)):,}" == row[2]
    run.batch(32)  # divides
    about = json.loads((ROOT / row[0].strip("`")).read_text())["about"]
    assert about.endswith(("Not yet measured here.", "docs/reproducing.md compares every key."))
