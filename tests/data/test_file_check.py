"""The first process of each node looks at the shards' sizes, and every process hears what it found."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from refiner_ds.config import RunFile, load
from refiner_ds.data.index import ShardIndex
from refiner_ds.errors import DataError
from refiner_ds.training.preparation import refuse_missing_files
from refiner_ds.training.world import World


def run_file(on_bad_sample: str) -> RunFile:
    return load(overrides=[f"refiner.data.on_bad_sample={on_bad_sample}"])


def one_process(rank: int, rendezvous: str, train: Path, local: list[int], answers: multiprocessing.Queue) -> None:
    """Rank ``rank`` of four on two nodes; the shards are checked where ``local`` says 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=4)
    index, looked = ShardIndex.load(train, check_files=False), []
    found = index.file_errors

    def file_errors() -> list[str]:
        looked.append(rank)
        return found() if rank == 2 else []  # node 1 alone misses a shard

    index.file_errors = file_errors  # type: ignore[method-assign]
    world = World(rank, 4, local[rank], torch.device("cpu"))
    said = ["", ""]
    for number, on_bad in enumerate(("skip", "error")):
        try:
            refuse_missing_files(run_file(on_bad), [index], world)
        except DataError as error:
            said[number] = str(error)
    answers.put((rank, len(looked), *said))
    dist.destroy_process_group()


def test_a_shard_missing_on_one_node_is_found_by_its_first_process_and_refuses_all(
    make_set: Callable[..., ShardIndex], tmp_path: Path
) -> None:
    index = make_set(20)
    (index.folder / index.shards[1].name).unlink()
    spawning = multiprocessing.get_context("fork")
    answers = spawning.Queue()
    running = [
        spawning.Process(target=one_process, args=(rank, tmp_path / "meet", index.folder, [0, 1, 0, 1], answers))
        for rank in range(4)
    ]
    for process in running:
        process.start()
    told = sorted(answers.get(timeout=120) for _ in running)
    for process in running:
        process.join(timeout=60)
    assert [looked for _, looked, *_ in told] == [1, 0, 1, 0]
    assert {skipping for *_, skipping, _ in told} == {""}
    (sentence,) = {erring for *_, erring in told}
    assert "shard-000001.tar: named by index.json but missing" in sentence and "\n" not in sentence


def test_a_process_alone_checks_by_itself(make_set: Callable[..., ShardIndex]) -> None:
    index = make_set(20)
    refuse_missing_files(run_file("error"), [index])
    os.truncate(index.folder / index.shards[0].name, 512)
    refuse_missing_files(run_file("skip"), [index])
    with pytest.raises(DataError, match="shard-000000.tar: 512 bytes"):
        refuse_missing_files(run_file("error"), [index])
