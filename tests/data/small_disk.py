"""A file system that is really full, for tests: a tmpfs of few bytes and few files, in a mount namespace of its own.

A forked process enters a user and a mount namespace, which needs no root where the kernel lets users have them, and
sees the small disk on a folder of the test's; nobody else sees it, and it goes with the process.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20, 0x4000, 0x40000
NOT_PERMITTED = 77
ROOMY = 64 << 20


class SmallDisk:
    """A tmpfs at ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._libc = ctypes.CDLL(None, use_errno=True)
        user, group = os.getuid(), os.getgid()
        self._check(self._libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        self._check(self._libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
        self._mount(0, ROOMY, 10_000)

    def resize(self, size: int = ROOMY, files: int = 10_000) -> None:
        """Give it room for ``size`` bytes, in whole pages, and so many files and folders, its own included."""
        self._mount(MS_REMOUNT, size, files)

    def used(self) -> tuple[int, int]:
        """Bytes and files on it, its own folder included."""
        state = os.statvfs(self.folder)
        return (state.f_blocks - state.f_bfree) * state.f_frsize, state.f_files - state.f_ffree

    def _mount(self, flags: int, size: int, files: int) -> None:
        options = f"size={size},nr_inodes={files}".encode()
        self._check(self._libc.mount(b"none", os.fsencode(self.folder), b"tmpfs", flags, options))

    def _check(self, result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def run_on_small_disk(folder: Path, does: Callable[[SmallDisk | None], int], needed: bool = False) -> int:
    """Run ``does`` in a process that has a small disk at ``folder``; returns its exit code, 1 where it raised.

    Args:
        needed: `NOT_PERMITTED` is returned where the machine does not allow one; else ``does`` is given None then.
    """
    process = os.fork()
    if process == 0:
        code = 1
        disk = None
        try:
            disk = SmallDisk(folder)
        except OSError:
            if needed:
                os._exit(NOT_PERMITTED)
        gc.freeze()  # what is there already need not be looked through when a test collects what it left open
        try:
            code = does(disk)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def on_small_disk(folder: Path, test: Callable[[SmallDisk], None]) -> None:
    """Run ``test`` in a process that has a small disk at ``folder``; skips where the machine does not allow one."""

    def does(disk: SmallDisk | None) -> int:
        assert disk is not None
        test(disk)
        return 0

    code = run_on_small_disk(folder, does, needed=True)
    if code == NOT_PERMITTED:
        pytest.skip("this machine lets a test have no mount namespace, and so no disk that is really full")
    assert code == 0, "the test failed on the small disk; its traceback is on stderr"
