"""DeepSpeed at every ZeRO stage and precision trains what a plain loop trains, and ema what it trained."""

from __future__ import annotations

import pytest

from tests.training.launched import findings

# Mostly 3e-6; where another order of summation flips one gate of a ReLU6, 2e-4. A wrong scale would be above 0.1.
NEAR = 1e-3


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return findings("engine_script.py", tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_in_fp32_train_what_one_plain_loop_trains(found: dict[str, list[float]], stage: int) -> None:
    weights, statistics, *_ = found[f"{stage} fp32"]
    assert weights < NEAR and statistics < NEAR


@pytest.mark.parametrize("stage", range(4))
def test_bf16_takes_the_same_way(found: dict[str, list[float]], stage: int) -> None:
    """Gates of the refiner flip under bf16, so the way differs by a third at most, on each of two ranks."""
    weights, statistics, *_ = found[f"{stage} bf16"]
    assert weights < 2 * 0.35 and statistics < 2 * 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_averages_are_fp32_averages_of_weights_and_statistics(
    found: dict[str, list[float]], stage: int, precision: str
) -> None:
    case = found[f"{stage} {precision}"]
    assert max(case[4:6]) < 1e-5
    if precision == "fp32":
        assert max(case[2:4]) < NEAR


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_reading_averages_leaves_weights_alone(found: dict[str, list[float]], stage: int, precision: str) -> None:
    assert found[f"{stage} {precision}"][6] == 0


@pytest.mark.parametrize("precision, near", [("fp32", 1e-5), ("bf16", 0.1)])
@pytest.mark.parametrize("stage", range(4))
def test_gradient_norms_by_part_are_the_plain_loops_before_clipping(
    found: dict[str, list[float]], stage: int, precision: str, near: float
) -> None:
    assert found[f"{stage} {precision}"][7] < 2 * near  # summed over two ranks
