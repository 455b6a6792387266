"""Means over seeds, their 95 % intervals, and what they say in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

__all__ = [
    "NOTHING",
    "Estimate",
    "estimate",
    "interval_cell",
    "mean_cell",
    "t95",
    "verdict_on_difference",
    "verdict_on_paper",
]

# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
T95 = (12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)
Z95 = 1.959963984540054


NOTHING = "–"  # in a table's cell


@dataclass(frozen=True)
class Estimate:
    """Mean of some values and its 95 % interval by Student's t; of one value there is no interval."""

    mean: float
    interval: tuple[float, float] | None
    count: int


def mean_cell(found: Estimate | None, sign: str = "") -> str:
    """The mean as a table's cell; ``sign`` is "+" for a difference."""
    return NOTHING if found is None else f"{found.mean:{sign}.2f}"


def interval_cell(found: Estimate | None, sign: str = "") -> str:
    """The interval as a table's cell; ``sign`` is "+" for a difference."""
    if found is None or found.interval is None:
        return NOTHING
    low, high = found.interval
    return f"{low:{sign}.2f} to {high:{sign}.2f}"


def t95(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t; beyond ten degrees of freedom within a thousandth."""
    if freedom <= len(T95):
        return T95[freedom - 1]
    z = Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of the values with its interval; None of no values."""
    if not values:
        return None
    centre = mean(values)
    if len(values) == 1:
        return Estimate(centre, None, 1)
    half = t95(len(values) - 1) * stdev(values) / sqrt(len(values))
    return Estimate(centre, (centre - half, centre + half), len(values))


def verdict_on_paper(found: Estimate, paper: float) -> str:
    """Whether the paper's value lies within the interval, in words."""
    apart = found.mean - paper
    side = f"{abs(apart):.2f} {'above' if apart > 0 else 'below'} the paper"
    if found.interval is None:
        return f"{side}, by one seed: no interval"
    low, high = found.interval
    if low <= paper <= high:
        return "agrees with the paper: its value lies in the interval"
    return f"{side}: its value lies outside the interval"


def verdict_on_difference(difference: Estimate, baseline: str) -> str:
    """Whether a difference, seed by seed, is one, in words."""
    if difference.interval is None:
        return f"one seed: no interval of the difference from {baseline}"
    low, high = difference.interval
    if low > 0:
        return f"better than {baseline}: the interval of the difference lies above 0"
    if high < 0:
        return f"worse than {baseline}: the interval of the difference lies below 0"
    return f"no difference from {baseline} is seen: its interval holds 0"
