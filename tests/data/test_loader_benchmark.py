"""The loader's benchmark measures what it says, and shows this loader ahead of the usual one."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refiner_ds.benchmark.loader import main


def photograph(seed: int) -> bytes:
    """A JPEG of the size and detail of ImageNet's."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((500, 375))
    pixels = np.asarray(coarse) + rng.normal(0, 12, (375, 500, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def test_benchmark_tells_costs_sizes_and_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20):
        (tmp_path / f"{number}.jpg").write_bytes(photograph(number))
    assert main(["--images", str(tmp_path), "--rounds", "2", "--workers", "0", "1"]) == 0
    told = capsys.readouterr().out
    assert re.match(r"20 photographs, mean \d+ kB and 0.19 megapixels", told)
    costs = {name: float(cost) for name, cost in re.findall(r"^(\w+(?: \w+)?) +(\d+) +\d+ ", told, re.M)}
    assert list(costs) == ["shards", "loose files", "usual", "decoding", "entropy"]
    assert costs["entropy"] < costs["decoding"]
    assert max(costs["entropy"], costs["decoding"], costs["shards"]) < costs["usual"]  # twice, where nothing else runs
    assert re.search(r"^0 workers: \d+ images/s elapsed\n1 worker: \d+ images/s", told, re.M)


def test_too_few_photographs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", str(tmp_path)]) == 2
    assert "0 JPEG files; at least 20" in capsys.readouterr().err
