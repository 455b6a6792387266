"""What can happen to a run. Each event is given the run, and returns once it has happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from refiner_ds.run_folder import RunFolder
from refiner_ds.training.heartbeat import Beat
from refiner_ds.training.parent import Process
from tests.data.small_disk import SmallDisk

WRITE_SECONDS = 120.0  # in which a run begins to write a checkpoint
BETWEEN_LOOKS = 0.0005


class Running:
    """A run as an event finds it.

    Args:
        folder: of the run.
        launcher: the processes of its launcher, the command itself first.
        poison: file that poisons the rank whose number is in it.
        following: of the next start; see preloaded.py.
        disk: the file system that the run folder is on, if it is one that can be made full.
    """

    def __init__(
        self, folder: RunFolder, launcher: list[Process], poison: Path, following: Path, disk: SmallDisk | None
    ) -> None:
        self.folder, self.launcher, self.poison = folder, launcher, poison
        self.following, self.disk = following, disk

    def ranks(self) -> list[int]:
        """The processes of all ranks, in their order."""
        found: list[int] = []
        while (beat := Beat.read(self.folder.heartbeats, len(found))) is not None:
            found.append(beat.pid)
        assert found, "no rank has a heartbeat"
        return found

    def newest(self) -> Path:
        """The newest checkpoint."""
        newest = self.folder.latest_checkpoint()
        assert newest is not None
        return newest


def kill_rank(run: Running, chance: random.Random) -> None:
    """SIGKILL of one rank."""
    os.kill(chance.choice(run.ranks()), signal.SIGKILL)


def kill_ranks(run: Running, chance: random.Random) -> None:
    """SIGKILL of all ranks at once."""
    for pid in run.ranks():
        os.kill(pid, signal.SIGKILL)


def kill_all(run: Running, chance: random.Random) -> None:
    """SIGKILL of the ranks and their launcher, as when a node goes down."""
    for pid in [*run.ranks(), *(process.pid for process in run.launcher)]:
        os.kill(pid, signal.SIGKILL)


def kill_in_a_write(run: Running, chance: random.Random) -> str | None:
    """SIGKILL of all ranks while a checkpoint is being written beside the steps."""
    writing, ranks = run.folder.checkpoints, run.ranks()
    end = time.monotonic() + WRITE_SECONDS
    while not any(name.startswith(".writing_") for name in os.listdir(writing)):
        assert time.monotonic() < end, "the run writes no checkpoint"
        time.sleep(BETWEEN_LOOKS)
    time.sleep(chance.uniform(0, 0.004))
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    return None if any(writing.glob(".writing_*")) else ALL_RANKS  # it was through by then


def kill_launcher(run: Running, chance: random.Random) -> None:
    """SIGKILL of the launcher alone."""
    os.kill(run.launcher[0].pid, signal.SIGKILL)


def terminate_launcher(run: Running, chance: random.Random) -> None:
    """TERM to the launcher alone."""
    os.kill(run.launcher[0].pid, signal.SIGTERM)


def signal_rank(run: Running, chance: random.Random) -> None:
    """USR2 to one rank, as Slurm sends it before a time limit."""
    os.kill(chance.choice(run.ranks()), signal.SIGUSR2)


def stop_rank(run: Running, chance: random.Random) -> None:
    """STOP of one rank, which then hangs."""
    os.kill(chance.choice(run.ranks()), signal.SIGSTOP)


def damage_newest(run: Running, chance: random.Random) -> None:
    """All ranks are killed, and a file of the newest checkpoint loses a bit, its end, all or its meaning."""
    kill_ranks(run, chance)
    file = chance.choice(sorted(path for path in run.newest().rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1
    file.write_bytes(chance.choice((content, content[: len(content) // 2], bytes(len(content)), b"[]", b"{}", b"")))


def leave_half(run: Running, chance: random.Random) -> None:
    """A rank is killed, and half of a later checkpoint lies in the folder."""
    kill_rank(run, chance)
    cut = run.folder.checkpoints / "step_99999999"
    if not cut.exists():
        shutil.copytree(run.newest(), cut)
        (cut / "complete.json").unlink()


def damage_run_file(run: Running, chance: random.Random) -> None:
    """All ranks are killed, and the run folder's own copy of the run file is damaged."""
    kill_ranks(run, chance)
    content = run.folder.config.read_bytes()
    run.folder.config.write_bytes(chance.choice((content[: len(content) // 2], bytes(len(content)), b"[]", b"{}", b"")))


def poison_batch(run: Running, chance: random.Random) -> None:
    """One loss of one rank is nan, once: a fault of its hardware."""
    run.poison.write_text(str(chance.randrange(len(run.ranks()))))


def fill_disk(run: Running, chance: random.Random) -> None:
    """The disk has room for no checkpoint, or for nothing at all."""
    assert run.disk is not None
    run.disk.resize(run.disk.used()[0] + chance.choice((0, 512 << 10)))


def change_world(run: Running, chance: random.Random) -> str:
    """All is killed, and the next start has another number of processes, as where a node is lost or comes back."""
    before = len(run.ranks())
    after = 1 if before == 2 else 2
    run.following.write_text(json.dumps({"ranks": after, "arguments": []}))
    kill_all(run, chance)
    return f"{CHANGE}, {before} → {after}"


ALL_RANKS, NAN, FULL = "SIGKILL of all ranks", "a loss of nan on one rank", "a full disk"
CHANGE = "SIGKILL of everything, then another number of processes"
Event = Callable[[Running, random.Random], str | None]  # what it turned out to be, if not what it was to be

EVENTS: dict[str, Event] = {
    "SIGKILL of a rank": kill_rank,
    ALL_RANKS: kill_ranks,
    "SIGKILL of all ranks and their launcher": kill_all,
    "SIGKILL of all ranks while a checkpoint is written": kill_in_a_write,
    "SIGKILL of the launcher": kill_launcher,
    "TERM to the launcher": terminate_launcher,
    "USR2 to a rank": signal_rank,
    "STOP of a rank": stop_rank,
    "damaged newest checkpoint, SIGKILL of all ranks": damage_newest,
    "unfinished checkpoint, SIGKILL of a rank": leave_half,
    "damaged config.json, SIGKILL of all ranks": damage_run_file,
    NAN: poison_batch,
    FULL: fill_disk,
}
CHANGES: dict[str, Event] = {CHANGE: change_world}
WHILE_CHANGING = ("SIGKILL of a rank", "SIGKILL of all ranks while a checkpoint is written", "USR2 to a rank", NAN)
