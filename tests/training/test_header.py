"""A run begins by saying what it trains, on what, how, and for how long."""

from __future__ import annotations

import pytest
import torch

from refiner_ds.config import load
from refiner_ds.training.header import header
from refiner_ds.training.preparation import prepare
from refiner_ds.training.world import World


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("header")
    run = load(None, [f"refiner.run.output={folder}/runs", f"refiner.data.cache={folder}/cache"])
    return header(prepare(run, 2), World(0, 2, 0, torch.device("cpu")), bf16=False)


@pytest.mark.parametrize(
    "about, words",
    [
        ("model", ("refined_vit at 28 px", "171,060 parameters", "GFLOP an image")),
        ("batch", ("48 images a step = 2 processes × 24 at once × 1 accumulated",)),
        ("engine", ("2 processes on CPU", "fp32", "ZeRO stage 1", "recomputing pairs of blocks")),
        ("attention", ("tiled",)),
        ("training", ("1,433 samples, 10 classes", "no score maps")),
        ("validation", ("364 samples, 10 classes",)),
        ("steps", ("30 an epoch, 390 in all", "learning rate 0.003 at its peak")),
        ("run folder", ("/runs/quickstart",)),
    ],
)
def test_the_header_says(lines: dict[str, str], about: str, words: tuple[str, ...]) -> None:
    assert all(word in lines[about] for word in words), lines[about]
