"""One benchmark from its config to its results: the model, its phases, and then the ceilings of the same device.

The ceilings come last because their arrays would count in the peak of the device's memory, which cannot be reset.
"""

from typing import Any

from kardia_jax.bench.ceilings import measure_ceilings
from kardia_jax.bench.measure import measure_sample, measure_step, measure_update
from kardia_jax.bench.report import Kind, results
from kardia_jax.bench.workload import compute_of, load_model
from kardia_jax.config import BenchConfig
from kardia_jax.observe.memory import peak_device_bytes

MEASURES = {"step": measure_step, "sample": measure_sample, "update": measure_update}


def run_bench(kind: Kind, config: BenchConfig) -> dict[str, Any]:
    """Measures and gives what ``report.results`` describes; raises ConfigError, SpecError or HfError for a model that
    is not there or not supported."""
    dtype = compute_of(config).dtype
    # The sampler alone needs no masters, and large models fit in half the memory without them.
    model = load_model(config, dtype if kind == "sample" else "float32")
    records = MEASURES[kind](config, model)
    device_peak = peak_device_bytes()
    return results(kind, config, model.spec, records, measure_ceilings(dtype), device_peak)
