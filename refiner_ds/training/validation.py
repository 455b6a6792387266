"""Evaluation while a run trains: the weights and their EMA over the validation set, and a picture of attention."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch

from refiner_ds.data.augment import EvalSettings
from refiner_ds.data.loader import eval_batches
from refiner_ds.data.normalize import normalize
from refiner_ds.training.batches import val_batches_of
from refiner_ds.training.build import build_model
from refiner_ds.training.console import Console
from refiner_ds.training.ema import ModelEma
from refiner_ds.training.engine import Engine, evaluates_in_bf16
from refiner_ds.training.evaluation import Accuracy, EvaluationStopped, evaluate
from refiner_ds.training.heartbeat import Heartbeat
from refiner_ds.training.metrics import Metrics
from refiner_ds.training.pictures import Views, attention_picture, views_picture
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.signals import StopFlag
from refiner_ds.training.world import World

PATIENT_BATCH_SECONDS = 5.0  # batches of an evaluation that take longer are not held to the watchdog's seconds


class Validation:
    """Evaluates a copy of the model, which takes whole weights at any ZeRO stage.

    Attributes:
        last: the newest accuracies, of "model" and "ema"; empty before the first evaluation and without a set.
    """

    def __init__(
        self,
        ready: Preparation,
        world: World,
        engine: Engine,
        ema: ModelEma,
        metrics: Metrics,
        console: Console,
        stop: StopFlag,
        heartbeat: Heartbeat,
    ) -> None:
        self._ready, self._world, self._engine, self._ema = ready, world, engine, ema
        self._metrics, self._console, self._stop, self._heartbeat = metrics, console, stop, heartbeat
        self._keys = ready.run.refiner
        self._model = build_model(ready.run, ready.num_classes).to(world.device)
        self.last: dict[str, Accuracy] = {}

    def evaluate(self, step: int) -> bool:
        """Evaluate the state after ``step`` optimizer steps, write and print it. Every rank must call it.

        Returns:
            False, on all ranks, where one was asked to stop meanwhile: then nothing is written.
        """
        if self._ready.val is None:
            return True
        data, samples = self._keys.data, step * self._ready.batch.global_batch
        epoch = self._ready.schedule.epoch(samples)
        buffers = {name: buffer.cpu() for name, buffer in self._engine.statistics().items()}
        bf16 = evaluates_in_bf16(self._ready.run, self._world)
        found: dict[str, Accuracy] = {}
        for which, weights in (
            ("model", lambda: {**self._engine.full_weights(), **buffers}),
            ("ema", self._ema.state_dict),
        ):
            self._heartbeat.beat(step, f"gathering weights to evaluate ({which})", patient=True)
            self._model.load_state_dict(weights())
            batches, asked = val_batches_of(self._ready, self._world), self._asked_to_stop(step, which)
            try:
                found[which] = evaluate(self._model, batches, self._world, data.mean, data.std, bf16, asked)
            except EvaluationStopped:
                return False
        self.last = found
        for which, accuracy in found.items():
            values = {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss, "weights": which}
            self._metrics.write("eval", step, epoch, samples, **values)
        self._console.print(
            f"epoch {self._ready.schedule.epoch_shown(epoch)}: top-1 {self.last['model'].top1:.2f} %,"
            f" EMA weights {self.last['ema'].top1:.2f} %, of {self.last['ema'].images} images"
        )
        return True

    def _asked_to_stop(self, step: int, which: str) -> Callable[[], bool]:
        """What an evaluation asks before each batch; each call is also a heartbeat."""
        first, batches = time.monotonic(), 0

        def asked() -> bool:
            nonlocal batches
            usual = (time.monotonic() - first) / batches if batches else math.inf
            batches += 1
            self._heartbeat.beat(step, f"evaluating ({which})", patient=batches < 3 or usual > PATIENT_BATCH_SECONDS)
            return bool(self._stop)

        return asked

    def draw_views(self, step: int, views: Views) -> None:
        """Draw training views of a step, with their labels, for TensorBoard; the main process alone."""
        self._metrics.picture("views", views_picture(views, self._ready.train.classes, self._model.patch_grid), step)

    def picture(self, step: int) -> None:
        """Draw attention maps of the first validation image for TensorBoard. Every rank must call it."""
        if self._ready.val is None:
            return
        self._model.load_state_dict(self._ema.state_dict())
        if not self._world.is_main:
            return
        data = self._keys.data
        view = EvalSettings(self._keys.model.img_size, data.eval_crop_ratio)
        first = eval_batches(
            self._ready.val, view, batch=1, rank=0, world_size=1, on_bad_sample=data.on_bad_sample, decode=data
        )
        batch = next(iter(first))
        image = normalize(batch.images_BHWC.to(self._world.device), data.mean, data.std, torch.float32)
        pixels: np.ndarray = batch.images_BHWC[0].numpy()
        self._metrics.picture("attention", attention_picture(self._model, image[0], pixels), step)
