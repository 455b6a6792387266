"""A file that is replaced is the old one or the new one, whatever goes wrong; and names of a run folder are one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from refiner_ds.files import sha256_of, write_atomically
from refiner_ds.run_folder import RunFolder, State, read_state


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.json"
    write_atomically(file, "old")

    def no_room(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "new")
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_text_and_bytes_arrive_as_given(tmp_path: Path) -> None:
    for name, data in (("text", "w̄\n"), ("bytes", bytes(range(256)))):
        write_atomically(tmp_path / name, data)
        written = data.encode() if isinstance(data, str) else data
        assert (tmp_path / name).read_bytes() == written
        assert sha256_of(tmp_path / name) == hashlib.sha256(written).hexdigest()


def test_a_run_folder_names_its_newest_checkpoint_and_sorts_them_by_step(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.latest_checkpoint() is None and run.saved_checkpoints() == []
    for step in (100_000_000, 99_999_999, 20):
        run.checkpoint(step).mkdir(parents=True)
    (run.checkpoints / ".writing_step_00000030").mkdir()
    (run.checkpoints / "step_mine").mkdir()
    assert [path.name for path in run.saved_checkpoints()] == ["step_00000020", "step_99999999", "step_100000000"]
    run.latest_file.write_text("step_00000020\n")
    newest = run.latest_checkpoint()
    assert newest == run.checkpoint(20)
    (newest / "state.json").write_text('{"step": 20, "samples": 960, "epoch": 0.5, "world_size": 2}')
    assert read_state(newest) == State(20, 960, 0.5, 2)
