"""What tests cost is counted whole: nothing twice, and nothing becomes less when processes end."""

from __future__ import annotations

import functools
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest

from tests.costs import TICKS, Identity, Meter, Process, processes, seconds

BURNT = 0.3
ROUNDING = 5 / TICKS


def alone(test: Callable[[], None]) -> Callable[[], None]:
    """A test that runs in a process without other children, such as what earlier tests of the worker have left on."""

    @functools.wraps(test)
    def runs() -> None:
        process = os.fork()
        if not process:
            try:
                test()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == 0

    return runs


def burn(seconds: float = BURNT) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@contextmanager
def forked(does: Callable[[], None]) -> Iterator[int]:
    """A process that does something and then waits for its end, which comes with the block at the latest."""
    process = os.fork()
    if not process:
        try:
            does()
            signal.pause()
        finally:
            os._exit(0)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def burnt_by(process: int) -> float:
    """Wait until a process sleeps; returns its CPU seconds."""
    while True:
        (one,) = (seen for (pid, _), seen in processes().items() if pid == process)
        with open(f"/proc/{process}/stat") as stat:
            if one.own >= BURNT - ROUNDING and stat.read().rpartition(")")[2].split()[0] == "S":
                return one.own
        time.sleep(0.01)


def others(meter: Meter) -> float:
    """CPU seconds that a meter reads, less those of this process."""
    mine = seconds(resource.getrusage(resource.RUSAGE_SELF))
    return meter.read() - mine


@alone
def test_what_a_process_used_is_counted_once_while_it_lives_and_when_it_was_waited_for() -> None:
    meter = Meter()
    assert others(meter) == pytest.approx(0, abs=ROUNDING)
    with forked(burn) as child:
        used = burnt_by(child)
        assert others(meter) == pytest.approx(used, abs=ROUNDING)
        os.kill(child, signal.SIGKILL)
        _, _, usage = os.wait4(child, 0)  # to end costs a process that has much in memory some more
    assert others(meter) == pytest.approx(seconds(usage), abs=ROUNDING)


@alone
def test_what_loses_its_parent_is_followed() -> None:
    """A launcher killed outright, its rank left over."""
    reading, writing = os.pipe()

    def launch() -> None:
        rank = os.fork()
        if not rank:
            signal.signal(signal.SIGUSR1, lambda *_: burn())
            burn()
            while True:
                signal.pause()
        os.write(writing, f"{rank}\n".encode())

    meter = Meter()
    with forked(launch) as launcher, os.fdopen(reading) as told:
        os.close(writing)
        rank = int(told.readline())
        try:
            used = burnt_by(rank)
            meter.read()
            os.kill(launcher, signal.SIGKILL)
            os.waitpid(launcher, 0)
            os.kill(rank, signal.SIGUSR1)
            while burnt_by(rank) < used + BURNT - ROUNDING:
                time.sleep(0.01)
            assert others(meter) >= used + BURNT - 2 * ROUNDING
        finally:
            os.kill(rank, signal.SIGKILL)


ME = os.getpid()
LAUNCHER, RANK = (10, 1), (11, 2)
STEPS: dict[str, list[tuple[dict[Identity, Process], float]]] = {
    "waited for by its parent": [
        ({LAUNCHER: Process(ME, 1, 0), RANK: Process(10, 5, 2)}, 8),
        ({LAUNCHER: Process(ME, 1, 7.5)}, 8.5),
    ],
    "gone with a parent that did not wait": [
        ({LAUNCHER: Process(ME, 1, 0), RANK: Process(10, 5, 2)}, 8),
        ({LAUNCHER: Process(ME, 1, 0)}, 8),
        ({}, 8),
    ],
    "both at once, as with a node of a Slurm": [
        ({LAUNCHER: Process(ME, 1, 0), RANK: Process(10, 5, 2)}, 8),
        ({}, 8),
    ],
    "one after the other": [
        ({LAUNCHER: Process(ME, 1, 0), RANK: Process(10, 5, 2)}, 8),
        ({RANK: Process(1, 6, 2)}, 9),
        ({}, 9),
    ],
    "another under the same number": [
        ({LAUNCHER: Process(ME, 1, 0)}, 1),
        ({(10, 7): Process(1, 90, 0)}, 1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_what_has_ended_counts_as_it_was_last_seen(
    steps: list[tuple[dict[Identity, Process], float]],
) -> None:
    living: dict[Identity, Process] = {}
    meter, found = Meter(lambda: dict(living)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_utime=0.0, ru_stime=0.0))
        for now, _ in [({}, 0.0), *steps]:
            living.clear()
            living.update(now)
            found.append(meter.read())
    assert found == [0.0, *(seconds for _, seconds in steps)]
