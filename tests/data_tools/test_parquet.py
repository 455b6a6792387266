"""Parquet files as the Hugging Face hub publishes image sets become shards without unpacking by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_tools import shard
from data_tools.verify import main as verify
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.samples import SampleReader
from tests.data_tools.conftest import digest, picture

NAMES = ["tench, Tinca tinca", "goldfish", "great white shark"]
IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def write(
    file: Path,
    numbers: Sequence[int],
    names: list[str] | None = NAMES,
    group: int = 4,
    label: str = "label",
    **more: list[Any],
) -> None:
    """A file as ``datasets`` writes it: rows in groups, classes in the schema's metadata."""
    rows = [{"bytes": picture(number), "path": f"n{number % 3}_{number}.JPEG"} for number in numbers]
    columns = {"image": pyarrow.array(rows, IMAGE), label: pyarrow.array([n % 3 for n in numbers], pyarrow.int64())}
    columns |= {name: pyarrow.array(values) for name, values in more.items()}
    features = {"image": {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    table = pyarrow.table(columns)
    if names is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, file, row_group_size=group)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A repository with a training split in two pieces, 40 images, and a validation split."""
    write(tmp_path / "repo/data/train-00000-of-00002.parquet", range(20))
    write(tmp_path / "repo/data/train-00001-of-00002.parquet", range(20, 40))
    write(tmp_path / "repo/data/validation-00000-of-00001.parquet", range(40, 46))
    return tmp_path / "repo"


def run(*arguments: object) -> int:
    return shard.main([str(argument) for argument in ("--shard-mb", 0.008, "--processes", 1, *arguments)])


def contents(folder: Path) -> dict[bytes, str]:
    index = ShardIndex.load(folder)
    reader = SampleReader(index)
    return {bytes(raw.image): index.classes[raw.label] for raw in map(reader.read, range(index.count))}


def meant(numbers: Sequence[int], names: list[str] = NAMES) -> dict[bytes, str]:
    return {picture(number): names[number % 3] for number in numbers}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_images_arrive_byte_for_byte_with_the_classes_of_the_hub(published: Path, tmp_path: Path) -> None:
    assert run(published / "data/train-*.parquet", tmp_path / "out") == 0
    index = ShardIndex.load(tmp_path / "out")
    assert index.classes == NAMES and len(index.shards) > 3
    assert contents(tmp_path / "out") == meant(range(40))
    assert verify([str(tmp_path / "out"), "--processes", "1"]) == 0
    keys = [SampleReader(index).read(number).name for number in range(40)]
    assert keys[0].startswith("000000000-n") and len(set(keys)) == 40


def test_any_number_of_processes_writes_the_same_bytes_and_the_seed_decides_the_order(
    published: Path, tmp_path: Path
) -> None:
    pattern = published / "data/train-*.parquet"
    assert run(pattern, tmp_path / "one") == run(pattern, tmp_path / "two", "--processes", 2) == 0
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert run(pattern, tmp_path / "other", "--seed", 1) == 0
    assert list(contents(tmp_path / "one")) != list(contents(tmp_path / "other"))


def test_splits_in_folders_of_their_own_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the hub's converted copies are laid out."""
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        write(tmp_path / "default" / split / "0000.parquet", numbers)
    message = refusal(capsys, tmp_path / "default", tmp_path / "out")
    assert f"holds test/, train/; name one of them, as in {tmp_path}/default/test" in message
    assert run(tmp_path / "default" / "train", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == meant(range(8))


def test_row_group_larger_than_a_shard_is_split(tmp_path: Path) -> None:
    write(tmp_path / "all.parquet", range(30), group=30)
    assert run(tmp_path / "all.parquet", tmp_path / "out") == 0
    assert len(ShardIndex.load(tmp_path / "out").shards) > 2
    assert contents(tmp_path / "out") == meant(range(30))


def test_plain_columns_are_enough(tmp_path: Path) -> None:
    """Without the hub's metadata: binary images, labels by name or by number."""
    images = pyarrow.array([picture(number) for number in range(6)], pyarrow.binary())
    for name, labels in (("names", ["cat", "a dog"] * 3), ("numbers", [10, 9] * 3), ("coded", ["cat", "a dog"] * 3)):
        column = pyarrow.array(labels).dictionary_encode() if name == "coded" else pyarrow.array(labels)
        table = pyarrow.table({"image": images, "label": column})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        assert run(tmp_path / f"{name}.parquet", tmp_path / name) == 0
        found = contents(tmp_path / name)
        assert found == {picture(number): str(labels[number]) for number in range(6)}
    assert ShardIndex.load(tmp_path / "numbers").classes == ["9", "10"]


def test_classes_may_be_named_anew_and_ordered_as_another_sets(published: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("c\na\nb\n")
    source = published / "data/validation-00000-of-00001.parquet"
    assert run(source, tmp_path / "named", "--classes", names) == 0
    assert contents(tmp_path / "named") == meant(range(40, 46), ["c", "a", "b"])
    pattern, like = published / "data/train-*.parquet", ("--like", tmp_path / "named")
    assert run(pattern, tmp_path / "like", "--classes", names, *like) == 0
    assert contents(tmp_path / "like") == meant(range(40), ["c", "a", "b"])
    assert run(source, tmp_path / "no", *like) == 2


def test_a_list_that_numbers_its_classes_itself_is_taken_at_its_word(tmp_path: Path) -> None:
    """Not as if numbers counted its lines."""
    write(tmp_path / "all.parquet", range(6), names=None)
    for name, text in (("backwards.txt", "2 c\n1 b\n0 a\n"), ("backwards.json", '{"1": "b", "0": "a", "2": "c"}')):
        (tmp_path / name).write_text(text)
        assert run(tmp_path / "all.parquet", tmp_path / f"of {name}", "--classes", tmp_path / name) == 0
        assert contents(tmp_path / f"of {name}") == meant(range(6), ["a", "b", "c"])
        assert ShardIndex.load(tmp_path / f"of {name}").classes == ["a", "b", "c"]


def test_labels_that_are_names_are_found_in_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"image": [{"bytes": picture(n), "path": None} for n in range(4)], "label": ["cat", "ant"] * 2}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "named.parquet")
    (tmp_path / "all.txt").write_text("cat\nbee\nant\n")
    assert run(tmp_path / "named.parquet", tmp_path / "named", "--classes", tmp_path / "all.txt") == 0
    assert ShardIndex.load(tmp_path / "named").classes == ["ant", "bee", "cat"]
    assert contents(tmp_path / "named") == {picture(n): ["cat", "ant"][n % 2] for n in range(4)}
    assert "without a sample: bee" in capsys.readouterr().err
    (tmp_path / "few.txt").write_text("cat\nbee\nants\n")
    message = refusal(capsys, tmp_path / "named.parquet", tmp_path / "out", "--classes", tmp_path / "few.txt")
    assert "has class ant, which is not in" in message and "did you mean ants?" in message


def test_files_that_number_classes_differently_are_no_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "both/one.parquet", range(3), ["a", "b", "c"])
    write(tmp_path / "both/two.parquet", range(3, 6), ["b", "a", "c"])
    message = refusal(capsys, tmp_path / "both", tmp_path / "out")
    assert "two.parquet: its columns or class names are not those of" in message and "one.parquet" in message
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    assert run(tmp_path / "both", tmp_path / "out", "--classes", tmp_path / "names.txt") == 0
    assert contents(tmp_path / "out") == meant(range(6), ["x", "y", "z"])


def test_damage_inside_a_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "all.parquet", range(6))
    whole = (tmp_path / "all.parquet").read_bytes()
    for place in range(4, len(whole) // 2, 97):
        damaged = bytearray(whole)
        damaged[place : place + 40] = bytes(40)
        (tmp_path / "all.parquet").write_bytes(damaged)
        code = run(tmp_path / "all.parquet", tmp_path / f"out{place}")
        message = capsys.readouterr().err
        assert code == 0 or message.startswith("error: ") and message.count("\n") == 1, message


def test_refusals(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "holds train, validation; name one of them" in refusal(capsys, published, out)
    assert "no such file" in refusal(capsys, published / "data/none-*.parquet", out)
    assert "labels: not used" in refusal(capsys, published / "data/train-*.parquet", out, "--labels", "x")
    (published / "data/train-00000-of-00002.parquet").unlink()
    assert "piece 0 of 2 of train is missing" in refusal(capsys, published / "data/train-*.parquet", out)
    write(tmp_path / "cifar.parquet", range(6), label="fine_label", label_2=[0] * 6)
    assert run(tmp_path / "cifar.parquet", tmp_path / "cifar") == 0
    write(tmp_path / "twice.parquet", range(6), ["crane", "fox", "crane"])
    assert "names class crane twice" in refusal(capsys, tmp_path / "twice.parquet", out)
    write(tmp_path / "few.parquet", range(6), ["crane", "fox"])
    assert "has label 2, but there are 2 classes" in refusal(capsys, tmp_path / "few.parquet", out)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "few.parquet").read_bytes()[:-30])
    assert "not a whole Parquet file" in refusal(capsys, tmp_path / "cut.parquet", out)
    table = pyarrow.table({"image": pyarrow.array([{"bytes": None, "path": "a.jpg"}], IMAGE), "label": [0]})
    pyarrow.parquet.write_table(table, tmp_path / "paths.parquet")
    assert "holds no image, only a path" in refusal(capsys, tmp_path / "paths.parquet", tmp_path / "paths")
    table = pyarrow.table({"image": pyarrow.array([{"bytes": picture(0), "path": "a.jpg"}], IMAGE), "label": [-1]})
    pyarrow.parquet.write_table(table, tmp_path / "hidden.parquet")
    assert "has no label" in refusal(capsys, tmp_path / "hidden.parquet", tmp_path / "hidden")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "text.parquet")
    assert "no column is known to be its images" in refusal(capsys, tmp_path / "text.parquet", out)
    pyarrow.parquet.write_table(table.append_column("labels", [[1]]), tmp_path / "two.parquet")
    assert "columns label, labels may all be its labels; say which with --label-column" in refusal(
        capsys, tmp_path / "two.parquet", out
    )
    assert not out.exists()
