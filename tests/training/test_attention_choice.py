"""``attention: auto`` chooses once: a run that is resumed on the same machine goes on with what it began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from refiner_ds import attention
from refiner_ds.attention import dispatch
from refiner_ds.attention.choice import Candidate, Layer, Measured
from refiner_ds.config import load
from refiner_ds.run_folder import RunFolder
from refiner_ds.training import attention_choice
from refiner_ds.training.attention_choice import choose_backends
from refiner_ds.training.preparation import Preparation, prepare
from refiner_ds.training.world import World


class Alone(World):
    """One process, which needs no group."""

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> Any:
        return [value]


WORLD = Alone(0, 1, 0, torch.device("cpu"))


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFINER_ATTENTION", raising=False)
    monkeypatch.setattr(dispatch, "_chosen", {})


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Preparation:
    monkeypatch.setattr(attention_choice, "SMALL", 0)
    return made(tmp_path)


def made(place: Path, *more: str) -> Preparation:
    small = ("embed_dim=16", "num_heads=2", "depth=2", "stem_chs=[4,4,4]")
    keys = [f"refiner.run.output={place}/runs", f"refiner.data.cache={place}/cache", "train_batch_size=4"]
    ready = prepare(load(None, [*keys, *(f"refiner.model.{key}" for key in small), *more]), 1)
    RunFolder(ready.run.folder).path.mkdir(parents=True, exist_ok=True)
    return ready


def fastest(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Have a backend come out as the fastest; what is measured is noted."""
    noted: list[str] = []

    def measure(layer: Layer, free: int, seconds: float, kernels: bool) -> Measured:
        noted.append(layer.kind)
        times = {"tiled": 2.0, "eager": 2.0, name: 1.0}
        return Measured(layer.kind, layer.images, [Candidate(one, 100, 100, ms) for one, ms in times.items()])

    monkeypatch.setattr(attention_choice, "measure", measure)
    return noted


def chosen() -> dict[str, str]:
    return {kind: attention.resolve_backend(kind=kind) for kind in ("map", "bottleneck")}


def test_it_is_measured_logged_and_written_down(ready: Preparation, caplog: pytest.LogCaptureFixture) -> None:
    state = torch.get_rng_state()
    with caplog.at_level("INFO"):
        assert choose_backends(ready, WORLD, False, None) == "the fastest here; times are in logs/rank_0.log"
    assert torch.equal(state, torch.get_rng_state())
    assert "bottleneck  tiled" in caplog.text and "bottleneck  eager" in caplog.text and "chosen" in caplog.text
    (record,) = json.loads(RunFolder(ready.run.folder).attention.read_text())
    assert record["backends"] == chosen() and record["where"]["images"] == 4


def test_what_is_timed_with_dropout_moves_no_random_number_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_choice, "SMALL", 0)
    ready, state = made(tmp_path, "refiner.model.attn_drop=0.5"), torch.get_rng_state()
    assert choose_backends(ready, WORLD, False, None).startswith("the fastest")
    assert torch.equal(state, torch.get_rng_state())


def test_where_nothing_else_fits_nothing_is_called_the_fastest(
    ready: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_choice, "_free", lambda world: 0)
    assert choose_backends(ready, WORLD, False, None) == "nothing else fits into memory; bytes are in logs/rank_0.log"
    assert chosen() == {"map": "tiled", "bottleneck": "tiled"}


def test_a_resumed_run_keeps_its_choice_whatever_is_fastest_now(
    ready: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(monkeypatch, "eager")
    choose_backends(ready, WORLD, False, None)
    noted = fastest(monkeypatch, "tiled")
    before = ready.run.resolved()
    assert choose_backends(ready, WORLD, False, before) == "as chosen when the run first trained here"
    assert chosen() == {"map": "eager", "bottleneck": "eager"} and not noted


def test_on_other_hardware_it_chooses_anew_says_so_and_remembers_both(
    ready: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(monkeypatch, "eager")
    for device, said in (("one", "the fastest"), ("other", "chosen anew, device is other and was one"), ("one", "as")):
        monkeypatch.setattr(attention_choice, "device_name", lambda _, device=device: device)
        assert choose_backends(ready, WORLD, False, ready.run.resolved()).startswith(said)
    assert len(json.loads(RunFolder(ready.run.folder).attention.read_text())) == 2


def test_a_run_begun_without_a_choice_goes_on_with_the_default(
    ready: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = fastest(monkeypatch, "eager")
    before = ready.run.resolved()
    before["refiner"]["model"]["attention"] = None
    assert choose_backends(ready, WORLD, False, before) == "the default, as it began"
    before["refiner"]["model"]["attention"] = "auto"
    choose_backends(ready, WORLD, False, before)
    assert chosen() == {"map": "tiled", "bottleneck": "tiled"} and not noted


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"kind": "map"}'])
def test_times_are_kept_from_run_to_run_and_a_damaged_file_is_measured_anew(
    ready: Preparation, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    record = RunFolder(ready.run.folder).attention
    noted = fastest(monkeypatch, "eager")
    choose_backends(ready, WORLD, False, None)
    record.unlink()
    choose_backends(ready, WORLD, False, None)
    assert noted == ["map", "bottleneck"]  # once
    for file in (Path(ready.run.refiner.data.cache or "") / "attention").iterdir():
        file.write_text(damage)
    record.write_text(damage)
    choose_backends(ready, WORLD, False, None)
    assert noted == 2 * ["map", "bottleneck"] and chosen() == {"map": "eager", "bottleneck": "eager"}


def test_a_key_or_the_environment_forces_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = fastest(monkeypatch, "eager")
    for value in ("tiled", "null"):
        assert choose_backends(made(tmp_path, f"refiner.model.attention={value}"), WORLD, False, None) == ""
    monkeypatch.setenv("REFINER_ATTENTION", "tiled")
    assert choose_backends(made(tmp_path), WORLD, False, None) == ""
    assert chosen() == {"map": "tiled", "bottleneck": "tiled"} and not noted


def test_small_runs_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = fastest(monkeypatch, "eager")
    assert choose_backends(made(tmp_path), WORLD, False, None) == "by rule: too small to time"
    assert chosen() == {"map": "eager", "bottleneck": "eager"} and not noted


def test_a_choice_that_fails_leaves_the_default(
    ready: Preparation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention_choice, "measure", lambda *_: 1 / 0)
    assert choose_backends(ready, WORLD, False, None) == ""
    assert chosen() == {"map": "tiled", "bottleneck": "tiled"} and "choosing failed" in caplog.text


def test_what_was_not_timed_for_a_reason_that_lasts_is_not_measured_anew(
    ready: Preparation, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = []

    def measure(layer: Layer, free: int, seconds: float, kernels: bool) -> Measured:
        noted.append(layer.kind)
        reasons = {
            "tiled[tall]": "not timed, since triton is not the fastest",
            "eager": "fails (not compiled within 60 s)",
        }
        left_out = [Candidate(name, 100, 100, reason=reason) for name, reason in reasons.items()]
        return Measured(layer.kind, layer.images, [Candidate("tiled", 100, 100, 1.0), *left_out])

    monkeypatch.setattr(attention_choice, "measure", measure)
    for _ in range(2):
        choose_backends(ready, WORLD, False, None)
        RunFolder(ready.run.folder).attention.unlink()
    assert noted == ["map", "bottleneck"]


def test_a_configuration_that_is_no_more_is_chosen_anew(ready: Preparation, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest(monkeypatch, "eager")
    choose_backends(ready, WORLD, False, None)
    record = RunFolder(ready.run.folder).attention
    record.write_text(record.read_text().replace('"bottleneck": "eager"', '"bottleneck": "triton[gone]"'))
    said = choose_backends(ready, WORLD, False, ready.run.resolved())
    assert said == "chosen anew, since what was chosen is not possible any more" and chosen()["bottleneck"] == "eager"
