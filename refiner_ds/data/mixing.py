"""Mixup and CutMix of a batch with itself in reverse order: images, class targets and patch targets.

Axes: B batch, C classes, P patches, H and W pixels. Nothing loops over the batch, and every random number comes from
the generator that is passed in.

Sources: mixup (Zhang et al., 2018), CutMix (Yun et al., 2019), drawn as timm draws them in its batch mode.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refiner_ds.config.schema import MixKeys


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed with itself in reverse order.

    Attributes:
        lam: share of an image's own pixels, over all of it (mixup) or outside the box (CutMix: 1).
        box: (y0, x0, y1, x1) in pixels, taken from the partner; empty for mixup.
    """

    lam: float = 1.0
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
    lam = float(rng.beta(alpha, alpha))
    if not cut:
        return Mix(lam)
    length = int(side * (1 - lam) ** 0.5)
    y, x = (int(centre) for centre in rng.integers(0, side, 2))
    y0, y1 = max(0, y - length // 2), min(side, y + length // 2)
    x0, x1 = max(0, x - length // 2), min(side, x + length // 2)
    return Mix(1.0, (y0, x0, y1, x1))


def mix_images(images_B3HW: Tensor, mix: Mix) -> Tensor:
    """Mix a batch with its reverse. [B, 3, H, W] → the same; unmixed batches are returned as they are."""
    if mix.lam < 1:
        return images_B3HW * mix.lam + images_B3HW.flip(0) * (1 - mix.lam)
    y0, x0, y1, x1 = mix.box
    if y1 <= y0 or x1 <= x0:
        return images_B3HW
    mixed_B3HW = images_B3HW.clone()
    mixed_B3HW[:, :, y0:y1, x0:x1] = images_B3HW.flip(0)[:, :, y0:y1, x0:x1]
    return mixed_B3HW


def image_lambda(mix: Mix, side: int) -> float:
    """Share of its own pixels an image keeps: λ of the class target, from the clipped box."""
    y0, x0, y1, x1 = mix.box
    return mix.lam * (1 - (y1 - y0) * (x1 - x0) / side**2)


def patch_lambdas(mix: Mix, side: int, grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Share of its own pixels each patch keeps, [P] fp32; a box that cuts through a patch counts by area."""
    covered = []
    for low, high, cells in ((mix.box[0], mix.box[2], grid[0]), (mix.box[1], mix.box[3], grid[1])):
        edges = torch.linspace(0, side, cells + 1, device=device).clamp(low, high)
        covered.append((edges[1:] - edges[:-1]) * (cells / side))
    return mix.lam * (1 - torch.outer(*covered)).flatten()


def mix_targets(target_BC: Tensor, lam: float) -> Tensor:
    """lam·y + (1 − lam)·y of the partner, [B, C]; partners are the batch in reverse order."""
    return target_BC if lam == 1 else target_BC * lam + target_BC.flip(0) * (1 - lam)


def mix_patch_targets(target_BPC: Tensor, lam_P: Tensor) -> Tensor:
    """The same patch by patch: [B, P, C] targets, [P] shares of their own."""
    lam_P1 = lam_P[:, None].to(target_BPC.dtype)
    return target_BPC * lam_P1 + target_BPC.flip(0) * (1 - lam_P1)


def mix_class_and_patch(
    target_BC: Tensor, target_BPC: Tensor, mix: Mix, side: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Mix class and patch targets as the images are mixed."""
    if mix == Mix():
        return target_BC, target_BPC
    lam_P = patch_lambdas(mix, side, grid, target_BC.device)
    return mix_targets(target_BC, image_lambda(mix, side)), mix_patch_targets(target_BPC, lam_P)
