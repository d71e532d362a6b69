"""The time that a step cannot go below on a chip: each phase against three ceilings.

    seconds = max(FLOPs / (devices x peak), bytes / bandwidth, bytes sent / interconnect), each over its efficiency

FLOPs and bytes are those of ``kardia_jax/bench/work.py``, with what remat computes again; bytes that are sent are read
from the compiled programs. Phases do not overlap each other: sampling, then log-probs of the reference, then updates.
Not in it: the judge, the host's own work, latency of small collectives and of kernel launches (decoding has many of
both), moments that travel to the host.
"""

from collections.abc import Mapping
from typing import NamedTuple

from kardia_jax.bench import work
from kardia_jax.bench.work import Lengths, Work
from kardia_jax.chips import Chip
from kardia_jax.config import Config
from kardia_jax.model.spec import ModelSpec

EFFICIENCY = {"flops": 0.4, "memory": 0.7, "interconnect": 0.7}
"""Shares of the ceilings that programs of this kind are taken to reach: assumptions, not measurements."""
NETWORK = 50e9
"""Bytes per second and chip between nodes (400 Gbit/s): an assumption about the cluster."""


class Phase(NamedTuple):
    """What one device does in one phase of a step."""

    name: str
    flops: float
    bytes: float
    sent: float


class Limits(NamedTuple):
    """Seconds of a phase by each ceiling."""

    flops: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """Of the ceiling that is lowest."""
        return max(self)

    @property
    def bound(self) -> str:
        """Its name."""
        return max(self._fields, key=lambda name: getattr(self, name))


def phases(
    spec: ModelSpec, config: Config, element: int, sizes: tuple[int, int, int], sent: Mapping[str, float]
) -> list[Phase]:
    """The phases of one GRPO step at full lengths; ``sent`` has the bytes that a device sends, by phase."""
    grpo, devices = config.grpo, sizes[0] * sizes[1] * sizes[2]
    lengths = Lengths(grpo.prompts, grpo.group, config.data.max_prompt_tokens, grpo.sampler.max_new_tokens)
    updates = grpo.minibatches * grpo.passes
    scored = (grpo.loss.beta > 0) + (updates > 1 or grpo.loss.top_entropy < 1)
    part = lengths._replace(prompts=grpo.prompts // grpo.minibatches)
    one = work.update(spec, part, grpo.micro_batches)
    again = work.score(spec, part).shared_flops if config.model.remat == "block" else 0.0
    update = one._replace(shared_flops=one.shared_flops + again).times(updates)
    weights = (work.block_parameters(spec) + work.head_parameters(spec)) * element
    decode = work.decode(spec, lengths, element)
    return [
        _phase("prefill", work.prefill(spec, lengths, element), weights, 1, sizes, sent),
        _phase("decode", decode, weights, lengths.new_tokens - 1, sizes, sent),
        _phase("score", work.score(spec, lengths).times(scored), weights, scored, sizes, sent),
        Phase("update", update.shared_flops / devices, update.bytes / devices, sent.get("update", 0.0)),
    ]


def _phase(
    name: str, done: Work, weights: float, passes: int, sizes: tuple[int, int, int], sent: Mapping[str, float]
) -> Phase:
    """A forward phase: what is gathered over fsdp is read whole by every device, the rest is shared out."""
    data, fsdp, tensor = sizes
    shared = max(done.bytes - passes * weights, 0.0) / (data * fsdp * tensor)
    return Phase(name, done.shared_flops / (data * fsdp * tensor), passes * weights / tensor + shared, sent.get(name, 0.0))


def limits(phase: Phase, chip: Chip, devices: int) -> Limits:
    """Seconds of this phase on this chip."""
    link = chip.interconnect if devices <= chip.reach else min(chip.interconnect, NETWORK)
    return Limits(
        phase.flops / (chip.flops * EFFICIENCY["flops"]),
        phase.bytes / (chip.bandwidth * EFFICIENCY["memory"]),
        phase.sent / (link * EFFICIENCY["interconnect"]),
    )
