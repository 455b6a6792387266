"""Receptive-field calibration: find the crop ratio at which a trained model is most accurate.

    python -m refiner_ds.calibrate runs/quickstart                             on the run's validation set
    torchrun --nproc_per_node 8 refiner_ds/calibrate.py RUN --data imagenet=/data/imagenet/val
    python -m refiner_ds.calibrate timm:resnet50=resnet50.safetensors --data imagenet=/data/val --out resnet50
    python -m refiner_ds.calibrate RUN --test-size 288                         the same at larger images, as FixRes

A ratio above 1 makes the image smaller than the crop and surrounds it with black. Every image is decoded once for all
ratios. The ratio is chosen on a held-out part of the set and reported on the rest, with intervals. A table, a plot and
calibration.json go to the run folder, under evaluation/, where `python -m refiner_ds.export` finds the chosen ratio.
Exit codes: 0 done, 2 refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "refiner_ds"

import argparse
import json
from typing import Any

from refiner_ds.command_line import command_parser
from refiner_ds.errors import ConfigError, DataError, report_errors
from refiner_ds.evaluation.options import add_model_options, check_crop_ratio, check_model_options
from refiner_ds.training.logs import silence_libraries


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code. See the module for what it takes."""
    silence_libraries()
    options = read_options(argv)
    from refiner_ds.evaluation.calibration import RATIOS, calibrate, sweep, write_calibration
    from refiner_ds.evaluation.command import Evaluator, load_for
    from refiner_ds.evaluation.results import make_folder, results_folder

    loaded = load_for(options)
    if (place := options.data or loaded.data) is None:
        raise DataError(f"{options.place}: has no refiner.data.val of its own; give --data SET")
    folder = options.out or results_folder(loaded, options.weights, None, options.test_size)
    evaluator = Evaluator(loaded, options)
    data = evaluator.open_set(place)
    if data.kind == "c":
        raise ConfigError(f"--data {place}: corrupted images are cropped in one way alone; give imagenet=SET")
    if folder is not None:
        make_folder(folder)
    with evaluator.started() as world:
        found = sweep(evaluator, data, options.ratios or RATIOS)
        if world.is_main:
            result = evaluator.about(data, found.bad) | calibrate(
                found, loaded.view.img_size, options.held_out, options.seed
            )
            if folder is not None:
                write_calibration(folder, loaded, result)
            print(json.dumps(result) if options.json else _sentences(result, folder), flush=True)
    return 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command's options. Raises ConfigError for one that cannot be meant."""
    options = _parser().parse_args(argv)
    _refuse_options(options)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "python -m refiner_ds.calibrate")
    add_model_options(parser)
    parser.add_argument(
        "--data", metavar="[NAME=]SET", help="shards, class folders or an address (default: the run's validation set)"
    )
    parser.add_argument("--partial", action="store_true", help="take a published set that is not whole")
    parser.add_argument("--ratios", metavar="R", nargs="+", type=float, help="ratios to try (0.7, 0.75 … 1.4)")
    parser.add_argument("--held-out", metavar="SHARE", type=float, default=0.2, help="of every class, to choose on")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the held-out part (0)")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of sentences")
    return parser


def _refuse_options(options: argparse.Namespace) -> None:
    check_model_options(options)
    for ratio in options.ratios or ():
        check_crop_ratio("--ratios", ratio)
    if not 0 < options.held_out < 1:
        raise ConfigError(f"--held-out {options.held_out:g}: must lie between 0 and 1")
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed}: must be 0 or more")


def _sentences(result: dict[str, Any], folder: Path | None) -> str:
    """What a person reads."""
    chosen, own = result["chosen"], result["own"]
    low, high = result["difference_interval"]
    lines = [
        f"crop ratio {result['crop_ratio']:g} of {len(result['ratios'])}, chosen on {result['held_out_images']} images"
        f" of {result['set']}; on the other {result['images']}:",
        f"  top-1 {chosen['top1']:.3f} % (95 %: {chosen['top1_low']:.2f} to {chosen['top1_high']:.2f}) at"
        f" {chosen['crop_ratio']:g}, {own['top1']:.3f} % ({own['top1_low']:.2f} to {own['top1_high']:.2f}) at its own"
        f" {own['crop_ratio']:g}",
        f"  difference {result['difference']:+.3f} points (95 %, matched pairs: {low:+.2f} to {high:+.2f})",
    ]
    if result["crop_ratio"] == result["own_crop_ratio"]:
        lines.append("  no other ratio was better than its own by more than a standard error on the held-out images")
    if result["bad_samples"]:
        lines.append(f"{result['bad_samples']} damaged images were skipped and are not counted")
    if folder is not None:
        lines.append(f"table and plot: {folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
