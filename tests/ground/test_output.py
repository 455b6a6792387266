"""What prints outlasts whoever reads it, and a disk that has no room for it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from refiner_ds.output import lasting_output
from tests.data.small_disk import SmallDisk, on_small_disk
from tests.training.launched import ROOT, environment

PRINTS = """
import sys
from refiner_ds.output import lasting_output
sys.stdin.readline()
with lasting_output():
    for _ in range(3):
        print("a line that nobody reads", flush=True)
        print("nor this one", file=sys.stderr)
sys.exit(75)
"""


def test_a_broken_pipe_changes_neither_the_run_nor_its_exit_code() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS], cwd=ROOT, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stderr.close()
    process.stdin.write(b"go\n")
    process.stdin.close()
    assert process.wait(60) == 75


REFUSED = """
import sys
from refiner_ds.errors import ConfigError, report_errors

@report_errors
def main():
    raise ConfigError("nobody reads why")

sys.exit(main())
"""


@pytest.mark.parametrize("program, code", [(PRINTS, 75), (REFUSED, 2)])
def test_a_full_disk_changes_neither_the_run_nor_its_exit_code(program: str, code: int) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment(),
            input="go\n", text=True, stdout=full, stderr=full,
        )  # fmt: skip
    assert done.returncode == code


@pytest.mark.parametrize("blocks", ["one block", "a block a line"])
def test_a_log_on_a_full_disk_goes_on_once_there_is_room(blocks: str, tmp_path: Path) -> None:
    def test(disk: SmallDisk) -> None:
        file = disk.folder / "log"
        for_each = lasting_output if blocks == "a block a line" else contextlib.nullcontext
        for_all = lasting_output if blocks == "one block" else contextlib.nullcontext
        with file.open("w", buffering=1) as log, contextlib.redirect_stdout(log), for_all():
            print("x" * 5000)
            disk.resize(disk.used()[0])
            for line in range(100):
                with for_each():
                    print(f"lost {line} " + "x" * 500, flush=True)
            disk.resize()
            for line in range(20):
                with for_each():
                    print(f"kept {line} " + "x" * 500, flush=True)
        lines = file.read_text().splitlines()
        assert [line.split()[1] for line in lines if line.startswith("kept")][-10:] == [str(n) for n in range(10, 20)]
        assert sum(line.startswith("lost") for line in lines) < 40

    on_small_disk(tmp_path, test)
