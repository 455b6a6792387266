"""Accuracy of a checkpoint over the validation shards, exact to the image whatever the number of processes.

    python refiner_ds/evaluate.py runs/quickstart                              the run's latest checkpoint
    python refiner_ds/evaluate.py runs/quickstart/checkpoints/step_00000360 --weights model
    torchrun --nproc_per_node 8 refiner_ds/evaluate.py RUN --data /data/imagenet/val --crop-ratio 1.13

Prints top-1 and top-5 of the EMA weights. Exit codes: 0 done, 2 refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "refiner_ds"

import argparse
import json
from typing import TYPE_CHECKING, Any

from refiner_ds.config import load
from refiner_ds.errors import CheckpointError, DataError, report_errors, report_rank_errors
from refiner_ds.training.logs import silence_libraries

if TYPE_CHECKING:
    from refiner_ds.training.evaluation import Accuracy


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code. See the module for what it takes."""
    silence_libraries()
    options = _parser().parse_args(argv)
    return evaluate_checkpoint(options)


def _parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").split("\n")
    parser = argparse.ArgumentParser(
        description=lines[0], epilog="\n".join(lines[1:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", metavar="RUN_OR_CHECKPOINT", type=Path, help="run folder, or a checkpoint in it")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="EMA weights or the last ones")
    parser.add_argument("--data", metavar="FOLDER", help="shards, class folders or an address (default: the run's)")
    parser.add_argument("--restrict-classes", action="store_true", help="guess among the set's classes alone")
    parser.add_argument("--crop-ratio", type=float, metavar="R", help="centre crop over resized side; above 1 pads")
    parser.add_argument("--batch", type=int, metavar="N", help="images a process computes at once")
    parser.add_argument("--workers", type=int, metavar="N", help="loader processes a rank")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser


def evaluate_checkpoint(options: argparse.Namespace) -> int:
    """Load what the options name, evaluate it on all processes of the group, and print the result."""
    from refiner_ds.checkpoint.files import CONFIG, find_checkpoint, read_classes, read_weights
    from refiner_ds.data.augment import EvalSettings
    from refiner_ds.data.classes import match_classes
    from refiner_ds.data.loader import eval_batches
    from refiner_ds.data.workers import explain_worker_death
    from refiner_ds.run_folder import read_state
    from refiner_ds.training.build import build_model, choose_attention
    from refiner_ds.training.engine import evaluates_in_bf16
    from refiner_ds.training.evaluation import evaluate
    from refiner_ds.training.preparation import load_index, refuse_missing_files
    from refiner_ds.training.world import init, shutdown

    checkpoint = find_checkpoint(options.place)
    run = load(checkpoint / CONFIG)
    place = options.data or run.refiner.data.val
    if place is None:
        raise DataError(f"{options.place}: its run file has no refiner.data.val; give --data FOLDER")
    index, run_classes = load_index(place, run), read_classes(checkpoint)
    match = match_classes(index.classes, run_classes, str(index.folder))
    index = index.with_classes(run_classes, match.labels)
    among = match.labels.tolist() if options.restrict_classes else None
    model = build_model(run, len(run_classes))
    try:
        model.load_state_dict(read_weights(checkpoint, options.weights))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{checkpoint}: does not fit the model of its own config.json: {first}") from None
    world = init()
    refuse_missing_files(run, [index], world)
    choose_attention(run, world.device)
    data = run.refiner.data
    view = EvalSettings(run.refiner.model.img_size, options.crop_ratio or data.eval_crop_ratio)
    batches = eval_batches(
        index,
        view,
        batch=options.batch or data.eval_batch or 64,
        rank=world.rank,
        world_size=world.size,
        workers=data.workers if options.workers is None else options.workers,
        on_bad_sample=data.on_bad_sample,
        decode=data,
    )
    bf16 = evaluates_in_bf16(run, world)
    with report_rank_errors(world.rank), explain_worker_death():
        accuracy = evaluate(model.to(world.device), batches, world, data.mean, data.std, bf16, among=among)
    if world.is_main:
        _print(accuracy, options, read_state(checkpoint).step, view.crop_ratio, _classes_note(match.note, among))
    shutdown()
    return 0


def _classes_note(note: str, among: list[int] | None) -> str:
    """How the set's classes were matched to the run's and which are guessed, in one line; "" for the same classes."""
    if among is not None:
        return f"{note or 'its classes are those of the run'}; guesses are among these alone"
    return f"{note}; guesses are among all the run's classes" if " of the run's " in note else note


def _print(accuracy: Accuracy, options: argparse.Namespace, step: int, crop_ratio: float, classes: str) -> None:
    if options.json:
        found: dict[str, Any] = {
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "loss": accuracy.loss,
            "right1": accuracy.right1,
        }
        found |= {"right5": accuracy.right5, "images": accuracy.images, "bad_samples": accuracy.bad}
        found |= {"step": step, "weights": options.weights, "crop_ratio": crop_ratio, "classes": classes}
        print(json.dumps(found))
        return
    which = "EMA weights" if options.weights == "ema" else "last weights"
    print(
        f"top-1 {accuracy.top1:.3f} %  top-5 {accuracy.top5:.3f} %  ({accuracy.right1} and {accuracy.right5} of"
        f" {accuracy.images} images; {which} of step {step}, crop ratio {crop_ratio:g})"
    )
    if classes:
        print(f"classes of the set: {classes}")
    if accuracy.bad:
        print(f"{accuracy.bad} damaged images were skipped and are not counted")


if __name__ == "__main__":
    sys.exit(main())
