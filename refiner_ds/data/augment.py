"""Random views of an image, and where in the image each view came from.

    image [y, x, 3] → random-resized-crop → flip → RandAugment or colour jitter → random erasing → view [S, S, 3] uint8
                            │                 │              │
                            └─────────────────┴── matrices ──┘ so that labels can follow the pixels

Coordinates are fractions of the picture: (0, 0) its top left corner, (1, 1) its bottom right. A view is described by
2×3 matrices to be applied, in order, to a point of the view: through every rotation, shear and translation back to the
crop, and from there to the image. Randomness is a function of (seed, epoch, sample) alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from torch import Tensor
from torchvision.transforms import ColorJitter

from refiner_ds.config.schema import AugmentKeys
from refiner_ds.data.decoding import Picture
from refiner_ds.errors import ConfigError
from refiner_ds.seeds import view_seed

Matrix = np.ndarray  # [2, 3] float64
IDENTITY = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
INTERPOLATIONS = ("bilinear", "bicubic")


CROP_AND_FLIP = AugmentKeys(auto_augment="", color_jitter=0.0, random_erasing=0.0)


@dataclass(frozen=True)
class AugmentSettings:
    """How training views are drawn: their side in pixels, the recipe's keys, and what erased pixels are filled with."""

    img_size: int
    keys: AugmentKeys = CROP_AND_FLIP
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class EvalSettings:
    """How images are resized and cropped in evaluation.

    The shorter side becomes ``img_size / crop_ratio`` and the centre is cut out; with a ratio above 1 the image is
    smaller than the view and black surrounds it. ``squash`` resizes both sides to that, as some of timm's models ask.
    """

    img_size: int
    crop_ratio: float = 0.9
    interpolation: str = "bicubic"
    squash: bool = False

    def __call__(self, image_yx3: np.ndarray, sample: int) -> np.ndarray:
        """The view of an image, [S, S, 3] uint8, whatever its number."""
        return eval_view(image_yx3, self)


class EvalView(Protocol):
    """One way of looking at an image in evaluation."""

    @property
    def img_size(self) -> int:
        """Side S of the view, pixels."""

    def __call__(self, image_yx3: np.ndarray, sample: int) -> np.ndarray:
        """The view of image number ``sample``, [S, S, 3] uint8."""


@dataclass(frozen=True)
class EvalViews:
    """Several views of every image, which is decoded once; they are loaded one below the other, [V·S, S, 3]."""

    img_size: int
    views: tuple[EvalView, ...]

    def __call__(self, image_yx3: np.ndarray, sample: int) -> np.ndarray:
        """All views of image number ``sample``."""
        return np.concatenate([view(image_yx3, sample) for view in self.views])


@dataclass
class View:
    """Pixels of a view, [S, S, 3] uint8, and the matrices from the view to the image, in the order they apply."""

    pixels_SS3: np.ndarray
    affines: list[Matrix] = field(default_factory=list)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Give the global generators (python, numpy, torch's CPU one) back as they were found.

    timm's and torchvision's transforms draw from them; the training process, which shares them when the loader has no
    workers, must not see that.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def seed_sample(seed: int, epoch: int, sample: int) -> None:
    """Set the global generators to the state that belongs to one view of one sample."""
    number = view_seed(seed, epoch, sample)
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.default_generator.manual_seed(number)  # not torch.manual_seed: that would reseed the GPUs too


class TrainView:
    """Draws training views. Seed the generators first (`seed_sample`).

    Raises:
        ConfigError: timm does not know the auto-augment string, or it blends several views so that no map can follow.
    """

    def __init__(self, settings: AugmentSettings) -> None:
        self.settings = settings
        self._applied: list[Matrix] = []
        self._auto_augment = self._make_auto_augment() if settings.keys.auto_augment else None
        jitter = settings.keys.color_jitter
        self._jitter = ColorJitter(jitter, jitter, jitter) if jitter and not settings.keys.auto_augment else None

    def __call__(self, image_yx3: Picture) -> View:
        """One view of an image, [height, width, 3] uint8, or of a file that is decoded once the crop is known."""
        settings = self.settings
        height, width = image_yx3.shape[:2]
        x, y, crop_width, crop_height = draw_crop(width, height, settings.keys.crop_scale, settings.keys.crop_ratio)
        name = settings.keys.interpolation if settings.keys.interpolation != "random" else random.choice(INTERPOLATIONS)
        crop = image_yx3[y : y + crop_height, x : x + crop_width]
        pixels = resize(crop, settings.img_size, settings.img_size, name)
        if pixels is crop:
            pixels = crop.copy()  # a crop's memory is not its own, see `crop_decoding.decode_crop`
        to_image = np.array([[crop_width / width, 0.0, x / width], [0.0, crop_height / height, y / height]])
        if random.random() < settings.keys.hflip:
            pixels = torch.from_numpy(pixels).flip(1).numpy()  # numpy's reversed copy takes ten times as long
            to_image = compose(to_image, np.array([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
        affines = [to_image]
        if self._auto_augment or self._jitter:
            self._applied.clear()
            picture = Image.fromarray(np.ascontiguousarray(pixels))
            picture = self._auto_augment(picture) if self._auto_augment else self._jitter(picture)  # type: ignore[misc]
            pixels = np.asarray(picture)
            affines = [*reversed(self._applied), to_image]
        if settings.keys.random_erasing and random.random() < settings.keys.random_erasing:
            pixels = random_erase(pixels, settings)
        return View(np.ascontiguousarray(pixels), affines)

    @property
    def max_affines(self) -> int:
        """Most matrices a view can carry: its crop's, and one for each operation that auto-augment may apply."""
        if self._auto_augment is None:
            return 1
        return 1 + getattr(self._auto_augment, "num_layers", 2)  # AutoAugment's policies are pairs

    def _make_auto_augment(self) -> Callable[[Image.Image], Image.Image]:
        """timm's transform, with every operation that moves pixels made to record its matrix."""
        settings = self.settings
        if settings.keys.auto_augment.startswith("augmix"):
            raise ConfigError("refiner.recipe.auto_augment: augmix blends views and labels cannot follow; use rand-…")
        hparams: dict[str, Any] = {
            "translate_const": int(settings.img_size * 0.45),
            "img_mean": tuple(min(255, round(255 * mean)) for mean in settings.mean),
        }
        if settings.keys.interpolation != "random":
            hparams["interpolation"] = Image.Resampling[settings.keys.interpolation.upper()]
        make = rand_augment_transform if settings.keys.auto_augment.startswith("rand") else auto_augment_transform
        try:
            transform = make(settings.keys.auto_augment, hparams)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise ConfigError(
                f"refiner.recipe.auto_augment: {settings.keys.auto_augment!r} is not one of timm's ({error!r}); "
                "try rand-m9-mstd0.5-inc1"
            ) from None
        policies = transform.policy if hasattr(transform, "policy") else [transform.ops]
        for operation in {id(operation): operation for policy in policies for operation in policy}.values():
            if operation.name in GEOMETRIC:
                operation.aug_fn = self._recording(operation.aug_fn, GEOMETRIC[operation.name])
            elif operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
        return transform

    def _recording(self, apply: Callable[..., Image.Image], matrix_of: Callable[..., Matrix]) -> Callable[..., Any]:
        def apply_and_record(picture: Image.Image, amount: float, **options: Any) -> Image.Image:
            self._applied.append(matrix_of(amount))
            return apply(picture, amount, **options)

        return apply_and_record


def _posterize(picture: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm asks for 0 bits at magnitude 10, which Pillow refuses from version 13 on; one bit is the least there is."""
    return ImageOps.posterize(picture, min(8, max(1, bits)))


def _rotate(degrees: float) -> Matrix:
    """Pillow turns the picture counter-clockwise about its centre; this is the inverse."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cosine, -sine, 0.5 - 0.5 * cosine + 0.5 * sine], [sine, cosine, 0.5 - 0.5 * sine - 0.5 * cosine]])


# For timm's names: amount → matrix from a point of the result to the point it was taken from.
GEOMETRIC: dict[str, Callable[[float], Matrix]] = {
    "Rotate": _rotate,
    "ShearX": lambda factor: np.array([[1.0, factor, 0.0], [0.0, 1.0, 0.0]]),
    "ShearY": lambda factor: np.array([[1.0, 0.0, 0.0], [factor, 1.0, 0.0]]),
    "TranslateXRel": lambda share: np.array([[1.0, 0.0, share], [0.0, 1.0, 0.0]]),
    "TranslateYRel": lambda share: np.array([[1.0, 0.0, 0.0], [0.0, 1.0, share]]),
}


def compose(outer: Matrix, inner: Matrix) -> Matrix:
    """The matrix that applies ``inner`` first and ``outer`` to its result."""
    return np.hstack([outer[:, :2] @ inner[:, :2], outer[:, :2] @ inner[:, 2:] + outer[:, 2:]])


def draw_crop(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Random-resized-crop's box (x, y, width, height) in pixels, drawn from python's generator as timm draws it."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = random.uniform(*scale) * width * height
        aspect = math.exp(random.uniform(low, high))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            y = random.randint(0, height - crop_height)
            return random.randint(0, width - crop_width), y, crop_width, crop_height
    crop_width = min(width, round(height * ratio[1]))
    crop_height = min(height, round(width / ratio[0]))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def resize(image_yx3: np.ndarray, width: int, height: int, interpolation: str) -> np.ndarray:
    """Antialiased resampling of uint8 pixels to [height, width, 3], to within two grey levels of Pillow's."""
    if image_yx3.shape[:2] == (height, width):
        return image_yx3
    # Without channels_last on the input, torch returns planes, and interleaving them costs as much as the resize.
    pixels_13yx = torch.from_numpy(image_yx3).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    resized: Tensor = torch.nn.functional.interpolate(
        pixels_13yx, (height, width), mode=interpolation, antialias=True, align_corners=False
    )
    return resized[0].permute(1, 2, 0).numpy()


def random_erase(pixels_SS3: np.ndarray, settings: AugmentSettings) -> np.ndarray:
    """Random erasing (Zhong et al., 2017) with timm's shapes: one box of 2 to 33 % of the view.

    "pixel" fills with normal noise a pixel, "rand" with one random colour, "const" with the mean. Noise is clipped to
    what a uint8 can hold.
    """
    side = pixels_SS3.shape[0]
    for _ in range(10):
        area = random.uniform(0.02, 1 / 3) * side * side
        aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < height < side and 0 < width < side:
            break
    else:
        return pixels_SS3
    top, left = random.randint(0, side - height), random.randint(0, side - width)
    shape = {"pixel": (height, width, 3), "rand": (1, 1, 3), "const": (0,)}[settings.keys.random_erasing_mode]
    noise = np.random.standard_normal(shape) if shape != (0,) else np.zeros(3)
    filling = np.clip(255 * (np.array(settings.mean) + np.array(settings.std) * noise), 0, 255)
    erased = pixels_SS3.copy()
    erased[top : top + height, left : left + width] = filling.round().astype(np.uint8)
    return erased


MOST_RESIZED = 100_000_000  # pixels; of 1×60,000 pixels, 15 million columns of 256


def resized_shape(height: int, width: int, short: int) -> tuple[int, int]:
    """Height and width once the shorter side is ``short``; the longer one is truncated, as torchvision and timm do."""
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def eval_view(image_yx3: np.ndarray, settings: EvalSettings) -> np.ndarray:
    """The centre of an image, [S, S, 3] uint8: pixel for pixel what timm's evaluation transform makes of it."""
    side = settings.img_size
    short = math.floor(side / settings.crop_ratio)
    height, width = (short, short) if settings.squash else resized_shape(image_yx3.shape[0], image_yx3.shape[1], short)
    if image_yx3.shape[:2] != (height, width):
        # Pillow, as timm has it: torch's resampling differs by up to three grey levels.
        method = Image.Resampling[settings.interpolation.upper()]
        picture = Image.fromarray(image_yx3)
        whole = height * width <= MOST_RESIZED
        resized = picture.resize((width, height), method) if whole else _middle(picture, width, height, side, method)
        image_yx3 = np.asarray(resized)
    return center_crop_or_pad(image_yx3, side)


def _middle(picture: Image.Image, width: int, height: int, side: int, method: Image.Resampling) -> Image.Image:
    """A long thin image resized, but of its longer side only the middle; along its rows first, as Pillow does."""
    long, resized = max(picture.size), max(width, height)
    kept, scale = min(side, resized), long / resized
    start = round((resized - kept) / 2)
    first, last = start * scale, (start + kept) * scale
    margin = 4 * math.ceil(max(1.0, scale))  # pixels around that the filter sees
    low, high = max(0, math.floor(first) - margin), min(long, math.ceil(last) + margin)
    if picture.height > picture.width:
        rows = picture.crop((0, low, picture.width, high)).resize((width, high - low), method)
        return rows.resize((width, kept), method, (0, first - low, width, last - low))
    box = (first - low, 0, last - low, picture.height)
    columns = picture.crop((low, 0, high, picture.height)).resize((kept, picture.height), method, box)
    return columns.resize((kept, height), method)


def center_crop_or_pad(image_yx3: np.ndarray, side: int) -> np.ndarray:
    """Cut the middle ``side`` × ``side`` pixels out, with black around an image that is smaller."""
    for axis in (0, 1):
        spare = image_yx3.shape[axis] - side
        if spare > 0:
            start = round(spare / 2)
            image_yx3 = np.take(image_yx3, range(start, start + side), axis=axis)
        elif spare < 0:
            before = -spare // 2
            padding = [(0, 0)] * 3
            padding[axis] = (before, -spare - before)
            image_yx3 = np.pad(image_yx3, padding)
    return np.ascontiguousarray(image_yx3)
