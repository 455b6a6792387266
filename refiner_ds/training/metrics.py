"""What a run tells about itself: ``metrics.jsonl`` and TensorBoard events, from the leading process only.

metrics.jsonl     {"kind": "train", "step": …, "loss": …, …}   {"kind": "eval", "top1": …, "weights": "ema", …}
tensorboard/      the same numbers as train/…, eval/ema/…, eval/model/…, and pictures
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from refiner_ds.files import write_atomically
from refiner_ds.run_folder import RunFolder


class Metrics:
    """Writer of one run folder's metrics; a silent one where ``folder`` is None (every rank but the leading).

    Args:
        step: optimizer steps already trained. What an earlier process logged beyond that is dropped here and hidden in
            TensorBoard, since those steps will be trained again.
    Attributes:
        evaluations: by "ema/top1" and its like, the metric by step, of all evaluations of the run so far.
    """

    def __init__(self, folder: RunFolder | None, step: int) -> None:
        self._file = None
        self.evaluations: dict[str, dict[int, float]] = {}
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        for line in _drop_beyond(folder.metrics, step):
            self._remember(line)
        self._file = open(folder.metrics, "a", buffering=1)
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=step + 1)

    def write(self, kind: str, step: int, epoch: float, samples: int, **values: Any) -> None:
        """One line, and one scalar for each number in it.

        Args:
            kind: "train" or "eval".
        """
        if self._file is None:
            return
        known = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        line = {"kind": kind, "step": step, "epoch": round(epoch, 6), "samples": samples, "time": time.time(), **known}
        self._remember(line)
        self._file.write(json.dumps(line) + "\n")
        prefix = f"{kind}/{values['weights']}" if "weights" in values else kind
        for key, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{prefix}/{key}", value, step)
        self._board.flush()

    def _remember(self, line: dict[str, Any]) -> None:
        if line["kind"] == "eval":
            for metric in ("top1", "top5", "loss"):
                values = self.evaluations.setdefault(f"{line['weights']}/{metric}", {})
                if line.get(metric) is not None:
                    values[line["step"]] = line[metric]

    def picture(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        """A uint8 picture [H, W, 3] for TensorBoard."""
        if self._file is not None:
            self._board.add_image(name, image_HWC, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def read_metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run folder's ``metrics.jsonl``, of one kind or all."""
    lines = [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def _drop_beyond(file: Path, step: int) -> list[dict[str, Any]]:
    """Cut a file down to the lines up to ``step``; returns them."""
    if not file.exists():
        return []
    kept, lines = [], []
    for line in file.read_text().splitlines():
        try:
            known = json.loads(line)
            if known["step"] <= step and known["kind"]:
                kept.append(known)
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the line a killed process was writing
    write_atomically(file, "".join(lines))
    return kept
