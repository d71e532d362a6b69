"""Means that have not been divided yet, on the host: a sum and its weight, added over parts and divided once.

In: the device's ``Mean`` scalars, or plain numbers. Out: one float per name; NaN where nothing was observed,
because an unknown is never zero.

>>> parts = [{"kl": HostMean(8.0, 2.0)}, {"kl": HostMean(1.0, 1.0), "judge/latency": HostMean(0.0, 0.0)}]
>>> values(merge(parts))
{'kl': 3.0, 'judge/latency': nan}
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from kardia_jax.types import Mean


class HostMean(NamedTuple):
    """``Mean`` with floats in place of device scalars."""

    sum: float
    weight: float


def to_host(metrics: Mapping[str, Mean]) -> dict[str, HostMean]:
    """Copy every mean from the device, in one transfer."""
    fetched = jax.device_get(dict(metrics))
    return {name: HostMean(float(mean.sum), float(mean.weight)) for name, mean in fetched.items()}


def observed(numbers: Iterable[float]) -> HostMean:
    """The mean of plain numbers, each of weight 1; a NaN is unknown and leaves both sum and weight."""
    known = np.array([number for number in numbers if not math.isnan(number)], dtype=np.float64)
    return HostMean(float(known.sum()), float(known.size))


def merge(parts: Iterable[Mapping[str, HostMean]]) -> dict[str, HostMean]:
    """Add the sums and the weights of each name over parts; a name may be absent from some."""
    total: dict[str, HostMean] = {}
    for part in parts:
        for name, mean in part.items():
            before = total.get(name, HostMean(0.0, 0.0))
            total[name] = HostMean(before.sum + mean.sum, before.weight + mean.weight)
    return total


def values(metrics: Mapping[str, HostMean]) -> dict[str, float]:
    """Divide: sum / weight, NaN where the weight is 0."""
    return {name: mean.sum / mean.weight if mean.weight else math.nan for name, mean in metrics.items()}
