"""Run a training command again as long as that helps, for machines without a scheduler that would.

    python -m refiner_ds.restart --times 20 -- deepspeed refiner_ds/train.py --config F
    python -m refiner_ds.restart -- torchrun --nproc_per_node 8 refiner_ds/train.py --config F

A run that was stopped (75), hung (75) or crashed (any other code) is started again, at most ``--times`` times, and only
where it saved a checkpoint since it was started: what made no progress once would make none again. A run that is
finished (0), refused (2) or diverged (3) is not. Ctrl-C, TERM, HUP and USR2 make the ranks save, and end this
command as well.

torchrun's ``--max-restarts`` restarts refused and diverged runs as well, and counts starts that made no progress.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from refiner_ds.command_line import command_parser
from refiner_ds.config import load
from refiner_ds.errors import LaunchError, report_errors
from refiner_ds.exit_codes import DIVERGED, FINISHED, REFUSED, RUN_AGAIN
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.run_lock import holder_here
from refiner_ds.training.signals import STOPPING

FINAL = (FINISHED, REFUSED, DIVERGED)
LAST_SECONDS, LOOK_SECONDS = 600.0, 0.2


class Supervisor:
    """Starts one command, again and again.

    Args:
        command: a launcher's command line.
        folder: where it trains.
        times: restarts allowed.
    """

    def __init__(self, command: list[str], folder: RunFolder, times: int) -> None:
        self._command, self._folder, self._times = command, folder, times
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def run(self) -> int:
        """Run to the end; returns the last exit code."""
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._pass_on)
        restarts = 0
        while True:
            before = self._folder.latest_checkpoint()
            code = self._once()
            if code in FINAL:
                return code
            if self._stopping:
                return RUN_AGAIN
            latest = self._folder.latest_checkpoint()
            what = f"the command ended with exit code {code}"
            if latest == before:
                _say(f"{what} and saved no checkpoint since it was started: not started again")
                return code
            if restarts == self._times:
                _say(f"{what} after {restarts} restarts, which is all --times allows")
                return code
            restarts += 1
            _say(f"{what}: restart {restarts} of at most {self._times}, from {latest}")

    def _once(self) -> int:
        if self._stopping:
            return RUN_AGAIN
        try:
            self._process = subprocess.Popen(self._command)
        except OSError as error:
            raise LaunchError(f"{self._command[0]}: cannot be started: {error.strerror}") from None
        code = self._process.wait()
        self._wait_for_ranks()
        return 128 - code if code < 0 else code

    def _wait_for_ranks(self) -> None:
        """A launcher that was killed ends before its ranks, which still save what they have."""
        end = time.monotonic() + LAST_SECONDS
        while holder_here(self._folder.lock) is not None and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        if number in (signal.SIGINT, signal.SIGHUP):
            return  # a terminal sends these to the whole group
        rank = holder_here(self._folder.lock)  # launchers die of what their ranks save on
        if rank is not None:
            os.kill(rank, signal.SIGTERM)
        elif self._process is not None:
            self._process.terminate()


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code. See the module for what it takes."""
    parser = command_parser(__doc__, "python -m refiner_ds.restart")
    parser.add_argument("--times", type=int, default=20, metavar="N", help="restarts at most (default: 20)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and what starts the run")
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    return Supervisor(command, run_folder_of(command), options.times).run()


def run_folder_of(command: list[str]) -> RunFolder:
    """The run folder that a training command would use.

    Raises:
        LaunchError: it is not a training command.
    """
    for place, word in enumerate(command):
        if word == "refiner_ds.train" or Path(word).parts[-2:] == ("refiner_ds", "train.py") or word == "train.py":
            parser = argparse.ArgumentParser(add_help=False)
            parser.add_argument("--config")
            parser.add_argument("--set", action="append", default=[])
            options, _ = parser.parse_known_args(command[place + 1 :])
            return RunFolder(load(options.config, options.set).folder)
    raise LaunchError(f"{' '.join(command) or 'nothing'}: give a command that runs refiner_ds/train.py, after --")


def _say(text: str) -> None:
    print(f"restart: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
