"""Export a run's weights as timm and the Hugging Face Hub read them, with class names, preprocessing and a model card.

    python -m refiner_ds.export runs/mine                       writes runs/mine/export/
    python -m refiner_ds.export runs/mine --onnx --license apache-2.0
    python -m refiner_ds.export runs/mine/checkpoints/step_00001000 --weights model --out FOLDER

    import timm, refiner_ds.models                              the second import registers the names
    model = timm.create_model("local-dir:runs/mine/export", pretrained=True)

The crop ratio is the one that `python -m refiner_ds.calibrate` has chosen for these weights, else that of the run file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from refiner_ds.command_line import command_parser
from refiner_ds.errors import ConfigError, report_errors
from refiner_ds.run_folder import RunFolder, read_state
from refiner_ds.training.logs import silence_libraries


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 where it is refused."""
    silence_libraries()
    options = read_options(argv)
    from refiner_ds.checkpoint.files import find_checkpoint
    from refiner_ds.export.folder import ExportOptions, export

    checkpoint = find_checkpoint(options.run)
    out = options.out or RunFolder(checkpoint.parents[1]).export
    what = ExportOptions(options.weights, options.test_size, options.crop_ratio, options.onnx, options.license)
    done = export(checkpoint, what, out)
    print(f"{out}: {options.weights} weights of step {read_state(checkpoint).step}, {done.classes} classes,"
          f" crop ratio {done.crop_ratio:g} ({done.crop_source})")  # fmt: skip
    if done.onnx_difference is not None:
        print(f"model.onnx: logits differ by {done.onnx_difference:.1e} of the largest at most")
    return 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command's options. Raises ConfigError for one that cannot be meant."""
    parser = command_parser(__doc__, "python -m refiner_ds.export")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a checkpoint in it")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="EMA weights or the last ones")
    parser.add_argument("--test-size", type=int, metavar="PX", help="side of the images (default: as trained)")
    parser.add_argument("--crop-ratio", type=float, metavar="R", help="default: the calibrated one, or the run's")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too, compared with the model before")
    parser.add_argument(
        "--license", metavar="ID", help="of the weights, as the Hub writes it: apache-2.0, cc-by-4.0, …"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to (default: export/ in the run folder)")
    options = parser.parse_args(argv)
    if options.crop_ratio is not None and not 0.1 <= options.crop_ratio <= 4:
        raise ConfigError(f"--crop-ratio {options.crop_ratio:g}: must lie between 0.1 and 4")
    return options


if __name__ == "__main__":
    sys.exit(main())
