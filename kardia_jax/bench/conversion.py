"""Seconds per GB and extra host memory of conversion, on a synthetic checkpoint of a built-in shape.

    kardia bench import --model qwen2.5-3b

Random bfloat16 values are written as a checkpoint (6.2 GB for qwen2.5-3b; twice that is needed on disk); then each way
of the table runs in a process of its own, and the files are removed. Extra memory is the peak of resident memory less
the parameters, where the way holds parameters: interpreter, libraries and every buffer count.
"""

import functools
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kardia_jax.bench.layout import machine, table
from kardia_jax.config import ImportBenchConfig
from kardia_jax.hf.convert import convert
from kardia_jax.hf.read import load_arrays, load_params
from kardia_jax.hf.tables import entries, hf_shape, sizes
from kardia_jax.hf.write import published, tensors, write_json, write_weights
from kardia_jax.model.shapes import named_shape
from kardia_jax.model.spec import ModelSpec
from kardia_jax.observe.memory import peak_rss

# bfloat16: sign and mantissa are random, the exponent is 120: values from 2^-7 to 2^-6, as weights are.
RANDOM_BITS, EXPONENT = 0x807F, 120 << 7


def random_tensors(spec: ModelSpec, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Finite bfloat16 tensors of this model."""
    numbers, lengths, table = np.random.default_rng(0), sizes(spec), entries(spec)
    for name in names:
        shape = hf_shape(table[name].rule, lengths)
        bits = np.frombuffer(numbers.bytes(2 * math.prod(shape)), np.uint16)
        yield name, ((bits & RANDOM_BITS) | EXPONENT).view(jnp.bfloat16).reshape(shape)


def write_random(spec: ModelSpec, source: pathlib.Path) -> None:
    """A checkpoint of finite random values, in shards of 5 GB."""
    with published(source, spec, "bfloat16", overwrite=True) as partial:
        write_weights(partial, functools.partial(random_tensors, spec), spec, "bfloat16")
        write_json(partial / "config.json", spec.to_hf() | {"dtype": "bfloat16"})


def import_directory(spec: ModelSpec, source: pathlib.Path, target: pathlib.Path) -> tuple[float, int]:
    """``kardia import``: file to file."""
    start = time.perf_counter()
    convert(source, target, "bfloat16")
    return time.perf_counter() - start, 0


def load_on_host(spec: ModelSpec, source: pathlib.Path, target: pathlib.Path) -> tuple[float, int]:
    """Into NumPy arrays."""
    start = time.perf_counter()
    params = load_params(source, spec, "bfloat16")
    return time.perf_counter() - start, sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def load_on_device(spec: ModelSpec, source: pathlib.Path, target: pathlib.Path) -> tuple[float, int]:
    """Into JAX arrays of the default device; on CPU they are host memory too."""
    start = time.perf_counter()
    params = load_arrays(source, spec, dtype="bfloat16")
    return time.perf_counter() - start, sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def export_from_host(spec: ModelSpec, source: pathlib.Path, target: pathlib.Path) -> tuple[float, int]:
    """NumPy arrays to files; the arrays are filled beforehand, without a checkpoint."""
    like = load_params(source, spec, "bfloat16")
    start = time.perf_counter()
    with published(target, spec, "bfloat16", overwrite=True) as partial:
        write_weights(partial, functools.partial(tensors, like, spec), spec, "bfloat16")
    return time.perf_counter() - start, sum(leaf.nbytes for leaf in jax.tree.leaves(like))


WAYS = {
    "import": import_directory,
    "load_host": load_on_host,
    "load_device": load_on_device,
    "export": export_from_host,
}


def run_import(config: ImportBenchConfig) -> dict[str, Any]:
    """All ways, one after the other; raises SpecError for a shape that is not there."""
    spec = named_shape(config.model)
    folder = config.folder
    try:
        write_random(spec, folder / "source")
        ways = {}
        for way in WAYS:
            ways[way] = _in_a_process(way, config)
            shutil.rmtree(folder / "target", ignore_errors=True)
    finally:
        for name in ("source", "target"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return {
        "benchmark": "import",
        "model": config.model,
        "parameters": spec.parameter_count,
        "gb": _gigabytes(spec),
        "machine": machine(),
        "step_seconds": ways["import"]["seconds"],
        "seconds": {way: numbers["seconds"] for way, numbers in ways.items()},
        "peak_rss_gb": max(numbers["peak_rss_gb"] for numbers in ways.values()),
        "ways": ways,
    }


def text(found: Mapping[str, Any]) -> str:
    """The same for people."""
    rows = [
        [way, *(f"{numbers[name]:.2f}" for name in ("seconds", "seconds_per_gb", "extra_gb", "peak_rss_gb"))]
        for way, numbers in found["ways"].items()
    ]
    header = ["way", "seconds", "seconds per GB", "extra GB", "peak RSS GB"]
    return f"{found['model']}, bfloat16, {found['gb']:.2f} GB\n\n{table(header, rows)}"


def _gigabytes(spec: ModelSpec) -> float:
    return 2 * spec.parameter_count / 1e9


def _in_a_process(way: str, config: ImportBenchConfig) -> dict[str, float]:
    """Peaks of memory belong to a process; conversion is work of the host, whatever devices there are."""
    command = [sys.executable, "-m", __name__, way, config.model, str(config.folder)]
    done = subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def measure(way: str, shape: str, folder: pathlib.Path) -> dict[str, float]:
    """One way, in this process."""
    spec = named_shape(shape)
    seconds, held = WAYS[way](spec, folder / "source", folder / "target")
    peak = peak_rss()
    return {
        "seconds": seconds,
        "seconds_per_gb": seconds / _gigabytes(spec),
        "extra_gb": (peak - held) / 1e9,
        "peak_rss_gb": peak / 1e9,
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))))
