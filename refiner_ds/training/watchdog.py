"""Finding the rank that all others wait for, and ending a run that hangs so that it can be started again.

Ranks move together: when one stops, all stand still within a step. So each watches only its own main thread and writes
its heartbeat. Once it has stood still for too long it reads the heartbeats of all, and the first to do so (the lowest
running rank) writes a verdict:

    a process whose ``alive`` does not count up      it is stopped, or its machine is gone
    else the ranks with the fewest beats             they are stuck in what they last began
    else all of them                                 they wait in one collective: the network, or NCCL

Ranks of this machine that would run, and are kept from it by other work, are given four times as long. A rank that does
something patient for all, such as drawing a picture, is left to it; once it goes on it has as long as any for a step.

    heartbeats/verdict.json    {"ranks": [1], "sentence": …}     every rank leaves with exit code 75 when it sees it
    logs/rank_1.stacks         Python stacks of its threads; `kill -QUIT` writes them at any other time, too

A stopped process is sent QUIT and then CONT: it writes its stacks before it does anything else, and leaves like the
rest.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from refiner_ds.exit_codes import RUN_AGAIN
from refiner_ds.files import read_object
from refiner_ds.training.heartbeat import Beat, Doing, Heartbeat
from refiner_ds.training.parent import Process
from refiner_ds.training.run_lock import Holder
from refiner_ds.training.signals import leave_at_once

WRITE_SECONDS = 5.0  # and no less than five times in ``seconds``
LOOK_SECONDS = 0.5
APART_SECONDS = 4.0  # between two looks at the others: a busy machine may keep a living one from writing for a while
TURN_SECONDS, TURNS = 0.5, 20  # each rank gives those below it time to write the verdict first
STEPS_OF_PATIENCE = 4  # with ``seconds`` below 30, a stopped rank is named within max(30 s, 5 steps)
STARVED_SHARE, STARVED_PATIENCE = 0.5, 4.0  # of a core; times the usual, for a rank that other work keeps from one
SHARE_OF_PATIENCE = 0.9  # of the collectives' time-out: the verdict says more than its error would
GONE_SECONDS = 5.0
UNREADABLE: dict[str, Any] = {"ranks": [], "sentence": "a rank has found that the run hangs", "by": None}


class Watchdog:
    """Watches this process from a thread of its own.

    Args:
        heartbeat: what the loop does.
        folder: heartbeats of the run, the same for all ranks; it exists.
        rank, size: of this process.
        seconds: how long an ordinary step may stand still, and no less than `STEPS_OF_PATIENCE` recent steps.
        patience: seconds that anything patient may take.
        stacks: file that stacks are written to.
        last_collective: tells in words what the communication library did last; None where it cannot.
        leave: ends this process.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        folder: Path,
        rank: int,
        size: int,
        seconds: float,
        patience: float,
        stacks: Path,
        last_collective: Callable[[], str | None] = lambda: None,
        leave: Callable[[int], None] = leave_at_once,
    ) -> None:
        self._heartbeat, self._folder = heartbeat, folder
        self._rank, self._size = rank, size
        self._seconds, self._patience = seconds, patience * SHARE_OF_PATIENCE
        self._stacks_file = stacks
        self._last_collective, self._leave = last_collective, leave
        self._verdict = folder / "verdict.json"
        self._mine: dict[str, Any] | None = None  # the verdict, where it is this process's
        self._me = Holder.this_process()
        self._alive = 0
        self._written = 0.0
        self._before: dict[int, Beat | None] = {}
        self._before_read = 0.0
        self._seen_moving = -math.inf  # when the rank that the others wait for last turned out to get on
        self._cpu_before: dict[int, float] = {}  # seconds by process of this machine, read with ``_before``
        self._excused = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks: TextIO | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._stacks = open(self._stacks_file, "a", buffering=1)
        faulthandler.register(signal.SIGQUIT, file=self._stacks, all_threads=True, chain=False)
        self._write(self._heartbeat.now)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        if self._stacks is None:
            return
        self._ended.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGQUIT)
        self._stacks.close()
        self._stacks = None
        Beat.file(self._folder, self._rank).unlink(missing_ok=True)
        if not self._stacks_file.stat().st_size:
            self._stacks_file.unlink()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(LOOK_SECONDS):
            now = time.monotonic()
            if now - looked > 10 * LOOK_SECONDS:
                self._excused = now  # this whole process stood still: a suspended job or machine; nobody is at fault
                self._before, self._written = {}, 0.0
            looked = now
            with suppress(OSError):  # a file server that is away for a moment
                self._look(now)

    def _look(self, now: float) -> None:
        doing = self._heartbeat.now
        still = now - max(doing.since, self._excused)
        limit = max(self._seconds, STEPS_OF_PATIENCE * self._heartbeat.recent_step)
        suspicious = still > limit / 2
        if suspicious or now - self._written >= min(WRITE_SECONDS, self._seconds / 5):
            self._write(doing)
            self._written = now
            if self._verdict.exists():
                self._leave_by_verdict()
                return
        if not suspicious:
            self._before = {}
        elif not self._before:
            self._remember(self._read(), now)
        elif still > limit + min(self._rank, TURNS) * TURN_SECONDS and now - self._before_read > APART_SECONDS:
            after = self._read()
            may_wait = still < self._patience
            blamed, why, running = (
                self._blame_stopped(after) if doing.patient and may_wait else blame(self._before, after)
            )
            if self._heartbeat.now is not doing:
                return  # it has gone on while the others' heartbeats were read
            if running and self._may_catch_up(blamed, after, now, limit, may_wait):
                return
            if blamed and not (still < STARVED_PATIENCE * limit and self._are_starved(blamed, now)):
                self._write_verdict(blamed, why, still)

    def _remember(self, beats: dict[int, Beat | None], now: float) -> None:
        """Keep what later heartbeats are compared with."""
        self._before, self._before_read = beats, now
        here = [beat for beat in beats.values() if beat is not None and self._is_here(beat)]
        self._cpu_before = {beat.pid: cpu_seconds(beat.pid) for beat in here}

    def _may_catch_up(
        self, blamed: Mapping[int, Beat | None], after: dict[int, Beat | None], now: float, limit: float, may_wait: bool
    ) -> bool:
        """Whether ranks that run and have come least far may be about to catch up with the others."""
        for rank, beat in blamed.items():
            before = self._before.get(rank)
            if beat is not None and (before is None or beat.beats != before.beats):
                self._remember(after, now)
                self._seen_moving = now
                return True
        return now - self._seen_moving < limit or may_wait and any(beat and beat.patient for beat in blamed.values())

    def _blame_stopped(self, beats: dict[int, Beat | None]) -> Blame:
        """Only those of this machine that are stopped: the others may be about something patient, too."""
        stopped = {rank: beat for rank, beat in beats.items() if beat is not None and self._is_stopped(beat)}
        return Blame(stopped, "is stopped" if len(stopped) == 1 else "are stopped", running=False)

    def _write(self, doing: Doing) -> None:
        self._alive += 1
        mine = self._me
        Beat(
            self._rank,
            mine.host,
            mine.pid,
            mine.machine,
            mine.began,
            doing.beats,
            doing.step,
            doing.doing,
            self._alive,
            doing.patient,
        ).write(self._folder)

    def _read(self) -> dict[int, Beat | None]:
        return {rank: Beat.read(self._folder, rank) for rank in range(self._size)}

    def _is_here(self, beat: Beat) -> bool:
        return beat.machine == self._me.machine

    def _is_stopped(self, beat: Beat) -> bool:
        """Whether a process of this machine is stopped or has ended; of another machine nobody here can tell."""
        return self._is_here(beat) and _state_of(beat) in ("T", "t", "gone")

    def _are_starved(self, blamed: Mapping[int, Beat | None], now: float) -> bool:
        """Whether all these processes run on this machine and want more of a core than they get.

        Their own watchdogs are as starved, and may not have counted up ``alive`` meanwhile.
        """
        wall = now - self._before_read
        return all(
            beat is not None
            and self._is_here(beat)
            and _state_of(beat) == "R"
            and cpu_seconds(beat.pid) - self._cpu_before.get(beat.pid, 0.0) < STARVED_SHARE * wall
            for beat in blamed.values()
        )

    def _write_verdict(self, blamed: Mapping[int, Beat | None], why: str, still: float) -> None:
        named = ", ".join(str(beat) if beat else f"rank {rank}" for rank, beat in blamed.items())
        sentence = f"no progress for {still:.0f} s: {named} {why}"
        verdict = {"ranks": list(blamed), "sentence": sentence, "by": self._rank}
        with suppress(FileExistsError), self._verdict.open("x") as file:
            self._mine = verdict
            json.dump(verdict, file)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _leave_by_verdict(self) -> None:
        """Leave as the verdict says, and see to it that the ranks it names do."""
        time.sleep(LOOK_SECONDS / 2)  # its author may not have closed it yet
        # A full disk may have had room for its name alone: the verdict stands, whatever it says.
        verdict = self._mine or {**UNREADABLE, **(read_object(self._verdict) or {})}
        assert self._stacks is not None
        self._stacks.write(f"{time.strftime('%F %T')} {verdict['sentence']}\n")
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        if (collective := _within(5.0, self._last_collective)) is not None:
            self._stacks.write(f"last collective: {collective}\n")
        if self._rank in verdict["ranks"] and verdict["by"] != self._rank:
            self._leave(RUN_AGAIN)
            return
        self._interrupt([rank for rank in verdict["ranks"] if rank != self._rank])
        if verdict["by"] in (self._rank, None):
            print(self._account(verdict), file=sys.stderr, flush=True)
        self._leave(RUN_AGAIN)

    def _interrupt(self, ranks: list[int]) -> None:
        """Have the named processes of this machine write their stacks and leave; kill those that do neither."""
        here = [beat for rank in ranks if (beat := Beat.read(self._folder, rank)) is not None and self._is_here(beat)]
        for beat in here:
            if _state_of(beat) != "gone":
                with suppress(OSError):
                    os.kill(beat.pid, signal.SIGQUIT)
                    os.kill(beat.pid, signal.SIGCONT)
        end = time.monotonic() + GONE_SECONDS
        while any(_state_of(beat) != "gone" for beat in here) and time.monotonic() < end:
            time.sleep(0.1)
        for beat in here:
            if _state_of(beat) != "gone":
                with suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)

    def _account(self, verdict: dict[str, Any]) -> str:
        end = f"all ranks leave with exit code {RUN_AGAIN}: the same command continues"
        lines = [f"error: {verdict['sentence']}; {end}"]
        for rank in verdict["ranks"][:4]:
            file = self._stacks_file.with_name(f"rank_{rank}.stacks")
            lines.append(f"stacks of rank {rank}: {file}")
        return "\n".join(lines)


class Blame(NamedTuple):
    """Whom the others wait for, by rank; in words why; and whether those run, and stand still all the same."""

    ranks: Mapping[int, Beat | None]
    why: str
    running: bool


def blame(before: dict[int, Beat | None], after: dict[int, Beat | None]) -> Blame:
    """Whom the others wait for.

    Args:
        before, after: heartbeats at two moments between which every running process wrote; None: none was found.
    """
    silent = {rank: beat for rank, beat in after.items() if beat is None or _is_same_process(before.get(rank), beat)}
    if silent:
        why = "is stopped, or its machine is gone" if len(silent) == 1 else "are stopped, or their machine is"
        return Blame(silent, why, running=False)
    beats = {rank: beat.beats for rank, beat in after.items() if beat is not None}
    last = {rank: after[rank] for rank, count in beats.items() if count == min(beats.values())}
    if len(last) < len(after):
        why = "is stuck there; the others wait for it" if len(last) == 1 else "are stuck; the others wait"
    else:
        why = "is stuck there" if len(last) == 1 else "wait for each other: a collective does not end"
    return Blame(last, why, running=True)


def _is_same_process(before: Beat | None, after: Beat) -> bool:
    return before is not None and (before.pid, before.alive) == (after.pid, after.alive)


def _state_of(beat: Beat) -> str:
    """One letter of proc(5), or "gone"."""
    process = Process.at(beat.pid)
    if process is None or process.began != beat.began:
        return "gone"
    with suppress(OSError):
        return Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "gone"


def cpu_seconds(pid: int) -> float:
    """CPU time that a process of this machine has used; 0.0 where there is none."""
    with suppress(OSError, IndexError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def has_ended(beat: Beat) -> bool:
    """Whether the process of a heartbeat is one of this machine and has ended."""
    return beat.machine == Holder.this_process().machine and _state_of(beat) == "gone"


def _within(seconds: float, ask: Callable[[], str | None]) -> str | None:
    """What ``ask`` answers, or None where it takes longer: it may need what the hang holds."""
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def prepare_heartbeats(folder: Path) -> None:
    """Begin with no heartbeats and no verdict; on one process, before any other starts to watch."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)
