"""The checkpoint benchmark saves for real, both ways, and prints what each costs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tests.training.launched import ROOT, ranks, run

SMALL = (
    "--model", "refined_vit", "--img-size", "32", "--rounds", "4", "--steps", "2", "--set", "refiner.model.depth=2",
    "--set", "refiner.model.patch_size=8", "--set", "refiner.model.embed_dim=16", "--set", "refiner.model.num_heads=2",
)  # fmt: skip


def test_both_ways_of_saving_are_measured_in_one_run(tmp_path: Path) -> None:
    done = ranks("-m", "refiner_ds.benchmark", "checkpoint", *SMALL, "--folder", tmp_path, "--json")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["processes"] == 2 and found["gib"] > 0 and found["parameters"] > 10_000
    assert min(found["step"], found["load"]) > 0 and found["rounds"] == 4
    for way in ("blocking", "beside"):
        for what in ("stall", "excess"):
            middle, lowest, highest = found[f"{way}_{what}"]
            assert lowest < middle < highest and (what == "excess" or lowest > 0)
    assert not list(tmp_path.iterdir())


def test_the_table_has_median_and_spread_of_what_each_way_of_saving_costs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "refiner_ds.benchmark", "checkpoint", *SMALL, "--folder", tmp_path]
    done = run(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split() == ["stall", "excess"])
    assert re.split(r"  +", lines[head + 1].strip()) == ["median", "lowest to highest"] * 2
    figures = r" +(-?[\d,]+) ms +(-?[\d,]+) to (-?[\d,]+) ms"
    for way, line in zip(("training waits", "beside training"), lines[head + 2 :], strict=False):
        found = re.fullmatch(way + figures + figures, line)
        assert found, line
        for first in (1, 4):
            middle, lowest, highest = (int(found[first + place].replace(",", "")) for place in range(3))
            assert lowest <= middle <= highest
    assert lines[head - 2].endswith("; 4 rounds")
