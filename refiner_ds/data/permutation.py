"""Which sample comes at which position of an epoch: a keyed permutation that is computed, never stored.

An epoch's order is a pure function of (count, seed, epoch). A Feistel network permutes the numbers of a rectangle just
large enough to hold ``count``; the few that land outside are permuted again (cycle walking). Looking up a position
costs a few microseconds and no memory whether there are a thousand samples or a billion: any rank can start anywhere.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), the generalised Feistel construction.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

ROUNDS = 6  # pairs of half rounds; small sets need more than the four that suffice for large ones


@lru_cache(maxsize=16)
def _round_keys(count: int, seed: int, epoch: int) -> tuple[np.uint64, ...]:
    """One 64-bit key a half round."""
    stream = hashlib.shake_256(f"refiner_ds order {count} {seed} {epoch}".encode()).digest(16 * ROUNDS)
    return tuple(np.frombuffer(stream, dtype="<u8"))


def _hash_below(limit: int, value: np.ndarray, key: np.uint64) -> np.ndarray:
    """A pseudo-random number below ``limit`` for every value: splitmix64's finaliser, then its high bits scaled."""
    mixed = value + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed >>= np.uint64(32)
    return (mixed * np.uint64(limit)) >> np.uint64(32)


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
    keys = _round_keys(count, seed, epoch)
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
        row = (row + _hash_below(rows, column, keys[half])) % np.uint64(rows)
        column = (column + _hash_below(columns, row, keys[half + 1])) % np.uint64(columns)
    return row * np.uint64(columns) + column
