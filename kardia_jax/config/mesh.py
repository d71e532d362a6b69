"""How many devices share what."""

import math
from dataclasses import dataclass

from kardia_jax.config.errors import require

AXES = ("data", "fsdp", "tensor")
"""Axes of the mesh, outermost first: devices that are next to each other share one tensor."""


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh; their product is the number of devices. 1 x 1 x 1 is one device and no mesh at all.

    What each axis shards is one table, in ``kardia_jax/model/sharding.py``.
    """

    data: int = 1
    """Parts of the batch whose devices hold whole copies of the state; -1 is whatever devices are left."""
    fsdp: int = 1
    """Parts of the batch whose devices share one copy of the parameters, moments and gradients; -1 as above."""
    tensor: int = 1
    """Devices that share every layer: heads, mlp and vocabulary; -1 as above."""

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            require(size == -1 or size >= 1, f"mesh.{name}", "at least 1, or -1 for what is left", size)
        open_sizes = [name for name in AXES if getattr(self, name) == -1]
        require(len(open_sizes) <= 1, "mesh", "-1 at most once", self.shown())

    def shown(self) -> str:
        """Like ``2x2x2``."""
        return "x".join(str(getattr(self, name)) for name in AXES)

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) on so many devices.

        >>> MeshConfig(data=-1, tensor=2).sizes(8)
        (4, 1, 2)

        Raises ConfigError where the sizes do not give that number, with the arithmetic.
        """
        known = math.prod(size for size in (self.data, self.fsdp, self.tensor) if size > 0)
        sum_up = f"data x fsdp x tensor = the number of devices, {devices}"
        fix = "Set one of them to -1 for what is left."
        if -1 in (self.data, self.fsdp, self.tensor):
            fix = f"{devices} devices / {known} leaves {devices / known:g} for the -1."
        fits = devices % known == 0 if -1 in (self.data, self.fsdp, self.tensor) else known == devices
        require(fits, "mesh", sum_up, self.shown(), fix)
        data, fsdp, tensor = (devices // known if size == -1 else size for size in (self.data, self.fsdp, self.tensor))
        return data, fsdp, tensor
