"""Sets out of installed packages: real, split once for all, made once however many ask."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from refiner_ds.data.decoding import decode_image
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.locate import open_index
from refiner_ds.data.samples import SampleReader
from refiner_ds.errors import DataError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    for part in ("train", "val"):
        open_index(f"package:digits/{part}", folder)
    return folder


def test_digits_are_split_by_class_and_none_is_in_both_parts(cache: Path) -> None:
    parts = {}
    for part in ("train", "val"):
        index = open_index(f"package:digits/{part}", cache)
        reader = SampleReader(index)
        parts[part] = [(raw.name.split("digit-")[1], raw.label) for raw in map(reader.read, range(index.count))]
    assert len(parts["train"]) + len(parts["val"]) == 1797
    assert not {name for name, _ in parts["train"]} & {name for name, _ in parts["val"]}
    every = np.bincount([label for part in parts.values() for _, label in part])
    assert (np.bincount([label for _, label in parts["val"]]) == np.ceil(every / 5)).all()


def test_digits_are_scikit_learns(cache: Path) -> None:
    from sklearn.datasets import load_digits

    index = open_index("package:digits/val", cache)
    digits, reader = load_digits(), SampleReader(index)
    for number in range(0, index.count, 40):
        raw = reader.read(number)
        which = int(raw.name.split("digit-")[1].split(".")[0])
        pixels = decode_image(raw)
        assert pixels.shape == (28, 28, 3) and raw.label == digits.target[which]
        small = pixels[..., 0].reshape(7, 4, 7, 4).mean((1, 3))
        coarse = digits.images[which]
        near = (coarse[:-1, :-1] + coarse[1:, :-1] + coarse[:-1, 1:] + coarse[1:, 1:]) / 4
        assert np.corrcoef(small.ravel(), near.ravel())[0, 1] > 0.9


def test_many_processes_may_ask_at_once_and_nothing_is_left_over(tmp_path: Path) -> None:
    asking = multiprocessing.get_context("fork")
    together = asking.Barrier(4)
    running = [asking.Process(target=ask, args=(together, tmp_path)) for _ in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=60)
    assert [process.exitcode for process in running] == [0] * 4
    assert [path.name for path in (tmp_path / "digits-v1").iterdir()] == ["val"]
    assert ShardIndex.load(tmp_path / "digits-v1" / "val").count == 364


def ask(together: Barrier, cache: Path) -> None:
    together.wait()
    open_index("package:digits/val", cache)


def test_ordinary_folders_are_opened_as_they_are(cache: Path) -> None:
    folder = cache / "digits-v1" / "val"
    assert open_index(str(folder)).folder == folder


def test_unknown_package_and_unwritable_cache_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="package:letters/train: no such packaged set; there are package:digits/train"):
        open_index("package:letters/train", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        open_index("package:digits/train", tmp_path / "file")


def test_set_shows_at_once_or_not_at_all_and_the_first_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process is first, in the worst moment: just before this one's set is moved into place."""
    real, seen = os.rename, []

    def late(source: Path, target: Path) -> None:
        if target == tmp_path / "digits-v1" / "val":
            assert not target.exists() and (source / "index.json").is_file()
            shutil.copytree(source, target)
            (target / "first").touch()
            seen.append(target)
        real(source, target)

    monkeypatch.setattr(os, "rename", late)
    folder = open_index("package:digits/val", tmp_path).folder
    assert seen == [folder] and (folder / "first").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["val"]
