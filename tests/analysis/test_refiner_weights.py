"""What is said of a refiner's weights is so for weights made by hand, and every layout's refiners are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import refiner_ds.models  # noqa: F401  registers the names
from refiner_ds.analysis.refiner_weights import BlockWeights, draw_summaries, draw_weights, refiner_weights, summaries

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}


@pytest.mark.parametrize(
    "options, blocks, maps",
    [
        ({"layout": "released", "refiner": "bottleneck"}, [1, 3], (6, 2, 6)),
        ({"layout": "paper", "refiner": "linear", "expansion_ratio": 2}, [0, 1, 2, 3], (4, 2, 4)),
        ({"layout": "paper", "refiner": "linear", "expand": False}, [0, 1, 2, 3], (2, 2, 2)),
        ({"layout": "paper", "refiner": "linear", "reduce": False}, [0, 1, 2, 3], (6, 2, 6)),
        ({"layout": "paper", "refiner": "none"}, [], None),
    ],
)
def test_refiners_are_found_in_every_layout(options: dict, blocks: list[int], maps: tuple, tmp_path: Path) -> None:
    found = refiner_weights(timm.create_model("refined_vit", **SMALL, **options).state_dict())
    assert [weights.block for weights in found] == blocks
    if not found:
        return
    one = found[0]
    assert (one.kernel_Ekk.shape[0], one.expand_EH.shape[1], one.reduce_HE.shape[1]) == maps
    rows = summaries(found, 7)
    assert all(0 < row["centre_share"] < 1 and 0 <= row["head_mixing"] < 1 and row["step"] == 7 for row in rows)
    draw_summaries(rows, tmp_path / "refiner_weights.png")
    draw_weights(found, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_identity_refiner_neither_mixes_heads_nor_aggregates() -> None:
    centre = torch.zeros(3, 3, 3)
    centre[:, 1, 1] = 2
    (row,) = summaries([BlockWeights(0, torch.eye(3), centre, torch.eye(3))], 0)
    assert row["centre_share"] == 1 and row["head_mixing"] == 0 and row["kernel_norm"] == pytest.approx(2 / 3)


def test_mixing_counts_what_passes_between_heads() -> None:
    ones = torch.ones(2, 1, 1)
    (row,) = summaries([BlockWeights(0, torch.tensor([[3.0, 1.0], [0.0, 4.0]]), ones, torch.eye(2))], 0)
    assert row["head_mixing"] == pytest.approx(1 / 8)
    # Maps 0 and 1 belong to head 0, maps 2 and 3 to head 1.
    unreduced = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    (row,) = summaries([BlockWeights(0, unreduced, torch.ones(4, 1, 1), torch.eye(4))], 0)
    assert row["head_mixing"] == pytest.approx(1 / 4)
