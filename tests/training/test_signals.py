"""Being asked to stop: what waits for the end of a step, what acts at once, and what a launcher's death does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refiner_ds.training.parent import Process, launchers, program
from refiner_ds.training.signals import STOPPING, StopFlag, stop_flag
from tests.training.launched import ROOT, environment


class Exits(list):
    """Takes the place of the end of this process."""

    def flag(self, **settings: float) -> StopFlag:
        return StopFlag(self.append, **settings)


@pytest.mark.parametrize("number", STOPPING)
def test_before_the_first_step_a_request_acts_at_once(number: signal.Signals) -> None:
    exits = Exits()
    exits.flag().on_signal(number)
    assert exits == [75]


@pytest.mark.parametrize("number", STOPPING)
def test_later_a_request_waits_for_the_step_and_its_echo_changes_nothing(number: signal.Signals) -> None:
    exits = Exits()
    flag = exits.flag()
    flag.something_to_save()
    flag.on_signal(number, now=100.0)
    for echo in (number, signal.SIGTERM, signal.SIGINT):  # launchers pass on what a terminal sent to all already
        flag.on_signal(echo, now=100.5)
    flag.something_to_save()  # the loop says so after every step
    assert flag and flag.signal == number and not exits


def test_a_second_ctrl_c_leaves_at_once() -> None:
    exits = Exits()
    flag = exits.flag()
    flag.something_to_save()
    flag.on_signal(signal.SIGINT, now=100.0)
    flag.on_signal(signal.SIGINT, now=102.0)
    assert exits == [130]


def test_a_second_term_leaves_after_a_grace_time_and_usr2_never_does() -> None:
    exits = Exits()
    flag = exits.flag(grace_seconds=0.2)
    flag.something_to_save()
    for moment in (100.0, 110.0):
        flag.on_signal(signal.SIGUSR2, now=moment)
    flag.on_signal(signal.SIGTERM, now=120.0)
    flag.on_signal(signal.SIGTERM, now=130.0)
    assert not exits
    end = time.monotonic() + 120
    while not exits and time.monotonic() < end:
        time.sleep(0.05)
    assert exits == [143]


def test_a_request_that_came_before_there_was_something_to_save_is_not_forgotten() -> None:
    exits = Exits()
    flag = exits.flag()
    flag.raise_flag(signal.SIGTERM)
    flag.something_to_save()
    assert exits == [75]


def test_another_reason_than_a_signal_is_told_from_one() -> None:
    exits = Exits()
    flag = exits.flag()
    flag.something_to_save()
    flag.ask("the launcher is gone")
    assert flag.reason == "the launcher is gone" and flag.signal is None and not exits
    early = exits.flag()
    early.ask("the launcher is gone")
    assert exits == [75]


def test_handlers_come_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        with stop_flag(Exits().flag()) as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not flag and signal.getsignal(signal.SIGINT) == flag.raise_flag
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_child_that_was_forked_meanwhile_does_not_hold_up_the_end() -> None:
    with stop_flag(Exits().flag()):
        child = os.fork()  # a loader's worker, which lives on
        if child == 0:
            signal.pause()
    still_lives = os.waitpid(child, os.WNOHANG) == (0, 0)  # the block has ended, the child has not
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert still_lives


WAITING_IN_C = """
import ctypes, sys
from refiner_ds.training.signals import StopFlag, before_leaving, stop_flag
with before_leaving(lambda code: sys.exit(code + 1)), stop_flag() as flag:
    print("ready", flush=True)
    semaphore = ctypes.create_string_buffer(64)
    while True:
        ctypes.CDLL(None).sem_wait(semaphore)
"""


def test_a_process_that_waits_inside_a_call_leaves_too(tmp_path: Path) -> None:
    """Python's own handlers run only once such a call returns; this one does not, as TCPStore's wait does not."""
    process = start_python(WAITING_IN_C)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 76  # the callback's say


FOLLOWS = """
import os, sys, time
from refiner_ds.training.parent import follow_launchers
from refiner_ds.training.signals import stop_flag
with stop_flag() as flag:
    flag.something_to_save()
    follow_launchers(flag.ask)
    print("rank", os.getpid(), flush=True)
    while not flag:
        time.sleep(0.05)
print("reason:", flag.reason, file=open(sys.argv[-1], "w"))
"""

LAUNCHES = """
import subprocess, sys
subprocess.run(sys.argv[1:])
"""


@pytest.mark.parametrize("above, reason", [("parent", "SIGTERM"), ("grandparent", "the launcher is gone (torchrun")])
def test_a_launcher_that_is_killed_asks_its_rank_to_stop(above: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "torchrun").write_text(LAUNCHES)
    (tmp_path / "other.py").write_text(LAUNCHES)
    (tmp_path / "rank.py").write_text(FOLLOWS)
    told = tmp_path / "told"
    between = [] if above == "parent" else [sys.executable, tmp_path / "other.py"]
    words = [sys.executable, tmp_path / "torchrun", *between, sys.executable, tmp_path / "rank.py", told]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout
    rank = int(process.stdout.readline().split()[1])
    process.kill()
    process.wait()
    ended(rank)
    assert told.read_text().startswith(f"reason: {reason}")


def test_a_shell_is_no_launcher(tmp_path: Path) -> None:
    assert Process.at(os.getpid()) is not None and Process.at(os.getpid()).is_alive  # type: ignore[union-attr]
    process = subprocess.Popen(["bash", "-c", f"{sys.executable} -c 'import time; time.sleep(60)'; true"])
    try:
        assert "torchrun" not in [found.name for found in launchers(process.pid)]
    finally:
        process.kill()


@pytest.mark.parametrize(
    "words, name",
    [
        (["/venv/bin/python", "/venv/bin/deepspeed", "refiner_ds/train.py"], "deepspeed"),
        (["python3.11", "-u", "-m", "deepspeed.launcher.launch", "--x"], "deepspeed.launcher.launch"),
        (["python", "-X", "dev", "-W", "ignore", "/a/refiner_ds/train.py", "--set"], "refiner_ds/train.py"),
        (["python", "/elsewhere/train.py", "torchrun"], "elsewhere/train.py"),
        (["bash", "-c", "torchrun x"], "bash"),
        ([], ""),
    ],
)
def test_a_command_line_is_known_by_what_it_runs(words: list[str], name: str) -> None:
    assert program(words) == name


def start_python(script: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def ended(pid: int, seconds: float = 60) -> None:
    """Wait until a process has ended; it need not be a child of this one."""
    end = time.monotonic() + seconds
    while (process := Process.at(pid)) is not None and process.is_alive:
        assert time.monotonic() < end, f"process {pid} still runs"
        time.sleep(0.05)
