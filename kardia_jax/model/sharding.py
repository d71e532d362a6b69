"""Where every axis lies on the mesh: one table, and what follows from it.

The mesh has three axes (``kardia_jax/config/mesh.py``): ``data`` and ``fsdp`` share out the rows of a batch, ``fsdp``
also the parameters, ``tensor`` every layer. ``TABLE`` says which letter of the alphabet (``kardia_jax/types.py``) lies
on which of them; a letter that is not in it lies on none. To change the strategy, change the table. With 2 x 2 x 2
devices

    a kernel   q [D, H, E]      is stored as [D/2, H/2, E], and used as [D, H/2, E]
    a batch      [P, G, T, D]   is          [P/4, G, T, D]
    logits       [V, N]         are         [V/2, N/4]

A group is never split: G is on no axis, so the mean and spread of its rewards do not know of the mesh.

Axes are Auto (GSPMD): model code stays what it is on one device, and the constraints that are set here decide. Explicit
axes would want a sharding at every gather, reshape and ambiguous product of code that mostly runs without a mesh. Where
the compiler would choose badly, in the LM head and in the draw over a sharded vocabulary, the code is ``jax.shard_map``
and names its collectives.

Functions here read the mesh from JAX's context, which ``programs.py`` sets while it traces, and do nothing without one.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from kardia_jax.config import MeshConfig
from kardia_jax.config.errors import require
from kardia_jax.config.mesh import AXES, Sizes
from kardia_jax.model.spec import ModelSpec

Tree = TypeVar("Tree")
Column = Literal["stored", "used", "moving"]


class Places(NamedTuple):
    """Axes of the mesh over which one axis of an array is cut, outermost first."""

    stored: tuple[str, ...] = ()
    """In parameters, their gradients and moments, between uses."""
    used: tuple[str, ...] = ()
    """In a parameter that a layer reads, which is gathered for it, and in the sampler's copy, gathered once a call."""
    moving: tuple[str, ...] = ()
    """In activations, keys and values, logits, rollouts and batches."""


TABLE: dict[str, Places] = {
    #            stored        used          moving
    "P": Places((), (), ("data", "fsdp")),
    "N": Places((), (), ("data", "fsdp")),
    "D": Places(("fsdp",), (), ()),
    "H": Places(("tensor",), ("tensor",), ("tensor",)),
    "K": Places(("tensor",), ("tensor",), ("tensor",)),
    "F": Places(("tensor",), ("tensor",), ("tensor",)),
    "V": Places(("tensor",), ("tensor",), ("tensor",)),
}

NOWHERE = Places()

LINEARS: dict[str, tuple[str, str]] = {
    "q": ("D", "HE"),
    "k": ("D", "KE"),
    "v": ("D", "KE"),
    "o": ("HE", "D"),
    "gate": ("D", "F"),
    "up": ("D", "F"),
    "down": ("F", "D"),
}
"""Input and output axes of a block's linear layers."""

ROOTS = ("blocks", "layers", "embed", "head", "final_norm")
"""Where trees of parameters begin, wherever they stand in a state."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The learner's mesh, over all devices (or these) but the sampler's own; None for a single one, which needs none.

    Raises ConfigError where the sizes do not give the number of devices.
    """
    if config == MeshConfig():
        return None
    found = jax.devices() if devices is None else devices
    sizes = config.sizes(len(found))
    return _mesh(sizes, found[: len(found) - config.sampler.devices]) if max(sizes) > 1 else None


def make_sampler_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of the sampler's own devices, the last of all; None where it has none."""
    if not config.sampler.devices:
        return None
    found = jax.devices() if devices is None else devices
    config.sizes(len(found))
    return _mesh(config.sampler.sizes, found[len(found) - config.sampler.devices :])


def _mesh(sizes: Sizes, devices: Sequence[Any]) -> Mesh:
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_mesh(spec: ModelSpec, mesh: Mesh | AbstractMesh | None, field: str = "mesh") -> None:
    """Raises ConfigError for a model that this mesh, of this field of the config, does not divide."""
    if mesh is None:
        return
    lengths = {"D": spec.width, "H": spec.heads, "F": spec.mlp_width, "V": spec.vocab_size}
    named = {"D": "width", "H": "query heads", "F": "mlp width", "V": "rows of the table"}
    for axis, length in lengths.items():
        parts = split_over(axis, "stored", mesh)
        fix = f"{length} / {parts} = {length / parts:g} is no whole number."
        wanted = f"a divisor of the model's {length} {named[axis]}"
        require(length % parts == 0, f"{field}.{'*'.join(TABLE[axis].stored)}", wanted, parts, fix)
    parts, heads = split_over("K", "moving", mesh), spec.kv_heads
    wanted = f"a divisor or a multiple of the model's {heads} kv heads (each device holds whole ones)"
    fix = f"{heads} / {parts} = {heads / parts:g} is no whole number, nor is {parts} / {heads} = {parts / heads:g}."
    require(not (heads % parts and parts % heads), f"{field}.{'*'.join(TABLE['K'].moving)}", wanted, parts, fix)


def check_rows(rows: int, what: str, mesh: Mesh | AbstractMesh | None, micro_batches: int = 1) -> None:
    """Raises ConfigError for a batch whose micro-batches the mesh does not divide; ``what`` names it: grpo.prompts."""
    if mesh is None:
        return
    parts = row_shards(mesh) * micro_batches
    sum_up = " x ".join(f"{name} {mesh.shape[name]}" for name in TABLE["P"].moving)
    sum_up += f" x {micro_batches} micro-batches" if micro_batches > 1 else ""
    fix = f"{rows} / {parts} = {rows / parts:g}: a group lies on one device, whole."
    require(rows % parts == 0, what, f"a multiple of {parts} ({sum_up})", rows, fix)


def split_over(axis: str, column: Column, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts an axis is cut."""
    size = 1
    for name in getattr(TABLE.get(axis, NOWHERE), column):
        size *= mesh.shape[name]
    return size


def row_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Parts into which the rows of a batch are cut: data x fsdp."""
    return 1 if mesh is None else split_over("P", "moving", mesh)


def active() -> AbstractMesh | None:
    """The mesh that a program is traced for; None on a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) <= set(mesh.axis_names) else None


def on_mesh(mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced with this mesh as ``active``; as it is without one."""
    if mesh is None:
        return function

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def partition(axes: str, column: Column) -> PartitionSpec:
    """The table's row for each letter: ``partition("DHE", "stored")`` is P("fsdp", "tensor", None)."""
    names = [getattr(TABLE.get(axis, NOWHERE), column) for axis in axes]
    return PartitionSpec(*(None if not name else name[0] if len(name) == 1 else name for name in names))


def fitting(axes: str, column: Column, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """``partition``, but what the mesh does not divide lies whole on every device: kv heads that are too few, and
    tables that are still to grow (``check_mesh`` refuses the rest)."""
    kept = (
        axis if length % split_over(axis, column, mesh) == 0 else "." for axis, length in zip(axes, shape, strict=True)
    )
    return partition("".join(kept), column)


def constrain(x: Array, axes: str, column: Column = "moving") -> Array:
    """x where the table wants it; ``axes`` has a letter for each of its axes."""
    mesh = active()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, fitting(axes, column, x.shape, mesh))


def constrain_rows(x: Array, last: str) -> Array:
    """An activation [P, ..., last]: rows shared out, whatever stands between on every device."""
    return constrain(x, "P" + "." * (x.ndim - 1 - len(last)) + last)


def parameter_axes(path: tuple[Any, ...], ndim: int) -> str:
    """The letters of a parameter, its gradient or its moment, by its path in any state; dots where it has none."""
    names = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    root = next((place for place, name in enumerate(names) if name in ROOTS), None)
    if root is None:
        return "." * ndim
    axes = ("L" if names[root] == "blocks" else "") + _letters(names[-2], names[-1])
    return axes if len(axes) == ndim else "." * ndim


def _letters(parent: str, leaf: str) -> str:
    """Norms lie whole on every device: they are small, and gathering them would cost more than keeping them."""
    if leaf == "embedding":
        return "VD"
    taken, given = LINEARS.get(parent, ("", ""))
    by_leaf = {
        "kernel": taken + given,
        "bias": given,
        "kernel_scale": given,
        "lora_a": f"{taken}.",
        "lora_b": f".{given}",
    }
    return by_leaf.get(leaf, ".")


def shardings(tree: Any, mesh: Mesh | AbstractMesh, column: Column = "stored") -> Any:
    """The sharding of every leaf: parameters and moments by the table, counters on every device."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, fitting(parameter_axes(path, leaf.ndim), column, leaf.shape, mesh))

    return jax.tree.map_with_path(one, tree)


def gathered_bytes(params: Any, mesh: Mesh | AbstractMesh, element: int) -> int:
    """Bytes that each device receives before a rollout, when all parameters are gathered over the axes that share them
    between uses; ``element`` is the bytes of one number in the compute type. 0 where ``fsdp`` is 1.

    With 7.6e9 parameters in bfloat16, fsdp 8 and tensor 1 that is 7/8 of 15.2 GB.
    """

    def received(path: tuple[Any, ...], leaf: Any) -> int:
        axes = parameter_axes(path, leaf.ndim)
        sharded = [fitting(axes, column, leaf.shape, mesh) for column in ("used", "stored")]
        used, stored = (math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape)) for spec in sharded)
        return (used - stored) * element

    return sum(jax.tree.leaves(jax.tree.map_with_path(received, params)))


def constrain_tree(tree: Tree, column: Column = "stored") -> Tree:
    """Parameters or gradients where the table wants them, inside a program."""
    if active() is None:
        return tree
    return jax.tree.map_with_path(lambda path, x: constrain(x, parameter_axes(path, x.ndim), column), tree)


def rows_sharding(mesh: Mesh, axes: str = "P") -> NamedSharding:
    """Of an array [P, ...] or [N, ...], by the letters of its first axes; everywhere for none."""
    return NamedSharding(mesh, partition(axes, "moving"))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Of what lies whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def key_heads(kv_heads: int) -> int:
    """Heads of keys and values that are kept: the model's, or one for each device where these are more.

    With 2 kv heads on 4 devices each head is kept by two of them, beside the queries that read it.
    """
    mesh = active()
    return kv_heads if mesh is None else max(kv_heads, split_over("K", "moving", mesh))


def spread(x: Float[Array, "... K T E"]) -> Float[Array, "... K T E"]:
    """Keys or values for every device that reads them; see ``key_heads``."""
    heads = x.shape[-3]
    repeats = key_heads(heads) // heads
    return x if repeats == 1 else constrain_rows(jnp.repeat(x, repeats, -3), "K..")


class Cut(NamedTuple):
    """Axes of the mesh over which a table and the tokens that meet it are cut; none on a single device."""

    rows: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    """Of the table, until it is gathered."""


WHOLE = Cut()


def cut(column: Column = "stored") -> Cut:
    """As ``TABLE`` says for a parameter, or for one that is in use; axes of one device cut nothing."""
    mesh = active()
    if mesh is None:
        return WHOLE
    places = TABLE["N"].moving, getattr(TABLE["V"], column), getattr(TABLE["D"], column)
    return Cut(*(tuple(axis for axis in names if mesh.shape[axis] > 1) for names in places))


def first_row(rows: int, axes: tuple[str, ...]) -> Int[Array, ""] | int:
    """Which row of the whole table this device's first one is; it has ``rows`` of them."""
    return jax.lax.axis_index(axes) * rows if axes else 0


def on_each_device(function: Callable[..., Any], taken: Sequence[str], given: Any) -> Callable[..., Any]:
    """The function of one device's part of each argument, by the letters of its axes; as it is without a mesh.

    ``("N", "VN", "VD", "")`` are rows of a batch, their logits, a table of parameters, and what lies whole on every
    device. A tree of arrays may share one entry.
    """
    if active() is None:
        return function

    def spec(axes: str) -> PartitionSpec:
        return partition(axes, "moving" if set(axes) & {"N", "P"} else "stored")

    specs, results = jax.tree.map(spec, tuple(taken)), jax.tree.map(spec, given)
    return jax.shard_map(function, in_specs=specs, out_specs=results, check_vma=False)


def summed(x: Tree, axes: tuple[str, ...]) -> Tree:
    """The sum over these axes of the mesh; x itself over none."""
    return jax.lax.psum(x, axes) if axes else x


def largest(x: Array, axes: tuple[str, ...]) -> Array:
    """The largest over these axes of the mesh; x itself over none."""
    return jax.lax.pmax(x, axes) if axes else x


def by_rows(function: Callable[..., Any], taken: Sequence[Any], given: Any) -> Callable[..., Any]:
    """The function of one device's groups, where nothing else is said about how their arrays are cut; as it is without
    a mesh. ``taken`` and ``given`` are trees of letters: "P..." has groups or their rows, "" lies whole everywhere."""
    if active() is None:
        return function
    names = TABLE["P"].moving

    def spec(axes: str) -> PartitionSpec:
        return PartitionSpec(names) if axes else PartitionSpec()

    specs, results = jax.tree.map(spec, tuple(taken)), jax.tree.map(spec, given)
    return jax.shard_map(function, in_specs=specs, out_specs=results, axis_names=set(names), check_vma=False)


def first_group(groups: int) -> Int[Array, ""] | int:
    """Inside ``by_rows``: which of all groups is this device's first; it has ``groups`` of them."""
    return first_row(groups, () if active() is None else TABLE["P"].moving)
