"""On every rank: write checkpoints at ZeRO stages and precisions, or load those of other worlds and write them again.

    elastic_script.py write FOLDER         FOLDER/<stage>-<precision>/checkpoints/step_00000002 and …_00000003, copied
                                           as late as can be: once the next update, or who reads the EMA, waits
    elastic_script.py offload FOLDER       the same with an optimizer that is offloaded, at the stages that can
    elastic_script.py rewrite FROM TO      every checkpoint under FROM, loaded at another stage or precision

The first two train once more after loading; all compare what forward computes with a plain model of the same weights.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from refiner_ds.checkpoint.files import read_weights
from refiner_ds.checkpoint.retention import Retention
from refiner_ds.run_folder import RunFolder, State
from refiner_ds.training import checkpoints
from refiner_ds.training.checkpoints import Checkpoints, Contents
from refiner_ds.training.ema import ModelEma
from refiner_ds.training.engine import Engine
from refiner_ds.training.exchange import StepExchange
from refiner_ds.training.logs import silence_libraries
from refiner_ds.training.snapshot import Snapshot
from refiner_ds.training.world import World, init, shutdown
from tests.training.engine_script import fresh_model, images_of, loss_of, run_file

OFFLOAD = 'zero_optimization.offload_optimizer={"device": "cpu"}'
CASES = [(stage, bf16) for stage in range(4) for bf16 in (False, True)]


class Trained:
    """A small engine with its EMA and its checkpoints in ``folder``."""

    def __init__(
        self, stage: int, bf16: bool, folder: Path, world: World, split: bool = False, others: Sequence[str] = ()
    ) -> None:
        run = run_file(stage, bf16, 12, 2, others)
        self.batch, self.world, self.bf16 = run.batch(world.size), world, bf16
        model = fresh_model(run)
        model.patch_embed.requires_grad_(False)  # frozen weights are in no optimizer, and in every checkpoint
        self.engine = Engine(run, model, self.batch, world)
        self.ema = ModelEma(self.engine, 0.25, warmup=True)
        self.exchange = StepExchange(self.engine.statistics(), world)
        limit = 0 if split else 2**40
        self.checkpoints = Checkpoints(RunFolder(folder), Retention(9), self.engine, self.ema, world, limit)

    def train(self, step: int) -> None:
        self.engine.set_lr(1e-3)
        for micro in range(self.batch.accumulation):
            images, labels = images_of(step, self.world.rank, micro, count=2)
            losses = loss_of(self.engine, images.to(torch.bfloat16 if self.bf16 else torch.float32), labels)
            self.engine.backward_and_step(losses.total)
        self.exchange.mean(torch.zeros(1))
        self.ema.update(step)

    def save(self, step: int, meanwhile: Callable[[], object] | None = None) -> None:
        state = State(step, step * 12, step / 10, 2, self.engine.optimizer_steps, self.engine.skipped_steps)
        LateCopy.awaited.clear()
        self.checkpoints.begin(Contents(state, {"refiner": {}}, [str(digit) for digit in range(10)], {}, {}))
        if meanwhile is None:
            LateCopy.awaited.set()
        else:
            meanwhile()
        outcome = self.checkpoints.outcome(wait=True)
        assert outcome is not None and outcome.folder is not None and not outcome.failure, outcome

    def read_ema(self) -> None:
        """Read the EMA; what may be copied meanwhile is copied then, while it is in the masters' place."""
        read, snapshot = self.engine.full_weights, self.checkpoints._snapshot
        assert snapshot is not None

        def read_late() -> dict[str, torch.Tensor]:
            snapshot.wait()
            return read()

        self.engine.full_weights = read_late  # type: ignore[method-assign]
        self.ema.state_dict()

    def forward_differs(self, checkpoint: Path) -> float:
        """Largest relative difference of the engine's logits from a plain model's with a checkpoint's weights."""
        plain = fresh_model(run_file(0, False, batch=12, micro=2)).eval()
        plain.load_state_dict(read_weights(checkpoint, "model"))
        images, _ = images_of(99, 0, 0)
        self.engine.engine.eval()
        with torch.no_grad():
            dtype = torch.bfloat16 if self.bf16 else torch.float32
            found, wanted = self.engine(images.to(dtype)).float(), plain(images)
        return float((found - wanted).norm() / wanted.norm())


class LateCopy(Snapshot):
    """Copies once somebody waits for it; for want of anybody, far too late."""

    awaited = threading.Event()

    def _copy_all(self) -> None:
        self.awaited.wait(timeout=3.0)
        super()._copy_all()

    def wait(self) -> None:
        self.awaited.set()
        super().wait()


def two_lives(
    stage: int, bf16: bool, folder: Path, world: World, split: bool = False, others: Sequence[str] = ()
) -> Trained:
    """Save after two steps and after three in ``folder``, and in ``…-again`` what began with the first; the second."""
    one = Trained(stage, bf16, folder, world, split, others)
    for step in range(2):
        one.train(step)
    one.save(2, meanwhile=lambda: one.train(2))
    one.save(3, meanwhile=one.read_ema)
    one.engine.close()
    again = Trained(stage, bf16, folder.with_name(f"{folder.name}-again"), world, split, others)
    again.checkpoints.load(RunFolder(folder).checkpoint(2))
    again.train(2)
    again.save(3)
    return again


def write(folder: Path, world: World, others: Sequence[str] = ()) -> dict[str, float]:
    found = {}
    for stage, bf16 in CASES if world.size == 2 else CASES[world.size :: 5]:
        if others and stage == 0:
            continue
        name = f"{stage}-{'bf16' if bf16 else 'fp32'}"
        again = two_lives(stage, bf16, folder / name, world, stage in (1, 3) and bf16, others)
        found[name] = again.forward_differs(RunFolder(folder / f"{name}-again").checkpoint(3))
        again.engine.close()
    return found


def rewrite(source: Path, target: Path, world: World) -> dict[str, float]:
    found = {}
    written = sorted(folder for folder in source.iterdir() if folder.is_dir() and not folder.name.endswith("again"))
    for number, folder in enumerate(written):
        checkpoint = RunFolder(folder).checkpoint(2)
        # Every stage from every other, half of them in the other precision.
        stage, bf16 = CASES[(CASES.index(case_of(folder)) + 2 + number % 4) % len(CASES)]
        name = f"{folder.name} at {stage}-{'bf16' if bf16 else 'fp32'}"
        one = Trained(stage, bf16, target / name, world)
        one.checkpoints.load(checkpoint)
        one.save(2)
        found[name] = one.forward_differs(checkpoint)
        one.engine.close()
    return found


def case_of(folder: Path) -> tuple[int, bool]:
    stage, precision = folder.name.split("-")
    return int(stage), precision == "bf16"


def main() -> None:
    silence_libraries()
    torch.set_num_threads(1)
    checkpoints.Snapshot = LateCopy  # type: ignore[misc]
    world = init()
    does, *folders = sys.argv[1:]
    places = [Path(folder) for folder in folders]
    others = [OFFLOAD] if does == "offload" else []
    found = rewrite(*places, world) if does == "rewrite" else write(*places, world, others)
    if world.is_main:
        (places[-1] / "found.json").write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
