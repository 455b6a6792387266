"""What a run tells about itself: ``metrics.jsonl`` and TensorBoard events, from the leading process only.

metrics.jsonl     {"kind": "train", "step": …, "loss": …, …}   {"kind": "eval", "top1": …, "weights": "ema", …}
tensorboard/      the same numbers as train/…, eval/ema/…, eval/model/…; grad_norm/<part>, pictures, the run file
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from refiner_ds.checkpoint.writing import free_bytes
from refiner_ds.files import append_line, has_numbers, read_objects, write_atomically
from refiner_ds.run_folder import RunFolder

ROOM = 1 << 20  # free bytes below which TensorBoard's thread is not given anything that it would die of
log = logging.getLogger("refiner_ds")


class Metrics:
    """Writer of one run folder's metrics; a silent one where ``folder`` is None (every rank but the leading).

    What a full disk has no room for is lost, and training goes on.

    Args:
        step: optimizer steps already trained. What an earlier process logged beyond that is dropped here and hidden in
            TensorBoard, since those steps will be trained again.
    Attributes:
        evaluations: by "ema/top1" and its like, the metric by step, of all evaluations of the run so far.
    """

    def __init__(self, folder: RunFolder | None, step: int) -> None:
        self._folder = folder
        self._board: SummaryWriter | None = None
        self.evaluations: dict[str, dict[int, float]] = {}
        self._open(step)

    def _open(self, step: int) -> None:
        if self._folder is None:
            return
        for line in _drop_beyond(self._folder.metrics, step):
            self._record_evaluation(line)
        self._board = SummaryWriter(str(self._folder.tensorboard), purge_step=step + 1)

    def rewind(self, step: int) -> None:
        """Forget what was logged beyond ``step``: the run has gone back to it."""
        self.close()
        self.evaluations.clear()
        self._open(step)

    def write(self, kind: str, step: int, epoch: float, samples: int, **values: Any) -> None:
        """One line, and one scalar for each number in it.

        Args:
            kind: "train" or "eval".
        """
        if self._folder is None:
            return
        known = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        line = {"kind": kind, "step": step, "epoch": round(epoch, 6), "samples": samples, "time": time.time(), **known}
        self._record_evaluation(line)
        try:
            append_line(self._folder.metrics, json.dumps(line))
        except OSError as error:
            log.warning("%s: the line of step %d is lost: %s", self._folder.metrics, step, error)
        prefix = f"{kind}/{values['weights']}" if "weights" in values else kind
        numbers = {f"{prefix}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        self.scalars(numbers, step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers for TensorBoard alone, by tag."""

        def put(board: SummaryWriter) -> None:
            for tag, number in values.items():
                board.add_scalar(tag, number, step)

        self._show(put)

    def text(self, name: str, text: str, step: int) -> None:
        """A text, in Markdown, for TensorBoard."""
        self._show(lambda board: board.add_text(name, text, step))

    def picture(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        """A uint8 picture [H, W, 3] for TensorBoard."""
        self._show(lambda board: board.add_image(name, image_HWC, step, dataformats="HWC"))

    def _show(self, put: Callable[[SummaryWriter], object]) -> None:
        if self._folder is None:
            return
        try:
            if free_bytes(self._folder.path) < ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._board = self._board or SummaryWriter(str(self._folder.tensorboard))
            put(self._board)
            self._board.flush()
        except OSError as error:
            log.warning("%s: an event is lost: %s", self._folder.tensorboard, error)
            self._close_board()  # its thread may have ended; the next event opens another

    def _close_board(self) -> None:
        board, self._board = self._board, None
        if board is not None:
            with suppress(OSError):
                board.close()

    def close(self) -> None:
        """Write out what is buffered."""
        self._close_board()

    def _record_evaluation(self, line: dict[str, Any]) -> None:
        if line["kind"] == "eval":
            for metric in ("top1", "top5", "loss"):
                values = self.evaluations.setdefault(f"{line.get('weights')}/{metric}", {})
                if has_numbers(line, metric):
                    values[line["step"]] = line[metric]


def read_metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run folder's ``metrics.jsonl``, of one kind or all; one that was cut short is left out."""
    return [line for line in _lines(RunFolder(folder).metrics) if kind in (None, line["kind"])]


def _lines(file: Path) -> list[dict[str, Any]]:
    return [line for line in read_objects(file) if isinstance(line.get("step"), int) and "kind" in line]


def _drop_beyond(file: Path, step: int) -> list[dict[str, Any]]:
    """Cut a file down to the lines up to ``step``; returns them."""
    if not file.exists():
        return []
    kept = [line for line in _lines(file) if line["step"] <= step]
    write_atomically(file, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
