"""A job runs the code it was submitted with, whatever happens to the clone afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import snapshot
from launch.snapshot import sources, take_snapshot
from refiner_ds.config import RunFile, load

from .conftest import Clone


@pytest.fixture
def run(clone: Clone) -> RunFile:
    return load(clone.root / "ds_configs/quickstart.json", [f"refiner.run.output={clone.output}"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_snapshot_is_the_source_and_nothing_else(clone: Clone, run: RunFile) -> None:
    folders = sources(clone.root).items()
    source = {f"{place}/{name}": text for place, folder in folders for name, text in files(folder).items()}
    (clone.root / "launch/__pycache__").mkdir()
    (clone.root / "launch/__pycache__/job.pyc").write_bytes(b"compiled")
    copied = files(take_snapshot(run, clone.root))
    assert not list((run.folder / "code").rglob("__pycache__"))
    assert {"run.json", "commit"} == copied.keys() - source.keys()
    assert {name: copied[name] for name in source} == source


def test_the_resolved_run_file_in_it_is_the_same_run(clone: Clone, run: RunFile) -> None:
    again = load(take_snapshot(run, clone.root) / "run.json")
    assert again.resolved() == run.resolved()
    assert again.folder == run.folder


def test_a_new_snapshot_replaces_the_old_as_a_whole(clone: Clone, run: RunFile) -> None:
    take_snapshot(run, clone.root)
    (clone.root / "launch/local.py").unlink()
    (clone.root / "launch/follow.py").write_text("edited\n")
    folder = take_snapshot(run, clone.root)
    assert not (folder / "launch/local.py").exists()
    assert (folder / "launch/follow.py").read_text() == "edited\n"
    assert [entry.name for entry in run.folder.iterdir()] == ["code"]


def test_a_failed_snapshot_leaves_the_one_before(clone: Clone, run: RunFile) -> None:
    folder = take_snapshot(run, clone.root)
    before = files(folder)
    (clone.root / "launch/lost.py").symlink_to("nowhere")
    with pytest.raises(Exception, match="lost"):
        take_snapshot(run, clone.root)
    assert files(folder) == before
    assert json.loads(before["run.json"])["refiner"]["run"]["name"] == "quickstart"


@pytest.mark.parametrize("installed", ["a clone's command", "a wheel"])
def test_an_installed_command_finds_its_job_in_the_snapshot(
    installed: str, clone: Clone, run: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed, the launcher's name is ``refiner_ds.launch``, and jobs are unpickled by that name."""
    monkeypatch.setattr(snapshot, "__package__", "refiner_ds.launch")
    if installed == "a wheel":
        for folder in ("launch", "ds_configs"):
            (clone.root / folder).rename(clone.root / "refiner_ds" / folder)
    job = "from refiner_ds.launch import job; print(job.__file__)"
    code = take_snapshot(run, clone.root)
    done = subprocess.run((sys.executable, "-c", job), cwd=code, env={**os.environ, "PYTHONPATH": str(code)}, stdout=-1)
    assert done.stdout.decode().strip() == str(code / "refiner_ds/launch/job.py")
