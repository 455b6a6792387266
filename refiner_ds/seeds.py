"""Every stream of random numbers of a run, each a pure function of the run's seed and a position.

    stream            function of                          derived by        used by
    ----------------  -----------------------------------  ----------------  ---------------------------------
    initial weights   (seed)                               `derived_seed`    training/loop.py
    mixing, dropout   (seed, step, micro-batch, rank)      `derived_seed`    training/step.py
    training views    (seed, view, sample)                 `view_seed`       data/augment.py
    order of samples  (count, seed, epoch)                 `order_keys`      data/permutation.py, with `hash_below`

A view's number is the epoch. With repeated augmentation by R it is R · epoch + the copy's number, and an order lasts
for R epochs.

No stream keeps a state, so that a run resumed at any step draws what it would have drawn. The derivations differ in
cost: a step can afford a cryptographic hash, a view takes a microsecond, and an order hashes whole arrays. Each keeps
its bits, so that runs can be resumed and repeated; tests/ground/test_seeds.py holds values of all of them.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

__all__ = ["HALF_ROUNDS", "derived_seed", "hash_below", "order_keys", "view_seed"]

HALF_ROUNDS = 12  # of the permutation; small sets need more than the eight that suffice for large ones

# splitmix64 (Steele, Lea and Flood, 2014): the increment, and the multipliers of its finaliser.
_INCREMENT, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 0xFFFFFFFFFFFFFFFF


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that is a function of ``parts`` and their order (BLAKE2b)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def view_seed(seed: int, epoch: int, sample: int) -> int:
    """A 63-bit seed of one view of one sample (splitmix64, chained)."""
    state = 0
    for number in (seed, epoch, sample):
        state = (state + number + _INCREMENT) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return state >> 1


@lru_cache(maxsize=16)
def order_keys(count: int, seed: int, epoch: int) -> tuple[np.uint64, ...]:
    """One 64-bit key a half round of an epoch's permutation of ``count`` samples (SHAKE-256)."""
    stream = hashlib.shake_256(f"refiner_ds order {count} {seed} {epoch}".encode()).digest(8 * HALF_ROUNDS)
    return tuple(np.frombuffer(stream, dtype="<u8"))


def hash_below(limit: int, value: np.ndarray, key: np.uint64) -> np.ndarray:
    """A number below ``limit`` for every value: splitmix64's finaliser of value + key, its high bits scaled.

    Args:
        limit: below 2**32.
        value: uint64.
    Returns:
        uint64, of the same shape.
    """
    mixed = value + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(_FIRST)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(_SECOND)
    mixed >>= np.uint64(32)
    return (mixed * np.uint64(limit)) >> np.uint64(32)
