"""Imports run one way, without circles, and what needs no tensor imports no torch."""

from __future__ import annotations

import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imports import GROUND, ROOT, import_graph, room_of, rooms

LIBRARY = {"ground", "step_times", "config", "attention", "models", "data", "checkpoint", "training"}
MAY_IMPORT = {
    "ground": set(),
    "config": {"ground"},
    "attention": {"ground"},
    "models": {"ground", "attention"},
    "data": {"ground", "config"},
    "checkpoint": {"ground", "config", "models"},
    "training": LIBRARY,
    "step_times": {"ground", "config"},
    "plan": LIBRARY | {"sweep_table"},
    "analysis": LIBRARY,
    "benchmark": LIBRARY,
    "text": {"ground", "attention", "analysis", "glue_table"},
    "train": LIBRARY | {"plan"},
    "evaluation": LIBRARY | {"analysis"},
    "evaluate": LIBRARY | {"analysis", "evaluation"},
    "calibrate": LIBRARY | {"analysis", "evaluation"},
    "classify": LIBRARY | {"analysis"},
    "export": LIBRARY,
    "restart": {"ground", "config", "training"},
    "sweep_table": {"ground", "config"},
    "glue_table": {"ground"},
    "report": {"ground", "config", "glue_table", "sweep_table"},
    "gallery": LIBRARY | {"analysis", "evaluation", "report"},
    # what a task of a job runs: train, or a command after it
    "launch": {"ground", "config", "data", "train", "evaluate", "calibrate", "export", "sweep_table", "step_times"},
    "data_tools": {"ground", "config", "data"},
    "installed": {"ground"},  # and, when called, the command's module, whose name it has as data
}


def test_rooms_import_only_what_lies_below_them() -> None:
    graph = import_graph()
    strangers = {room_of(module) for module in graph} - MAY_IMPORT.keys()
    assert not strangers, f"say in MAY_IMPORT what {strangers} may import"
    wrong = [
        f"{module} imports {imported}"
        for module, found in graph.items()
        for imported in sorted(found)
        if room_of(imported) not in MAY_IMPORT[room_of(module)] | {room_of(module)}
    ]
    assert not wrong


@pytest.mark.parametrize(
    "line",
    ["import refiner_ds.training.loop", "from ..training import loop", "import_module('refiner_ds.training.loop')"],
)
def test_an_import_is_seen_however_it_is_written(line: str, tmp_path: Path) -> None:
    for name, text in {"data/index.py": f"def late():\n    {line}\n", "training/loop.py": ""}.items():
        (tmp_path / "refiner_ds" / name).parent.mkdir(parents=True)
        (tmp_path / "refiner_ds" / name).write_text(text)
    assert import_graph(tmp_path)["refiner_ds.data.index"] == {"refiner_ds.training.loop"}
    named = tmp_path / "refiner_ds/data/index.py"
    named.write_text("importlib.import_module(f'refiner_ds.training.{name}')")
    (tmp_path / "refiner_ds/training/__init__.py").touch()
    assert import_graph(tmp_path)["refiner_ds.data.index"] == {"refiner_ds.training"}


def test_no_import_goes_in_a_circle() -> None:
    graph = import_graph()
    for picture in (graph, rooms(graph)):
        order = list(graphlib.TopologicalSorter(picture).static_order())  # raises CycleError, naming the circle
        assert len(order) >= len(picture)


@pytest.mark.parametrize(
    "modules",
    [", ".join(sorted(GROUND)), "refiner_ds.config", "launch.submit", "refiner_ds.report.__main__"],
    ids=["ground", "config", "launch", "report"],
)
def test_what_knows_no_tensor_imports_no_torch(modules: str) -> None:
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    done = subprocess.run((sys.executable, "-c", program), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
