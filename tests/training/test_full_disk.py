"""A disk that fills up costs the save that met it, and nothing else: one sentence, nothing left, another try."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refiner_ds.checkpoint.files import integrity_errors
from refiner_ds.errors import ConfigError
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.metrics import Metrics, read_metrics
from refiner_ds.training.resuming import refuse_full_disk
from tests.data.small_disk import SmallDisk, on_small_disk
from tests.training.saving import checkpoints_of, kept, save

COUNT = 1 << 20  # a weight of 4 MiB: a checkpoint of 16


@pytest.mark.parametrize("full_of", ["bytes before", "bytes meanwhile", "files"])
def test_a_save_that_finds_no_room_fails_in_one_sentence_and_the_next_one_succeeds(
    full_of: str, tmp_path: Path
) -> None:
    def test(disk: SmallDisk) -> None:
        checkpoints = checkpoints_of(disk.folder, 1, count=COUNT)
        good = save(checkpoints, 10).folder
        assert good is not None
        used, files = disk.used()
        if full_of == "files":
            disk.resize(files=files + 2)  # the folder, and one file in it
        else:
            disk.resize(used + (10 << 20))
        if full_of == "bytes meanwhile":
            checkpoints._bytes = 0  # as if the room had been there when the save began
        failed = save(checkpoints, 20)
        assert failed.folder is None and failed.finite
        place = f"{disk.folder}/checkpoints/step_00000020: a checkpoint needs "
        tail = "bytes free (a quota, or the number of files)" if full_of != "bytes before" else "bytes free"
        assert failed.failure.startswith(place) and failed.failure.endswith(tail), failed.failure
        assert kept(disk.folder) == ["step_00000010"] and not integrity_errors(good)
        assert not list((disk.folder / "checkpoints").glob(".writing_*"))
        assert RunFolder(disk.folder).latest_checkpoint() == good
        disk.resize()
        assert save(checkpoints, 30).folder == checkpoints.newest()
        assert kept(disk.folder) == ["step_00000030"]

    on_small_disk(tmp_path, test)


def test_metrics_that_find_no_room_are_lost_and_later_ones_are_not(tmp_path: Path) -> None:
    def test(disk: SmallDisk) -> None:
        run = RunFolder(disk.folder)
        metrics = Metrics(run, 0)
        for step in range(1, 10):
            if step == 4:
                disk.resize(disk.used()[0])
            if step == 7:
                disk.resize()
            metrics.write("train", step, step / 10, step * 48, loss=float(step), note="x" * 3000)
        metrics.close()
        assert [line["step"] for line in read_metrics(run.path)][-3:] == [7, 8, 9]
        assert {1, 2, 3} <= {line["step"] for line in read_metrics(run.path)}

    on_small_disk(tmp_path, test)


def test_a_disk_without_room_for_one_checkpoint_is_refused_at_the_start(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "not" / "yet")
    refuse_full_disk(run, 1)
    with pytest.raises(ConfigError, match=f"{run.path}: a checkpoint needs 9{',000' * 6} bytes and .* free; free some"):
        refuse_full_disk(run, 9 * 10**18)
    assert not (tmp_path / "not").exists()


def test_a_checkpoints_list_names_bytes_and_checksum(tmp_path: Path) -> None:
    folder = save(checkpoints_of(tmp_path, 1), 10).folder
    assert folder is not None
    listed = json.loads((folder / "complete.json").read_text())
    assert listed.keys() == {file.name for file in folder.iterdir()} - {"complete.json"}
    assert all(size == (folder / name).stat().st_size and len(digest) == 64 for name, (size, digest) in listed.items())
