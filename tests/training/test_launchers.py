"""Nobody is left behind, whichever launcher started the ranks and whatever kills it; and what each one returns.

One run folder goes through several of them, one after the other: each is killed in its own way, and the next continues.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from refiner_ds.run_folder import RunFolder, read_state
from refiner_ds.training.metrics import read_metrics
from refiner_ds.training.parent import Process
from tests.training.launched import ROOT, environment, ranks, run
from tests.training.test_resume import TINY, pid_of_rank

TRAIN = ROOT / "refiner_ds" / "train.py"
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29611"]
LONE_DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", "29612"]

# launcher, who is signalled, and how: the launcher's own process, one rank, or all as a terminal does.
Case = tuple[list[str], str, signal.Signals]
CASES: list[Case] = [(TORCHRUN, "launcher", signal.SIGUSR2), (LONE_DEEPSPEED, "all", signal.SIGHUP)]
MORE_CASES: list[Case] = [
    (DEEPSPEED, "launcher", signal.SIGKILL),
    (LONE_DEEPSPEED, "launcher", signal.SIGTERM),
    (DEEPSPEED, "rank", signal.SIGINT),
]


def arguments(output: Path, **more: object) -> list[str]:
    """A run that would take long to end by itself, and saves at its end only."""
    keys = {**TINY, "refiner.run.output": str(output), "refiner.recipe.epochs": 100, "refiner.data.workers": 1}
    keys |= {"refiner.run.checkpoint_epochs": 1000, "refiner.run.eval_epochs": 1000, **more}
    return [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]


@contextmanager
def started(launcher: list[str], *words: str) -> Iterator[subprocess.Popen]:
    """A launched training, none of it left afterwards."""
    process = subprocess.Popen(
        [*launcher, str(TRAIN), *words], cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    everything: list[Process] = []
    try:
        yield process
    finally:
        everything += descendants(process.pid)
        for found in everything:
            if found.is_alive:
                os.kill(found.pid, signal.SIGKILL)
        process.communicate()


def descendants(pid: int) -> list[Process]:
    """A process and all that it started, directly or not."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found, left = [], [pid]
    while left:
        if (process := Process.at(left[0])) is not None:
            found.append(process)
        left = left[1:] + children.get(left[0], [])
    return found


def steps(run: Path) -> int:
    return read_metrics(run, "train")[-1]["step"] if (run / "metrics.jsonl").exists() and read_metrics(run) else 0


def saved(run: Path) -> int:
    latest = RunFolder(run).latest_checkpoint()
    return read_state(latest).step if latest else 0


def lock_holder(run: Path) -> int:
    return json.loads((run / "lock").read_text())["pid"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "cases", [pytest.param(CASES, id="two"), pytest.param(MORE_CASES, id="more", marks=pytest.mark.long)]
)
def test_whatever_kills_a_launcher_its_ranks_save_and_leave(cases: list[Case], tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    for launcher, whom, number in cases:
        case, before = f"{' '.join(launcher[2:])}, {number.name} to {whom}", saved(folder)
        with started(launcher, *arguments(tmp_path)) as process:
            wait_for(lambda: steps(folder) >= before + 2 and (folder / "lock").exists(), case)  # noqa: B023
            if not before:
                a_second_run_is_refused(tmp_path)
            everything = descendants(process.pid)
            if whom == "launcher":
                process.send_signal(number)
            elif whom == "rank":
                os.kill(lock_holder(folder), number)
            else:
                os.killpg(process.pid, number)
            wait_for(lambda: not any(left.is_alive for left in everything), case)  # noqa: B023
            code, said = process.wait(), process.stdout.read()  # type: ignore[union-attr]
        assert saved(folder) > before, f"{case}: nothing was saved\n{said}"
        assert not (folder / "lock").exists(), case
        assert "Traceback" not in said, f"{case}: {said}"
        if whom == "rank":
            assert code == 75, case


def a_second_run_is_refused(output: Path) -> None:
    holder = lock_holder(output / "quickstart")
    before = (output / "quickstart" / "config.json").read_bytes()
    second = ranks(TRAIN, *arguments(output), processes=1)
    assert second.returncode == 2 and f"process {holder} on {os.uname().nodename} trains here already" in second.stderr
    assert (output / "quickstart" / "config.json").read_bytes() == before


def wait_for(true, case: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, case
        time.sleep(0.1)


# What each launcher returns for each exit code of its ranks; docs/training.md holds the same table.
RETURNS = {
    "python": (PYTHON, {2: 2, 3: 3, 75: 75}),
    "deepspeed": (DEEPSPEED, {2: 2, 3: 3, 75: 75}),
    "torchrun": (TORCHRUN, {2: 1, 3: 1, 75: 1}),
}


@pytest.mark.parametrize(
    "codes", [pytest.param((75,), id="75"), pytest.param((2, 3), id="others", marks=pytest.mark.long)]
)
def test_what_each_launcher_returns_is_what_the_table_in_the_docs_says(codes: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "leave.py").write_text("import sys; sys.exit(int(sys.argv[-1]))")
    cases = [(name, code) for name in RETURNS for code in codes]

    def returned(case: tuple[str, int]) -> int:
        name, code = case
        launcher = [word.replace("29611", str(29620 + code)) for word in RETURNS[name][0]]
        return run(*launcher, tmp_path / "leave.py", str(code)).returncode

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(cases, pool.map(returned, cases), strict=True))
    assert found == {(name, code): RETURNS[name][1][code] for name, code in cases}
    table = (ROOT / "docs" / "training.md").read_text()
    for name, (_, returns) in RETURNS.items():
        assert f"| `{name}` | {' | '.join(str(returns[code]) for code in (2, 3, 75))} |" in table


def test_a_stopped_rank_is_named_and_deepspeed_returns_75(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    with started(DEEPSPEED, *arguments(tmp_path, **{"refiner.run.hang_seconds": 5})) as process:
        wait_for(lambda: steps(folder) >= 6, "start")
        everything = descendants(process.pid)
        stopped = pid_of_rank(folder, 1)
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        wait_for(lambda: not any(left.is_alive for left in everything), "hang")
        code, said = process.wait(), process.stdout.read()  # type: ignore[union-attr]
        print(f"all had left {time.monotonic() - began:.1f} s after rank 1 was stopped")
    assert code == 75, said
    assert f"rank 1 (process {stopped} on {os.uname().nodename}; step " in said
    assert re.search(r"no progress for \d+ s: .*is stopped.*the same command continues", said)
    stacks = (folder / "logs" / "rank_1.stacks").read_text()
    assert "step.py" in stacks and "in __call__" in stacks
    assert not (folder / "lock").exists()
