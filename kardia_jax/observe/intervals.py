"""95 % intervals and macro-F1 for evaluation tables.

In: one value per answer and the cluster (dialogue or persona) that each answer belongs to, or one mean per
seed. Out: ``Interval(mean, low, high)``.

Answers to one persona are alike, so a bootstrap that draws answers would be too sure of itself: it draws
whole clusters. NaN is a missing verdict: it leaves the mean. Where a spread cannot be known (one cluster, one
seed) the ends are NaN, never the mean itself.

>>> t_interval([0.60, 0.66, 0.63])           # mean 0.63, s = 0.03, half width 4.303 * 0.03 / sqrt(3)
Interval(mean=0.63, low=0.555..., high=0.704...)
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval; NaN where unknown."""

    mean: float
    low: float
    high: float


UNKNOWN = Interval(math.nan, math.nan, math.nan)

# Two-sided 95 % points of Student's t for 1 to 30 degrees of freedom.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
Z_95 = 1.959964


def bootstrap_interval(values: Sequence[float], clusters: Sequence[Hashable], seed: int, n: int = 1000) -> Interval:
    """Mean of the values with the 2.5 and 97.5 percentiles of n resamples of whole clusters.

    A resample's mean is (sum of its clusters' sums) / (sum of their sizes). The same seed gives the same
    interval. Raises ValueError when values and clusters differ in length.
    """
    data = np.asarray(values, dtype=np.float64)
    _same_length("clusters", len(clusters), len(data))
    known = np.flatnonzero(~np.isnan(data))
    if not known.size:
        return UNKNOWN
    codes = _codes([clusters[index] for index in known.tolist()])
    sums, sizes = np.bincount(codes, weights=data[known]), np.bincount(codes)
    draws = _draws(sizes.size, seed, n)
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    return _percentiles(float(data[known].mean()), means, sizes.size)


def bootstrap_statistic(
    statistic: Callable[[Int[np.ndarray, " N"]], float],
    clusters: Sequence[Hashable],
    seed: int,
    n: int = 1000,
) -> Interval:
    """``bootstrap_interval`` for any statistic: it is given the indices of the rows that it may look at."""
    if not len(clusters):
        return UNKNOWN
    codes = _codes(clusters)
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    draws = _draws(len(members), seed, n)
    resampled = [statistic(np.concatenate([members[cluster] for cluster in draw])) for draw in draws]
    return _percentiles(statistic(np.arange(len(codes))), np.array(resampled), len(members))


def t_interval(seed_means: Sequence[float]) -> Interval:
    """Mean of independent runs and its 95 % t-interval: mean +- t(n - 1) s / sqrt(n), with s over n - 1."""
    known = np.array([mean for mean in seed_means if not math.isnan(mean)], dtype=np.float64)
    if known.size < 2:
        return Interval(float(known[0]), math.nan, math.nan) if known.size else UNKNOWN
    half = t_quantile(known.size - 1) * float(known.std(ddof=1)) / math.sqrt(known.size)
    mean = float(known.mean())
    return Interval(mean, mean - half, mean + half)


def t_quantile(freedom: int) -> float:
    """Two-sided 95 % point of Student's t; above 30 degrees of freedom by the expansion in 1/freedom.

    t = z + (z^3 + z) / (4 f) + (5 z^5 + 16 z^3 + 3 z) / (96 f^2), right to 1e-3 there.
    Source: Abramowitz and Stegun, 26.7.5.
    """
    if freedom < 1:
        raise ValueError(f"freedom: wanted at least 1, got {freedom}. An interval over runs needs two of them.")
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    first = (Z_95**3 + Z_95) / (4 * freedom)
    second = (5 * Z_95**5 + 16 * Z_95**3 + 3 * Z_95) / (96 * freedom**2)
    return Z_95 + first + second


def macro_f1(gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]) -> float:
    """Mean over labels of F1 = 2 TP / (2 TP + FP + FN).

    A label that is neither in ``gold`` nor in ``predicted`` has no F1 (0/0) and is left out, so a small test
    set does not score 0 for emotions that it never shows. A label that is only predicted scores 0. A
    prediction that is no label (None, or a malformed answer) misses its gold label and blames no other. NaN
    without any row. Raises ValueError for a gold label that is not in ``labels``.
    """
    return _macro_f1(*_label_codes(gold, predicted, labels), len(labels))


def bootstrap_macro_f1(
    gold: Sequence[str],
    predicted: Sequence[str | None],
    labels: Sequence[str],
    clusters: Sequence[Hashable],
    seed: int,
    n: int = 1000,
) -> Interval:
    """``macro_f1`` with its cluster bootstrap interval; every resample chooses its own present labels."""
    _same_length("clusters", len(clusters), len(gold))
    gold_codes, predicted_codes = _label_codes(gold, predicted, labels)
    return bootstrap_statistic(
        lambda rows: _macro_f1(gold_codes[rows], predicted_codes[rows], len(labels)), clusters, seed, n
    )


def _label_codes(
    gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    _same_length("predicted", len(predicted), len(gold))
    code = {label: index for index, label in enumerate(labels)}
    unknown = sorted(set(gold) - set(code))
    if unknown:
        raise ValueError(f"gold: wanted labels out of {len(labels)} known ones, got {unknown[:5]}.")
    none = len(labels)
    guesses = [none if label is None else code.get(label, none) for label in predicted]
    return np.array([code[label] for label in gold], dtype=np.int64), np.array(guesses, dtype=np.int64)


def _macro_f1(gold: Int[np.ndarray, " N"], predicted: Int[np.ndarray, " N"], labels: int) -> float:
    hits = np.bincount(gold[gold == predicted], minlength=labels)
    # 2 TP + FP + FN is how often the label is gold plus how often it is predicted. The code above the last
    # label stands for "no label" and falls off here.
    shown = np.bincount(gold, minlength=labels) + np.bincount(predicted, minlength=labels + 1)[:labels]
    present = shown > 0
    return float(np.mean(2 * hits[present] / shown[present])) if present.any() else math.nan


def _codes(clusters: Sequence[Hashable]) -> Int[np.ndarray, " N"]:
    """0, 1, 2, ... in order of first appearance, so that the draw does not depend on names."""
    order: dict[Hashable, int] = {}
    return np.array([order.setdefault(cluster, len(order)) for cluster in clusters], dtype=np.int64)


def _draws(clusters: int, seed: int, n: int) -> Int[np.ndarray, "n C"]:
    return np.random.default_rng(seed).integers(clusters, size=(n, clusters))


def _percentiles(mean: float, resampled: Float[np.ndarray, " n"], clusters: int) -> Interval:
    if clusters < 2:
        return Interval(mean, math.nan, math.nan)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(mean, float(low), float(high))


def _same_length(name: str, came: int, wanted: int) -> None:
    if came != wanted:
        raise ValueError(f"{name}: wanted {wanted} entries, one per value, got {came}.")
