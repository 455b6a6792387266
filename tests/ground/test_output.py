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


BUFFERED = {**environment(), "PYTHONUNBUFFERED": ""}  # as most people have it: what is printed is written at the end
REPORTS = """
import argparse, sys
from refiner_ds.errors import report_errors

sys.stdin.readline()

@report_errors
def main():
    if sys.argv[1] == "--help":
        argparse.ArgumentParser().parse_args()
    for _ in range(int(sys.argv[1])):
        print("a line of a long report")
    return 0

sys.exit(main())
"""


@pytest.mark.parametrize("lines, codes", [(1, {141}), (100_000, {141}), ("--help", {0, 141})])  # argparse minds nothing
def test_a_command_that_is_cut_short_by_head_ends_without_a_word(lines: int | str, codes: set[int]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", REPORTS, str(lines)], cwd=ROOT, env=BUFFERED,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) in codes and process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_report_that_finds_no_room_is_an_error_in_one_sentence(lines: int) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", REPORTS, str(lines)], cwd=ROOT, env=BUFFERED, text=True, stdout=full,
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
    said = "error: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


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
