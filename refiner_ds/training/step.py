"""One optimizer step: micro-batches forward and backward, the update, and what all ranks then know of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from refiner_ds.data.batch import Batch
from refiner_ds.seeds import derived_seed
from refiner_ds.training.ema import ModelEma
from refiner_ds.training.engine import Engine
from refiner_ds.training.exchange import StepExchange
from refiner_ds.training.gradient_norms import GradientNorms
from refiner_ds.training.heartbeat import Heartbeat
from refiner_ds.training.inputs import InputMaker
from refiner_ds.training.intervals import is_logged
from refiner_ds.training.losses import Losses, class_loss, token_label_loss
from refiner_ds.training.pictures import Views
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.reading import Reader, Unread, scalar_on
from refiner_ds.training.trace_summary import DATA_WAIT
from refiner_ds.training.world import World


class Outcome(NamedTuple):
    """An optimizer step in numbers.

    Attributes:
        losses: ``loss`` and its parts as they are logged, fp32; means over accumulation and ranks, equal on all ranks.
        requests: what any rank asked for in this step, equal on all ranks.
        seconds: this rank's step, the device's part included.
        data_wait_seconds: of these, waiting for the loader.
        bad_samples: damaged samples that were skipped, on all ranks.
        grad_norm: before clipping, equal on all ranks; None where DeepSpeed does not tell.
        forward_seconds: of the step, this rank's forward passes.
        skipped: whether the weights were left as they were, where the run file asks for that.
        grad_norms: by part of the network, in steps that are logged.
    """

    losses: dict[str, float]
    requests: frozenset[str]
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    bad_samples: int = 0
    grad_norm: float | None = None
    forward_seconds: float = 0.0
    skipped: bool = False
    grad_norms: dict[str, float] = {}


class UnreadStep:
    """A step whose numbers the device may still be computing; to be read while the next one runs.

    Args:
        step: counted from 1.
        names, requests: of what `numbers` begins with: means over ranks of losses, of requests, of damaged samples.
        numbers: these, the gradient norm, and gradient norms by part, each of the last two empty where it is not known.
        parts: of the network, in the order of their norms.
        micro_batches: loss and sample numbers of each of this rank.
        outcome: what is known already.
        clock: when the step before was read, in a list of one.
        ranks: how many there are.
    """

    def __init__(
        self,
        step: int,
        names: list[str],
        requests: list[str],
        numbers: Unread,
        parts: list[str],
        forward: ForwardTimer,
        micro_batches: list[tuple[Tensor, Tensor]],
        outcome: Outcome,
        clock: list[float],
        ranks: int,
    ) -> None:
        self.step, self.micro_batches = step, micro_batches
        self._names, self._requests, self._parts = names, requests, parts
        self._numbers, self._forward, self._outcome = numbers, forward, outcome
        self._clock, self._ranks = clock, ranks
        self._began = time.perf_counter() - outcome.seconds

    def read(self) -> Outcome:
        """Wait for the step, and no longer, and say how it was."""
        (*values, bad), norm, by_part = self._numbers.read()
        now = time.perf_counter()
        seconds, self._clock[0] = now - max(self._began, self._clock[0]), now  # steps overlap: none is counted twice
        granted = values[len(self._names) :]
        return self._outcome._replace(
            losses=dict(zip(self._names, values, strict=False)),
            requests=frozenset(name for name, share in zip(self._requests, granted, strict=True) if share > 0),
            seconds=seconds,
            bad_samples=round(bad * self._ranks),
            grad_norm=norm[0] if norm else None,
            forward_seconds=self._forward.seconds(),
            grad_norms=dict(zip(self._parts, by_part, strict=True)) if by_part else {},
        )


class ForwardTimer:
    """Seconds of forward passes, by the device's own clock; read without waiting for anything else."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._pairs: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """A forward pass runs in the block."""
        if self._cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            yield
            pair[1].record()
            self._pairs.append(pair)
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def seconds(self) -> float:
        """Of all blocks so far, which the device must be done with."""
        return self._seconds + sum(begin.elapsed_time(end) for begin, end in self._pairs) / 1000


class OptimizerStep:
    """Takes one rank's part in optimizer steps.

    Everything random in a step is a function of (seed, step, micro-batch, rank), so that a run stopped anywhere and
    started again takes the same course.

    Args:
        requests: by name, whether this rank asks for something of all ranks: asked once a step.
        heartbeat: gets a beat at the start of each phase.
        allows: asked with step, mean loss and gradient norm before weights change, which makes every step wait for the
            device; False skips it. None: nothing is skipped.
    Attributes:
        views: the first of the newest step that was asked to keep them; None before there was one.
    """

    def __init__(
        self,
        ready: Preparation,
        world: World,
        engine: Engine,
        ema: ModelEma,
        requests: dict[str, Callable[[], object]],
        heartbeat: Heartbeat,
        allows: Callable[[int, float, float | None], bool] | None = None,
    ) -> None:
        self._ready, self._world, self._requests, self._heartbeat = ready, world, requests, heartbeat
        self._allows, self._clock = allows, [0.0]
        self.views: Views | None = None
        self._keys, self._batch = ready.run.refiner, ready.batch
        self._engine, self._ema = engine, ema
        self._exchange = StepExchange(engine.statistics(), world)
        dtype = torch.bfloat16 if engine.bf16 else torch.float32
        self._gradient_norms = GradientNorms(engine, world)
        self._inputs = InputMaker(self._keys, ready.num_classes, engine.module.patch_grid, dtype)
        self._reader = Reader(world.device)

    def __call__(self, step: int, batches: Iterator[Batch], keep_views: bool = False) -> UnreadStep:
        """Train on the next micro-batches of ``batches``, which are on the device.

        Nothing here waits for the device, but for what DeepSpeed asks of it (docs/training.md has the list).

        Args:
            step: optimizer steps before this one.
            keep_views: copy the first views to ``views``, to be drawn.
        """
        began, waited, bad = time.perf_counter(), 0.0, 0
        sums: dict[str, Tensor] = {}
        micro_batches: list[tuple[Tensor, Tensor]] = []
        timer, statistics = ForwardTimer(self._world.device), self._copy_of_statistics()
        samples = step * self._batch.global_batch
        epoch = self._ready.schedule.epoch(samples)
        self._engine.set_lr(self._ready.schedule.lr(samples))
        logged = is_logged(step + 1, self._keys.run.log_steps, self._ready.schedule.total_steps)
        if logged:
            self._gradient_norms.watch()
        for micro in range(self._batch.accumulation):
            batch, seconds = self._next(batches, step, micro)
            waited, bad = waited + seconds, bad + batch.bad
            self._heartbeat.beat(step + 1, "forward")
            with timer.running():
                seed = derived_seed(self._keys.run.seed, step, micro, self._world.rank)
                losses = self._forward(batch, seed, epoch, keep_views and not micro)
            micro_batches.append((losses.total.detach(), batch.sample_B.clone()))
            for name, loss in _logged(losses).items():
                part = loss.detach() * (1 / self._batch.accumulation)
                sums[name] = sums[name] + part if name in sums else part
            self._heartbeat.beat(step + 1, "backward")
            self._engine.backward_and_step(losses.total, self._allowance(step + 1, sums["loss"]))
        self._heartbeat.beat(step + 1, "end of the step")
        skipped = self._allows is not None and not self._engine.stepped
        if skipped:
            for buffer, before in statistics:
                buffer.copy_(before)
        means_n = self._exchange.mean(torch.cat([torch.stack(list(sums.values())), self._said(bad)]))
        if self._engine.stepped:
            self._ema.update(step)
        known = Outcome({}, frozenset(), time.perf_counter() - began, waited, skipped=skipped)
        norm = self._engine.unread_grad_norm
        by_part = self._gradient_norms.finish() if logged else None
        nothing = means_n.new_empty(0)
        numbers = self._reader.begin(
            [
                means_n,
                nothing if norm is None else scalar_on(self._world.device, norm),
                nothing if by_part is None else by_part,
            ]
        )
        return UnreadStep(
            step + 1, list(sums), list(self._requests), numbers, self._gradient_norms.parts, timer, micro_batches,
            known, self._clock, self._world.size,
        )  # fmt: skip

    def _said(self, bad: int) -> Tensor:
        """What this rank asks for, 0 or 1 each, and how many damaged samples it has skipped, on the device."""
        numbers = [float(bool(asks())) for asks in self._requests.values()] + [float(bad)]
        said_n = torch.zeros(len(numbers), device=self._world.device)
        for place, number in enumerate(numbers):
            if number:
                said_n[place].fill_(number)  # copying numbers to a GPU waits for all work queued there
        return said_n

    def leave_out(self, step: int, batches: Iterator[Batch]) -> None:
        """Let the samples of a step go by.

        Args:
            step: optimizer steps before this one.
        """
        for micro in range(self._batch.accumulation):
            self._next(batches, step, micro)

    def _next(self, batches: Iterator[Batch], step: int, micro: int) -> tuple[Batch, float]:
        """The next micro-batch, and seconds waited for it."""
        began = time.perf_counter()
        # On a GPU the loader is a batch ahead: its next epoch may begin in the last step of this one.
        new_epoch = (step + 1) % self._ready.schedule.steps_an_epoch <= 1
        self._heartbeat.beat(step + 1, "waiting for data", patient=new_epoch)
        with record_function(DATA_WAIT):
            batch = next(batches)
        return batch, time.perf_counter() - began

    def _allowance(self, step: int, loss: Tensor) -> Callable[[Tensor | float | None], bool] | None:
        if self._allows is None:
            return None
        allows = self._allows

        def allowed(grad_norm: Tensor | float | None) -> bool:
            mean = float(self._world.all_reduce_mean(loss.clone()))
            return allows(step, mean, None if grad_norm is None else float(grad_norm))

        return allowed

    def _copy_of_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Running statistics as they are before a step that may be skipped: its forward passes change them."""
        if self._allows is None:
            return []
        return [(buffer, buffer.clone()) for buffer in self._engine.statistics().values()]

    def _forward(self, batch: Batch, seed: int, epoch: float, keep_views: bool) -> Losses:
        recipe = self._keys.recipe
        inputs = self._inputs(batch, seed, epoch)
        if keep_views:
            self.views = Views.of(inputs, self._keys.data.mean, self._keys.data.std)
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
