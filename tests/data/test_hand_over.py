"""Batches get to a device through memory that is used in turn, a batch ahead, and are read when they are there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from refiner_ds.data import hand_over
from refiner_ds.data.augment import EvalSettings
from refiner_ds.data.batch import Batch
from refiner_ds.data.hand_over import SLOTS, HandOver
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import eval_batches, train_batches
from refiner_ds.data.shared_memory import PackedBatch, packed_size
from tests.data.test_loader import PLAIN, tensors_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_handed_over_are_those_of_the_loader_in_two_pieces_of_memory(
    make_set: Callable[..., ShardIndex], workers: int
) -> None:
    how = {"global_batch": 6, "micro_batch": 6, "rank": 0, "world_size": 1, "seed": 0, "workers": workers}
    index, places = make_set(40), set()
    alone = train_batches(index, PLAIN, **{**how, "workers": 0})  # type: ignore[arg-type]
    running = train_batches(index, PLAIN, **how).handed_over(CPU)  # type: ignore[arg-type]
    for one, other in zip(islice(running, 12), alone, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(other), strict=True))
        places.add(one.images_BHWC.untyped_storage().data_ptr())
    running.close()
    assert len(places) == SLOTS


class Log:
    """As much of torch as a hand-over uses, of a GPU that is not there: what is asked of it is written down."""

    uint8, Tensor = torch.uint8, torch.Tensor

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.streams = ["compute"]
        log, counter = self, iter(range(99))

        class Bytes(torch.Tensor):
            def to(self, *_: Any, non_blocking: bool = False) -> torch.Tensor:  # type: ignore[override]
                assert non_blocking
                log.lines.append(f"copy of {int(self[0])} on {log.streams[-1]}")
                return self.clone()

            def record_stream(self, stream: Any) -> None:
                log.lines.append(f"{int(self[0])} is used on {stream.name}")

        class Event:
            def __init__(self) -> None:
                self.number = next(counter)

            def record(self, stream: Any) -> None:
                log.lines.append(f"event {self.number} on {stream.name}")

            def synchronize(self) -> None:
                log.lines.append(f"host waits for event {self.number}")

        @contextmanager
        def stream(one: Any) -> Any:
            log.streams.append(one.name)
            yield
            log.streams.pop()

        compute = SimpleNamespace(
            name="compute", wait_event=lambda event: log.lines.append(f"compute waits for event {event.number}")
        )
        self.cuda = SimpleNamespace(
            Stream=lambda device: SimpleNamespace(name="copies"), Event=Event, stream=stream,
            current_stream=lambda device: compute,
        )  # fmt: skip
        self.pinned: list[bool] = []
        self._bytes = Bytes

    def empty(self, size: int, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        if size:
            self.pinned.append(pin_memory)
        return torch.zeros(size, dtype=dtype).as_subclass(self._bytes)


def test_a_gpu_copies_the_next_batch_beside_the_step_and_no_memory_is_used_too_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU: the order of what is asked of one."""
    log = Log()
    monkeypatch.setattr(hand_over, "torch", log)
    way: Any = HandOver(torch.device("cuda", 0))
    assert way.ahead == 1

    def begin(number: int) -> Any:
        batch = Batch(*(torch.full((1,), number, dtype=torch.uint8) for _ in range(4)))
        bytes_n = way.room(packed_size(batch))
        return way.begin(PackedBatch.pack(batch, memory_n=bytes_n), bytes_n)

    first, second = begin(10), begin(11)
    assert log.lines == ["copy of 10 on copies", "event 0 on copies", "copy of 11 on copies", "event 1 on copies"]
    log.lines.clear()
    assert int(way.finish(first).images_BHWC) == 10
    assert log.lines == ["compute waits for event 0", "10 is used on compute"]  # and not for the one after it
    log.lines.clear()
    begin(12)  # into the slot of the first
    assert log.lines == ["host waits for event 0", "copy of 12 on copies", "event 2 on copies"]
    assert int(way.finish(second).images_BHWC) == 11
    assert log.pinned == [True, True]


def test_a_loop_over_a_gpus_batches_is_one_ahead_and_gets_them_all(
    make_set: Callable[..., ShardIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HandOver, "__init__", _ahead(HandOver.__init__))
    begun: list[int] = []
    begin = HandOver.begin
    monkeypatch.setattr(HandOver, "begin", lambda self, *given: (begun.append(1), begin(self, *given))[1])
    batches = eval_batches(make_set(10), EvalSettings(8, 1.0), batch=4, rank=0, world_size=1)
    seen = []
    for number, batch in enumerate(batches.handed_over(CPU), start=1):
        assert len(begun) == min(number + 1, 3)
        seen += batch.sample_B[batch.valid_B].tolist()
    assert seen == list(range(10))


def _ahead(init: Callable[..., None]) -> Callable[..., None]:
    def made(self: HandOver, device: torch.device) -> None:
        init(self, device)
        self.ahead = 1

    return made
