"""Which attention runs: XLA everywhere, cuDNN on an NVIDIA GPU, splash on a TPU, behind one dispatch.

``model.attention`` names one or says ``auto``. A layer that the platform's kernel cannot do (float32 on a GPU, say)
goes to XLA under ``auto`` and is refused where the kernel was asked for by name. In a model with windows that is every
layer: its scan over layers carries the window as a number, and kernels want it when they are compiled. Decoding has one
query a row and is always XLA's (``decoding.py``).
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kardia_jax.config import ConfigError
from kardia_jax.model import cudnn, splash
from kardia_jax.model.attention import Scoring, Window, causal_attention, group_attention
from kardia_jax.model.fused import Kernel, Keys, fused_attention
from kardia_jax.model.sharding import active, fitting

Backend = Literal["xla", "cudnn", "splash"]
Wanted = Literal["auto", "xla", "cudnn", "splash"]

NATIVE: dict[str, Backend] = {"gpu": "cudnn", "tpu": "splash"}
"""What ``auto`` tries first on these platforms."""
KERNELS: dict[Backend, Kernel] = {"cudnn": cudnn.KERNEL, "splash": splash.kernel()}
"""XLA has none: it is not a kernel but what JAX makes of ``attention.py``."""
CACHED = 4 * 2**20
"""Bytes of scores; 2 to 8 MiB are equally fast with 32 MiB of cache for two cores."""


class Machine(NamedTuple):
    """Where the program runs; it may be another machine than the one that compiles it."""

    platform: str
    """As JAX calls it: cpu, gpu or tpu."""
    capability: tuple[int, ...] = ()
    """Compute capability of an NVIDIA GPU, (9, 0) for Hopper; empty elsewhere."""


class Layer(NamedTuple):
    """What a kernel needs to know of one layer."""

    dtype: str
    head_dim: int
    softcap: float | None = None
    windowed: bool = False


def machine() -> Machine:
    """This machine, by its first device."""
    platform = jax.default_backend()
    numbers = str(getattr(jax.devices()[0], "compute_capability", "")).split(".")
    # AMD's GPUs have names there, such as gfx942.
    return Machine(platform, tuple(map(int, numbers)) if all(n.isdecimal() for n in numbers) else ())


def obstacle(backend: Backend, where: Machine, layer: Layer) -> str | None:
    """What the backend would need to run this layer here; None where it can."""
    if backend == "cudnn":
        widest = 256 if where.capability >= (9, 0) else 128
        needs = {
            "an NVIDIA GPU of compute capability 8.0 or later": where.platform == "gpu" and where.capability >= (8, 0),
            "model.dtype bfloat16": layer.dtype == "bfloat16",
            f"a head width that is a multiple of 8 and at most {widest}": layer.head_dim % 8 == 0
            and layer.head_dim <= widest,
            "a model without a cap on attention scores": layer.softcap is None,
            "a model without windows": not layer.windowed,
        }
    elif backend == "splash":
        needs = {"a TPU": where.platform == "tpu", "a model without windows": not layer.windowed}
    else:
        needs = {}
    return next((need for need, met in needs.items() if not met), None)


def chosen(wanted: Wanted, where: Machine, layer: Layer) -> Backend:
    """The backend of this layer; raises ConfigError where the one that was asked for by name cannot do it."""
    backend = NATIVE.get(where.platform, "xla") if wanted == "auto" else wanted
    need = obstacle(backend, where, layer)
    if need is None:
        return backend
    if wanted == "auto":
        return "xla"
    raise ConfigError("model.attention", f"{need} for {wanted}", f"{layer} on {where}", "Use auto or xla.")


def prompt_attention(
    wanted: Wanted,
    q: Float[Array, "B H S E"],
    k: Float[Array, "B K S E"],
    v: Float[Array, "B K S E"],
    scoring: Scoring,
    window: Window,
    where: Machine | None = None,
) -> Float[Array, "B H S E"]:
    """``causal_attention`` by the backend of this layer, for this machine or another (``where``)."""
    where = where or machine()
    kernel = _kernel(wanted, where, q, scoring, window)
    if kernel is None:
        return causal_attention(q, k, v, scoring, window, room(where)).out
    return _fused(kernel, scoring, q, (Keys(k, v, None),))


def completion_attention(
    wanted: Wanted,
    q: Float[Array, "P G H T E"],
    k: Float[Array, "P G K T E"],
    v: Float[Array, "P G K T E"],
    prompt_k: Float[Array, "P K S E"],
    prompt_v: Float[Array, "P K S E"],
    prompt_lengths: Int[Array, "P G"],
    scoring: Scoring,
    window: Window,
    where: Machine | None = None,
) -> Float[Array, "P G H T E"]:
    """``group_attention`` of whole completions by the backend of this layer, for this machine or another (``where``).

    Kernels have one length a row, and the completions of a group may continue different parts of their prompt: so each
    is a row, and reads a copy of the prompt's keys that lives for this layer only.
    """
    where = where or machine()
    kernel = _kernel(wanted, where, q, scoring, window)
    if kernel is None:
        return group_attention(q, k, v, prompt_k, prompt_v, prompt_lengths, scoring, window, room(where))
    group = q.shape[1]
    rows = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    shared = Keys(_repeated(prompt_k, group), _repeated(prompt_v, group), prompt_lengths.reshape(-1))
    return _fused(kernel, scoring, rows[0], (shared, Keys(rows[1], rows[2], None))).reshape(q.shape)


def room(where: Machine) -> int | None:
    """Bytes of scores that XLA makes at a time: all of them, but on a CPU what its caches hold.

    On a mesh of CPUs it is all of them, too: going through the heads one after the other, devices would wait in turn.
    """
    return CACHED if where.platform == "cpu" and active() is None else None


def _fused(kernel: Kernel, scoring: Scoring, q: Float[Array, "B H T E"], sets: tuple[Keys, ...]) -> Array:
    """``fused_attention``; on a mesh each device runs the kernel on its own rows and heads: XLA cannot cut a kernel."""
    run, mesh = functools.partial(fused_attention, kernel, scoring), active()
    if mesh is None:
        return run(q, sets)

    def where(axes: str, x: Array | None) -> PartitionSpec | None:
        return None if x is None else fitting(axes, "moving", x.shape, mesh)

    queries = where("PH..", q)
    keys = tuple((where("PK..", one.k), where("PK..", one.v), where("P", one.lengths)) for one in sets)
    arrays = tuple(tuple(one) for one in sets)
    return jax.shard_map(
        lambda q, sets: run(q, tuple(Keys(*one) for one in sets)),
        in_specs=(queries, keys),
        out_specs=queries,
        check_vma=False,
    )(q, arrays)


def _repeated(x: Float[Array, "P K S E"], group: int) -> Float[Array, "P*G K S E"]:
    """Through float32, so that the gradient of the prompt is summed over its completions in float32."""
    return jnp.repeat(x.astype(jnp.float32), group, axis=0).astype(x.dtype)


def _kernel(wanted: Wanted, where: Machine, q: Array, scoring: Scoring, window: Window) -> Kernel | None:
    """None is XLA."""
    layer = Layer(q.dtype.name, q.shape[-1], scoring.softcap, window is not None)
    return KERNELS.get(chosen(wanted, where, layer))
