"""The loader's benchmark measures what it says, in as many processes as it says."""

from __future__ import annotations

import io
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refiner_ds.benchmark import loader
from refiner_ds.benchmark.__main__ import main
from refiner_ds.benchmark.loader import epoch_of_shards, find_photographs, lay_out, report
from refiner_ds.data.crop_decoding import crop_decoder


def photograph(seed: int) -> bytes:
    """A JPEG of the size and detail of ImageNet's."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((500, 375))
    pixels = np.asarray(coarse) + rng.normal(0, 12, (375, 500, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(20):
        (tmp_path / f"{number}.jpg").write_bytes(photograph(number))
    return tmp_path


FIGURES = r"(\d+) \((\d+) to (\d+)\)"


def test_benchmark_tells_costs_sizes_and_scaling(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loader", "--images", str(folder), "--rounds", "3", "--workers", "0", "1"]) == 0
    told = capsys.readouterr().out
    assert re.match(r"20 photographs, mean \d+ kB and 0.19 megapixels", told)
    assert "the middle one of 3 rounds" in told
    rows = re.findall(rf"^(\w+(?: \w+)?) +{FIGURES} +\d+ +([0-9.]+)$", told, re.M)
    costs = {name: float(middle) for name, middle, *_ in rows}
    whole = ["whole images"] if crop_decoder() else []
    assert list(costs) == ["shards", "loose files", *whole, "usual", "decoding", "entropy"]
    for name, middle, lowest, highest, times in rows:
        assert int(lowest) <= int(middle) <= int(highest)
        assert float(times) == pytest.approx(costs["usual"] / costs[name], rel=0.5)
    signed = r"([+-]\d+\.\d)"
    difference = re.search(rf"^shards against loose files: {signed} \({signed} to {signed}\) %$", told, re.M)
    assert difference and float(difference[2]) <= float(difference[1]) <= float(difference[3])
    assert float(difference[1]) == pytest.approx(100 * (costs["shards"] / costs["loose files"] - 1), abs=30)
    scaled = re.findall(rf"^(\d) workers?: {FIGURES} images/s elapsed, (\d+) CPU µs/image in", told, re.M)
    assert [row[0] for row in scaled] == ["0", "1"]
    assert re.search(r"^decoding a score map: \d+\.\d \(\d+\.\d to \d+\.\d\) CPU µs$", told, re.M)


def test_report_is_middle_lowest_and_highest_and_pairs_what_ran_in_one_round(folder: Path, tmp_path: Path) -> None:
    photographs = lay_out(find_photographs(folder), tmp_path / "workshop")
    costs = {
        "shards": [110.0, 190.0, 99.0], "loose files": [100.0, 200.0, 110.0], "usual": [400.0, 800.0, 330.0],
        "decoding": [60.0, 61.0, 62.0], "entropy": [50.0, 55.0, 60.0],
    }  # fmt: skip
    told = report(photographs, costs, [17.0, 16.0, 18.5], {0: [(7.0, 5.0), (9.0, 3.0)], 1: [(10.0, 4.0)]}).splitlines()
    assert told[3].split() == "shards 110 (99 to 190) 9091 3.64".split()
    assert told[4].split() == "loose files 110 (100 to 200) 9091 4.00".split()
    assert told[8:] == [
        "shards against loose files: -5.0 (-10.0 to +10.0) %",
        "above the floor: 2.00 times entropy decoding",
        "decoding a score map: 17.0 (16.0 to 18.5) CPU µs",
        "0 workers: 8 (7 to 9) images/s elapsed, 4 CPU µs/image in all processes",
        "1 worker: 10 (10 to 10) images/s elapsed, 4 CPU µs/image in all processes",
    ]


def test_scaling_is_over_as_many_processes_as_it_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs, seen = lay_out(find_photographs(folder), tmp_path / "workshop"), []

    def counted() -> float:
        seen.append(len(multiprocessing.active_children()))
        return len(seen)

    monkeypatch.setattr(loader, "cpu_seconds", counted)
    rates = loader.scaling(photographs, [0, 2], 1)
    assert seen == [0, 0, 2, 2]
    assert [used for _, used in (*rates[0], *rates[2])] == [1e6 / 40] * 2


def test_shards_and_loose_files_give_the_same_batches(folder: Path, tmp_path: Path) -> None:
    photographs = lay_out(find_photographs(folder), tmp_path / "workshop")
    one, other = next(epoch_of_shards(photographs)()), next(epoch_of_shards(photographs, loose=True)())
    assert torch.equal(one.images_BHWC, other.images_BHWC)  # type: ignore[attr-defined]
    assert one.images_BHWC.shape == (20, 224, 224, 3) and one.images_BHWC.float().std() > 20  # type: ignore[attr-defined]


def test_too_few_photographs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loader", "--images", str(tmp_path)]) == 2
    assert "0 JPEG files; it takes at least 20" in capsys.readouterr().err
