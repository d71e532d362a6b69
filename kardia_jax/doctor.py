"""``kardia doctor``: what this machine and this installation can do, one line each."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator

import jax

from kardia_jax.dialogue.mini import tokenizer_dir
from kardia_jax.model.backends import Layer, chosen, machine
from kardia_jax.model.shapes import SHAPES
from kardia_jax.policies import load_tokenizer

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "grain", "safetensors")
EXTRAS = {
    "track": ("tensorboardX", "wandb", "trackio", "mlflow"),
    "serve": ("fastapi", "uvicorn"),
    "plan": ("libtpu",),
    "test": ("torch",),
}


def diagnose() -> None:
    """Prints the report."""
    for name, text in findings():
        print(f"{name:<12} {text}")


def findings() -> Iterator[tuple[str, str]]:
    """(what, finding) in the order of the report."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "libraries", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    devices = jax.devices()
    yield "devices", f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()}), {os.cpu_count()} cores"
    memory = devices[0].memory_stats() or {}
    if "bytes_limit" in memory:
        yield "memory", f"{memory['bytes_limit'] / 2**30:.1f} GiB a device"
    yield "disk", f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here"
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    yield "compute", dtype
    attention = chosen("auto", machine(), Layer(dtype, head_dim=64))
    yield "attention", attention if attention == "xla" else f"{attention} where it can do the model, else xla"
    for extra, modules in EXTRAS.items():
        found = {name: importlib.util.find_spec(name) is not None for name in modules}
        yield f"[{extra}]", ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in found.items())
    yield "tokenizer", f"mini: {len(load_tokenizer('mini'))} ids in {tokenizer_dir().name}/"
    for name, spec in SHAPES.items():
        yield "shape", f"{name}: {spec.parameter_count / 1e6:,.1f} M parameters, {spec.layers} x {spec.width}"
