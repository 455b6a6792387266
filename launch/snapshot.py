"""The code a job will run: a copy beside its results, so that later edits change no job that waits or restarts.

    <run folder>/code/<job id>/
      refiner_ds  launch  ds_configs    as they were when the job was submitted
      run.json  job.json                the resolved run file; what was asked of the cluster
      commit  uncommitted.patch         where they came from, if git knows
      manifest.json                     size of every file above; written last

A snapshot is small: it is source, and holds neither weights nor data. Each job has its own: a later submission moves
nothing under one that runs. Those of ended jobs are kept while they are among the newest.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import refiner_ds
from refiner_ds.errors import LaunchError
from refiner_ds.run_folder import RunFolder
from refiner_ds.versions import ask_git, commit

if TYPE_CHECKING:  # jobs.py reads snapshots, and need not load the schema of run files for it
    from refiner_ds.config import RunFile

ROOT = Path(refiner_ds.__file__).resolve().parents[1]  # a clone, or the folder a wheel was installed into
RUN_FILE, JOB_FILE, MANIFEST = "run.json", "job.json", "manifest.json"
KEPT = 5  # snapshots of ended jobs


def sources(root: Path) -> dict[str, Path]:
    """The folders of the code under ``root``, by their place in a snapshot."""
    package = root / "refiner_ds"
    if (package / "launch").is_dir():  # a wheel holds all of it in one package
        return {"refiner_ds": package}
    # The job looks for itself under the name it was pickled by, which an installed clone's command has longer.
    launch = str(__package__).replace(".", "/")
    return {"refiner_ds": package, launch: root / "launch", "ds_configs": root / "ds_configs"}


class Snapshot:
    """A copy of the code that waits, under a name of its own, for its job's number.

    Args:
        job: what the supervisor has to know, as JSON.
    """

    def __init__(self, run: RunFile, job: dict[str, Any], root: Path | None = None) -> None:
        root = root or ROOT
        self.run_folder = RunFolder(run.folder)
        self._new = self.run_folder.code / f".new-{os.getpid()}"
        shutil.rmtree(self._new, ignore_errors=True)
        self._new.mkdir(parents=True)
        try:
            for place, source in sources(root).items():
                ignored = shutil.ignore_patterns("__pycache__", "*.py[co]", ".*")
                shutil.copytree(source, self._new / place, ignore=ignored)
            (self._new / RUN_FILE).write_text(json.dumps(run.resolved(), indent=2) + "\n")
            (self._new / JOB_FILE).write_text(json.dumps(job, indent=2) + "\n")
            (self._new / "commit").write_text(commit(root) + "\n")
            (self._new / "uncommitted.patch").write_text(ask_git(root, "diff", "HEAD"))
            files = [file for file in self._new.rglob("*") if file.is_file()]
            sizes = {str(file.relative_to(self._new)): file.stat().st_size for file in sorted(files)}
            (self._new / MANIFEST).write_text(json.dumps(sizes, indent=0))
        except BaseException:
            self.discard()
            raise

    def assign(self, job_id: str) -> Path:
        """Give it to the job that has just been submitted. Returns its folder."""
        folder = self.run_folder.code / job_id
        shutil.rmtree(folder, ignore_errors=True)  # of a job of the same number: this machine's process ids come again
        self._new.rename(folder)
        return folder

    def discard(self) -> None:
        """Leave no copy where there is no job."""
        shutil.rmtree(self._new, ignore_errors=True)


def prune(run_folder: RunFolder) -> None:
    """Delete all but the newest snapshots; called while no job of the run waits or runs."""
    folders = [folder for folder in run_folder.code.iterdir() if folder.is_dir()] if run_folder.code.is_dir() else []
    for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime)[: -KEPT or None]:
        shutil.rmtree(folder, ignore_errors=True)


def check_code(code: Path) -> None:
    """Refuse to run from a snapshot that has lost files, or from other code than the snapshot's.

    Raises:
        LaunchError: a file is missing or cut, or the code of an installed package has come in its place.
    """
    running = Path(refiner_ds.__file__).resolve()
    if not running.is_relative_to(code.resolve()):
        raise LaunchError(
            f"{code}: refiner_ds comes from {running.parent} instead; the snapshot is damaged: submit again"
        )
    try:
        listed: dict[str, int] = json.loads((code / MANIFEST).read_text())
    except (OSError, ValueError):
        raise LaunchError(
            f"{code / MANIFEST}: missing or damaged; the snapshot was purged in part: submit again"
        ) from None
    for name, size in listed.items():
        file = code / name
        if not file.is_file() or file.stat().st_size != size:
            raise LaunchError(f"{file}: missing or cut; the snapshot was purged in part: submit again")
