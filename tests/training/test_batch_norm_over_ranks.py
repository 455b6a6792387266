"""With batch norms over ranks a run on two processes takes the course of one process with the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refiner_ds.training.metrics import read_metrics
from tests.training.launched import ROOT, ranks

TINY = {
    "refiner.model.depth": 2, "refiner.model.embed_dim": 16, "refiner.model.num_heads": 2,
    "refiner.model.stem_chs": [4, 4, 4], "refiner.recipe.epochs": 0.03, "train_batch_size": 8,
    "refiner.recipe.warmup_epochs": 0,
    "refiner.recipe.cooldown_epochs": 0, "refiner.recipe.mix_token": False, "refiner.run.log_steps": 1,
    "refiner.data.val": None, "refiner.model.sync_batch_norm": True, "zero_optimization.stage": 2,
}  # fmt: skip


def losses(output: Path, processes: int) -> list[float]:
    keys = {**TINY, "refiner.run.output": str(output)}
    arguments = [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    done = ranks(ROOT / "refiner_ds" / "train.py", *arguments, processes=processes)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return [line["loss"] for line in read_metrics(output / "quickstart", "train")]


def test_two_processes_take_the_course_of_one(tmp_path: Path) -> None:
    one, two = (losses(tmp_path / str(processes), processes) for processes in (1, 2))
    assert len(one) == 5
    assert two == pytest.approx(one, rel=5e-4)  # 1e-6 here; 4e-3 where each rank has statistics of its own
