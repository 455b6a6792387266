"""One run folder, one run: a lock file that names its holder and is touched as long as the holder lives.

    lock      {"host": …, "pid": …, "began": …, "machine": …, "token": …}; touched every few seconds

Works on NFS: the file comes into being whole by link(2), which is atomic there, and its age is read from the clock of
the file server alone, never by comparing two machines' clocks. A holder on this machine is dead when its process is;
one on another machine when it has not touched the file for `SILENT_SECONDS`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refiner_ds.errors import LaunchError
from refiner_ds.training.parent import Process

TOUCH_SECONDS = 5.0
SILENT_SECONDS = 60.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        began: clock tick at which the process began: its number may be another's by now.
        machine: what tells process numbers apart: the boot of the machine and the namespace of its processes.
        token: different in every lock ever taken.
    """

    host: str
    pid: int
    began: str
    machine: str
    token: str

    @staticmethod
    def this_process() -> Holder:
        """The holder that this process would be."""
        process = Process.at(os.getpid())
        began = process.began if process else ""
        return Holder(socket.gethostname(), os.getpid(), began, _machine(), uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class RunLock:
    """The lock of one run folder.

    Args:
        file: the lock file; its folder exists.
        lost: called with a sentence, from another thread, should somebody else take the lock from this process.
        touch_seconds, silent_seconds: how often it is touched, and after how long without it is stale.
    """

    def __init__(
        self,
        file: Path,
        lost: Callable[[str], None] = lambda sentence: None,
        touch_seconds: float = TOUCH_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        self._file = file
        self._lost = lost
        self._touch_seconds = touch_seconds
        self._silent_seconds = silent_seconds
        self._mine = Holder.this_process()
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> str | None:
        """Take the lock.

        A holder on another machine that may be dead is given `SILENT_SECONDS` to show that it is not.

        Returns:
            a sentence for the log where a dead run's lock was taken over, else None.
        Raises:
            LaunchError: another run holds it.
        """
        taken_over = None
        draft = self._file.with_name(f".{self._file.name}.{self._mine.token}")
        draft.write_text(json.dumps(asdict(self._mine)))
        try:
            while not self._claim(draft):
                holder = read_holder(self._file)
                if holder is None and self._file.exists():
                    holder = Holder("an unknown host", 0, "", "", "")  # a lock of no content: judged by its age alone
                if holder is None:
                    continue  # released in between
                if (why := self._dead(holder, draft)) is None:
                    raise LaunchError(
                        f"{self._file.parent}: {holder} trains here already, and this is {self._mine};"
                        " end that run first, or choose another refiner.run.name"
                    )
                if self._take_over(holder, draft):
                    taken_over = f"taking over {self._file.parent} from {holder}: {why}"
                    break
        finally:
            draft.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)
        self._thread.start()
        return taken_over

    def release(self) -> None:
        """Give the lock back, if it is still this process's."""
        self._released.set()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join()
        if self._is_mine():
            self._file.unlink(missing_ok=True)

    def _claim(self, draft: Path) -> bool:
        try:
            os.link(draft, self._file)
        except FileExistsError:
            return self._is_mine()  # an NFS server may have done what its lost answer denied
        return True

    def _dead(self, holder: Holder, draft: Path) -> str | None:
        """Why a holder is dead; None where it lives."""
        if holder.machine == self._mine.machine:
            process = Process.at(holder.pid)
            return None if process is not None and process.began == holder.began else "that process has ended"
        end = time.monotonic() + self._silent_seconds
        while (age := self._age(draft)) is not None and time.monotonic() < end:
            if age > self._silent_seconds:
                return f"it has been silent for {age:.0f} s"
            seen = age
            time.sleep(min(self._touch_seconds, self._silent_seconds) / 2)
            if (now := self._age(draft)) is not None and now < seen:
                return None  # it was touched while we looked
        if age is None:
            return "it has just left"
        return f"it has been silent for {age:.0f} s" if age > self._silent_seconds else None

    def _age(self, draft: Path) -> float | None:
        """Seconds since the lock was touched, by the clock of whoever serves the folder; None where it is gone."""
        try:
            os.utime(draft)
            return draft.stat().st_mtime - self._file.stat().st_mtime
        except OSError:
            return None

    def _take_over(self, dead: Holder, draft: Path) -> bool:
        """Put this process's lock in the place of a dead one's; False where somebody else was quicker."""
        claim = self._file.with_name(f".{self._file.name}.taking")
        try:
            os.link(draft, claim)  # of several who saw the same dead holder, one may replace its lock
        except FileExistsError:
            taker = read_holder(claim)
            if taker is None or self._dead(taker, draft) is not None:
                claim.unlink(missing_ok=True)
            time.sleep(0.1)
            return False
        try:
            now = read_holder(self._file)
            if now is not None and now.token != dead.token:
                return False
            os.replace(claim, self._file)
        finally:
            claim.unlink(missing_ok=True)
        return self._is_mine()

    def _is_mine(self) -> bool:
        holder = read_holder(self._file)
        return holder is not None and holder.token == self._mine.token

    def _keep(self) -> None:
        while not self._released.wait(self._touch_seconds):
            try:
                holder = read_holder(self._file)
                if holder is not None and holder.token != self._mine.token:
                    self._lost(f"{self._file.parent} was taken over by {holder} while this process was silent")
                    return
                os.utime(self._file)
            except OSError:
                continue  # a file server that is away for a moment


def read_holder(file: Path) -> Holder | None:
    """Who holds a lock file; None where there is none, or nothing that can be read."""
    with suppress(OSError, ValueError, TypeError):
        known: dict[str, Any] = json.loads(file.read_text())
        return Holder(**known)
    return None


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def holder_here(file: Path) -> int | None:
    """Number of the process that holds a lock, if it is one of this machine and lives."""
    holder = read_holder(file)
    if holder is None or holder.machine != _machine():
        return None
    process = Process.at(holder.pid)
    return holder.pid if process is not None and process.began == holder.began else None
