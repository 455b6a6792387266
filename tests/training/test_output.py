"""A run outlasts whoever reads what it prints."""

from __future__ import annotations

import subprocess
import sys

from tests.training.launched import ROOT, environment

PRINTS = """
import sys
from refiner_ds.training.output import lasting_output
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
