"""Starting a script of the tests in several real processes, with a time-out, and reading what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """What a user's shell would hold, with one thread a process and the package found from anywhere."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def torchrun(
    *command: str | Path, processes: int = 2, timeout: float = 240, **settings: Any
) -> subprocess.CompletedProcess:
    """``torchrun --nproc_per_node N command…`` on a free port; ends with an assertion where it takes too long."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return run(*start, *command, timeout=timeout, **settings)


def run(*command: str | Path, timeout: float = 240, cwd: Path = ROOT, env: dict[str, str] | None = None) -> Any:
    """Run a command to its end, its whole process group gone afterwards."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=env or environment(),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        raise AssertionError(f"{command} ran past {timeout} s\n{out[-3000:]}\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def findings(script: str, folder: Path, processes: int = 2, timeout: float = 280) -> dict[str, Any]:
    """Run a script beside this file on several ranks; it writes what it found to the file it is given."""
    report = folder / f"{Path(script).stem}.json"
    done = torchrun(Path(__file__).parent / script, report, processes=processes, timeout=timeout)
    assert done.returncode == 0, f"{script} failed\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(report.read_text())
