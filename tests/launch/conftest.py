"""Fixtures of the launcher's tests: a Slurm of their own, and a clone whose training is small."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from launch import snapshot, submission
from launch.allocation import Allocation
from launch.cluster import ClusterProfile
from refiner_ds.config import load
from tests.slurm.cluster import SlurmCluster
from tests.slurm.fixture import slurm, slurm_of_session  # noqa: F401  (fixtures: pytest finds them by name here)

ROOT = Path(__file__).resolve().parents[2]
Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Clone:
    """A fresh clone of the code, whose ``refiner_ds/train.py`` may be the double, and the place its results go."""

    root: Path
    output: Path
    cache: Path
    name: str = "quickstart"

    @property
    def run_folder(self) -> Path:
        """Where the results of its run go."""
        return self.output / self.name

    @staticmethod
    def with_double(folder: Path, cache: Path) -> Clone:
        """A clone in ``folder`` whose training is the double."""
        root = folder / "clone"
        for part in ("refiner_ds", "launch", "ds_configs"):
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(Path(__file__).with_name("double_of_train.py"), root / "refiner_ds/train.py")
        return Clone(root, folder / "runs", cache)

    def another(self, name: str) -> Clone:
        """The same clone for a run of another name."""
        return replace(self, name=name)

    def behave(self, **how: Any) -> None:
        """Tell the double how to leave; see double_of_train.py. Ranks are spelt r0, r1, …"""
        self.output.mkdir(exist_ok=True)
        ranks = {key.removeprefix("r"): value for key, value in how.items() if key != "reduce"}
        behaviour = {**ranks, "reduce": how.get("reduce", False)}
        (self.output / f"{self.name}.behaviour.json").write_text(json.dumps(behaviour))

    def train_for_real(self) -> None:
        """Put training itself where the double is."""
        shutil.copy(ROOT / "refiner_ds/train.py", self.root / "refiner_ds/train.py")

    def command(self, *words: str) -> tuple[str, ...]:
        """``python <root>/launch/submit.py …`` with its results under ``output``."""
        place = ("--set", f"refiner.run.output={self.output}", "--set", f"refiner.run.name={self.name}")
        return (sys.executable, str(self.root / "launch/submit.py"), *place, *words)

    def submit(
        self, *words: str, env: dict[str, str] | None = None, seconds: float = 120, cwd: Path | None = None
    ) -> Done:
        """Type the command, in some other folder than the clone unless told, and wait for it."""
        return subprocess.run(
            self.command(*words),
            cwd=cwd or self.output.parent,
            env={**os.environ, **(env or {}), "REFINER_DS_CACHE": str(self.cache)},
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def seen(self) -> dict[str, dict[str, Any]]:
        """What the double wrote down: {"<rank>.<attempt>": …}."""
        files = sorted((self.run_folder / "seen").glob("[0-9]*.json"))
        return {file.name.removesuffix(".json"): json.loads(file.read_text()) for file in files}

    def wait_for(self, *ranks_and_attempts: str, seconds: float = 60) -> None:
        """Wait until the double has run as these."""
        end = time.monotonic() + seconds
        while not set(ranks_and_attempts) <= set(self.seen()):
            assert time.monotonic() < end, f"saw {sorted(self.seen())} in {seconds:.0f} s; {self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """Every log of every job."""
        return "\n".join(f"{file.name}:\n{file.read_text()}" for file in self.run_folder.glob("jobs/*_log.out"))

    def submit_here(
        self,
        cluster: SlurmCluster,
        nodes: int = 1,
        gpus: int = 0,
        *,
        batch: int = 48,
        least: int | None = None,
        dependency: str = "",
        overrides: tuple[str, ...] = (),
        **profile: Any,
    ) -> str:
        """Submit in this process, which costs no start of another; unchecked. Returns the job's number."""
        named = (f"refiner.run.output={self.output}", f"refiner.run.name={self.name}", f"train_batch_size={batch}")
        run = load(self.root / "ds_configs/quickstart.json", [*named, *overrides])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapshot, "ROOT", self.root)
            for key, value in {**cluster.env, "REFINER_DS_CACHE": str(self.cache)}.items():
                patch.setenv(key, value)
            known = ClusterProfile(gpus_per_node=gpus, cpus_per_task=1, **profile)
            allocation = Allocation(run, known, nodes, gpus, cpus_per_task=1, min_nodes=least)
            return submission.submit(allocation, dependency=dependency).job_id


def processes(*words: str) -> list[int]:
    """Process ids on this machine, nodes included, of commands that have these words or words that hold them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if all(any(word in part for part in command) for word in words) and command[0] != "srun":
                found.append(int(process.name))
    return found


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where packaged sets are made, once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def clone(tmp_path: Path, cache: Path) -> Clone:
    """A fresh clone with the double for training."""
    return Clone.with_double(tmp_path, cache)


@pytest.fixture
def no_slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine on which Slurm was never installed."""
    empty = tmp_path / "bin"
    empty.mkdir()
    return {"PATH": str(empty)}


@pytest.fixture
def job_id() -> Callable[[Done], str]:
    """The job that a submission says it made."""

    def read(done: Done) -> str:
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[1].rstrip(":")

    return read
