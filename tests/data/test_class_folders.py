"""Class folders train as they lie: listed once, into the cache, and found out when they change."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from itertools import islice
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import torch

from refiner_ds.data import class_folders
from refiner_ds.data.augment import EvalSettings
from refiner_ds.data.class_folders import ClassFolders
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import eval_batches, train_batches
from refiner_ds.data.locate import open_index
from refiner_ds.data.writer import SetWriter
from refiner_ds.errors import DataError
from tests.data.conftest import png, views

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Twelve images, number n of colour n, in three classes; some below another folder, one with an odd name."""
    for number in range(12):
        folder = tmp_path / "tree" / CLASSES[number // 4] / ("more" if number % 4 == 3 else "")
        folder.mkdir(parents=True, exist_ok=True)
        name = os.fsdecode(b"\xff 3.png") if number == 7 else f"{number:02d}.png"
        (folder / name).write_bytes(png(np.full((8, 8, 3), number, np.uint8)))
    (tmp_path / "tree" / "bee" / "readme.txt").write_text("no image")
    return tmp_path / "tree"


def colours(index: ShardIndex, workers: int = 0, on_bad: str = "error") -> list[tuple[int, int]]:
    """Colour and label of every image, in order; (-1, -1) where it was left out."""
    batches = eval_batches(
        index, EvalSettings(8, 1.0), batch=12, rank=0, world_size=1, workers=workers, on_bad_sample=on_bad
    )
    return [
        (int(image[0, 0, 0]), int(label)) if valid else (-1, -1)
        for batch in batches
        for image, label, valid in zip(batch.images_BHWC, batch.labels_B, batch.valid_B, strict=True)
    ]


def test_class_folders_are_the_set_that_their_shards_would_be(tree: Path, tmp_path: Path) -> None:
    index = open_index(tree, tmp_path / "cache")
    assert (index.count, index.classes, index.has_maps) == (12, CLASSES, False)
    assert colours(index) == colours(pickle.loads(pickle.dumps(index)), workers=2) == [(n, n // 4) for n in range(12)]
    with SetWriter(tmp_path / "shards", CLASSES, 5) as writer:
        for number in range(12):
            writer.add(f"{number}", png(np.full((8, 8, 3), number, np.uint8)), "png", number // 4)
    both = index, ShardIndex.load(tmp_path / "shards")
    how = {"global_batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1, "seed": 3}
    for ours, theirs in islice(zip(*(train_batches(one, views(8), **how) for one in both), strict=False), 6):  # type: ignore[arg-type]
        assert torch.equal(ours.images_BHWC, theirs.images_BHWC) and torch.equal(ours.labels_B, theirs.labels_B)
    relabelled = index.with_classes(["z", *CLASSES], np.array([1, 2, 3]))
    assert [label for _, label in colours(pickle.loads(pickle.dumps(relabelled)))] == [n // 4 + 1 for n in range(12)]


def test_listing_happens_once_and_says_what_it_left(
    tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_folders, "SECONDS_BETWEEN_LINES", 0.0)
    index = open_index(tree, tmp_path / "cache")
    assert isinstance(index, ClassFolders)
    told = capfd.readouterr().err.splitlines()
    assert told[0] == f"listing {tree}: 1 of 3 classes, 4 images" and len(told) == 4
    assert told[3].startswith(f"listed {tree}: 12 images in 3 classes, 0 s; 1 files not taken, see")
    assert (index.kept / "notes.txt").read_text().startswith("bee/readme.txt: not an image by its name")
    assert open_index(tree, tmp_path / "cache").count == 12
    assert open_index(str(tree) + "/", tmp_path / "cache").count == 12
    assert not capfd.readouterr().err


def test_folders_that_changed_are_listed_again(tree: Path, tmp_path: Path) -> None:
    before = open_index(tree, tmp_path / "cache").content_sha256
    (tree / "cat" / "more" / "11.png").rename(tree / "ant" / "04.png")
    index = open_index(tree, tmp_path / "cache")
    assert colours(index)[3:6] == [(11, 0), (3, 0), (4, 1)] and index.content_sha256 != before
    (tree / "dog").mkdir()
    shutil.copy(tree / "ant" / "00.png", tree / "dog" / "00.png")
    assert open_index(tree, tmp_path / "cache").classes == [*CLASSES, "dog"]
    shutil.rmtree(tree / "dog")
    assert open_index(tree, tmp_path / "cache").classes == CLASSES


def test_who_uses_a_list_keeps_it_when_another_is_made(tree: Path, tmp_path: Path) -> None:
    """A run's workers, started later, while another run finds the folders changed; or a node with a copy of its own."""
    index = open_index(tree, tmp_path / "cache")
    travels = pickle.dumps(index)
    shutil.copy(tree / "cat" / "08.png", tree / "ant" / "000.png")
    assert open_index(tree, tmp_path / "cache").count == 13
    later = pickle.loads(travels)
    assert later.count == 12 and colours(later) == colours(index) == [(n, n // 4) for n in range(12)]
    for path in later.kept.glob("*.n*"):
        path.unlink()
    assert open_index(tree, tmp_path / "cache").count == 13


def test_folders_that_held_no_image_and_links_that_led_nowhere_are_looked_at_again(tree: Path, tmp_path: Path) -> None:
    away = tmp_path / "disk" / "images"
    (tree / "ant" / "new").mkdir()
    (tree / "bee" / "link").symlink_to(away)
    (tree / "dog").symlink_to(away)
    index = open_index(tree, tmp_path / "cache")
    assert isinstance(index, ClassFolders) and index.count == 12
    assert "dog: a link to nothing" in (index.kept / "notes.txt").read_text()
    shutil.copy(tree / "ant" / "00.png", tree / "ant" / "new" / "00.png")
    assert open_index(tree, tmp_path / "cache").count == 13
    away.mkdir(parents=True)
    shutil.copy(tree / "ant" / "00.png", away / "00.png")
    found = open_index(tree, tmp_path / "cache")
    assert (found.count, found.classes) == (15, [*CLASSES, "dog"])
    (tree / "bee" / "readme.txt").unlink()
    assert open_index(tree, tmp_path / "cache").count == 15 and not (index.kept / "notes.txt").exists()


def test_the_same_folders_elsewhere_are_the_same_set(tree: Path, tmp_path: Path) -> None:
    here = open_index(tree, tmp_path / "cache")
    shutil.copytree(tree, tmp_path / "scratch")
    there = open_index(tmp_path / "scratch", tmp_path / "cache")
    assert here.content_sha256 == there.content_sha256 and here.folder != there.folder


def test_a_file_that_is_gone_or_overwritten_is_named_or_skipped(tree: Path, tmp_path: Path) -> None:
    index = open_index(tree, tmp_path / "cache")
    (tree / "ant" / "01.png").write_bytes(b"another")
    (tree / "bee" / "05.png").unlink()
    with pytest.raises(DataError, match="ant/01.png: has 7 bytes and had .* when it was listed"):
        colours(index)
    skipped = colours(index, on_bad="skip")
    assert skipped == [(-1, -1) if n in (1, 5) else (n, n // 4) for n in range(12)]
    (tree / "ant" / "01.png").unlink()
    with pytest.raises(DataError, match="ant/01.png: cannot be read .No such file"):
        colours(index)


def listing(together: Barrier, tree: Path, cache: Path) -> None:
    together.wait()
    assert open_index(tree, cache).count == 12


def test_many_processes_may_ask_at_once(tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asking = multiprocessing.get_context("fork")
    together = asking.Barrier(4)
    running = [asking.Process(target=listing, args=(together, tree, tmp_path / "cache")) for _ in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=60)
    assert [process.exitcode for process in running] == [0] * 4
    assert capfd.readouterr().err.count("listed ") == 1


def test_what_are_no_class_folders_is_refused_as_before(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "above").mkdir()
    with SetWriter(tmp_path / "above" / "set", ["a"], 5) as writer:
        writer.add("0", png(np.zeros((4, 4, 3), np.uint8)), "png", 0)
    with pytest.raises(DataError, match="no shard set, but .*above/set is one"):
        open_index(tmp_path / "above", tmp_path / "cache")
    (tree / "dog").mkdir()
    with pytest.raises(DataError, match="dog: no images in this class"):
        open_index(tree, tmp_path / "cache")
    with pytest.raises(DataError, match="turn class folders into shards"):
        open_index(tree, tmp_path / "cache", class_folders=False)
    (tmp_path / "file").write_text("")
    (tree / "dog").rmdir()
    with pytest.raises(DataError, match="cannot be written"):
        open_index(tree, tmp_path / "file")
