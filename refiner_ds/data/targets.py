"""What happens to a batch on the device: pixels normalised, images and labels mixed, targets of class and patches.

Axes: B batch, C classes, P patches, H and W pixels. Nothing loops over the batch, and every random number comes from
the generator that is handed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from refiner_ds.config.schema import MixKeys
from refiner_ds.data.batch import MapBatch
from refiner_ds.data.dense_targets import dense_targets


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed with itself in reverse order.

    Attributes:
        keep: share of an image's own pixels, over all of it (mixup) or outside the box (CutMix: 1).
        box: (y0, x0, y1, x1) in pixels, taken from the partner; empty for mixup.
    """

    keep: float = 1.0
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


def draw_mix(keys: MixKeys, side: int, generator: torch.Generator) -> Mix:
    """Draw one mixing for a whole batch, as timm's batch mode does: λ from Beta(α, α), CutMix's box clipped.

    Args:
        keys: what may be drawn, and how often.
        side: of the images, in pixels.
        generator: a CPU one, so that drawing needs no word from the device.
    """
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    rng = np.random.default_rng(seed)
    if not (keys.mixup or keys.cutmix) or rng.random() >= keys.mix_probability:
        return Mix()
    cut = keys.cutmix > 0 and (keys.mixup == 0 or rng.random() < keys.mix_switch)
    alpha = keys.cutmix if cut else keys.mixup
    keep = float(rng.beta(alpha, alpha))
    if not cut:
        return Mix(keep)
    length = int(side * (1 - keep) ** 0.5)
    y, x = (int(centre) for centre in rng.integers(0, side, 2))
    y0, y1 = max(0, y - length // 2), min(side, y + length // 2)
    x0, x1 = max(0, x - length // 2), min(side, x + length // 2)
    return Mix(1.0, (y0, x0, y1, x1))


@cache
@torch.inference_mode(False)  # whoever comes first, training uses them too
def _affine(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device
) -> tuple[Tensor, Tensor]:
    # Once: numbers that go to a GPU wait for everything under way there.
    scale = torch.tensor([1 / (255 * part) for part in std], device=device)
    return scale, torch.tensor([-centre / part for centre, part in zip(mean, std, strict=True)], device=device)


def normalise(
    images_BHWC: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float], dtype: torch.dtype
) -> Tensor:
    """uint8 pixels [B, H, W, 3] to (pixel/255 − mean)/std, [B, 3, H, W] in ``dtype``, channels last in memory."""
    scale, shift = _affine(mean, std, images_BHWC.device)
    return torch.addcmul(shift, images_BHWC.float(), scale).to(dtype).permute(0, 3, 1, 2)


def mix_images(images_B3HW: Tensor, mix: Mix) -> Tensor:
    """Mix a batch with its reverse. [B, 3, H, W] → the same; unmixed batches are returned as they are."""
    if mix.keep < 1:
        return images_B3HW * mix.keep + images_B3HW.flip(0) * (1 - mix.keep)
    y0, x0, y1, x1 = mix.box
    if y1 <= y0 or x1 <= x0:
        return images_B3HW
    mixed_B3HW = images_B3HW.clone()
    mixed_B3HW[:, :, y0:y1, x0:x1] = images_B3HW.flip(0)[:, :, y0:y1, x0:x1]
    return mixed_B3HW


def kept_share(mix: Mix, side: int) -> float:
    """Share of its own pixels an image keeps: λ of the class target, from the clipped box."""
    y0, x0, y1, x1 = mix.box
    return mix.keep * (1 - (y1 - y0) * (x1 - x0) / side**2)


def kept_shares(mix: Mix, side: int, grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Share of its own pixels each patch keeps, [P] fp32; a box that cuts through a patch counts by area."""
    covered = []
    for low, high, cells in ((mix.box[0], mix.box[2], grid[0]), (mix.box[1], mix.box[3], grid[1])):
        edges = torch.linspace(0, side, cells + 1, device=device).clamp(low, high)
        covered.append((edges[1:] - edges[:-1]) * (cells / side))
    return mix.keep * (1 - torch.outer(*covered)).flatten()


def smooth_labels(labels_B: Tensor, classes: int, smoothing: float) -> Tensor:
    """One-hot labels smoothed as timm does: ε/C everywhere and 1 − ε + ε/C at the label. [B] → [B, C] fp32."""
    target_BC = torch.full((len(labels_B), classes), smoothing / classes, device=labels_B.device)
    return target_BC.scatter_(1, labels_B[:, None], 1 - smoothing + smoothing / classes)


def mix_targets(target_BC: Tensor, keep: float) -> Tensor:
    """keep·y + (1 − keep)·y of the partner, [B, C]; partners are the batch in reverse order."""
    return target_BC if keep == 1 else target_BC * keep + target_BC.flip(0) * (1 - keep)


def mix_patch_targets(target_BPC: Tensor, keep_P: Tensor) -> Tensor:
    """The same patch by patch: [B, P, C] targets, [P] shares of their own."""
    keep_P1 = keep_P[:, None].to(target_BPC.dtype)
    return target_BPC * keep_P1 + target_BPC.flip(0) * (1 - keep_P1)


def label_targets(
    labels_B: Tensor, classes: int, smoothing: float, mix: Mix, side: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Targets of a batch without score maps: every patch has its image's label.

    Returns:
        class target [B, C] and patch targets [B, P, C], both mixed as the images are.
    """
    target_BC = smooth_labels(labels_B, classes, smoothing)
    return mix_both(target_BC, target_BC[:, None].expand(-1, grid[0] * grid[1], -1), mix, side, grid)


def map_targets(
    maps: MapBatch, classes: int, smoothing: float, mix: Mix, side: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Targets of a batch with score maps; arguments and results as in `label_targets`."""
    return mix_both(*dense_targets(maps, classes, grid, smoothing), mix, side, grid)


def mix_both(
    target_BC: Tensor, target_BPC: Tensor, mix: Mix, side: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Mix class and patch targets as the images are mixed."""
    if mix == Mix():
        return target_BC, target_BPC
    keep_P = kept_shares(mix, side, grid, target_BC.device)
    return mix_targets(target_BC, kept_share(mix, side)), mix_patch_targets(target_BPC, keep_P)
