"""Makes score maps for a shard set: the top classes a network sees at every place of every image.

    python data_tools/annotate.py shards/train                             → shards/train.maps, joined to it by key
    python data_tools/annotate.py shards/train --out disk2/maps            → another folder, for refiner.data.maps
    python data_tools/annotate.py shards/train --beside shards/relabelled  → images and maps in one set
    python data_tools/annotate.py shards/train --model dm_nfnet_f6 --size 576 --device cuda --bf16

A killed run resumes where it was, but for the few batches it had in hand, and any number of processes writes the same
bytes. Processes are spread over the GPUs in turn. At the end the command says how often an image's label is in its map.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "data_tools"

from refiner_ds import garbage
from refiner_ds.command_line import Parser
from refiner_ds.errors import DataError, report_errors

from .annotation_settings import PACKAGED, Settings
from .inspection import add_max_megapixels


def _arguments() -> argparse.ArgumentParser:
    parser = Parser(prog="annotate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("set", help="folder of a shard set with images")
    add("--out", type=Path, help="write the maps into this folder, for refiner.data.maps (default: <set>.maps)")
    add("--beside", type=Path, help="write images and maps into this new set")
    add("--model", default=PACKAGED, help=f"timm classifier, or {PACKAGED} (default)")
    add("--checkpoint", type=Path, help="local weights of a timm classifier")
    add("--size", type=int, default=576, help="side images are resized to (default %(default)s)")
    add("--top", type=int, default=5, help="classes kept at a place (default %(default)s)")
    add("--batch", type=int, default=16, help="images at once (default %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add_max_megapixels(parser, "refuse larger images")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--processes", type=int, help="default: one per GPU, or per core")
    return parser


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = _arguments().parse_args(argv)
    numbers = (given.size, given.top, given.batch, 1 if given.processes is None else given.processes)
    if min(numbers) < 1 or given.max_megapixels <= 0:
        raise DataError("--size, --top, --batch, --processes and --max-megapixels must be above 0")
    if given.out and given.beside:
        raise DataError("--out and --beside: maps go into one of them; give the one that is meant")
    with garbage.paused():
        import torch

        from refiner_ds.config.schema import DecodeKeys
        from refiner_ds.data.index import ShardIndex, maps_folder
        from refiner_ds.data.locate import open_index
        from refiner_ds.data.score_maps import MAX_TOP_K

        from .agreement import measure
        from .annotated_set import annotate_set

    if given.top > MAX_TOP_K:
        raise DataError(f"--top {given.top}: a score map holds at most {MAX_TOP_K} classes a place")
    gpus = torch.cuda.device_count()
    device, processes = given.device or ("cuda" if gpus else "cpu"), given.processes or gpus or os.cpu_count() or 1
    if device == "cuda" and not gpus:
        raise DataError("--device cuda: there is no GPU here; take --device cpu")
    decode = DecodeKeys(max_megapixels=given.max_megapixels)
    kind = (given.model, given.checkpoint, given.size, given.top, given.batch, device, given.bf16)
    index = open_index(given.set, class_folders=False)
    out = given.out or given.beside or maps_folder(index.folder)
    annotate_set(index, out, Settings(*kind, decode), processes, given.beside is not None)
    maps = ShardIndex.load(out)
    print(maps.describe())
    agreement = measure(maps)
    print(agreement.describe())
    for warning in agreement.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
