"""A model as ONNX: norms folded, any batch size, and compared with the model before anybody gets it."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refiner_ds.errors import CheckpointError, ConfigError
from refiner_ds.models import RefinedViT

__all__ = ["TOLERANCE", "require_onnx", "write_onnx"]

TOLERANCE = 1e-4  # of the largest logit; folded norms and other kernels round otherwise


def require_onnx() -> None:
    """Raise ConfigError where what exports to ONNX and checks it is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'--onnx needs {error.name}; pip install -e ".[export]"') from None


@torch.inference_mode()
def write_onnx(model: RefinedViT, side: int, file: Path) -> float:
    """Write ``image`` [B, 3, S, S] fp32, normalised, → ``logits`` [B, C], and run it on images it was not made with.

    Returns:
        The largest difference between its logits in onnxruntime and the model's, over the largest logit.
    Raises:
        CheckpointError: it is above `TOLERANCE`.
    """
    import onnxruntime

    fused = copy.deepcopy(model).eval().fuse()
    traced_B3SS, other_B3SS = (
        torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count)) for count in (2, 3)
    )
    quiet = logging.getLogger("torch.onnx")
    before = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                fused, (traced_B3SS,), file, dynamo=True, external_data=False,
                input_names=["image"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
    finally:
        quiet.setLevel(before)
    session = onnxruntime.InferenceSession(file, _one_thread(), providers=["CPUExecutionProvider"])
    found = np.concatenate(
        [session.run(["logits"], {"image": images.numpy()})[0] for images in other_B3SS.split([1, 2])]
    )
    truth = model(other_B3SS).numpy()
    difference = float(np.abs(found - truth).max() / np.abs(truth).max())
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{file.name}: its logits differ from the model's by {difference:.1e} of the largest, more than"
            f" {TOLERANCE:g}; export without --onnx"
        )
    return difference


def _one_thread() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options
