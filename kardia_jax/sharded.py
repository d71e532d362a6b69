"""State, sums and batches that are sharded over a mesh: into a program, through it, and out to the host.

The table of ``model/sharding.py`` says where an axis lies inside a program. What is here says it at a program's edges,
which the compiler would otherwise choose: a state comes out where it went in (``in_place``), gradients and moments
begin beside their parameters (``sums_on``, ``make_start``), a batch is shared out (``placed``) and what was sampled is
read whole (``looking``). Each is the plain thing on a single device, whose mesh is None.

    update = in_place(update, mesh)
    state, metrics = update(make_start(optimizer, mesh)(params), placed(batch, mesh), frozen)
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.stages import Lowered

from kardia_jax.grpo.update import Sums, init_state, no_sums
from kardia_jax.hosts import alone
from kardia_jax.model.sharding import everywhere, on_mesh, rows_sharding, shardings
from kardia_jax.placement import Tree, put, shared_out, to_host
from kardia_jax.types import Mean, Params, TrainState


@dataclass(frozen=True)
class InPlace:
    """(first, ...) -> (first, ...) compiled for a mesh: the first result lies where the first argument lay, which it
    takes; the rest lies whole on every device."""

    function: Callable[..., Any]
    mesh: Mesh

    def __call__(self, first: Any, *rest: Any) -> Any:
        return self._compiled(first)(first, *rest)

    def lower(self, first: Any, *rest: Any) -> Lowered:
        return self._compiled(first).lower(first, *rest)

    def _compiled(self, first: Any) -> Any:
        leaves, tree = jax.tree.flatten(first)
        return _in_place(self.function, self.mesh, tree, tuple(leaf.sharding for leaf in leaves))


@functools.cache
def _in_place(function: Callable[..., Any], mesh: Mesh, tree: Any, places: tuple[Any, ...]) -> Any:
    out = jax.tree.unflatten(tree, places), everywhere(mesh)
    return jax.jit(on_mesh(mesh, function), donate_argnums=0, out_shardings=out)


def in_place(function: Callable[..., Any], mesh: Mesh | None) -> Any:
    """(first, ...) -> (first, ...) compiled; ``first`` is donated."""
    return jax.jit(function, donate_argnums=0) if mesh is None else InPlace(function, mesh)


def sums_on(mesh: Mesh | None) -> Callable[[Params], Sums]:
    """``no_sums`` compiled, each gradient where its parameter lies: zeros by themselves would all lie on one device."""
    if mesh is None:
        return jax.jit(no_sums)

    def start(params: Params) -> Sums:
        leaves, tree = jax.tree.flatten(params)
        return _sums_at(mesh, tree, tuple(leaf.sharding for leaf in leaves))(params)

    return start


@functools.cache
def _sums_at(mesh: Mesh, tree: Any, places: tuple[Any, ...]) -> Callable[[Params], Sums]:
    whole: Any = everywhere(mesh)
    out = Sums(jax.tree.unflatten(tree, places), Mean(whole, whole), whole)
    return jax.jit(on_mesh(mesh, no_sums), out_shardings=out)


def make_start(optimizer: optax.GradientTransformation, mesh: Mesh | None) -> Callable[[Params], TrainState]:
    """``init_state``, its moments where their parameters lie on the mesh; the parameters stay the caller's own."""
    if mesh is None:
        return functools.partial(init_state, optimizer=optimizer)

    def start(params: Params) -> TrainState:
        places = shardings(jax.eval_shape(optimizer.init, params), mesh)
        zero = put(np.int32(0), everywhere(mesh))
        return TrainState(zero, params, jax.jit(optimizer.init, out_shardings=places)(params), jnp.copy(zero))

    return start


def placed(batch: Tree, mesh: Mesh | None) -> Tree:
    """The batch shared out over the mesh, whole groups to each device; each process gives its own part of it."""
    return batch if mesh is None else shared_out(batch, rows_sharding(mesh), everywhere(mesh))


def looking(mesh: Mesh | None) -> Callable[[Any], Any]:
    """Arrays of the mesh, whole, on the host of every process that has a part of it."""
    if mesh is None or alone():
        return to_host
    everybodys = jax.jit(lambda tree: tree, out_shardings=everywhere(mesh))
    return lambda tree: to_host(everybodys(tree))
