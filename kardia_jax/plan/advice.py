"""Which knob makes a plan fit: each is tried by arithmetic, alone, then together with the others in order.

advice(spec, config, compute, (1, 8, 1), chip("a100-40"), True)
# ["grpo.optimizer.offload True: 21.3 GiB less", ...]
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from kardia_jax.chips import GIB, Chip
from kardia_jax.config import Config, GrpoConfig, OptimizerConfig, SamplerConfig
from kardia_jax.model.policy import Compute
from kardia_jax.model.spec import ModelSpec
from kardia_jax.plan.memory import memory

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


def advice(
    spec: ModelSpec, config: Config, compute: Compute, sizes: tuple[int, int, int], chip: Chip, fused: bool
) -> list[str]:
    """What makes the run fit on this chip, cheapest first; the last line says so where all together is too little."""

    def peak(tried: Config, on: tuple[int, int, int] = sizes) -> int:
        how = dataclasses.replace(compute, remat=tried.model.remat)
        return memory(spec, tried, how, on, fused).peak

    before, said = peak(config), []
    for knob in knobs(config):
        after = peak(knob.changed)
        if after < before:
            fits = ", and it fits" if after <= usable(chip) else ""
            said.append(f"{knob.field} {knob.value}: {(before - after) / GIB:.1f} GiB less{fits}")
    together = _together(config)
    data, fsdp, tensor = sizes
    if peak(together) > usable(chip):
        wider = (data, 2 * fsdp, tensor)
        needed = f"mesh.fsdp {2 * fsdp} (twice the devices): {peak(config, wider) / GIB:.1f} GiB a device"
        said.append(f"all of these: {peak(together) / GIB:.1f} GiB, still too much; {needed}")
    return said


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


def _together(config: Config) -> Config:
    """Every knob turned once."""
    for field in [knob.field for knob in knobs(config)]:
        config = next(knob.changed for knob in knobs(config) if knob.field == field)
    return config


def _grpo(config: Config, name: str, value: object) -> Knob:
    grpo: GrpoConfig = dataclasses.replace(config.grpo, **{name: value})
    return Knob(f"grpo.{name}", str(value), dataclasses.replace(config, grpo=grpo))


def _optimizer(config: Config, name: str, value: object) -> Knob:
    optimizer: OptimizerConfig = dataclasses.replace(config.grpo.optimizer, **{name: value})
    return Knob(f"grpo.optimizer.{name}", str(value), _grpo(config, "optimizer", optimizer).changed)


def _sampler(config: Config, name: str, value: object) -> Knob:
    sampler: SamplerConfig = dataclasses.replace(config.grpo.sampler, **{name: value})
    return Knob(f"grpo.sampler.{name}", str(value), _grpo(config, "sampler", sampler).changed)
