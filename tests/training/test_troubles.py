"""What goes wrong in a month of training: nothing good is lost to it, and whoever meets it is heard."""

from __future__ import annotations

import errno
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from refiner_ds.checkpoint.files import MANIFEST, integrity_errors
from refiner_ds.config import load
from refiner_ds.data.locate import open_index
from refiner_ds.errors import CheckpointError, DataError
from refiner_ds.exit_codes import DIVERGED, FINISHED
from refiner_ds.run_folder import RunFolder, State
from refiner_ds.training import session, validation
from refiner_ds.training.build import build_model
from refiner_ds.training.checkpoints import Checkpoints
from refiner_ds.training.console import Console
from refiner_ds.training.engine import evaluates_in_bf16
from refiner_ds.training.heartbeat import Heartbeat
from refiner_ds.training.interval import Interval
from refiner_ds.training.loop import Trainer
from refiner_ds.training.losses import Losses
from refiner_ds.training.signals import StopFlag
from refiner_ds.training.step import OptimizerStep, Outcome
from refiner_ds.training.validation import Validation
from refiner_ds.training.world import World

T = TypeVar("T")


class Alone(World):
    """The only process of a run, without a process group."""

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def broadcast(self, value: T) -> T:
        """There is nobody else to hear it."""
        return value


ALONE = Alone(0, 1, 0, torch.device("cpu"))


class Course(Trainer):
    """The course of a run whose steps are given: their losses. Notes what it does."""

    def __init__(self, losses: list[float], *overrides: str, finite: bool = True) -> None:
        run = load(None, ["refiner.run.log_steps=4", "refiner.run.checkpoint_epochs=0.5", *overrides])
        schedule = SimpleNamespace(total_steps=len(losses), steps_an_epoch=4)
        self.ready: Any = SimpleNamespace(run=run, schedule=schedule, batch=SimpleNamespace(global_batch=48))
        self.folder, self.world = RunFolder(run.folder), ALONE
        self.console, self.stop, self.heartbeat = Console(False), StopFlag(), Heartbeat()
        self.take_step: Any = lambda step, batches: Outcome({"loss": losses[step], "loss_cls": 0.5}, False)
        self.progress: Any = SimpleNamespace(after=lambda *_: None, write=self._write)
        self.validation: Any = SimpleNamespace(evaluate=lambda step: None, picture=lambda step: None)
        self.step, self.finite, self.done = 0, finite, ""

    def _batches(self) -> Any:
        return None

    def _write(self, step: int) -> dict[str, float]:
        return {"loss_cls": 0.5, "lr": 0.0, "grad_norm": 0.0}

    def _save(self) -> bool:
        self.done += f" saved {self.step}" * self.finite
        return self.finite

    def _finish(self) -> None: ...


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_of_it_is_saved() -> None:
    sound = Course([1.0] * 8)
    assert sound.run() == FINISHED and sound.done == " saved 2 saved 4 saved 6 saved 8"
    lost = Course([1.0, 1.0, 1.0, 1.0, 1.0, float("nan"), float("nan"), float("nan")])
    assert lost.run() == DIVERGED and lost.done == " saved 2 saved 4"


def test_weights_that_are_not_finite_end_the_run_though_the_loss_still_was() -> None:
    lost = Course([1.0] * 8, finite=False)
    assert lost.run() == DIVERGED and lost.done == ""


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    "clips, advice", [("null", "or set gradient_clipping"), ("2.0", "gradient_clipping, which is")]
)
def test_a_run_that_ends_so_names_the_last_good_state_and_what_is_not_set_already(
    saved: bool, clips: str, advice: str, tmp_path: Path
) -> None:
    said: list[str] = []
    lost = Course([float("nan")], f"refiner.run.output={tmp_path}", f"gradient_clipping={clips}")
    lost.folder.path.mkdir()
    if saved:
        lost.folder.latest_file.write_text("step_00000007\n")
    lost.console.say = said.append  # type: ignore[method-assign,assignment]
    assert lost.run() == DIVERGED and len(said) == 1
    good = f"the last good state is {lost.folder}/checkpoints/step_00000007: lower"
    assert (good if saved else "; nothing has been saved yet: lower") in said[0]
    assert "(loss_cls 0.5," in said[0] and advice in said[0]


class Weights:
    """As much of an engine and of its ema as saving asks for."""

    def __init__(self, value: float) -> None:
        self.weights = {"w": torch.tensor([value, 1.0])}
        self.engine = self

    def save_checkpoint(self, folder: str, tag: str, **_: object) -> None:
        Path(folder, tag).mkdir()
        Path(folder, tag, "states.pt").write_bytes(b"states")

    def full_weights(self) -> dict[str, torch.Tensor]:
        return self.weights

    state_dict = full_weights

    def statistics(self) -> dict[str, torch.Tensor]:
        return {}


def save(checkpoints: Checkpoints, step: int, value: float = 1.0) -> Path | None:
    weights: Any = Weights(value)
    return checkpoints.save(weights, weights, State(step, step * 48, 0.0, 1), {})


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunFolder(tmp_path), 1, ALONE)
    good = save(checkpoints, 10)
    assert save(checkpoints, 20, float("nan")) is None
    assert kept(tmp_path) == ["step_00000010"] and checkpoints.newest() == good
    assert not list((tmp_path / "checkpoints").glob(".writing_*"))


def test_a_damaged_later_checkpoint_takes_no_good_ones_place(tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunFolder(tmp_path), 2, ALONE)
    for step in (10, 30, 40):
        save(Checkpoints(RunFolder(tmp_path), 9, ALONE), step)
    for step in (30, 40):
        (tmp_path / "checkpoints" / f"step_{step:08d}" / "model.safetensors").write_bytes(b"")
    assert checkpoints.newest() == tmp_path / "checkpoints/step_00000010"
    fresh = save(checkpoints, 20)  # asked to stop there, say
    assert kept(tmp_path) == [f"step_{step:08d}" for step in (10, 20, 30, 40)]
    assert checkpoints.newest() == fresh and (tmp_path / "latest").read_text() == "step_00000020\n"
    save(checkpoints, 30)
    assert kept(tmp_path) == [f"step_{step:08d}" for step in (20, 30, 40)]
    assert not integrity_errors(tmp_path / "checkpoints/step_00000030")


def test_a_checkpoint_that_somebody_reads_may_stay_until_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")  # .nfs files stand in for what is open and deleted

    checkpoints = Checkpoints(RunFolder(tmp_path), 1, ALONE)
    save(checkpoints, 10)
    with monkeypatch.context() as nfs:
        nfs.setattr(os, "rmdir", busy)
        assert save(checkpoints, 20) == checkpoints.newest()
    assert kept(tmp_path) == ["step_00000010", "step_00000020"]
    save(checkpoints, 30)
    assert kept(tmp_path) == ["step_00000030"]


def test_a_run_of_nothing_but_damaged_checkpoints_does_not_begin_anew_by_itself(tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunFolder(tmp_path), 3, ALONE)
    assert checkpoints.newest() is None  # of a run that has saved nothing yet
    for step in (10, 20):
        save(checkpoints, step)
        (tmp_path / "checkpoints" / f"step_{step:08d}" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="step_00000020/complete.json: missing.*delete .*checkpoints to begin"):
        checkpoints.newest()


def test_a_steps_time_is_that_of_the_device_and_its_losses_are_means() -> None:
    class Late:
        """Numbers that the device has not come to yet."""

        def __init__(self, numbers: torch.Tensor) -> None:
            self.numbers = numbers

        def tolist(self) -> list[float]:
            time.sleep(0.1)
            return self.numbers.tolist()

    step = OptimizerStep.__new__(OptimizerStep)
    step._batch = SimpleNamespace(global_batch=48, accumulation=2)  # type: ignore[assignment]
    step._keys = load().refiner
    step._ready = SimpleNamespace(schedule=SimpleNamespace(lr=lambda samples: 0.1, steps_an_epoch=4))  # type: ignore[assignment]
    step._world, step._stop, step._heartbeat = ALONE, StopFlag(), Heartbeat()
    step._stop.raise_flag(signal.SIGTERM, None)
    engine: Any = SimpleNamespace(set_lr=lambda lr: None, stepped=False, backward_and_step=lambda loss: None)
    step._engine, step._exchange = engine, SimpleNamespace(mean=Late)  # type: ignore[assignment]
    losses = iter([(1.0, 2.0), (3.0, 6.0)])

    def forward(batch: Any, seed: int) -> Losses:
        total, part = next(losses)
        return Losses(torch.tensor(total), {"new": torch.tensor(part)})

    step._forward = forward  # type: ignore[method-assign,assignment]
    batch: Any = SimpleNamespace(bad=1)
    outcome = step(0, iter([batch, batch]))
    assert outcome.losses == {"loss": 2.0, "loss_new": 4.0} and outcome.stopping
    assert outcome.seconds >= 0.1 and outcome.bad_samples == 2


def test_an_interval_is_the_mean_of_its_steps() -> None:
    class Sums(Alone):
        def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
            return values * 2  # two ranks

    interval = Interval()
    interval.add(Outcome({"loss": 1.0, "loss_cls": 4.0}, False, 1.0, 0.25, 1))
    interval.add(Outcome({"loss": 2.0, "loss_cls": 0.0}, False, 3.0, 0.75, 2))
    assert interval.numbers(48, Sums(0, 2, 0, torch.device("cpu"))) == {
        "loss": 1.5, "loss_cls": 2.0, "images_per_second": 24.0, "step_seconds": 2.0, "data_wait_seconds": 0.5,
        "bad_samples": 6,
    }  # fmt: skip


@pytest.mark.parametrize("rank, said", [(0, ""), (3, "error: rank 3: shard 7: damaged\n")])
def test_a_rank_that_alone_meets_damage_says_so(
    rank: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> int:
        raise DataError("shard 7: damaged")

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(session, "init", lambda timeout_minutes: World(rank, 4, 0, torch.device("cpu")))
    monkeypatch.setattr(session, "write_logs", lambda *_: None)
    monkeypatch.setattr(session, "refuse_missing_files", lambda *_: None)
    monkeypatch.setattr(session, "_locked", lambda *_: nullcontext())
    monkeypatch.setattr(session, "_watched", lambda *_: nullcontext())
    monkeypatch.setattr(session, "_print_header", lambda *_: None)
    monkeypatch.setattr(session, "Trainer", lambda *_: SimpleNamespace(run=stopped, close=lambda: None))
    ready: Any = SimpleNamespace(run=load(None, [f"refiner.run.output={tmp_path}"]), sets=())
    with pytest.raises(DataError):
        session.run_training(ready)
    assert capsys.readouterr().err == said  # the leading rank's is said by the command


def test_a_picture_skips_a_damaged_image_where_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    val = open_index("package:digits/val", tmp_path)
    tar = val.folder / val.shards[0].name
    tar.write_bytes(b"?" * 2048 + tar.read_bytes()[2048:])
    drawn = []
    monkeypatch.setattr(validation, "attention_picture", lambda model, image, pixels: drawn.append(pixels.shape))
    for bad in ("skip", "error"):
        run = load(None, [f"refiner.data.on_bad_sample={bad}"])
        ready: Any = SimpleNamespace(run=run, num_classes=10, val=val)
        ema: Any = SimpleNamespace(state_dict=build_model(run, 10).state_dict)
        metrics: Any = SimpleNamespace(picture=lambda *_: None)
        sees = Validation(ready, ALONE, None, ema, metrics, Console(False))  # type: ignore[arg-type]
        if bad == "error":
            with pytest.raises(DataError):
                sees.picture(1)
        else:
            sees.picture(1)
    assert drawn == [(28, 28, 3)]


@pytest.mark.parametrize(
    "device, asked, does", [("cuda", "true", True), ("cuda", "false", False), ("cpu", "true", False)]
)
def test_evaluation_computes_in_what_training_computed_in(device: str, asked: str, does: bool) -> None:
    world = World(0, 1, 0, torch.device(device))
    assert evaluates_in_bf16(load(None, [f"bf16.enabled={asked}"]), world) is does
