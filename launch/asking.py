"""A question to Slurm that may go unanswered, asked while run folders are read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from refiner_ds.errors import LaunchError

from .slurm import Forgotten, NoSlurm

Answer = TypeVar("Answer")

GRACE_SECONDS = 0.2  # for a client that was told to end at the deadline


class Question(Generic[Answer]):
    """A question that a thread of its own asks from now on.

    Args:
        ask: is given the seconds that it may take; a LaunchError is Slurm's silence.
    """

    def __init__(self, ask: Callable[[float], Answer], seconds: float) -> None:
        self._answer: Answer | None = None
        self._error: LaunchError | None = None
        self._deadline = time.monotonic() + seconds

        def run() -> None:
            try:
                self._answer = ask(seconds)
            except LaunchError as error:
                self._error = error

        # A client that hangs in the kernel must not keep this process from ending.
        self._thread = threading.Thread(target=run, name="slurm", daemon=True)
        self._thread.start()

    @property
    def answer(self) -> Answer | None:
        """What Slurm says; None where it has said nothing by the deadline, which this waits for."""
        self._thread.join(max(0.0, self._deadline + GRACE_SECONDS - time.monotonic()))
        return self._answer

    @property
    def forgotten(self) -> bool:
        """Whether Slurm says that it does not know the job, or no longer."""
        return self.answer is None and isinstance(self._error, Forgotten)

    @property
    def silence(self) -> str:
        """Why there is no answer, in words; empty where there is one, or the job is forgotten."""
        if self.answer is not None or self.forgotten:
            return ""
        return "there is no Slurm here" if isinstance(self._error, NoSlurm) else "Slurm does not answer"
