"""What a model takes a picture for, and a drawing of where it looked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from refiner_ds.analysis.loading import LoadedModel
from refiner_ds.analysis.looking import class_token_heat, draw_heat
from refiner_ds.config.schema import DecodeKeys
from refiner_ds.data.decoding import decode_image
from refiner_ds.data.normalize import normalize
from refiner_ds.data.samples import RawSample
from refiner_ds.errors import DataError
from refiner_ds.models import RefinedViT


def read_picture(file: Path) -> np.ndarray:
    """Pixels of an image file, [height, width, 3] uint8, turned as its EXIF orientation says.

    Raises:
        DataError: it is a folder, not there, or no image.
    """
    if file.is_dir():
        raise DataError(f"{file}: is a folder; give image files, such as {file}/*.jpg")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); give image files") from None
    raw = RawSample(memoryview(data), memoryview(b""), 0, file.name, str(file.parent), 0)
    try:
        return decode_image(raw, DecodeKeys(exif_orientation=True))
    except DataError as error:
        why = str(error).removeprefix(f"{raw.location}: ")
        raise DataError(f"{file}: {why}; give a JPEG, PNG or other image file") from None


@torch.inference_mode()
def classify(
    loaded: LoadedModel, model: RefinedViT, picture_yx3: np.ndarray, top: int, block: int, drawn: Path
) -> list[tuple[str, float]]:
    """The likeliest classes of a picture and their probabilities, best first; draws what they rest on."""
    view_SS3 = loaded.view(picture_yx3, 0)
    image_13SS = normalize(torch.from_numpy(view_SS3)[None], loaded.mean, loaded.std, torch.float32)
    probability_C = model(image_13SS)[0].softmax(-1)
    best = probability_C.topk(min(top, len(probability_C)))
    names = loaded.classes or []
    found = [
        (names[number] if number < len(names) else f"output {number}", float(probability))
        for probability, number in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    heat_hw = class_token_heat(model, image_13SS, block)[0]
    title = f"{found[0][0]}, {100 * found[0][1]:.1f} %"
    draw_heat(view_SS3, heat_hw, title, f"class token's attention, refined, block {block}", drawn)
    return found
