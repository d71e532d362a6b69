"""From timings to the report: one JSON object, and the same as tables.

    {"benchmark": "step", "model": "qwen2.5-0.5b", ..., "step_seconds": 9.1, "seconds": {"rollout": 5.2, ...},
     "compile_seconds": {...}, "peak_rss_gb": 6.3, "mfu": 0.31, "mfu_repeated": 0.62, "phases": {"rollout": {...}}, ...}

Seconds are medians over the measured repetitions. ``mfu`` is the FLOPs that our programs compute, per second, over the
measured matmul ceiling; ``mfu_repeated`` the same for the FLOPs of a system that runs the prompt for every completion:
the MFU that such a system would need to be as fast.
"""

import dataclasses
from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

from kardia_jax.bench import work
from kardia_jax.bench.ceilings import Ceilings
from kardia_jax.bench.layout import machine, table
from kardia_jax.bench.measure import Records
from kardia_jax.bench.work import Work
from kardia_jax.bench.workload import compute_of, lengths_of
from kardia_jax.config import BenchConfig
from kardia_jax.model.spec import ModelSpec

Kind = Literal["step", "sample", "update"]


def phase_work(kind: Kind, config: BenchConfig, spec: ModelSpec) -> dict[str, Work]:
    """What each phase of this benchmark has to do."""
    lengths, element = lengths_of(config), {"float32": 4, "bfloat16": 2}[compute_of(config).dtype]
    prefill, decode = work.prefill(spec, lengths, element), work.decode(spec, lengths, element)
    update = {"update": work.update(spec, lengths, config.micro_batches)}
    reference = {"reference": work.score(spec, lengths)} if config.beta > 0 else {}
    return {
        "step": {"rollout": work.total([prefill, decode]), **reference, **update},
        "sample": {"prefill": prefill, "decode": decode},
        "update": update,
    }[kind]


def phase_seconds(records: Records) -> dict[str, list[float]]:
    """Measured repetitions of each phase; decoding is what generating takes longer than its first token."""
    seconds = {name: record.seconds[1:] for name, record in records.items()}
    if "generate" in seconds:
        pairs = zip(seconds.pop("generate"), seconds["prefill"], strict=True)
        seconds["decode"] = [whole - first for whole, first in pairs]
    return seconds


def results(
    kind: Kind, config: BenchConfig, spec: ModelSpec, records: Records, ceilings: Ceilings, device_peak: int | None
) -> dict[str, Any]:
    """Everything that is reported, ready for JSON."""
    seconds, lengths = phase_seconds(records), lengths_of(config)
    steps = [sum(times) for times in zip(*seconds.values(), strict=True)]
    todo, step_seconds = phase_work(kind, config, spec), median(steps)
    total = work.total(todo.values())
    sampled = lengths.rows * lengths.new_tokens
    named = {name: value for name, value in dataclasses.asdict(config).items() if name != "json"}
    return {
        "benchmark": kind,
        **named,
        "dtype": compute_of(config).dtype,
        "parameters": spec.parameter_count,
        "machine": machine(),
        "step_seconds": step_seconds,
        "step_seconds_all": steps,
        "seconds": {name: median(times) for name, times in seconds.items()},
        "compile_seconds": {name: r.seconds[0] - median(r.seconds[1:]) for name, r in records.items()},
        "completion_tokens_per_second": sampled / step_seconds,
        "tokens_per_second": (lengths.prompts * lengths.prompt_len + sampled) / step_seconds,
        "peak_rss_gb": max(peak for record in records.values() for peak in record.peaks) / 1e9,
        "peak_rss_gb_by_phase": {name: max(record.peaks[1:]) / 1e9 for name, record in records.items()},
        "peak_device_gb": None if device_peak is None else device_peak / 1e9,
        "mfu": total.shared_flops / step_seconds / ceilings.flops_per_second,
        "mfu_repeated": total.repeated_flops / step_seconds / ceilings.flops_per_second,
        "ceilings": ceilings._asdict(),
        "phases": {name: _rates(todo[name], median(times), ceilings) for name, times in seconds.items()},
    }


def _rates(todo: Work, seconds: float, ceilings: Ceilings) -> dict[str, float]:
    """A phase's work per second, and as shares of the ceilings."""
    return {
        "flops": todo.shared_flops,
        "repeated_flops": todo.repeated_flops,
        "bytes": todo.bytes,
        "flops_per_second": todo.shared_flops / seconds,
        "bytes_per_second": todo.bytes / seconds,
        "mfu": todo.shared_flops / seconds / ceilings.flops_per_second,
        "mfu_repeated": todo.repeated_flops / seconds / ceilings.flops_per_second,
        "bandwidth_share": todo.bytes / seconds / ceilings.bytes_per_second,
    }


def text(found: Mapping[str, Any]) -> str:
    """The same for people."""
    on, ceilings, phases = found["machine"], found["ceilings"], found["phases"]
    rows = [
        [
            name,
            f"{found['seconds'][name]:.3f}",
            f"{rates['flops'] / 1e12:.3f}",
            f"{rates['flops_per_second'] / 1e12:.3f}",
            f"{rates['mfu']:.1%}",
            f"{rates['mfu_repeated']:.1%}",
            f"{rates['bytes'] / 1e9:.2f}",
            f"{rates['bytes_per_second'] / 1e9:.1f}",
            f"{rates['bandwidth_share']:.1%}",
        ]
        for name, rates in phases.items()
    ]
    header = ["phase", "seconds", "TFLOP", "TFLOP/s", "MFU", "MFU repeated", "GB", "GB/s", "of copy"]
    device = "not counted here" if found["peak_device_gb"] is None else f"{found['peak_device_gb']:.2f} GB"
    compiling = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found["compile_seconds"].items())
    peaks = ", ".join(f"{name} {peak:.2f}" for name, peak in found["peak_rss_gb_by_phase"].items())
    return "\n".join(
        [
            f"{found['model']} ({found['parameters'] / 1e6:,.1f} M parameters), {found['dtype']}: {found['prompts']} "
            f"prompts x {found['group']}, {found['prompt_len']} + {found['new_tokens']} tokens",
            f"{on['device']} ({on['backend']}), {on['cores']} cores, jax {on['jax']}: "
            f"copies {ceilings['bytes_per_second'] / 1e9:.1f} GB/s, "
            f"multiplies {ceilings['flops_per_second'] / 1e12:.3f} TFLOP/s",
            "",
            table(header, rows),
            "",
            f"{found['benchmark']}: {found['step_seconds']:.3f} s (median of {found['steps']}), "
            f"{found['completion_tokens_per_second']:,.1f} completion tokens/s, "
            f"{found['tokens_per_second']:,.1f} tokens/s, "
            f"MFU {found['mfu']:.1%}, as repeated prompts {found['mfu_repeated']:.1%}",
            f"compiled in: {compiling}",
            f"peak memory: host {found['peak_rss_gb']:.2f} GB ({peaks}), device {device}",
        ]
    )
