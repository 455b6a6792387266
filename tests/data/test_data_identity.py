"""The same set at another place continues a run; a changed one, or other maps, do not. Maps may lie elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from refiner_ds.config import load
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.locate import open_index
from refiner_ds.data.samples import SampleReader
from refiner_ds.data.score_maps import ScoreMap, encode
from refiner_ds.data.writer import SetWriter
from refiner_ds.errors import ConfigError, DataError
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.data_identity import record_data
from refiner_ds.training.header import header
from refiner_ds.training.preparation import Preparation, prepare
from refiner_ds.training.world import World


@pytest.fixture
def digits_folder(tmp_path: Path) -> Path:
    return open_index("package:digits/val", tmp_path / "cache").folder


def prepared(tmp_path: Path, train: Path | str, *more: str) -> Preparation:
    sets = [f"refiner.data.train={train}", "refiner.data.val=null", f"refiner.run.output={tmp_path / 'runs'}"]
    return prepare(load(overrides=[*sets, f"refiner.data.cache={tmp_path / 'cache'}", *more]), 1)


def write_maps(folder: Path, images: ShardIndex, value: float = 1.0) -> Path:
    one = ScoreMap(np.full((1, 2, 2), value, np.float16), np.zeros((1, 2, 2), np.int16), 0)
    reader = SampleReader(images)
    with SetWriter(folder, images.classes, images.shards[0].count, one.format) as writer:
        for number in range(images.count):
            writer.add_map(reader.read(number).key, encode(one), 0)
    return folder


def begin(tmp_path: Path, train: Path | str, *more: str) -> None:
    ready = prepared(tmp_path, train, *more)
    ready.run.folder.mkdir(parents=True)
    record_data(ready.run, ready.train, ready.maps)
    RunFolder(ready.run.folder).config.write_text('{"refiner": {}}')


def test_the_same_set_at_another_place_continues_the_run(tmp_path: Path, digits_folder: Path) -> None:
    begin(tmp_path, "package:digits/val")
    shutil.copytree(digits_folder, tmp_path / "scratch")
    assert prepared(tmp_path, tmp_path / "scratch").train.count == 364
    assert prepared(tmp_path, f"pipe:cat {digits_folder}/{{name}}").train.count == 364


def test_another_set_at_the_same_place_does_not(tmp_path: Path, digits_folder: Path) -> None:
    shutil.copytree(digits_folder, tmp_path / "set")
    begin(tmp_path, tmp_path / "set")
    shutil.rmtree(tmp_path / "set")
    shutil.copytree(open_index("package:digits/train", tmp_path / "cache").folder, tmp_path / "set")
    with pytest.raises(DataError, match="holds a run on .*set: 364 images .*means .*set: 1433 images") as told:
        prepared(tmp_path, tmp_path / "set")
    assert "choose another refiner.run.name" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("content", [None, "{", '{"train": {"place": "x"}}', '{"train": [], "maps": null}'])
def test_a_checkpoint_stands_in_for_a_record_that_is_damaged_or_gone(tmp_path: Path, content: str | None) -> None:
    begin(tmp_path, "package:digits/val")
    run = RunFolder(tmp_path / "runs" / "quickstart")
    for step, copy in ((1, run.data.read_text()), (2, "[")):  # the newest is damaged as well
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "data.json").write_text(copy)
    run.data.unlink() if content is None else run.data.write_text(content)
    assert prepared(tmp_path, "package:digits/val").train.count == 364
    with pytest.raises(DataError, match="holds a run on package:digits/val: 364 images .* now means .*: 1433 images"):
        prepared(tmp_path, "package:digits/train")


def test_a_damaged_record_without_a_copy_is_named_once_something_was_trained(tmp_path: Path) -> None:
    begin(tmp_path, "package:digits/val")
    run = RunFolder(tmp_path / "runs" / "quickstart")
    run.data.write_text("{")
    assert prepared(tmp_path, "package:digits/train").train.count == 1433  # the run begins anew
    run.checkpoint(1).mkdir(parents=True)  # of a version that kept no copy
    with pytest.raises(ConfigError, match="data.json: is damaged, .*; restore it from a backup, or choose") as refusal:
        prepared(tmp_path, "package:digits/val")
    assert "delete" not in str(refusal.value)


def test_maps_may_lie_elsewhere_and_belong_to_the_run(tmp_path: Path, digits_folder: Path) -> None:
    images = ShardIndex.load(digits_folder)
    maps = write_maps(tmp_path / "other disk" / "maps", images)
    wanted = ("refiner.data.score_maps=true", f"refiner.data.maps={maps}")
    begin(tmp_path, "package:digits/val", *wanted)
    shutil.copytree(maps, tmp_path / "copy")
    piped = f"refiner.data.maps=pipe:cat {tmp_path}/copy/{{name}}"
    far = prepared(tmp_path, "package:digits/val", wanted[0], piped).maps
    assert far is not None and far.source is not None and far.count == 364
    lines = header(
        prepared(tmp_path, "package:digits/val", wanted[0], piped), World(0, 1, 0, torch.device("cpu")), bf16=False
    )
    assert lines["score maps"] == far.describe() and "364 samples" in lines["score maps"]
    write_maps(tmp_path / "others", images, 2.0)
    with pytest.raises(DataError, match="holds a run on the score maps .*, and refiner.data now means the score maps"):
        prepared(tmp_path, "package:digits/val", wanted[0], f"refiner.data.maps={tmp_path / 'others'}")
    with pytest.raises(DataError, match="and refiner.data now means no score maps"):
        prepared(tmp_path, "package:digits/val")
    train = open_index("package:digits/train", tmp_path / "cache")
    with pytest.raises(DataError, match=f"its maps are not those of {train.folder}"):
        prepared(tmp_path, "package:digits/train", *wanted)
