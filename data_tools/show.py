"""Draws a contact sheet of augmented samples, to see that labels follow pixels.

    python data_tools/show.py shards/train sheet.png --auto-augment rand-m9-mstd0.5-inc1

Each sample is a pair: the stored image with the outline of the view, and the view. With score maps, every map cell is
tinted by its first class, and every patch of the view by the first class of its target: the tints must lie on the same
things, and the names of the commonest classes stand below.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "data_tools"

from refiner_ds import garbage
from refiner_ds.command_line import Parser
from refiner_ds.errors import DataError, report_errors


def _arguments() -> argparse.ArgumentParser:
    parser = Parser(prog="show.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("set", help="folder of a shard set, or package:digits/train")
    parser.add_argument("out", type=Path, help="picture to write, .png")
    parser.add_argument("--count", type=int, default=12, help="samples (default %(default)s)")
    parser.add_argument("--columns", type=int, default=3, help="pairs a row (default %(default)s)")
    parser.add_argument("--img-size", type=int, default=224, help="side of a view (default %(default)s)")
    parser.add_argument("--grid", type=int, default=14, help="patches a side (default %(default)s)")
    parser.add_argument("--auto-augment", default="", help="timm's string, e.g. rand-m9-mstd0.5-inc1")
    parser.add_argument("--random-erasing", type=float, default=0.0, help="its probability (default %(default)s)")
    parser.add_argument("--hflip", type=float, default=0.5, help="probability of a flip (default %(default)s)")
    parser.add_argument("--min-crop", type=float, default=0.08, help="smallest crop's share of the image")
    parser.add_argument("--seed", type=int, default=42, help="the run's (default %(default)s)")
    parser.add_argument("--epoch", type=int, default=0, help="counted from 0 (default %(default)s)")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = _arguments().parse_args(argv)
    if given.count < 1 or given.columns < 1:
        raise DataError("--count and --columns must be above 0")
    with garbage.paused():
        from refiner_ds.config.schema import AugmentKeys
        from refiner_ds.data.augment import AugmentSettings
        from refiner_ds.data.locate import open_index
        from refiner_ds.data.writer import cannot_write

        from .contact_sheet import draw_pair, draw_sheet, load_examples

    keys = AugmentKeys(
        crop_scale=(given.min_crop, 1.0),
        hflip=given.hflip,
        auto_augment=given.auto_augment,
        color_jitter=0.0,
        random_erasing=given.random_erasing,
    )
    settings = AugmentSettings(given.img_size, keys)
    index = open_index(given.set)
    examples = load_examples(index, settings, given.count, given.seed, given.epoch)
    sheet = draw_sheet([draw_pair(example, index.classes, given.grid) for example in examples], given.columns)
    try:
        sheet.save(given.out)
    except (OSError, ValueError) as error:
        reason = error if isinstance(error, OSError) and error.strerror else OSError(0, str(error))
        raise DataError(cannot_write(given.out, reason)) from None
    print(f"{given.out}: {len(examples)} of {index.count:,} samples of {index.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
