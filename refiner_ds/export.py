"""Export a run's weights as timm and the Hugging Face Hub read them, with class names and preprocessing.

    python -m refiner_ds.export runs/mine                       writes runs/mine/export/
    python -m refiner_ds.export runs/mine/checkpoints/step_00001000 --weights model --out FOLDER

    import timm, refiner_ds.models                              the second import registers the names
    model = timm.create_model("local-dir:runs/mine/export", pretrained=True)

model.safetensors holds fp32 weights and running statistics; config.json the architecture, its arguments, size, mean and
standard deviation and crop of its input, and the names of the classes in the order of the outputs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from timm.models import save_for_hf

from refiner_ds.checkpoint.files import CONFIG, find_checkpoint, read_classes, read_weights
from refiner_ds.config import load
from refiner_ds.errors import CheckpointError, report_errors
from refiner_ds.run_folder import RunFolder, read_state
from refiner_ds.training.build import build_model
from refiner_ds.training.logs import silence_libraries


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 where it is refused."""
    silence_libraries()
    parser = argparse.ArgumentParser(prog="python -m refiner_ds.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a checkpoint in it")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="EMA weights or the last ones")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to (default: export/ in the run folder)")
    options = parser.parse_args(argv)
    checkpoint = find_checkpoint(options.run)
    out = options.out or RunFolder(checkpoint.parents[1]).export
    classes = export(checkpoint, options.weights, out)
    print(f"{out}: {options.weights} weights of step {read_state(checkpoint).step}, {len(classes)} classes")
    return 0


def export(checkpoint: Path, weights: str, out: Path) -> list[str]:
    """Write ``out`` from a checkpoint, in place of an earlier export; it is whole or as it was before.

    Args:
        weights: "ema" or "model".
    Returns:
        The names of the classes.
    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit its own run file, or ``out`` is something else.
    """
    run, classes = load(checkpoint / CONFIG), read_classes(checkpoint)
    if out.exists() and not (out / "config.json").is_file():
        raise CheckpointError(f"{out}: exists and is no export; give another --out")
    model = build_model(run, len(classes))
    try:
        model.load_state_dict(read_weights(checkpoint, weights))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{checkpoint}: does not fit the model of its own config.json: {first}") from None
    data, side = run.refiner.data, run.refiner.model.img_size
    seen = {"input_size": (3, side, side), "mean": data.mean, "std": data.std, "crop_pct": data.eval_crop_ratio}
    about = {"label_names": classes[: model.num_classes], "refiner_ds": {"run": run.folder.name, "weights": weights}}
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        save_for_hf(model, str(draft), about, safe_serialization=True, data_config=seen)
        if out.exists():
            shutil.rmtree(out)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return classes


if __name__ == "__main__":
    sys.exit(main())
