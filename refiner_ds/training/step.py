"""One optimizer step: micro-batches forward and backward, the update, and what all ranks then know of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from refiner_ds.data.batch import Batch
from refiner_ds.training.ema import ModelEma
from refiner_ds.training.engine import Engine
from refiner_ds.training.exchange import StepExchange
from refiner_ds.training.heartbeat import Heartbeat
from refiner_ds.training.inputs import InputMaker, derived_seed
from refiner_ds.training.losses import Losses, class_loss, token_label_loss
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.world import World


class Outcome(NamedTuple):
    """An optimizer step in numbers.

    Attributes:
        losses: ``loss`` and its parts as they are logged, fp32; means over accumulation and ranks, equal on all ranks.
        requests: what any rank asked for in this step, equal on all ranks.
        seconds: this rank's step, the device's part included.
        data_wait_seconds: of these, waiting for the loader.
        bad_samples: damaged samples this rank skipped.
    """

    losses: dict[str, float]
    requests: frozenset[str]
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    bad_samples: int = 0


class OptimizerStep:
    """Takes one rank's part in optimizer steps.

    Everything random in a step is a function of (seed, step, micro-batch, rank), so that a run stopped anywhere and
    started again takes the same course.

    Args:
        requests: by name, whether this rank asks for something of all ranks: asked once a step.
    """

    def __init__(
        self,
        ready: Preparation,
        world: World,
        engine: Engine,
        ema: ModelEma,
        requests: dict[str, Callable[[], object]],
        heartbeat: Heartbeat,
    ) -> None:
        self._ready, self._world, self._requests, self._heartbeat = ready, world, requests, heartbeat
        self._keys, self._batch = ready.run.refiner, ready.batch
        self._engine, self._ema = engine, ema
        self._exchange = StepExchange(engine.statistics(), world)
        dtype = torch.bfloat16 if engine.bf16 else torch.float32
        self._inputs = InputMaker(self._keys, ready.num_classes, engine.module.patch_grid, dtype)

    def __call__(self, step: int, batches: Iterator[Batch]) -> Outcome:
        """Train on the next micro-batches of ``batches``.

        Args:
            step: optimizer steps before this one.
        """
        began, waited, bad = time.perf_counter(), 0.0, 0
        sums: dict[str, Tensor] = {}
        samples = step * self._batch.global_batch
        epoch = self._ready.schedule.epoch(samples)
        self._engine.set_lr(self._ready.schedule.lr(samples))
        for micro in range(self._batch.accumulation):
            waiting = time.perf_counter()
            new_epoch = not micro and step % self._ready.schedule.steps_an_epoch == 0
            self._heartbeat.beat(step + 1, "waiting for data", patient=new_epoch)
            batch = next(batches)
            waited += time.perf_counter() - waiting
            bad += batch.bad
            self._heartbeat.beat(step + 1, "forward")
            losses = self._forward(batch, derived_seed(self._keys.run.seed, step, micro, self._world.rank), epoch)
            for name, loss in _logged(losses).items():
                part = loss.detach() * (1 / self._batch.accumulation)
                sums[name] = sums[name] + part if name in sums else part
            self._heartbeat.beat(step + 1, "backward")
            self._engine.backward_and_step(losses.total)
        self._heartbeat.beat(step + 1, "end of the step")
        asked = torch.tensor([float(bool(asks())) for asks in self._requests.values()], device=self._world.device)
        means = self._exchange.mean(torch.cat([torch.stack(list(sums.values())), asked]))
        if self._engine.stepped:
            self._ema.update(step)
        values = means.tolist()  # waits for the device: only now the step has taken its time
        seconds = time.perf_counter() - began
        granted = frozenset(name for name, share in zip(self._requests, values[len(sums) :], strict=True) if share > 0)
        return Outcome(dict(zip(sums, values, strict=False)), granted, seconds, waited, bad)

    def _forward(self, batch: Batch, seed: int, epoch: float) -> Losses:
        recipe = self._keys.recipe
        inputs = self._inputs(batch.to(self._world.device), seed, epoch)
        torch.manual_seed(seed)  # dropout and drop-path: no generator state to save
        outputs = self._engine(inputs.images_B3HW, mix_box=inputs.box)
        if isinstance(outputs, Tensor):
            losses = class_loss(outputs, inputs.target_BC, recipe.cls_weight)
        else:
            cls_BC, patch_BPC, _ = outputs
            losses = token_label_loss(
                cls_BC, patch_BPC, inputs.target_BC, inputs.target_BPC, recipe.cls_weight, recipe.dense_weight
            )
        return losses.plus("cos", self._engine.module.cos_reg_loss()) if self._keys.model.cos_reg else losses


def _logged(losses: Losses) -> dict[str, Tensor]:
    return {"loss": losses.total, **{f"loss_{name}": part for name, part in losses.parts.items()}}
