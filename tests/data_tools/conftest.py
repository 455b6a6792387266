"""Class-folder trees of small images to make shards of, and ways to kill a command while it works."""

from __future__ import annotations

import builtins
import hashlib
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


def picture(seed: int, mode: str = "RGB", kind: str = "JPEG", size: tuple[int, int] = (24, 18)) -> bytes:
    """An image file with random smooth content."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes of 10, 13 and 17 images."""
    folder = tmp_path / "images"
    for number, (name, count) in enumerate({"n01": 10, "n02": 13, "n03": 17}.items()):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            (folder / name / f"{name}_{image}.JPEG").write_bytes(picture(100 * number + image))
    return folder


def published_maps(tree: Path, folder: Path, rows: int = 4) -> Path:
    """A published score map for every image of a tree; each one's values tell its image."""
    for number, image in enumerate(sorted(tree.rglob("*.JPEG"))):
        path = folder / image.parent.name / f"{image.stem}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = torch.full((2, rows, 5), float(number))
        classes = torch.tensor([int(image.parent.name[1:]) - 1, 0])[:, None, None].expand(2, rows, 5)
        torch.save(torch.stack([values, classes.float()]).half(), path)
    return folder


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file of a set."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def killed_before(operation: int, work: Callable[[], int]) -> bool:
    """Run ``work`` in a process of its own that is killed outright at its n-th lasting change of the disk: just before
    a folder is made, a file is synchronised, renamed or removed, and just after one was begun, with nothing in it.

    Returns:
        whether it came to that; otherwise the work was done before.
    """
    process = os.fork()
    if process == 0:
        countdown = itertools.count(operation, -1)

        def deadly(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                if next(countdown) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)

            return call

        def deadly_open(file: object, mode: str = "r", *more: object, **named: object) -> object:
            opened = begun(file, mode, *more, **named)  # type: ignore[call-overload]
            if "w" in mode and next(countdown) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return opened

        code, begun = 99, open
        try:
            builtins.open = deadly_open  # type: ignore[assignment]
            for name in ("mkdir", "fsync", "replace", "unlink", "rename"):
                setattr(os, name, deadly(getattr(os, name)))
            code = work()
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


PAUSING = """
import importlib, sys, time
from refiner_ds.data.writer import ShardWriter
append = ShardWriter._append
def pausing(self, *sample):
    append(self, *sample)
    self._file.flush()
    time.sleep(400 if list(self.path.parent.glob("*.tar.json")) else 0.02)
ShardWriter._append = pausing
if __name__ == "__main__":
    sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
"""


def start_and_wait_until_it_writes(module: str, arguments: list[object], out: Path) -> subprocess.Popen[bytes]:
    """Start a command that pauses once a shard is finished, and wait until another is half-written."""
    script = out.with_name("pausing.py")
    script.write_text(PAUSING)
    command = [sys.executable, script, module, *map(str, arguments)]
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": root}
    )
    partial = out.with_name(out.name + ".partial")
    deadline = time.monotonic() + 120
    while not (list(partial.glob("*.tar.json")) and half_written(partial)):
        assert process.poll() is None and time.monotonic() < deadline, "it could not be met at work"
        time.sleep(0.005)
    return process


def kill_all_of(process: subprocess.Popen[bytes]) -> None:
    """Kill a command's whole process group, and clear away the semaphores that nobody is left to clear away."""
    mapped = re.findall(r"(\d+) +/dev/shm/sem\.", Path(f"/proc/{process.pid}/maps").read_text())  # inodes
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for semaphore in Path("/dev/shm").glob("sem.*"):
        with suppress(FileNotFoundError):  # others come and go
            if str(semaphore.stat().st_ino) in mapped:
                semaphore.unlink()


def half_written(partial: Path) -> list[Path]:
    """Shards under their temporary names, with something in them."""
    return [path for path in partial.glob("*.tar.tmp") if path.exists() and path.stat().st_size]


def children_of(process: int) -> list[int]:
    """Ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def finished_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every shard that has its final name."""
    found = [(path.name, path.stat()) for path in folder.glob("*.tar")]
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}
