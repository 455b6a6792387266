"""The fault table of docs/cluster.md: faults on a real Slurm while the quickstart trains on two nodes.

    python -m tests.launch.drills [WORD …]     prints a row for each fault that has one of the words; some minutes

Seconds are those from the fault to the next logged step; steps lost are those that were logged and done again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.attempts import Attempts
from refiner_ds.run_folder import RunFolder
from tests.slurm.cluster import SlurmCluster

from .conftest import ROOT, Clone, processes

SMALL = (
    *(
        "refiner.model.depth=2",
        "refiner.recipe.epochs=20",
        "refiner.recipe.warmup_epochs=0.5",
        "refiner.run.log_steps=1",
    ),
    *("refiner.recipe.cooldown_epochs=0", "refiner.run.eval_epochs=100", "refiner.run.picture_epochs=null"),
    *("train_batch_size=120", "refiner.run.checkpoint_epochs=0.25", "refiner.run.hang_seconds=10"),
)
SECONDS = 240


class Drill:
    """A run of two nodes that is disturbed."""

    def __init__(self, clone: Clone, slurm: SlurmCluster) -> None:
        self.clone, self.slurm = clone, slurm
        self.folder = RunFolder(clone.run_folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            self.job = clone.submit_here(slurm, nodes=2, batch=120, overrides=SMALL, partition="low")

    def steps(self) -> list[tuple[int, float]]:
        """Steps that were logged, and when."""
        try:
            lines = [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]
        except (OSError, ValueError):
            return []
        return [(line["step"], line["time"]) for line in lines if line["kind"] == "train"]

    def until(self, true: Callable[[], object], what: str) -> None:
        end = time.monotonic() + SECONDS
        while not true():
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {SECONDS} s\n{self.clone.logs()}")
            time.sleep(0.1)

    def processes(self, rank: int) -> list[int]:
        """Numbers, outside the nodes' namespaces, of a rank's training process."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
                words = (process / "cmdline").read_bytes()
            except OSError:
                continue
            task = b"submitit.core._submit" in words and str(self.folder).encode() in words
            if task and b"SLURM_PROCID=%d" % rank in environment and b"srun" not in words:
                found.append(int(process.name))
        return found

    def disturb(self, fault: Callable[[Drill], None]) -> str:
        """Do it once the run has saved and gone on; the row's figures."""
        self.until(lambda: self.folder.latest_checkpoint() and len(self.steps()) > 5, "the first checkpoint")
        at, done = time.time(), 0  # a resumed run drops the lines of steps that it does again
        fault(self)

        def goes_on() -> bool:
            nonlocal done
            again = self._after_restart(at)
            done = done if again else max([done, *(step for step, _ in self.steps())])
            return bool(again)

        self.until(goes_on, "the next step")
        again, when = self._after_restart(at)[0]
        attempts = Attempts.of(self.folder, self.job).records
        causes = ", ".join(record.cause or "lost" for record in attempts[:-1])
        self.slurm.cancel_all()
        return f"{when - at:.0f} | {max(0, done - again + 1)} | {causes}"

    def _after_restart(self, at: float) -> list[tuple[int, float]]:
        records = Attempts.of(self.folder, self.job).records
        started = records[-1].started if len(records) > 1 and records[-1].ended is None else float("inf")
        return [(step, when) for step, when in self.steps() if when > max(at, started)]


def kill(rank: int, number: int) -> Callable[[Drill], None]:
    def fault(drill: Drill) -> None:
        for process in drill.processes(rank):
            os.kill(process, number)

    return fault


def client(*words: str) -> Callable[[Drill], None]:
    return lambda drill: print(drill.slurm.client(*(word.replace("JOB", drill.job) for word in words)), end="")


def lose_node(drill: Drill) -> None:
    node = Attempts.of(drill.folder, drill.job).records[-1].nodes
    drill.slurm.node_down("node2" if "2" in node else "node4")


def preempt(drill: Drill) -> None:
    drill.slurm.client("sbatch", "--parsable", "-N4", "-c4", "--output=/dev/null", "--wrap", "sleep 1")


def controller_away(drill: Drill) -> None:
    drill.slurm.controller_down()
    kill(0, signal.SIGUSR2)(drill)
    time.sleep(15)
    drill.slurm.controller_up()


def kill_supervisor(drill: Drill) -> None:
    for process in processes("launch.supervisor", str(drill.folder)):
        os.kill(process, signal.SIGKILL)


FAULTS: dict[str, Callable[[Drill], None]] = {
    "a rank is killed (signal 9)": kill(1, signal.SIGKILL),
    "rank 0 is killed (signal 9)": kill(0, signal.SIGKILL),
    "a rank hangs (signal STOP; hang_seconds 10)": kill(1, signal.SIGSTOP),
    "the time limit comes near, or USR2 by hand": client("scancel", "--signal=USR2", "JOB"),
    "scontrol requeue": client("scontrol", "requeue", "JOB"),
    "preemption with a grace time": preempt,
    "the controller is away for 15 s at the requeue": controller_away,
    "the supervisor is killed (signal 9)": kill_supervisor,
    "a node is lost": lose_node,
}


def main(words: list[str]) -> int:
    """Print the table, of those faults alone that are named."""
    faults = {name: fault for name, fault in FAULTS.items() if not words or any(word in name for word in words)}
    print("| fault | seconds to the next step | steps lost | reported as |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory(prefix="drills-") as folder, SlurmCluster(nodes=4) as slurm:
        base = Clone(ROOT, Path(folder) / "runs", Path(folder) / "cache")
        for number, (name, fault) in enumerate(faults.items()):
            row = Drill(base.another(f"drill{number}"), slurm).disturb(fault)
            print(f"| {name} | {row} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
