"""A job runs the code it was submitted with, whatever happens to the clone afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import snapshot, supervisor
from launch.snapshot import KEPT, MANIFEST, Snapshot, prune, sources
from refiner_ds.config import RunFile, load
from refiner_ds.run_folder import RunFolder

from .conftest import Clone

OWN = {"run.json", "job.json", "commit", "uncommitted.patch", "manifest.json"}
CHECK = "from pathlib import Path; from launch.snapshot import check_code; check_code(Path.cwd())"


@pytest.fixture
def run(clone: Clone) -> RunFile:
    return load(clone.root / "ds_configs/quickstart.json", [f"refiner.run.output={clone.output}"])


def take(run: RunFile, root: Path, job_id: str = "7") -> Path:
    return Snapshot(run, {"nodes": 1}, root).assign(job_id)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_snapshot_is_the_source_and_nothing_else(clone: Clone, run: RunFile) -> None:
    folders = sources(clone.root).items()
    source = {f"{place}/{name}": text for place, folder in folders for name, text in files(folder).items()}
    (clone.root / "launch/__pycache__").mkdir()
    (clone.root / "launch/__pycache__/job.pyc").write_bytes(b"compiled")
    copied = files(take(run, clone.root))
    assert not list((run.folder / "code").rglob("__pycache__"))
    assert copied.keys() - source.keys() == OWN
    assert {name: copied[name] for name in source} == source
    assert json.loads(copied["manifest.json"]).keys() == copied.keys() - {"manifest.json"}


def test_the_resolved_run_file_in_it_is_the_same_run(clone: Clone, run: RunFile) -> None:
    again = load(take(run, clone.root) / "run.json")
    assert again.resolved() == run.resolved()
    assert again.folder == run.folder


def test_uncommitted_changes_are_kept_beside_the_commit(clone: Clone, run: RunFile) -> None:
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(clone.root))
    for words in (("init", "-q"), ("add", "launch/follow.py"), ("commit", "-qm", "one")):
        subprocess.run((*git, *words), check=True)
    (clone.root / "launch/follow.py").write_text("edited\n")
    code = take(run, clone.root)
    assert (code / "commit").read_text().strip().endswith("-dirty")
    assert "+edited" in (code / "uncommitted.patch").read_text()


def test_each_job_has_its_own_and_the_old_ones_are_pruned(clone: Clone, run: RunFile) -> None:
    first = take(run, clone.root, "7")
    before = files(first)
    (clone.root / "launch/local.py").unlink()
    (clone.root / "launch/follow.py").write_text("edited\n")
    second = take(run, clone.root, "8")
    assert files(first) == before
    assert not (second / "launch/local.py").exists() and (second / "launch/follow.py").read_text() == "edited\n"
    for number in range(9, 9 + KEPT):
        take(run, clone.root, str(number))
        os.utime(run.folder / "code" / str(number), (time.time() + number,) * 2)
    prune(RunFolder(run.folder))
    assert sorted(int(entry.name) for entry in (run.folder / "code").iterdir()) == list(range(9, 9 + KEPT))


def test_a_failed_snapshot_leaves_nothing(clone: Clone, run: RunFile) -> None:
    before = files(take(run, clone.root))
    (clone.root / "launch/lost.py").symlink_to("nowhere")
    with pytest.raises(Exception, match="lost"):
        take(run, clone.root, "8")
    assert files(run.folder / "code") == {f"7/{name}": text for name, text in before.items()}


@pytest.mark.parametrize("loss", ["refiner_ds/models/stem.py", "refiner_ds/models", MANIFEST, "cut", None])
def test_a_snapshot_that_lost_files_is_not_run(loss: str | None, clone: Clone, run: RunFile) -> None:
    code = take(run, clone.root)
    if loss == "cut":
        (code / "refiner_ds/errors.py").open("a").write("\n# one line more\n")
    elif loss:
        subprocess.run(("rm", "-r", str(code / loss)), check=True)
    environment = {**os.environ, "PYTHONPATH": f"{code}:{clone.root}"}  # as where a clone is installed, too
    done = subprocess.run((sys.executable, "-c", CHECK), cwd=code, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (loss is None)
    assert loss is None or "submit again" in done.stderr


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"profile": {}, "nodes": 1', b"\0" * 9, None])
def test_a_supervisor_without_its_job_ends_with_one_sentence(
    damage: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    file = RunFolder(tmp_path).code / "7" / "job.json"
    file.parent.mkdir(parents=True)
    if damage is not None:
        file.write_bytes(damage)
    before = sorted(tmp_path.rglob("*"))
    assert supervisor.main([str(tmp_path), "--", "true"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {file}: missing or cut; the snapshot is damaged: submit again\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_another_installation_in_place_of_a_purged_package_is_noticed(clone: Clone, run: RunFile) -> None:
    code = take(run, clone.root)
    subprocess.run(("rm", "-r", str(code / "refiner_ds")), check=True)
    environment = {**os.environ, "PYTHONPATH": f"{code}:{clone.root}"}
    done = subprocess.run((sys.executable, "-c", CHECK), cwd=code, env=environment, capture_output=True, text=True)
    assert f"refiner_ds comes from {clone.root}/refiner_ds instead" in done.stderr


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
    code = take(run, clone.root)
    done = subprocess.run((sys.executable, "-c", job), cwd=code, env={**os.environ, "PYTHONPATH": str(code)}, stdout=-1)
    assert done.stdout.decode().strip() == str(code / "refiner_ds/launch/job.py")
