"""Two checkpoints compared tensor by tensor, by name.

In: two paths. Out: ``TensorReport``, with every name and number, for instance

    {"compared": 290, "equal": 289, "only_a": [], "only_b": [], "shapes": {}, "dtypes": {},
     "differences": {"model.norm.weight": 0.0078125}, "max_abs": 0.0078125}

Numbers are compared as float64, so a bfloat16 checkpoint equals its float32 copy; one tensor of each is in memory.
"""

import pathlib
from dataclasses import dataclass, field

import numpy as np

from kardia_jax.hf.read import SCAN, Found, inspect, source_of


@dataclass(frozen=True)
class TensorReport:
    """What is equal and what is not."""

    compared: int = 0
    """Tensors of the same name and shape."""
    equal: int = 0
    """Of these, equal in every number."""
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    shapes: dict[str, list[list[int]]] = field(default_factory=dict)
    """Name -> the two shapes, where they differ."""
    dtypes: dict[str, list[str]] = field(default_factory=dict)
    """Name -> the two types, where they differ; not a difference in itself."""
    differences: dict[str, float] = field(default_factory=dict)
    """Name -> largest absolute difference, where any number differs; infinite where NaN meets a number."""

    @property
    def max_abs(self) -> float:
        """Largest difference of all."""
        return max(self.differences.values(), default=0.0)

    def agrees(self, tolerance: float) -> bool:
        """The same tensors, none further apart than this."""
        return not (self.only_a or self.only_b or self.shapes) and self.max_abs <= tolerance


def compare_tensors(a: pathlib.Path, b: pathlib.Path) -> TensorReport:
    """Every tensor of both; HfError for a path that is no checkpoint, or a damaged one."""
    ours, theirs = _by_name(a), _by_name(b)
    both = [name for name in ours if name in theirs]
    shapes = {name: pair for name in both if (pair := _shapes(ours[name], theirs[name]))[0] != pair[1]}
    same = [name for name in both if name not in shapes]
    differences = {}
    streams = (source_of(path).tensors(path, same) for path in (a, b))
    for (name, one), (_, other) in zip(*streams, strict=True):
        if (distance := apart(one, other)) > 0:
            differences[name] = distance
        del one, other
    return TensorReport(
        compared=len(same),
        equal=len(same) - len(differences),
        only_a=sorted(set(ours) - set(theirs)),
        only_b=sorted(set(theirs) - set(ours)),
        shapes=shapes,
        dtypes={n: [ours[n].dtype, theirs[n].dtype] for n in same if ours[n].dtype != theirs[n].dtype},
        differences=differences,
    )


def _by_name(path: pathlib.Path) -> dict[str, Found]:
    return {tensor.name: tensor for tensor in inspect(path)}


def _shapes(one: Found, other: Found) -> list[list[int]]:
    return [list(one.shape), list(other.shape)]


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Largest absolute difference; NaN equals NaN and is infinitely far from a number."""
    ours, theirs, largest = one.reshape(-1), other.reshape(-1), 0.0
    for start in range(0, ours.size, SCAN):
        a, b = (x[start : start + SCAN].astype(np.float64) for x in (ours, theirs))
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        distance = np.abs(np.where(same, 0.0, a) - np.where(same, 0.0, b))
        largest = max(largest, float(np.where(np.isnan(distance), np.inf, distance).max(initial=0.0)))
    return largest
