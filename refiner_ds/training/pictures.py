"""A picture of what one image's attention looks like, block by block.

Upper row: where the class token looks, over the patch grid. Lower row: the whole N×N map. Means over heads.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from refiner_ds.models import RefinedViT

MOST_BLOCKS = 8


@torch.inference_mode()
def attention_picture(model: RefinedViT, image_3HW: Tensor, pixels_HWC: np.ndarray) -> np.ndarray:
    """Draw the attention maps of one image.

    Args:
        model: has ``attention_maps`` and ``patch_grid``.
        image_3HW: the image as the model sees it, on the model's device.
        pixels_HWC: the same as uint8 pixels, to be shown beside.
    Returns:
        uint8 [H, W, 3].
    """
    maps = model.attention_maps(image_3HW[None])
    chosen = sorted({round(i) for i in np.linspace(0, len(maps) - 1, min(len(maps), MOST_BLOCKS))})
    figure = Figure(figsize=(1.7 * (len(chosen) + 1), 3.6), dpi=110)  # no pyplot: no screen, nothing global
    axes = figure.subplots(2, len(chosen) + 1, squeeze=False)
    axes[0, 0].imshow(pixels_HWC)
    axes[0, 0].set_title("image", fontsize=8)
    axes[1, 0].text(
        0.5, 0.5, "above: from the\nclass token\n\nbelow: query ↓\nby key →", ha="center", va="center", fontsize=7
    )
    for column, block in enumerate(chosen, start=1):
        map_NN = maps[block][0].float().mean(0).cpu().numpy()
        axes[0, column].imshow(map_NN[0, 1:].reshape(model.patch_grid), cmap="viridis")
        axes[1, column].imshow(map_NN, cmap="viridis")
        axes[0, column].set_title(f"block {block}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.tight_layout(pad=0.4)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
