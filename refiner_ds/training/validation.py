"""Evaluation while a run trains: the weights and their EMA over the validation set, and a picture of attention."""

from __future__ import annotations

import numpy as np
import torch

from refiner_ds.data.augment import EvalSettings
from refiner_ds.data.loader import eval_batches
from refiner_ds.data.normalise import normalise
from refiner_ds.training.batches import val_batches_of
from refiner_ds.training.build import build_model
from refiner_ds.training.console import Console
from refiner_ds.training.ema import ModelEma
from refiner_ds.training.engine import Engine, evaluates_in_bf16
from refiner_ds.training.evaluation import Accuracy, evaluate
from refiner_ds.training.metrics import Metrics
from refiner_ds.training.pictures import attention_picture
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.world import World


class Validation:
    """Evaluates a copy of the model, which takes whole weights at any ZeRO stage.

    Attributes:
        last: the newest accuracies, of "model" and "ema"; empty before the first evaluation and without a set.
    """

    def __init__(
        self, ready: Preparation, world: World, engine: Engine, ema: ModelEma, metrics: Metrics, console: Console
    ) -> None:
        self._ready, self._world, self._engine, self._ema = ready, world, engine, ema
        self._metrics, self._console = metrics, console
        self._keys = ready.run.refiner
        self._model = build_model(ready.run, ready.num_classes).to(world.device)
        self.last: dict[str, Accuracy] = {}

    def evaluate(self, step: int) -> None:
        """Evaluate the state after ``step`` optimizer steps, write and print it. Every rank must call it."""
        if self._ready.val is None:
            return
        data, samples = self._keys.data, step * self._ready.batch.global_batch
        epoch = self._ready.schedule.epoch(samples)
        buffers = {name: buffer.cpu() for name, buffer in self._engine.statistics().items()}
        for which, state in (("model", {**self._engine.full_weights(), **buffers}), ("ema", self._ema.state_dict())):
            self._model.load_state_dict(state)
            bf16 = evaluates_in_bf16(self._ready.run, self._world)
            batches = val_batches_of(self._ready, self._world)
            accuracy = evaluate(self._model, batches, self._world, data.mean, data.std, bf16)
            self.last[which] = accuracy
            values = {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss, "weights": which}
            self._metrics.write("eval", step, epoch, samples, **values)
        self._console.say(
            f"epoch {epoch:.1f}: top-1 {self.last['model'].top1:.2f} %,"
            f" EMA weights {self.last['ema'].top1:.2f} %, of {self.last['ema'].images} images"
        )

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
        image = normalise(batch.images_BHWC.to(self._world.device), data.mean, data.std, torch.float32)
        pixels: np.ndarray = batch.images_BHWC[0].numpy()
        self._metrics.picture("attention", attention_picture(self._model, image[0], pixels), step)
