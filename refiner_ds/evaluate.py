"""Accuracy of a model over one set or several, exact to the image whatever the number of processes.

    python refiner_ds/evaluate.py runs/quickstart                              the run's latest checkpoint
    python refiner_ds/evaluate.py runs/quickstart/checkpoints/step_00000360 --weights model
    torchrun --nproc_per_node 8 refiner_ds/evaluate.py RUN --data /data/imagenet/val --crop-ratio 1.13
    torchrun --nproc_per_node 8 refiner_ds/evaluate.py RUN --data real=/data/val v2=/data/v2 a=/data/a r=/data/r
    python refiner_ds/evaluate.py timm:refiner_vit_l=refiner_l_448.pth --data imagenet=/data/imagenet/val --out l448

Each set is passed over once. A set's name before its place says that it is a published one: imagenet, real, v2, a, r,
sketch, or c (corrupted while it is loaded). A run's results are kept in its folder, under evaluation/. Exit codes:
0 done, 2 refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "refiner_ds"

import argparse
import json
from typing import TYPE_CHECKING, Any

from refiner_ds import garbage
from refiner_ds.command_line import command_parser
from refiner_ds.errors import ConfigError, DataError, report_errors
from refiner_ds.evaluation.options import add_model_options, check_crop_ratio, check_model_options
from refiner_ds.training.logs import silence_libraries

if TYPE_CHECKING:
    from refiner_ds.analysis.loading import LoadedModel


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code. See the module for what it takes."""
    silence_libraries()
    return evaluate_model(read_options(argv))


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command's options. Raises ConfigError for one that cannot be meant."""
    options = _parser().parse_args(argv)
    _refuse_options(options)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add_model_options(parser)
    parser.add_argument(
        "--data", metavar="[NAME=]SET", nargs="+", action="extend",
        help="shards, class folders or addresses (default: the run's validation set)",
    )  # fmt: skip
    parser.add_argument("--restrict-classes", action="store_true", help="print figures among the set's classes alone")
    parser.add_argument("--partial", action="store_true", help="take a published set that is not whole")
    parser.add_argument("--real", metavar="FILE", type=Path, help="ReaL's labels (default: real.json beside the set)")
    parser.add_argument("--corruptions", metavar="NAME", nargs="+", help="some of the 15 of ImageNet-C")
    parser.add_argument("--severities", metavar="N", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="of c: 1 to 5")
    parser.add_argument("--crop-ratio", type=float, metavar="R", help="centre crop over resized side; above 1 pads")
    parser.add_argument("--json", action="store_true", help="print a JSON object a set instead of sentences")
    return parser


def evaluate_model(options: argparse.Namespace) -> int:
    """Load what the options name, evaluate it on all processes of the group, print and keep the results."""
    with garbage.paused():
        from refiner_ds.evaluation.command import Evaluator, load_for
        from refiner_ds.evaluation.results import make_folder, results_folder

    loaded = load_for(options)
    places = options.data or [loaded.data]
    if places == [None]:
        raise DataError(f"{options.place}: has no refiner.data.val of its own; give --data SET")
    folder = options.out or results_folder(loaded, options.weights, options.crop_ratio, options.test_size)
    evaluator = Evaluator(loaded, options)
    sets = [evaluator.open_set(place) for place in places]
    names = [data.name for data in sets]
    if again := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--data: two sets are called {again}; name them, --data first=SET second=SET")
    if folder is not None:
        make_folder(folder)
    with evaluator.started() as world:
        for data in sets:
            result, class_rows = evaluator.evaluate(data)
            if world.is_main:
                _keep(folder, loaded, result, class_rows)
                print(json.dumps(result) if options.json else _sentences(result, options, len(sets) > 1), flush=True)
        if world.is_main and folder is not None and not options.json:
            print(f"tables: {folder}")
    return 0


def _refuse_options(options: argparse.Namespace) -> None:
    check_model_options(options)
    if options.crop_ratio is not None:
        check_crop_ratio("--crop-ratio", options.crop_ratio)
    if not set(options.severities) <= set(range(1, 6)):
        raise ConfigError(f"--severities {' '.join(map(str, options.severities))}: must be from 1 to 5")


def _keep(folder: Path | None, loaded: LoadedModel, result: dict[str, Any], class_rows: Any) -> None:
    from refiner_ds.evaluation.results import write_results

    if folder is not None:
        write_results(folder, loaded, result, class_rows)


def _sentences(result: dict[str, Any], options: argparse.Namespace, several: bool) -> str:
    """What a person reads of one set."""
    head = f"{result['set']}: " if several else ""
    which = result["model"]
    if result["step"] is not None:
        which = f"{'EMA weights' if options.weights == 'ema' else 'last weights'} of step {result['step']}"
    seen = f"{which}, crop ratio {result['crop_ratio']:g}"
    if "corruptions" in result:
        mce = f"mCE {result['mce']:.2f} %" if result["mce"] is not None else "mCE needs all of ImageNet-C"
        mean = f"mean corruption error {result['mean_error']:.2f} % (not normalised)"
        lines = [f"{head}{mean}, {mce}; clean top-1 {result['top1']:.3f} %  ({result['images']} images; {which})"]
        lines += [f"  {name:<18} {row['mean_error']:7.2f} %" for name, row in result["corruptions"].items()]
        return "\n".join(lines)
    lines = [
        f"{head}top-1 {result['top1']:.3f} %  top-5 {result['top5']:.3f} %  ({result['right1']} and {result['right5']}"
        f" of {result['images']} images; {seen})",
        f"  95 % intervals: top-1 {_span(result['top1_interval'])}, top-5 {_span(result['top5_interval'])} (Wilson);"
        f" calibration error {result['calibration_error']:.2f} % (15 bins)",
    ]
    if pairs := result["confusions"][:3]:
        said = ", ".join(f"{pair['class']} as {pair['taken_for']} ({pair['images']})" for pair in pairs)
        lines.append(f"  most confused: {said}")
    for key, what in (
        ("restricted", "among its classes alone"),
        ("all_classes", "among all classes"),
        ("real", "ReaL"),
    ):
        if key in result:
            other = result[key]
            lines.append(
                f"  {what}: top-1 {other['top1']:.3f} % ({_span(other['top1_interval'])})  top-5 {other['top5']:.3f} %"
                f"  ({other['right1']} and {other['right5']} of {other['images']} images)"
            )
    if result["classes"]:
        lines.append(f"classes of the set: {result['classes']}")
    if result["bad_samples"]:
        lines.append(f"{result['bad_samples']} damaged images were skipped and are not counted")
    return "\n".join(lines)


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


if __name__ == "__main__":
    sys.exit(main())
