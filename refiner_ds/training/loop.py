"""The training loop: resume, step, save, stop.

Everything random is a function of (seed, step, micro-batch, rank), and everything scheduled a function of samples seen,
so that a run stopped anywhere and started again takes the same course.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from refiner_ds.checkpoint.files import skipped
from refiner_ds.data.batch import Batch
from refiner_ds.exit_codes import DIVERGED, FINISHED, RUN_AGAIN
from refiner_ds.files import write_atomically
from refiner_ds.models import RefinedViT
from refiner_ds.run_folder import RunFolder, State
from refiner_ds.training.batches import train_batches_of
from refiner_ds.training.build import build_model, set_recompute
from refiner_ds.training.checkpoints import Checkpoints
from refiner_ds.training.console import Console
from refiner_ds.training.ema import ModelEma
from refiner_ds.training.engine import Engine
from refiner_ds.training.heartbeat import Heartbeat
from refiner_ds.training.initial_weights import initial_weights, starts_fresh
from refiner_ds.training.inputs import derived_seed
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.progress import Progress
from refiner_ds.training.signals import StopFlag
from refiner_ds.training.step import OptimizerStep
from refiner_ds.training.validation import Validation
from refiner_ds.training.world import World


class Trainer:
    """One process's part in a run.

    Args:
        ready: a run that passed every check.
        world: the processes taking part.
        stop: raised when this process was asked to stop.
        heartbeat: told what begins.
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
        self.take_step = OptimizerStep(ready, world, self.engine, self.ema, stop, heartbeat)
        self.checkpoints = Checkpoints(self.folder, keys.run.keep_checkpoints, world)
        self.step = self._resume()
        self.progress = Progress(ready, world, self.engine, self.console, self.step)
        self.validation = Validation(ready, world, self.engine, self.ema, self.progress.metrics, self.console)

    def _initialise(self, model: RefinedViT) -> None:
        run = self.ready.run
        if run.refiner.model.init_from is not None and starts_fresh(run):
            state, notes = initial_weights(run, model, self.ready.train.classes)
            model.load_state_dict(state)
            self.console.say("; ".join([f"weights from {run.refiner.model.init_from}", *notes]))

    def _resume(self) -> int:
        newest = self.checkpoints.newest()
        if newest is None:
            return 0
        state = self.checkpoints.load(newest, self.engine, self.ema)
        for error in skipped(self.folder, newest) if self.world.is_main else []:
            self.console.say(f"skipped: {error}")
        self.console.say(f"resuming from {newest} (step {state.step}, epoch {state.epoch:.2f})")
        return state.step

    def run(self) -> int:
        """Train to the end, or until asked to stop. Returns the exit code."""
        keys, total = self.ready.run.refiner.run, self.ready.schedule.total_steps
        batches = self._batches()
        while self.step < total:
            outcome = self.take_step(self.step, batches)
            self.step += 1
            self.stop.something_to_save()
            last = self.step == total
            self.progress.after(self.step, outcome)
            # At once, not with the next numbers: what is saved from here on is lost, and pushes the good states out.
            if not math.isfinite(outcome.losses["loss"]):
                return self._diverged(f"the loss is {outcome.losses['loss']}")
            if last or self._due(keys.eval_epochs):
                self.heartbeat.beat(self.step, "evaluating", patient=True)
                self.validation.evaluate(self.step)
            if last or self._due(keys.picture_epochs):
                self.heartbeat.beat(self.step, "drawing", patient=True)
                self.validation.picture(self.step)
            if last or outcome.stopping or self._due(keys.checkpoint_epochs):
                self.heartbeat.beat(self.step, "saving", patient=True)
                if not self._save():
                    return self._diverged("weights are no longer finite")
            if outcome.stopping and not last:
                self.console.done()
                self.console.say(f"asked to stop: saved step {self.step}; the same command continues")
                return RUN_AGAIN
        self._finish()
        return FINISHED

    def close(self) -> None:
        """Flush what is open; to be called however `run` ended."""
        self.console.done()
        self.progress.close()
        self.engine.close()

    def _batches(self) -> Iterator[Batch]:
        return train_batches_of(self.ready, self.world, self.step)

    def _due(self, epochs: float) -> bool:
        """Whether a multiple of so many epochs, perhaps a fraction, falls into the step just taken."""
        every = epochs * self.ready.schedule.steps_an_epoch
        return math.floor(self.step / every) > math.floor((self.step - 1) / every)

    def _save(self) -> bool:
        samples = self.step * self.ready.batch.global_batch
        state = State(self.step, samples, self.ready.schedule.epoch(samples), self.world.size)
        return self.checkpoints.save(self.engine, self.ema, state, self.ready.run.resolved()) is not None

    def _diverged(self, why: str) -> int:
        numbers, good = self.progress.write(self.step), self.folder.latest_checkpoint()
        shown = ", ".join(f"{name} {numbers[name]:.4g}" for name in numbers if name.startswith("loss_"))
        self.console.done()
        self.console.say(
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

    def _finish(self) -> None:
        summary: dict[str, Any] = {"step": self.step, "samples": self.step * self.ready.batch.global_batch}
        for which, accuracy in self.validation.last.items():
            summary[which] = {"top1": accuracy.top1, "top5": accuracy.top5, "images": accuracy.images}
        if self.world.is_main:
            write_atomically(self.folder.complete, json.dumps(summary, indent=2))
        self.console.done()
