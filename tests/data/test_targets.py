"""What happens on the device equals a naive loop over images, patches and classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from refiner_ds.config.schema import MixKeys
from refiner_ds.data.batch import MapBatch
from refiner_ds.data.dense_targets import dense_targets
from refiner_ds.data.mixing import Mix, draw_mix, image_lambda, mix_images
from refiner_ds.data.normalize import normalize
from refiner_ds.data.targets import label_targets, map_targets, smooth_labels

BATCH, K, ROWS, COLUMNS, CLASSES = 4, 3, 9, 13, 20


def random_maps(steps: np.ndarray | None = None) -> tuple[MapBatch, torch.Tensor]:
    """Random maps, and the boxes (x0, y0, x1, y1) as fractions of the image that their views were cut from."""
    rng = np.random.default_rng(0)
    classes = np.argsort(rng.random((BATCH, CLASSES, ROWS, COLUMNS)), 1)[:, :K].astype(np.int16)
    values = -np.sort(-rng.normal(3, 2, (BATCH, K, ROWS, COLUMNS)), 1).astype(np.float16)
    low, high = np.sort(rng.random((2, BATCH, 2)), 0)
    boxes = np.concatenate([low, high], 1)
    matrices = np.zeros((BATCH, 1, 2, 3))
    matrices[:, 0, 0, 0], matrices[:, 0, 1, 1] = (high - low).T
    matrices[:, 0, :, 2] = low
    maps = MapBatch(torch.from_numpy(values), torch.from_numpy(classes), torch.from_numpy(matrices).float())
    return maps, torch.from_numpy(boxes).float()


def dense_logits(maps: MapBatch) -> torch.Tensor:
    """The maps with all classes, by loops."""
    logits = torch.zeros(BATCH, CLASSES, ROWS, COLUMNS)
    for b in range(BATCH):
        for k in range(K):
            for y in range(ROWS):
                for x in range(COLUMNS):
                    logits[b, maps.classes_BKhw[b, k, y, x], y, x] = maps.values_BKhw[b, k, y, x].float()
    return logits


@pytest.mark.parametrize("grid, points", [((7, 7), 2), ((14, 14), 1), ((3, 5), 4)])
def test_dense_targets_equal_roi_align(grid: tuple[int, int], points: int) -> None:
    """torchvision's RoIAlign of boxes in (x, y) order, on a map that is not square."""
    maps, boxes = random_maps()
    scaled = boxes * torch.tensor([COLUMNS, ROWS, COLUMNS, ROWS])
    rois = torch.cat([torch.arange(BATCH)[:, None], scaled], 1)
    aligned = roi_align(dense_logits(maps), rois, grid, sampling_ratio=points, aligned=True)
    target_BC, target_BPC = dense_targets(maps, CLASSES, grid, points=points)
    assert torch.allclose(target_BPC, aligned.flatten(2).transpose(1, 2).softmax(-1), atol=2e-6)
    assert torch.allclose(target_BC, aligned.mean((2, 3)).softmax(-1), atol=2e-6)


def test_class_target_is_roi_align_to_one_cell() -> None:
    maps, boxes = random_maps()
    rois = torch.cat([torch.arange(BATCH)[:, None], boxes * torch.tensor([COLUMNS, ROWS, COLUMNS, ROWS])], 1)
    aligned = roi_align(dense_logits(maps), rois, (1, 1), sampling_ratio=28, aligned=True)
    target_BC, _ = dense_targets(maps, CLASSES, (14, 14))
    assert torch.allclose(target_BC, aligned.flatten(1).softmax(-1), atol=2e-6)


def test_smoothing_is_the_released_formula() -> None:
    maps, _ = random_maps()
    plain, smoothed = dense_targets(maps, CLASSES, (7, 7)), dense_targets(maps, CLASSES, (7, 7), smoothing=0.1)
    for one, other in zip(plain, smoothed, strict=True):
        assert torch.allclose(other, one * (1 - 0.1 + 0.1 / CLASSES) + 0.1 / CLASSES)
        assert torch.allclose(other.sum(-1), torch.tensor(1 + 0.1 / CLASSES))


def test_label_smoothing_is_timms() -> None:
    target = smooth_labels(torch.tensor([2, 0]), 5, 0.1)
    wanted = torch.full((2, 5), 0.02)
    wanted[0, 2] = wanted[1, 0] = 0.92
    assert torch.allclose(target, wanted)


def test_normalize_is_mean_and_standard_deviation() -> None:
    images = torch.randint(0, 256, (2, 5, 6, 3), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = normalize(images, mean, std, torch.float32)
    for channel in range(3):
        wanted = (images[..., channel] / 255 - mean[channel]) / std[channel]
        assert torch.allclose(normalised[:, channel], wanted, atol=1e-6)
    assert normalised.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "mix", [Mix(), Mix(0.3), Mix(1.0, (3, 5, 20, 28)), Mix(1.0, (0, 0, 28, 28)), Mix(1.0, (4, 8, 12, 24))]
)
@pytest.mark.parametrize("with_maps", [False, True])
def test_mixing_equals_a_loop_over_pixels(mix: Mix, with_maps: bool) -> None:
    """Every pixel remembers whose it is; targets are the mean over the pixels of a patch, or of the image."""
    side, grid, cut = 28, (7, 7), 4
    owner = torch.arange(1, BATCH + 1).float()[:, None, None, None].expand(-1, 3, side, side)
    mixed = mix_images(owner, mix)
    labels = torch.tensor([4, 9, 0, 7])
    if with_maps:
        maps, _ = random_maps()
        class_before, patch_before = dense_targets(maps, CLASSES, grid, 0.1)
        target_BC, target_BPC = map_targets(maps, CLASSES, 0.1, mix, side, grid)
    else:
        class_before = smooth_labels(labels, CLASSES, 0.1)
        patch_before = class_before[:, None].expand(-1, 49, -1)
        target_BC, target_BPC = label_targets(labels, CLASSES, 0.1, mix, side, grid)
    for b in range(BATCH):
        partner = BATCH - 1 - b
        own_share = (mixed[b, 0] - (partner + 1)) / (b - partner)  # of every pixel
        wanted = own_share.mean() * class_before[b] + (1 - own_share.mean()) * class_before[partner]
        assert torch.allclose(target_BC[b], wanted, atol=1e-6)
        for patch in range(49):
            y, x = patch // 7 * cut, patch % 7 * cut
            share = own_share[y : y + cut, x : x + cut].mean()
            wanted = share * patch_before[b, patch] + (1 - share) * patch_before[partner, patch]
            assert torch.allclose(target_BPC[b, patch], wanted, atol=1e-6)


def test_drawn_mixes_have_timms_distribution() -> None:
    """Half mixup with λ from Beta(0.8, 0.8), half CutMix; the same generator state gives the same mix."""
    settings = MixKeys(mixup=0.8, cutmix=1.0)
    generator = torch.Generator().manual_seed(0)
    mixes = [draw_mix(settings, 224, generator) for _ in range(4000)]
    again = torch.Generator().manual_seed(0)
    assert mixes[:50] == [draw_mix(settings, 224, again) for _ in range(50)]
    blends = np.array([mix.lam for mix in mixes if mix.lam < 1])
    cuts = [mix for mix in mixes if mix.lam == 1]
    assert abs(len(blends) / 4000 - 0.5) < 0.03
    assert abs(blends.mean() - 0.5) < 0.02 and abs(blends.var() - 1 / (4 * 2.6)) < 0.01
    kept = np.array([image_lambda(mix, 224) for mix in cuts])
    assert 0.6 < kept.mean() < 0.7  # a half before boxes are clipped at the image's edge


@pytest.mark.parametrize(
    "settings", [MixKeys(mixup=0.0, cutmix=0.0), MixKeys(mixup=0.8, cutmix=1.0, mix_probability=0.0)]
)
def test_nothing_is_mixed_where_nothing_is_asked_for(settings: MixKeys) -> None:
    assert draw_mix(settings, 224, torch.Generator()) == Mix()
    images = torch.rand(2, 3, 8, 8)
    assert mix_images(images, Mix()) is images
