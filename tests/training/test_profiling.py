"""A profile says where the time of its steps went: of known traces exactly, of real runs in parts that make a whole."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from refiner_ds.run_folder import RunFolder
from refiner_ds.training.console import Console
from refiner_ds.training.metrics import read_metrics
from refiner_ds.training.profiling import Profiling
from refiner_ds.training.trace_summary import DATA_WAIT, STEP, in_words, read_trace, shares
from refiner_ds.training.world import World
from tests.training.launched import ROOT, ranks
from tests.training.test_resume import arguments

TRAIN = ROOT / "refiner_ds" / "train.py"
SUMMARY = re.compile(
    r"rank (\d): compute ([\d.]+) %, exposed communication ([\d.]+) %, data wait ([\d.]+) %, idle ([\d.]+) %"
)


def event(category: str, name: str, begin: float, end: float, thread: int = 1) -> dict[str, object]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": end - begin, "tid": thread}


# Two steps of 100 µs each; communication is hidden from 40 to 60 and exposed from 60 to 70, in the first.
GPU = [
    event("user_annotation", STEP, 0, 100), event("user_annotation", STEP, 100, 200),
    event("user_annotation", DATA_WAIT, 0, 20), event("user_annotation", DATA_WAIT, 95, 115),
    event("kernel", "gemm", 10, 60, 7), event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", 40, 70, 20),
    event("gpu_memcpy", "Memcpy HtoD", 115, 120, 7), event("kernel", "gemm", 118, 200, 7),
    event("cpu_op", "aten::mm", 0, 200),
]  # fmt: skip
CPU = [
    event("user_annotation", STEP, 0, 100), event("user_annotation", STEP, 100, 200),
    event("user_annotation", DATA_WAIT, 0, 20), event("cpu_op", "aten::upsample", 5, 15),
    event("cpu_op", "aten::linear", 25, 60), event("cpu_op", "aten::addmm", 26, 59),
    event("cpu_op", "gloo:all_reduce", 50, 90, 9),  # hidden to 60, exposed from 60 to 65, hidden again to 75, exposed
    event("cpu_op", "autograd::engine::evaluate_function: AccumulateGrad", 60, 95, 2),
    event("cpu_op", "HookBackward", 61, 94, 2), event("cpu_op", "c10d::allreduce_", 62, 64, 2),
    event("cpu_op", "aten::mul", 65, 75, 2), event("cpu_op", "aten::add", 130, 180),
]  # fmt: skip


@pytest.mark.parametrize(
    "trace, compute, exposed, waiting, idle",
    # GPU: 10–60, 115–200; 60–70; 0–10 and 95–115; the rest. CPU: 25–60, 65–75, 130–180; 60–65, 75–90; 0–20; the rest.
    [(GPU, 135, 10, 30, 25), (CPU, 95, 20, 20, 65)],
    ids=["GPU", "CPU"],
)
def test_overlapped_communication_is_not_counted_and_all_parts_add_up(
    trace: list[dict[str, object]], compute: float, exposed: float, waiting: float, idle: float
) -> None:
    found = shares(trace)
    assert found == {
        "compute": compute, "exposed communication": exposed, "data wait": waiting, "idle": idle
    }  # fmt: skip
    assert sum(found.values()) == 200


def test_tenths_of_a_percent_add_up_to_a_hundred() -> None:
    said = in_words({"compute": 1.0, "exposed communication": 1.0, "data wait": 1.0, "idle": 0.0})
    assert said == "compute 33.4 %, exposed communication 33.3 %, data wait 33.3 %, idle 0.0 %"


def test_usr1_asks_for_a_profile_once(tmp_path: Path) -> None:
    other = World(1, 2, 1, torch.device("cpu"))  # any rank is heard; the main one alone looks for a file
    before = signal.getsignal(signal.SIGUSR1)
    profiling = Profiling(RunFolder(tmp_path), other, Console(False), None)
    try:
        assert not profiling.requested()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert profiling.requested() and not profiling.requested()
    finally:
        profiling.close()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_run_profiles_the_steps_it_is_told_to_and_those_it_is_asked_for(tmp_path: Path) -> None:
    """The run file names steps 8 and 9; a request in the run folder asks for two more, as soon as it is seen."""
    run = tmp_path / "quickstart"
    run.mkdir()
    (run / "profile").write_text("2\n")
    keys = {"refiner.recipe.epochs": 0.4, "refiner.run.profile_steps": [8, 9], "zero_optimization.stage": 2}
    done = ranks(TRAIN, *arguments(tmp_path, **keys, **{"refiner.model.drop_path": 0.0}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (run / "profile").exists() and len(read_metrics(run, "train")) == 12
    folders = sorted(path.name for path in (run / "profiles").iterdir())
    assert folders == ["step_00000003", "step_00000008"]  # asked in step 1, agreed when step 2 was read
    for folder in sorted((run / "profiles").iterdir()):
        title, *lines = (folder / "summary.txt").read_text().splitlines()
        assert re.fullmatch(r"profile of steps \d+ to \d+", title) and title in done.stdout
        for rank, line in enumerate(lines):
            found = SUMMARY.fullmatch(line)
            assert found is not None and int(found[1]) == rank, line
            parts = [float(part) for part in found.groups()[1:]]
            assert sum(parts) == pytest.approx(100, abs=1e-6) and parts[0] > 0 and parts[2] > 0
            names = [one["name"] for one in read_trace(folder / f"rank_{rank:05d}.json.gz")]
            assert names.count(STEP) == 2 and names.count(DATA_WAIT) == 2
            assert any(name.startswith(("gloo:", "c10d::")) for name in names)
        assert len(lines) == 2
    assert json.loads((run / "config.json").read_text())["refiner"]["run"]["profile_steps"] == [8, 9]
