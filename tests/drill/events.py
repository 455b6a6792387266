"""What can happen to a run. Each event is given the drill, and returns once it has happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from refiner_ds.run_folder import RunFolder
from refiner_ds.training.heartbeat import Beat
from refiner_ds.training.parent import Process


class Running:
    """A run as an event finds it.

    Args:
        folder: of the run.
        launcher: the processes of its launcher, the command itself first.
        poison: file that poisons the rank whose number is in it.
    """

    def __init__(self, folder: RunFolder, launcher: list[Process], poison: Path) -> None:
        self.folder, self.launcher, self.poison = folder, launcher, poison

    def rank(self, rank: int) -> int:
        """The process of a rank."""
        beat = Beat.read(self.folder.heartbeats, rank)
        assert beat is not None, f"rank {rank} has no heartbeat"
        return beat.pid


def kill_rank(run: Running, chance: random.Random) -> None:
    """SIGKILL of one rank."""
    os.kill(run.rank(chance.randrange(2)), signal.SIGKILL)


def kill_all(run: Running, chance: random.Random) -> None:
    """SIGKILL of the ranks and their launcher, as when a node goes down."""
    for pid in [run.rank(0), run.rank(1), *(process.pid for process in run.launcher)]:
        os.kill(pid, signal.SIGKILL)


def kill_launcher(run: Running, chance: random.Random) -> None:
    """SIGKILL of the launcher alone."""
    os.kill(run.launcher[0].pid, signal.SIGKILL)


def terminate_launcher(run: Running, chance: random.Random) -> None:
    """TERM to the launcher alone."""
    os.kill(run.launcher[0].pid, signal.SIGTERM)


def signal_rank(run: Running, chance: random.Random) -> None:
    """USR2 to one rank, as Slurm sends it before a time limit."""
    os.kill(run.rank(chance.randrange(2)), signal.SIGUSR2)


def stop_rank(run: Running, chance: random.Random) -> None:
    """STOP of one rank, which then hangs."""
    os.kill(run.rank(chance.randrange(2)), signal.SIGSTOP)


def damage_newest(run: Running, chance: random.Random) -> None:
    """The newest checkpoint loses a byte, and a rank is killed."""
    newest = run.folder.latest_checkpoint()
    assert newest is not None
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    kill_rank(run, chance)
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1
    file.write_bytes(content)


def lose_manifest(run: Running, chance: random.Random) -> None:
    """A rank is killed, and half of a later checkpoint lies in the folder."""
    kill_rank(run, chance)
    newest = run.folder.latest_checkpoint()
    assert newest is not None
    cut = run.folder.checkpoints / "step_99999999"
    if not cut.exists():
        shutil.copytree(newest, cut)
        (cut / "complete.json").unlink()


def poison_batch(run: Running, chance: random.Random) -> None:
    """One loss of one rank is nan, once: a fault of its hardware."""
    run.poison.write_text(str(chance.randrange(2)))


EVENTS: dict[str, Callable[[Running, random.Random], None]] = {
    "SIGKILL of a rank": kill_rank,
    "SIGKILL of all ranks and their launcher": kill_all,
    "SIGKILL of the launcher": kill_launcher,
    "TERM to the launcher": terminate_launcher,
    "USR2 to a rank": signal_rank,
    "STOP of a rank": stop_rank,
    "damaged newest checkpoint, SIGKILL of a rank": damage_newest,
    "unfinished checkpoint, SIGKILL of a rank": lose_manifest,
    "a loss of nan on one rank": poison_batch,
}
