"""An estimate of a step's time on a chip: each phase against three ceilings.

    seconds = max(FLOPs / (devices x peak), bytes / bandwidth, bytes sent / interconnect), each over its efficiency

FLOPs and bytes are those of ``kardia_jax/bench/work.py``, with what remat computes again; bytes that are sent are read
from the compiled programs. Phases do not overlap each other: sampling, then log-probs of the reference, then updates.
Not in it: the judge, the host's own work, latency of small collectives and of kernel launches (decoding has many of
both), moments that travel to the host.
"""

from collections.abc import Mapping
from typing import NamedTuple

from kardia_jax.bench import work
from kardia_jax.bench.work import Lengths
from kardia_jax.chips import Chip
from kardia_jax.config import Config
from kardia_jax.config.mesh import Sizes
from kardia_jax.model.spec import ModelSpec
from kardia_jax.plan.memory import Memory

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
    spec: ModelSpec, config: Config, held: Memory, element: int, sizes: Sizes, sent: Mapping[str, float]
) -> list[Phase]:
    """The phases of one GRPO step at full lengths; ``sent`` has the bytes that a device sends, by phase.

    Every device reads all weights that it gathers, in every pass: those of the model over ``tensor``.
    """
    grpo, devices = config.grpo, sizes[0] * sizes[1] * sizes[2]
    lengths = Lengths(grpo.prompts, grpo.group, config.data.max_prompt_tokens, grpo.sampler.max_new_tokens)
    updates = grpo.minibatches * grpo.passes
    scored = (grpo.loss.beta > 0) + (updates > 1 or grpo.loss.top_entropy < 1)
    whole = (work.block_parameters(spec) + work.head_parameters(spec)) * element
    weights, again = whole / sizes[2], config.model.remat == "block"
    score, steps = work.score(spec, lengths), lengths.new_tokens - 1
    prefill, decode = work.prefill(spec, lengths, element), work.decode(spec, lengths, element)
    # The sum of the gradients is read and written by each micro-batch; AdamW reads it, and reads and writes the rest.
    kept = (2 * grpo.micro_batches + 7) * held.parameters
    passes = (2 + again) * grpo.micro_batches
    flops = {
        "prefill": prefill.shared_flops,
        "decode": decode.shared_flops,
        "score": scored * score.shared_flops,
        "update": (3 + again) * grpo.passes * score.shared_flops,
    }
    moved = {
        "prefill": weights + (prefill.bytes - whole) / devices,
        "decode": steps * weights + (decode.bytes - steps * whole) / devices,
        "score": scored * weights,
        "update": updates * (passes * weights + kept),
    }
    return [Phase(name, flops[name] / devices, moved[name], sent.get(name, 0.0)) for name in flops]


def limits(phase: Phase, chip: Chip, devices: int) -> Limits:
    """Seconds of this phase on this chip."""
    link = chip.interconnect if devices <= chip.reach else min(chip.interconnect, NETWORK)
    return Limits(
        phase.flops / (chip.flops * EFFICIENCY["flops"]),
        phase.bytes / (chip.bandwidth * EFFICIENCY["memory"]),
        phase.sent / (link * EFFICIENCY["interconnect"]),
    )
