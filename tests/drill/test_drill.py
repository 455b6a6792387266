"""A minute of ``make drill``: some of what can happen to a run happens once, and it comes through."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.data.small_disk import SmallDisk, run_on_small_disk
from tests.drill.course import Course, Recovery
from tests.drill.drill import Drill, Plan
from tests.drill.events import CHANGE, EVENTS, FULL, NAN
from tests.drill.report import how_it_ended, table, write
from tests.drill.stopped import seconds_until_named
from tests.training.launched import environment, run  # noqa: F401  (this file starts processes)

KINDS = (
    "SIGKILL of all ranks while a checkpoint is written", NAN, FULL, "damaged newest checkpoint, SIGKILL of all ranks",
)  # fmt: skip


@pytest.mark.timeout(900)
def test_runs_that_much_happens_to_end_as_the_undisturbed_one(tmp_path: Path) -> None:
    def drill(disk: SmallDisk | None) -> int:
        plan = Plan(same=len(KINDS), changing=2, real=0, seconds=400, again=150, kinds=KINDS)
        drill = Drill(tmp_path / "runs", plan, disk)
        drill.run()
        assert drill.differences() == []
        assert "on two processes ended as the undisturbed one, bit for bit, after" in how_it_ended(drill)
        assert "whose number of processes changed once every step was made of the same samples" in how_it_ended(drill)
        assert len(drill.recoveries) == len(KINDS) + 2 - (disk is None)
        assert all(one.seconds > 0 and one.steps_lost >= 0 for one in drill.recoveries)
        return 0

    assert run_on_small_disk(tmp_path, drill) == 0, "the drill failed; what it said is on stderr"


@pytest.mark.long
def test_a_stopped_rank_is_named_with_the_limits_that_a_run_has_by_default(tmp_path: Path) -> None:
    named, left = seconds_until_named(tmp_path, stopped=1)
    assert 0 < named <= left


def test_a_step_that_goes_wrong_again_after_others_is_the_newest(tmp_path: Path) -> None:
    course = Course(tmp_path / "course", Random(0), None, again=1.0)
    course.run.path.mkdir()
    incidents = [{"step": 50, "time": 9.0}, {"step": 40, "time": 3.0}, {"step": 60, "time": 5.0}]
    course.run.divergence.write_text(json.dumps({"rollbacks": 4, "incidents": incidents}))
    assert course._newest_incident(since=2.0) == incidents[0]
    with pytest.raises(ValueError):
        course._newest_incident(since=9.0)


LOGS_A_STEP = """
import os, sys, time
from types import SimpleNamespace

import torch

import sitecustomize

losses = SimpleNamespace(_replace=lambda **_: None)
launcher = os.getpid()
reading, writing = os.pipe()
if os.fork():
    os.read(reading, 1)  # the rank has begun its step
    os._exit(0)
rank = SimpleNamespace(_clean_call=lambda *_: os.write(writing, b"."), _clean_forward=lambda *_: losses)
sitecustomize._take(rank, 7)
while os.getppid() == launcher:
    time.sleep(0.01)
sitecustomize._forward(rank, SimpleNamespace(sample_B=torch.tensor([3, 5])))
print(launcher)
"""


def test_samples_of_a_step_in_which_the_launcher_is_killed_are_those_of_its_start(tmp_path: Path) -> None:
    env = {**environment(), "REFINER_SAMPLES": str(tmp_path), "PYTHONPATH": str(Path(__file__).with_name("poison"))}
    with subprocess.Popen((sys.executable, "-c", LOGS_A_STEP), env=env, stdout=subprocess.PIPE, text=True) as process:
        launcher = int(process.communicate(timeout=120)[0])
    (log,) = tmp_path.iterdir()
    line = json.loads(log.read_text())
    assert (line["launcher"], line["step"], line["samples"]) == (launcher, 7, [3, 5])


def test_the_table_has_every_kind_and_goes_between_the_marks_of_a_page(tmp_path: Path) -> None:
    kinds = [*EVENTS, f"{CHANGE}, 2 → 1"]
    text = table([Recovery(kind, seconds, 1) for kind in kinds for seconds in (2.0, 3.0, 9.5)])
    assert all(f"| {kind} | 3 | 3.0, 9.5 | 1, 1 | nothing |" in text for kind in kinds)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- drill -->\nold\n<!-- end of drill -->\nafter\n")
    write(page, f"{text}\n")
    write(page, f"{text}\n")
    assert page.read_text() == f"before\n<!-- drill -->\n{text}\n<!-- end of drill -->\nafter\n"
