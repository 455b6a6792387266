"""Labels follow pixels: a position code is painted into an image and into its map, and compared after augmentation.

The image is not square and nothing about the code is symmetric, so swapped axes or a missed flip cannot hide.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from refiner_ds.data.augment import GEOMETRIC, TrainView, seed_sample
from refiner_ds.data.batch import MapBatch
from refiner_ds.data.dense_targets import dense_targets, sampling_points, to_image
from refiner_ds.data.index import ShardIndex, find_maps
from refiner_ds.data.loader import train_batches
from refiner_ds.data.score_maps import ScoreMap, encode
from refiner_ds.data.writer import SetWriter
from tests.data.conftest import png, views

WIDTH, HEIGHT = 200, 140
SIDE, PATCHES = 112, 7
ROWS, COLUMNS = 12, 18
CLASSES = ROWS * COLUMNS + 1  # a class for every cell, and one that no cell has


def position_image() -> np.ndarray:
    """Red grows with x, green with y, blue says that this is image and not filling."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[..., 0] = np.round(255 * (np.arange(WIDTH) + 0.5) / WIDTH)
    pixels[..., 1] = np.round(255 * (np.arange(HEIGHT) + 0.5) / HEIGHT)[:, None]
    pixels[..., 2] = 255
    return pixels


def position_map() -> ScoreMap:
    """Every cell has a class of its own, with score 1."""
    numbers = np.arange(ROWS * COLUMNS, dtype=np.int16).reshape(1, ROWS, COLUMNS)
    return ScoreMap(np.ones((1, ROWS, COLUMNS), np.float16), numbers, 0)


def seen_in_patches(pixels_SS3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (x, y) that each patch of a view shows, [P, 2], and which patches are image all over."""
    cut = SIDE // PATCHES
    patches = pixels_SS3.reshape(PATCHES, cut, PATCHES, cut, 3).transpose(0, 2, 1, 3, 4).reshape(-1, cut * cut, 3)
    return patches[..., :2].mean(1) / 255, np.all(patches[..., 2] > 250, axis=1)


def labelled_in_patches(batch: MapBatch) -> np.ndarray:
    """Mean (x, y) of the cells that each patch is labelled with, [P, 2] of a batch of one."""
    _, target_BPC = dense_targets(batch, CLASSES, (PATCHES, PATCHES))
    logits_PC = (target_BPC[0].log() - target_BPC[0, :, -1:].log())[:, :-1].clamp(min=0)
    y, x = np.divmod(np.arange(ROWS * COLUMNS), COLUMNS)
    centres = torch.from_numpy(np.stack([(x + 0.5) / COLUMNS, (y + 0.5) / ROWS], 1)).float()
    return (logits_PC @ centres / logits_PC.sum(1, keepdim=True)).numpy()


def map_batch(affines: list[np.ndarray]) -> MapBatch:
    score_map = position_map()
    return MapBatch(
        torch.from_numpy(score_map.values_Khw)[None],
        torch.from_numpy(score_map.classes_Khw)[None],
        torch.from_numpy(np.stack(affines)).float()[None],
    )


def compare(pixels_SS3: np.ndarray, batch: MapBatch) -> int:
    """Assert that pixels and labels of a view agree; returns how many patches could be compared."""
    seen_P2, image_P = seen_in_patches(pixels_SS3)
    margin = np.array([0.6 / COLUMNS, 0.6 / ROWS])  # nearer to the edge a map has no cells to lean on
    use_P = image_P & (seen_P2 > margin).all(1) & (seen_P2 < 1 - margin).all(1)
    difference = np.abs(labelled_in_patches(batch) - seen_P2)[use_P]
    assert (difference < 0.012).all(), f"labels lie up to {difference.max(0)} of the image beside their pixels"
    return int(use_P.sum())


@pytest.mark.parametrize("operation", ["none", *GEOMETRIC])
def test_labels_follow_pixels_through_every_geometric_op(operation: str) -> None:
    policy = "" if operation == "none" else "rand-m9-mstd0.5-n2-p1"
    view_of = TrainView(views(SIDE, crop_scale=(0.2, 1.0), auto_augment=policy))
    if operation != "none":
        transform = view_of._auto_augment
        known = {op.name: op for op in transform.ops}  # type: ignore[union-attr]
        transform.ops = [known[operation]]  # type: ignore[union-attr]
    compared = 0
    for sample in range(60):
        seed_sample(1, 0, sample)
        view = view_of(position_image())
        assert len(view.affines) == (1 if operation == "none" else 3)
        compared += compare(view.pixels_SS3, map_batch(view.affines))
    assert compared > 60 * 8


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original-mstd0.5", "v0", "3a"])
def test_labels_follow_pixels_through_whole_policies(policy: str) -> None:
    """Every operation of a policy; where colours change, the traced way is compared with the same view uncoloured."""
    colourless = TrainView(views(SIDE, auto_augment=policy))
    policies = getattr(colourless._auto_augment, "policy", None) or [colourless._auto_augment.ops]  # type: ignore[union-attr]
    for operations in policies:
        for operation in operations:
            if operation.name not in GEOMETRIC:
                operation.aug_fn = lambda picture, *_, **__: picture
    coloured = TrainView(views(SIDE, auto_augment=policy))
    compared = moved = 0
    for sample in range(80):
        seed_sample(2, 0, sample)
        view = colourless(position_image())
        seed_sample(2, 0, sample)
        affines = coloured(position_image()).affines
        assert len(view.affines) <= coloured.max_affines
        if policy != "3a":  # its blur draws random numbers of its own, so the two ways part
            assert np.array_equal(np.stack(affines), np.stack(view.affines))
        moved += len(view.affines) > 1
        compared += compare(view.pixels_SS3, map_batch(view.affines))
    assert compared > 80 * 5
    assert moved > 10 or policy == "3a"


def test_flip_flips_labels() -> None:
    view = TrainView(views(SIDE, crop_scale=(1.0, 1.0), crop_ratio=(WIDTH / HEIGHT,) * 2, hflip=1.0))
    seed_sample(0, 0, 0)
    flipped = view(position_image())
    assert flipped.pixels_SS3[0, 0, 0] > 250
    assert compare(flipped.pixels_SS3, map_batch(flipped.affines)) == PATCHES**2


def test_erasing_leaves_labels_alone() -> None:
    plain = TrainView(views(SIDE))
    erasing = TrainView(views(SIDE, random_erasing=1.0))
    for sample in range(20):
        seed_sample(3, 0, sample)
        one = plain(position_image())
        seed_sample(3, 0, sample)
        other = erasing(position_image())
        assert np.array_equal(one.affines[0], other.affines[0])
        share = (one.pixels_SS3 != other.pixels_SS3).any(-1).mean()
        assert 0.015 < share < 0.35


def test_places_without_image_have_no_scores() -> None:
    """What a rotation brings in from outside gets the same probability for every class."""
    view_of = TrainView(views(SIDE, crop_scale=(0.5, 1.0), auto_augment="rand-m9-n2-p1"))
    view_of._auto_augment.ops = [op for op in view_of._auto_augment.ops if op.name in GEOMETRIC]  # type: ignore[union-attr]
    empty = 0
    for sample in range(100):
        seed_sample(4, 0, sample)
        view = view_of(position_image())
        cut = SIDE // PATCHES
        blue = view.pixels_SS3[..., 2].reshape(PATCHES, cut, PATCHES, cut).transpose(0, 2, 1, 3).reshape(-1, cut * cut)
        _, target_BPC = dense_targets(map_batch(view.affines), CLASSES, (PATCHES, PATCHES))
        filling = (blue < 140).all(1)
        assert torch.allclose(target_BPC[0, filling], torch.tensor(1 / CLASSES))
        empty += int(filling.sum())
    assert empty > 50


def test_points_are_where_the_pixels_came_from_to_the_pixel() -> None:
    """Finer than patches: points at pixel centres, traced back, against the code in the pixels themselves."""
    view_of = TrainView(views(SIDE, crop_scale=(0.1, 1.0), auto_augment="rand-m9-mstd0.5-n2-p1"))
    view_of._auto_augment.ops = [op for op in view_of._auto_augment.ops if op.name in GEOMETRIC]  # type: ignore[union-attr]
    points_PQ2 = sampling_points((SIDE, SIDE), 1, torch.device("cpu"))
    for sample in range(30):
        seed_sample(5, 0, sample)
        view = view_of(position_image())
        affine_BT23 = torch.from_numpy(np.stack(view.affines)).float()[None]
        xy, inside = to_image(points_PQ2, affine_BT23)
        code = view.pixels_SS3.reshape(-1, 3)
        filling = torch.from_numpy(view.pixels_SS3[..., 2] < 255).float()[None]
        near_filling = torch.nn.functional.max_pool2d(filling, 5, 1, 2).flatten().numpy() > 0  # blended
        sure = ~near_filling & inside[0, :, 0].numpy()
        difference = np.abs(xy[0, :, 0].numpy() - code[:, :2] / 255)[sure]
        assert np.quantile(difference, 0.999) < 0.015 and difference.mean() < 0.004
        assert (inside[0, :, 0].numpy() == (code[:, 2] > 200)).mean() > 0.98


@pytest.mark.parametrize("parallel", [False, True])
def test_labels_follow_pixels_from_the_shards_to_the_device(tmp_path: Path, parallel: bool) -> None:
    """The whole way: painted files in shards, maps beside the images or in a set of their own, the loader, targets."""
    form = position_map().format
    record = encode(position_map())
    names = [f"cell {number}" for number in range(CLASSES)]
    with SetWriter(tmp_path / "set", names, 5, None if parallel else form) as writer:
        for number in range(12):
            writer.add(f"{number}", png(position_image()), "png", 0, None if parallel else record)
    if parallel:
        with SetWriter(tmp_path / "set.maps", names, 5, form) as writer:
            for number in range(12):
                writer.add_map(f"{number}", record, 0)
    index = ShardIndex.load(tmp_path / "set")
    settings = views(SIDE, auto_augment="rand-m9-n2-p1")
    batches = train_batches(
        index, settings, global_batch=12, micro_batch=4, rank=0, world_size=1, seed=0, maps=find_maps(index)
    )
    view_of = batches.dataset.train_view
    view_of._auto_augment.ops = [op for op in view_of._auto_augment.ops if op.name in GEOMETRIC]
    compared = 0
    for _, batch in zip(range(6), batches, strict=False):
        assert batch.maps is not None and batch.maps.affine_BT23.shape == (4, 3, 2, 3)
        for row in range(4):
            one = batch.maps.map_tensors(lambda tensor: tensor[row : row + 1])  # noqa: B023
            compared += compare(batch.images_BHWC[row].numpy(), one)
    assert compared > 24 * 5
