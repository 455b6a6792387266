"""Which code this is: the commit of the clone it runs from, or of the clone a snapshot was taken from."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commit(root: Path = ROOT) -> str:
    """The commit, marked ``-dirty`` where files differ from it; "unknown" outside a clone."""
    noted = root / "commit"  # a submitted run's snapshot has it as a file
    if noted.is_file():
        return noted.read_text().strip()
    return ask_git(root, "describe", "--always", "--dirty", "--abbrev=40").strip() or "unknown"


def ask_git(root: Path, *words: str) -> str:
    """What a git command prints in a clone; nothing where it fails."""
    try:
        done = subprocess.run(("git", "-C", str(root), *words), capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""


@cache
def code_hash(folder: Path = ROOT / "refiner_ds") -> str:
    """A hash of the code in a folder, the whole package's for none, wherever it lies."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()
