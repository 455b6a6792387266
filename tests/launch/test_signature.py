"""What makes a run be checked again, and what does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.allocation import Allocation
from launch.checks import signature
from launch.cluster import ClusterProfile
from refiner_ds.config import load
from refiner_ds.run_folder import RunFolder

from .conftest import ROOT


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which the quickstart's set is made."""
    cache = tmp_path / "cache"
    for part in ("train", "val"):
        (cache / "digits-v1" / part).mkdir(parents=True)
    monkeypatch.setenv("REFINER_DS_CACHE", str(cache))
    return cache


def sign(folder: Path, *sets: str) -> str:
    run = load(None, [f"refiner.run.output={folder}/runs", *sets])
    return signature(Allocation(run, ClusterProfile(), nodes=1, gpus=0, local=True), ROOT)


def test_what_a_run_leaves_in_the_cache_changes_nothing_and_a_set_made_anew_does(cache: Path, tmp_path: Path) -> None:
    before = sign(tmp_path)
    (cache / "attention").mkdir()
    (cache / "imagenet-v1").mkdir()
    assert sign(tmp_path) == before
    os.utime(cache / "digits-v1/val", (1, 1))
    assert sign(tmp_path) != before


def test_the_seeds_of_a_sweep_are_checked_once_and_a_run_that_has_begun_by_its_own(cache: Path, tmp_path: Path) -> None:
    one, other = (f"refiner.run.seed={seed}" for seed in (1, 2))
    assert sign(tmp_path, one, "refiner.run.name=a") == sign(tmp_path, other, "refiner.run.name=b")
    assert sign(tmp_path, "refiner.recipe.lr=1e-4") != sign(tmp_path)
    folder = RunFolder(load(None, [f"refiner.run.output={tmp_path}/runs"]).folder)
    folder.path.mkdir(parents=True)
    folder.config.write_text("{}")
    assert sign(tmp_path, one) != sign(tmp_path, other)
