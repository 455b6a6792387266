"""What a run does again and again for a month leaves nothing behind in its process."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from refiner_ds.run_folder import RunFolder
from refiner_ds.training.metrics import Metrics
from refiner_ds.training.pictures import Views, views_picture
from tests.training.saving import checkpoints_of, save


def held() -> tuple[int, int, int]:
    """File descriptors, threads and tensors of this process."""
    gc.collect()
    tensors = sum(type(one) is torch.Tensor for one in gc.get_objects())
    return len(os.listdir("/proc/self/fd")), threading.active_count(), tensors


def test_saves_lines_and_events_leave_no_descriptor_thread_or_tensor_behind(tmp_path: Path) -> None:
    checkpoints, metrics = checkpoints_of(tmp_path, 2), Metrics(RunFolder(tmp_path), 0)

    def go_on(first: int, last: int) -> None:
        for step in range(first, last):
            assert save(checkpoints, step).folder is not None
            metrics.write("train", step, 0.1, step, loss=1.0)
            metrics.picture("views", np.zeros((2, 2, 3), np.uint8), step)

    go_on(1, 3)
    before = held()
    go_on(3, 13)
    assert held() == before
    metrics.close()


def test_a_picture_is_gone_once_it_is_drawn() -> None:
    gc.collect()
    gc.disable()  # what only the collector would find counts as left behind
    try:
        views = Views(torch.rand(2, 8, 8, 3), torch.eye(2), torch.eye(2)[:, None], (0, 0, 1, 1))
        for _ in range(3):
            views_picture(views, ["a", "b"], (2, 2))
            assert sum(isinstance(one, Figure) for one in gc.get_objects()) <= 1
    finally:
        gc.enable()
