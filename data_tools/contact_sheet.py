"""Samples drawn as pairs: the stored image with the outline of the view, and the view, both tinted by their labels."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from refiner_ds.data.augment import AugmentSettings, TrainView, View, seed_sample
from refiner_ds.data.batch import MapBatch
from refiner_ds.data.decoding import decode_image
from refiner_ds.data.dense_targets import dense_targets
from refiner_ds.data.index import ShardIndex, find_maps, maps_folder
from refiner_ds.data.permutation import samples_at
from refiner_ds.data.samples import open_reader
from refiner_ds.data.score_maps import ScoreMap, decode

TILE = 224  # pixels a picture
LINE = 14  # pixels a line of text
NAMED = 3  # classes named below a pair
TINT = 0.45
OUTLINE = (255, 230, 0)


@dataclass(frozen=True)
class Example:
    """One sample of the sheet."""

    caption: str
    image_yx3: np.ndarray
    view: View
    score_map: ScoreMap | None


def colour_of(number: int) -> tuple[int, int, int]:
    """A colour for a class, far from those of its neighbours in number."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.9, 1)
    return int(255 * red), int(255 * green), int(255 * blue)


def outline(view: View) -> np.ndarray:
    """The edge of a view as points of the image, [n, 2] (x, y) fractions."""
    along = np.linspace(0, 1, 20)
    zero, one = np.zeros(20), np.ones(20)
    points = np.concatenate(
        [np.stack(side, 1) for side in ((along, zero), (one, along), (1 - along, one), (zero, 1 - along))]
    )
    for step in view.affines:
        points = points @ step[:, :2].T + step[:, 2]
    return points


def tinted(picture: Image.Image, numbers_yx: np.ndarray) -> Image.Image:
    """A picture with a colour laid over each cell of a grid of class numbers; −1 leaves it as it is."""
    colours = np.array([[colour_of(int(n)) if n >= 0 else (0, 0, 0) for n in row] for row in numbers_yx], np.uint8)
    over = Image.fromarray(colours).resize(picture.size, Image.Resampling.NEAREST)
    mask = Image.fromarray(np.where(numbers_yx >= 0, int(255 * TINT), 0).astype(np.uint8))
    return Image.composite(over, picture, mask.resize(picture.size, Image.Resampling.NEAREST))


def patch_classes(example: Example, classes: int, grid: int) -> np.ndarray:
    """First class of the target of every patch of a view, [grid, grid]; −1 where nothing of the image is."""
    assert example.score_map is not None
    maps = MapBatch(
        torch.from_numpy(example.score_map.values_Khw.copy())[None],
        torch.from_numpy(example.score_map.classes_Khw.copy())[None],
        torch.from_numpy(np.stack(example.view.affines)).float()[None],
    )
    _, target_BPC = dense_targets(maps, classes, (grid, grid))
    best, number = target_BPC[0].max(-1)
    number[best < 1.001 / classes] = -1
    return number.reshape(grid, grid).numpy()


def draw_pair(example: Example, names: list[str], grid: int) -> Image.Image:
    """Stored image with outline, view, caption and the commonest classes: one cell of the sheet."""
    cell = Image.new("RGB", (2 * TILE + 12, TILE + LINE * (2 + NAMED)), "white")
    height, width = example.image_yx3.shape[:2]
    scale = TILE / max(height, width)
    stored = Image.fromarray(example.image_yx3).resize((max(1, round(width * scale)), max(1, round(height * scale))))
    view = Image.fromarray(example.view.pixels_SS3).resize((TILE, TILE))
    legend: list[tuple[int, str]] = []
    if example.score_map is not None:
        numbers = patch_classes(example, len(names), grid)
        stored = tinted(stored, example.score_map.classes_Khw[0].astype(int))
        view = tinted(view, numbers)
        common = np.bincount(numbers[numbers >= 0].ravel(), minlength=1).argsort()[::-1][:NAMED]
        legend = [(int(n), names[n]) for n in common if (numbers == n).any()]
    edge = [(x * stored.width, y * stored.height) for x, y in outline(example.view)]
    ImageDraw.Draw(stored).line([*edge, edge[0]], fill=OUTLINE, width=2)
    cell.paste(stored, (4, LINE))
    cell.paste(view, (TILE + 8, LINE))
    draw = ImageDraw.Draw(cell)
    font = ImageFont.load_default(11)
    draw.text((4, 0), example.caption, "black", font=font)
    for line, (number, name) in enumerate(legend):
        top = TILE + LINE * (line + 1) + 2
        draw.rectangle((TILE + 8, top + 2, TILE + 18, top + 11), fill=colour_of(number))
        draw.text((TILE + 22, top), name[:36], "black", font=font)
    return cell


def draw_sheet(pairs: list[Image.Image], columns: int) -> Image.Image:
    """All pairs on one sheet."""
    width, height = pairs[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(pairs) // columns) * height), "white")
    for number, pair in enumerate(pairs):
        sheet.paste(pair, (number % columns * width, number // columns * height))
    return sheet


def load_examples(index: ShardIndex, settings: AugmentSettings, count: int, seed: int, epoch: int) -> list[Example]:
    """The first samples of an epoch's order, augmented as training would."""
    maps = find_maps(index) if index.has_maps or maps_folder(index.folder).exists() else None
    reader = open_reader(index)
    map_reader = open_reader(maps) if maps else None
    view_of = TrainView(settings)
    examples = []
    positions = np.arange(min(count, index.count))
    for sample in samples_at(positions, count=index.count, seed=seed, epoch=epoch).tolist():
        raw = reader.read(sample)
        image = decode_image(raw)
        seed_sample(seed, epoch, sample)
        score_map = None
        if map_reader:
            map_raw = map_reader.read(sample)
            score_map = decode(map_raw.score_map, map_raw.location)
        examples.append(Example(f"{sample}: {index.classes[raw.label]}", image, view_of(image), score_map))
    return examples
