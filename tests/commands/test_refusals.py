"""Every command ends alike where it is refused: one sentence on stderr, exit code 2, said once a node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools import annotate, shard, show, verify
from launch import jobs, submit
from refiner_ds import evaluate, train
from refiner_ds.benchmark import __main__ as benchmark
from refiner_ds.errors import DataError, report_errors

COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "shard": (shard.main, ["absent", "out"]),
    "annotate": (annotate.main, ["absent"]),
    "verify": (verify.main, ["absent"]),
    "show": (show.main, ["absent", "sheet.png"]),
    "benchmark": (benchmark.main, ["loader", "--images", "absent"]),
    "train": (train.main, ["--config", "absent", "--check"]),
    "evaluate": (evaluate.main, ["absent"]),
    "jobs": (jobs.main, ["why", "absent"]),
    "submit": (submit.main, ["--local", "--config", "absent"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_refusal_is_one_sentence_and_exit_code_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main, arguments = COMMANDS[name]
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: absent: ") and told.err.count("\n") == 1 and not told.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "rank, local_rank, said",
    [
        (None, None, "error: no\n"),
        ("0", "0", "error: no\n"),
        ("3", None, ""),
        ("3", "3", ""),
        ("8", "0", "error: no\n"),  # of the second node, where alone the data may be missing
    ],
)
def test_one_process_of_a_node_says_it(
    rank: str | None,
    local_rank: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, number in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        monkeypatch.delenv(name, raising=False)
        if number:
            monkeypatch.setenv(name, number)

    @report_errors
    def main() -> int:
        raise DataError("no")

    assert main() == 2
    assert capsys.readouterr().err == said


def test_other_endings_are_left_alone() -> None:
    @report_errors
    def main(code: int) -> int:
        return 10 // code

    assert main(2) == main(code=2) == 5
    with pytest.raises(ZeroDivisionError):
        main(0)
