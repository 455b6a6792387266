"""Map records are exact and small, and refuse what is not one; published files are read without running them."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from refiner_ds.benchmark.loader import smooth_score_map
from refiner_ds.data.index import MapFormat
from refiner_ds.data.score_maps import HEADER, ScoreMap, decode, encode, read_published
from refiner_ds.errors import DataError


def annotated(rows: int = 18, columns: int = 18, k: int = 5) -> ScoreMap:
    """The top left corner of a smooth map, so that grids need not be square."""
    whole = smooth_score_map(max(rows, columns), k)
    return ScoreMap(whole.values_Khw[:, :rows, :columns], whole.classes_Khw[:, :rows, :columns], 17)


@pytest.mark.parametrize("shape", [(18, 18, 5), (7, 9, 5), (1, 1, 1), (12, 20, 10)])
def test_record_gives_back_every_bit(shape: tuple[int, int, int]) -> None:
    one = annotated(*shape)
    again = decode(encode(one), "here")
    assert (again.values_Khw.view(np.uint16) == one.values_Khw.view(np.uint16)).all()
    assert (again.classes_Khw == one.classes_Khw).all()
    assert again.label == 17 and again.format == MapFormat(shape[2], shape[0], shape[1])


def test_record_gives_back_any_bits_at_all() -> None:
    """Negative, unordered, infinite and denormal values too: differences are taken modulo 2**16."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << 16, (5, 4, 4), dtype=np.uint16)
    again = decode(encode(ScoreMap(bits.view(np.float16), bits.view(np.int16), -1)), "here")
    assert (again.values_Khw.view(np.uint16) == bits).all() and (again.classes_Khw.view(np.uint16) == bits).all()


def test_record_is_small() -> None:
    """7.1 GB for ImageNet's 1,281,167 images."""
    assert len(encode(annotated())) * 1_281_167 < 7.1e9


def test_record_of_more_than_it_says_is_refused_without_unpacking_it() -> None:
    """64 kB may hold 2 GB."""
    record = encode(annotated())
    packed = zstandard.ZstdCompressor().compress(bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(DataError, match="here: its score map is damaged .it does not hold 5×18×18 scores"):
        decode(record[: HEADER.size] + packed, "here")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(packed) < 10_000 and most < 1_000_000


@pytest.mark.parametrize(
    "damage",
    [lambda r: r[:10], lambda r: b"XMAP" + r[4:], lambda r: r[:4] + b"\2" + r[5:], lambda r: r[:60], lambda r: b""],
)
def test_damaged_record_is_refused(damage: object) -> None:
    with pytest.raises(DataError, match="shard 3: sample 4"):
        decode(damage(encode(annotated())), "shard 3: sample 4")  # type: ignore[operator]


def published(path: Path, values: np.ndarray, classes: np.ndarray) -> Path:
    torch.save(torch.from_numpy(np.stack([values, classes]).astype(np.float16)), path)
    return path


def test_published_file_is_read_exactly(tmp_path: Path) -> None:
    one = annotated()
    again = read_published(published(tmp_path / "a.pt", one.values_Khw, one.classes_Khw), 3, 1000)
    assert (again.values_Khw == one.values_Khw).all() and (again.classes_Khw == one.classes_Khw).all()
    assert again.label == 3


def test_class_numbers_of_another_class_list_are_refused(tmp_path: Path) -> None:
    one = annotated()
    path = published(tmp_path / "a.pt", one.values_Khw, one.classes_Khw)
    with pytest.raises(DataError, match="a.pt: class number .* but there are 10 classes"):
        read_published(path, 3, 10)
    with pytest.raises(DataError, match="2048"):
        read_published(path, 3, 21_000)


def test_file_that_would_run_code_is_refused_unrun(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    for name, save in (("torch.pt", torch.save), ("pickle.pt", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        save(Trap(), tmp_path / name)
        with pytest.raises(DataError, match=name):
            read_published(tmp_path / name, 0, 1000)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "content",
    [torch.zeros(5), {"a": 1}, torch.zeros(3, 5, 4, 4), torch.zeros(2, 256, 1, 1), torch.full((2, 1, 1, 1), 0.5), b"-"],
)
def test_other_files_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(DataError, match="a.pt"):
        read_published(path, 0, 1000)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent.pt: missing"):
        read_published(tmp_path / "absent.pt", 0, 1000)
