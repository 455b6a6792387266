"""Commands that follow training in a chain, each as a job of its own on the run folder: evaluate, calibrate, export.

    submit.py --config refiner_l.json --then evaluate --then "export --onnx"

Their flags are those they have when they are typed. Nothing of them needs to be saved: one that is interrupted begins
again, and writes its results whole or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from refiner_ds.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from refiner_ds.config import RunFile

NAMES = ("evaluate", "calibrate", "export")
ALONE = ("export",)  # one process; the others share a set out over all GPUs of a node


@dataclass(frozen=True)
class Command:
    """A command on a run folder.

    Attributes:
        words: its name and flags.
        label: the name by which jobs.py knows its job: evaluate, evaluate-2, …
        folder: where it was typed; paths among its flags are relative to that.
    """

    words: tuple[str, ...]
    label: str
    folder: str

    @property
    def alone(self) -> bool:
        """Whether it is one process."""
        return self.words[0] in ALONE

    def __str__(self) -> str:
        return shlex.join(self.words)

    def run(self, run_folder: Path) -> int:
        """Run it in this process. Returns its exit code.

        Raises:
            LaunchError: this node does not see the folder in which it was typed.
        """
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise LaunchError(
                f"{self.folder}: {error.strerror}; submit from a folder that every node sees, which paths of {self}"
                " are relative to"
            ) from None
        words = [str(run_folder), *self.words[1:]]
        return int(_module(self.words[0]).main(words))

    def check(self, run: RunFile) -> None:
        """Refuse flags that the command does not take, and sets that are not there.

        Raises:
            ConfigError, LaunchError: in one sentence.
        """
        options = self._options(str(run.folder))
        if not hasattr(options, "data"):
            return
        given = [options.data] if isinstance(options.data, str) else options.data
        if not given and run.refiner.data.val is None:
            raise LaunchError(f"--then {self}: {run.path} has no refiner.data.val; give --data SET")
        for place in given or ():
            name, equals, rest = place.partition("=")
            where = rest if equals and re.fullmatch(r"[\w.-]+", name) else place
            if not re.match(r"\w+:", where) and not Path(where).exists():
                raise LaunchError(f"--then {self}: {where}: no such set")

    def _options(self, run_folder: str) -> argparse.Namespace:
        words = [run_folder, *self.words[1:]]
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return cast(argparse.Namespace, _module(self.words[0]).read_options(words))
        except SystemExit:  # argparse's refusal: its usage, and a sentence
            why = said.getvalue().strip().rpartition("error: ")[2]
            raise LaunchError(f"--then {self}: {why or 'give it without --help'}") from None
        except ConfigError as error:
            raise LaunchError(f"--then {self}: {error}") from None


def _module(name: str) -> ModuleType:
    """The command's module, which imports torch only when it runs."""
    if name == "evaluate":
        from refiner_ds import evaluate

        return evaluate
    if name == "calibrate":
        from refiner_ds import calibrate

        return calibrate
    from refiner_ds.export import __main__ as export

    return export


def command_of(given: str, earlier: Sequence[Command]) -> Command | None:
    """The command that a ``--then`` names; None where it is a run file.

    Args:
        earlier: those before it in the chain.
    Raises:
        LaunchError: it is neither.
    """
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise LaunchError(f"--then {given}: {error}") from None
    if words and words[0] in NAMES:
        before = sum(command.words[0] == words[0] for command in earlier)
        label = f"{words[0]}-{before + 1}" if before else words[0]
        return Command(tuple(words), label, os.getcwd())
    if not given.endswith(".json") and not Path(given).exists():
        near = difflib.get_close_matches(words[0] if words else "", NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"give a run file, or one of {', '.join(NAMES)}"
        raise LaunchError(f"--then {given}: is no run file and no command; {hint}")
    return None
