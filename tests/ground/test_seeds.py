"""Every stream of random numbers keeps its bits: a run that was begun goes on, and an old one can be repeated."""

from __future__ import annotations

import numpy as np

from refiner_ds.data.permutation import samples_at
from refiner_ds.seeds import HALF_ROUNDS, derived_seed, hash_below, order_keys, view_seed


def test_every_stream_gives_the_values_it_always_gave() -> None:
    assert (derived_seed(42), derived_seed(42, 7, 1, 3)) == (4410206093815208491, 6383357898074713734)
    assert view_seed(42, 3, 1001) == 6850766397530798465
    keys = [int(key) for key in order_keys(1000, 42, 3)]
    assert keys[:2] == [3792004248513080582, 17409060190409113274] and len(keys) == HALF_ROUNDS
    assert samples_at(np.arange(6), count=1000, seed=42, epoch=3).tolist() == [68, 111, 912, 457, 736, 867]


def test_streams_differ_by_each_of_their_numbers_and_by_their_order() -> None:
    positions = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1), (12, 3, 0), (1, 23, 0)]
    for derive in (derived_seed, view_seed, order_keys):
        assert len({derive(*position) for position in positions}) == len(positions)


def test_a_hash_stays_below_its_limit_and_reaches_all_of_it() -> None:
    found = hash_below(7, np.arange(1000, dtype=np.uint64), np.uint64(5))
    assert set(found.tolist()) == set(range(7))
