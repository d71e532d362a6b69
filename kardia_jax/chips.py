"""What a chip can do, from its maker's data sheets: the ceilings that ``kardia plan`` holds a step against.

    chip("h100").flops / 1e12 == 989.5        # bfloat16, dense

Numbers of sparse matrices are halved. An interconnect's figure is what one chip can send while it receives as much:
half of the "bidirectional" or "total" figure of the sheets. Sources:

    v5e, v6e    docs.cloud.google.com/tpu/docs/v5e and /v6e (819 and 1,600 GB/s; links 400 and 800 GB/s both ways)
    v5p         docs.cloud.google.com/tpu/docs/v5p (links 4,800 Gbit/s, taken as the sum of both directions)
    a100-*      NVIDIA A100 Tensor Core GPU datasheet (SXM4), third-generation NVLink 600 GB/s
    h100, h200  NVIDIA H100 and H200 Tensor Core GPU datasheets (SXM5), fourth-generation NVLink 900 GB/s
    l40s        NVIDIA L40S datasheet; no NVLink, PCIe Gen4 x16 64 GB/s in both directions
"""

from dataclasses import dataclass
from typing import Literal

from kardia_jax.config import ConfigError

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator. ``memory`` is what a sheet calls GB; makers of memory mean 2^30 by it."""

    name: str
    platform: Literal["tpu", "gpu"]
    flops: float
    """Peak of bfloat16 matrix products, per second."""
    memory: int
    """Bytes of its own memory."""
    bandwidth: float
    """Bytes per second between memory and cores."""
    interconnect: float
    """Bytes per second that it can send to chips of its slice or node."""
    link: str
    """What that interconnect is."""
    reach: int
    """Chips that the interconnect joins: a pod, or a node."""
    capability: tuple[int, ...] = ()
    """Compute capability of an NVIDIA GPU."""


CHIPS = (
    Chip("v5e", "tpu", 197e12, 16 * GIB, 819 * GB, 200 * GB, "ICI", 256),
    Chip("v5p", "tpu", 459e12, 95 * GIB, 2765 * GB, 300 * GB, "ICI", 8960),
    Chip("v6e", "tpu", 918e12, 32 * GIB, 1600 * GB, 400 * GB, "ICI", 256),
    Chip("a100-40", "gpu", 312e12, 40 * GIB, 1555 * GB, 300 * GB, "NVLink", 8, (8, 0)),
    Chip("a100-80", "gpu", 312e12, 80 * GIB, 2039 * GB, 300 * GB, "NVLink", 8, (8, 0)),
    Chip("h100", "gpu", 989.5e12, 80 * GIB, 3350 * GB, 450 * GB, "NVLink", 8, (9, 0)),
    Chip("h200", "gpu", 989.5e12, 141 * GB, 4800 * GB, 450 * GB, "NVLink", 8, (9, 0)),
    Chip("l40s", "gpu", 362e12, 48 * GIB, 864 * GB, 32 * GB, "PCIe", 8, (8, 9)),
)


TOPOLOGIES = {
    **dict.fromkeys(("v5e", "v6e"), ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
}
"""Slices that can be rented and compiled for, by chip."""


def check_topology(name: str) -> Chip:
    """The chip of a slice like ``v5e:4x4``; ConfigError lists the slices."""
    kind, _, size = name.partition(":")
    if size not in TOPOLOGIES.get(kind, ()):
        known = "; ".join(f"{kind}:" + " ".join(sizes) for kind, sizes in TOPOLOGIES.items())
        raise ConfigError("topology", f"one of {known}", name)
    return chip(kind)


def chip(name: str) -> Chip:
    """The chip of that name; ConfigError lists the names."""
    known = {one.name: one for one in CHIPS}
    if name not in known:
        raise ConfigError("chip", f"one of {', '.join(known)}", name)
    return known[name]
