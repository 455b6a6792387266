"""A rank that stops or is stuck is found and named, everybody leaves to be run again, and nothing else is an alarm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from refiner_ds.training import heartbeat as heartbeats
from refiner_ds.training import watchdog as watchdogs
from refiner_ds.training.heartbeat import Beat, Heartbeat
from refiner_ds.training.run_lock import Holder
from refiner_ds.training.watchdog import SHARE_OF_PATIENCE, Watchdog, blame, prepare_heartbeats
from tests.training.launched import ROOT, environment

SECONDS = 2.0  # that a step may stand still here
LONGER = 8.0  # where nothing is to be found: a busy machine may keep a rank from its core for longer than that
BEAT = Beat(0, "node1", 100, "boot", "1", 50, 7, "backward", 900)


@contextmanager
def ranks(folder: Path, size: int, seconds: float = SECONDS) -> Iterator[list[subprocess.Popen]]:
    """Real processes that keep step; see watched.py."""
    prepare_heartbeats(folder / "heartbeats")
    for rank in range(size):
        os.mkfifo(folder / f"pipe_{rank}")
    script = Path(__file__).with_name("watched.py")
    started = [
        subprocess.Popen(
            list(map(str, (sys.executable, script, folder / "heartbeats", rank, size, seconds))),
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(),
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        wait_for(lambda: all(step_of(folder, rank) > 5 for rank in range(size)))
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def step_of(folder: Path, rank: int) -> int:
    beat = Beat.read(folder / "heartbeats", rank)
    return beat.step if beat else 0


def say(process: subprocess.Popen, word: str) -> None:
    assert process.stdin
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def wait_for(true, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_stopped_rank_is_named_with_its_stacks_and_all_leave_to_be_run_again(tmp_path: Path) -> None:
    with ranks(tmp_path, 3) as processes:
        stopped = processes[0]  # the one that would have looked first
        os.kill(stopped.pid, signal.SIGSTOP)
        assert [process.wait(60) for process in processes] == [75, 75, 75]
        said = [process.stderr.read() for process in processes if process.stderr]
        sentence = "".join(said)
        assert sentence.count("error:") == 1 and "the same command continues" in sentence
        assert f"rank 0 (process {stopped.pid} on {os.uname().nodename}; step " in sentence
        assert "is stopped, or its machine is gone" in sentence and f"{tmp_path}/rank_0.stacks" in sentence
    assert "watched.py" in (tmp_path / "rank_0.stacks").read_text()


def test_a_stuck_rank_is_named_with_the_line_it_is_stuck_in(tmp_path: Path) -> None:
    with ranks(tmp_path, 2) as processes:
        say(processes[1], "sleep")
        assert [process.wait(60) for process in processes] == [75, 75]
        said = "".join(process.stderr.read() for process in processes if process.stderr)
        assert f"rank 1 (process {processes[1].pid}" in said and "forward) is stuck there" in said
    assert "in stuck_here" in (tmp_path / "rank_1.stacks").read_text()


def test_long_saves_suspended_jobs_and_the_end_are_no_alarms(tmp_path: Path) -> None:
    verdict = tmp_path / "heartbeats" / "verdict.json"

    def go_on(before: list[int]) -> bool:
        assert not verdict.exists(), verdict.read_text()
        return all(step_of(tmp_path, rank) > step for rank, step in enumerate(before))

    with ranks(tmp_path, 2, LONGER) as processes:
        say(processes[0], f"save {1.5 * LONGER}")  # the other one waits in an ordinary step
        time.sleep(2 * LONGER)
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.5 * LONGER)  # a watchdog excuses what it slept through, from five seconds on
        before = [step_of(tmp_path, rank) for rank in (0, 1)]
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)
        wait_for(lambda: go_on(before))
        time.sleep(1.5 * LONGER)
        assert go_on(before) and [process.poll() for process in processes] == [None, None]
        for process in processes:
            say(process, "leave")
        wait_for(lambda: any(process.poll() is not None for process in processes))
    assert not verdict.exists(), verdict.read_text()


def test_a_rank_that_is_stopped_while_others_do_something_patient_is_found_as_soon(tmp_path: Path) -> None:
    with ranks(tmp_path, 2) as processes:
        say(processes[0], "save 3600")
        wait_for(lambda: "saving" in json.dumps((Beat.read(tmp_path / "heartbeats", 0) or BEAT).doing))
        os.kill(processes[1].pid, signal.SIGSTOP)
        assert [process.wait(60) for process in processes] == [75, 75]


def test_what_a_whole_process_slept_through_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suspended job goes on in the middle of a step, and the others' heartbeats are as old."""
    now, left = [1000.0], list[int]()
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None, strftime=lambda pattern: pattern)
    for module in (heartbeats, watchdogs):
        monkeypatch.setattr(module, "time", clock)
    heartbeat = Heartbeat(first_steps=0)
    watchdog = Watchdog(heartbeat, tmp_path, 0, 2, 25.0, 1800.0, tmp_path / "stacks", leave=left.append)
    between_looks = iter([*[0.5] * 20, 600.0, *[0.5] * 40])  # awake for 10 seconds, asleep for 600, awake for 20

    def wait(_: float) -> bool:
        passed = next(between_looks, None)
        now[0] += passed or 0.0
        return passed is None

    monkeypatch.setattr(watchdog, "_ended", SimpleNamespace(wait=wait))
    BEAT.write(tmp_path)
    heartbeat.beat(7, "backward")
    watchdog._watch()
    assert not (tmp_path / "verdict.json").exists() and not left


@pytest.mark.parametrize("doing, looks", [("saving", 100), ("backward", 50)])
def test_what_goes_on_while_the_others_are_looked_at_is_no_alarm(
    doing: str, looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long save ends at the very moment, or a step: heartbeats take time to read, and on a file server more."""
    now = [1000.0]
    monkeypatch.setattr(heartbeats, "time", SimpleNamespace(monotonic=lambda: now[0]))
    heartbeat = Heartbeat(first_steps=0)
    watchdog = Watchdog(heartbeat, tmp_path, 0, 2, 25.0, 1800.0, tmp_path / "stacks")
    read, ends = watchdog._read, [False]

    def slow_read() -> dict[int, Beat | None]:
        found = read()
        if ends[0]:
            heartbeat.beat(8, "forward")
        return found

    monkeypatch.setattr(watchdog, "_read", slow_read)
    replace(BEAT, doing=doing).write(tmp_path)
    replace(BEAT, rank=1, doing=doing).write(tmp_path)
    heartbeat.beat(7, doing, patient=doing == "saving")
    for _ in range(looks):
        now[0] += 0.5
        watchdog._look(now[0])
    ends[0] = True
    now[0] += 0.5
    watchdog._look(now[0])
    assert heartbeat.now.step == 8 and not (tmp_path / "verdict.json").exists()
    watchdog._look(now[0] + 0.5)
    assert not (tmp_path / "verdict.json").exists()


@pytest.mark.parametrize(
    "then, named_after",
    [("it stays there", SHARE_OF_PATIENCE * 1800.0), ("it gets stuck behind it", 300.0 + 25.0),
     ("it dies there", 25.0), ("it takes a step", None)],
)  # fmt: skip
def test_a_rank_that_does_something_patient_for_all_is_left_to_it_and_then_has_time_for_a_step(
    then: str, named_after: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 draws, for five minutes; rank 1, which looks, waits for it in an ordinary step."""
    now, verdict = [1000.0], tmp_path / "verdict.json"
    monkeypatch.setattr(heartbeats, "time", SimpleNamespace(monotonic=lambda: now[0]))
    heartbeat = Heartbeat(first_steps=0)
    watchdog = Watchdog(heartbeat, tmp_path, 1, 2, 25.0, 1800.0, tmp_path / "stacks")
    heartbeat.beat(7, "backward")
    beats = heartbeat.now.beats - 1
    drawing = replace(BEAT, beats=beats - 1, doing="drawing", patient=True)
    forward = replace(BEAT, beats=beats, doing="forward")
    while not verdict.exists() and now[0] < 3000.0:
        now[0] += 0.5
        passed = now[0] - 1000.0
        draws = passed < 300.0 or then == "it stays there"
        beat = replace(drawing if draws else forward, alive=1 if then == "it dies there" else int(2 * passed))
        beat.write(tmp_path)
        if then == "it takes a step" and passed > 320.0:
            heartbeat.beat(heartbeat.now.step + 1, "backward")
        watchdog._look(now[0])
    if named_after is None:
        assert not verdict.exists()
    else:
        assert json.loads(verdict.read_text())["ranks"] == [0]
        assert now[0] - 1000.0 == pytest.approx(named_after, abs=6)


@pytest.mark.parametrize(
    "state, share, elsewhere, patience",
    [("R", 0.1, False, 4.0), ("R", 1.0, False, 1.0), ("S", 0.0, False, 1.0), ("T", 0.0, False, 1.0),
     ("R", 0.1, True, 1.0)],
)  # fmt: skip
def test_a_rank_that_other_work_keeps_from_running_is_given_longer(
    state: str, share: float, elsewhere: bool, patience: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 looks; rank 0 does not even count up. Of another machine, a process of that number here tells nothing."""
    now = [1000.0]
    monkeypatch.setattr(heartbeats, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(watchdogs, "_state_of", lambda beat: state)
    monkeypatch.setattr(watchdogs, "cpu_seconds", lambda pid: share * now[0])
    heartbeat = Heartbeat(first_steps=0)
    watchdog = Watchdog(heartbeat, tmp_path, 1, 2, 25.0, 1800.0, tmp_path / "stacks")
    me = Holder.this_process()
    Beat(0, me.host, me.pid, "another" if elsewhere else me.machine, me.began, 9, 7, "backward", 5).write(tmp_path)
    heartbeat.beat(7, "backward")
    while not (tmp_path / "verdict.json").exists():
        now[0] += 0.5
        assert now[0] < 1000.0 + 25.0 * 8, "nobody is named"
        watchdog._look(now[0])
    found = json.loads((tmp_path / "verdict.json").read_text())
    assert found["ranks"] == [0] and now[0] - 1000.0 == pytest.approx(25.0 * patience, abs=1.5)


def test_cpu_time_of_a_process_is_its_own_and_the_kernels_for_it() -> None:
    count, end = 0, time.process_time() + 1.0
    while time.process_time() < end:  # so that there is something to count
        count += 1
    spent = os.times()
    assert watchdogs.cpu_seconds(os.getpid()) == pytest.approx(spent.user + spent.system, abs=0.3)
    assert watchdogs.cpu_seconds(1 << 30) == 0.0


def later(beat: Beat, **changes: object) -> Beat:
    return replace(beat, alive=beat.alive + 5, **changes)  # type: ignore[arg-type]


def test_blame_falls_on_the_silent_then_on_the_last_then_on_all() -> None:
    before: dict[int, Beat | None] = {rank: replace(BEAT, rank=rank) for rank in range(4)}
    alive: dict[int, Beat | None] = {rank: later(beat) for rank, beat in before.items() if beat}
    blamed, why, _ = blame(before, {**alive, 2: before[2]})
    assert list(blamed) == [2] and why == "is stopped, or its machine is gone"
    assert list(blame(before, {**alive, 1: None, 2: before[2]}).ranks) == [1, 2]
    blamed, why, _ = blame(before, {**alive, 3: later(BEAT, rank=3, beats=49, doing="data")})
    assert list(blamed) == [3] and why.startswith("is stuck there")
    blamed, why, _ = blame(before, alive)
    assert list(blamed) == [0, 1, 2, 3] and "wait for each other" in why


def test_a_heartbeat_knows_how_long_steps_take_and_what_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: now[0])
    heartbeat = Heartbeat()
    for step in range(1, 8):
        for doing, seconds, patient in (("data", 1.0, False), ("forward", 2.0, False), ("saving", 500.0, True)):
            heartbeat.beat(step, doing, patient)
            assert heartbeat.now.patient is (patient or step <= heartbeats.FIRST_STEPS)  # the first steps compile
            now[0] += seconds if step > 2 else 100.0
    assert heartbeat.recent_step == 3.0 and heartbeat.now.beats == 21
