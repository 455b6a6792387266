"""What goes wrong in a month of training: nothing good is lost to it, and whoever meets it is heard."""

from __future__ import annotations

import errno
import os
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from refiner_ds.checkpoint.files import MANIFEST, integrity_errors, skipped
from refiner_ds.config import load
from refiner_ds.data.locate import open_index
from refiner_ds.errors import CheckpointError, DataError
from refiner_ds.exit_codes import DIVERGED, FINISHED, RUN_AGAIN
from refiner_ds.run_folder import RunFolder
from refiner_ds.training import session, validation
from refiner_ds.training.build import build_model
from refiner_ds.training.checkpoints import Outcome
from refiner_ds.training.console import Console
from refiner_ds.training.engine import evaluates_in_bf16
from refiner_ds.training.heartbeat import Heartbeat
from refiner_ds.training.interval import Interval
from refiner_ds.training.intervals import Alarm, SaveTimes
from refiner_ds.training.loop import GIVE_UP, SAVE, STOP, Trainer
from refiner_ds.training.losses import Losses
from refiner_ds.training.reading import Reader
from refiner_ds.training.recovery import Recovery
from refiner_ds.training.signals import StopFlag
from refiner_ds.training.step import OptimizerStep
from refiner_ds.training.step import Outcome as StepOutcome
from refiner_ds.training.validation import Validation
from refiner_ds.training.world import World
from tests.training.saving import ALONE, checkpoints_of, kept, save


class Course(Trainer):
    """The course of a run whose steps are given: their losses. Notes what it does."""

    def __init__(self, losses: list[float], *overrides: str, bad_from: int = 99) -> None:
        run = load(None, ["refiner.run.eval_epochs=1", "refiner.run.checkpoint_epochs=0.5", *overrides])
        keys = run.refiner.run
        schedule = SimpleNamespace(total_steps=len(losses), steps_an_epoch=4)
        self.ready: Any = SimpleNamespace(run=run, schedule=schedule, batch=SimpleNamespace(global_batch=48))
        self.folder, self.world = RunFolder(run.folder), ALONE
        self.console, self.stop, self.heartbeat = Console(False), StopFlag(), Heartbeat()
        self.losses, self.bad_from, self.requests = losses, bad_from, {}  # type: ignore[var-annotated]
        self.take_step: Any = partial(self._given)
        self.take_step.views = None  # type: ignore[attr-defined]
        self.progress: Any = SimpleNamespace(
            after=lambda *_: None, write=self._write, metrics=SimpleNamespace(evaluations={}), stalled=self._stalled
        )
        self.validation: Any = SimpleNamespace(evaluate=self._note("evaluated"), picture=lambda step: None)
        self.checkpoints: Any = SimpleNamespace(outcome=self._outcome, waited=lambda: 0.25)
        self.stall = 0.0
        self.save_times = SaveTimes(keys.checkpoint_epochs, keys.checkpoint_steps, 4)
        self.recovery = Recovery(self.ready, ALONE, self.console)
        self.profiling: Any = SimpleNamespace(
            before=lambda step: None, is_last=lambda step: False, requested=lambda: False, close=lambda: None
        )
        self.step, self.done, self.unread = 0, "", []

    def _note(self, what: str) -> Any:
        def note(step: int) -> bool:
            self.done += f" {what} {step}"
            return True

        return note

    def _given(self, step: int, batches: Any, keep_views: bool = False) -> Any:
        asked = self.requests.get(step + 1, frozenset())
        outcome = StepOutcome({"loss": self.losses[step], "loss_cls": 0.5}, asked)
        return SimpleNamespace(step=step + 1, read=lambda: outcome, micro_batches=[])

    def _batches(self) -> Any:
        return None

    def _write(self, step: int) -> dict[str, float]:
        return {"loss_cls": 0.5, "lr": 0.0, "grad_norm": 0.0}

    def _stalled(self, seconds: float) -> None:
        self.stall += seconds

    def _outcome(self, wait: bool = False) -> Outcome:
        return Outcome(self.step, None, "", self.step < self.bad_from, 0.0)

    def _save(self) -> None:
        self._note("saved")(self.step)

    def _finish(self) -> int:
        return FINISHED


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_of_it_is_saved() -> None:
    sound = Course([1.0] * 8)
    assert sound.run() == FINISHED
    assert sound.done == " saved 2 saved 4 evaluated 4 saved 6 saved 8 evaluated 8"
    assert sound.stall == 8 * 0.25  # what updates wait for copies is counted
    lost = Course([1.0, 1.0, 1.0, 1.0, 1.0, float("nan"), float("nan"), float("nan")])
    assert lost.run() == DIVERGED and lost.done == " saved 2 saved 4 evaluated 4"


def test_weights_that_a_save_found_not_finite_end_the_run_though_the_loss_still_was() -> None:
    lost = Course([1.0] * 8)
    lost.requests = {3: frozenset([GIVE_UP])}  # a rank's save has found them
    assert lost.run() == DIVERGED and lost.done == " saved 2"
    asked_to_stop = Course([1.0] * 8, bad_from=3)
    asked_to_stop.requests = {3: frozenset([STOP])}
    assert asked_to_stop.run() == DIVERGED


def test_whatever_asks_for_it_saves_and_a_stop_saves_before_it_leaves() -> None:
    course = Course([1.0] * 8, "refiner.run.checkpoint_epochs=null", "refiner.run.checkpoint_steps=3")
    course.requests = {4: frozenset([SAVE]), 5: frozenset([STOP])}
    assert course.run() == RUN_AGAIN and course.done == " saved 3 saved 4 evaluated 4 saved 6"


def test_minutes_between_checkpoints_are_the_main_ranks() -> None:
    now = [0.0]
    alarm, never = Alarm(2.0, lambda: now[0]), Alarm(None, lambda: now[0])
    for minutes, rings in ((1.9, False), (2.0, True), (3.0, True)):
        now[0] = 60 * minutes
        assert alarm.rings() is rings and not never.rings()
    alarm.reset()
    assert not alarm.rings()


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("clips, advice", [("null", "set gradient_clipping"), ("2.0", "gradient_clipping, which is 2")])
def test_a_run_that_ends_so_names_the_last_good_state_and_what_is_not_set_already(
    saved: bool, clips: str, advice: str, tmp_path: Path
) -> None:
    said: list[str] = []
    lost = Course([float("nan")], f"refiner.run.output={tmp_path}", f"gradient_clipping={clips}")
    lost.folder.path.mkdir()
    if saved:
        lost.folder.latest_file.write_text("step_00000007\n")
    lost.console.print = said.append  # type: ignore[method-assign,assignment]
    assert lost.run() == DIVERGED and len(said) == 1
    good = f"the last good state is {lost.folder}/checkpoints/step_00000007: lower"
    assert (good if saved else "; nothing has been saved yet: lower") in said[0]
    assert "(loss_cls 0.5," in said[0] and advice in said[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_not_saved(value: float, tmp_path: Path) -> None:
    good = save(checkpoints_of(tmp_path, 1), 10)
    lost = checkpoints_of(tmp_path, 1, value)
    outcome = save(lost, 20)
    assert outcome.folder is None and not outcome.finite and lost.not_finite
    assert kept(tmp_path) == ["step_00000010"] and lost.newest() == good.folder
    assert not list((tmp_path / "checkpoints").glob(".writing_*"))


def test_a_damaged_later_checkpoint_takes_no_good_ones_place(tmp_path: Path) -> None:
    checkpoints = checkpoints_of(tmp_path, 2)
    for step in (10, 30, 40):
        save(checkpoints_of(tmp_path, 9), step)
    for step in (30, 40):
        (tmp_path / "checkpoints" / f"step_{step:08d}" / "model.safetensors").write_bytes(b"")
    assert checkpoints.newest() == tmp_path / "checkpoints/step_00000010"
    fresh = save(checkpoints, 20)  # asked to stop there, say
    assert kept(tmp_path) == [f"step_{step:08d}" for step in (10, 20, 30, 40)]
    assert checkpoints.newest() == fresh.folder and (tmp_path / "latest").read_text() == "step_00000020\n"
    save(checkpoints, 30)
    assert kept(tmp_path) == [f"step_{step:08d}" for step in (20, 30, 40)]
    assert not integrity_errors(tmp_path / "checkpoints/step_00000030")


def test_a_checkpoint_that_somebody_reads_may_stay_until_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")  # .nfs files stand in for what is open and deleted

    checkpoints = checkpoints_of(tmp_path, 1)
    save(checkpoints, 10)
    with monkeypatch.context() as nfs:
        nfs.setattr(os, "rmdir", busy)
        assert save(checkpoints, 20).folder == checkpoints.newest()
    assert kept(tmp_path) == ["step_00000010", "step_00000020"]
    save(checkpoints, 30)
    assert kept(tmp_path) == ["step_00000030"]


def test_the_best_by_the_metric_is_kept_beside_the_newest(tmp_path: Path) -> None:
    checkpoints, top1 = checkpoints_of(tmp_path, 1, best=1), {10: 60.0, 20: 70.0, 30: 65.0}
    for step in (10, 20, 30, 40):
        save(checkpoints, step, {at: value for at, value in top1.items() if at < step})
    assert kept(tmp_path) == ["step_00000020", "step_00000040"]


def test_a_run_of_nothing_but_damaged_checkpoints_does_not_begin_anew_by_itself(tmp_path: Path) -> None:
    checkpoints = checkpoints_of(tmp_path, 3)
    assert checkpoints.newest() is None  # of a run that has saved nothing yet
    for step in (10, 20):
        save(checkpoints, step)
        (tmp_path / "checkpoints" / f"step_{step:08d}" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="step_00000020/complete.json: missing.*choose another refiner.run.name"):
        checkpoints.newest()


@pytest.mark.parametrize("damage", [b"[]", b"{}", b"", b"\0\0\0\0", b'{"model.safetensors": [1', b'{"a": 1}'])
def test_a_damaged_list_of_files_is_a_damaged_checkpoint(damage: bytes, tmp_path: Path) -> None:
    checkpoints = checkpoints_of(tmp_path, 3)
    good, bad = save(checkpoints, 10).folder, save(checkpoints, 20).folder
    assert good is not None and bad is not None
    (bad / MANIFEST).write_bytes(damage)
    assert checkpoints.newest() == good
    (said,) = skipped(RunFolder(tmp_path), good)
    assert said.startswith(f"{bad / MANIFEST}: damaged")


def test_a_steps_time_is_that_of_the_device_and_its_losses_are_means() -> None:
    class Late(Reader):
        """Numbers that the device has not come to yet."""

        def give_back(self, numbers_n: torch.Tensor) -> None:
            time.sleep(0.1)

    step = OptimizerStep.__new__(OptimizerStep)
    step._batch = SimpleNamespace(global_batch=48, accumulation=2)  # type: ignore[assignment]
    step._keys = load().refiner
    step._ready = SimpleNamespace(schedule=SimpleNamespace(lr=float, epoch=float, steps_an_epoch=4, total_steps=9))  # type: ignore[assignment]
    step._world, step._requests, step._heartbeat = ALONE, {STOP: lambda: True, SAVE: lambda: False}, Heartbeat()
    step._allows, step._clock = None, [0.0]
    step._gradient_norms = SimpleNamespace(watch=lambda: None, finish=lambda: None, parts=[])  # type: ignore[assignment]
    engine: Any = SimpleNamespace(
        set_lr=lambda lr: None,
        stepped=False,
        backward_and_step=lambda loss, allows: None,
        unread_grad_norm=None,
    )
    step._engine, step._exchange = engine, SimpleNamespace(mean=lambda numbers_n: numbers_n)  # type: ignore[assignment]
    step._reader = Late(ALONE.device)
    losses = iter([(1.0, 2.0), (3.0, 6.0)])

    def forward(batch: Any, seed: int, epoch: float, keep_views: bool) -> Losses:
        total, part = next(losses)
        return Losses(torch.tensor(total), {"new": torch.tensor(part)})

    step._forward = forward  # type: ignore[method-assign,assignment]
    batch: Any = SimpleNamespace(bad=1, sample_B=torch.tensor([3, 4]))
    outcome = step(0, iter([batch, batch])).read()
    assert outcome.losses == {"loss": 2.0, "loss_new": 4.0} and outcome.requests == {STOP}
    assert outcome.seconds >= 0.1 and outcome.bad_samples == 2


def test_an_interval_is_the_mean_of_its_steps() -> None:
    interval = Interval()
    interval.add(StepOutcome({"loss": 1.0, "loss_cls": 4.0}, frozenset(), 1.0, 0.25, 1))
    interval.checkpoint_seconds += 0.5
    interval.add(StepOutcome({"loss": 2.0, "loss_cls": 0.0}, frozenset(), 3.0, 0.75, 2))
    assert interval.numbers(48) == {
        "loss": 1.5, "loss_cls": 2.0, "images_per_second": 24.0, "step_seconds": 2.0, "data_wait_seconds": 0.5,
        "checkpoint_seconds": 0.5, "bad_samples": 3,
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
    monkeypatch.setattr(session, "choose_backends", lambda *_: {})
    monkeypatch.setattr(session, "_print_header", lambda *_: None)
    monkeypatch.setattr(session, "_record_start", lambda *_: None)
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
        sees = Validation(ready, ALONE, None, ema, metrics, Console(False), StopFlag(), Heartbeat())  # type: ignore[arg-type]
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
