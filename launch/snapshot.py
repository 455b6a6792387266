"""The code a job will run: a copy beside its results, so that later edits change no job that waits or restarts.

    <run folder>/code/refiner_ds  launch  ds_configs    as they were when the job was submitted
    <run folder>/code/run.json                          the resolved run file
    <run folder>/code/commit                            where they came from, if git knows

A snapshot is small: it is source, and holds neither weights nor data.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import refiner_ds
from refiner_ds.config import RunFile
from refiner_ds.run_folder import RunFolder

ROOT = Path(refiner_ds.__file__).resolve().parents[1]  # a clone, or the folder a wheel was installed into
RUN_FILE = "run.json"


def sources(root: Path) -> dict[str, Path]:
    """The folders of the code under ``root``, by their place in a snapshot."""
    package = root / "refiner_ds"
    if (package / "launch").is_dir():  # a wheel holds all of it in one package
        return {"refiner_ds": package}
    # The job looks for itself under the name it was pickled by, which an installed clone's command has longer.
    launch = str(__package__).replace(".", "/")
    return {"refiner_ds": package, launch: root / "launch", "ds_configs": root / "ds_configs"}


def take_snapshot(run: RunFile, root: Path = ROOT) -> Path:
    """Copy the code under ``root`` into the run folder, in place of an earlier copy, and return its folder."""
    folder = RunFolder(run.folder).code
    new, old = (run.folder / f".code-{which}-{os.getpid()}" for which in ("new", "old"))
    new.mkdir(parents=True)
    try:
        for place, source in sources(root).items():
            shutil.copytree(source, new / place, ignore=shutil.ignore_patterns("__pycache__", "*.py[co]", ".*"))
        (new / RUN_FILE).write_text(json.dumps(run.resolved(), indent=2) + "\n")
        (new / "commit").write_text(_commit(root) + "\n")
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
    return folder


def _commit(root: Path) -> str:
    command = ("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
