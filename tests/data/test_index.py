"""A shard set opens, or one sentence says why not and what would be right."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from refiner_ds.data.decoding import decode_image
from refiner_ds.data.index import INDEX_NAME, ShardIndex
from refiner_ds.data.samples import SampleReader
from refiner_ds.errors import DataError


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        ShardIndex.load(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence and str(folder) in sentence
    return sentence


def test_set_is_what_was_written(make_set: Callable[..., ShardIndex]) -> None:
    index = make_set(20, per_shard=7)
    assert (index.count, index.classes, index.has_maps) == (20, ["a", "b", "c"], False)
    assert [shard.count for shard in index.shards] == [7, 7, 6]
    reader = SampleReader(index)
    for number in range(20):
        raw = reader.read(number)
        assert raw.label == number % 3
        assert (decode_image(raw) == number).all()


def test_index_imports_without_torch() -> None:
    script = "import sys, refiner_ds.data.index, refiner_ds.data.writer, refiner_ds.data.packaged; "
    subprocess.run([sys.executable, "-c", script + "sys.exit('torch' in sys.modules)"], check=True, timeout=60)


def test_any_webdataset_reader_reads_the_shards(make_set: Callable[..., ShardIndex]) -> None:
    index = make_set(20)
    tars = [str(index.folder / shard.name) for shard in index.shards]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{number:05d}-set" for number in range(20)]
    assert all((sample["png"] == number).all() for number, sample in enumerate(samples))
    assert [sample["cls"] for sample in samples] == [number % 3 for number in range(20)]


def test_tars_are_plain_ustar(make_set: Callable[..., ShardIndex]) -> None:
    index = make_set(3)
    with tarfile.open(index.folder / index.shards[0].name) as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:2]] == ["00000-set.png", "00000-set.cls"]
    assert {(member.mtime, member.uid, member.uname, member.mode) for member in members} == {(0, 0, "", 0o644)}


def test_index_travels_to_another_process(make_set: Callable[..., ShardIndex]) -> None:
    index = make_set(5)
    again = pickle.loads(pickle.dumps(index))
    assert again.count == 5 and (again.members == index.members).all()


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "absent")


def test_unfinished_set_says_how_to_finish(tmp_path: Path) -> None:
    (tmp_path / "train.partial").mkdir()
    assert "run the same data_tools/shard.py command again" in refusal(tmp_path / "train")


def test_empty_folder(tmp_path: Path) -> None:
    assert "empty" in refusal(tmp_path)


def test_tars_without_an_index(make_set: Callable[..., ShardIndex]) -> None:
    index = make_set(20)
    (index.folder / INDEX_NAME).unlink()
    assert "3 tar files but no index.json" in refusal(index.folder)


def test_class_folders_are_not_shards(tmp_path: Path) -> None:
    (tmp_path / "n01440764").mkdir()
    assert "data_tools/shard.py" in refusal(tmp_path)


def test_folder_above_a_set_names_the_set(make_set: Callable[..., ShardIndex]) -> None:
    index = make_set(3)
    assert f"{index.folder} is one" in refusal(index.folder.parent)


@pytest.mark.parametrize(
    "text, says",
    [("{", "not JSON"), ("[]", "not the index of a shard set"), ('{"format": "x"}', "not the index of a shard set")],
)
def test_index_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    assert says in refusal(tmp_path)


@pytest.mark.parametrize("change, says", [({"version": 99}, "version 99"), ({"shards": None}, "not a complete index")])
def test_index_of_another_kind(make_set: Callable[..., ShardIndex], change: dict[str, object], says: str) -> None:
    path = make_set(3).folder / INDEX_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert says in refusal(path.parent)


def test_index_of_another_set(make_set: Callable[..., ShardIndex]) -> None:
    one, other = make_set(20, name="one"), make_set(30, name="other")
    shutil.copy(one.folder / INDEX_NAME, other.folder / INDEX_NAME)
    assert "counts 20" in refusal(other.folder)


def test_members_of_another_set_of_the_same_size(make_set: Callable[..., ShardIndex]) -> None:
    one, other = make_set(20, name="one"), make_set(20, name="other")
    shutil.copy(one.folder / "members.npy", other.folder / "members.npy")
    assert "members.npy" in refusal(other.folder)


def test_missing_and_cut_shards_are_found_at_once(make_set: Callable[..., ShardIndex]) -> None:
    index = make_set(20)
    path = index.folder / index.shards[1].name
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match="shard-000001.tar: .* it was cut"):
        ShardIndex.load(index.folder)
    path.unlink()
    with pytest.raises(DataError, match="shard-000001.tar: .* missing"):
        ShardIndex.load(index.folder)
