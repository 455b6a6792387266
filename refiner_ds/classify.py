"""Classify pictures, and draw where the model looked.

    python -m refiner_ds.classify runs/mine/export cat.jpg dog.png
    python -m refiner_ds.classify runs/mine cat.jpg --top 3 --out looked

MODEL is an export, a run folder or a checkpoint in it. The likeliest classes are printed. For every picture
<out>/<name>.png shows it as the model saw it, and under a heat map: what the class token attends to after refining, in
the last refining block (--block chooses another), mean of magnitudes over heads. Exit codes: 0 done, 2 refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from refiner_ds import garbage
from refiner_ds.command_line import command_parser
from refiner_ds.errors import ConfigError, report_errors
from refiner_ds.training.logs import silence_libraries


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code. See the module for what it takes."""
    silence_libraries()
    parser = command_parser(__doc__, "python -m refiner_ds.classify")
    parser.add_argument("place", metavar="MODEL", help="export, run folder, or a checkpoint in it")
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE", help="image files")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of a run")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes printed (5)")
    parser.add_argument("--block", type=int, metavar="L", help="block whose attention is drawn, counted from 0")
    parser.add_argument("--out", type=Path, default=Path("classified"), metavar="FOLDER", help="where pictures go")
    parser.add_argument("--json", action="store_true", help="print a JSON object a picture instead of sentences")
    options = parser.parse_args(argv)
    if options.top < 1:
        raise ConfigError(f"--top {options.top}: must be 1 or more")
    with garbage.paused():
        from refiner_ds.analysis.classifying import classify, read_picture
        from refiner_ds.analysis.loading import load_model
        from refiner_ds.analysis.looking import default_block
        from refiner_ds.models import RefinedViT

    pictures = [read_picture(file) for file in options.pictures]  # all of them, before anything is computed or written
    loaded = load_model(options.place, options.weights)
    model = loaded.model
    if not isinstance(model, RefinedViT):
        raise ConfigError(f"{options.place}: its attention cannot be drawn; give a run or an export of this package")
    block = default_block(model) if options.block is None else options.block
    if not 0 <= block < len(model.blocks):
        raise ConfigError(f"--block {block}: {loaded.label} has {len(model.blocks)} blocks, counted from 0")
    options.out.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for file, picture_yx3 in zip(options.pictures, pictures, strict=True):
        drawn = options.out / f"{_free_name(file.stem, taken)}.png"
        found = classify(loaded, model, picture_yx3, options.top, block, drawn)
        if options.json:
            print(json.dumps({"picture": str(file), "classes": found, "drawn": str(drawn)}))
        else:
            said = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in found)
            print(f"{file}: {said}  ({drawn})")
    return 0


def _free_name(stem: str, taken: set[str]) -> str:
    """A name that no picture before has got."""
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return name


if __name__ == "__main__":
    sys.exit(main())
