"""The same job on this machine: every node's processes, one fate, nothing left running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from launch import local

from .conftest import Clone

LOCAL = ("--local", "--gpus-per-node", "0")


def left_of(clone: Clone) -> list[str]:
    """Processes that still run out of the run folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(clone.run_folder) in words and "submitit" in words:
            found.append(words.replace("\0", " "))
    return found


def test_all_nodes_processes_run_here_and_meet(clone: Clone) -> None:
    clone.behave(reduce=True)
    profile = clone.output.parent / "mine.yaml"
    profile.write_text("environment: {GREETING: hello}\ntasks_per_node: 1\n")
    done = clone.submit("--nodes", "2", *LOCAL, "--cluster", str(profile))
    assert done.returncode == 0, done.stdout + done.stderr + clone.logs()
    told = [clone.seen()[f"{rank}.0"] for rank in range(2)]
    assert [(one["RANK"], one["LOCAL_RANK"], one["sum"]) for one in told] == [("0", "0", 2.0), ("1", "1", 2.0)]
    for one in told:
        assert (one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["MASTER_ADDR"]) == ("2", "2", "127.0.0.1")
        assert (one["GREETING"], one["CUDA_VISIBLE_DEVICES"]) == ("hello", "")
        assert Path(one["code"]).is_relative_to(clone.run_folder / "code")
    assert "rank 0 of the double" in done.stdout


def test_the_first_process_to_fail_ends_the_others_and_says_so(clone: Clone) -> None:
    clone.behave(r0=["hang"], r1=[3], r2=["hang"])
    done = clone.submit("--nodes", "3", *LOCAL)  # the others hang: nothing else ends them
    assert done.returncode == 3, done.stdout + done.stderr
    assert "FAILED, exit code 3; rank 1 (" in done.stdout and "diverged" in done.stdout
    assert not left_of(clone)


def test_an_interrupted_run_begins_again_while_it_gets_further(clone: Clone) -> None:
    clone.behave(r0=["step", "step", "step", "step", "step"], r1=[75] * 5)
    done = clone.submit("--nodes", "2", *LOCAL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"0.5", "1.5"} <= set(clone.seen())


def test_a_run_that_gets_no_further_does_not_begin_for_ever(clone: Clone) -> None:
    clone.behave(r0=["step", *[75] * 9])
    done = clone.submit(*LOCAL)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "3 times in a row it got no further than checkpoint step_00000000" in done.stdout
    assert set(clone.seen()) == {"0.0", "0.1", "0.2", "0.3"}


def test_a_profile_bounds_how_often_a_run_begins_again(clone: Clone) -> None:
    clone.behave(r0=["step"] * 9)
    done = clone.submit(*LOCAL, "--requeues", "2")
    assert done.returncode == 75
    assert "it has requeued itself 2 times" in done.stdout
    assert set(clone.seen()) == {"0.0", "0.1", "0.2"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ending_the_command_ends_its_processes_after_they_saved(clone: Clone, number: signal.Signals) -> None:
    clone.behave(r0=["saved"] if number == signal.SIGTERM else ["hang"], r1=["saved"])
    command = clone.command("--nodes", "2", *LOCAL)
    env = {**os.environ, "REFINER_DS_CACHE": str(clone.cache)}
    with subprocess.Popen(
        command, env=env, cwd=clone.output.parent, stdout=subprocess.DEVNULL, start_new_session=True
    ) as here:
        try:
            clone.wait_for("0.0", "1.0")
            if number == signal.SIGINT:
                os.killpg(here.pid, number)  # a terminal's Ctrl-C goes to the whole group
            else:
                here.send_signal(number)
            assert here.wait(timeout=30) == 128 + number
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(here.pid, signal.SIGKILL)
    assert not left_of(clone)
    assert set(clone.seen()) == {"0.0", "1.0"}


def test_a_machines_devices_are_those_its_user_may_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.visible_devices() == []  # no driver, no devices
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-1)'\necho 'GPU 1: H100 (UUID: GPU-2)'\n")
    tool.chmod(0o755)
    assert local.visible_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert local.visible_devices() == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.visible_devices() == []
