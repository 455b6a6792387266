"""What a real run says of a rank in trouble: one that waits for data, has no memory left, or is gone."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.training.launched import ranks
from tests.training.test_resume import arguments

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("troubled_script.py")
STEPS_AN_EPOCH = 30
KEYS = {"refiner.data.val": None, "refiner.data.workers": 0, "refiner.run.log_steps": 4}


def trained(output: Path, trouble: str, rank: int, step: int, steps: int) -> subprocess.CompletedProcess[str]:
    epochs = {"refiner.recipe.epochs": (steps + 0.1) / STEPS_AN_EPOCH}
    return ranks(SCRIPT, trouble, rank, step, *arguments(output, **KEYS, **epochs), timeout=200)


def test_a_rank_whose_data_all_wait_for_is_named_with_what_to_do(tmp_path: Path) -> None:
    done = trained(tmp_path, "slow", 0, 0, steps=14)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"rank 0 on \S+ is slow: its wait for data takes \d+ ms a step where", done.stdout)) == 1
    assert "rank 1 on" not in done.stdout
    assert done.stdout.count("% of a step is waiting for data: raise refiner.data.workers, which is 0;") == 1


def test_a_rank_without_memory_says_what_to_set_and_the_other_does_not_wait_for_it(tmp_path: Path) -> None:
    done = trained(tmp_path, "memory", 1, 2, steps=14)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-3000:]
    (sentence,) = [line for line in done.stderr.splitlines() if "out of memory" in line]
    assert sentence.startswith("error: rank 1 is out of memory in step 3 (forward) with 24 images of 28 px at once")
    peak = re.search(r"at once, after a peak of ([\d.]+) GiB", sentence)
    assert peak and 0.05 < float(peak[1]) < 100, sentence  # of a process that has imported torch
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.); set one of " in sentence
    assert "train_micro_batch_size_per_gpu 12 instead of 24 (saves about " in sentence
    assert "zero_optimization.stage 2" in sentence and "checkpointing pair" not in sentence  # set already
    assert "Traceback" not in done.stderr and "GPU 0 has" not in done.stderr


def test_a_killed_rank_is_named_by_the_other_which_leaves_at_once(tmp_path: Path) -> None:
    done = trained(tmp_path, "kill", 1, 8, steps=14)
    assert done.returncode in (1, -9)
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert re.match(r"error: rank 0: rank 1 \(process \d+ on \S+; step \d+, .+\) is gone \(", sentence), sentence
    assert "what was trained since step_00000006 is lost" in sentence and "the same command continues" in sentence
    assert "Traceback" not in done.stderr
    assert "Traceback" in (tmp_path / "quickstart/logs/rank_0.log").read_text()
