"""The restarting command: again as long as that helps, and never longer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.launched import ROOT, environment

# Stands for a training: notes that it was started, saves a checkpoint where it is told to, leaves with the next code.
LAUNCHER = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[1]) / "quickstart"
folder.mkdir(exist_ok=True)
with open(folder / "starts", "a") as starts:
    starts.write("start\\n")
number = len((folder / "starts").read_text().splitlines())
word = sys.argv[2].split(",")[number - 1]
if word == "wait":
    time.sleep(60)
if word.startswith("saves"):
    (folder / "latest").write_text(f"step_{number:08d}\\n")
sys.exit(int(word.removeprefix("saves")))
"""


def restart(folder: Path, courses: str, *words: str) -> subprocess.Popen:
    launcher = folder / "launcher.py"
    launcher.write_text(LAUNCHER)
    training = ["refiner_ds/train.py", "--set", f"refiner.run.output={folder}"]
    command = [sys.executable, "-m", "refiner_ds.restart", *words, "--", sys.executable, str(launcher), str(folder)]
    return subprocess.Popen(
        [*command, courses, *training], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )


def starts(folder: Path) -> int:
    file = folder / "quickstart" / "starts"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize(
    "courses, words, code, count, said",
    [
        ("saves75,saves1,0", (), 0, 3, "restart 2 of at most 20"),
        ("saves75,saves75,saves75", ("--times", "1"), 75, 2, "which is all --times allows"),
        ("saves75,1,0", (), 1, 2, "saved no checkpoint since it was started: not started again"),
        ("saves3,0", (), 3, 1, ""),
        ("saves2,0", (), 2, 1, ""),
    ],
)
def test_a_run_is_started_again_where_that_helps(
    courses: str, words: tuple[str, ...], code: int, count: int, said: str, tmp_path: Path
) -> None:
    process = restart(tmp_path, courses, *words)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, starts(tmp_path)) == (code, count) and said in err, err


def test_a_request_to_stop_ends_it_and_is_passed_on(tmp_path: Path) -> None:
    process = restart(tmp_path, "wait,0")
    end = time.monotonic() + 120
    while not starts(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(50) == 75 and starts(tmp_path) == 1


def test_what_is_no_training_command_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "refiner_ds.restart", "--", "sleep", "1"],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "sleep 1: give a command that runs refiner_ds/train.py, after --" in done.stderr
