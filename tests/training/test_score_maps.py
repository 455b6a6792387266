"""Score maps, and not the labels of the folders, are what a relabel run learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import shard
from refiner_ds.training.metrics import read_metrics
from tests.training.launched import ROOT, ranks

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
RECIPE = {
    "refiner.model.depth": "2", "refiner.model.embed_dim": "32", "refiner.model.num_heads": "2",
    "refiner.recipe.epochs": "50", "refiner.recipe.lr": "2e-3", "refiner.recipe.mix_token": "true",
    "refiner.recipe.hflip": "0.5", "refiner.recipe.label_smoothing": "0",
    "refiner.data.score_maps": "true", "train_batch_size": "24", "refiner.run.eval_epochs": "60",
    "refiner.run.checkpoint_epochs": "60", "refiner.run.picture_epochs": "null",
}  # fmt: skip


def coloured_images(folder: Path) -> tuple[Path, Path]:
    """Pictures of three colours in class folders, and published maps that call every colour by the next one's name."""
    rng = np.random.default_rng(0)
    names = sorted(COLOURS)
    for number, name in enumerate(names):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "maps" / name).mkdir(parents=True)
        for image in range(16):
            pixels = np.clip(rng.normal(COLOURS[name], 25, (32, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{image}.JPEG")
            values = torch.tensor([9.0, 1.0, 0.0])[:, None, None].expand(3, 6, 6)
            told = (number + 1) % 3
            classes = torch.tensor([told, (told + 1) % 3, (told + 2) % 3])[:, None, None].expand(3, 6, 6)
            torch.save(torch.stack([values, classes.float()]).half(), folder / "maps" / name / f"{image}.pt")
    return folder / "images", folder / "maps"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    images, maps = coloured_images(tmp_path)
    assert shard.main([str(images), str(tmp_path / "set"), "--maps", str(maps), "--processes", "1"]) == 0
    return tmp_path / "set"


def test_a_relabel_run_learns_what_its_maps_say(shards: Path, tmp_path: Path) -> None:
    keys = {**RECIPE, "refiner.data.train": shards, "refiner.data.val": shards, "refiner.run.output": tmp_path / "runs"}
    settings = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    done = ranks(ROOT / "refiner_ds" / "train.py", *settings, processes=1)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    folder = tmp_path / "runs" / "quickstart"
    losses = [line["loss"] for line in read_metrics(folder, "train")]
    assert losses[-1] < losses[0]
    last = read_metrics(folder, "eval")[-1]
    assert last["top1"] < 5, "the model repeats the folders' labels, which the maps contradict"


def test_maps_that_are_not_there_are_asked_for_in_one_sentence(tmp_path: Path) -> None:
    words = ("--set", "refiner.data.score_maps=true", "--set", f"refiner.data.cache={tmp_path}")
    done = ranks(ROOT / "refiner_ds" / "train.py", *words, processes=1, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert "map" in done.stderr and len(done.stderr.splitlines()) == 1
