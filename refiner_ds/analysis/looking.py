"""Where a model looked: what the class token attends to after refining, as a heat map over the picture.

Axes: B batch, E maps, N tokens (class token first), P patches, h×w the patch grid.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refiner_ds.analysis.results import new_figure, write_figure
from refiner_ds.models import RefinedViT

__all__ = ["class_token_heat", "default_block", "draw_heat"]


def default_block(model: RefinedViT) -> int:
    """The last block that refines; the last of all where none does."""
    refining = [
        n for n, block in enumerate(model.blocks) if {"DLA", "refiner"} & dict(block.attn.named_children()).keys()
    ]
    return refining[-1] if refining else len(model.blocks) - 1


@torch.inference_mode()
def class_token_heat(model: RefinedViT, images_B3HW: Tensor, block: int) -> Tensor:
    """Attention from the class token to patches, as it multiplies values, [B, h, w]; each image's sums to one.

    Refined maps have entries of both signs; their magnitudes are averaged over maps.
    """
    map_BENN = model.attention_maps(images_B3HW)[block]
    heat_BP = map_BENN[:, :, 0, 1:].abs().mean(1)
    return (heat_BP / heat_BP.sum(1, keepdim=True).clamp_min(1e-30)).unflatten(1, model.patch_grid)


def draw_heat(picture_yx3: np.ndarray, heat_hw: Tensor, title: str, about: str, file: Path) -> None:
    """The picture as the model saw it, and the same under its heat map.

    Args:
        picture_yx3: uint8.
        about: what the heat map shows, below it.
    """
    from matplotlib.cm import ScalarMappable

    side = picture_yx3.shape[0]
    figure, ((left, right),) = new_figure(columns=2, width=4.0, height=4.3)
    for axis in (left, right):
        axis.imshow(picture_yx3)
        axis.set_axis_off()
    heat_SS = F.interpolate(heat_hw.float()[None, None], (side, side), mode="bilinear")[0, 0]
    opacity_SS = 0.2 + 0.6 * heat_SS / heat_SS.max().clamp_min(1e-30)  # what is not looked at stays visible
    shade = right.imshow(heat_SS.numpy(), cmap="inferno", vmin=0, alpha=opacity_SS.numpy())
    bar = figure.colorbar(ScalarMappable(shade.norm, shade.cmap), ax=right, shrink=0.75)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of attention", fontsize=8)
    left.set_title(title, fontsize=10)
    right.set_title(about, fontsize=8)
    write_figure(figure, file)
