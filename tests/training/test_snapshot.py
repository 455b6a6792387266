"""Copies are made beside training, which waits for them before it changes what is copied, and no longer."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from refiner_ds.checkpoint.files import read_weights
from refiner_ds.run_folder import State
from refiner_ds.training import snapshot
from refiner_ds.training.checkpoints import Contents
from tests.training.saving import checkpoints_of

CONTENTS = Contents(State(1, 48, 0.1, 1), {"refiner": {}}, ["a", "b"], {}, {})


def test_an_update_waits_until_weights_are_copied_and_the_wait_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, go_on, copy = checkpoints_of(tmp_path, newest=2), threading.Event(), snapshot._copy

    def late(into: Tensor, source: Tensor) -> None:
        go_on.wait(timeout=60)
        copy(into, source)

    monkeypatch.setattr(snapshot, "_copy", late)
    weights = checkpoints._engine.masters()[0]
    before = weights.clone()
    checkpoints.begin(CONTENTS)
    assert checkpoints.outcome() is None and checkpoints.waited() == 0  # training goes on
    threading.Timer(0.2, go_on.set).start()
    assert checkpoints._engine.await_copies is not None
    checkpoints._engine.await_copies()
    assert go_on.is_set()
    weights.add_(1)  # the update
    assert checkpoints.waited() > 0 and checkpoints.waited() == 0
    outcome = checkpoints.outcome(wait=True)
    assert outcome is not None and outcome.folder is not None
    assert torch.equal(read_weights(outcome.folder, "model")["w"], before)


def test_a_copy_that_fails_holds_up_no_update_and_the_next_save_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Tensor) -> None:
        raise RuntimeError("no such device")

    checkpoints = checkpoints_of(tmp_path, newest=2)
    with monkeypatch.context() as patched:
        patched.setattr(snapshot, "_copy", fails)
        checkpoints.begin(CONTENTS)
        assert checkpoints._engine.await_copies is not None
        checkpoints._engine.await_copies()
        outcome = checkpoints.outcome(wait=True)
    assert outcome is not None and outcome.folder is None
    assert outcome.failure.endswith("was not saved (RuntimeError: no such device)")
    assert not list(tmp_path.glob("checkpoints/*"))
    checkpoints.begin(CONTENTS)
    again = checkpoints.outcome(wait=True)
    assert again is not None and again.folder is not None and not again.failure
