"""A plan in the process whose devices are simulated: memory, programs and estimates in one object of plain numbers."""

import dataclasses
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from kardia_jax import chips
from kardia_jax.chips import Chip
from kardia_jax.config import Config
from kardia_jax.config.mesh import AXES, Sizes
from kardia_jax.model.backends import Layer, Machine, chosen
from kardia_jax.model.policy import Compute
from kardia_jax.model.sharding import check_mesh, check_rows
from kardia_jax.model.spec import ModelSpec
from kardia_jax.plan.abstract import arguments, spec_of
from kardia_jax.plan.advice import advice, usable
from kardia_jax.plan.compiled import Program, programs
from kardia_jax.plan.estimate import limits, phases
from kardia_jax.plan.hlo import sent_by_kind
from kardia_jax.plan.memory import Memory, abstract_mesh, bytes_on_device, memory, shape_of
from kardia_jax.policies import check_positions
from kardia_jax.programs import compute_for


def make_plan(config: Config, devices: int, chip: str | None, topology: str | None) -> dict[str, Any]:
    """The plan; this process must have the devices. Raises ConfigError or SpecError for what does not fit together."""
    sizes = config.mesh.sizes(devices)
    spec, mesh = spec_of(config.model), mesh_of(sizes, topology)
    check_mesh(spec, mesh)
    grpo = config.grpo
    check_rows(grpo.prompts // grpo.minibatches, "grpo.prompts / grpo.minibatches", mesh, grpo.micro_batches)
    check_positions(spec, config.data.max_prompt_tokens, grpo.sampler.max_new_tokens, "grpo.sampler")
    compute = compute_of(config, mesh, topology)
    shape = shape_of(config, sizes[0] * sizes[1])
    given = arguments(spec, config, compute)
    made, weights = list(programs(spec, config, compute, given, shape)), given.weights
    held = [one for one in chips.CHIPS if chip in (None, one.name)]
    if topology is not None:
        held = [chips.check_topology(topology)]
    return {
        "model": {"source": config.model.source, "parameters": spec.parameter_count},
        "mesh": dict(zip(AXES, sizes, strict=True)),
        "devices": devices,
        "compiled_for": topology or "cpu",
        "compute_type": compute.dtype,
        "programs": [of_program(program) for program in made],
        "collective_bytes": collective_bytes(made),
        "parameter_gathers": parameter_gathers(made, bytes_on_device(weights, abstract_mesh(sizes), "used")),
        "chips": [on_chip(spec, config, compute, sizes, made, one, topology is not None) for one in held],
    }


def mesh_of(sizes: Sizes, topology: str | None) -> Mesh | None:
    """The mesh over simulated devices, or over the chips of a slice; None for one device."""
    if topology is None and max(sizes) == 1:
        return None
    devices = None if topology is None else slice_devices(topology)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def slice_devices(topology: str) -> list[Any]:
    """The chips of a slice that is not there."""
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compute_of(config: Config, mesh: Mesh | None, topology: str | None) -> Compute:
    """As on the accelerator; without libtpu the programs are a CPU's, whose attention is XLA's."""
    accelerated = compute_for(config.model, mesh, Machine("tpu"))
    return accelerated if topology else compute_on_cpu(accelerated)


def compute_on_cpu(accelerated: Compute) -> Compute:
    """The same with the attention that a CPU can compile."""
    return dataclasses.replace(accelerated, attention="xla", machine=Machine("cpu"))


def of_program(program: Program) -> dict[str, Any]:
    """One program as plain numbers."""
    return {
        "name": program.name,
        "phase": program.phase,
        "calls": program.times,
        "compile_seconds": round(program.seconds, 2),
        "argument_bytes": program.arguments,
        "result_bytes": program.results,
        "temporary_bytes": program.temporaries,
        "sent_bytes": {kind: round(sent) for kind, sent in sent_by_kind(program.collectives).items()},
        "kernels": program.kernels,
        "refused": program.refused,
    }


def collective_bytes(made: list[Program]) -> dict[str, int]:
    """What one device sends in a step, by kind of collective."""
    totals: dict[str, float] = defaultdict(float)
    for program in made:
        for kind, sent in sent_by_kind(program.collectives).items():
            totals[kind] += program.times * sent
    return {kind: round(sent) for kind, sent in sorted(totals.items(), key=lambda item: -item[1])}


def parameter_gathers(made: list[Program], copy: int) -> dict[str, dict[str, float]]:
    """Programs of the sampler that gather parameters, by name: bytes on a device, and how often in a step.

    They do where a turn's all-gathers bring together half of the sampler's copy of the weights (``copy``, bytes on a
    device) or more.
    """
    sampling = [program for program in made if program.phase in ("prefill", "decode")]
    return {
        one.name: {"bytes": round(one.gathered), "times": one.times * one.turns}
        for one in sampling
        if one.gathered >= copy / 2
    }


def on_chip(
    spec: ModelSpec, config: Config, compute: Compute, sizes: Sizes, made: list[Program], chip: Chip, exact: bool
) -> dict[str, Any]:
    """Whether the run fits on this chip, and an estimate of a step's time.

    With ``exact`` the programs were compiled for it, and the compiler's bytes decide; otherwise arithmetic does.
    """
    fused = attention_of(spec, config, compute, chip) != "xla"
    held = memory(spec, config, compute, sizes, fused)
    peaks = {program.name: peak_of(program, held) for program in made}
    compiled = max(peaks.values())
    refused = any(program.refused for program in made)
    fits = (not refused and compiled <= usable(chip)) if exact else held.peak <= usable(chip)
    sent: dict[str, float] = defaultdict(float)
    for program in made:
        sent[program.phase] += program.sent
    devices = sizes[0] * sizes[1] * sizes[2]
    element = jnp.dtype(compute.dtype).itemsize
    done = phases(spec, config, held, element, sizes, sent)
    times = {phase.name: limits(phase, chip, devices) for phase in done}
    # Advice is by arithmetic: what the compiler needs beyond that is no room.
    room = usable(chip) - (max(0, compiled - held.peak) if exact else 0)
    return {
        "chip": chip.name,
        "attention": attention_of(spec, config, compute, chip),
        "fits": fits,
        "decided_by": "compiler" if exact else "arithmetic",
        "memory_bytes": chip.memory,
        "usable_bytes": usable(chip),
        "bytes": held._asdict(),
        "peak_bytes": {"sample": held.sample_peak, "update": held.update_peak, "compiled": compiled},
        "program_peak_bytes": peaks,
        "flops": {phase.name: phase.flops for phase in done},
        "seconds": {name: time.seconds for name, time in times.items()},
        "bound": {name: time.bound for name, time in times.items()},
        "step_seconds": sum(time.seconds for time in times.values()),
        "advice": [] if fits else advice(spec, config, compute, sizes, room, fused),
    }


def attention_of(spec: ModelSpec, config: Config, compute: Compute, chip: Chip) -> str:
    """The backend that runs prompts and completions on this chip."""
    layer = Layer(compute.dtype, spec.head_dim, spec.attention_softcap, any(spec.slides))
    return chosen(config.model.attention, Machine(chip.platform, chip.capability), layer)


def peak_of(program: Program, held: Memory) -> int:
    """Bytes of a device while a program runs: what is there all the time, what belongs to its phase, and XLA's count of
    results and temporaries."""
    sampling = {"weights": 0, "admit": held.sampler_weights + held.kv, "decode": held.sampler_weights + held.kv}
    gradients = held.gradients // 2 if program.name in ("gradient", "optimizer") else 0
    there = held.resident + sampling.get(program.name, gradients)
    return there + program.results + program.temporaries
