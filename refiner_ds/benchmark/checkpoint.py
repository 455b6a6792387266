"""What a checkpoint costs training: one written beside the steps, and one that training waits for, in one run.

    python -m refiner_ds.benchmark checkpoint [--model refiner_vit_l] [--batch 2] [--folder /scratch/me]
    torchrun --nproc_per_node 8 -m refiner_ds.benchmark checkpoint --model refiner_vit_l --batch 64

    stall      the loop does not step: the update waits for the copy to host memory, or the loop for the whole save
    excess     wall time of as many steps with a save among them, over the same steps without in the same round; what is
               still being written at their end is waited for, and counts

A round is some steps without a save, with one and with the other, in an order that changes from round to round. The
table has the median of all rounds, and the lowest and the highest: where these lie far apart, or an excess is negative,
the machine has done something else meanwhile. Resumption is timed too, checksums included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from refiner_ds.checkpoint.retention import Retention
from refiner_ds.checkpoint.writing import checkpoint_bytes
from refiner_ds.command_line import Parser
from refiner_ds.config import RunFile, load
from refiner_ds.run_folder import RunFolder, State
from refiner_ds.training.build import build_model, parameter_count
from refiner_ds.training.checkpoints import Checkpoints, Contents
from refiner_ds.training.ema import ModelEma
from refiner_ds.training.engine import Engine
from refiner_ds.training.logs import silence_libraries
from refiner_ds.training.losses import soft_cross_entropy
from refiner_ds.training.world import World, init, shutdown

__all__ = ["Figures", "main", "measure"]


class Spread(NamedTuple):
    """Seconds over all rounds."""

    median: float
    lowest: float
    highest: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Spread:
        """That of some."""
        return Spread(median(seconds), min(seconds), max(seconds))

    def __str__(self) -> str:
        middle, low, high = (f"{1000 * seconds:,.0f}" for seconds in self)
        return f"{middle:>8} ms{low:>9} to {high} ms"


@dataclass
class Figures:
    """What each way of saving costs, over all rounds; other times in seconds; ``gib`` of a checkpoint on disk.

    Attributes:
        step: the median of all rounds without a save.
    """

    model: str
    processes: int
    parameters: int
    rounds: int
    gib: float
    step: float
    blocking_stall: Spread
    blocking_excess: Spread
    beside_stall: Spread
    beside_excess: Spread
    load: float

    def table(self) -> str:
        """For a terminal."""
        share = 100 * self.beside_excess.median / self.blocking_stall.median
        head = f"{'median':>11}{'lowest to highest':>22}"
        ways = {
            "training waits": (self.blocking_stall, self.blocking_excess),
            "beside training": (self.beside_stall, self.beside_excess),
        }
        return "\n".join(
            [
                f"{self.model}, {self.parameters:,} parameters, {self.processes} processes, a checkpoint of"
                f" {self.gib:.2f} GiB, {1000 * self.step:.0f} ms a step, resumed in {self.load:.2f} s;"
                f" {self.rounds} rounds",
                "",
                f"{'':<18}{'stall':<34}excess",
                f"{'':<16}{head:<34}{head}",
                *(f"{way:<16}{f'{stall}':<34}{excess}" for way, (stall, excess) in ways.items()),
                "",
                f"beside training, the median excess is {share:.1f} % of the stall of a save that training waits for",
            ]
        )


class Setting:
    """A model in training and its checkpoints."""

    def __init__(self, run: RunFile, folder: Path, world: World, steps: int) -> None:
        self.world, self.steps = world, steps
        torch.manual_seed(0)
        model = build_model(run, 1000)
        self.parameters = parameter_count(model)
        self.engine = Engine(run, model, run.batch(world.size), world)
        self.ema = ModelEma(self.engine, 0.99, warmup=True)
        self.checkpoints = Checkpoints(RunFolder(folder), Retention(2), self.engine, self.ema, world, 2**50)
        micro, side = self.engine.batch.micro_batch, run.refiner.model.img_size
        dtype = torch.bfloat16 if self.engine.bf16 else torch.float32
        self.images = torch.randn(micro, 3, side, side, device=world.device, dtype=dtype)
        self.targets = torch.full((micro, 1000), 1e-3, device=world.device)
        self.step = 0

    def take_step(self) -> None:
        self.engine.set_lr(1e-5)
        logits_BC = self.engine(self.images)[0]
        loss = soft_cross_entropy(logits_BC, self.targets)
        self.engine.backward_and_step(loss)
        self.ema.update(self.step)
        self.step += 1
        float(loss.detach())  # as a run does, which logs it

    def save(self) -> None:
        state = State(self.step, self.step, 0.0, self.world.size, self.engine.optimizer_steps)
        self.checkpoints.begin(Contents(state, {"refiner": {}}, [], {}, {}))

    def wait(self) -> None:
        outcome = self.checkpoints.outcome(wait=True)
        if outcome is not None and outcome.failure:
            raise OSError(outcome.failure)

    def block(self) -> None:
        self.save()
        self.wait()

    def round(self, save: Callable[[], None] | None) -> tuple[float, float]:
        """Seconds of some steps with a save after the first, and of these, those the save itself held up the loop."""
        self.world.barrier()
        began, stall = time.perf_counter(), 0.0
        for step in range(self.steps):
            self.take_step()
            if step == 0 and save is not None:
                called = time.perf_counter()
                save()
                stall = time.perf_counter() - called
        self.wait()
        return time.perf_counter() - began, stall + self.checkpoints.waited()


def measure(run: RunFile, folder: Path, world: World, steps: int, rounds: int) -> Figures:
    """Train, save both ways, and resume once.

    Args:
        folder: of the checkpoints, on the disk to be measured.
        steps: a round; together longer than a save takes to write.
        rounds: of each way, interleaved.
    """
    setting = Setting(run, folder, world, steps)
    setting.take_step()
    setting.block()  # the first save allocates its buffers
    ways = {"plain": None, "blocking": setting.block, "beside": setting.save}
    total: dict[str, list[float]] = {way: [] for way in ways}
    stall: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in [*ways][number % 3 :] + [*ways][: number % 3]:
            seconds, held_up = setting.round(ways[way])
            total[way].append(seconds)
            stall[way].append(held_up)
    excess = {
        way: Spread.of([one - without for one, without in zip(total[way], total["plain"], strict=True)]) for way in ways
    }
    called = time.perf_counter()
    newest = setting.checkpoints.newest()
    assert newest is not None
    setting.checkpoints.load(newest)
    loaded = time.perf_counter() - called
    figures = Figures(
        run.refiner.model.name,
        world.size,
        setting.parameters,
        rounds,
        checkpoint_bytes(setting.engine.shapes.values()) / 2**30,
        median(total["plain"]) / steps,
        Spread.of(stall["blocking"]),
        excess["blocking"],
        Spread.of(stall["beside"]),
        excess["beside"],
        loaded,
    )
    setting.engine.close()
    return figures


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark on the processes that the environment describes; returns 0."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="refiner_vit_s", metavar="NAME", help="timm name of a model")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="images a process and step")
    parser.add_argument("--img-size", type=int, default=224, metavar="PX", help="side of the images")
    parser.add_argument("--stage", type=int, default=1, choices=range(4), help="ZeRO stage")
    parser.add_argument(
        "--steps", type=int, default=4, metavar="N", help="steps a round; one of them is followed by a save"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of each way of saving")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where checkpoints go (default: the system's temporary folder)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the run file; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    silence_libraries()
    world = init()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run = _run_file(options, Path(folder), world.size)
        figures = measure(run, Path(world.broadcast(folder)), world, options.steps, options.rounds)
        world.barrier()
    if world.is_main:
        print(json.dumps(asdict(figures)) if options.json else figures.table())
    shutdown()
    return 0


def _run_file(options: argparse.Namespace, folder: Path, world_size: int) -> RunFile:
    """A run of the model alone: no data is read."""
    model = {"name": options.model, "img_size": options.img_size, "num_classes": 1000}
    keys = {
        "refiner": {"model": model, "data": {"train": "none"}},
        "train_batch_size": options.batch * world_size,
        "zero_optimization": {"stage": options.stage},
    }
    (folder / "run.json").write_text(json.dumps(keys))
    return load(folder / "run.json", options.set)
