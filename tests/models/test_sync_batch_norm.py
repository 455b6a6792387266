"""Batch norms over all ranks give what one process with the whole batch gives, on CPUs too."""

from __future__ import annotations

import json

import pytest
import torch

from refiner_ds.models import SyncBatchNorm
from tests.models.small import RELEASED, differences, pictures, small_model, training_step
from tests.training.launched import ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    report = tmp_path_factory.mktemp("sync") / "found.json"
    done = ranks("-m", "tests.models.sync_batch_norm_script", report)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(report.read_text())


@pytest.mark.parametrize("unit", ["None", "block", "refiner"])
def test_two_ranks_equal_one_process_with_the_whole_batch(found: dict[str, dict[str, float]], unit: str) -> None:
    assert found[unit]["loss"] < 1e-9
    assert found[unit]["gradients"] < 1e-7
    assert found[unit]["statistics"] < 1e-9  # and each step is counted once, recomputed or not


def test_alone_it_is_the_batch_norm_it_was_and_can_be_folded() -> None:
    model = SyncBatchNorm.convert(small_model(**RELEASED))
    assert sum(isinstance(module, SyncBatchNorm) for module in model.modules()) == 3 + 2 * 4
    assert model.state_dict().keys() == small_model(**RELEASED).state_dict().keys()
    assert differences(training_step(model), training_step(small_model(**RELEASED))) == []
    truth = model.eval()(pictures())
    torch.testing.assert_close(model.fuse()(pictures()), truth, rtol=1e-4, atol=1e-5)
    half = SyncBatchNorm.convert(small_model(**RELEASED)).bfloat16()
    assert half.patch_embed.bn1.running_var.dtype == torch.float32
    assert half.patch_embed.bn1.weight.dtype == torch.bfloat16
