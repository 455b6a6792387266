"""Pictures of what goes in, and of where it looks: training views with their labels, attention maps block by block."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from refiner_ds.models import RefinedViT
from refiner_ds.training.inputs import Inputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BLOCKS = 8
MOST_VIEWS = 8
NAMED_CLASSES = 4  # of a score map

STAGES = ("before", "after")  # refining


@torch.inference_mode()
def attention_picture(model: RefinedViT, image_3HW: Tensor, pixels_HWC: np.ndarray) -> np.ndarray:
    """Draw the attention maps of one image, before and after refining, means over heads.

    Upper rows: where the class token looks, over the patch grid. Lower rows: the whole N×N map. Blocks without a
    refiner have one map: it stands in both rows.

    Args:
        image_3HW: the image as the model sees it, on the model's device.
        pixels_HWC: the same as uint8 pixels, to be shown beside.
    Returns:
        uint8 [H, W, 3].
    """
    from matplotlib.figure import Figure  # only the main rank draws, and seldom

    before, after = (model.attention_maps(image_3HW[None], refined=refined) for refined in (False, True))
    chosen = sorted({round(i) for i in np.linspace(0, len(after) - 1, min(len(after), MOST_BLOCKS))})
    figure = Figure(figsize=(1.7 * (len(chosen) + 1), 7.0), dpi=110)  # no pyplot: no screen, nothing global
    axes = figure.subplots(4, len(chosen) + 1, squeeze=False)
    axes[0, 0].imshow(pixels_HWC)
    axes[0, 0].set_title("image", fontsize=8)
    rows = "from top to bottom:\nfrom the class token,\nbefore and after\nrefining; query ↓\nby key →, the same"
    axes[1, 0].text(0.5, 0.5, rows, ha="center", va="center", fontsize=7)
    for column, block in enumerate(chosen, start=1):
        draw_map_pair(axes[:, column], before[block][0].mean(0), after[block][0].mean(0), model.patch_grid)
        axes[0, column].set_title(f"block {block}", fontsize=8)
    return _pixels(figure, axes)


def draw_map_pair(axes: Any, before_NN: Tensor, after_NN: Tensor, grid: tuple[int, int]) -> None:
    """Draw one map before and after refining on four axes: where its class token looks, twice, and all of it, twice."""
    for stage, map_NN in enumerate((before_NN.float().cpu().numpy(), after_NN.float().cpu().numpy())):
        axes[stage].imshow(map_NN[0, 1:].reshape(grid), cmap="viridis")
        axes[2 + stage].imshow(map_NN, cmap="viridis")


@dataclass(frozen=True)
class Views:
    """The first views of a micro-batch as the model was given them; on the CPU.

    Attributes:
        pixels_BHWC: in [0, 1].
        target_BC: class targets.
        target_BPC: patch targets, P of 1 where there are no score maps.
        box: mix-token's, in patch cells.
    """

    pixels_BHWC: Tensor
    target_BC: Tensor
    target_BPC: Tensor
    box: tuple[int, int, int, int]

    @classmethod
    def of(cls, inputs: Inputs, mean: Sequence[float], std: Sequence[float]) -> Views:
        """The first of ``inputs``, copied; the images put back from channel means and deviations to colours."""
        images_BHWC = inputs.images_B3HW[:MOST_VIEWS].detach().float().permute(0, 2, 3, 1).cpu()
        pixels_BHWC = images_BHWC * torch.tensor(std) + torch.tensor(mean)
        target_BC, target_BPC = (
            target[:MOST_VIEWS].detach().float().cpu() for target in (inputs.target_BC, inputs.target_BPC)
        )
        return cls(pixels_BHWC.clamp(0, 1), target_BC, target_BPC, inputs.box)


def views_picture(views: Views, classes: Sequence[str], grid: tuple[int, int]) -> np.ndarray:
    """Draw training views: above, each as the model is given it; below, its patches coloured by their class.

    The stronger the colour, the likelier the class. Where there are no score maps every patch has the image's label.
    The frame is mix-token's box: behind the stem, it shows the view as far from the batch's end.

    Returns:
        uint8 [H, W, 3].
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    count, side = len(views.pixels_BHWC), views.pixels_BHWC.shape[1]
    patch_BPC = views.target_BPC.expand(-1, grid[0] * grid[1], -1)
    figure = Figure(figsize=(1.9 * count, 5.4), dpi=110)
    axes = figure.subplots(2, count, squeeze=False)
    y0, x0, y1, x1 = (edge * side / cells for edge, cells in zip(views.box, (*grid, *grid), strict=True))
    for view, (above, below) in enumerate(axes.T):
        for axis in (above, below):
            axis.imshow(views.pixels_BHWC[view].numpy())
            if y1 > y0 and x1 > x0:
                axis.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="white"))
        above.set_title(_labels(views.target_BC[view], classes), fontsize=7)
        shares_P, best_P = patch_BPC[view].max(-1)
        named = best_P.bincount(weights=shares_P, minlength=patch_BPC.shape[-1]).topk(min(NAMED_CLASSES, len(classes)))
        colours_P4 = np.zeros((len(best_P), 4))
        for number, chosen in enumerate(named.indices.tolist()):
            colours_P4[(best_P == chosen).numpy(), :3] = _colour(number)
        colours_P4[:, 3] = 0.75 * shares_P.clamp(0, 1).numpy()
        below.imshow(colours_P4.reshape(*grid, 4), extent=(-0.5, side - 0.5, side - 0.5, -0.5), interpolation="nearest")
        for number, (weight, chosen) in enumerate(zip(named.values.tolist(), named.indices.tolist(), strict=True)):
            if weight > 0:
                place = (0.5, -0.07 - 0.11 * number)
                below.text(
                    *place, _short(classes, chosen), color=_colour(number), fontsize=7,
                    ha="center", va="top", transform=below.transAxes,
                )  # fmt: skip
    return _pixels(figure, axes)


def _labels(target_C: Tensor, classes: Sequence[str]) -> str:
    shares, best = target_C.topk(min(2, len(target_C)))
    return "\n".join(
        f"{_short(classes, number)} {share:.2f}" for share, number in zip(shares.tolist(), best.tolist(), strict=True)
    )


def _short(classes: Sequence[str], number: int) -> str:
    name = classes[number] if number < len(classes) else f"class {number}"
    return name if len(name) <= 18 else f"{name[:17]}…"


def _colour(number: int) -> tuple[float, float, float]:
    return ((0.84, 0.15, 0.16), (0.12, 0.47, 0.71), (0.17, 0.63, 0.17), (1.0, 0.5, 0.05))[number]


def _pixels(figure: Figure, axes: np.ndarray) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axis in axes.flat:
        axis.set_axis_off()
    figure.tight_layout(pad=0.4)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    figure.clear()
    del figure, canvas, axes
    gc.collect()  # figures are full of cycles, and so large a process comes to collect them by itself only seldom
    return pixels
