"""The checkpoint benchmark saves for real, both ways, and prints what each costs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.training.launched import ROOT, ranks, run

SMALL = (
    "--model", "refined_vit", "--img-size", "32", "--rounds", "1", "--steps", "2", "--set", "refiner.model.depth=2",
    "--set", "refiner.model.patch_size=8", "--set", "refiner.model.embed_dim=16", "--set", "refiner.model.num_heads=2",
)  # fmt: skip


def test_both_ways_of_saving_are_measured_in_one_run(tmp_path: Path) -> None:
    done = ranks("-m", "refiner_ds.benchmark", "checkpoint", *SMALL, "--folder", tmp_path, "--json")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["processes"] == 2 and found["gib"] > 0 and found["parameters"] > 10_000
    assert min(found["step"], found["blocking_stall"], found["beside_stall"], found["load"]) > 0
    assert not list(tmp_path.iterdir())


def test_the_table_names_stall_and_excess(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "refiner_ds.benchmark", "checkpoint", *SMALL, "--folder", tmp_path]
    done = run(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {line[:24].strip(): line.split()[-4:] for line in done.stdout.splitlines() if line.endswith("ms")}
    assert rows.keys() >= {"training waits", "beside training"}
