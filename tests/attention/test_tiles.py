"""Tiles cover every row of every image once, and see as far around their rows as a kernel reaches."""

from __future__ import annotations

import pytest
import torch

from refiner_ds.attention import equations
from refiner_ds.attention.tiling import tiles
from refiner_ds.attention.tiling.tiles import convolution_gradients, convolve
from tests.attention.cases import leaf, maps

CPU = torch.device("cpu")


@pytest.mark.parametrize("tile_bytes", [1, 300, 3000, 2**20])
@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize(("batch", "tokens"), [(3, 9), (1, 30), (7, 4)])
def test_every_row_is_made_once_and_reaches_far_enough(batch, tokens, radius, tile_bytes, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", tile_bytes)
    made = torch.zeros(batch, tokens, dtype=torch.int64)
    for tile in tiles.tiles(batch, tokens, 3, CPU, radius):
        made[tile.images, tile.rows] += 1
        assert tile.rows.start - tile.with_halo.start + tile.missing[0] == radius
        assert tile.with_halo.stop - tile.rows.stop + tile.missing[1] == radius
        rows = list(range(tokens))
        assert rows[tile.with_halo][tile.interior] == rows[tile.rows]
    assert (made == 1).all()


def test_small_budgets_cut_images_and_large_ones_join_them(monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 4 * 3 * 9 * 9 * 2)  # two images of three maps
    assert [tile.images for tile in tiles.tiles(5, 9, 3, CPU)] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 4 * 3 * 9 * 3)  # three rows of one
    assert [tile.rows for tile in tiles.tiles(1, 9, 3, CPU)] == [slice(0, 3), slice(3, 6), slice(6, 9)]


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("tile_bytes", [300, 2**20])
@pytest.mark.parametrize("groups", [1, 3])
def test_convolution_in_tiles_is_convolution_there_and_back(groups, kernel_size, tile_bytes, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", tile_bytes)
    whole, kernel = maps(2, 3, 11), leaf(3, 3 // groups, kernel_size, kernel_size)
    truth = (equations.dense_refiner if groups == 1 else equations.distributed_local_attention)(whole, kernel)
    direction = torch.randn_like(truth)
    pieces, back, gradient = torch.empty_like(truth), torch.empty_like(truth), torch.zeros_like(kernel)
    with torch.no_grad():
        for tile in tiles.tiles(2, 11, 3, CPU, kernel_size // 2):
            seen, behind = whole[tile.images, :, tile.with_halo], direction[tile.images, :, tile.with_halo]
            pieces[tile.images, :, tile.rows] = convolve(seen, kernel, tile, groups)
            back[tile.images, :, tile.rows], share = convolution_gradients(seen, behind, kernel, tile, groups)
            gradient += share
    torch.testing.assert_close(pieces, truth.detach())
    for ours, exact in zip((back, gradient), torch.autograd.grad(truth, (whole, kernel), direction), strict=True):
        torch.testing.assert_close(ours, exact)
