"""How long a rank that stops goes unnoticed, with the limits that a run has by default.

    python -m tests.drill.stopped --times 3

Two real processes train a tiny model. After some steps one of them is sent STOP, and two moments are noted: when it is
named (the verdict in heartbeats/), and when both have left, with exit code 75.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from refiner_ds.exit_codes import RUN_AGAIN
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.metrics import read_metrics
from refiner_ds.training.world import free_port
from tests.drill.course import KEYS
from tests.training.launched import ROOT, environment

STEPS = 20  # before it is stopped: the first ones may take long
PATIENCE_SECONDS = 300.0  # in which whatever is waited for happens
LOOK_SECONDS = 0.05


@contextmanager
def training(output: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two ranks that train until they are ended."""
    keys = {key: value for key, value in KEYS.items() if key != "refiner.run.hang_seconds"}
    keys |= {"refiner.run.output": str(output), "refiner.recipe.epochs": 1000}
    sets = [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(ROOT / "refiner_ds" / "train.py"), *sets]
    with (output / "said").open("wb") as said:
        ranks = [
            subprocess.Popen(
                command, cwd=ROOT, env=environment(**group, RANK=str(rank), LOCAL_RANK=str(rank)),
                stdout=said, stderr=said, start_new_session=True,
            )
            for rank in range(2)
        ]  # fmt: skip
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def seconds_until_named(output: Path, stopped: int) -> tuple[float, float]:
    """Seconds from STOP of a rank until it is named, and until both have left."""
    run = RunFolder(output / "quickstart")
    verdict = run.heartbeats / "verdict.json"
    with training(output) as ranks:
        _until(lambda: len(read_metrics(run.path, "train")) >= STEPS, output)
        os.kill(ranks[stopped].pid, signal.SIGSTOP)
        at = time.monotonic()
        _until(verdict.exists, output)
        named = time.monotonic() - at
        _until(lambda: None not in [rank.poll() for rank in ranks], output)
        left = time.monotonic() - at
        codes = [rank.returncode for rank in ranks]
    said = (output / "said").read_text()
    assert codes == [RUN_AGAIN] * 2 and f": rank {stopped} (process {ranks[stopped].pid} " in said, said[-3000:]
    assert json.loads(verdict.read_text())["ranks"] == [stopped]
    return named, left


def _until(true: Callable[[], bool], output: Path) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < end, (output / "said").read_text()[-3000:]
        time.sleep(LOOK_SECONDS)


def main() -> int:
    """Stop ranks in turn; prints a line each."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.drill.stopped", description=summary)
    parser.add_argument("--times", type=int, default=3, metavar="N", help="how often (default: 3)")
    options = parser.parse_args()
    for number in range(options.times):
        with tempfile.TemporaryDirectory(prefix="refiner_stopped_") as folder:
            named, left = seconds_until_named(Path(folder), number % 2)
        print(f"rank {number % 2} stopped: named after {named:.1f} s, both left after {left:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
