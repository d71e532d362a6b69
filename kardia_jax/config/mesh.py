"""How many devices share what."""

import math
from dataclasses import dataclass, field

from kardia_jax.config.errors import require

AXES = ("data", "fsdp", "tensor")
"""Axes of the mesh, outermost first: devices that are next to each other share one tensor."""

Sizes = tuple[int, int, int]
"""(data, fsdp, tensor)"""


@dataclass(frozen=True)
class SamplerMeshConfig:
    """Devices of the sampler's own, the last of all; 0 x 1 x 1 is none: it samples where the learner learns.

    They hold a copy of the parameters in ``model.dtype``, which is sent to them before each rollout.
    """

    data: int = 0
    """Parts of the rows whose devices hold whole copies; 0: the sampler has no devices of its own."""
    fsdp: int = 1
    """Parts of the rows whose devices share the copy that prompts are run with."""
    tensor: int = 1
    """Devices that share every layer."""

    def __post_init__(self) -> None:
        require(self.data >= 0, "mesh.sampler.data", "0 (no mesh of its own) or more", self.data)
        for name in ("fsdp", "tensor"):
            size = getattr(self, name)
            require(size >= 1, f"mesh.sampler.{name}", "at least 1", size)
        alone = self.data > 0 or self.fsdp * self.tensor == 1
        require(alone, "mesh.sampler.data", "at least 1 where fsdp or tensor is set", self.data)

    @property
    def sizes(self) -> Sizes:
        """(data, fsdp, tensor)"""
        return self.data, self.fsdp, self.tensor

    @property
    def devices(self) -> int:
        """How many are the sampler's own."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh; with the sampler's own devices they are all there are. 1 x 1 x 1 is one device and no mesh,
    however many there are, so a config that says nothing runs the same everywhere.

    What each axis shards is one table, in ``kardia_jax/model/sharding.py``.
    """

    data: int = 1
    """Parts of the batch whose devices hold whole copies of the state; -1 is whatever devices are left."""
    fsdp: int = 1
    """Parts of the batch whose devices share one copy of the parameters, moments and gradients; -1 as above."""
    tensor: int = 1
    """Devices that share every layer: heads, mlp and vocabulary; -1 as above."""
    sampler: SamplerMeshConfig = field(default_factory=SamplerMeshConfig)

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            require(size == -1 or size >= 1, f"mesh.{name}", "at least 1, or -1 for what is left", size)
        open_sizes = [name for name in AXES if getattr(self, name) == -1]
        require(len(open_sizes) <= 1, "mesh", "-1 at most once", self.shown())

    def shown(self) -> str:
        """Like ``2x2x2``."""
        return "x".join(str(getattr(self, name)) for name in AXES)

    def sizes(self, devices: int) -> Sizes:
        """(data, fsdp, tensor) of the learner's mesh where there are so many devices.

        >>> MeshConfig(data=-1, tensor=2).sizes(8)
        (4, 1, 2)
        >>> MeshConfig(data=-1, sampler=SamplerMeshConfig(data=2)).sizes(8)
        (6, 1, 1)

        Raises ConfigError where the sizes do not give that number, with the arithmetic.
        """
        asked, ours = (self.data, self.fsdp, self.tensor), devices - self.sampler.devices
        known = math.prod(size for size in asked if size > 0)
        spare = f"{devices} devices"
        if self.sampler.devices:
            spare += f" - {self.sampler.devices} of the sampler's = {ours}"
        if -1 in asked:
            fits, sums = ours > 0 and ours % known == 0, f"{spare}; {ours} / {known} = {ours / known:g} for the -1"
        else:
            fits, sums = ours == known, f"{spare}; {' x '.join(map(str, asked))} = {known}"
        fix = f"{sums}. Change a size, or set one to -1 for what is left."
        require(fits, "mesh", "data x fsdp x tensor = the number of devices", self.shown(), fix)
        data, fsdp, tensor = (ours // known if size == -1 else size for size in asked)
        return data, fsdp, tensor
