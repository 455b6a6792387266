"""Nothing in a step waits for the device but what docs/training.md lists, and batches come through the same memory."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from refiner_ds.data.hand_over import SLOTS
from tests.training.launched import ROOT, ranks
from tests.waits import Waits

TINY = {
    "refiner.model.depth": 2, "refiner.model.embed_dim": 16, "refiner.model.num_heads": 2,
    "refiner.model.stem_chs": [4, 4, 4], "refiner.recipe.epochs": 0.18, "refiner.recipe.warmup_epochs": 0,
    "refiner.recipe.cooldown_epochs": 0, "refiner.run.log_steps": 3, "refiner.data.val": None, "train_batch_size": 32,
    "bf16.enabled": True, "refiner.recipe.mixup": 0.8, "refiner.recipe.cutmix": 1.0,
}  # fmt: skip
LOADING = "numpy | refiner_ds/data/augment.py:resize"  # in this process, since it has no loader workers
UNSTEADY = 4  # steps until DeepSpeed knows the order of weights at stage 3 and every kind of step has been


def documented() -> set[str]:
    text = (ROOT / "docs" / "training.md").read_text().partition("## What waits for the device")[2]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    return {" | ".join(row[:2]) for row in rows[1:]}


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_waits_where_the_documentation_says_and_nowhere_else(tmp_path: Path, stage: int) -> None:
    keys = {**TINY, "refiner.run.output": str(tmp_path), "zero_optimization.stage": stage}
    arguments = [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    script, report = Path(__file__).with_name("waits_script.py"), tmp_path / "waits.json"
    done = ranks(script, report, *arguments, processes=1)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    told = json.loads(report.read_text())
    steps, listed = told["steps"], documented()
    assert len(steps) == 8
    found = {what for step in steps[UNSTEADY:-1] for what in step} - {LOADING}  # the last one saves
    ours = {what for what in found if "refiner_ds/" in what}
    first_only = {what for what in listed if "gradient_norms" in what}
    assert ours == {what for what in listed if "refiner_ds/" in what} - first_only
    assert first_only <= set(steps[2]) | set(steps[3])
    if version("deepspeed") == "0.19.8":
        assert found - ours <= listed and found - ours
    assert len(set(told["addresses"])) == SLOTS < len(told["addresses"])


@pytest.mark.parametrize(
    ("step", "what"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index by a mask"),
        (lambda x: x.__setitem__(x > 0, 1.0), "index by a mask"),
        (lambda x: x[:, [0, 1]], "index by a list"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), "tensor"),
        (lambda x: x.new_tensor([1.0]), "new_tensor"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: torch.bincount(x.long().flatten()), "bincount"),
    ],
)
def test_what_waits_is_found(step, what: str) -> None:
    x = torch.ones(2, 2)
    with Waits() as waits:
        step(x)
    assert what in {found for found, _ in waits.found}


def test_what_does_not_wait_is_not_found() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    with Waits() as waits:
        y = torch.where(x > 0, x, 0).sum() + torch.zeros(3, device=x.device)[1:].fill_(2.0).sum() + x[:, 0].sum()
        (y / 3).backward()
    assert not waits.found
