"""How far two columns of marks agree: plain numbers for ``probe`` and ``audit``.

>>> rank_correlation([1, 2, 3, 4], [10, 20, 40, 30])
0.8
>>> beyond(5, (2, 3)), beyond(1, (2, 3)), beyond(2.5, (2, 3))           # too high, too low, within
(2, -1, 0)
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

LEAST = 3
"""Pairs below which a rank correlation means nothing."""
DIGITS = 9
ROUNDING = 1e-9
"""Numbers that differ by less are the same."""


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rho: Pearson's r of the ranks, ties sharing their mean rank.

    NaN below three pairs, or where one column is constant.
    """
    if len(first) != len(second):
        raise ValueError(f"columns: wanted the same length, got {len(first)} and {len(second)}.")
    if len(first) < LEAST or np.ptp(first) < ROUNDING or np.ptp(second) < ROUNDING:
        return math.nan
    ranks = [rankdata(np.round(column, DIGITS)) for column in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def beyond(mark: float, band: tuple[int, int]) -> float:
    """By how many levels a mark lies above (positive) or below (negative) its band; 0 within."""
    lowest, highest = band
    return mark - highest if mark > highest else min(0, mark - lowest)


def mean(values: Sequence[float]) -> float:
    """NaN where there is nothing to average."""
    return float(np.mean(values)) if len(values) else math.nan


def deviation(values: Sequence[float]) -> float:
    """Population standard deviation; NaN where there is nothing."""
    return float(np.std(values)) if len(values) else math.nan
