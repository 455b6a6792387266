"""A page of pictures from one run folder: what the model is shown, how it learned, and what it has become.

    python -m refiner_ds.gallery runs/quickstart                    the newest checkpoint, EMA weights
    python -m refiner_ds.gallery RUN --images 500 --out mine.html

Training views with their labels, learning curves, attention maps before and after refining, learned kernels, feature
evolution, and which classes are taken for which, all in one HTML file that needs nothing else (<run>/gallery.html).
Exit codes: 0 written, 2 refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from refiner_ds import garbage
from refiner_ds.command_line import command_parser
from refiner_ds.errors import CheckpointError, ConfigError, report_errors
from refiner_ds.files import write_atomically
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.logs import silence_libraries


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code. See the module for what it takes."""
    silence_libraries()
    options = _parser().parse_args(argv)
    with garbage.paused():
        from refiner_ds.analysis import cka
        from refiner_ds.analysis.loading import load_model
        from refiner_ds.gallery.parts import gallery_parts, link_from_tensorboard
        from refiner_ds.models import RefinedViT
        from refiner_ds.page import Page, Picture

    if options.images < cka.FEWEST:
        raise ConfigError(f"--images {options.images}: feature evolution takes at least {cka.FEWEST}")
    loaded = load_model(str(options.run), options.weights)
    if loaded.run is None or loaded.checkpoint is None or not isinstance(loaded.model, RefinedViT):
        raise CheckpointError(f"{options.run}: is no run folder; give one that refiner_ds/train.py has made")
    folder = RunFolder(loaded.checkpoint.parents[1])
    out = options.out or folder.path / "gallery.html"
    if out.suffix != ".html":
        raise ConfigError(f"--out {out}: name a file that ends in .html")
    RunFolder(out.parent).refuse_unwritable()
    parts = gallery_parts(loaded, loaded.run, folder, options.images, options.weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, Page(f"{loaded.label}, step {loaded.step:,}", parts).html())
    link_from_tensorboard(folder, out, loaded.step or 0)
    print(f"{out}: {sum(isinstance(part, Picture) for part in parts)} pictures of {loaded.label}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "python -m refiner_ds.gallery")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a checkpoint in it")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="validation images looked at (1000)")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights")
    parser.add_argument("--out", type=Path, metavar="FILE", help="HTML file (default: gallery.html in the run folder)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
