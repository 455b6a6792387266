"""The training loop: resume, step, save, stop.

Everything random is a function of (seed, step, micro-batch, rank), and everything scheduled a function of samples seen,
so that a run stopped anywhere and started again takes the same course.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch.profiler import record_function

from refiner_ds.checkpoint.files import skipped
from refiner_ds.checkpoint.retention import Retention
from refiner_ds.data.batch import Batch
from refiner_ds.exit_codes import DIVERGED, FINISHED, RUN_AGAIN
from refiner_ds.files import write_atomically
from refiner_ds.models import RefinedViT
from refiner_ds.run_folder import RunFolder, State
from refiner_ds.seeds import derived_seed
from refiner_ds.training.batches import train_batches_of
from refiner_ds.training.build import build_model, set_recompute
from refiner_ds.training.checkpoints import Checkpoints, Contents, Outcome
from refiner_ds.training.console import Console
from refiner_ds.training.data_identity import described
from refiner_ds.training.ema import ModelEma
from refiner_ds.training.engine import Engine
from refiner_ds.training.heartbeat import Heartbeat
from refiner_ds.training.initial_weights import initial_weights, starts_fresh
from refiner_ds.training.intervals import Alarm, SaveTimes, falls_into
from refiner_ds.training.out_of_memory import is_out_of_memory, memory_use, out_of_memory
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.profiling import Profiling
from refiner_ds.training.progress import Progress
from refiner_ds.training.recovery import Divergence, Recovery
from refiner_ds.training.signals import StopFlag
from refiner_ds.training.step import OptimizerStep, UnreadStep
from refiner_ds.training.trace_summary import STEP
from refiner_ds.training.validation import Validation
from refiner_ds.training.world import World

# What any rank may ask of all of them in a step.
STOP, SAVE, GIVE_UP, PROFILE = "stop", "save", "give up", "profile"


class Trainer:
    """One process's part in a run.

    Args:
        ready: a run that passed every check.
        world: the processes taking part.
        stop: raised when this process was asked to stop.
        heartbeat: gets a beat at the start of each phase.
    Attributes:
        summary: what a run that has finished reached, as in its ``complete.json``.
    """

    def __init__(self, ready: Preparation, world: World, stop: StopFlag, heartbeat: Heartbeat) -> None:
        run, keys = ready.run, ready.run.refiner
        self.ready, self.world, self.stop, self.heartbeat = ready, world, stop, heartbeat
        self.folder = RunFolder(run.folder)
        self.console = Console(world.is_main, ready.schedule.total_steps)
        torch.manual_seed(derived_seed(keys.run.seed))
        model = build_model(run, ready.num_classes)
        self._initialise(model)
        set_recompute(run, model)
        self.engine = Engine(run, model, ready.batch, world)
        self.ema = ModelEma(self.engine, keys.recipe.ema_decay, keys.recipe.ema_warmup)
        retention = Retention(keys.run.keep_checkpoints, keys.run.keep_best, keys.run.best_metric, keys.run.keep_epochs)
        split = keys.run.checkpoint_split_gib * 2**30
        self.checkpoints = Checkpoints(self.folder, retention, self.engine, self.ema, world, split)
        self.save_times = SaveTimes(
            keys.run.checkpoint_epochs, keys.run.checkpoint_steps, ready.schedule.steps_an_epoch
        )
        self.save_alarm = Alarm(keys.run.checkpoint_minutes)
        requests: dict[str, Callable[[], object]] = {
            STOP: lambda: bool(stop),
            SAVE: lambda: world.is_main and self.save_alarm.rings(),
            GIVE_UP: lambda: self.checkpoints.not_finite,
            PROFILE: lambda: self.profiling.requested(),
        }
        self.profiling = Profiling(self.folder, world, self.console, keys.run.profile_steps)
        self.recovery = Recovery(ready, world, self.console)
        self.take_step = OptimizerStep(
            ready, world, self.engine, self.ema, requests, heartbeat, self.recovery.allows_before_the_update
        )
        self.unread: list[UnreadStep] = []
        self.summary: dict[str, Any] = {}
        self.batches: Iterator[Batch] = iter(())
        self.step = self._resume()
        self.progress = Progress(ready, world, self.engine, self.console, self.step)
        self.validation = Validation(
            ready, world, self.engine, self.ema, self.progress.metrics, self.console, stop, heartbeat
        )

    def _initialise(self, model: RefinedViT) -> None:
        run = self.ready.run
        if run.refiner.model.init_from is not None and starts_fresh(run):
            state, notes = initial_weights(run, model, self.ready.train.classes)
            model.load_state_dict(state)
            self.console.print("; ".join([f"weights from {run.refiner.model.init_from}", *notes]))

    def _resume(self) -> int:
        newest = self.checkpoints.newest()
        if newest is None:
            return 0
        state = self.checkpoints.load(newest)
        for error in skipped(self.folder, newest) if self.world.is_main else []:
            self.console.print(f"skipped: {error}")
        self.console.print(
            f"resuming from {newest} (step {state.step}, epoch {self.ready.schedule.epoch_shown(state.epoch)})"
        )
        return state.step

    def run(self) -> int:
        """Train to the end, or until asked to stop. Returns the exit code."""
        self.heartbeat.starts_from(self.step)
        if self._evaluation_is_missing() and not self.validation.evaluate(self.step):
            return self._stop()
        self.batches = self._batches()
        while self.step < self.ready.schedule.total_steps:
            try:
                code = self._one_step()
            except Divergence as divergence:
                code = self._go_back(divergence)
            if code is not None:
                return code
        return self._finish()

    def _one_step(self) -> int | None:
        """Take a step, read the one before meanwhile, and do what is due; the exit code where that ends the run."""
        shows = self._shows_views()
        if self.recovery.leaves_out(self.step + 1):
            self.take_step.leave_out(self.step, self.batches)
        else:
            self.profiling.before(self.step + 1)
            with record_function(STEP):
                self.unread.append(self._take_step(keep_views=shows and self.world.is_main))
            self.progress.stalled(self.checkpoints.waited())
        self.step += 1
        self.stop.something_to_save()
        last = self.step == self.ready.schedule.total_steps
        saves, evaluates = last or self.save_times.due(self.step), self._evaluation_is_due()
        pictures = self.ready.run.refiner.run.picture_epochs
        draws = self._due(pictures) or (pictures is not None and last)
        if shows:
            self.heartbeat.beat(self.step, "drawing", patient=True)  # every rank: their beats are compared
            if self.take_step.views is not None:
                self.validation.draw_views(self.step, self.take_step.views)
                self.take_step.views = None
        requests = self._read(all_but=1)
        if self.profiling.is_last(self.step):
            self.heartbeat.beat(self.step, "writing a profile", patient=True)
            self.profiling.finish(self.step)
        if PROFILE in requests:
            self.profiling.plan(self.step)
            requests.discard(PROFILE)
        if requests or saves or evaluates or draws:
            requests |= self._read()  # what has diverged is never saved nor evaluated
        if GIVE_UP in requests:
            return self._diverged("weights are no longer finite")
        self._report(self.checkpoints.outcome())
        # Before the evaluation, which takes its time: a signal in it costs nothing then.
        if saves or STOP in requests or SAVE in requests:
            self._save()
        if STOP in requests and not last:
            return self._stop()
        if evaluates and not self.validation.evaluate(self.step):
            if self.checkpoints.saved_step != self.step:
                self._save()
            return self._stop()
        if draws:
            self.heartbeat.beat(self.step, "drawing", patient=True)
            self.validation.picture(self.step)
        return None

    def _take_step(self, keep_views: bool) -> UnreadStep:
        try:
            return self.take_step(self.step, self.batches, keep_views)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            use = memory_use(self.ready.run, self.engine.module, self.ready.batch, self.world)
            raise out_of_memory(self.world.rank, self.step + 1, self.heartbeat.now.doing, use, error) from None

    def _read(self, all_but: int = 0) -> set[str]:
        """Read the steps that are not read yet, ``all_but`` the newest; what any rank has asked for in them.

        Raises:
            Divergence: one of them went wrong.
        """
        requests: set[str] = set()
        while len(self.unread) > all_but:
            unread = self.unread.pop(0)
            outcome = unread.read()
            self.progress.after(unread.step, outcome)
            self.recovery.judge(unread, outcome)
            requests |= outcome.requests
        return requests

    def _go_back(self, divergence: Divergence) -> int | None:
        """Go back to the last good state, if the run file says so and there is one; else the exit code."""
        self.heartbeat.beat(self.step, "going back", patient=True)
        self.unread.clear()
        self.checkpoints.outcome(wait=True)
        newest = self.checkpoints.newest() if self.recovery.goes_back else None
        what, goes_back = self.recovery.wrong(divergence, newest is not None)
        self.step = divergence.step
        if newest is None or not goes_back:
            return self._diverged(what)
        self.console.print(f"step {divergence.step}: {what}")
        self.step = self.checkpoints.load(newest).step
        self.heartbeat.starts_from(self.step)
        self.console.print(f"back at {newest} (step {self.step})")
        self.progress.rewind(self.step)
        self._close_batches()
        self.batches = self._batches()
        return None

    def close(self) -> None:
        """Flush what is open; to be called however `run` ended."""
        self._close_batches()
        self.console.done()
        self.progress.close()
        self.profiling.close()
        self.engine.close()

    def _close_batches(self) -> None:
        """End the loader's workers."""
        if isinstance(self.batches, Generator):
            self.batches.close()

    def _batches(self) -> Iterator[Batch]:
        return train_batches_of(self.ready, self.world, self.step)

    # -- when ----------------------------------------------------------------------------------------------------------

    def _due(self, epochs: float | None, step: int | None = None) -> bool:
        """Whether what comes every so many epochs, or never, comes after ``step`` steps; None: those taken so far."""
        step = self.step if step is None else step
        return epochs is not None and falls_into(step, epochs * self.ready.schedule.steps_an_epoch)

    def _shows_views(self) -> bool:
        """Whether the views of the step that comes are drawn: the first of a run, and whenever a picture is due."""
        epochs = self.ready.run.refiner.run.picture_epochs
        return self._due(epochs, self.step + 1) or (epochs is not None and self.step == 0)

    def _evaluation_is_due(self) -> bool:
        return self.step == self.ready.schedule.total_steps or self._due(self.ready.run.refiner.run.eval_epochs)

    def _evaluation_is_missing(self) -> bool:
        """Whether the resumed state was due for an evaluation that the process before did not complete."""
        if self.step == self.ready.schedule.total_steps:
            return True  # what a run has reached at its end is known to the process that evaluates it
        done = any(self.step in values for values in self.progress.metrics.evaluations.values())
        return self.step > 0 and self._evaluation_is_due() and not self.world.broadcast(done)

    # -- saving --------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Begin to save the state as it is, beside what comes next."""
        began = time.perf_counter()
        self._report(self._end_of_the_save())  # never two at once
        samples, keys = self.step * self.ready.batch.global_batch, self.ready.run.refiner.run
        state = State(
            self.step,
            samples,
            self.ready.schedule.epoch(samples),
            self.world.size,
            self.engine.optimizer_steps,
            self.engine.skipped_steps,
        )
        values = self.progress.metrics.evaluations.get(keys.best_metric, {})
        ready = self.ready
        data = described(ready.run, ready.train, ready.maps)
        self.checkpoints.begin(Contents(state, ready.run.resolved(), list(ready.train.classes), data, dict(values)))
        self.save_alarm.reset()
        self.progress.stalled(time.perf_counter() - began)

    def _end_of_the_save(self) -> Outcome | None:
        """Wait for the save that is under way, if one is."""
        self.heartbeat.beat(self.step, "saving", patient=True)
        return self.checkpoints.outcome(wait=True)

    def _report(self, outcome: Outcome | None) -> None:
        if outcome is not None and outcome.failure:
            self.console.print(
                f"not saved: step {outcome.step}: {outcome.failure}; training goes on and will try again"
            )

    # -- the end -------------------------------------------------------------------------------------------------------

    def _stop(self) -> int:
        outcome = self._end_of_the_save()
        self.console.done()
        if outcome is not None and not outcome.finite:
            return self._diverged("weights are no longer finite")
        if outcome is not None and outcome.failure:
            self.console.print(f"asked to stop: step {self.step} could not be saved: {outcome.failure}")
        else:
            self.console.print(f"asked to stop: saved step {self.step}; the same command continues")
        return RUN_AGAIN

    def _diverged(self, why: str) -> int:
        self._end_of_the_save()
        numbers, good = self.progress.write(self.step), self.folder.latest_checkpoint()
        shown = ", ".join(f"{name} {numbers[name]:.4g}" for name in numbers if name.startswith("loss_"))
        self.console.done()
        self.console.print(
            f"stopped at step {self.step}: {why} ({shown}, learning rate {numbers['lr']:.2e},"
            f" gradient norm {numbers['grad_norm']});"
            f" {f'the last good state is {good}' if good else 'nothing has been saved yet'}: {self._advice()}"
        )
        return DIVERGED

    def _advice(self) -> str:
        clips = self.ready.run.keys.gradient_clipping
        if clips:
            return f"lower refiner.recipe.lr, or gradient_clipping, which is {clips:g}"
        return "lower refiner.recipe.lr or set gradient_clipping"

    def _finish(self) -> int:
        outcome = self._end_of_the_save()
        self.console.done()
        if outcome is not None and not outcome.finite:
            return self._diverged("weights are no longer finite")
        if outcome is not None and outcome.failure:
            self.console.print(f"the last step could not be saved: {outcome.failure}; free some and run it again")
            return RUN_AGAIN
        self.summary = {
            "step": self.step,
            "samples": self.step * self.ready.batch.global_batch,
            "epochs": self.ready.run.refiner.recipe.all_epochs,
        }
        for which, accuracy in self.validation.last.items():
            self.summary[which] = {"top1": accuracy.top1, "top5": accuracy.top5, "images": accuracy.images}
        if self.world.is_main:
            write_atomically(self.folder.complete, json.dumps(self.summary, indent=2))
        return FINISHED
