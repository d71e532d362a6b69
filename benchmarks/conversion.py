"""Seconds per GB and extra host memory of conversion, on a synthetic checkpoint of a built-in shape.

    python benchmarks/conversion.py --shape qwen2.5-3b --folder /tmp/conversion

Random bfloat16 values are written as a checkpoint (6.2 GB for qwen2.5-3b; twice that is needed on disk); then each way
of the table runs in a process of its own, and the files are removed. Extra memory is the peak of resident memory less
the parameters, where the way holds parameters: interpreter, libraries and every buffer count. One JSON line per way.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from kardia_jax.hf.convert import convert
from kardia_jax.hf.read import load_arrays, load_params
from kardia_jax.hf.tables import entries, hf_shape, sizes
from kardia_jax.hf.write import published, tensors, write_json, write_weights
from kardia_jax.model.shapes import named_shape
from kardia_jax.model.spec import ModelSpec

# bfloat16: sign and mantissa are random, the exponent is 120: values from 2^-7 to 2^-6, as weights are.
RANDOM_BITS, EXPONENT = 0x807F, 120 << 7


def random_tensors(spec: ModelSpec, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Finite bfloat16 tensors of this model."""
    numbers, lengths, table = np.random.default_rng(0), sizes(spec), entries(spec)
    for name in names:
        shape = hf_shape(table[name].rule, lengths)
        bits = np.frombuffer(numbers.bytes(2 * math.prod(shape)), np.uint16)
        yield name, ((bits & RANDOM_BITS) | EXPONENT).view(jnp.bfloat16).reshape(shape)


def make(spec: ModelSpec, source: pathlib.Path) -> None:
    """The checkpoint, in shards of 5 GB."""
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
    "import, files to files": import_directory,
    "load into host arrays": load_on_host,
    "load into JAX arrays": load_on_device,
    "export from host arrays": export_from_host,
}


def peak_bytes() -> int:
    """Most resident memory that this process has had. Source: proc(5), VmHWM."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(way: str, shape: str, folder: pathlib.Path) -> None:
    """Runs one way and prints its line."""
    spec = named_shape(shape)
    seconds, held = WAYS[way](spec, folder / "source", folder / "target")
    size = 2 * spec.parameter_count
    line = {"way": way, "gb": size / 1e9, "seconds": seconds, "seconds_per_gb": seconds / (size / 1e9)}
    print(json.dumps(line | {"extra_gb": (peak_bytes() - held) / 1e9}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-3b")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/kardia-conversion"))
    parser.add_argument("--way", choices=WAYS, help="only this one, on files that stand there already")
    args = parser.parse_args()
    if args.way:
        measure(args.way, args.shape, args.folder)
        return
    try:
        make(named_shape(args.shape), args.folder / "source")
        for way in WAYS:
            command = [sys.executable, __file__, "--shape", args.shape, "--folder", str(args.folder), "--way", way]
            subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
            shutil.rmtree(args.folder / "target", ignore_errors=True)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
