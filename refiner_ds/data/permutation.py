"""Which sample comes at which position of an epoch: a keyed permutation that is computed, never stored.

An epoch's order is a pure function of (count, seed, epoch). A Feistel network permutes the numbers of a rectangle just
large enough to hold ``count``; the few that land outside are permuted again (cycle walking). Looking up a position
costs a few microseconds and no memory whether there are a thousand samples or a billion: any rank can start anywhere.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), the generalised Feistel construction.
"""

from __future__ import annotations

import numpy as np

from refiner_ds.seeds import hash_below, order_keys


def samples_at(positions: np.ndarray, *, count: int, seed: int, epoch: int) -> np.ndarray:
    """Sample numbers at the given positions of an epoch.

    Args:
        positions: [n] integers in [0, count).
        count: samples in the set, below 2**62.
        seed: of the run.
        epoch: counted from 0.
    Returns:
        [n] int64; over all positions each number below ``count`` comes exactly once.
    """
    keys = order_keys(count, seed, epoch)
    rows = int(np.ceil(np.sqrt(count)))
    columns = -(-count // rows)
    numbers = np.array(positions, dtype=np.uint64)
    outside = np.arange(len(numbers))
    while len(outside):
        numbers[outside] = _feistel(numbers[outside], rows, columns, keys)
        outside = outside[numbers[outside] >= count]
    return numbers.astype(np.int64)


def _feistel(numbers: np.ndarray, rows: int, columns: int, keys: tuple[np.uint64, ...]) -> np.ndarray:
    """A permutation of the numbers below rows × columns."""
    row, column = numbers // np.uint64(columns), numbers % np.uint64(columns)
    for half in range(0, len(keys), 2):
        row = (row + hash_below(rows, column, keys[half])) % np.uint64(rows)
        column = (column + hash_below(columns, row, keys[half + 1])) % np.uint64(columns)
    return row * np.uint64(columns) + column
