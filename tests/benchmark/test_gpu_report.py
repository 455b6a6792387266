"""The report on a GPU: whatever a part does, the report says so, and is there."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from refiner_ds.benchmark import gpu, gpu_parts
from refiner_ds.benchmark.__main__ import main
from refiner_ds.benchmark.gpu_parts import Sizes, steps_of
from refiner_ds.benchmark.running import Step, Unsound, run_step
from refiner_ds.page import Text


def step(program: str, name: str = "one", seconds: float = 60.0, digest: Any = None, **more: Any) -> Step:
    return Step(name, "What it shows.", [sys.executable, "-c", program], seconds, digest or said, **more)


def said(out: Path, printed: str) -> tuple[str, list[Any]]:
    if "wrong" in printed:
        raise Unsound("a figure is wrong")
    return printed.strip(), [Text(f"it said {printed.split()[0]}")]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("program", "state", "why"),
    [
        ("print('fine')", "passed", "fine"),
        ("print('wrong')", "failed", "a figure is wrong"),
        ("print('fine'); raise SystemExit(3)", "failed", "exit code 3: fine"),
        ("import sys; sys.exit('error: no such card')", "failed", "exit code 1: error: no such card"),
        ("pass", "failed", "exit code 1: it said nothing"),
    ],
)
def test_a_part_passes_only_where_its_command_and_its_figures_are_right(
    out: Path, program: str, state: str, why: str
) -> None:
    found = run_step(step(program), out, 60)
    assert (found.state, found.why) == (state, why)


def test_a_part_that_runs_too_long_ends_with_all_it_started(out: Path) -> None:
    program = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    found = run_step(step(program, seconds=6), out, 600)
    assert found.state == "out of time" and "logs/one.txt" in found.why
    child = Path(f"/proc/{(out / 'logs' / 'one.txt').read_text().strip()}/stat")
    for _ in range(100):
        if not child.exists() or ") Z " in child.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("what it had started lives on")
    assert run_step(step("print(1)"), out, 0.5).state == "not run"


def test_a_report_that_is_terminated_leaves_nothing_running(out: Path) -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    pid = os.fork()
    if pid == 0:
        try:
            run_step(step(program), out, 600)
        finally:
            os._exit(0)
    log = out / "logs" / "one.txt"
    for _ in range(300):
        if log.exists() and log.read_text().endswith("\n"):
            break
        time.sleep(0.1)
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
    assert not Path(f"/proc/{int(log.read_text())}").exists()


def test_variables_are_set_and_taken_away_and_what_is_missing_is_a_failure(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAKEN", "1")
    program = "import os; print(os.environ.get('GIVEN'), os.environ.get('TAKEN'))"
    assert run_step(step(program, environment={"GIVEN": "2", "TAKEN": None}), out, 60).why == "2 None"

    def missing(out: Path) -> None:
        raise OSError("no pictures here")

    found = run_step(step(program, prepare=missing), out, 60)
    assert (found.state, found.why) == ("failed", "no pictures here")


def test_the_report_has_a_row_for_every_part_and_the_exit_code_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [step("print('fine')", "first"), step("raise SystemExit(1)", "second"), step("print('good')", "third")]
    monkeypatch.setattr(gpu, "steps_of", lambda sizes, out: parts)
    assert main(["gpu", "--device", "cpu", "--out", str(tmp_path / "all")]) == 1
    text = (tmp_path / "all" / "report.md").read_text()
    assert "1 of 3 parts did not pass" in text and "**failed: exit code 1: it said nothing**" in text
    rows = [line for line in text.splitlines() if line.startswith(("| first", "| second", "| third"))]
    assert [row.split(" | ")[1] for row in rows] == ["passed", "failed", "passed"]
    for word in (torch.__version__.partition("+")[0], "triton", "commit", "cores", "it said fine"):
        assert word in text
    assert main(["gpu", "--device", "cpu", "--out", str(tmp_path / "some"), "--only", "first", "third"]) == 0
    assert "All parts passed" in (tmp_path / "some" / "report.md").read_text()
    assert main(["gpu", "--device", "cpu", "--out", str(tmp_path / "late"), "--seconds", "1"]) == 1
    assert (tmp_path / "late" / "report.md").read_text().count("| not run | 0 | no time is left |") == 3
    capsys.readouterr()
    for options, sentence in (
        (["--out", str(tmp_path / "all")], "holds a report already"),
        (["--only", "fourth", "--out", str(tmp_path / "no")], "the parts are first, second, third"),
    ):
        assert main(["gpu", "--device", "cpu", *options]) == 2
        assert sentence in capsys.readouterr().err


def test_without_a_gpu_it_says_how_to_try_it(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 2
    assert "--device cpu tries the report itself" in capsys.readouterr().err


@pytest.mark.parametrize("long", [False, True])
def test_the_parts_are_all_that_waits_for_a_gpu_and_their_time_is_bounded(tmp_path: Path, long: bool) -> None:
    steps = steps_of(Sizes("cuda", 4, long), tmp_path)
    names = [one.name for one in steps]
    assert len(set(names)) == len(names)
    for name in ("self-check", "tests", "kernels S at 224", "layer S at 224", "model L at 224", "quickstart",
                 *(f"ZeRO stage {stage}" for stage in range(4)), "checkpoint", "loader", "annotator"):  # fmt: skip
        assert name in names
    for one in steps:
        assert "cpu" not in one.command and "--nproc_per_node=4" in one.command or "train.py" not in one.typed
    assert any("--compile" in one.command for one in steps) is long


def test_kernels_are_shown_predicted_beside_measured(tmp_path: Path) -> None:
    row = {"step": "map, training", "kernel": "softmax_map", "launches": 1, "bytes_entry": 4.7, "registers": 64}
    rows = [
        {**row, "milliseconds": 0.3, "share": 0.8, "spilled": 0, "predicted": 0.2, "bound": "bytes"},
        {
            **row,
            "kernel": "output",
            "milliseconds": 0.1,
            "share": 0.5,
            "spilled": 8,
            "predicted": 0.2,
            "bound": "bytes",
        },
    ]
    told, parts = gpu_parts._kernels("S at 224")(tmp_path, json.dumps({"rows": rows}))
    assert told == "2 kernels, 1 of them spill; all of them take 1.00 times what is predicted"
    table, picture = parts
    assert [line[3:7] for line in table.rows] == [  # type: ignore[union-attr]
        ("0.200", "bytes", "0.300", "80%"), ("0.200", "bytes", "0.100", "50%")
    ]  # fmt: skip
    assert picture.text == "![kernels, S at 224](kernels_s_at_224.png)"  # type: ignore[union-attr]
    assert (tmp_path / "kernels_s_at_224.png").stat().st_size > 1000


def test_tests_that_were_all_skipped_have_not_passed(tmp_path: Path) -> None:
    case = '<testcase classname="a" name="b">{}</testcase>'
    for inside, right in (("<skipped/>", False), ("", True)):
        (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{case.format(inside)}</testsuite></testsuites>")
        if right:
            assert gpu_parts._tests(tmp_path, "")[0] == "1 passed, 0 failed, 0 skipped"
        else:
            with pytest.raises(Unsound, match="nothing was tested"):
                gpu_parts._tests(tmp_path, "")
    broken = case.format('<failure message="1 is not 2&#10;at line 3"/>')
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{broken}{case.format('')}</testsuite></testsuites>")
    told, (table,) = gpu_parts._tests(tmp_path, "")
    assert told == "1 passed, 1 failed, 0 skipped" and table.rows == [("a::b", "1 is not 2")]  # type: ignore[union-attr]


@pytest.mark.parametrize(("losses", "state"), [((2.0, 2.02), "passed"), ((2.0, 2.3), "failed")])
def test_zero_stages_that_do_not_train_the_same_are_a_failure(tmp_path: Path, losses: Any, state: str) -> None:
    outcomes = []
    for stage, loss in enumerate(losses):
        folder = tmp_path / "runs" / f"stage_{stage}"
        folder.mkdir(parents=True)
        line = {"kind": "train", "step": 3, "loss": loss, "images_per_second": 9.0, "step_seconds": 0.1}
        (folder / "metrics.jsonl").write_text(json.dumps({**line, "peak_memory_gib": 1.5}) + "\n")
        outcomes.append(gpu_parts.Outcome(step("", f"ZeRO stage {stage}"), "passed", 1.0, ""))
    (found,) = gpu_parts.stages_side_by_side(tmp_path, outcomes)
    assert found.state == state and len(found.parts[0].rows) == 2  # type: ignore[union-attr]
    assert not gpu_parts.stages_side_by_side(tmp_path, outcomes[:1])


@pytest.mark.slow
def test_a_real_part_of_it_runs_here(tmp_path: Path) -> None:
    """One layer by every backend, at its tiny size: what the command prints is what the report reads."""
    assert main(["gpu", "--device", "cpu", "--out", str(tmp_path / "r"), "--only", "layer tiny"]) == 0
    text = (tmp_path / "r" / "report.md").read_text()
    assert "| bottleneck, tiled, map, N = 17 |" in text and "![layer, tiny](layer_tiny.png)" in text
