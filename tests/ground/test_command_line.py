"""What a command's parser refuses it may quote, but not the secrets in it."""

from __future__ import annotations

import re

import pytest

from refiner_ds.command_line import command_parser
from tests.imports import module_files

# Started by other commands, with addresses of nobody.
INTERNAL = {"refiner_ds.command_line", "refiner_ds.restart", "launch.health.probe", "launch.supervisor"}


@pytest.mark.parametrize("words", [["--labls"], ["--number"], ["one", "--more"]])
def test_refused_options_hide_the_secrets_of_an_address(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = command_parser("Does nothing.")
    parser.add_argument("--number", type=int)
    subparsers = parser.add_subparsers()
    subparsers.add_parser("one")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([*words, "https://ann:hush@host/set?sig=hush"])
    told = capsys.readouterr().err
    assert "hush" not in told and "https://***@host/set?***" in told


def test_every_command_has_such_a_parser() -> None:
    own = {module for module, file in module_files().items() if "argparse.ArgumentParser(" in file.read_text()}
    assert own - INTERNAL == set()


def test_a_script_knows_its_clone_before_it_imports_anything_of_it() -> None:
    """Or another copy on the path would run instead; nor would it start in a clone that is not installed."""
    for module, file in module_files().items():
        before, prologue, _ = file.read_text().partition("    sys.path[0], __package__ =")
        assert not prologue or not re.search(r"^(from|import) (refiner_ds|launch|data_tools)\b", before, re.M), module
