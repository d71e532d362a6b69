"""Which knob makes a plan fit: each is tried by arithmetic, alone, then together with the others in order.

advice(spec, config, compute, (1, 4, 2), usable(chip("v5e")), True)
# ["grpo.optimizer.moment_dtype bfloat16: 1.8 GiB less", ..., "the first 3 of these together: ... GiB, and it fits",
#  "mesh.data 1 mesh.fsdp 4 mesh.tensor 4 (16 devices): 14.3 GiB, and it fits"]
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kardia_jax.chips import GIB, Chip
from kardia_jax.config import Config, ConfigError, GrpoConfig, OptimizerConfig, SamplerConfig
from kardia_jax.config.mesh import AXES, Sizes
from kardia_jax.model.policy import Compute
from kardia_jax.model.sharding import check_mesh, check_rows
from kardia_jax.model.spec import ModelSpec
from kardia_jax.plan.memory import abstract_mesh, memory

USABLE = 0.94
"""Share of a chip's memory that programs get; the rest is the runtime's, and lost between buffers. An assumption."""


class Knob(NamedTuple):
    """A change of the config that gives memory back."""

    field: str
    value: str
    changed: Config


def usable(chip: Chip) -> int:
    """Bytes of the chip's memory that programs get."""
    return int(USABLE * chip.memory)


def advice(spec: ModelSpec, config: Config, compute: Compute, sizes: Sizes, room: int, fused: bool) -> list[str]:
    """What makes the run fit into so many bytes of arithmetic: each knob alone, cheapest first, then so many of them
    together, then a mesh of as many devices or more."""

    def peak(tried: Config, on: Sizes = sizes) -> int:
        return memory(spec, tried, dataclasses.replace(compute, remat=tried.model.remat), on, fused).peak

    before = peak(config)
    useful = [(knob, peak(knob.changed)) for knob in knobs(config) if peak(knob.changed) < before]
    said = [
        f"{knob.field} {knob.value}: {(before - after) / GIB:.1f} GiB less{ends(after, room)}" for knob, after in useful
    ]
    if not any(after <= room for _, after in useful):
        said += together(config, [knob.field for knob, _ in useful], peak, room)
    return [*said, wider(spec, config, sizes, peak, room)]


def ends(peak: int, room: int, otherwise: str = "") -> str:
    """What a line of advice ends with."""
    return ", and it fits" if peak <= room else otherwise


def together(config: Config, fields: list[str], peak: Callable[[Config], int], room: int) -> Iterator[str]:
    """As many of the knobs, in order, as are needed; all of them where that is too little."""
    for count, field in enumerate(fields, 1):
        config = next(knob.changed for knob in knobs(config) if knob.field == field)
        after = peak(config)
        if after <= room or count == len(fields):
            yield f"the first {count} of these together: {after / GIB:.1f} GiB{ends(after, room, ', still too much')}"
            return


def wider(spec: ModelSpec, config: Config, sizes: Sizes, peak: Callable[[Config, Sizes], int], room: int) -> str:
    """The mesh of fewest devices, and then of the smallest ``tensor``, on which the config fits as it is."""
    devices = math.prod(sizes)
    for count in (devices, 2 * devices, 4 * devices, 8 * devices):
        peaks = [(peak(config, on), on) for on in meshes(spec, config, count)]
        fitting = [(on[2], after, on) for after, on in peaks if after <= room]
        if fitting:
            _, after, on = min(fitting)
            named = " ".join(f"mesh.{name} {size}" for name, size in zip(AXES, on, strict=True))
            return f"{named} ({count} devices): {after / GIB:.1f} GiB, and it fits"
    return f"no mesh of up to {8 * devices} devices is enough by itself"


def meshes(spec: ModelSpec, config: Config, devices: int) -> Iterator[Sizes]:
    """Every mesh of so many devices that divides the model and the batch."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for fsdp in divisors:
        for tensor in divisors:
            on = (devices // (fsdp * tensor), fsdp, tensor)
            if math.prod(on) == devices and divides(spec, config.grpo, on):
                yield on


def divides(spec: ModelSpec, grpo: GrpoConfig, sizes: Sizes) -> bool:
    """Whether a run on this mesh would start."""
    mesh = abstract_mesh(sizes)
    try:
        check_mesh(spec, mesh)
        check_rows(grpo.prompts // grpo.minibatches, "grpo.prompts", mesh, grpo.micro_batches)
    except ConfigError:
        return False
    return True


def knobs(config: Config) -> Iterator[Knob]:
    """What can still be turned, those first that cost least time."""
    grpo, optimizer = config.grpo, config.grpo.optimizer
    if config.model.remat != "block":
        model = dataclasses.replace(config.model, remat="block")
        yield Knob("model.remat", "block", dataclasses.replace(config, model=model))
    if grpo.prompts // grpo.minibatches > grpo.micro_batches and grpo.tokens_per_micro_batch is None:
        parts = 2 * grpo.micro_batches
        if (grpo.prompts // grpo.minibatches) % parts == 0:
            yield _grpo(config, "micro_batches", parts)
    if optimizer.moment_dtype == "float32":
        yield _optimizer(config, "moment_dtype", "bfloat16")
    if not grpo.offload_reference and grpo.loss.beta > 0 and not config.model.lora.rank:
        yield _grpo(config, "offload_reference", True)
    if not optimizer.offload:
        yield _optimizer(config, "offload", True)
    if grpo.sampler.kv_dtype == "compute":
        yield _sampler(config, "kv_dtype", "int8")
    if grpo.sampler.weights_dtype == "compute":
        yield _sampler(config, "weights_dtype", "int8")


def _grpo(config: Config, name: str, value: object) -> Knob:
    grpo: GrpoConfig = dataclasses.replace(config.grpo, **{name: value})
    return Knob(f"grpo.{name}", str(value), dataclasses.replace(config, grpo=grpo))


def _optimizer(config: Config, name: str, value: object) -> Knob:
    optimizer: OptimizerConfig = dataclasses.replace(config.grpo.optimizer, **{name: value})
    return Knob(f"grpo.optimizer.{name}", str(value), _grpo(config, "optimizer", optimizer).changed)


def _sampler(config: Config, name: str, value: object) -> Knob:
    sampler: SamplerConfig = dataclasses.replace(config.grpo.sampler, **{name: value})
    return Knob(f"grpo.sampler.{name}", str(value), _grpo(config, "sampler", sampler).changed)
