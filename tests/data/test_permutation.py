"""The order of an epoch is a permutation, keyed, well mixed, and costs nothing to enter anywhere."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from refiner_ds.data.permutation import samples_at


def whole(count: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return samples_at(np.arange(count), count=count, seed=seed, epoch=epoch)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 12, 16, 17, 99, 1000, 65536, 100_003])
def test_every_sample_comes_exactly_once(count: int) -> None:
    assert np.array_equal(np.sort(whole(count)), np.arange(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [whole(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert (one == other).sum() < 10  # two random permutations agree at about one place


def test_order_does_not_change_between_releases() -> None:
    """A run resumed after an upgrade must go on with the right sample."""
    assert whole(10, seed=42, epoch=3).tolist() == GOLDEN_10
    far = samples_at(np.array([0, 1, 10**9 - 1]), count=10**9, seed=42, epoch=3)
    assert far.tolist() == GOLDEN_BILLION


def test_any_slice_of_positions_agrees_with_the_whole() -> None:
    order = whole(5000, seed=7)
    chosen = np.random.default_rng(0).integers(0, 5000, 300)
    assert np.array_equal(samples_at(chosen, count=5000, seed=7, epoch=0), order[chosen])


@pytest.mark.parametrize("count", [5, 24, 50])
def test_every_sample_is_equally_likely_everywhere(count: int) -> None:
    """Chi-squared over (position, sample) and over where neighbours go, for many keys: nothing a small set can show."""
    trials = 4000
    orders = np.stack([whole(count, seed) for seed in range(trials)])
    for shift in (0, 1):
        seen = np.zeros((count, count))
        follow = orders if not shift else (np.roll(orders, -1, 1) - orders) % count
        for position in range(count - shift):
            seen[position] = np.bincount(follow[:, position], minlength=count)
        table = seen[: count - shift, shift:]
        expected = trials / table.shape[1]
        statistic = ((table - expected) ** 2 / expected).sum()
        freedom = table.shape[0] * (table.shape[1] - 1)
        assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_class_sorted_input_is_shuffled_as_well_as_by_a_full_permutation() -> None:
    """Classes a batch of 256 sees, of 1000 classes that lie in order: within 1 % of a true permutation's."""
    count, classes, batch = 256_000, 1000, 256
    labels = np.arange(count) * classes // count

    def distinct(order: np.ndarray) -> float:
        return float(np.mean([len(np.unique(part)) for part in labels[order].reshape(-1, batch)]))

    ours, permutation = distinct(whole(count)), distinct(np.random.default_rng(0).permutation(count))
    assert abs(ours / permutation - 1) < 0.01


def test_neighbours_in_the_set_are_scattered_over_the_epoch() -> None:
    count = 100_000
    place = np.argsort(whole(count))
    distance = np.abs(np.diff(place))
    assert abs(distance.mean() / (count / 3) - 1) < 0.02  # the mean distance of two random places
    assert abs(np.corrcoef(place[:-1], place[1:])[0, 1]) < 0.02


def test_a_billion_samples_cost_no_memory() -> None:
    positions = np.arange(10**9 - 1024, 10**9)
    tracemalloc.start()
    numbers = samples_at(positions, count=10**9, seed=0, epoch=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert len(np.unique(numbers)) == 1024 and numbers.max() < 10**9


GOLDEN_10 = [5, 4, 0, 1, 9, 3, 7, 2, 6, 8]
GOLDEN_BILLION = [847546509, 376654414, 321081370]
