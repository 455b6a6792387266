"""ImageNet-C (Hendrycks and Dietterich, 2019), made while images are loaded instead of stored at 75 times the size.

An image is resized to 256, its centre of 224 pixels is cut out and corrupted, as the published set was made; a model of
another size is shown that picture resized to its own. The published files were also saved as JPEG of quality 85, and so
are these. The 15 corruptions are those of imagecorruptions-imaug, which follows the authors' code. Noise is drawn anew
from a seed an image, corruption and severity, so that any number of processes makes the same pictures; they are not
the very pictures of the published files.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from refiner_ds.data.augment import EvalSettings, eval_view, preserve_rng_state
from refiner_ds.errors import ConfigError
from refiner_ds.seeds import view_seed

__all__ = ["ALEXNET_ERRORS", "SEVERITIES", "CorruptedView", "corruption_figures", "require_library"]

SEVERITIES = (1, 2, 3, 4, 5)
SIDE = 224
JPEG_QUALITY = 85
CROP = EvalSettings(SIDE, 0.875, "bilinear")  # torchvision's Resize(256) and CenterCrop(224)

# AlexNet's mean top-1 error over the five severities of each corruption, percent, which mCE divides by: the authors'
# (github.com/hendrycks/robustness), as AugMix's evaluation (github.com/google-research/augmix) also takes them.
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880,
    "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572,
    "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}  # fmt: skip


def require_library() -> None:
    """Raise ConfigError where the library of corruptions is not installed."""
    try:
        import imagecorruptions  # noqa: F401
    except ImportError:
        raise ConfigError('ImageNet-C needs imagecorruptions-imaug; pip install -e ".[corruptions]"') from None


@dataclass(frozen=True)
class CorruptedView:
    """The centre of an image with one corruption; severity 0 is the clean picture.

    Attributes:
        img_size: of the model.
    """

    img_size: int
    corruption: str
    severity: int
    interpolation: str = "bicubic"

    def __call__(self, image_yx3: np.ndarray, sample: int) -> np.ndarray:
        """The view of image number ``sample``, [S, S, 3] uint8."""
        pixels_yx3 = eval_view(image_yx3, CROP)
        if self.severity:
            pixels_yx3 = self._corrupted(pixels_yx3, sample)
        buffer = io.BytesIO()
        Image.fromarray(pixels_yx3).save(buffer, "JPEG", quality=JPEG_QUALITY)
        picture = Image.open(buffer).convert("RGB")
        if self.img_size != SIDE:
            method = Image.Resampling[self.interpolation.upper()]
            picture = picture.resize((self.img_size, self.img_size), method)
        return np.array(picture)

    def _corrupted(self, pixels_yx3: np.ndarray, sample: int) -> np.ndarray:
        from imagecorruptions import corrupt

        seed = view_seed(list(ALEXNET_ERRORS).index(self.corruption), self.severity, sample) & 0xFFFFFFFF
        own = {"seed": seed} if self.corruption in ("impulse_noise", "glass_blur") else {}  # not from NumPy's generator
        with preserve_rng_state():
            np.random.seed(seed)
            return np.asarray(corrupt(pixels_yx3, self.severity, self.corruption, **own), np.uint8)


def corruption_figures(
    errors: Mapping[str, Sequence[float]], severities: Sequence[int], imagenet: bool
) -> dict[str, Any]:
    """Errors by corruption, and their mean.

    Args:
        errors: top-1 errors of each corruption in the order of ``severities``, percent.
        imagenet: the set is the whole of ImageNet's validation set; only then do AlexNet's errors say anything.
    Returns:
        ``corruptions``: of each its errors, their mean and, where it applies, its ``ce``, the mean over AlexNet's,
        percent; ``mean_error``, over all corruptions, not normalised; ``mce``, the mean of ``ce`` where all corruptions
        and severities were evaluated on ImageNet, else None.
    """
    whole = imagenet and tuple(severities) == SEVERITIES
    rows: dict[str, Any] = {}
    for name, by_severity in errors.items():
        mean = float(np.mean(by_severity))
        rows[name] = {"errors": dict(zip(map(str, severities), by_severity, strict=True)), "mean_error": mean}
        rows[name]["ce"] = 100 * mean / ALEXNET_ERRORS[name] if whole else None
    mce = float(np.mean([row["ce"] for row in rows.values()])) if whole and len(rows) == len(ALEXNET_ERRORS) else None
    return {"corruptions": rows, "mean_error": float(np.mean([r["mean_error"] for r in rows.values()])), "mce": mce}
