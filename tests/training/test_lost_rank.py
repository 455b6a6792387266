"""A rank whose peer is gone says so in a sentence, with who it was, and leaves at once; its log has the traceback."""

from __future__ import annotations

import logging
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refiner_ds.run_folder import RunFolder
from refiner_ds.training.heartbeat import Beat
from refiner_ds.training.lost_rank import report_lost_ranks
from refiner_ds.training.parent import Process
from refiner_ds.training.run_lock import Holder
from refiner_ds.training.world import World

GLOO = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] {} This is typically caused by a remote"
    " worker hanging or bugs in the application. Check the logs of the remote worker before reporting an error. GLHF! 🏖️"
)


def beat_of(folder: RunFolder, rank: int, pid: int) -> Beat:
    me, process = Holder.this_process(), Process.at(pid)
    assert process is not None
    beat = Beat(rank, me.host, pid, me.machine, process.began, 9, 40, "backward", 1)
    beat.write(folder.heartbeats)
    return beat


def fails(folder: RunFolder, size: int, error: RuntimeError) -> list[int]:
    left: list[int] = []
    with (
        pytest.raises(RuntimeError),
        report_lost_ranks(folder, World(0, size, 0, torch.device("cpu")), left.append),
    ):
        raise error
    return left


@pytest.mark.parametrize(
    "words, shown",
    [("Connection closed by peer [127.0.0.1]:61142", "Connection closed by peer [127.0.0.1]:61142"),
     ("Read error [127.0.0.1]:6: Connection reset by peer.", "Read error [127.0.0.1]:6: Connection reset by peer"),
     ("writev [127.0.0.1]:61142: Broken pipe", "writev [127.0.0.1]:61142: Broken pipe"),
     ("Connection closed by remote peer", "Connection closed by remote peer"), ("Socket closed", "Socket closed"),
     ("remote process exited or there was a network error", "remote process exited")],
)  # fmt: skip
def test_a_rank_that_is_gone_is_named_with_what_is_lost_and_what_comes_next(
    words: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    folder.heartbeats.mkdir()
    folder.checkpoint(36).mkdir(parents=True)
    folder.latest_file.write_text("step_00000036\n")
    other = subprocess.Popen(["sleep", "60"])
    beat_of(folder, 2, os.getpid())
    killed = beat_of(folder, 1, other.pid)
    other.kill()
    other.wait()
    with caplog.at_level(logging.WARNING):
        assert fails(folder, 3, RuntimeError(GLOO.format(words))) == [1]
    said = capsys.readouterr().err
    assert said == (
        f"error: rank 0: {killed} is gone ({shown}); what was trained since step_00000036 is lost;"
        f" this rank leaves with exit code 1, and the same command continues; traceback: {folder.rank_log(0)}\n"
    )
    assert "Traceback" in caplog.text and "GLHF" in caplog.text


def test_a_rank_whose_connections_close_before_it_has_ended_is_named_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    folder.heartbeats.mkdir()
    beat_of(folder, 2, os.getpid())
    with subprocess.Popen(["sleep", "0.5"]) as other:
        leaving = beat_of(folder, 1, other.pid)
        fails(folder, 3, RuntimeError(GLOO.format("Connection closed by peer [127.0.0.1]:61142")))
    assert f"{leaving} is gone (" in capsys.readouterr().err


@pytest.mark.parametrize("known, named", [((2,), "rank 1 is gone"), ((), "another rank is gone")])
def test_a_rank_that_has_closed_its_heartbeat_is_gone_and_where_all_others_have_none_is_named(
    known: tuple[int, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    folder.heartbeats.mkdir()
    for rank in known:
        beat_of(folder, rank, os.getpid())
    fails(folder, 3, RuntimeError(GLOO.format("Connection closed by peer [10.0.0.2]:1")))
    assert f"error: rank 0: {named} (" in capsys.readouterr().err


def test_of_another_machines_ranks_nobody_here_can_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path)
    folder.heartbeats.mkdir()
    beat_of(folder, 2, os.getpid())
    replace(beat_of(folder, 1, os.getpid()), pid=1 << 30, machine="another").write(folder.heartbeats)
    fails(folder, 3, RuntimeError(GLOO.format("Connection closed by peer [10.0.0.2]:1")))
    assert "error: rank 0: another rank is gone (" in capsys.readouterr().err


def test_where_nobody_here_can_tell_no_rank_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path)
    folder.heartbeats.mkdir()
    beat_of(folder, 1, os.getpid())
    assert fails(folder, 2, RuntimeError(GLOO.format("Connection closed by peer [10.0.0.2]:1"))) == [1]
    said = capsys.readouterr().err
    assert "another rank is gone (Connection closed by peer [10.0.0.2]:1); nothing had been saved" in said


def test_another_error_stays_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(RunFolder(tmp_path), 2, RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == []
    assert capsys.readouterr().err == ""
