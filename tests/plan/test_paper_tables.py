"""What the paper's tables are said to cost, in their files and in the docs, is what the planner says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from refiner_ds.gpus import gpu
from refiner_ds.plan.machines import Machines
from refiner_ds.plan.tables import plan_table
from refiner_ds.sweep_table import read_table

ROOT = Path(__file__).parents[2]
TABLES = sorted(file.stem for file in (ROOT / "ds_configs/paper").glob("*.json") if '"rows"' in file.read_text())


def said(table: str) -> tuple[int, int]:
    """GPU-hours and GPUs in a table's head."""
    head = read_table(ROOT / f"ds_configs/paper/{table}.json").about
    found = re.search(r"All rows: at least ([\d,]+) GPU-hours on (\d+) H100s, planned\.", head)
    assert found, head
    return int(found[1].replace(",", "")), int(found[2])


@pytest.mark.parametrize("table", TABLES)
def test_a_tables_head_and_its_line_in_the_docs_agree(table: str) -> None:
    page = (ROOT / "docs/reproducing.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith(f"| `ds_configs/paper/{table}.json`"))
    hours, gpus = said(table)
    assert line.endswith(f"| {hours:,} |")
    assert f"--nodes {gpus // 8}" in read_table(ROOT / f"ds_configs/paper/{table}.json").about


@pytest.mark.long
@pytest.mark.parametrize("table", TABLES)
def test_a_table_costs_what_its_head_says(table: str) -> None:
    hours, gpus = said(table)
    machines = Machines(gpu("h100"), nodes=gpus // 8, per_node=8)
    planned = plan_table(read_table(ROOT / f"ds_configs/paper/{table}.json"), [], machines)
    # Versions of PyTorch compose a little differently.
    assert planned["cost"]["gpu_hours"] == pytest.approx(hours, rel=0.05)
