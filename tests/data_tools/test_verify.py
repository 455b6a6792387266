"""verify.py finds every kind of damage, says where, and tells with its exit code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools.verify import main
from refiner_ds.data.index import MEMBERS_NAME, ShardIndex
from refiner_ds.data.score_maps import ScoreMap, encode
from refiner_ds.data.writer import SetWriter
from tests.data_tools.conftest import picture

MAP = ScoreMap(np.ones((2, 3, 4), np.float16), np.zeros((2, 3, 4), np.int16), 0)


def make(
    folder: Path, with_maps: bool = True, label: int = 0, score_map: ScoreMap = MAP, key: str = "{}"
) -> ShardIndex:
    with SetWriter(folder, ["only", "other"], 4, MAP.format if with_maps else None) as writer:
        for number in range(10):
            record = encode(score_map) if with_maps else None
            writer.add(key.format(number), picture(number), "jpg", label, record)
    return ShardIndex.load(folder)


def errors_of(folder: Path, capsys: pytest.CaptureFixture[str], processes: int = 1) -> list[str]:
    code = main([str(folder), "--processes", str(processes)])
    *found, summary = capsys.readouterr().out.splitlines()
    assert code == (1 if found else 0)
    assert summary.startswith(str(folder))
    return found


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("processes", [1, 2])
def test_sound_set_has_no_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], processes: int) -> None:
    make(tmp_path / "set")
    assert errors_of(tmp_path / "set", capsys, processes) == []


SHARD = "shard-000001.tar"
DAMAGE: dict[str, tuple[Callable[[Path, int], object], str]] = {
    "missing": (lambda path, _: path.unlink(), "cannot be read"),
    "cut inside a member": (lambda path, at: path.write_bytes(path.read_bytes()[: at + 700]), "cut off"),
    "cut at a member": (lambda path, at: path.write_bytes(path.read_bytes()[:at]), "it was cut"),
    "a byte of an image": (lambda path, at: flip(path, at + 600), "sample 1 .* is damaged"),
    "a byte of a header": (lambda path, at: flip(path, at + 130), "sample 1 .* is damaged"),
    "zeros at the end": (lambda path, _: path.write_bytes(path.read_bytes()[:-600]), "does not end as a tar"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    index = make(tmp_path / "set")
    change, says = DAMAGE[kind]
    change(tmp_path / "set" / SHARD, int(index.members[5]["offset"]))
    found = errors_of(tmp_path / "set", capsys)
    assert any(SHARD in error for error in found) and all("shard-000000" not in error for error in found)
    assert any(re.search(says, error) for error in found)


def test_image_that_does_not_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SetWriter(tmp_path / "set", ["only"], 4) as writer:
        writer.add("good", picture(0), "jpg", 0)
        writer.add("bad", b"not a picture", "jpg", 0)
    (error,) = errors_of(tmp_path / "set", capsys)
    assert "bad.jpg" in error and "cannot be decoded" in error
    assert main([str(tmp_path / "set"), "--no-decode"]) == 0


def test_wrong_labels_and_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = ScoreMap(np.ones((2, 3, 5), np.float16), np.zeros((2, 3, 5), np.int16), 0)
    foreign = ScoreMap(MAP.values_Khw, np.full((2, 3, 4), 7, np.int16), 0)
    for name, made, says in (
        ("label", {"label": 2}, "label 2, but there are 2 classes"),
        ("grid", {"score_map": wide}, "where the set's are"),
        ("class", {"score_map": foreign}, "not among the set's 2"),
        ("disagree", {"label": 1}, "its map says label 0"),
    ):
        make(tmp_path / name, **made)  # type: ignore[arg-type]
        found = errors_of(tmp_path / name, capsys)
        assert sum(says in error for error in found) == 10


def test_key_that_occurs_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SetWriter(tmp_path / "set", ["only"], 2) as writer:
        for key in ("a", "b", "c", "a"):
            writer.add(key, picture(0), "jpg", 0)
    (error,) = errors_of(tmp_path / "set", capsys)
    assert "1 keys occur more than once" in error


def test_members_of_another_set_and_no_set_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = make(tmp_path / "set")
    members = np.array(index.members)
    members["label"] = 1
    np.save(tmp_path / "set" / MEMBERS_NAME, members)
    assert main([str(tmp_path / "set")]) == 2
    assert main([str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(error.startswith("error: ") for error in errors)


def test_index_of_shards_in_another_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "set")
    path = tmp_path / "set" / "index.json"
    described = json.loads(path.read_text())
    described["shards"][0], described["shards"][1] = described["shards"][1], described["shards"][0]
    path.write_text(json.dumps(described))
    assert len(errors_of(tmp_path / "set", capsys)) >= 8


def test_parallel_maps_of_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "set", with_maps=False)
    with SetWriter(tmp_path / "set.maps", ["only", "other"], 4, MAP.format) as writer:
        for number in range(10):
            writer.add_map(f"x{number}", encode(MAP), 0)
    (error,) = errors_of(tmp_path / "set", capsys)
    assert "its maps are not those of" in error
    assert errors_of(tmp_path / "set.maps", capsys) == []
