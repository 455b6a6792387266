"""The training loop: resume, step, log, evaluate, save, finish.

Everything random is a function of (seed, step, micro-batch, rank), and everything scheduled a function of samples seen,
so that a run stopped anywhere and started again takes the same course.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from refiner_ds.checkpoint.files import skipped
from refiner_ds.data.augment import AugmentSettings, EvalSettings
from refiner_ds.data.batch import Batch
from refiner_ds.data.loader import Batches, eval_batches, train_batches
from refiner_ds.data.normalise import normalise
from refiner_ds.exit_codes import DIVERGED, FINISHED, RUN_AGAIN
from refiner_ds.files import write_atomically
from refiner_ds.models import RefinedViT
from refiner_ds.run_folder import RunFolder, State
from refiner_ds.training.build import build_model, peak_flops, training_flops
from refiner_ds.training.checkpoints import Checkpoints
from refiner_ds.training.console import Console
from refiner_ds.training.ema import ModelEma
from refiner_ds.training.engine import Engine, evaluates_in_bf16
from refiner_ds.training.evaluation import Accuracy, evaluate
from refiner_ds.training.exchange import StepExchange
from refiner_ds.training.inputs import InputMaker, derived_seed
from refiner_ds.training.losses import token_label_loss
from refiner_ds.training.metrics import Metrics
from refiner_ds.training.pictures import attention_picture
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.signals import StopFlag
from refiner_ds.training.world import World


class Outcome(NamedTuple):
    """What every rank knows alike of a step: the mean loss of all ranks, and whether any of them was asked to stop."""

    loss: float
    stopping: bool


class Trainer:
    """One process's part in a run.

    Args:
        ready: a run that passed every check.
        world: the processes taking part.
        stop: raised when this process was asked to stop.
    """

    def __init__(self, ready: Preparation, world: World, stop: StopFlag) -> None:
        self.ready, self.world, self.stop = ready, world, stop
        self.run_file, self.schedule, self.batch = ready.run, ready.schedule, ready.batch
        self.keys, self.folder = self.run_file.refiner, RunFolder(self.run_file.folder)
        self.console = Console(world.is_main, self.schedule.total_steps)
        torch.manual_seed(derived_seed(self.keys.run.seed))
        model = build_model(self.run_file, ready.num_classes)
        self._set_recompute(model)
        self.engine = Engine(self.run_file, model, self.batch, world)
        self.ema = ModelEma(self.engine, self.keys.recipe.ema_decay, self.keys.recipe.ema_warmup)
        self.exchange = StepExchange(self.engine.statistics(), world)
        self.evaluated = build_model(self.run_file, ready.num_classes).to(
            world.device
        )  # takes whole weights, any ZeRO stage
        dtype = torch.bfloat16 if self.engine.bf16 else torch.float32
        self.inputs = InputMaker(self.keys, ready.num_classes, model.patch_grid, dtype)
        self.checkpoints = Checkpoints(self.folder, self.keys.run.keep_checkpoints, world)
        self.step = self._resume()
        self.metrics = Metrics(self.folder if world.is_main else None, self.step)
        self.last: dict[str, Accuracy] = {}

    def _set_recompute(self, model: RefinedViT) -> None:
        unit = self.keys.model.checkpointing
        if unit == "none":
            return
        checkpoint = None
        if self.run_file.keys.activation_checkpointing is not None:
            from deepspeed import checkpointing

            checkpoint = checkpointing.checkpoint
        model.set_grad_checkpointing(True, unit=unit, checkpoint=checkpoint)

    def _resume(self) -> int:
        newest = self.checkpoints.newest()
        if newest is None:
            return 0
        state = self.checkpoints.load(newest, self.engine, self.ema)
        for fault in skipped(self.folder, newest) if self.world.is_main else []:
            self.console.say(f"skipped: {fault}")
        self.console.say(f"resuming from {newest} (step {state.step}, epoch {state.epoch:.2f})")
        return state.step

    # -- the course of a run -----------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end, or until asked to stop. Returns the exit code."""
        run, began = self.keys.run, self.step
        every = self.schedule.steps_an_epoch
        self._reset_interval()
        batches = self._train_batches(self.step * self.batch.global_batch)
        while self.step < self.schedule.total_steps:
            outcome = self._one_step(batches)
            self.step += 1
            last = self.step == self.schedule.total_steps
            # At once, not with the next numbers: what is saved from here on is lost, and pushes the good states out.
            if not math.isfinite(outcome.loss):
                return self._give_up(f"the loss is {outcome.loss}")
            logged = last or self.step % run.log_steps == 0
            if logged:
                self._log()
            self._show(self.step - began, logged)
            if last or _due(self.step, run.eval_epochs * every):
                self._evaluate()
            if last or _due(self.step, run.picture_epochs * every):
                self._picture()
            if last or outcome.stopping or _due(self.step, run.checkpoint_epochs * every):
                if not self._save():
                    return self._give_up("weights are no longer finite")
            if outcome.stopping and not last:
                self.console.done()
                self.console.say(f"asked to stop: saved step {self.step}; the same command continues")
                return RUN_AGAIN
        self._finish()
        return FINISHED

    def close(self) -> None:
        """Flush what is open; to be called however `run` ended."""
        self.console.done()
        self.metrics.close()
        self.engine.close()

    def _one_step(self, batches: Iterator[Batch]) -> Outcome:
        recipe, seed = self.keys.recipe, self.keys.run.seed
        began = time.perf_counter()
        self.engine.set_lr(self.schedule.lr(self.step * self.batch.global_batch))
        for micro in range(self.batch.accumulation):
            waiting = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - waiting
            self._bad += batch.bad
            of_this_batch = derived_seed(seed, self.step, micro, self.world.rank)
            inputs = self.inputs(batch.to(self.world.device), of_this_batch)
            torch.manual_seed(of_this_batch)  # dropout and drop-path: no generator state to save
            cls_BC, patch_BPC, _ = self.engine(inputs.images_B3HW, mix_box=inputs.box)
            losses = token_label_loss(
                cls_BC, patch_BPC, inputs.target_BC, inputs.target_BPC, recipe.cls_weight, recipe.dense_weight
            )
            self.exchange.add(losses, 1 / self.batch.accumulation)
            total = losses.total + self.engine.module.cos_reg_loss() if self.keys.model.cos_reg else losses.total
            self.engine.backward_and_step(total)
        exchanged = self.exchange.finish(bool(self.stop))
        if self.engine.stepped:
            self.ema.update(self.step)
        self._losses += exchanged[:3]
        loss, _, _, stopping = exchanged.tolist()  # waits for the device: only now the step has taken its time
        self._steps += 1
        self._seconds += time.perf_counter() - began
        return Outcome(loss, stopping > 0)

    # -- telling -----------------------------------------------------------------------------------------------------

    def _reset_interval(self) -> None:
        self._losses = torch.zeros(3, device=self.world.device)
        self._steps, self._bad = 0, 0
        self._seconds, self._waited = 0.0, 0.0

    def _log(self) -> None:
        """Write the interval's numbers."""
        samples = self.step * self.batch.global_batch
        loss, loss_cls, loss_patch = (self._losses / self._steps).tolist()
        bad = int(self.world.all_reduce_sum(torch.tensor([self._bad], device=self.world.device)))
        images_per_second = self._steps * self.batch.global_batch / self._seconds
        self._numbers = {
            "loss": loss,
            "loss_cls": loss_cls,
            "loss_patch": loss_patch,
            "lr": self.schedule.lr(samples - self.batch.global_batch),
            "grad_norm": self.engine.grad_norm,
            "images_per_second": images_per_second,
            "step_seconds": self._seconds / self._steps,
            "data_wait_seconds": self._waited / self._steps,
            "peak_memory_gib": _peak_memory_gib(self.world.device),
            "mfu": self._mfu(images_per_second),
            "skipped_steps": self.engine.skipped_steps,
            "bad_samples": bad,
        }
        self.metrics.write("train", self.step, self.schedule.epoch(samples), samples, **self._numbers)
        self._reset_interval()

    def _give_up(self, why: str) -> int:
        if self._steps:
            self._log()
        numbers, good = self._numbers, self.folder.latest_checkpoint()
        self.console.done()
        self.console.say(
            f"stopped at step {self.step}: {why} (class loss {numbers['loss_cls']}, patch loss {numbers['loss_patch']},"
            f" learning rate {numbers['lr']:.2e}, gradient norm {numbers['grad_norm']});"
            f" {f'the last good state is {good}' if good else 'nothing has been saved yet'}:"
            " lower refiner.recipe.lr or set gradient_clipping"
        )
        return DIVERGED

    def _mfu(self, images_per_second: float) -> float | None:
        peak = peak_flops(self.world.device)
        if peak is None:
            return None
        if not hasattr(self, "_flops"):
            self._flops = training_flops(self.run_file, self.ready.num_classes)
        return images_per_second * self._flops / (peak * self.world.size)

    def _show(self, trained: int, logged: bool) -> None:
        numbers = getattr(self, "_numbers", None)
        if numbers is None:
            return
        epochs = self.schedule.total_steps / self.schedule.steps_an_epoch
        self.console.progress(
            self.step,
            trained,
            {
                "epoch": f"{self.step / self.schedule.steps_an_epoch:.1f}/{epochs:g}",
                "step": f"{self.step}/{self.schedule.total_steps}",
                "loss": f"{numbers['loss']:.4f}",
                "lr": f"{numbers['lr']:.2e}",
                "images/s": f"{numbers['images_per_second']:.0f}",
            },
            logged,
        )

    # -- evaluating, drawing, saving ---------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        if self.ready.val is None:
            return
        samples = self.step * self.batch.global_batch
        buffers = {name: buffer.cpu() for name, buffer in self.engine.statistics().items()}
        for which, state in (("model", {**self.engine.full_weights(), **buffers}), ("ema", self.ema.state_dict())):
            self.evaluated.load_state_dict(state)
            bf16 = evaluates_in_bf16(self.run_file, self.world)
            accuracy = evaluate(
                self.evaluated, self._val_batches(), self.world, self.keys.data.mean, self.keys.data.std, bf16
            )
            self.last[which] = accuracy
            values = {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss, "weights": which}
            self.metrics.write("eval", self.step, self.schedule.epoch(samples), samples, **values)
        self.console.say(
            f"epoch {self.schedule.epoch(samples):.1f}: top-1 {self.last['model'].top1:.2f} %,"
            f" EMA weights {self.last['ema'].top1:.2f} %, of {self.last['ema'].images} images"
        )

    def _picture(self) -> None:
        if self.ready.val is None:
            return
        self.evaluated.load_state_dict(self.ema.state_dict())
        if not self.world.is_main:
            return
        view = EvalSettings(self.keys.model.img_size, self.keys.data.eval_crop_ratio)
        skip = self.keys.data.on_bad_sample
        batch = next(iter(eval_batches(self.ready.val, view, batch=1, rank=0, world_size=1, on_bad_sample=skip)))
        image = normalise(
            batch.images_BHWC.to(self.world.device), self.keys.data.mean, self.keys.data.std, torch.float32
        )
        pixels: np.ndarray = batch.images_BHWC[0].numpy()
        self.metrics.picture("attention", attention_picture(self.evaluated, image[0], pixels), self.step)

    def _save(self) -> bool:
        samples = self.step * self.batch.global_batch
        state = State(self.step, samples, self.schedule.epoch(samples), self.world.size)
        return self.checkpoints.save(self.engine, self.ema, state, self.run_file.resolved()) is not None

    def _finish(self) -> None:
        summary: dict[str, Any] = {"step": self.step, "samples": self.step * self.batch.global_batch}
        for which, accuracy in self.last.items():
            summary[which] = {"top1": accuracy.top1, "top5": accuracy.top5, "images": accuracy.images}
        if self.world.is_main:
            write_atomically(self.folder.complete, json.dumps(summary, indent=2))
        self.console.done()

    # -- data --------------------------------------------------------------------------------------------------------

    def _train_batches(self, position: int) -> Iterator[Batch]:
        data = self.keys.data
        views = AugmentSettings(self.keys.model.img_size, self.keys.recipe, data.mean, data.std)
        return iter(
            train_batches(
                self.ready.train,
                views,
                global_batch=self.batch.global_batch,
                micro_batch=self.batch.micro_batch,
                rank=self.world.rank,
                world_size=self.world.size,
                seed=self.keys.run.seed,
                position=position,
                workers=data.workers,
                on_bad_sample=data.on_bad_sample,
                maps=self.ready.maps,
            )
        )

    def _val_batches(self) -> Batches:
        assert self.ready.val is not None
        data = self.keys.data
        return eval_batches(
            self.ready.val,
            EvalSettings(self.keys.model.img_size, data.eval_crop_ratio),
            batch=data.eval_batch or self.batch.micro_batch,
            rank=self.world.rank,
            world_size=self.world.size,
            workers=data.workers,
            on_bad_sample=data.on_bad_sample,
        )


def _due(step: int, every: float) -> bool:
    """Whether a multiple of ``every`` steps, perhaps a fraction, falls into this step."""
    return math.floor(step / every) > math.floor((step - 1) / every)


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts kilobytes
