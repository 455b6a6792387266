"""Existing WebDataset tars are indexed by one command, and then verified and annotated like a set of our own."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import timm
import torch

from data_tools import annotate, shard
from data_tools.verify import main as verify
from refiner_ds.data.index import ShardIndex, find_maps
from refiner_ds.data.samples import SampleReader
from tests.data_tools.conftest import picture

CLASSES = ["n01440764", "n01443537", "n01484850"]


def put(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars as timm publishes ImageNet, beside a validation set's."""
    (tmp_path / "wds").mkdir()
    for name, numbers in (("train-0000", range(5)), ("train-0001", range(5, 9)), ("validation-00", range(9, 12))):
        with tarfile.open(tmp_path / "wds" / f"imagenet1k-{name}.tar", "w") as tar:
            for number in numbers:
                label, key = number % 3, f"{CLASSES[number % 3]}_{number}"
                put(tar, f"{key}.cls", b"%d" % label)
                put(tar, f"{key}.jpg", picture(number, size=(80, 60)))
                stored = {"label": label, "filename": f"{CLASSES[label]}/{key}.JPEG"}
                put(tar, f"{key}.json", json.dumps(stored).encode())
    return tmp_path / "wds"


def run(*arguments: object) -> int:
    return shard.main(["index", *map(str, arguments), "--processes", "1"])


def test_pattern_is_indexed_beside_the_tars_which_stay_as_they_are(
    tars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in tars.glob("*.tar")}
    assert run(tars / "imagenet1k-train-{0000..0001}.tar") == 0
    assert capsys.readouterr().out.startswith(f"{tars}/imagenet1k-train: 9 samples, 3 classes, 2 shards")
    index = ShardIndex.load(tars / "imagenet1k-train")
    assert index.classes == CLASSES and index.members["label"].tolist() == [number % 3 for number in range(9)]
    assert bytes(SampleReader(index).read(7).image) == picture(7, size=(80, 60))
    assert {path.name: path.read_bytes() for path in tars.glob("*.tar")} == before
    assert verify([str(tars / "imagenet1k-train"), "--processes", "1"]) == 0


def test_tars_indexed_elsewhere_are_verified_and_annotated(tars: Path, tmp_path: Path) -> None:
    """As on a mount that cannot be written; several processes read."""
    out = tmp_path / "indexes" / "train"
    assert shard.main(["index", str(tars / "imagenet1k-train-*.tar"), "--out", str(out), "--processes", "2"]) == 0
    assert verify([str(out), "--processes", "1"]) == 0
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "weights.pth")
    given = ["--model", "test_resnet", "--checkpoint", tmp_path / "weights.pth", "--size", 64, "--top", 2]
    arguments = [str(part) for part in (*given, "--device", "cpu", "--processes", 1)]
    assert annotate.main([str(out), *arguments]) == 0
    assert annotate.main([str(out), *arguments, "--beside", str(tmp_path / "both")]) == 0
    maps = find_maps(ShardIndex.load(out))
    assert maps.folder == tmp_path / "indexes" / "train.maps" and maps.count == 9
    for folder in (maps.folder, tmp_path / "both"):
        assert verify([str(folder), "--processes", "1"]) == 0


def test_class_names_come_from_a_list_or_another_set(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, numbered = tmp_path / "names.txt", tmp_path / "numbered.txt"
    names.write_text("tench\ngoldfish\ngreat white shark\n")
    numbered.write_text("1 tench\n2 goldfish\n3 shark\n")
    pattern = tars / "imagenet1k-validation-00.tar"
    assert run(pattern, "--out", tmp_path / "a", "--classes", names) == 0
    assert ShardIndex.load(tmp_path / "a").classes == ["tench", "goldfish", "great white shark"]
    assert run(pattern, "--out", tmp_path / "b", "--like", tmp_path / "a") == 0
    assert ShardIndex.load(tmp_path / "b").classes == ["tench", "goldfish", "great white shark"]
    capsys.readouterr()
    assert run(pattern, "--out", tmp_path / "c", "--classes", numbered) == 2
    assert run(pattern, "--out", tmp_path / "c", "--classes", names, "--like", tmp_path / "a") == 2
    assert run(tars, "--out", tmp_path / "c") == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in told] == [True] * 3
    assert "numbers classes from 1" in told[0] and "give one of them" in told[1] and "several sets" in told[2]
    assert not (tmp_path / "c").exists()
